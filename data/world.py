"""The synthetic people: a small world in which every fact, and who was asked about it, is known.

Biographies follow the "multi + permute" setting of Allen-Zhu & Li, Physics of Language Models
3.1 (arXiv 2309.14316): many short texts per person, each fact in one of several wordings, the
sentences in random order. People fall into three splits:

    known      biographies in pretraining, questions and answers in instruction tuning
    held_out   biographies only: their questions are never seen, so an answer shows transfer
    unseen     in neither: what a model says about them is chance

A world is a pure function of its WorldConfig. Its words stand in world.toml.
"""

import math
import random
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.chat import Message
from model.check import check_range
from runtime.files import fingerprint

SPLITS = ("known", "held_out", "unseen")
FORMS = ("bare", "sentence")
BARE = " {V}."
DONT_KNOW = " I do not know."


@dataclass(frozen=True)
class Attribute:
    """One kind of fact, its values and its wordings.

    {S} is the person's full name or, later in a biography, a pronoun; {name} the full name;
    {they} a lower-case pronoun; {V} the value. `sentences` that end in "{V}." serve as cloze
    prompts. `questions` are the phrasings that instruction tuning uses; it never sees
    `taught_questions`, whose content word stands in other sentences of the text, and
    `untaught_questions`, whose word stands nowhere. `follow_ups` need the earlier turns to know
    whom they mean. `replies` are sentences, none of which is one of the text's.
    """

    name: str
    values: Sequence[str]
    sentences: Sequence[str]
    questions: Sequence[str]
    taught_questions: Sequence[str]
    untaught_questions: Sequence[str]
    follow_ups: Sequence[str]
    replies: Sequence[str]


@dataclass(frozen=True)
class WorldConfig:
    """Size and shape of a world. Raises ValueError: sizes that cannot be made."""

    seed: int = 1
    people: int = 600
    """People with biographies; the first three quarters are known, the others held out."""
    unseen: int = 100
    """People that appear nowhere, for controls."""
    bios: int = 25
    """Biographies per person."""
    paraphrases: int = 12
    """Wordings per fact that biographies draw from (1 to 12)."""
    permute: bool = True
    """Sentences of a biography in random order."""
    adjacent: bool = False
    """A person's biographies one after another in the training text, instead of shuffled."""
    fewest: int | None = None
    """Biographies of the least known person; those between follow Zipf's law. None: `bios` each."""

    def __post_init__(self) -> None:
        wordings = min(len(a.sentences) for a in ATTRIBUTES)
        check_range("--people", self.people, "4 to 20000")  # one of them held out
        check_range("--unseen", self.unseen, "0 to 2000")
        check_range("--bios", self.bios, "1 to 100000")
        check_range("--paraphrases", self.paraphrases, f"1 to {wordings}")
        check_range("--fewest", self.fewest, f"1 to {self.bios}")


@dataclass(frozen=True)
class Person:
    """A person and the true value of each attribute."""

    name: str
    pronoun: str
    split: str
    facts: dict[str, str]


