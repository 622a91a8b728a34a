"""Facts of public knowledge by their relation: how they are written down, and what names a value.

A file is .toml (see data/facts.toml), or .jsonl with an object a fact: subject, relation, value,
cloze (the beginning of a sentence after which only the value is missing), question and, if you
like, aliases of the value. In wordings the subject can be written {subject}; of several, in a list,
one is drawn for each fact.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.sources.read import read_examples, read_files
from runtime.cli import read_text, say

KEYS = ("subject", "relation", "value", "cloze", "question")
MOST_FACTS, MOST_VALUES = 10_000, 100  # of a file; of a relation, all of which are ranked at once
# The end of a first sentence or line; "J. R." ends none.
END = re.compile(r"(?<!\b[A-Z])[.!?](?=\s|$)|\n")


@dataclass(frozen=True)
class Fact:
    """One fact; of several wordings one was drawn, the same for every model."""

    subject: str
    relation: str
    value: str
    cloze: str
    question: str

    @property
    def sentence(self) -> str:
        """The cloze with its value."""
        return f"{self.cloze} {self.value}."


@dataclass(frozen=True)
class Relation:
    """Its facts by subject, and every form of a value (itself and its aliases) with the value."""

    facts: dict[str, Fact]
    forms: dict[str, str]

    @cached_property
    def values(self) -> list[str]:
        """The values that facts have."""
        return list(dict.fromkeys(fact.value for fact in self.facts.values()))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(map(re.escape, self.forms), key=len, reverse=True)
        return re.compile(rf"(?<![\w-])(?:{'|'.join(longest_first)})(?![\w-])")

    def begins(self, text: str) -> str:
        """The value that a text begins with, as whole words; "" if with none."""
        found = self._pattern.match(text.lstrip())
        return self.forms[found[0]] if found else ""

    def names(self, text: str) -> set[str]:
        """The values that a text names, as whole words."""
        return {self.forms[form] for form in self._pattern.findall(text)}

    def says(self, text: str) -> str:
        """The one value that the first sentence of a reply names; "" if none or several."""
        found = self.names(END.split(text.strip(), maxsplit=1)[0])
        return found.pop() if len(found) == 1 else ""


# ---- files -----------------------------------------------------------------------------------


def read_facts(file: Path) -> dict[str, Relation]:
    """The relations of a file. Facts that their own wording gives away are left out, and counted.

    Raises:
        ValueError: not readable, or an entry is no fact; with the file and the entry.
    """
    relations: dict[str, Relation] = {}
    for n, (place, row) in enumerate(rows_of(file)):
        try:
            if n == MOST_FACTS:
                raise ValueError(f"{MOST_FACTS:,} facts are the most that are asked")
            add(relations, row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not relations:
        raise ValueError(f"{file}: no facts")
    for name, relation in relations.items():
        given = [f.subject for f in relation.facts.values() if is_given_away(f, relation)]
        if given:
            n = len(relation.facts)
            say(f"note: {name}: {len(given)} of {n} facts left out, given away", error=True)
        for subject in given:
            del relation.facts[subject]
        if not 2 <= (n := len(relation.values)) <= MOST_VALUES:
            raise ValueError(f"{file}: {name} has {n} values; a relation has 2 to {MOST_VALUES}")
    return relations


def rows_of(file: Path) -> Iterator[tuple[str, Any]]:
    """Each fact of a file, unchecked, with its place."""
    if file.suffix.lower() != ".toml":
        yield from read_files([file], read_examples)
        return
    if not file.is_file():  # to read a pipe might take for ever
        raise ValueError(f"{file} is no file")
    try:
        tables = tomllib.loads(read_text(file))
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, too large
        raise ValueError(f"{file}: {error}") from None
    for name, table in tables.items():
        facts, aliases = (part_of(table, key) for key in ("facts", "aliases"))
        if not facts or not table.keys() <= {"cloze", "questions", "facts", "aliases"}:
            keys = "a relation is a table of cloze, questions, facts and perhaps aliases"
            raise ValueError(f"{file}, {name}: {keys}")
        if strange := aliases.keys() - {v for v in facts.values() if isinstance(v, str)}:
            raise ValueError(f"{file}, {name}: aliases of {min(strange)!r}, which no fact has")
        shared = {"relation": name, "cloze": table.get("cloze"), "question": table.get("questions")}
        for subject, value in facts.items():
            row = {"subject": subject, "value": value, "aliases": aliases.get(str(value), [])}
            yield f"{file}, {name}, {subject}", shared | row


def part_of(table: Any, key: str) -> dict[str, Any]:
    """A table in a table; empty if there is none."""
    part = table.get(key) if isinstance(table, dict) else None
    return part if isinstance(part, dict) else {}


def add(relations: dict[str, Relation], row: Any) -> None:
    """Adds a fact to its relation.

    Raises:
        ValueError: it is none, or says otherwise than one before it.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict) or not set(KEYS) <= row.keys() <= {*KEYS, "aliases"}:
        raise ValueError(f"a fact has {', '.join(KEYS)} and perhaps aliases, and nothing else")
    texts = {key: texts_of(row, key) for key in row}
    for key in KEYS:
        if not texts[key] or (len(texts[key]) > 1 and key in KEYS[:3]):
            raise ValueError(f"{key} holds {len(texts[key])} texts")
    subject, name, value = (texts[key][0] for key in KEYS[:3])
    relation = relations.setdefault(name, Relation({}, {}))
    if subject in relation.facts:
        raise ValueError(f"{subject!r} is the subject of two facts of {name}")
    for form in (value, *texts.get("aliases", [])):
        if (of := relation.forms.setdefault(form, value)) != value:
            raise ValueError(f"{form!r} is a form of both {of!r} and {value!r}")
    rng, chosen = random.Random(f"{name}/{subject}"), list[str]()
    for key in KEYS[3:]:
        for wording in texts[key]:
            place = "{subject}" if "{subject}" in wording else subject
            if wording.count(place) != 1:
                raise ValueError(f"{key} {wording!r:.80} must have one place for the subject")
        chosen.append(rng.choice(texts[key]).replace("{subject}", subject))
    relation.facts[subject] = Fact(subject, name, value, *chosen)


def texts_of(row: dict[str, Any], key: str) -> list[str]:
    """One text or several: each a line of visible characters.

    Raises:
        ValueError: something else.
    """
    texts = [row[key]] if isinstance(row[key], str) else row[key]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} is {row[key]!r:.80}; it must be text, or a list of texts")
    for text in texts:
        if not text or text != text.strip() or not text.isprintable():
            raise ValueError(f"{key} is {text!r:.80}; it must be a line, without spaces around it")
    return texts


def is_given_away(fact: Fact, relation: Relation) -> bool:
    """Whether a wording names a value of the relation, or the value holds the subject."""
    return fact.subject in fact.value or any(map(relation.names, (fact.cloze, fact.question)))
