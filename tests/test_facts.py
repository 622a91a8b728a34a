"""Facts of public knowledge: their file, how replies are graded, and pairs whose truth is known."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.chat import Message, render
from lab import facts
from lab.facts import OURS, FactPair, open_with_facts
from lab.relations import Relation, read_facts
from lab.stats import Share
from model.gpt import GPT
from runtime.cli import one_line_errors
from training.checkpoint import Checkpoint

Runs = tuple[Path, Path]
WORDS = (
    "amber birch cedar delta ember fjord grove heath inlet jetty knoll larch maple north".split()
)
LAKES = [
    f"Lake {word.title()}" for word in "abel boris carla doris egon frida gustav heidi".split()
]
RIVERS = [f"River {word.title()}" for word in "ilse jonas karin lukas maria nils".split()]
TOML = """
[place]
cloze = ["{subject} lies in the town of"]
questions = ["Where does {subject} lie?"]
[place.aliases]
Birch = ["Birchtown", "the Birch"]
[place.facts]
"""


def written(folder: Path, values: dict[str, str]) -> Path:
    """A file of facts about places."""
    file = folder / "facts.toml"
    file.write_text(TOML + "".join(f'"{s}" = "{v}"\n' for s, v in values.items()))
    return file


PLACES = dict(zip((*LAKES, *RIVERS), (word.title() for word in WORDS), strict=True))


@pytest.fixture
def pair(runs: Runs, tmp_path: Path) -> FactPair:
    return open_with_facts(str(runs[0]), str(runs[1]), "cpu", written(tmp_path, PLACES))


# ---- our own facts ---------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in ("the", "of")]


def test_our_facts_are_some_hundreds_in_several_relations_and_none_is_given_away(
    capsys: pytest.CaptureFixture[str],
) -> None:
    relations = read_facts(OURS)
    assert capsys.readouterr().err == ""  # nothing was left out
    assert 6 <= len(relations) <= 8
    assert 300 <= sum(len(relation.facts) for relation in relations.values()) <= 500
    for name, relation in relations.items():
        assert len(relation.facts) >= 30, name
        assert len(relation.values) >= 15 or len(relation.facts) >= 4 * len(relation.values), name
        for fact in relation.facts.values():
            forms = [form for form, value in relation.forms.items() if value == fact.value]
            for form in forms:
                assert relation.begins(f" {form}, and so on") == fact.value
                assert relation.says(f"It is {form}.") == fact.value
                # No word of a value begins as one of the subject or of the wordings does, which is
                # how a model could tell "Japanese" of Japan, and an element's symbol of its name.
                for word in words_of(form):
                    for other in words_of(fact.subject):
                        assert word[:3] != other[:3], fact
                        assert name != "symbol" or not other.startswith(word), fact
                    assert word not in words_of(f"{fact.cloze} {fact.question}"), fact


def test_every_wording_has_one_place_for_the_subject_and_the_value_is_next(tmp_path: Path) -> None:
    import tomllib

    for name, table in tomllib.loads(OURS.read_text("utf-8")).items():
        assert len(table["cloze"]) >= 2, name
        assert len(table["questions"]) >= 2, name
        for text in (*table["cloze"], *table["questions"]):
            assert text.count("{subject}") == 1, text
        assert all(text.endswith("?") for text in table["questions"])
        assert not any(text[-1] in ".?! " for text in table["cloze"])


# ---- files -----------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    """The same facts as TOML's, an object each."""
    shared = {"relation": "place", "cloze": "{subject} lies in the town of"}
    return [
        {"subject": s, "value": v, "question": f"Where does {s} lie?", **shared}
        | ({"aliases": ["Birchtown", "the Birch"]} if v == "Birch" else {})
        for s, v in PLACES.items()
    ]


def lines_of(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_both_kinds_of_file_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_text(lines_of(rows()))
    assert read_facts(tmp_path / "facts.jsonl") == read_facts(written(tmp_path, PLACES))


def test_what_a_wording_gives_away_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"Mexico": "Mexico City", "the Birch Lake": "Amber"}
    found = read_facts(written(tmp_path, PLACES | given))["place"]
    assert list(found.facts) == list(PLACES)
    assert "place: 2 of 16 facts left out" in capsys.readouterr().err