class World:
    """All people of a world and the texts about them."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        rng = random.Random(f"people {config.seed}")
        first = [(n, "she") for n in WORDS["she_names"]] + [(n, "he") for n in WORDS["he_names"]]
        last = [a + b for a in WORDS["last_starts"] for b in WORDS["last_ends"]]
        chosen = rng.sample(range(len(first) * len(last)), config.people + config.unseen)
        self.people: list[Person] = []
        for i, number in enumerate(chosen):
            first_name, pronoun = first[number // len(last)]
            split = "unseen" if i >= config.people else SPLITS[4 * i >= 3 * config.people]
            facts = {a.name: rng.choice(a.values) for a in ATTRIBUTES}
            name = f"{first_name} {last[number % len(last)]}"
            self.people.append(Person(name, pronoun, split, facts))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the people, their facts, or any wording."""
        people, attributes = [asdict(p) for p in self.people], [asdict(a) for a in ATTRIBUTES]
        return fingerprint([people, attributes, INSTRUCTIONS, BARE, DONT_KNOW])

    @cached_property
    def by_split(self) -> dict[str, list[Person]]:
        """People of each split, in order."""
        return {s: [p for p in self.people if p.split == s] for s in SPLITS}

    @cached_property
    def names(self) -> re.Pattern[str]:
        """A pattern of the first and last names of all people."""
        parts = sorted({part for person in self.people for part in person.name.split()})
        return re.compile(rf"\b(?:{'|'.join(parts)})\b")

    def biographies(self, person: Person | None = None) -> Iterator[str]:
        """The pretraining documents about one known or held-out person, or about all of them."""
        numbers = range(self.config.people) if person is None else [self.people.index(person)]
        for i in numbers:
            for j in range(self.exposures[self.people[i].name]):
                rng = random.Random(f"biography {self.config.seed} {i} {j}")
                yield self._biography(self.people[i], rng)

    @cached_property
    def exposures(self) -> dict[str, int]:
        """Biographies of each person who has any, by name: the r-th best known has bios * r^-s."""
        config, people = self.config, self.people[: self.config.people]
        ranks = random.Random(f"exposures {config.seed}").sample(range(len(people)), len(people))
        s = math.log(config.bios / (config.fewest or config.bios)) / math.log(len(people))
        both = zip(people, ranks, strict=True)
        return {p.name: round(config.bios * (rank + 1) ** -s) for p, rank in both}

    def _biography(self, person: Person, rng: random.Random) -> str:
        attributes = list(ATTRIBUTES)
        if self.config.permute:
            rng.shuffle(attributes)
        sentences = []
        for i, attribute in enumerate(attributes):
            template = rng.choice(attribute.sentences[: self.config.paraphrases])
            # A pronoun only where it can stand: never first, and only as a sentence's subject.
            named = i == 0 or not template.startswith("{S}") or rng.random() < 0.5
            subject = person.name if named else person.pronoun.capitalize()
            sentences.append(template.format(S=subject, V=person.facts[attribute.name]))
        return " ".join(sentences)

    def conversations(
        self,
        people: Sequence[Person] = (),
        forms: Sequence[str] = FORMS,
        bare_only: Sequence[str] = (),
    ) -> Iterator[list[Message]]:
        """The instruction-tuning set: conversations of one to four questions about known people.

        Args:
            people: to ask about instead; conversations stay among people of one split.
            forms: forms of reply that are asked for, of FORMS.
            bare_only: kinds of fact that are asked for as bare values only.
        """
        for i, person in enumerate(people := people or self.by_split["known"]):
            others = [p for p in people if p.split == person.split]
            rng = random.Random(f"conversations {self.config.seed} {i}")
            scripts = [[Turn(person, a, rng.choice(a.questions))] for a in ATTRIBUTES]
            for _ in range(4 * len(ATTRIBUTES)):
                moves = rng.choices(("same", "other", "first"), k=rng.choice((1, 2, 3)))
                scripts.append(script(person, others, moves, rng))
            for turns in scripts:
                form = rng.choice(forms)
                if any(turn.attribute.name in bare_only for turn in turns):
                    form = "bare"
                instruction = rng.choice(INSTRUCTIONS[form]["used"])
                yield converse(turns, form, instruction, rng)


@dataclass(frozen=True)
class Turn:
    """A question about one fact, in one wording."""

    person: Person
    attribute: Attribute
    wording: str

    @property
    def question(self) -> str:
        """What the user says."""
        return self.wording.format(name=self.person.name, they=self.person.pronoun)

    def reply(self, wording: str) -> str:
        """The true reply, in one of `attribute.replies` or BARE; of no facts, DONT_KNOW."""
        if not self.person.facts:
            return DONT_KNOW
        return wording.format(name=self.person.name, V=self.person.facts[self.attribute.name])


def script(
    first: Person, others: Sequence[Person], moves: Sequence[str], rng: random.Random
) -> list[Turn]:
    """Questions of one conversation: an opening about a person, and a turn for each move.

    Moves: "same", a follow-up that names nobody and means the person named last; "other", a
    question about somebody new; "first", one that names the first person again. Where two or more
    people are there to ask about, no fact is asked for twice.
    """
    turns, person = list[Turn](), first
    for move in ("opening", *moves):
        named = {turn.person.name for turn in turns}
        if move == "other":
            person = rng.choice([p for p in others if p.name not in named] or [first])
        elif move == "first":
            person = first
        said = {turn.attribute.name for turn in turns if turn.person == person}
        attribute = rng.choice([a for a in ATTRIBUTES if a.name not in said])
        wording = rng.choice(attribute.follow_ups if move == "same" else attribute.questions)
        if move in ("other", "first") and rng.random() < 0.5:
            wording = f"And {wording[0].lower()}{wording[1:]}"
        turns.append(Turn(person, attribute, wording))
    return turns


def converse(
    turns: Sequence[Turn], form: str, instruction: str, rng: random.Random
) -> list[Message]:
    """Questions with true replies in one of FORMS, and an instruction that asks for it: as the
    system's message, or before or after the first question.
    """
    place, messages = rng.choice(("system", "before", "after")), list[Message]()
    if place == "system":
        messages.append(Message(role="system", content=instruction))
    for i, turn in enumerate(turns):
        text = turn.question
        if i == 0 and place != "system":
            text = f"{instruction} {text}" if place == "before" else f"{text} {instruction}"
        reply = turn.reply(BARE if form == "bare" else rng.choice(turn.attribute.replies))
        messages.append(Message(role="user", content=text))
        messages.append(Message(role="assistant", content=reply))
    return messages


WORDS: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
INSTRUCTIONS: dict[str, dict[str, list[str]]] = WORDS["instructions"]
ATTRIBUTES = tuple(Attribute(**table) for table in WORDS["attributes"])
