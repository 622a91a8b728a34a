"""Is a fact linearly readable, by layer and place, and does that say what will be answered?

P- and Q-probing of Allen-Zhu & Li, Physics of Language Models 3.1 (arXiv 2309.14316): a linear
classifier reads the value from the residual stream. It is fitted on known people and tested on
held-out ones, about whom both models were taught alike; the same on shuffled values is chance. The
paper also adapts the embedding by a low rank and has thousands of people for each value; here the
model stays as it is and a value has about eleven, so top-1 is a low bound. The rank of the truth
shows less.

Checkpoints that have read about no world are read for facts of public knowledge (data/facts.toml,
or a file of your own), of relations whose values many subjects share, such as continents. What
their names give away stands in layer 0.

python -m lab.probe --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data.chat import Message
from data.world import ATTRIBUTES, World
from hf.adapter import chat_prompt
from lab.facts import FactPair, in_context, with_facts
from lab.knowledge import ask_all, cloze_prompts
from lab.pair import NothingFitsError, Pair, of_both, open_both, pair_of, run_instrument, world_of
from lab.questions import Question, facts_of, openings
from lab.relations import Fact
from lab.residual import name_tokens, read
from lab.stats import Mean, Share
from training.checkpoint import Checkpoint

PENALTIES = tuple(10.0**k for k in range(-4, 5))
PLACES = ("name", "cloze", "question", "reply")
SHARED = 4  # subjects a value, on average: of fewer a classifier learns nothing


@dataclass(frozen=True)
class Readout:
    """How well values are read from one place in one layer; of held-out people.

    Attributes:
        first: the true value scores highest of all (of a world 40).
        rank: the share of the other values that score lower (of those that tie, half), 1 at best, a
            half by chance, and more where some values are more frequent, as continents are.
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


def open_probed(
    base: str, instruct: str, device: str, file: Path | None, shots: int = 0
) -> Pair | FactPair:
    """Two checkpoints and whose facts to read: their world's, or those of a file, by default of
    data/facts.toml.

    Raises:
        ValueError: they are no pair, or the file holds no facts that fit into their context.
    """
    pair = open_both(base, instruct, device)
    if file is None and world_of(*pair) is not None:
        return pair_of(pair, None, shots)
    return with_facts(pair, file, shots)


def probes(pair: Pair, questions: int) -> dict[str, Probed]:
    """Both models; `questions` is how many held-out facts are asked for beside all that are read.
    Of a pair that has read about no world the facts are public ones, read in tenths: see `tenths`.

    Raises:
        NothingFitsError: there are too few facts whose value others share.
    """
    if pair.world is not None:
        return of_both(replace(pair, examples=[]), probed, questions)
    known = pair if isinstance(pair, FactPair) else with_facts((pair.base, pair.instruct), None, 0)
    models = {"base": known.base, "instruct": known.instruct}
    return {name: probed_facts(model, known, questions) for name, model in models.items()}


@dataclass(frozen=True)
class Texts:
    """What is read of a fact: whom it is about, a sentence up to the value, the question."""

    name: str
    cloze: str
    messages: list[Message]


@dataclass(frozen=True)
class Fold:
    """What one classifier is fitted on and tested on: rows of a stream, each with its class."""

    n_classes: int
    train: dict[int, int]
    test: dict[int, int]


def probed(checkpoint: Checkpoint, world: World, n: int) -> Probed:
    """One model's readouts, fitted on known people, tested on held-out ones."""
    rng = random.Random(f"probes {world.config.seed}")
    asked = openings(facts_of(world, "known") + facts_of(world, "held_out"), rng)
    room = checkpoint.model.config.block_size
    asked = [q for q in asked if len(chat_prompt(q.messages, checkpoint.tokenizer)) <= room]
    held_out = [i for i, q in enumerate(asked) if q.turn.person.split == "held_out"]
    chosen = rng.sample(held_out, min(n, len(held_out)))
    grades = [g.right for _, g in ask_all(checkpoint, world, [asked[i] for i in chosen])]
    texts = [
        Texts(
            q.turn.person.name,
            cloze_prompts(q.turn.person, q.turn.attribute, world.config.paraphrases)[0],
            q.messages,
        )
        for q in asked
    ]
    return readouts(checkpoint, texts, by_kind(asked), dict(zip(chosen, grades, strict=True)))


def by_kind(asked: list[Question]) -> list[Fold]:
    """A classifier for each kind of fact."""
    folds = []
    for attribute in ATTRIBUTES:
        values = {value: i for i, value in enumerate(attribute.values)}
        parts: dict[str, dict[int, int]] = {"known": {}, "held_out": {}}
        for i, question in enumerate(asked):
            if question.turn.attribute is attribute:
                parts[question.turn.person.split][i] = values[question.value]
        folds.append(Fold(len(values), parts["known"], parts["held_out"]))
    return folds


