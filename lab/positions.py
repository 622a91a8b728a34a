"""Grafting by position: at which tokens does the model need its tuned weights?

At some tokens of a prompt the instruct model's weights compute, at all others the base's; keys and
values are made where their token stands (dynamic weight grafting, arXiv 2506.20746, which finds
that a fact is enriched at its entity and recalled at the last token). Answers are read off with
greedy decoding.

python -m lab.positions --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.tokenizer import Tokenizer
from hf.adapter import chat_prompt
from lab.knowledge import summarize
from lab.pair import Pair, run_instrument
from lab.questions import Question, draw, grade, openings, true_replies
from lab.residual import changing, name_tokens
from lab.stats import Share
from model.gpt import GPT

PLACES = ("template", "words", "name", "last")
BOTH = ("words", "last")
ROWS = 64


@dataclass(frozen=True)
class Grafted:
    """Replies about held-out people; a bare value is asked for.

    Attributes:
        right: names the true value and no other of its kind first, stop or not.
        stops: ends by itself, in twice the tokens of the longest true reply.
        answers: right, bare, and stopped.
    """

    right: Share
    stops: Share
    answers: Share


def positions(pair: Pair, questions: int) -> dict[str, dict[str, Grafted]]:
    """By place: the instruct weights "only" there, and everywhere but there ("without").

    Places: "template", the control tokens but the last one; "words", the question and the
    instruction but the name; "name"; "last", the last token of the prompt and the reply itself.
    "nowhere" has both models as they are, "words and last" two places at once.

    Raises:
        ValueError: there is no world, so nobody knows where the names are.
    """
    if pair.world is None:
        raise ValueError("names are looked for in questions about a world; there is none")
    rng = random.Random(f"positions {pair.world.config.seed}")
    asked = openings(draw(pair.world, "held_out", questions, rng), rng)
    tokenizer = pair.base.tokenizer
    prompts = [chat_prompt(question.messages, tokenizer) for question in asked]
    places = [
        places_of(prompt, question.turn.person.name, tokenizer)
        for prompt, question in zip(prompts, asked, strict=True)
    ]
    longest = max(len(tokenizer.encode(reply)) for reply in true_replies(pair.world, ("bare",)))

    def grafted(tuned: Collection[str]) -> Grafted:
        marked = [[place in tuned for place in row] for row in places]
        limit = min(2 * (longest + 1), pair.base.model.config.block_size - max(map(len, prompts)))
        replies = continue_greedily(pair, prompts, marked, "last" in tuned, limit)
        return graded(pair, asked, replies)

    groups = {"nowhere": (), **{place: (place,) for place in PLACES}, "words and last": BOTH}
    return {
        group: {"only": grafted(chosen), "without": grafted(set(PLACES) - set(chosen))}
        for group, chosen in groups.items()
    }


def places_of(prompt: list[int], name: str, tokenizer: Tokenizer) -> list[str]:
    """One of PLACES for each token of a prompt."""
    control = {tokenizer.end_of_text, *tokenizer.template_ids}
    found = ["template" if token in control else "words" for token in prompt]
    for i in name_tokens(prompt, name, tokenizer):
        found[i] = "name"
    return [*found[:-1], "last"]


def graded(pair: Pair, asked: Sequence[Question], replies: Sequence[list[int]]) -> Grafted:
    """The grades of some replies."""
    both = zip(asked, replies, strict=True)
    answers = summarize([(question, grade(pair.base, question, ids)) for question, ids in both])
    return Grafted(answers.right["all"], answers.stops, answers.answered["all"])


@torch.inference_mode()
def continue_greedily(
    pair: Pair, prompts: list[list[int]], marked: list[list[bool]], after: bool, limit: int
) -> list[list[int]]:
    """Greedy replies of up to `limit` tokens, without a cache.

    Args:
        marked: for each token of each prompt, whether the instruct model's weights compute there.
        after: the same for all tokens of the reply.
    """
    model, end = pair.base.model, pair.base.tokenizer.end_of_turn
    device, replies = model.wte.weight.device, list[list[int]]()
    for i in range(0, len(prompts), ROWS):
        rows = [list(prompt) for prompt in prompts[i : i + ROWS]]
        places = marked[i : i + ROWS]
        begins, ended = [len(row) for row in rows], [False] * len(rows)
        for _ in range(limit):
            width = max(map(len, rows))
            marks = [place + [after] * (width - len(place)) for place in places]
            padded = [row + [0] * (width - len(row)) for row in rows]
            tuned = torch.tensor(marks, device=device)
            with mixing(model, pair.instruct.model, tuned):
                logits = model.logits(model.hidden(torch.tensor(padded, device=device)))
            for r, row in enumerate(rows):
                if not ended[r]:
                    row.append(int(logits[r, len(row) - 1].argmax()))
                    ended[r] = row[-1] == end
            if all(ended):
                break
        replies += [row[begin:] for row, begin in zip(rows, begins, strict=True)]
    return replies


def mixing(base: GPT, instruct: GPT, tuned: Tensor) -> contextlib.AbstractContextManager[None]:
    """Within it `base` computes with the weights of `instruct` where `tuned` (B, T) is true.

    Every module with parameters of its own works token by token, so each of its outputs is that of
    one of the two models.
    """
    owned = (name for name, m in base.named_modules() if list(m.parameters(recurse=False)))
    pairs = {base.get_submodule(name): instruct.get_submodule(name) for name in owned}

    def change(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        other = pairs[module].forward(
            *args
        )  # not the call: with one model on both sides it is hooked
        if module is base.wte and hasattr(base, "wpe"):  # not called, but looked up
            n = out.shape[1]
            other = other + instruct.wpe.weight[:n] - base.wpe.weight[:n]
        return torch.where(tuned[..., None], other, out)

    called = [module for module in pairs if module is not getattr(base, "wpe", None)]
    return changing(called, change)


if __name__ == "__main__":
    run_instrument(__doc__ or "", positions, questions=60, shots=False)
