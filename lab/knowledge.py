"""Same knowledge, different behaviour: what a model completes, and what it answers.

The protocol of Allen-Zhu & Li, Physics of Language Models 3.1 (arXiv 2309.14316), in miniature:
{complete the biography, answer the question} x {base, instruct} on known, held-out and unseen
people. All decoding is greedy.

python -m lab.knowledge --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data.chat import CONTEXTS, Message, Prompt, plain_prompt, render_prompt
from data.world import (
    ATTRIBUTES,
    DONT_KNOW,
    SPLITS,
    Attribute,
    Person,
    World,
    exchange,
)
from lab.likelihood import ask, reply_limit, score_choices
from lab.pair import Pair, run_instrument
from lab.stats import Mean, Share
from training.checkpoint import Checkpoint

Fact = tuple[Person, Attribute]
Cell = dict[str, Share]  # "all", then each attribute
THOROUGHLY = 3  # of so many questions, one is also asked in plain text, and ranked


@dataclass(frozen=True)
class Answers:
    """What became of one set of questions.

    Attributes:
        right: the reply names the right value and no other of its kind, and stops by itself.
        mentions: it names the right value at all, stopping or not.
        stops: it ends with the end-of-turn token.
        next_document: it runs into another document (end-of-text).
        abstains: it begins with "I do not know."
    """

    right: Cell
    mentions: Share
    stops: Share
    next_document: Share
    abstains: Share


@dataclass(frozen=True)
class Rank:
    """The true value among all 40 of its attribute, by the likelihood of the text that holds it."""

    first: Share
    reciprocal: Mean


@dataclass(frozen=True)
class Knowledge:
    """One model's row of the table; the dicts are by split of people.

    Attributes:
        cloze: a biography sentence is completed with exactly the right value.
        answers: questions in phrasings that instruction tuning uses, in the chat template.
        rephrased: the same in phrasings that it never shows.
        plain: as `answers`, but as `Question: ... Answer:` text, without the template.
        ranks: without generation, by context: "cloze" is a biography sentence, "plain" and "chat"
            the true reply to a question.
    """

    cloze: dict[str, Cell]
    answers: dict[str, Answers]
    rephrased: dict[str, Answers]
    plain: dict[str, Answers]
    ranks: dict[str, dict[str, Rank]]


def measure(checkpoint: Checkpoint, world: World, n: int, thorough: bool = True) -> Knowledge:
    """One model's row, on n questions per cell drawn evenly over people and attributes.

    Args:
        thorough: also `plain` and `ranks`, which take most of the time.

    Raises:
        ValueError: the world has fewer than n facts in a split.
    """
    cloze, answers, rephrased = {}, {}, {}
    plain: dict[str, Answers] = {}
    ranks: dict[str, dict[str, Rank]] = {}
    for split in SPLITS:
        cloze[split], facts, rng = draw_and_complete(checkpoint, world, split, n)
        used = [exchange(p, a, rng.choice(a.questions))[:1] for p, a in facts]
        new = [exchange(p, a, rng.choice(a.unused_questions))[:1] for p, a in facts]
        answers[split] = answer(checkpoint, world, facts, used)
        rephrased[split] = answer(checkpoint, world, facts, new)
        if thorough:
            few = slice(max(1, n // THOROUGHLY))
            plain[split] = answer(checkpoint, world, facts[few], used[few], plain_prompt)
            for context in ("cloze", "plain", "chat"):
                found = rank(checkpoint, world, facts[few], used[few], context)
                ranks.setdefault(context, {})[split] = found
    return Knowledge(cloze, answers, rephrased, plain, ranks)


def cloze_prompts(person: Person, attribute: Attribute, paraphrases: int) -> list[str]:
    """Beginnings of biography sentences after which only the value is missing."""
    return [
        t.removesuffix(" {V}.").format(S=person.name)
        for t in attribute.sentences[:paraphrases]
        if t.startswith("{S}") and t.endswith(" {V}.")
    ]


def draw_and_complete(
    checkpoint: Checkpoint, world: World, split: str, n: int
) -> tuple[Cell, list[Fact], random.Random]:
    """Cloze of n facts of a split, the same for every model; also what goes on from there."""
    rng = random.Random(f"questions {split} {world.config.seed}")
    facts = draw(world, split, n, rng)
    return complete(checkpoint, world, facts, rng), facts, rng


def draw(world: World, split: str, n: int, rng: random.Random) -> list[Fact]:
    """n different facts of a split."""
    facts = [(p, a) for p in world.by_split[split] for a in ATTRIBUTES]
    if len(facts) < n:
        raise ValueError(
            f"the world has {len(facts)} facts about {split} people, fewer than --questions {n}"
        )
    return rng.sample(facts, n)


def cell(facts: list[Fact], flags: Iterable[bool]) -> Cell:
    """Shares over all facts and over those of each attribute."""
    graded = list(zip((a.name for _, a in facts), flags, strict=True))
    return {"all": Share.of(flag for _, flag in graded)} | {
        a.name: Share.of(flag for name, flag in graded if name == a.name) for a in ATTRIBUTES
    }


def complete(checkpoint: Checkpoint, world: World, facts: list[Fact], rng: random.Random) -> Cell:
    """Which facts' biography sentences are completed with exactly the right value.

    The sentence stands alone and in any wording: few of them occur like that in the text.
    """
    texts = [rng.choice(cloze_prompts(p, a, world.config.paraphrases)) for p, a in facts]
    return cell(facts, completed(checkpoint, facts, texts))


def recite(checkpoint: Checkpoint, world: World, facts: list[Fact], rng: random.Random) -> Cell:
    """Which facts are completed in a biography that was written for training, up to the value.

    Left out is where the person is not named before the value. One in fifty biographies is in the
    validation text.
    """
    read, texts = [], []
    for person, attribute in facts:
        value = person.facts[attribute.name]
        beginnings = [b[: b.index(value)] for b in world.biographies_of(person) if value in b]
        beginnings = [b.rstrip() for b in beginnings if person.name in b]
        if beginnings:
            read.append((person, attribute))
            texts.append(rng.choice(beginnings))
    return cell(read, completed(checkpoint, read, texts, full_stop=False))


def completed(
    checkpoint: Checkpoint, facts: list[Fact], texts: list[str], full_stop: bool = True
) -> list[bool]:
    """Whether each text is continued with the value of its fact."""
    tokenizer = checkpoint.tokenizer
    prompts = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts]
    longest = max(len(tokenizer.encode(f" {v}.")) for a in ATTRIBUTES for v in a.values)
    end = "." if full_stop else ""
    return [
        tokenizer.decode(ids).startswith(f" {person.facts[attribute.name]}{end}")
        for (person, attribute), ids in zip(
            facts, ask(checkpoint, prompts, longest + 1), strict=True
        )
    ]


def answer(
    checkpoint: Checkpoint,
    world: World,
    facts: list[Fact],
    questions: list[list[Message]],
    prompt: Prompt = render_prompt,
) -> Answers:
    """Asks one question about each fact, after the messages before it, and grades the replies.

    Args:
        prompt: how a conversation is put to the model.
    """
    tokenizer = checkpoint.tokenizer
    prompts = [prompt(messages, tokenizer) for messages in questions]
    replies = ask(checkpoint, prompts, reply_limit(checkpoint, true_replies(world)))
    stopped = [ids[-1] == tokenizer.end_of_turn for ids in replies]
    texts = [tokenizer.decode(ids) for ids in replies]
    values = [(person.facts[attribute.name], attribute) for person, attribute in facts]
    graded = list(zip(values, texts, stopped, strict=True))
    return Answers(
        right=cell(facts, (stop and names_only(text, *value) for value, text, stop in graded)),
        mentions=Share.of(value in text for (value, _), text, _ in graded),
        stops=Share.of(stopped),
        next_document=Share.of(tokenizer.end_of_text in ids for ids in replies),
        abstains=Share.of(text.startswith(DONT_KNOW) for text in texts),
    )


def true_replies(world: World) -> Iterator[str]:
    """The true reply to a question about every fact of a world."""
    return (
        a.reply.format(name=p.name, V=p.facts[a.name]) for p in world.people for a in ATTRIBUTES
    )


def names_only(text: str, value: str, attribute: Attribute) -> bool:
    """Whether a text names this value of the attribute and no other one."""
    return value in text and not any(v in text for v in attribute.values if v != value)


def rank(
    checkpoint: Checkpoint,
    world: World,
    facts: list[Fact],
    questions: list[list[Message]],
    context: str,
) -> Rank:
    """Where the truth stands among all values of its attribute, by the likelihood of the text.

    Args:
        context: "cloze", a biography sentence up to its value; or how the question is put, with
            the whole reply as the text.
    """
    tokenizer, ranks = checkpoint.tokenizer, []
    for (person, attribute), messages in zip(facts, questions, strict=True):
        if context == "cloze":
            sentence = cloze_prompts(person, attribute, world.config.paraphrases)[0]
            prompt = [tokenizer.end_of_text, *tokenizer.encode(sentence)]
            texts = [f" {v}." for v in attribute.values]
        else:
            prompt = CONTEXTS[context](messages, tokenizer)
            texts = [attribute.reply.format(name=person.name, V=v) for v in attribute.values]
        scores = score_choices(checkpoint, prompt, [tokenizer.encode(text) for text in texts])
        true = scores[attribute.values.index(person.facts[attribute.name])]
        ranks.append(1 + sum(score > true for score in scores))
    return Rank(Share.of(r == 1 for r in ranks), Mean.of(1 / r for r in ranks))


def knowledge(pair: Pair, questions: int) -> dict[str, Knowledge]:
    """The rows of base and instruct.

    Raises:
        ValueError: the checkpoints know no world, so that nobody can say what is true.
    """
    if pair.world is None:
        raise ValueError(
            "knowledge can only be measured where the truth is known: on checkpoints that were "
            "trained on a world made by `python -m data.prepare world`, and without --qa"
        )
    world = pair.world
    return {c.meta["kind"]: measure(c, world, questions) for c in (pair.base, pair.instruct)}


if __name__ == "__main__":
    run_instrument(__doc__ or "", knowledge, questions=300)
