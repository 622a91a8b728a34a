"""What is asked about a world, in every wording, form and turn, and how a reply is graded."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from data.chat import Message
from data.world import (
    ATTRIBUTES,
    BARE,
    DONT_KNOW,
    FORMS,
    INSTRUCTIONS,
    Attribute,
    Person,
    Turn,
    World,
    converse,
    script,
)
from training.checkpoint import Checkpoint

Fact = tuple[Person, Attribute]
# The later turns of a conversation of each kind; the last one is what is asked.
TURNS = {
    "follow_up": ("same",),
    "other_person": ("other",),
    "return_to_first": ("other", "first"),
    "pronoun_after_two": ("other", "same"),
}
EXAMPLES = 3


@dataclass(frozen=True)
class Question:
    """A question about one fact, with the turns before it.

    Attributes:
        messages: up to the question, which is the last one.
        turn: whom and what it is about.
        form: the form of reply that is asked for, of FORMS; None if none is.
        before: whom the turns before it are about.
        begin: what the reply begins with, whatever the model would have begun with.
    """

    messages: list[Message]
    turn: Turn
    form: str | None = None
    before: tuple[Person, ...] = ()
    begin: str = ""

    @property
    def value(self) -> str:
        """The truth."""
        return self.turn.person.facts[self.turn.attribute.name]

    @property
    def reply(self) -> str:
        """The true reply, in the form asked for."""
        return self.turn.reply(self.turn.attribute.replies[0] if self.form == "sentence" else BARE)


def facts_of(world: World, split: str) -> list[Fact]:
    """Every fact of a split."""
    return [(p, a) for p in world.by_split[split] for a in ATTRIBUTES]


def draw(world: World, split: str, n: int, rng: random.Random) -> list[Fact]:
    """n different facts of a split.

    Raises:
        ValueError: there are not so many.
    """
    facts = facts_of(world, split)
    if len(facts) < n:
        raise ValueError(
            f"the world has {len(facts)} facts about {split} people, fewer than --questions {n}"
        )
    return rng.sample(facts, n)


Wordings = Callable[[Attribute], Sequence[str]]


def used(attribute: Attribute) -> Sequence[str]:
    """The phrasings of questions that tuning uses."""
    return attribute.questions


def openings(
    facts: Sequence[Fact],
    rng: random.Random,
    forms: Sequence[str] = ("bare",),
    wordings: Wordings = used,
    instructions: str = "used",
) -> list[Question]:
    """A question about each fact, at the beginning of a conversation.

    Args:
        forms: one of them is asked for, drawn for each question; none if empty.
        wordings: the phrasings of an attribute to draw from.
        instructions: "used", or "unused" for those that tuning never saw.
    """
    asked = []
    for person, attribute in facts:
        turns = [Turn(person, attribute, rng.choice(wordings(attribute)))]
        if forms:
            asked.append(conversation(turns, rng.choice(forms), rng, instructions))
        else:
            asked.append(Question([Message(role="user", content=turns[0].question)], turns[0]))
    return asked


def conversation(
    turns: Sequence[Turn], form: str, rng: random.Random, instructions: str = "used"
) -> Question:
    """The last of these turns, after the true replies to the others."""
    *messages, _ = converse(turns, form, rng.choice(INSTRUCTIONS[form][instructions]), rng)
    return Question(messages, turns[-1], form, tuple(turn.person for turn in turns[:-1]))


def later_turns(
    world: World, kind: str, n: int, forms: Sequence[str] = FORMS
) -> tuple[list[Question], list[Question]]:
    """Questions about held-out people at the end of conversations of one kind of TURNS, and the
    same questions and forms without the turns before them, the instruction drawn anew.

    Raises:
        ValueError: the world has nobody to change to.
    """
    rng = random.Random(f"{kind} {world.config.seed}")
    people, after, alone = world.by_split["held_out"], list[Question](), list[Question]()
    if len(people) < 2:
        raise ValueError("to change the person, a world needs two held-out people: 8 in all")
    for i in range(n):
        turns = script(people[i % len(people)], people, TURNS[kind], rng)
        form = rng.choice(forms)
        after.append(conversation(turns, form, rng))
        alone.append(conversation(turns[-1:], form, rng))
    return after, alone


def begun(questions: Sequence[Question]) -> list[Question]:
    """The same questions, each reply begun with the name of whom it is about."""
    return [replace(q, begin=f" {q.turn.person.name}") for q in questions]


def after_examples(world: World, questions: Sequence[Question]) -> list[Question]:
    """The same questions, uninstructed, after EXAMPLES of other facts with their bare values.

    The examples are about known people, whose questions are no secret.
    """
    rng = random.Random(f"examples {world.config.seed}")
    asked = []
    for question in questions:
        messages = list[Message]()
        for person, attribute in rng.sample(facts_of(world, "known"), EXAMPLES):
            turn = Turn(person, attribute, rng.choice(attribute.questions))
            messages.append(Message(role="user", content=turn.question))
            messages.append(Message(role="assistant", content=turn.reply(BARE)))
        messages.append(Message(role="user", content=question.turn.question))
        asked.append(Question(messages, question.turn))
    return asked


def true_replies(world: World, forms: Collection[str | None] = FORMS) -> list[str]:
    """The true replies about every fact of a world, in these forms; None is a bare value."""
    return [
        Turn(p, a, "").reply(wording)
        for p in world.people
        for a in ATTRIBUTES
        for wording in (a.replies if "sentence" in forms else (BARE,))
    ]


# ---- grading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grade:
    """What became of one question.

    Attributes:
        right: the first sentence names the true value and no other of its kind, whether or not
            the reply stops.
        exact: the first sentence is the true value and nothing else.
        stops: it ends with the end-of-turn token.
        in_form: it has the form that was asked for, right or wrong: "bare", a value of any kind
            and nothing else; "sentence", the person's name and a value.
        answered: right in all of its text, stops, and in the form (if one was asked for).
        mentions: it names the true value at all.
        next_document: it runs into another document (end-of-text).
        abstains: it begins with DONT_KNOW.
        named: what the first sentence names instead of the truth; "" if right.
        by_chance: the first sentence would be right about the person's next kind of fact, which
            nobody asked for: how often a sentence about the person is right by chance.
    """

    right: bool
    exact: bool
    stops: bool
    in_form: bool
    answered: bool
    mentions: bool
    next_document: bool
    abstains: bool
    named: str
    by_chance: bool


def names_only(text: str, value: str, attribute: Attribute) -> bool:
    """Whether a text names this value of the attribute and no other one."""
    return value in text and not any(v in text for v in attribute.values if v != value)


def in_form(text: str, form: str | None, person: Person) -> bool:
    """Whether a reply has a form of FORMS, right or wrong; none asked for is always kept."""
    values = [v for a in ATTRIBUTES for v in a.values]
    if form == "bare":
        return text.strip().removesuffix(".") in values
    if form == "sentence":
        return person.name in text and any(v in text.replace(person.name, "") for v in values)
    return True


BEFORE = "of a turn before"


def named_instead(text: str, question: Question) -> str:
    """Which wrong fact a text names: its kind, and whose it is; "nothing" if it names none."""
    turn = question.turn
    for attribute in (turn.attribute, *ATTRIBUTES):
        own = turn.person.facts[attribute.name]
        earlier = [person.facts[attribute.name] for person in question.before]
        for value in attribute.values:
            if value in text and (attribute, value) != (turn.attribute, own):
                whose = BEFORE if value in earlier else "of nobody asked for"
                return f"{attribute.name}, {'their own' if value == own else whose}"
    return "nothing"


def grade(checkpoint: Checkpoint, question: Question, ids: list[int]) -> Grade:
    """Grades a reply."""
    tokenizer, turn = checkpoint.tokenizer, question.turn
    stops = ids[-1] == tokenizer.end_of_turn
    text = tokenizer.decode(ids[:-1] if stops else ids)
    first = text.partition(".")[0]
    right = names_only(first, question.value, turn.attribute)
    obeys = in_form(text, question.form, turn.person)
    next_kind = ATTRIBUTES[(ATTRIBUTES.index(turn.attribute) + 1) % len(ATTRIBUTES)]
    return Grade(
        right=right,
        exact=first.strip() == question.value,
        stops=stops,
        in_form=obeys,
        answered=stops and obeys and names_only(text, question.value, turn.attribute),
        mentions=question.value in text,
        next_document=tokenizer.end_of_text in ids,
        abstains=text.startswith(DONT_KNOW),
        named="" if right else named_instead(first, question),
        by_chance=names_only(first, turn.person.facts[next_kind.name], next_kind),
    )
