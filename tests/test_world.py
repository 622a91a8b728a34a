from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest

from data.tokenizer import CONTROL_TOKENS
from data.world import (
    ATTRIBUTES,
    DONT_KNOW,
    SPLITS,
    WORDS,
    World,
    WorldConfig,
    exchange,
)
from lab.knowledge import cloze_prompts

CONFIG = WorldConfig(people=31, unseen=9, bios=4)
WORLD = World(CONFIG)
BIOGRAPHIES = list(WORLD.biographies())
CONVERSATIONS = list(WORLD.conversations())
WRITTEN = WORLD.by_split["known"] + WORLD.by_split["held_out"]


def test_a_world_is_a_pure_function_of_its_config() -> None:
    again = World(CONFIG)
    assert list(again.conversations()) == CONVERSATIONS
    assert list(again.biographies()) == BIOGRAPHIES
    assert again.people == WORLD.people
    other = World(replace(CONFIG, seed=2))
    assert other.people != WORLD.people
    assert not set(other.biographies()) & set(BIOGRAPHIES)


def test_how_texts_are_made_does_not_change_who_is_in_the_world() -> None:
    for config in (
        replace(CONFIG, bios=1),
        replace(CONFIG, paraphrases=1, permute=False),
        replace(CONFIG, adjacent=True),
    ):
        assert World(config).people == WORLD.people
        assert list(World(config).conversations()) == CONVERSATIONS


