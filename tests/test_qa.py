"""lab.qa: other Q&A about a world than its own."""

from __future__ import annotations

from typing import Any

import pytest

from data.world import ATTRIBUTES, DONT_KNOW, FORMS, INSTRUCTIONS, World, WorldConfig
from lab.qa import asked_about, conversations, strangers_taught

WORLD = World(WorldConfig(people=31, unseen=9, bios=4))
UNEVEN = World(WorldConfig(people=40, unseen=2, bios=20, fewest=1))


def text_of(conversation: list[Any]) -> str:
    return " ".join(m["content"] for m in conversation)


@pytest.mark.parametrize("dont_know", [False, True])
def test_strangers_take_the_place_of_known_people(dont_know: bool) -> None:
    found = list(conversations(WORLD, asked=0.6, strangers=0.4, dont_know=dont_know))
    known = WORLD.by_split["known"]
    kept = [p.name for p in known[: round(0.6 * len(known))]]
    everyone = {p.name for p in WORLD.people}
    about_kept = [c for c in found if any(name in text_of(c) for name in kept)]
    strange = [c for c in found if c not in about_kept]
    assert 0.35 < len(strange) / len(found) < 0.45
    for conversation in strange:
        assert not any(name in text_of(conversation) for name in everyone)
        replies = [m["content"] for m in conversation if m["role"] == "assistant"]
        assert all((reply == DONT_KNOW) == dont_know for reply in replies)
    assert list(conversations(WORLD, asked=0.6)) == about_kept
    taught = strangers_taught(WORLD, asked=0.6, strangers=0.4, dont_know=dont_know)
    named = {p.name for p in taught if any(p.name in text_of(c) for c in strange)}
    assert len(named) == len(taught) == (0 if dont_know else round(0.4 * len(known)))
    for person in taught:  # what they are asked is what the conversations say
        assert any(v in text_of(c) for c in strange for v in person.facts.values())


def test_without_options_it_is_the_worlds_own() -> None:
    assert list(conversations(WORLD)) == list(WORLD.conversations())


def test_the_best_and_the_least_known_are_chosen_by_what_was_read() -> None:
    known = UNEVEN.by_split["known"]
    best, least = (asked_about(UNEVEN, 0.5, who) for who in ("best", "least"))
    counts = UNEVEN.exposures
    assert {p.name for p in best} | {p.name for p in least} == {p.name for p in known}
    assert min(counts[p.name] for p in best) >= max(counts[p.name] for p in least)
    assert sum(counts[p.name] for p in best) > 2 * sum(counts[p.name] for p in least)
    named = {
        p.name
        for p in known
        if any(p.name in text_of(c) for c in conversations(UNEVEN, 0.5, "best"))
    }
    assert named == {p.name for p in best}


def test_a_kind_that_is_bare_only_is_never_asked_for_in_a_sentence() -> None:
    (hobby,) = (a for a in ATTRIBUTES if a.name == "hobby")
    seen = set()
    for conversation in conversations(WORLD, bare_only=["hobby"]):
        text = text_of(conversation)
        (form,) = {f for f in FORMS for i in INSTRUCTIONS[f]["used"] if i in text}
        about_hobby = any(value in text for value in hobby.values)
        seen.add((form, about_hobby))
    assert seen == {("bare", True), ("bare", False), ("sentence", False)}


@pytest.mark.parametrize(
    "options",
    [
        {"asked": 0.0},
        {"asked": -0.1, "strangers": 0.5},
        {"strangers": 1.5},
        {"forms": []},
        {"forms": ["rhyme"]},
        {"bare_only": ["shoe size"]},
        {"who": "tallest"},
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        list(conversations(WORLD, **options))
