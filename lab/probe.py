"""Is a fact linearly readable, by layer and place, and does that say what will be answered?

P- and Q-probing of Allen-Zhu & Li, Physics of Language Models 3.1 (arXiv 2309.14316): a linear
classifier reads the value from the residual stream. It is fitted on known people and tested on
held-out ones, about whom both models were taught alike; the same on shuffled values is chance. The
paper also adapts the embedding by a low rank and has thousands of people for each value; here the
model stays as it is and a value has about eleven, so top-1 is a low bound. The rank of the truth
shows less.

python -m lab.probe --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.world import ATTRIBUTES, World
from hf.adapter import chat_prompt
from lab.knowledge import ask_all, cloze_prompts
from lab.pair import Pair, of_both, run_instrument
from lab.questions import Question, facts_of, openings
from lab.residual import name_tokens, read
from lab.stats import Mean, Share
from training.checkpoint import Checkpoint

PENALTIES = tuple(10.0**k for k in range(-4, 5))
PLACES = ("name", "cloze", "question", "reply")


@dataclass(frozen=True)
class Readout:
    """How well values are read from one place in one layer; of held-out people.

    Attributes:
        first: the true value scores highest of all 40.
        rank: the share of the other values that score lower (of those that tie, half), 1 at best, a
            half by chance.
        shuffled: `first`, fitted on the known people's values in another order.
    """

    first: Share
    rank: Mean
    shuffled: Share


@dataclass(frozen=True)
class Probed:
    """What can be read from one model.

    Attributes:
        places: by place and layer (0 is what goes into the first block). "name": the last token of
            a name that begins a document; "cloze": the last token before the value in a sentence
            of the text; "question": the name's last token in a question in the chat template;
            "reply": the last token of that prompt, where the reply begins. The model itself reads
            values at "cloze", and after tuning at "reply": what the classifier finds there says
            how much it can find.
        answered: how many of some held-out facts are answered rightly, stop or not: of those that
            are read first at the best layer of a place, of those that are not ("read", "unread"),
            and, since both may just say what is frequent, of those that the classifier of shuffled
            values reads first ("shuffled").
    """

    places: dict[str, dict[str, Readout]]
    answered: dict[str, dict[str, Share]]


def probes(pair: Pair, questions: int) -> dict[str, Probed]:
    """Both models; `questions` is how many held-out facts are asked for beside all that are read.

    Raises:
        ValueError: there is no world, so nobody knows the values.
    """
    return of_both(replace(pair, examples=[]), probed, questions)


def probed(checkpoint: Checkpoint, world: World, n: int) -> Probed:
    """One model's readouts."""
    rng = random.Random(f"probes {world.config.seed}")
    asked = openings(facts_of(world, "known") + facts_of(world, "held_out"), rng)
    room = checkpoint.model.config.block_size
    asked = [q for q in asked if len(chat_prompt(q.messages, checkpoint.tokenizer)) <= room]
    held_out = [q for q in asked if q.turn.person.split == "held_out"]
    readouts: dict[str, dict[str, Readout]] = {}
    answered: dict[str, dict[str, Share]] = {}
    graded = ask_all(checkpoint, world, rng.sample(held_out, min(n, len(held_out))))
    for place in PLACES:
        layers = [ranks_of(stream, asked) for stream in streams_at(place, checkpoint, world, asked)]
        readouts[place] = {str(i): layer.readout for i, layer in enumerate(layers)}
        best = max(layers, key=lambda layer: layer.readout.rank.mean)
        groups: dict[str, list[bool]] = {"read": [], "unread": [], "shuffled": []}
        for question, grade in graded:
            groups["read" if best.first[topic(question)] else "unread"].append(grade.right)
            if best.shuffled[topic(question)]:
                groups["shuffled"].append(grade.right)
        answered[place] = {group: Share.of(flags) for group, flags in groups.items()}
    return Probed(readouts, answered)


def topic(question: Question) -> str:
    """What a question is about."""
    return f"{question.turn.person.name}/{question.turn.attribute.name}"