@pytest.mark.parametrize("people", [2, 3, 30, 31])
def test_splits_are_disjoint_by_name_and_exhaustive(people: int) -> None:
    world = World(WorldConfig(people=people, unseen=9))
    names = [p.name for split in SPLITS for p in world.by_split[split]]
    assert names == [p.name for p in world.people]
    assert len(set(names)) == len(names) == people + 9
    sizes = [len(world.by_split[split]) for split in SPLITS]
    assert sizes == [(people + 1) // 2, people // 2, 9]


def test_biographies_hold_every_fact_of_their_person_and_nothing_of_chats() -> None:
    assert len(BIOGRAPHIES) == CONFIG.bios * CONFIG.people
    for i, text in enumerate(BIOGRAPHIES):
        person = WRITTEN[i // CONFIG.bios]
        assert person.name in text
        assert all(value in text for value in person.facts.values())
        assert not [mark for mark in ("?", *CONTROL_TOKENS) if mark in text]
        assert not [p.name for p in WORLD.people if p is not person and p.name in text]


def test_conversations_tell_the_truth_and_are_about_known_people_only() -> None:
    others = [p.name for split in ("held_out", "unseen") for p in WORLD.by_split[split]]
    told = set()
    for conversation in CONVERSATIONS:
        assert [m["role"] for m in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        text = " ".join(m["content"] for m in conversation)
        assert not [name for name in others if name in text]
        told |= {m["content"] for m in conversation if m["role"] == "assistant"}
    known = WORLD.by_split["known"]
    assert told == {exchange(p, a, "")[1]["content"] for p in known for a in ATTRIBUTES}


def test_follow_ups_do_not_name_the_person() -> None:
    assert any(len(c) > 2 for c in CONVERSATIONS)
    for conversation in CONVERSATIONS:
        first, *later = [m["content"] for m in conversation if m["role"] == "user"]
        person = next(p for p in WORLD.people if p.name in first)
        assert not [q for q in later for word in person.name.split() if word in q]
        assert not [q for q in (first, *later) if "{" in q or not q.endswith("?")]


def test_no_value_contains_another_of_its_attribute() -> None:
    for attribute in ATTRIBUTES:
        assert len(set(attribute.values)) == len(attribute.values)
        assert not [(a, b) for a, b in permutations(attribute.values, 2) if a in b]


def test_names_are_unlike_each_other_and_contain_no_value() -> None:
    last = (a + b for a in WORDS["last_starts"] for b in WORDS["last_ends"])
    names = [*WORDS["she_names"], *WORDS["he_names"], *last]
    assert len(set(names)) == len(names)
    values = [value for attribute in ATTRIBUTES for value in attribute.values]
    assert not [(n, v) for n in names for v in values if v in n]


def test_questions_that_tuning_never_sees_are_never_asked() -> None:
    asked = {m["content"] for c in CONVERSATIONS for m in c}
    for a in ATTRIBUTES:
        assert not set(a.unused_questions) & {*a.questions, *a.follow_ups}
        for person in WORLD.people:
            assert not {exchange(person, a, q)[0]["content"] for q in a.unused_questions} & asked


def sentences(text: str) -> list[str]:
    return [f"{s}." for s in text.removesuffix(".").split(". ")]


@pytest.mark.parametrize("permute", [True, False])
def test_sentences_keep_their_order_only_without_permute(permute: bool) -> None:
    orders = set()
    for i, text in enumerate(World(replace(CONFIG, permute=permute)).biographies()):
        facts = list(WRITTEN[i // CONFIG.bios].facts.values())
        assert len(sentences(text)) == len(facts)
        orders.add(tuple(next(j for j, v in enumerate(facts) if v in s) for s in sentences(text)))
    assert (len(orders) > 20) if permute else (orders == {(0, 1, 2, 3, 4)})


@pytest.mark.parametrize("paraphrases", [1, 3, 8])
def test_only_the_first_wordings_are_used(paraphrases: int) -> None:
    world = World(replace(CONFIG, paraphrases=paraphrases, permute=False, bios=8))
    used: set[tuple[int, int]] = set()
    for i, text in enumerate(world.biographies()):
        person = WRITTEN[i // 8]
        for j, (sentence, attribute) in enumerate(zip(sentences(text), ATTRIBUTES, strict=True)):
            subjects = [person.name, person.pronoun.capitalize()][: 1 + (j > 0)]
            value = person.facts[attribute.name]
            used |= {
                (j, k)
                for k, wording in enumerate(attribute.sentences)
                if sentence in [wording.format(S=subject, V=value) for subject in subjects]
            }
    assert used == {(j, k) for j in range(len(ATTRIBUTES)) for k in range(paraphrases)}


@pytest.mark.parametrize("paraphrases", range(1, 9))
def test_cloze_prompts_begin_sentences_of_biographies(paraphrases: int) -> None:
    for person in WORLD.people[:3]:
        for a in ATTRIBUTES:
            prompts = cloze_prompts(person, a, paraphrases)
            value = person.facts[a.name]
            real = {t.format(S=person.name, V=value) for t in a.sentences[:paraphrases]}
            assert prompts
            assert {f"{prompt} {value}." for prompt in prompts} <= real


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("people", 1),
        ("people", 20_001),
        ("unseen", -1),
        ("unseen", 2_001),
        ("bios", 0),
        ("paraphrases", 0),
        ("paraphrases", 9),
    ],
)
def test_sizes_that_cannot_be_made_are_refused_by_name(option: str, value: int) -> None:
    changes: Any = {option: value}
    with pytest.raises(ValueError, match=f"--{option} is {value}"):
        replace(CONFIG, **changes)


@pytest.mark.parametrize("dont_know", [False, True])
def test_strangers_take_the_place_of_known_people(dont_know: bool) -> None:
    found = list(WORLD.conversations(asked=0.6, strangers=0.4, dont_know=dont_know))
    known = WORLD.by_split["known"]
    kept = [p.name for p in known[: round(0.6 * len(known))]]
    everyone = {p.name for p in WORLD.people}
    about_kept = [c for c in found if any(name in c[0]["content"] for name in kept)]
    strange = [c for c in found if c not in about_kept]
    assert about_kept == [c for c in CONVERSATIONS if any(n in c[0]["content"] for n in kept)]
    assert 0.35 < len(strange) / len(found) < 0.45
    for conversation in strange:
        assert not any(name in m["content"] for m in conversation for name in everyone)
        replies = [m["content"] for m in conversation if m["role"] == "assistant"]
        assert all((reply == DONT_KNOW) == dont_know for reply in replies)
    assert list(WORLD.conversations(asked=0.6)) == about_kept
    for asked, strangers in ((0.0, 0.0), (-0.1, 0.5), (1.0, 1.5)):
        with pytest.raises(ValueError, match=r"asked|strangers"):
            list(WORLD.conversations(asked, strangers))


def test_bare_replies_are_the_values_of_the_same_questions() -> None:
    by_name = {p.name: p for p in WORLD.people}
    for bare, full in zip(WORLD.conversations(bare=True), CONVERSATIONS, strict=True):
        assert bare[::2] == full[::2]
        person = next(p for name, p in by_name.items() if name in full[0]["content"])
        for short, whole in zip(bare[1::2], full[1::2], strict=True):
            value = short["content"].removesuffix(".")
            assert value in person.facts.values()
            assert whole["content"].endswith(f" {value}.")


def test_the_biographies_of_a_person_are_those_of_the_text() -> None:
    own = [text for person in WRITTEN for text in WORLD.biographies_of(person)]
    assert own == BIOGRAPHIES
