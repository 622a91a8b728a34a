from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from data.tokenizer import CONTROL_TOKENS, Tokenizer, create_tokenizer
from data.world import (
    ATTRIBUTES,
    BARE,
    FORMS,
    INSTRUCTIONS,
    SPLITS,
    WORDS,
    Turn,
    World,
    WorldConfig,
    script,
)
from lab.knowledge import cloze_prompts, lint
from runtime.cli import parse_config
from train_sft import SFTConfig

CONFIGS = Path(__file__).parents[1] / "configs"

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


@pytest.mark.parametrize("people", [4, 5, 30, 31])
def test_splits_are_disjoint_by_name_and_exhaustive(people: int) -> None:
    world = World(WorldConfig(people=people, unseen=9))
    names = [p.name for split in SPLITS for p in world.by_split[split]]
    assert names == [p.name for p in world.people]
    assert len(set(names)) == len(names) == people + 9
    sizes = [len(world.by_split[split]) for split in SPLITS]
    assert sizes == [-(-3 * people // 4), people // 4, 9]


def test_biographies_hold_every_fact_of_their_person_and_nothing_of_chats() -> None:
    assert len(BIOGRAPHIES) == CONFIG.bios * CONFIG.people
    for i, text in enumerate(BIOGRAPHIES):
        person = WRITTEN[i // CONFIG.bios]
        assert person.name in text
        assert all(value in text for value in person.facts.values())
        assert not [mark for mark in ("?", *CONTROL_TOKENS) if mark in text]
        assert not [p.name for p in WORLD.people if p is not person and p.name in text]


def questions_of(conversation: list[Any]) -> list[str]:
    """What the user says, without the instruction."""
    said = [m["content"] for m in conversation if m["role"] == "user"]
    for instruction in (i for form in FORMS for i in INSTRUCTIONS[form]["used"]):
        said[0] = said[0].removeprefix(f"{instruction} ").removesuffix(f" {instruction}")
    return said


def test_conversations_tell_the_truth_and_are_about_known_people_only() -> None:
    others = [p.name for split in ("held_out", "unseen") for p in WORLD.by_split[split]]
    true = {
        Turn(p, a, "").reply(wording)
        for p in WORLD.by_split["known"]
        for a in ATTRIBUTES
        for wording in (BARE, *a.replies)
    }
    told = set()
    for conversation in CONVERSATIONS:
        turns = [m for m in conversation if m["role"] != "system"]
        assert len(conversation) - len(turns) in (0, 1)
        assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert 2 <= len(turns) <= 8
        text = " ".join(m["content"] for m in conversation)
        assert not [name for name in others if name in text]
        told |= {m["content"] for m in conversation if m["role"] == "assistant"}
    assert told <= true
    assert len(told) > 0.8 * len(true)


def test_each_conversation_asks_for_one_form_and_keeps_it() -> None:
    seen = set()
    for conversation in CONVERSATIONS:
        text = " ".join(m["content"] for m in conversation if m["role"] != "assistant")
        asked = {(f, i) for f in FORMS for i in INSTRUCTIONS[f]["used"] if i in text}
        ((form, instruction),) = asked
        replies = [m["content"] for m in conversation if m["role"] == "assistant"]
        values = {BARE.format(V=v) for a in ATTRIBUTES for v in a.values}
        assert {reply in values for reply in replies} == {form == "bare"}
        system = [m["content"] for m in conversation if m["role"] == "system"]
        first = next(m["content"] for m in conversation if m["role"] == "user")
        place = "system" if system == [instruction] else first.startswith(instruction)
        seen.add((form, instruction, place))
        assert not [i for f in FORMS for i in INSTRUCTIONS[f]["unused"] if i in text]
    everything = {i for f in FORMS for i in INSTRUCTIONS[f]["used"]}
    assert {i for _, i, _ in seen} == everything
    assert len({place for _, _, place in seen}) == 3


def test_an_unused_instruction_is_put_in_words_that_tuning_uses_for_that_form() -> None:
    for form in FORMS:
        words = {w.strip(".,").lower() for i in INSTRUCTIONS[form]["used"] for w in i.split()}
        for instruction in INSTRUCTIONS[form]["unused"]:
            assert {w.strip(".,").lower() for w in instruction.split()} - words <= {"please"}


def test_a_conversation_changes_its_person_and_a_pronoun_means_the_last_one() -> None:
    kinds = set()
    for conversation in CONVERSATIONS:
        people, replies = list[Any](), [m["content"] for m in conversation if m["role"] != "system"]
        for question, reply in zip(questions_of(conversation), replies[1::2], strict=True):
            named = [p for p in WORLD.people if p.name in question]
            assert len(named) <= 1
            assert "{" not in question
            assert question.endswith("?")
            if named:
                again = named[0] in people
                kinds.add("again" if again else "new")
            else:
                assert people
                named = people[-1:]
                kinds.add("pronoun after two" if len({p.name for p in people}) > 1 else "pronoun")
                if question.split()[-2] in ("he", "she"):
                    assert question.split()[-2] == named[0].pronoun
            people += named
            assert any(value in reply for value in named[0].facts.values())
        asked = {(p.name, r) for p, r in zip(people, replies[1::2], strict=True)}
        assert len(asked) == len(people)  # no fact of a person twice
    assert kinds == {"again", "new", "pronoun", "pronoun after two"}


def test_a_script_follows_its_moves() -> None:
    people = WORLD.by_split["held_out"]
    for seed in range(50):
        a, b, c, d = script(people[0], people, ("other", "same", "first"), random.Random(seed))
        assert a.person is d.person is people[0]
        assert b.person is c.person is not a.person
        assert c.wording in c.attribute.follow_ups
        assert a.attribute is not d.attribute


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
    asked = {q for c in CONVERSATIONS for q in questions_of(c)}
    asked |= {f"{q.removeprefix('And ')[0].upper()}{q.removeprefix('And ')[1:]}" for q in asked}
    for a in ATTRIBUTES:
        new = {*a.taught_questions, *a.untaught_questions}
        assert not new & {*a.questions, *a.follow_ups}
        for person in WORLD.people:
            assert not {Turn(person, a, q).question for q in new} & asked


# Words of the frame, not of the content; some of them (when, whose) tell the kind all the same.
COMMON = set(
    "what when where who whom whose which is the of does do did in from to with at by are was were "
    "has have had been since how as a an can you tell me for on place it be name they".split()
)


def words(wording: str) -> set[str]:
    return {w.strip(".,?{}") for w in wording.replace("{", " ").split()} - {""}


def test_a_taught_question_turns_on_words_of_its_own_facts_sentences_that_tuning_lacks() -> None:
    tuned = {w.lower() for a in ATTRIBUTES for q in (*a.questions, *a.follow_ups) for w in words(q)}
    said = [
        *(s for a in ATTRIBUTES for s in a.sentences),
        *(v for a in ATTRIBUTES for v in a.values),
    ]
    text = {w.lower() for s in said for w in words(s)}
    for a in ATTRIBUTES:
        own = {w.lower() for s in a.sentences for w in words(s)}
        for question in a.taught_questions:
            content = {w.lower() for w in words(question)} - COMMON
            assert content
            assert content <= own, question
            assert not content & tuned, question
        for question in a.untaught_questions:
            content = {w.lower() for w in words(question)} - COMMON
            assert content, question
            assert not content & (text | tuned), question


def test_no_reply_in_a_sentence_is_a_sentence_of_the_text() -> None:
    text = {s.format(S="X", V="Y") for a in ATTRIBUTES for s in a.sentences}
    replies = [r.format(name="X", V="Y") for a in ATTRIBUTES for r in a.replies]
    assert not [r for r in replies if r.strip() in text]
    assert all(len(a.replies) > 1 and all(r.startswith(" ") for r in a.replies) for a in ATTRIBUTES)


@pytest.fixture(scope="module")
def quickstart() -> tuple[World, Tokenizer]:
    """The quickstart's world and its tokenizer, made as `prepare_world` makes it."""
    world = World(WorldConfig())
    messages = (world.names.sub("", m["content"]) for c in world.conversations() for m in c)
    return world, create_tokenizer("bpe:2048", [*world.biographies(), *messages])


def test_every_bare_reply_is_in_the_text_token_by_token(
    quickstart: tuple[World, Tokenizer],
) -> None:
    _, tokenizer = quickstart
    for a in ATTRIBUTES:
        for value in a.values:
            reply = tokenizer.encode(BARE.format(V=value))
            held = [s for s in a.sentences if s.endswith("{V}.")]
            assert held
            for sentence in held:
                ids = tokenizer.encode(sentence.format(S="Ada Holloway", V=value))
                assert ids[-len(reply) :] == reply


def test_the_vocabulary_does_not_tell_who_is_asked_about(
    quickstart: tuple[World, Tokenizer],
) -> None:
    world, tokenizer = quickstart

    def in_one_piece(split: str) -> float:
        people = world.by_split[split]
        return sum(len(tokenizer.encode(f" {p.name.split()[1]}")) == 1 for p in people) / len(
            people
        )

    # 150 held-out people: .04 of noise. With names in the Q&A it was .76 against .31.
    assert abs(in_one_piece("known") - in_one_piece("held_out")) < 0.16


def test_the_lint_of_the_quickstart_is_within_its_bounds(
    quickstart: tuple[World, Tokenizer],
) -> None:
    found = lint(*quickstart)
    assert found.replies.hits == 0  # it was 48 % when bare values had no space before them
    assert (found.prompts.value or 0) < 0.5  # "?" and question words: the text asks nothing
    assert (found.plain.value or 0) < 0.55  # it is .64 with "Question:" and "Answer:" around it
    assert found.new_words["taught"].hits == 0
    assert (found.new_words["untaught"].value or 0) > 0.05


def test_nothing_of_others_is_in_the_quickstarts_tuning() -> None:
    config = parse_config(SFTConfig, ["--config", str(CONFIGS / "quickstart" / "sft.toml")])
    assert config.data.replay == 0
    world = World(WorldConfig())
    said = {m["content"] for c in world.conversations() for m in c}
    names = set(re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", " ".join(said)))
    others = {p.name for split in ("held_out", "unseen") for p in world.by_split[split]}
    assert not names & others
    assert {p.name for p in world.by_split["known"]} <= names


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


@pytest.mark.parametrize("paraphrases", [1, 3, 12])
def test_only_the_first_wordings_are_used(paraphrases: int) -> None:
    world = World(replace(CONFIG, paraphrases=paraphrases, permute=False, bios=16))
    used: set[tuple[int, int]] = set()
    for i, text in enumerate(world.biographies()):
        person = WRITTEN[i // 16]
        for j, (sentence, attribute) in enumerate(zip(sentences(text), ATTRIBUTES, strict=True)):
            subjects = [person.name, person.pronoun.capitalize()][: 1 + (j > 0)]
            value = person.facts[attribute.name]
            used |= {
                (j, k)
                for k, wording in enumerate(attribute.sentences)
                if sentence in [wording.format(S=subject, V=value) for subject in subjects]
            }
    assert used == {(j, k) for j in range(len(ATTRIBUTES)) for k in range(paraphrases)}


@pytest.mark.parametrize("paraphrases", range(1, 13))
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
        ("people", 3),
        ("people", 20_001),
        ("unseen", -1),
        ("unseen", 2_001),
        ("bios", 0),
        ("fewest", 0),
        ("fewest", 5),
        ("paraphrases", 0),
        ("paraphrases", 13),
    ],
)
def test_sizes_that_cannot_be_made_are_refused_by_name(option: str, value: int) -> None:
    changes: Any = {option: value}
    with pytest.raises(ValueError, match=f"--{option} is {value}"):
        replace(CONFIG, **changes)


def test_exposures_follow_zipfs_law_and_change_nobody() -> None:
    config = replace(CONFIG, people=200, unseen=0, bios=50, fewest=1)
    world = World(config)
    counts = sorted(world.exposures.values(), reverse=True)
    assert (counts[0], counts[-1], len(counts)) == (50, 1, 200)
    # A straight line through (1, 50) and (200, 1) in logarithms.
    middle = math.sqrt(200)
    assert counts[round(middle) - 1] == pytest.approx(math.sqrt(50), rel=0.1)
    texts = list(world.biographies())
    for person in world.people[:40]:
        named = sum(person.name in text for text in texts)
        assert named == world.exposures[person.name] == len(list(world.biographies(person)))
    known, held_out = (
        [world.exposures[p.name] for p in world.by_split[split]] for split in ("known", "held_out")
    )
    assert max(known[:5]) < 50  # not in the order of the people
    assert max(held_out) > 5
    assert world.people == World(replace(config, fewest=None)).people
    assert set(World(replace(config, fewest=50)).exposures.values()) == {50}


@pytest.mark.parametrize("form", FORMS)
def test_one_form_alone_can_be_asked_for(form: str) -> None:
    values = {BARE.format(V=v) for a in ATTRIBUTES for v in a.values}
    for conversation in WORLD.conversations(forms=[form]):
        replies = [m["content"] for m in conversation if m["role"] == "assistant"]
        assert all((reply in values) == (form == "bare") for reply in replies)


def test_the_biographies_of_a_person_are_those_of_the_text() -> None:
    own = [text for person in WRITTEN for text in WORLD.biographies(person)]
    assert own == BIOGRAPHIES


def test_the_fingerprint_follows_every_wording(monkeypatch: pytest.MonkeyPatch) -> None:
    before = World(CONFIG).fingerprint
    assert World(CONFIG).fingerprint == before
    other = {**INSTRUCTIONS, "bare": {**INSTRUCTIONS["bare"], "used": ["Shortly."]}}
    more = replace(ATTRIBUTES[0], follow_ups=("And when?",))
    for name, value in (
        ("INSTRUCTIONS", other),
        ("ATTRIBUTES", (more, *ATTRIBUTES[1:])),
        ("BARE", "{V}."),
        ("DONT_KNOW", " No idea."),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"data.world.{name}", value)
            assert World(CONFIG).fingerprint != before