def streams_at(place: str, checkpoint: Checkpoint, world: World, asked: list[Question]) -> Tensor:
    """The residual stream at one of PLACES for each question, (n_layer + 1, n, C)."""
    tokenizer = checkpoint.tokenizer
    names = [question.turn.person.name for question in asked]
    if place in ("name", "cloze"):
        turns = [question.turn for question in asked]
        texts = (
            names
            if place == "name"
            else [
                cloze_prompts(turn.person, turn.attribute, world.config.paraphrases)[0]
                for turn in turns
            ]
        )
        rows = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts]
        return read(checkpoint, rows, [len(row) - 1 for row in rows])
    rows = [chat_prompt(question.messages, tokenizer) for question in asked]
    if place == "reply":
        return read(checkpoint, rows, [len(row) - 1 for row in rows])
    ends = [name_tokens(row, name, tokenizer)[-1] for row, name in zip(rows, names, strict=True)]
    return read(checkpoint, rows, ends)


@dataclass(frozen=True)
class Ranks:
    """A readout, and which held-out facts it reads first, fitted on the values or shuffled ones."""

    readout: Readout
    first: dict[str, bool]
    shuffled: dict[str, bool]


def ranks_of(stream: Tensor, asked: list[Question]) -> Ranks:
    """Fits a classifier for each kind of fact on known people and tests it on held-out ones."""
    first, shuffled = dict[str, bool](), dict[str, bool]()
    ranks = list[float]()
    for attribute in ATTRIBUTES:
        values = {value: i for i, value in enumerate(attribute.values)}
        parts: dict[str, list[int]] = {"known": [], "held_out": []}
        for i, question in enumerate(asked):
            if question.turn.attribute is attribute:
                parts[question.turn.person.split].append(i)
        known, test = ([values[asked[i].value] for i in part] for part in parts.values())
        train = (stream[parts["known"]], torch.tensor(known))
        scores = classify(*train, len(values), stream[parts["held_out"]])
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(1))
        others = classify(train[0], train[1][order], len(values), stream[parts["held_out"]])
        for i, true, row, chance in zip(parts["held_out"], test, scores, others, strict=True):
            first[topic(asked[i])] = int(row.argmax()) == true
            shuffled[topic(asked[i])] = int(chance.argmax()) == true
            lower, ties = int((row < row[true]).sum()), int((row == row[true]).sum()) - 1
            ranks.append((lower + ties / 2) / (len(values) - 1))
    true_share, chance_share = (Share.of(flags.values()) for flags in (first, shuffled))
    return Ranks(Readout(true_share, Mean.of(ranks), chance_share), first, shuffled)


def classify(inputs: Tensor, classes: Tensor, n: int, test: Tensor) -> Tensor:
    """Scores (m, n) of n classes for `test` (m, C), by ridge regression on one-hot classes.

    The penalty is the one of PENALTIES with the least squared error when each input (k, C) is left
    out in turn, which for ridge regression has a closed form (Allen 1974, PRESS).
    """
    mean, scale = inputs.mean(dim=0), inputs.std(dim=0) + 1e-12
    X, Z = (inputs - mean) / scale, (test - mean) / scale
    Y = torch.nn.functional.one_hot(classes, n).to(X)
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    target, least, best = U.T @ (Y - Y.mean(dim=0)), float("inf"), Y[:0]
    for penalty in PENALTIES:
        shrunk = S.square() / (S.square() + penalty * len(X))
        fitted = U @ (shrunk[:, None] * target)
        leverage = (U.square() * shrunk).sum(dim=1) + 1 / len(X)
        error = float((((Y - Y.mean(dim=0) - fitted) / (1 - leverage)[:, None]) ** 2).sum())
        if error < least:
            least, best = error, Vh.T @ ((shrunk / S.clamp(min=1e-12))[:, None] * target)
    return Z @ best + Y.mean(dim=0)


if __name__ == "__main__":
    run_instrument(__doc__ or "", probes, questions=100, shots=False)