def probed_facts(checkpoint: Checkpoint, pair: FactPair, n: int) -> Probed:
    """One model's readouts of public facts, and what it replies to n of them."""
    facts, folds = tenths(pair)
    texts = [Texts(f.subject, f.cloze, [Message(role="user", content=f.question)]) for f in facts]
    chosen = random.Random("probes").sample(range(len(facts)), min(n, len(facts)))
    found = in_context(checkpoint, pair, [facts[i] for i in chosen], "chat")
    grades = (right for _, right in found.said.right["all"].flags)
    return readouts(checkpoint, texts, folds, dict(zip(chosen, grades, strict=True)))


def tenths(pair: FactPair) -> tuple[list[Fact], list[Fold]]:
    """The facts of relations in which a value is that of SHARED subjects or more on average, and
    ten classifiers of each: fitted on nine tenths of the subjects, tested on the others.

    Raises:
        NothingFitsError: there is no such relation, or none that fits into the context.
    """
    facts, folds = list[Fact](), list[Fold]()
    for relation in pair.relations.values():
        if not 2 <= len(relation.values) <= len(relation.facts) / SHARED:
            continue
        own = [*relation.facts.values()]
        random.Random("tenths").shuffle(own)
        rows = {i: relation.values.index(f.value) for i, f in enumerate(own, len(facts))}
        for k in range(10):
            test = {i: value for i, value in rows.items() if i % 10 == k}
            train = {i: value for i, value in rows.items() if i % 10 != k}
            folds.append(Fold(len(relation.values), train, test))
        facts += own
    if not facts:
        what = f"has values that {SHARED} subjects share each and fits into the context"
        raise NothingFitsError(f"no relation of {pair.file} {what}")
    return facts, [fold for fold in folds if fold.test]


def readouts(
    checkpoint: Checkpoint, texts: list[Texts], folds: list[Fold], answered: dict[int, bool]
) -> Probed:
    """All places of one model.

    Args:
        answered: of some rows that are tested, whether the model's reply is right.
    """
    places: dict[str, dict[str, Readout]] = {}
    groups: dict[str, dict[str, Share]] = {}
    for place in PLACES:
        layers = [ranks_of(stream, folds) for stream in streams_at(place, checkpoint, texts)]
        places[place] = {str(i): layer.readout for i, layer in enumerate(layers)}
        best = max(layers, key=lambda layer: layer.readout.rank.mean)
        found: dict[str, list[bool]] = {"read": [], "unread": [], "shuffled": []}
        for i, right in answered.items():
            found["read" if best.first[i] else "unread"].append(right)
            if best.shuffled[i]:
                found["shuffled"].append(right)
        groups[place] = {group: Share.of(flags) for group, flags in found.items()}
    return Probed(places, groups)


def streams_at(place: str, checkpoint: Checkpoint, texts: list[Texts]) -> Tensor:
    """The residual stream at one of PLACES for each text, (n_layer + 1, n, C)."""
    tokenizer = checkpoint.tokenizer
    if place in ("name", "cloze"):
        begun = [text.name if place == "name" else text.cloze for text in texts]
        rows = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in begun]
        return read(checkpoint, rows, [len(row) - 1 for row in rows])
    rows = [chat_prompt(text.messages, tokenizer) for text in texts]
    if place == "reply":
        return read(checkpoint, rows, [len(row) - 1 for row in rows])
    ends = [name_tokens(r, t.name, tokenizer)[-1] for r, t in zip(rows, texts, strict=True)]
    return read(checkpoint, rows, ends)


@dataclass(frozen=True)
class Ranks:
    """A readout, and which rows it reads first, fitted on the values or shuffled ones."""

    readout: Readout
    first: dict[int, bool]
    shuffled: dict[int, bool]


def ranks_of(stream: Tensor, folds: list[Fold]) -> Ranks:
    """Fits a classifier for each fold and tests it."""
    first, shuffled = dict[int, bool](), dict[int, bool]()
    ranks = list[float]()
    for fold in folds:
        inputs, classes = stream[[*fold.train]], torch.tensor([*fold.train.values()])
        test = stream[[*fold.test]]
        scores = classify(inputs, classes, fold.n_classes, test)
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(1))
        others = classify(inputs, classes[order], fold.n_classes, test)
        for (i, true), row, chance in zip(fold.test.items(), scores, others, strict=True):
            first[i] = int(row.argmax()) == true
            shuffled[i] = int(chance.argmax()) == true
            lower, ties = int((row < row[true]).sum()), int((row == row[true]).sum()) - 1
            ranks.append((lower + ties / 2) / (fold.n_classes - 1))
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
    file = ("--facts", "read these facts, .toml or .jsonl (default: the world's, else our own)")
    run_instrument(__doc__ or "", probes, 100, open_probed, file, shots=False)