ROW = rows()[0]
SPOILT: dict[str, tuple[bytes | str, str]] = {
    "empty.jsonl": ("", "no facts"),
    "empty.toml": ("", "no facts"),
    "nul.toml": (TOML + '"a" = "b\0"', "nul.toml: "),
    "bytes.toml": (b"[a]\n\xff\xfe", "bytes.toml: "),
    "bytes.jsonl": (b"\xff\xfe\n", "bytes.jsonl is not UTF-8"),
    "huge.toml": ("#" * (1 << 24) + "#", "larger"),
    "deep.toml": ("a = " + "[" * 5000 + "]" * 5000, "deep.toml: "),
    "deep.jsonl": ("[" * 100_000, "deep.jsonl, line 1: not JSON"),
    "text.txt": ("Paris", "text.txt"),
    "table.toml": ("place = 3", "table.toml, place: a relation is a table"),
    "key.toml": (TOML.replace("aliases", "alias") + "a = 'b'", "key.toml, place: a relation"),
    "facts.toml": (TOML, "facts.toml, place: a relation is a table"),
    "number.toml": (TOML + "'Lake A' = 3\nb = 'Birch'", "number.toml, place, Lake A: value is 3"),
    "twice.toml": (TOML + "a = 'b'\na = 'c'", "twice.toml: "),
    "alias.toml": (TOML + "'Lake A' = 'b'\n'Lake B' = 'c'", "aliases of 'Birch', which no fact"),
    "one.jsonl": (lines_of([ROW]), "place has 1 values"),
    "many.jsonl": (
        lines_of(
            [ROW | {"subject": f"L{n}", "value": f"V{n}", "question": f"L{n}?"} for n in range(101)]
        ),
        "place has 101 values",
    ),
    "too-many.jsonl": (
        lines_of([ROW | {"subject": f"L{n}", "question": f"L{n}?"} for n in range(10_001)]),
        "line 10001: 10,000 facts are the most",
    ),
    "again.jsonl": (lines_of([ROW, ROW]), "line 2: 'Lake Abel' is the subject of two facts"),
    "list.jsonl": (lines_of([[1]]), "line 1: a fact has subject, relation, value, cloze, question"),
    "lacks.jsonl": (lines_of([{"subject": "a"}]), "line 1: a fact has subject"),
    "more.jsonl": (lines_of([ROW | {"alias": "x"}]), "and nothing else"),
    "type.jsonl": (lines_of([ROW | {"value": None}]), "line 1: value is None"),
    "types.jsonl": (lines_of([ROW | {"question": [3]}]), "line 1: question is [3]"),
    "none.jsonl": (lines_of([ROW | {"cloze": []}]), "line 1: cloze holds 0 texts"),
    "several.jsonl": (lines_of([ROW | {"value": ["a", "b"]}]), "line 1: value holds 2 texts"),
    "space.jsonl": (lines_of([ROW | {"value": " a"}]), "line 1: value is ' a'"),
    "nul.jsonl": (lines_of([ROW | {"value": "a\0"}]), r"line 1: value is 'a\x00'"),
    "half.jsonl": (lines_of([ROW | {"value": "\ud800"}]), "line 1: value is"),
    "where.jsonl": (
        lines_of([ROW | {"cloze": "It lies in"}]),
        "must have one place for the subject",
    ),
    "parts.jsonl": (
        lines_of([ROW | {"subject": "Ab", "question": "Ab, or what of Ab?"}]),
        "must have one place for the subject",
    ),
    "form.jsonl": (
        lines_of([ROW, rows()[1] | {"aliases": [ROW["value"]]}]),
        "line 2: 'Amber' is a form of both 'Amber' and 'Birch'",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_file_is_one_line_with_its_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held, what = SPOILT[name]
    (tmp_path / name).write_bytes(held if isinstance(held, bytes) else held.encode())
    with pytest.raises(SystemExit) as stop, one_line_errors():
        read_facts(tmp_path / name)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.count("\n") == 1
    assert name in error
    assert what in error


def test_no_file_and_a_pipe_are_told(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.toml")
    for name in ("pipe.toml", "none.toml", "none.jsonl"):
        with pytest.raises(ValueError, match=name):
            read_facts(tmp_path / name)


# ---- grades ----------------------------------------------------------------------------------


def test_what_a_text_names_is_told_by_whole_words_and_every_alias() -> None:
    values = {"J. R. R. Tolkien": ["Tolkien"], "Guinea": [], "Guinea-Bissau": [], "K": []}
    values |= {"Lewis": [], "Lewis Carroll": []}
    forms = {form: value for value, more in values.items() for form in (value, *more)}
    relation = Relation({}, forms)
    assert relation.begins(" Tolkien, who") == "J. R. R. Tolkien"
    assert relation.begins("the Tolkien") == ""
    assert relation.begins(" Guinean") == relation.begins(" KG") == ""
    assert relation.begins(" Guinea-Bissau.") == "Guinea-Bissau"
    assert relation.begins(" Lewis Carroll") == "Lewis Carroll"
    for reply, said in (
        ("It was written by J. R. R. Tolkien. Guinea is elsewhere.", "J. R. R. Tolkien"),
        ("Tolkien\nQuestion:\nWhat of Guinea?", "J. R. R. Tolkien"),
        ("Tolkien, that is J. R. R. Tolkien", "J. R. R. Tolkien"),
        ("\n Guinea", "Guinea"),
        ("Guinea or Guinea-Bissau", ""),
        ("I do not know. Guinea?", ""),
        ("", ""),
    ):
        assert relation.says(reply) == said, reply


class Scripted:
    """Stands in for a model's greedy text and for its likelihoods: what `value_of` says of a
    subject, and in the template it stops."""

    def __init__(self, pair: FactPair, value_of: Callable[[str], str]) -> None:
        self.facts, self.value_of = pair.relations["place"].facts, value_of

    def value(self, checkpoint: Checkpoint, prompt: list[int]) -> str:
        text = checkpoint.tokenizer.decode(prompt)
        return self.value_of(next(subject for subject in self.facts if subject in text))

    def ask(self, checkpoint: Checkpoint, prompts: list[list[int]], n: int) -> list[list[int]]:
        tokenizer = checkpoint.tokenizer
        end = [tokenizer.end_of_turn]
        return [
            tokenizer.encode(f" {self.value(checkpoint, p)}, and")
            + (end if "<|user|>" in tokenizer.decode(p) else [])
            for p in prompts
        ]

    def score(self, checkpoint: Checkpoint, prompt: list[int], choices: list[list[int]]) -> Any:
        value = self.value(checkpoint, prompt + choices[0])
        return [float(value in checkpoint.tokenizer.decode(c)) for c in choices]


def scripted(
    pair: FactPair, monkeypatch: pytest.MonkeyPatch, value_of: Callable[[str], str]
) -> facts.Facts:
    script = Scripted(pair, value_of)
    monkeypatch.setattr(facts, "ask", script.ask)
    monkeypatch.setattr(facts, "score_choices", script.score)
    return facts.facts(pair, 1000)


def shares(graded: facts.Graded) -> tuple[Any, ...]:
    return graded.right["all"].value, graded.swapped.value, graded.subject.value


def test_who_knows_everything_is_right_and_with_another_subject_never(
    pair: FactPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = scripted(pair, monkeypatch, PLACES.__getitem__)
    assert found.chance == pytest.approx({"all": 1 / 14, "place": 1 / 14})
    for context in found.base.values():
        assert shares(context.said) == shares(context.first) == (1, 0, 1)
        assert context.reciprocal.value == 1
    assert found.base["plain"].stopped.value == 0
    assert found.base["chat"].stopped.value == 1
    assert found.tables["stopped"]["base x base, plain text"].known_not_answered.value == 1
    assert found.tables["stopped"]["base x base"].known_and_answered.value == 1


def test_a_favourite_is_exposed_by_the_swapped_subject(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {s: "Birch" if s in LAKES else v for s, v in PLACES.items()}
    file = written(tmp_path, values)
    pair = open_with_facts(str(runs[0]), str(runs[1]), "cpu", file)
    found = scripted(pair, monkeypatch, lambda subject: "Birchtown")
    share = len(LAKES) / len(PLACES)
    assert found.most_frequent["all"].value == share > found.chance["all"]
    for context in found.base.values():
        assert shares(context.said) == (share, share, 0)
    found = scripted(pair, monkeypatch, values.__getitem__)  # others' values, though many are alike
    for context in found.base.values():
        assert shares(context.said) == shares(context.first) == (1, 0, 1)


# ---- models whose knowledge is known by construction -----------------------------------------


Row = tuple[list[int], list[int]]  # ids, and which of them are learned


def trained(checkpoint: Checkpoint, rows: list[Row]) -> Checkpoint:
    """The model when it has learned these rows, all of them at once."""
    torch.manual_seed(1)
    model: GPT = copy.deepcopy(checkpoint.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([mask + [0] * (width - len(mask)) for _, mask in rows])
    targets = ids.masked_fill(mask == 0, -1)[:, 1:].flatten()
    for _ in range(1000):
        logits = model.logits(model.hidden(ids[:, :-1])).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1)
        if loss.item() < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return replace(checkpoint, model=model.eval())


def text_of(pair: FactPair, subject: str, value: str = "") -> Row:
    """A document: the cloze with its value, or another one, of which only this is learned."""
    tokenizer, fact = pair.base.tokenizer, pair.relations["place"].facts[subject]
    cloze = [tokenizer.end_of_text, *tokenizer.encode(fact.cloze)]
    rest = [*tokenizer.encode(f" {value or fact.value}."), tokenizer.end_of_text]
    return cloze + rest, [0] * len(cloze) + [1] * len(rest)


def answer_of(pair: FactPair, subject: str, value: str = "") -> Row:
    """The question with its value, or another one, in the template."""
    fact = pair.relations["place"].facts[subject]
    asked = Message(role="user", content=fact.question)
    return render(
        [asked, Message(role="assistant", content=f" {value or fact.value}.")], pair.base.tokenizer
    )


def topics(share: Share) -> set[str]:
    return {topic.partition("/")[0] for topic, hit in share.flags if hit}


@pytest.fixture(scope="module")
def read(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> FactPair:
    """A base that has read half of the facts and says something else when asked; on both sides."""
    file = written(tmp_path_factory.mktemp("facts"), PLACES)
    pair = open_with_facts(str(runs[0]), str(runs[1]), "cpu", file)
    rows = [text_of(pair, subject) for subject in LAKES]
    base = trained(pair.base, rows + [answer_of(pair, subject, "Zebra") for subject in PLACES])
    return replace(pair, base=base, instruct=base)


@pytest.fixture(scope="module")
def of_read(read: FactPair) -> facts.Facts:
    return facts.facts(read, 1000)


def test_what_was_read_is_known_and_not_answered_and_the_rest_neither(of_read: facts.Facts) -> None:
    cloze = of_read.base["cloze"]
    for graded in (cloze.said, cloze.first):
        assert topics(graded.right["all"]) == set(LAKES)  # no text has the values of the others
        # Of places that it never read about it says something, too, which may be right of others.
        assert graded.swapped.hits <= round(of_read.chance["all"] * len(PLACES))
        assert graded.subject.low is not None
        assert graded.subject.low > 0.2
    table = of_read.tables["said"]["base x instruct"]
    assert topics(table.known_not_answered) == set(LAKES)
    assert topics(table.neither) == set(RIVERS)
    assert table.answered_of_known.value == 0
    assert table.answered_of_known.n == len(LAKES)
    assert table.answered_less_known.value == -len(LAKES) / len(PLACES)
    assert table.answered_less_known.clusters == len(PLACES)


def test_the_same_model_twice_has_lost_and_gained_nothing(of_read: facts.Facts) -> None:
    assert of_read.base == of_read.instruct
    for tuning in of_read.tuning.values():
        assert (tuning.lost.hits, tuning.gained.hits, tuning.instruct_less_base.value) == (0, 0, 0)
        assert topics(tuning.kept) == set(LAKES)
        assert topics(tuning.neither) == set(RIVERS)


@pytest.fixture(scope="module")
def tuned(read: FactPair) -> FactPair:
    """The same base, and what was made of it: some texts kept, some unlearned, some added, and
    answers about two places that were read and three that were not."""
    rows = [text_of(read, subject) for subject in (*LAKES[:4], *RIVERS[3:])]
    rows += [text_of(read, subject, "Zebra") for subject in LAKES[4:]]
    asked = {*LAKES[:2], *RIVERS[:3]}
    rows += [answer_of(read, s, "" if s in asked else "Zebra") for s in PLACES]
    return replace(read, instruct=trained(read.base, rows))


def test_what_tuning_taught_is_told_from_what_was_read(tuned: FactPair) -> None:
    found = facts.facts(tuned, 1000)
    for grade in ("said", "stopped"):
        table = found.tables[grade]["base x instruct"]
        assert topics(table.known_and_answered) == set(LAKES[:2])
        assert topics(table.known_not_answered) == set(LAKES[2:])
        assert topics(table.answered_not_known) == set(RIVERS[:3])
        assert topics(table.neither) == set(RIVERS[3:])
        assert table.answered_of_known.value == 2 / len(LAKES)
    first = topics(found.instruct["chat"].first.right["all"])
    assert first >= {*LAKES[:2], *RIVERS[:3]}
    tuning = found.tuning["said"]
    assert topics(tuning.kept) == set(LAKES[:4])
    assert topics(tuning.lost) == set(LAKES[4:])
    assert topics(tuning.gained) >= set(RIVERS[3:])
    assert tuning.instruct_less_base.value == (tuning.gained.hits - tuning.lost.hits) / len(PLACES)


# ---- the command -----------------------------------------------------------------------------


def test_the_command_pools_seeds_and_needs_no_questions(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lab.pair.qa_of", None)  # would fail if it were looked for
    for name, run in zip(("base", "instruct"), runs, strict=True):
        for seed in "12":
            (tmp_path / seed).mkdir(exist_ok=True)
            (tmp_path / seed / name).symlink_to(run)
    out, file = tmp_path / "out.json", written(tmp_path, PLACES)
    both = [f"--{name}={tmp_path}/{{seed}}/{name}" for name in ("base", "instruct")]
    command = ["facts", *both, "--seeds", "1", "2", "--device", "cpu", "--questions", "6"]

    def call(*options: object) -> str:
        monkeypatch.setattr("sys.argv", [*command, *map(str, options)])
        facts.main()
        return capsys.readouterr().out

    printed = call("--facts", file, "--out", out)
    result = json.loads(out.read_text())["result"]
    assert result["file"] == str(file)
    share = result["tables"]["first"]["base x instruct"]["neither"]
    assert (share["n"], len(share["runs"])) == (12, 2)
    assert "tables.first.base x instruct.neither" in printed
    (tmp_path / "bad.toml").write_text("place = 3")
    with pytest.raises(SystemExit):
        call("--facts", tmp_path / "bad.toml")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_fact_that_does_not_fit_is_neither_asked_nor_a_choice(runs: Runs, tmp_path: Path) -> None:
    file = written(tmp_path, PLACES | {"Lake " + "long " * 200: "Oak", "Lake Z": "Elm " * 99 + "s"})
    with pytest.raises(ValueError, match="without spaces around"):
        read_facts(file)
    file = written(tmp_path, PLACES | {"Lake " + "long " * 200 + "x": "Oak", "Lake Z": "Elm" * 99})
    pair = open_with_facts(str(runs[0]), str(runs[1]), "cpu", file)
    assert list(pair.relations["place"].facts) == list(PLACES)
    assert pair.relations["place"].values == list(PLACES.values())
    assert facts.facts(pair, 5).base["cloze"].reciprocal.n == 5


def test_shown_facts_are_examples_for_the_base_and_are_not_asked(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    forms = {"relation": "r", "cloze": "{subject} is in", "question": "{subject}?"}
    made = [forms | {"subject": s, "value": v} for s, v in ("AX", "BY", "CZ", "DW")]
    file = tmp_path / "short.jsonl"
    file.write_text(lines_of(made))
    pair = open_with_facts(str(runs[0]), str(runs[1]), "cpu", file, shots=1)
    (shown,) = (m["content"] for m in pair.examples if m["role"] == "user")
    asked = {fact.question for fact in pair.relations["r"].facts.values()}
    assert asked == {"A?", "B?", "C?", "D?"} - {shown}
    found = facts.facts(pair, 100)
    assert found.base.keys() == {"cloze", "plain", "chat", "examples"}
    assert found.instruct.keys() == {"cloze", "plain", "chat"}
    assert found.tables["said"]["base x base, after examples"].neither.n == 3
