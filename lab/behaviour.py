"""How a model behaves when it is asked: does it answer, stop, repeat itself, keep the context?

Response ranking is that of Hewitt et al. 2024 (arXiv 2409.14254): without any generation, is the
right reply to a question more likely than the reply to another question?

python -m lab.behaviour --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from data.chat import Message, Prompt
from data.world import World
from hf.adapter import chat_prompt
from lab.knowledge import ask_all, complete, summarize
from lab.likelihood import ask, log_likelihoods, predictions
from lab.pair import Pair, run_instrument
from lab.questions import BEFORE, TURNS, draw, later_turns, openings
from lab.stats import Mean, Share
from training.checkpoint import Checkpoint

ROWS = 16  # replies whose whole distributions are held at once


@dataclass(frozen=True)
class Behaviour:
    """What a model's greedy replies to a set of conversations are like.

    Attributes:
        stops: ends with the end-of-turn token within four times the longest true reply.
        p_end: probability of that token where the true reply ends.
        brief: stops, asks nothing, and is at most twice as long as the true reply, right or wrong.
        tokens: length of the reply, up to the limit.
        entropy: of the distribution that each token of its reply was chosen from, in nats, over as
            many first tokens as the true reply has. exp of it is the branching factor: among how
            many tokens the model in effect chooses (2506.17871).
        echoes: the reply repeats the question word for word.
        asks_on: it goes on with a question of its own.
        ranking: the true reply is more likely than that of another conversation, the next longer
            one of these, so that length decides little; chance is half.
        follow_up, other_person, return_to_first, pronoun_after_two: in the chat template, about a
            world: see `in_turn`.
    """

    stops: Share
    p_end: Mean
    brief: Share
    tokens: Mean
    entropy: Mean
    echoes: Share
    asks_on: Share
    ranking: Share
    follow_up: dict[str, Share]
    other_person: dict[str, Share]
    return_to_first: dict[str, Share]
    pronoun_after_two: dict[str, Share]


def behaviour(pair: Pair, questions: int) -> dict[str, Behaviour]:
    """Base and instruct in the chat template; the base asked in a text that it can read, and there
    after examples, if the pair has some."""
    chosen, limit = pair.conversations[:questions], pair.limit
    texts = {k: put for k, put in pair.contexts.items() if k in ("plain", "examples")}
    return {
        "base": behave(pair.base, chosen, chat_prompt, limit, pair.world),
        **{f"base_{k}": behave(pair.base, chosen, put, limit, None) for k, put in texts.items()},
        "instruct": behave(pair.instruct, chosen, chat_prompt, limit, pair.world),
    }


def behave(
    checkpoint: Checkpoint,
    conversations: list[list[Message]],
    prompt: Prompt,
    limit: int,
    world: World | None,
) -> Behaviour:
    """One model's behaviour, the conversations put to it by `prompt`."""
    tokenizer, end = checkpoint.tokenizer, checkpoint.tokenizer.end_of_turn
    prompts = [prompt(c[:-1], tokenizer) for c in conversations]
    true = [[*tokenizer.encode(c[-1]["content"]), end] for c in conversations]
    replies = ask(checkpoint, prompts, limit)
    texts = [tokenizer.decode([i for i in ids if i != end]) for ids in replies]
    asks = ["?" in text or "Question:" in text for text in texts]
    stops = [ids[-1] == end for ids in replies]
    starts = [ids[: len(expected)] for ids, expected in zip(replies, true, strict=True)]
    questions = [c[-2]["content"] for c in conversations]
    others = next_longer(true)
    own, other = (log_likelihoods(checkpoint, prompts, part) for part in (true, others))
    return Behaviour(
        stops=Share.of(stops),
        p_end=Mean.of(math.exp(tokens[-1]) for tokens in own),
        brief=Share.of(
            stop and not asked and len(ids) <= 2 * len(expected)
            for stop, asked, ids, expected in zip(stops, asks, replies, true, strict=True)
        ),
        tokens=Mean.of(map(len, replies)),
        entropy=entropy(checkpoint, prompts, starts),
        echoes=Share.of(q.lower() in t.lower() for q, t in zip(questions, texts, strict=True)),
        asks_on=Share.of(asks),
        # Where the two replies are the same text there is nothing to rank.
        ranking=Share.of(
            sum(a[:-1]) > sum(b[:-1])
            for a, b, mine, another in zip(own, other, true, others, strict=True)
            if mine != another
        ),
        **{k: (world and in_turn(checkpoint, world, k, prompt, len(prompts))) or {} for k in TURNS},
    )


