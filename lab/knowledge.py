"""Same knowledge, different behaviour: what a model completes, and what it answers.

The protocol of Allen-Zhu & Li, Physics of Language Models 3.1 (arXiv 2309.14316), in miniature.
All decoding is greedy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.chat import Message, render_prompt
from data.world import ATTRIBUTES, SPLITS, Attribute, Person, World, cloze_prompts, exchange
from model.generate import Sampling, generate
from training.checkpoint import Checkpoint

VALUE_TOKENS, REPLY_TOKENS = 16, 40  # longer than any value, and than any reply of the world
ROWS = 100  # prompts generated at once
Question = tuple[Person, Attribute]


@dataclass(frozen=True)
class Cells:
    """One model's row of the table: shares of right replies, by split of people.

    Attributes:
        cloze: a biography sentence is completed with the right value.
        answers: a question is answered by a reply that names the right value and no other of its
            kind, and stops by itself.
        mentions: the same replies name the right value at all, stopping or not.
        stops: replies, to questions about all three splits, that end with the end-of-turn token.
        next_document: of the same replies, those that run into another document (end-of-text).
        follow_up: as `answers`, on a held-out person's second question, which does not name them.
        n: questions behind each share (`stops` and `next_document`: behind each split of them).
    """

    cloze: dict[str, float]
    answers: dict[str, float]
    mentions: dict[str, float]
    stops: float
    next_document: float
    follow_up: float
    n: int


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


def names_only(text: str, value: str, attribute: Attribute) -> bool:
    """Whether a text names this value of the attribute and no other one."""
    return value in text and not any(v in text for v in attribute.values if v != value)


def template_prompt(checkpoint: Checkpoint, messages: list[Message]) -> list[int]:
    """A conversation in the chat template, up to where the reply begins."""
    return render_prompt(messages, checkpoint.tokenizer)


def plain_prompt(checkpoint: Checkpoint, messages: list[Message]) -> list[int]:
    """A conversation as plain text, for a base that has never seen the template's tokens."""
    names = {"user": "Question", "assistant": "Answer", "system": "Note"}
    lines = [f"{names[m['role']]}: {m['content']}\n" for m in messages]
    tokenizer = checkpoint.tokenizer
    return [tokenizer.end_of_text, *tokenizer.encode("".join(lines) + "Answer:")]


def measure(
    checkpoint: Checkpoint,
    world: World,
    n: int,
    prompt: Callable[[Checkpoint, list[Message]], list[int]] = template_prompt,
) -> Cells:
    """One model's row on n questions per cell, drawn evenly over people and attributes.

    Args:
        prompt: how questions are put to the model.

    Raises:
        ValueError: the world has fewer than n facts in a split.
    """
    tokenizer, end = checkpoint.tokenizer, checkpoint.tokenizer.end_of_turn
    rng = random.Random(f"questions {world.config.seed}")
    cloze, answers, mentions, stopped, overran = {}, {}, {}, 0, 0
    for split in SPLITS:
        questions = draw(world, split, n, rng)
        texts = [rng.choice(cloze_prompts(p, a, world.config.paraphrases)) for p, a in questions]
        prompts = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts]
        completions = [tokenizer.decode(ids) for ids in ask(checkpoint, prompts, VALUE_TOKENS)]
        right = [
            text.startswith(f" {person.facts[a.name]}.")
            for (person, a), text in zip(questions, completions, strict=True)
        ]
        cloze[split] = sum(right) / n

        asked = [exchange(p, a, rng.choice(a.questions))[:1] for p, a in questions]
        replies = ask(checkpoint, [prompt(checkpoint, m) for m in asked], REPLY_TOKENS)
        graded = [grade(checkpoint, q, ids) for q, ids in zip(questions, replies, strict=True)]
        answers[split] = sum(exact for exact, _ in graded) / n
        mentions[split] = sum(mentioned for _, mentioned in graded) / n
        stopped += sum(ids[-1] == end for ids in replies)
        overran += sum(tokenizer.end_of_text in ids for ids in replies)

    follow_ups = draw(world, "held_out", n, rng)
    asked = []
    for person, attribute in follow_ups:
        first = rng.choice([a for a in ATTRIBUTES if a is not attribute])
        opening = exchange(person, first, rng.choice(first.questions))
        asked.append(opening + exchange(person, attribute, rng.choice(attribute.follow_ups))[:1])
    replies = ask(checkpoint, [prompt(checkpoint, m) for m in asked], REPLY_TOKENS)
    right = [grade(checkpoint, q, ids)[0] for q, ids in zip(follow_ups, replies, strict=True)]
    asked_in_all = len(SPLITS) * n
    stops, next_document = stopped / asked_in_all, overran / asked_in_all
    return Cells(cloze, answers, mentions, stops, next_document, sum(right) / n, n)


def grade(checkpoint: Checkpoint, question: Question, reply: list[int]) -> tuple[bool, bool]:
    """(answered: names the right value only and stops; mentioned: names the right value)."""
    person, attribute = question
    stopped = reply[-1] == checkpoint.tokenizer.end_of_turn
    text = checkpoint.tokenizer.decode(reply[:-1] if stopped else reply)
    value = person.facts[attribute.name]
    return stopped and names_only(text, value, attribute), value in text


def draw(world: World, split: str, n: int, rng: random.Random) -> list[Question]:
    """n different (person, attribute) pairs of a split."""
    pairs = [(p, a) for p in world.by_split[split] for a in ATTRIBUTES]
    if len(pairs) < n:
        raise ValueError(
            f"the world has {len(pairs)} facts about {split} people, fewer than --questions {n}"
        )
    return rng.sample(pairs, n)
