"""Same knowledge, different behaviour: what a model completes, and what it answers.

The protocol of Allen-Zhu & Li, Physics of Language Models 3.1 (arXiv 2309.14316), in miniature.
All decoding is greedy.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from data.chat import Message, render_prompt
from data.tokenizer import Tokenizer
from data.world import (
    ATTRIBUTES,
    HE_NAMES,
    LAST_ENDS,
    LAST_STARTS,
    SPLITS,
    Attribute,
    Person,
    World,
    cloze_prompts,
    exchange,
)
from model.generate import Sampling, generate
from training.checkpoint import Checkpoint

ROWS = 100  # prompts generated at once
Question = tuple[Person, Attribute, list[Message]]


@dataclass(frozen=True)
class Cells:
    """One model's row of the table: shares of right replies.

    Attributes:
        cloze: by split of people, a biography sentence is completed with the right value.
        answers: by split, a question in a phrasing that instruction tuning uses is answered by a
            reply that names the right value and no other of its kind, and stops by itself.
        rephrased: as `answers`, in phrasings that instruction tuning never shows.
        mentions: the replies of `answers` that name the right value at all, stopping or not.
        stops: of the same replies, over all splits, those that end with the end-of-turn token.
        next_document: of the same, those that run into another document (end-of-text).
        follow_up: as `answers`, on a held-out person's second question, which does not name them;
            the first one stands answered rightly before it.
        n: questions behind each share (`stops` and `next_document`: behind each split of them).
    """

    cloze: dict[str, float]
    answers: dict[str, float]
    rephrased: dict[str, float]
    mentions: dict[str, float]
    stops: float
    next_document: float
    follow_up: float
    n: int


@dataclass(frozen=True)
class Answers:
    """Shares of replies to one set of questions; the names are those of `Cells`."""

    right: float
    mentions: float
    stops: float
    next_document: float


def measure(checkpoint: Checkpoint, world: World, n: int) -> Cells:
    """One model's row, on n questions per cell drawn evenly over people and attributes.

    Raises:
        ValueError: the world has fewer than n facts in a split.
    """
    rng = random.Random(f"questions {world.config.seed}")
    cloze, answers, rephrased = {}, {}, {}
    for split in SPLITS:
        facts = draw(world, split, n, rng)
        cloze[split] = complete(checkpoint, world, facts, rng)
        used = [(p, a, exchange(p, a, rng.choice(a.questions))[:1]) for p, a in facts]
        new = [(p, a, exchange(p, a, rng.choice(a.unused_questions))[:1]) for p, a in facts]
        answers[split] = answer(checkpoint, used)
        rephrased[split] = answer(checkpoint, new).right
    follow_ups = []
    for person, attribute in draw(world, "held_out", n, rng):
        first = rng.choice([a for a in ATTRIBUTES if a is not attribute])
        opening = exchange(person, first, rng.choice(first.questions))
        second = exchange(person, attribute, rng.choice(attribute.follow_ups))[:1]
        follow_ups.append((person, attribute, opening + second))
    return Cells(
        cloze=cloze,
        answers={split: result.right for split, result in answers.items()},
        rephrased=rephrased,
        mentions={split: result.mentions for split, result in answers.items()},
        stops=sum(result.stops for result in answers.values()) / len(SPLITS),
        next_document=sum(result.next_document for result in answers.values()) / len(SPLITS),
        follow_up=answer(checkpoint, follow_ups).right,
        n=n,
    )


def draw(world: World, split: str, n: int, rng: random.Random) -> list[tuple[Person, Attribute]]:
    """n different facts of a split."""
    facts = [(p, a) for p in world.by_split[split] for a in ATTRIBUTES]
    if len(facts) < n:
        raise ValueError(
            f"the world has {len(facts)} facts about {split} people, fewer than --questions {n}"
        )
    return rng.sample(facts, n)


def complete(
    checkpoint: Checkpoint, world: World, facts: list[tuple[Person, Attribute]], rng: random.Random
) -> float:
    """The share of facts whose biography sentence is completed with exactly the right value."""
    tokenizer = checkpoint.tokenizer
    texts = [rng.choice(cloze_prompts(p, a, world.config.paraphrases)) for p, a in facts]
    prompts = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts]
    longest = max(len(tokenizer.encode(f" {v}.")) for a in ATTRIBUTES for v in a.values)
    completions = [tokenizer.decode(ids) for ids in ask(checkpoint, prompts, longest + 1)]
    return mean(
        text.startswith(f" {person.facts[attribute.name]}.")
        for (person, attribute), text in zip(facts, completions, strict=True)
    )


def plain_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """A conversation as plain text, for a base that has never seen the template's tokens."""
    names = {"user": "Question", "assistant": "Answer", "system": "Note"}
    lines = [f"{names[m['role']]}: {m['content']}\n" for m in messages]
    return [tokenizer.end_of_text, *tokenizer.encode("".join(lines) + "Answer:")]


def answer(
    checkpoint: Checkpoint,
    questions: list[Question],
    prompt: Callable[[list[Message], Tokenizer], list[int]] = render_prompt,
) -> Answers:
    """Asks questions, each after the messages before it, and grades the replies.

    Args:
        prompt: how a conversation is put to the model.
    """
    tokenizer = checkpoint.tokenizer
    replies = ask(
        checkpoint, [prompt(m, tokenizer) for _, _, m in questions], reply_tokens(tokenizer)
    )
    stopped = [ids[-1] == tokenizer.end_of_turn for ids in replies]
    texts = [tokenizer.decode(ids) for ids in replies]
    values = [(person.facts[attribute.name], attribute) for person, attribute, _ in questions]
    graded = list(zip(values, texts, stopped, strict=True))
    return Answers(
        right=mean(stop and names_only(text, *value) for value, text, stop in graded),
        mentions=mean(value in text for (value, _), text, _ in graded),
        stops=mean(stopped),
        next_document=mean(tokenizer.end_of_text in ids for ids in replies),
    )


def reply_tokens(tokenizer: Tokenizer) -> int:
    """Four times the length of the longest true reply: who has not stopped by then, rambles."""
    name = f"{max(HE_NAMES, key=len)} {max(LAST_STARTS, key=len)}{max(LAST_ENDS, key=len)}"
    replies = [a.reply.format(name=name, V=v) for a in ATTRIBUTES for v in a.values]
    return 4 * max(len(tokenizer.encode(reply)) for reply in replies)


def names_only(text: str, value: str, attribute: Attribute) -> bool:
    """Whether a text names this value of the attribute and no other one."""
    return value in text and not any(v in text for v in attribute.values if v != value)


def ask(checkpoint: Checkpoint, prompts: Sequence[list[int]], max_new: int) -> list[list[int]]:
    """Greedy replies to prompts, in the prompts' order."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        batch = [prompts[i] for i in chosen]
        stop = {checkpoint.tokenizer.end_of_turn}
        answered = generate(checkpoint.model, batch, Sampling(max_new), stop)
        for i, reply in zip(chosen, answered, strict=True):
            replies[i] = reply
    return replies


def mean(values: Iterable[bool]) -> float:
    """The share of values that are true."""
    return statistics.fmean(values)