def next_longer(replies: list[list[int]]) -> list[list[int]]:
    """For each reply the next longer one, or one as long; for the longest, the one before it."""
    order = sorted(range(len(replies)), key=lambda i: len(replies[i]))
    after = [*order[1:], order[-2:][0]]
    return [replies[i] for _, i in sorted(zip(order, after, strict=True))]


@torch.inference_mode()
def entropy(checkpoint: Checkpoint, prompts: list[list[int]], replies: list[list[int]]) -> Mean:
    """Over all tokens of some replies: the entropy in nats of what each might have been."""
    found = list[float]()
    for i in range(0, len(prompts), ROWS):
        rows = slice(i, i + ROWS)
        for logprobs in predictions(checkpoint, prompts[rows], replies[rows]):
            found += (-(logprobs.exp() * logprobs).nan_to_num()).sum(dim=1).tolist()
    return Mean.of(found)


def in_turn(
    checkpoint: Checkpoint, world: World, kind: str, prompt: Prompt, n: int
) -> dict[str, Share]:
    """n questions about held-out people at the end of conversations of a kind of TURNS.

    "with" and "without" the true turns before it: answered, in either form. With them also
    "right", stop or not, and "before": the fact named instead is that of somebody of those turns.
    """
    after, alone = later_turns(world, kind, n)
    graded = ask_all(checkpoint, world, after, prompt)
    answers = summarize(graded)
    return {
        "with": answers.answered["all"],
        "without": summarize(ask_all(checkpoint, world, alone, prompt)).answered["all"],
        "right": answers.right["all"],
        "before": Share.of(g.named.endswith(BEFORE) for _, g in graded),
    }


@dataclass(frozen=True)
class Point:
    """What a model does, in four figures: enough to follow it through training or mixing.

    Attributes:
        stops: replies that end by themselves.
        right: the right value named first when a bare one is asked for about held-out people, stop
            or not (a forced stop); of nothing where there is no world, as the others below.
        answers: right, bare, and stopped.
        cloze: completed sentences of the text, about the same facts.
        kept: right, or completed.
    """

    stops: Share
    right: Share
    answers: Share
    cloze: Share
    kept: Share


def measure_point(pair: Pair, checkpoint: Checkpoint, n: int) -> Point:
    """Asks a model n questions, and to complete n biographies, always the same ones."""
    if pair.world is None:
        tokenizer = checkpoint.tokenizer
        prompts = [chat_prompt(c[:-1], tokenizer) for c in pair.conversations[:n]]
        replies = ask(checkpoint, prompts, pair.limit)
        nothing = Share(0, 0)
        stops = Share.of(r[-1] == tokenizer.end_of_turn for r in replies)
        return Point(stops, nothing, nothing, nothing, nothing)
    rng = random.Random(f"probe {pair.world.config.seed}")
    facts = draw(pair.world, "held_out", n, rng)
    answers = summarize(ask_all(checkpoint, pair.world, openings(facts, rng)))
    right, cloze = answers.right["all"], complete(checkpoint, pair.world, facts, rng)["all"]
    either = zip(right.flags, cloze.flags, strict=True)
    kept = Share.of(a or b for (_, a), (_, b) in either)
    return Point(answers.stops, right, answers.answered["all"], cloze, kept)


if __name__ == "__main__":
    run_instrument(__doc__ or "", behaviour, questions=100)
