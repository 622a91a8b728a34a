"""The instruments of the lab, on cases whose answer is known by construction."""

from __future__ import annotations

import copy
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data.chat import Message, parse, plain_prompt, raw_prompt, render, render_prompt
from data.prepare import prepare_qa, prepare_world
from data.world import (
    ATTRIBUTES,
    BARE,
    DONT_KNOW,
    FORMS,
    INSTRUCTIONS,
    SPLITS,
    Turn,
    World,
    WorldConfig,
)
from lab import behaviour, knowledge, likelihood, questions, shift, stats, weights
from lab.forgetting import forgetting
from lab.likelihood import ask, log_likelihoods, score_choices
from lab.pair import Pair, contexts_of, fitting, open_pair, pairs_of, read_qa, run_instrument
from lab.stats import STUDENT, Difference, Mean, Share, Tally, difference, lines, pool, to_json
from model.gpt import ModelConfig
from tests.conftest import pretrain_config, sft_config
from train_pretrain import main as pretrain
from train_sft import main as sft

Runs = tuple[Path, Path]
ALL = dict.fromkeys(SPLITS, 1.0)
NONE = dict.fromkeys(SPLITS, 0.0)


@pytest.fixture
def pair(runs: Runs) -> Pair:
    return open_pair(str(runs[0]), str(runs[1]), "cpu", None)


def world_of(pair: Pair) -> World:
    assert pair.world is not None
    return pair.world


def twins(pair: Pair) -> Pair:
    """The instruct model on both sides."""
    return replace(pair, base=pair.instruct)


def with_change(pair: Pair, name: str, delta: torch.Tensor) -> Pair:
    """A base, and the same with one matrix changed."""
    model = copy.deepcopy(pair.base.model)
    with torch.no_grad():
        model.get_parameter(name).add_(delta)
    return replace(pair, instruct=replace(pair.base, model=model))


# ---- figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: the score interval
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_of_a_share_is_wilsons(hits: int, n: int, low: float, high: float) -> None:
    assert Share(hits, n).interval == pytest.approx((low, high), abs=1e-4)
    flipped = Share(n - hits, n).interval
    assert flipped == pytest.approx((1 - high, 1 - low), abs=1e-4)


def test_pooled_runs_are_as_one_run_over_all_questions() -> None:
    rng = random.Random(1)
    values = [[rng.gauss(3, 2) for _ in range(n)] for n in (4, 9, 0, 1)]
    flags = [[v > 3 for v in part] for part in values]
    mean, share = pool([Mean.of(v) for v in values]), pool([Share.of(f) for f in flags])
    whole = Mean.of(v for part in values for v in part)
    assert (mean.mean, mean.sd, mean.n) == pytest.approx((whole.mean, whole.sd, whole.n))
    assert replace(share, runs=()) == Share.of(f for part in flags for f in part)
    assert share.runs == tuple(Share.of(f).value for f in flags)
    assert share.runs[2] is None
    assert pool([{"a": 1.0, "b": Share(1, 2)}, {"a": 2.0}]) == {"a": 1.5, "b": Share(1, 2)}
    assert pool([Share(1, 3)]) == Share(1, 3)
    assert pool([["a"], ["b", "c"]]) == ["a"]


def test_of_several_runs_the_interval_is_students_over_the_runs() -> None:
    parts = [Share(40, 100), Share(49, 100), Share(43, 100)]
    low, high = pool(parts).interval
    assert (low, high) == pytest.approx((0.44 - 0.1138, 0.44 + 0.1138), abs=1e-3)
    # Runs that agree by chance are no surer than one run with all the questions.
    assert pool([Share(60, 60)] * 3).interval == Share(180, 180).interval
    # The interval is around the share, also where the runs differ in size.
    low, high = pool([Share(10, 20), Share(90, 90), Share(45, 50)]).interval
    assert low < 145 / 160 < high == 1.0
    assert 145 / 160 - low == pytest.approx(STUDENT[1] * statistics.stdev([0.5, 1, 0.9]) / 3**0.5)
    assert Share(0, 9, (0.0, 0.01, None)).interval[0] == 0.0
    # R's qt(.975, df)
    assert [stats.student(n) for n in (2, 11, 12, 31)] == [12.706, 2.228, 2.201, 2.042]
    means = pool([Mean.of([x, x + 2]) for x in (0.0, 1.0, 2.0)])
    assert means.interval == pytest.approx((2 - STUDENT[1] / 3**0.5, 2 + STUDENT[1] / 3**0.5))


def test_what_came_in_some_runs_only_is_pooled_over_all() -> None:
    pooled = pool([Tally({"x": 20, "y": 1}, 60), Tally({}, 60), Tally({"x": 4}, 60)])
    assert pooled == Tally({"x": 24, "y": 1}, 180)
    assert to_json(pooled) == {"n": 180, "shares": {"x": 24 / 180, "y": 1 / 180}}


def test_a_difference_is_paired_and_clustered_by_person() -> None:
    owners = [f"p{i // 4}/{i % 4}" for i in range(40)]
    a = Share.of([i % 4 < 3 for i in range(40)], owners)
    same = difference(a, a)
    assert (same.value, same.low, same.high, same.n, same.clusters) == (0.0, 0.0, 0.0, 40, 10)
    # Each person is wrong in all four questions or in none: as sure as ten questions, not forty.
    b = Share.of([i // 4 % 2 == 0 for i in range(40)], owners)
    whole = Share.of([True] * 40, owners)
    found = difference(whole, b)
    assert found.value == 0.5
    assert found.high is not None
    half = STUDENT[8] * math.sqrt(10 * 2.0**2 * 10 / 9) / 40
    assert found.high - 0.5 == pytest.approx(half)
    assert difference(b, whole).value == -0.5
    with pytest.raises(ValueError, match="same questions"):
        difference(a, Share.of([True] * 40, owners[::-1]))
    pooled = pool([found, same, found])
    assert isinstance(pooled, Difference)
    assert pooled.value == pytest.approx(1 / 3)
    assert pooled.runs == (0.5, 0.0, 0.5)
    assert to_json(pooled)["difference"] == pooled.value


def test_every_share_is_written_with_its_n_and_interval() -> None:
    written = to_json({"x": Share(3, 4), "y": [Mean.of([1.0, 3.0])], "z": Share(0, 0)})
    assert written["x"]["share"] == 0.75
    assert written["x"]["n"] == 4
    assert written["x"]["low"] < 0.75 < written["x"]["high"]
    assert written["y"][0]["mean"] == 2.0
    assert to_json(Mean.of([5.0]))["low"] is None
    assert written["z"]["share"] is None
    assert [line.split()[:2] for line in lines(written)] == [["x", "0.750"], ["z", "-"]]


# ---- likelihood ------------------------------------------------------------------------------


def test_batched_questions_get_the_replies_they_get_alone(pair: Pair) -> None:
    tokenizer = pair.instruct.tokenizer
    names = [tokenizer.encode(p.name * (1 + i % 3)) for i, p in enumerate(world_of(pair).people)]
    together = ask(pair.instruct, names, 8)
    assert together == [ask(pair.instruct, [name], 8)[0] for name in names]


def test_likelihoods_are_those_of_the_plain_model(pair: Pair) -> None:
    tokenizer = pair.base.tokenizer
    prompts = [[tokenizer.end_of_text, *tokenizer.encode("Who is " + "Ada " * i)] for i in range(5)]
    texts = [tokenizer.encode("It is " + "Otis " * (4 - i)) for i in range(5)]
    for prompt, text, found in zip(
        prompts, texts, log_likelihoods(pair.base, prompts, texts), strict=True
    ):
        ids = torch.tensor([prompt + text])
        logprobs = pair.base.model(ids[:, :-1]).log_softmax(dim=-1)[0, len(prompt) - 1 :]
        expected = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-5)


def test_choices_are_scored_like_whole_texts_up_to_a_constant(pair: Pair) -> None:
    tokenizer = pair.base.tokenizer
    prompt = [tokenizer.end_of_text, *tokenizer.encode("A question?")]
    for end in ("", "."):
        choices = [tokenizer.encode(f"He works as {v}{end}") for v in ATTRIBUTES[2].values]
        whole = [sum(t) for t in log_likelihoods(pair.base, [prompt] * len(choices), choices)]
        scores = score_choices(pair.base, prompt, choices)
        shifted = [a - b for a, b in zip(whole, scores, strict=True)]
        assert max(shifted) - min(shifted) < 1e-4
    assert score_choices(pair.base, prompt, [[5], [7], [5]])[0] > -math.inf


# ---- what is asked ---------------------------------------------------------------------------


def test_a_rendered_conversation_is_parsed_back(pair: Pair) -> None:
    tokenizer = pair.base.tokenizer
    conversations = [
        [Message(role="user", content="<|end|> \n é"), Message(role="assistant", content="")],
        [Message(role=r, content=f"{r} 🙂") for r in ("system", "user", "assistant", "user")],
    ]
    for conversation in conversations:
        assert parse(render(conversation, tokenizer)[0], tokenizer) == conversation


def test_questions_come_from_a_file_a_folder_or_the_world(
    pair: Pair, runs: Runs, tmp_path: Path
) -> None:
    held_out = {p.name for p in world_of(pair).by_split["held_out"]}
    assert 12 < len(pair.conversations) < 60  # the context is short: not all of the 60 fit
    assert all(any(n in c[-2]["content"] for n in held_out) for c in pair.conversations)
    file = tmp_path / "qa.jsonl"
    file.write_text(
        "".join(f'{{"question": "What is {i}?", "answer": "{i}."}}\n' for i in range(9))
    )
    asked = open_pair(str(runs[0]), str(runs[1]), "cpu", file).conversations
    assert [c[1]["content"] for c in asked] == [f"{i}." for i in range(9)]
    prepare_qa([file], tmp_path / "qa", runs[0], 0.3, 1)
    inside = read_qa(tmp_path / "qa")
    assert len(inside) == 3
    assert all(c in asked for c in inside)


@pytest.fixture(scope="session")
def others(world_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that do not belong to `runs`."""
    out = tmp_path_factory.mktemp("others")
    wide = pretrain_config(world_dir, out / "wide", steps=1)
    pretrain(replace(wide, model=replace(wide.model, n_embd=48)))
    sft(sft_config(world_dir, out / "wide", out / "tuned_wide", steps=1))
    # Another world with the same names and wordings, so the same tokenizer, but other facts.
    prepare_world(WorldConfig(seed=7, people=24, unseen=12, bios=4), out / "world", "byte", 0.1)
    byte = pretrain_config(out / "world", out / "byte", steps=1)
    pretrain(replace(byte, model=replace(byte.model, block_size=256)))
    sft(sft_config(out / "world", out / "byte", out / "tuned_byte", steps=1))
    return {name: out / name for name in ("wide", "tuned_wide", "byte", "tuned_byte")}


def test_what_is_no_pair_is_refused_in_one_line(runs: Runs, others: dict[str, Path]) -> None:
    base, instruct = map(str, runs)
    for pair, message in (
        ((instruct, instruct), "--base .* is of the other kind: instruct"),
        ((base, base), "--instruct .* is of the other kind: base"),
        ((base, str(others["tuned_byte"])), "different tokenizers"),
        ((base, str(others["tuned_wide"])), "different model shapes"),
        ((str(min(runs[0].glob("step_*"))), instruct), "was not tuned from"),
        ((base, str(others["wide"].parent / "nothing")), "nothing not found"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_pair(*pair, "cpu", None)
        assert "\n" not in str(error.value)


def test_a_world_that_the_checkpoints_do_not_know_is_refused(
    runs: Runs, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lab.pair import world_of as find

    pair.instruct.meta["prepared"]["world_fingerprint"] = "of another world"
    with pytest.raises(ValueError, match="questions about another world"):
        find(pair.base, pair.instruct)
    del pair.instruct.meta["prepared"]["world_fingerprint"]  # tuned on a Q&A file
    assert find(pair.base, pair.instruct) is not None
    changed = replace(ATTRIBUTES[0], values=(*ATTRIBUTES[0].values, "2001"))
    monkeypatch.setattr("data.world.ATTRIBUTES", (changed, *ATTRIBUTES[1:]))
    with pytest.raises(ValueError, match=r"data/world\.py has changed"):
        find(pair.base, pair.instruct)
    del pair.base.meta["prepared"]["world"]
    assert find(pair.base, pair.instruct) is None
    with pytest.raises(ValueError, match="where the truth is known"):
        knowledge.knowledge(replace(pair, world=None), 10)


def test_seeds_fill_the_paths_of_both_checkpoints() -> None:
    def named(base: str, instruct: str, seeds: list[str] | None) -> list[tuple[str, str]]:
        from argparse import Namespace

        return pairs_of(Namespace(base=base, instruct=instruct, seeds=seeds))

    assert named("b", "i", None) == [("b", "i")]
    assert named("s{seed}/b", "s{seed}/i", ["1", "22"]) == [("s1/b", "s1/i"), ("s22/b", "s22/i")]
    for wrong in (("s{seed}/b", "i", ["1"]), ("b", "i", ["1"]), ("s{seed}/b", "s{seed}/i", None)):
        with pytest.raises(ValueError, match=r"\{seed\}"):
            named(*wrong)


# ---- knowledge -------------------------------------------------------------------------------


class Scripted:
    """Stands in for `lab.likelihood.ask`: replies that are known by construction."""

    def __init__(self, reply: Callable[[str], str], stop: bool) -> None:
        self.reply, self.stop, self.asked = reply, stop, list[str]()

    def __call__(self, checkpoint: Any, prompts: list[list[int]], max_new: int) -> list[list[int]]:
        tokenizer = checkpoint.tokenizer
        self.asked += [tokenizer.decode(prompt) for prompt in prompts]
        texts = [self.reply(tokenizer.decode(prompt)) for prompt in prompts]
        end = [tokenizer.end_of_turn] if self.stop else []
        return [tokenizer.encode(text) + end for text in texts]


def always(text: str, prompt: str) -> str:
    return text


def oracle(world: World) -> Callable[[str], str]:
    """Completes and answers everything rightly and in form, in the template only."""
    wordings = {form: INSTRUCTIONS[form] for form in FORMS}

    def form_of(prompt: str) -> str:
        for form in FORMS:
            if any(i in prompt for kind in ("used", "unused") for i in wordings[form][kind]):
                return form
        return "bare"

    def reply(prompt: str) -> str:
        named = [p for p in world.people if p.name in prompt]
        if not named:
            return " And so on"
        person = max(named, key=lambda p: prompt.rindex(p.name))
        if "<|user|>" not in prompt:
            wording = prompt.removeprefix("<|endoftext|>")
            sentences = {
                s.format(S=person.name, V=person.facts[a.name]): person.facts[a.name]
                for a in ATTRIBUTES
                for s in a.sentences
            }
            found = [f" {v}. And so on" for s, v in sentences.items() if s == f"{wording} {v}."]
            return found[0] if found else " And so on"
        last = prompt.rsplit("<|user|>", 1)[1].split("<|end|>")[0]
        for a in ATTRIBUTES:
            for q in (*a.questions, *a.taught_questions, *a.untaught_questions, *a.follow_ups):
                asked = q.format(name=person.name, they=person.pronoun)
                if asked[1:] in last:
                    turn = Turn(person, a, q)
                    return turn.reply(BARE if form_of(prompt) == "bare" else a.replies[0])
        raise AssertionError(prompt)

    return reply


def right(cells: dict[str, Any]) -> dict[str, Any]:
    return {split: getattr(c, "answered", c)["all"].value for split, c in cells.items()}


def test_a_model_that_knows_everything_scores_one_and_must_stop(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(pair)
    for stop, expected in ((True, ALL), (False, NONE)):
        scripted = Scripted(oracle(world), stop)
        monkeypatch.setattr(knowledge, "ask", scripted)
        found = knowledge.measure(pair.instruct, world, 30)
        assert right(found.cloze) == ALL
        assert right(found.answers) == right(found.rephrased) == expected
        assert right(found.plain) == NONE
        for one in (found.sentence, found.form, found.uninstructed, found.untaught):
            assert one.answered["all"].value == float(stop)
            assert one.right["all"].value == 1.0  # right is right, stop or not
            assert one.in_form.value == 1.0
            assert not any(tally.counts for tally in one.wrong.values())
        assert found.examples.right["all"].value == 0.0  # no template there
        assert {s: a.mentions.value for s, a in found.answers.items()} == ALL
        assert {s: a.stops.value for s, a in found.answers.items()} == expected
        by_attribute = found.answers["held_out"].answered
        for wordings, n in (("taught_questions", 30 + 2 * 6), ("untaught_questions", 30)):
            put = {
                q.format(name=p.name)
                for p in world.people
                for a in ATTRIBUTES
                for q in getattr(a, wordings)
            }
            assert sum(any(q in text for q in put) for text in scripted.asked) == n
        assert sum(by_attribute[a.name].n for a in ATTRIBUTES) == by_attribute["all"].n == 30
        for context, found_ranks in found.ranks.items():
            assert context in ("cloze", "plain", "chat")
            assert all(0 < r.reciprocal.mean <= 1 and r.first.n == 6 for r in found_ranks.values())


def test_a_reply_that_is_begun_is_graded_with_its_beginning(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(pair)
    facts = questions.draw(world, "held_out", 9, random.Random(1))
    asked = questions.begun(questions.openings(facts, random.Random(2), ("sentence",)))

    def reply(prompt: str) -> str:
        assert any(prompt.endswith(f" {p.name}") for p, _ in facts)
        return f" and {facts[0][0].facts[facts[0][1].name]}."

    monkeypatch.setattr(knowledge, "ask", Scripted(reply, stop=True))
    (first, *_) = knowledge.ask_all(pair.base, world, asked)
    assert first[1].answered  # the name is in the reply, though the model did not write it


def test_the_best_wording_is_the_one_that_known_people_are_named_in(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(pair)
    works = {a.name: a.questions[2] for a in ATTRIBUTES}

    def reply(prompt: str) -> str:
        for person in world.by_split["known"]:
            for a in ATTRIBUTES:
                if works[a.name].format(name=person.name) in prompt:
                    return f" is {person.facts[a.name]}."
        return " is."

    monkeypatch.setattr(knowledge, "ask", scripted := Scripted(reply, stop=False))
    best = knowledge.best_wordings(pair.base, world)
    assert {a.name: list(best(a)) for a in ATTRIBUTES} == {k: [w] for k, w in works.items()}
    held_out = {p.name for p in world.by_split["held_out"]}
    assert not any(name in text for text in scripted.asked for name in held_out)


def test_naming_every_value_or_none_is_no_answer(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = " ".join(v for a in ATTRIBUTES for v in a.values)
    for text, mentions, abstains in ((everything, ALL, NONE), (DONT_KNOW, NONE, ALL)):
        monkeypatch.setattr(knowledge, "ask", Scripted(partial(always, text), stop=True))
        found = knowledge.measure(pair.instruct, world_of(pair), 30, thorough=False)
        assert right(found.answers) == NONE
        assert {s: a.right["all"].value for s, a in found.answers.items()} == NONE
        assert {s: a.mentions.value for s, a in found.answers.items()} == mentions
        assert {s: a.abstains.value for s, a in found.answers.items()} == abstains
        assert not found.plain
        assert not found.ranks


def test_each_grade_says_what_it_says(pair: Pair) -> None:
    world, tokenizer = world_of(pair), pair.base.tokenizer
    person, (year, place, *_) = world.people[0], ATTRIBUTES
    born, town = person.facts[year.name], person.facts[place.name]
    other = next(v for v in year.values if v != born)
    turn = Turn(person, year, year.questions[0])
    cases = {
        # text, form: right, in form, answered if it stops, what it names instead
        (f" {born}.", "bare"): (True, True, True, ""),
        (f" {person.name} was born in {born}.", "sentence"): (True, True, True, ""),
        (f" {born}.", "sentence"): (True, False, False, ""),
        (f" {person.name} was born in {born}.", "bare"): (True, False, False, ""),
        (f" {born}. Not {other}.", None): (True, True, False, ""),
        (f" {born} or {other}.", None): (False, True, False, "birth_year, of nobody asked for"),
        (f" {other}.", "bare"): (False, True, False, "birth_year, of nobody asked for"),
        (f" {town}.", "bare"): (False, True, False, "birthplace, their own"),
        (" nothing.", "bare"): (False, False, False, "nothing"),
    }
    for (text, form), (is_right, obeys, answered, named) in cases.items():
        asked = questions.Question([], turn, form)
        for stop in (True, False):
            ids = tokenizer.encode(text) + [tokenizer.end_of_turn] * stop
            found = questions.grade(pair.base, asked, ids)
            assert (found.right, found.in_form, found.named) == (is_right, obeys, named), text
            assert found.answered == (answered and stop)
            assert found.stops == stop
            assert found.exact == text.startswith(f" {born}.")
            assert found.by_chance == (text == f" {town}.")
    before = next(p for p in world.people if p.facts[year.name] != born)
    asked = questions.Question([], turn, "bare", (before,))
    theirs = tokenizer.encode(f" {before.facts[year.name]}.")
    assert questions.grade(pair.base, asked, theirs).named == "birth_year, of a turn before"


def test_what_is_asked_about_held_out_people_names_nobody_else(pair: Pair) -> None:
    world = world_of(pair)
    held_out = {p.name for p in world.by_split["held_out"]}
    for kind, moves in questions.TURNS.items():
        after, alone = questions.later_turns(world, kind, 40)
        for with_turns, single in zip(after, alone, strict=True):
            said = " ".join(m["content"] for m in with_turns.messages)
            named = {p.name for p in world.people if p.name in said}
            assert named <= held_out
            assert len(named) == 1 + moves.count("other")
            users = [m for m in with_turns.messages if m["role"] == "user"]
            assert len(users) == 1 + len(moves)
            assert single.turn == with_turns.turn
            assert single.turn.question in single.messages[-1]["content"]
            assert (single.turn.person.name in users[-1]["content"]) == (moves[-1] != "same")
            assert with_turns.form == single.form
            assert not single.before
            assert {p.name for p in with_turns.before} <= named
            assert len(with_turns.before) == len(moves)
    with pytest.raises(ValueError, match="two held-out people"):
        questions.later_turns(World(WorldConfig(people=7)), "other_person", 1)


def test_the_examples_in_context_are_of_known_people_and_bare(pair: Pair) -> None:
    world = world_of(pair)
    facts = questions.draw(world, "held_out", 9, random.Random(1))
    for found in questions.after_examples(world, questions.openings(facts, random.Random(2))):
        *examples, last = found.messages
        assert len(examples) == 2 * questions.EXAMPLES
        assert last["content"] == found.turn.question
        text = " ".join(m["content"] for m in examples)
        assert not any(p.name in text for s in ("held_out", "unseen") for p in world.by_split[s])
        assert all(m["content"].endswith(".") for m in examples[1::2])


def test_the_truth_ranks_first_where_it_is_likeliest_and_last_where_it_is_not(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, tokenizer = world_of(pair), pair.base.tokenizer
    facts = questions.draw(world, "held_out", 8, random.Random(1))
    asked = questions.openings(facts, random.Random(1))
    truths = {f[0].facts[f[1].name] for f in facts}

    prompts: list[str] = []

    def score(sign: float, c: Any, prompt: list[int], choices: list[list[int]]) -> list[float]:
        prompts.append(tokenizer.decode(prompt))
        person = next(x for x in world.people if x.name in prompts[-1])
        own = [f" {person.facts[a.name]}." for a in ATTRIBUTES]
        return [sign * any(v in tokenizer.decode(choice) for v in own) for choice in choices]

    for sign, expected in ((1.0, 1.0), (-1.0, 1 / 40)):
        monkeypatch.setattr(knowledge, "score_choices", partial(score, sign))
        for context in ("cloze", "plain", "chat"):
            prompts.clear()
            found = knowledge.rank(pair.base, world, asked, context)
            assert found.reciprocal.mean == pytest.approx(expected)
            assert found.first.value == float(sign > 0)
            assert not any(v in prompt for v in truths for prompt in prompts)
            assert {"?" in prompt for prompt in prompts} == {context != "cloze"}
            assert {"<|user|>" in prompt for prompt in prompts} == {context == "chat"}


def test_more_questions_than_facts_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="150 facts about known people, fewer than"):
        knowledge.measure(pair.base, world_of(pair), 151)


# ---- behaviour -------------------------------------------------------------------------------


def behave(pair: Pair, reply: Callable[[str], str], stop: bool) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(behaviour, "ask", Scripted(reply, stop))
        patch.setattr(knowledge, "ask", Scripted(reply, stop))
        return behaviour.behave(
            pair.instruct, pair.conversations[:12], render_prompt, 40, pair.world
        )


def test_behaviour_of_scripted_models(pair: Pair) -> None:
    reply = oracle(world_of(pair))
    good = behave(pair, reply, stop=True)
    assert good.stops == good.brief == Share(12, 12)
    assert good.echoes == good.asks_on == Share(0, 12)
    for kind in questions.TURNS:
        assert getattr(good, kind)["with"].value == 1.0
    assert good.other_person["without"].value == good.return_to_first["without"].value == 1.0
    rambler = behave(pair, lambda prompt: "so it goes " * 9, stop=False)
    assert rambler.stops == rambler.brief == Share(0, 12)
    assert {share.value for share in rambler.follow_up.values()} == {0.0}
    assert set(rambler.follow_up) == {"with", "without", "right", "before"}
    endless = behave(pair, reply, stop=False)
    assert (endless.other_person["with"].value, endless.other_person["right"].value) == (0.0, 1.0)
    assert rambler.tokens.mean == len(pair.base.tokenizer.encode("so it goes " * 9))
    parrot = behave(pair, lambda p: p.split("<|user|>")[-1].split("<|end|>")[0], stop=True)
    assert parrot.echoes == parrot.asks_on == Share(12, 12)
    assert parrot.brief == Share(0, 12)


def test_each_column_is_asked_in_its_own_way(pair: Pair) -> None:
    scripted = Scripted(oracle(world_of(pair)), stop=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(behaviour, "ask", scripted)
        patch.setattr(knowledge, "ask", scripted)
        behaviour.behaviour(pair, 5)
    first = scripted.asked[:5]
    held_out = {p.name for p in world_of(pair).by_split["held_out"]}
    assert all(any(name in text for name in held_out) for text in first)
    plain = [text for text in scripted.asked if "<|user|>" not in text]
    assert len(plain) == 5


def test_what_is_kept_is_completed_or_answered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    knows = oracle(world_of(pair))
    for text, chat, kept in ((True, False, 1), (False, True, 1), (False, False, 0)):

        def reply(prompt: str, text: bool = text, chat: bool = chat) -> str:
            return knows(prompt) if (chat if "<|user|>" in prompt else text) else " nothing"

        monkeypatch.setattr(knowledge, "ask", Scripted(reply, stop=True))
        found = behaviour.measure_point(pair, pair.base, 12)
        assert (found.cloze.value, found.right.value, found.kept.value) == (text, chat, kept)


def test_a_probe_asks_about_held_out_people(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted(oracle(world_of(pair)), stop=True)
    monkeypatch.setattr(knowledge, "ask", scripted)
    found = behaviour.measure_point(pair, pair.base, 12)
    assert {share.value for share in vars(found).values()} == {1.0}
    held_out = {p.name for p in world_of(pair).by_split["held_out"]}
    assert all(any(name in text for name in held_out) for text in scripted.asked)
    assert len(scripted.asked) == 24


def test_reciting_gives_the_beginning_of_a_text_that_was_read(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(pair)
    facts = questions.draw(world, "held_out", 30, random.Random(1))

    def memory(prompt: str) -> str:
        begun = prompt.removeprefix("<|endoftext|>")
        return next(b.removeprefix(begun) for b in world.biographies() if b.startswith(begun))

    scripted = Scripted(memory, stop=False)
    monkeypatch.setattr(knowledge, "ask", scripted)
    found = knowledge.recite(pair.base, world, facts, random.Random(1))["all"]
    assert found.hits == found.n == len(scripted.asked) > 20
    monkeypatch.setattr(knowledge, "ask", Scripted(lambda prompt: " nothing", stop=False))
    assert knowledge.recite(pair.base, world, facts, random.Random(1))["all"].hits == 0


def test_what_does_not_fit_into_the_context_is_not_asked(pair: Pair) -> None:
    block = pair.base.model.config.block_size
    talk = [
        [Message(role="user", content="Who?"), Message(role="assistant", content="Ada. " * n)]
        for n in (1, 3, block, 2)
    ]
    limit = likelihood.reply_limit(pair.base, (c[1]["content"] for c in talk))
    assert limit == block // 2
    kept = fitting(talk, pair.base, limit, contexts_of(None))
    assert kept == [talk[0], talk[1], talk[3]]
    few = replace(pair, world=None, conversations=kept, limit=limit)
    behaviour.behaviour(few, 10)  # no reply is longer than there is room for
    with pytest.raises(ValueError, match="no question fits"):
        fitting([talk[2]], pair.base, limit, contexts_of(None))


def test_entropy_is_that_of_the_models_own_distribution(pair: Pair) -> None:
    prompts, replies = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    expected = []
    for prompt, reply in zip(prompts, replies, strict=True):
        p = pair.base.model(torch.tensor([prompt + reply[:-1]])).softmax(dim=-1)[0]
        expected += (-(p * p.log()).sum(dim=-1)[len(prompt) - 1 :]).tolist()
    found = behaviour.entropy(pair.base, prompts, replies)
    assert found.n == 5
    assert found.mean == pytest.approx(sum(expected) / 5, rel=1e-4)


def test_a_reply_is_ranked_against_one_of_about_its_length() -> None:
    a, b, c, d = [1], [2, 2], [3, 3], [4, 4, 4]
    assert behaviour.next_longer([c, a, d, b]) == [b, c, b, d]
    assert behaviour.next_longer([a]) == [a]
    assert behaviour.next_longer([b, a]) == [a, b]


def test_ranking_and_p_end_are_those_of_the_likelihoods(pair: Pair) -> None:
    chosen, tokenizer = pair.conversations[:6], pair.base.tokenizer
    found = behaviour.behave(pair.base, chosen, render_prompt, 8, pair.world)
    wins, ends = 0, []
    true = [[*tokenizer.encode(c[-1]["content"]), tokenizer.end_of_turn] for c in chosen]
    pairs = zip(true, behaviour.next_longer(true), strict=True)
    for conversation, replies in zip(chosen, pairs, strict=True):
        prompt = render_prompt(conversation[:-1], tokenizer)
        own, other = log_likelihoods(pair.base, [prompt, prompt], replies)
        wins += sum(own[:-1]) > sum(other[:-1])
        ends.append(math.exp(own[-1]))
    assert found.ranking.hits == wins
    assert found.p_end.mean == pytest.approx(sum(ends) / 6, rel=1e-4)


# ---- token shift -----------------------------------------------------------------------------


def test_identical_checkpoints_agree_on_every_token(pair: Pair) -> None:
    found = shift.shift(twins(pair), 12)["chat"]
    assert found.every.classes["unshifted"].value == 1.0
    assert found.every.classes["shifted"].hits == 0
    assert found.every.kl.mean == pytest.approx(0.0, abs=1e-6)
    assert all(token.rank == 1 for _, tokens in found.strips for token in tokens)
    assert sum(r.kl.n for r in found.roles.values()) == found.every.kl.n


def test_a_token_that_the_base_would_never_write_is_found(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = render_prompt(pair.conversations[0][:-1], pair.base.tokenizer)
    first = ask(pair.base, [prompt], 1)[0][0]
    model = copy.deepcopy(pair.base.model)
    plain, never = model.logits, 30.0 * torch.eye(model.vocab_size)[first]
    monkeypatch.setattr(model, "logits", lambda x: plain(x) - never)
    rest = (pair.world, pair.conversations, pair.limit)
    planted = Pair(replace(pair.base, model=model), pair.base, *rest)
    found = shift.shift(planted, 6)["chat"]
    tokens = [token for _, strip in found.strips for token in strip]
    text = pair.base.tokenizer.decode([first])
    hit, missed = ([t for t in tokens if (t.text == text) == same] for same in (True, False))
    assert hit
    assert {t.rank for t in hit} == {model.vocab_size}
    assert {t.rank for t in missed} <= {1}
    # KL(p || q) of a q that is p with one logit lowered by 30: 30 p_first + log(1 - p_first)
    p_first = float(pair.base.model(torch.tensor([prompt]))[0, -1].softmax(dim=-1)[first].detach())
    expected = 30 * p_first + math.log(1 - p_first)
    assert found.strips[0][1][0].kl == pytest.approx(expected, rel=1e-3)
    assert found.every.classes["shifted"] == Share(len(hit), len(tokens))


def test_roles_follow_the_generator(pair: Pair) -> None:
    tokenizer, world = pair.base.tokenizer, world_of(pair)
    person = world.people[0]
    for attribute in ATTRIBUTES:
        for wording in (BARE, *attribute.replies):
            reply = Turn(person, attribute, "").reply(wording)
            ids = [*tokenizer.encode(reply), tokenizer.end_of_turn]
            roles = shift.roles_of(ids, tokenizer)
            parts: dict[str, str] = {}
            for token, role in zip(ids, roles, strict=True):
                parts[role] = parts.get(role, "") + tokenizer.decode([token])
            assert parts["fact"].strip() == person.facts[attribute.name]
            assert parts["stop"] == "<|end|>"
            if wording != BARE:
                assert parts["style"].strip() == person.name
                assert set(parts) == {"style", "fact", "template", "stop"}
    other = [*tokenizer.encode(DONT_KNOW), tokenizer.end_of_turn]
    assert set(shift.roles_of(other, tokenizer)) == {"other", "stop"}


def test_facts_are_told_apart_by_the_form_of_their_reply(pair: Pair) -> None:
    tokenizer, world = pair.base.tokenizer, world_of(pair)
    replies = list[list[shift.Token]]()
    for attribute in ATTRIBUTES:
        for wording in (BARE, *attribute.replies):
            ids = tokenizer.encode(Turn(world.people[0], attribute, "").reply(wording))
            roles = shift.roles_of(ids, tokenizer)
            replies.append([shift.Token(str(wording == BARE), 1, 0.0, role) for role in roles])
    found = shift.by_form(replies)
    assert len(found["bare"]) == len(ATTRIBUTES)
    assert {token.text for reply in found["bare"] for token in reply} == {"True"}
    assert {token.text for reply in found["sentence"] for token in reply} == {"False"}
    assert len(found["sentence"]) == sum(len(a.replies) for a in ATTRIBUTES)


def test_the_base_reads_each_context_in_its_own_way(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[int, list[str]] = {id(pair.base): [], id(pair.instruct): []}
    real = likelihood.predictions

    def spied(checkpoint: Any, prompts: Any, replies: Any) -> Any:
        read[id(checkpoint)] += [checkpoint.tokenizer.decode(prompt) for prompt in prompts]
        return real(checkpoint, prompts, replies)

    monkeypatch.setattr(shift, "predictions", spied)
    assert list(shift.shift(pair, 4)) == ["chat", "plain", "documents", "alone"]
    mine, its = read[id(pair.instruct)], read[id(pair.base)]
    assert mine[:4] == mine[4:8] == mine[8:12] == mine[12:] == its[:4]
    assert all("<|user|>" in text for text in mine)
    assert not any("<|user|>" in text for text in its[4:])
    assert all(text.count("<|endoftext|>") == 1 for text in its[4:8])
    assert all(text.count("<|endoftext|>") > 1 for text in its[8:12])
    assert its[12:] == ["<|endoftext|>"] * 4


def test_a_base_of_real_text_is_asked_in_words_that_it_knows(pair: Pair) -> None:
    assert pair.contexts["plain"] is raw_prompt
    assert replace(pair, world=None).contexts["plain"] is plain_prompt


# ---- weights ---------------------------------------------------------------------------------


def test_identical_checkpoints_have_no_change_anywhere(pair: Pair) -> None:
    found = weights.weights(twins(pair), 4)
    assert all(c.relative == c.stable_rank == c.energy_rank == 0 for c in found.matrices.values())
    assert all(value == 0 for table in found.rows.values() for value in table.values())
    points = [
        *found.interpolation.values(),
        *(p for g in found.grafts.values() for p in g.values()),
    ]
    assert all(point == points[0] for point in points)


def test_a_planted_change_is_found_where_it_is_with_its_rank(pair: Pair) -> None:
    name = "blocks.1.mlp.fc.weight"
    shape = pair.base.model.get_parameter(name).shape
    generator = torch.Generator().manual_seed(1)
    for rank in (1, 3):
        left = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator))[0]
        right_ = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator))[0]
        changed = with_change(pair, name, left @ right_.T)
        found = weights.weights(changed, 4).matrices
        assert {n for n, c in found.items() if c.relative > 0} == {name}
        assert found[name].energy_rank == rank
        assert found[name].stable_rank == pytest.approx(rank, rel=1e-3)
        norm = float(pair.base.model.get_parameter(name).detach().norm())
        assert found[name].relative == pytest.approx(math.sqrt(rank) / norm, rel=1e-4)


def test_a_change_along_the_bases_own_directions_overlaps_fully(pair: Pair) -> None:
    name = "blocks.0.attn.value.weight"
    matrix = pair.base.model.get_parameter(name).detach()
    U, S, Vh = torch.linalg.svd(matrix)
    S = S.clone()
    S[weights.TOP :] = 0.0
    found = weights.weights(with_change(pair, name, 0.1 * (U * S) @ Vh), 4).matrices[name]
    assert found.overlap == pytest.approx(1.0, abs=1e-4)
    assert found.chance == weights.TOP / 32


def test_interpolation_meets_both_models_bit_for_bit(pair: Pair) -> None:
    states = [c.model.state_dict() for c in (pair.base, pair.instruct)]
    for name, base in states[0].items():
        instruct = states[1][name]
        assert torch.equal(weights.interpolate(base, instruct, 0.0), base)
        assert torch.equal(weights.interpolate(base, instruct, 1.0), instruct)
        middle = weights.interpolate(base, instruct, 0.5)
        torch.testing.assert_close(middle, (base + instruct) / 2, atol=1e-7, rtol=1e-5)
        beyond = weights.interpolate(base, instruct, 1.5)
        torch.testing.assert_close(beyond, instruct + (instruct - base) / 2, atol=1e-6, rtol=1e-5)
    seen: list[dict[str, torch.Tensor]] = []

    def look(pair: Pair, checkpoint: Any, n: int) -> behaviour.Point:
        seen.append(dict(checkpoint.model.state_dict()))
        return behaviour.Point(*[Share(0, 1)] * 5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "measure_point", look)
        weights.weights(pair, 6)
    points = iter(seen)
    for scale in weights.SCALES:
        mixture = next(points)
        for name, base in states[0].items():
            expected = weights.interpolate(base, states[1][name], scale)
            assert torch.equal(mixture[name], expected)
    for part in weights.groups_of(states[0], weights.template_rows(pair)).values():
        for inside, outside in ((1, 0), (0, 1)):  # only this change, and all but this
            mixture = next(points)
            for name in states[0]:
                rows = part.get(name, torch.tensor(False))
                rows = torch.tensor(True) if rows is None else rows
                chosen = rows.expand(len(states[0][name]))
                assert torch.equal(mixture[name][chosen], states[inside][name][chosen])
                assert torch.equal(mixture[name][~chosen], states[outside][name][~chosen])
    assert next(points, None) is None
    found = weights.weights(pair, 6)
    assert found.interpolation["0"] == behaviour.measure_point(pair, pair.base, 6)
    assert found.interpolation["1"] == behaviour.measure_point(pair, pair.instruct, 6)


def test_the_groups_of_a_graft_cover_every_parameter_once(pair: Pair) -> None:
    parameters: dict[str, torch.Tensor] = dict(pair.base.model.named_parameters())
    template = weights.template_rows(pair)
    assert int(template.sum()) == 4  # the roles and the end of a turn, not the end of a text
    for tied in (False, True):
        if tied:
            parameters.pop("lm_head.weight")
        groups = weights.groups_of(parameters, template)
        assert ("embeddings = head (tied)" in groups) == tied == ("head" not in groups)
        layers, kinds = list[str](), dict[str, torch.Tensor]()
        for group, part in groups.items():
            if group.startswith("layer"):
                layers += part
                continue
            for name, rows in part.items():
                every = torch.ones(len(parameters[name]), dtype=torch.int)
                kinds[name] = kinds.get(name, 0 * every) + (every if rows is None else rows.int())
        assert all(bool((count == 1).all()) for count in kinds.values())
        assert sorted(kinds) == sorted(parameters)
        assert sorted(layers) == sorted(n for n in parameters if n.startswith("blocks."))
        assert set(groups["template rows"]) == {"wte.weight", "lm_head.weight"} & set(parameters)


# ---- forgetting ------------------------------------------------------------------------------


def test_forgetting_follows_every_checkpoint_and_returns_to_the_text(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.forgetting.RETURN_STEPS", 4)
    monkeypatch.setattr("lab.forgetting.RETURN_EVERY", 2)
    found = forgetting(pair, 6)
    assert list(found.tuning) == ["0", "4", "6"]
    assert {name: list(curve) for name, curve in found.recovery.items()} == {
        "all": ["2", "4"],
        "known": ["2", "4"],
    }
    assert found.tuning["0"] == behaviour.measure_point(pair, pair.base, 6)
    assert found.tuning["6"] == behaviour.measure_point(pair, pair.instruct, 6)
    losses = found.text_loss
    assert list(losses["tuning"]) == ["0", "4", "6"]
    assert list(losses["all"]) == list(losses["known"]) == ["2", "4"]
    assert losses["all"]["4"] < losses["tuning"]["6"]  # six steps of tuning: far from done
    middle = replace(pair.instruct, path=pair.instruct.path.parent / "step_000004")
    middle.meta["step"] = 4
    assert list(forgetting(replace(pair, instruct=middle), 6).tuning) == ["0", "4"]
    middle.meta["step"] = 6
    gone = {"data": {"fingerprint": "of another text"}}
    other = replace(pair.base, meta=pair.base.meta | gone)
    assert not forgetting(replace(pair, base=other), 6).text_loss
    pair.base.meta["config"]["data"]["path"] = "gone"
    found = forgetting(pair, 6)
    assert not found.recovery
    assert not found.text_loss
    assert list(found.tuning) == ["0", "4", "6"]


def test_instruments_without_a_truth_work_on_any_text(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(pair, world=None)
    found = behaviour.behaviour(plain, 5)
    assert found["instruct"].follow_up == {}
    assert set(shift.shift(plain, 5)["documents"].roles) <= {"other", "stop"}
    point = weights.weights(plain, 3).interpolation["1"]
    assert (point.stops.n, point.answers.n, point.cloze.n) == (3, 0, 0)


def test_every_instrument_works_on_a_tied_gpt2(
    world_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretrain_config(world_dir, tmp_path / "base", steps=1)
    shape = {k: getattr(config.model, k) for k in ("n_layer", "n_head", "n_embd", "block_size")}
    pretrain(replace(config, model=ModelConfig(recipe="gpt2", **shape)))
    sft(sft_config(world_dir, tmp_path / "base", tmp_path / "instruct", steps=1))
    monkeypatch.setattr("lab.forgetting.RETURN_STEPS", 1)
    gpt2 = open_pair(str(tmp_path / "base"), str(tmp_path / "instruct"), "cpu", None)
    found = weights.weights(gpt2, 3)
    assert "lm_head.weight" not in found.matrices
    assert {"wte.weight", "wpe.weight"} <= set(found.matrices)
    assert found.interpolation["1"] == behaviour.measure_point(gpt2, gpt2.instruct, 3)
    assert shift.shift(gpt2, 3)["documents"].every.kl.n > 0
    assert list(forgetting(gpt2, 3).recovery["all"]) == ["1"]


def test_an_instrument_alone_prints_and_writes_its_figures(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, run in zip(("base", "instruct"), runs, strict=True):
        for seed in "12":
            (tmp_path / seed).mkdir(exist_ok=True)
            (tmp_path / seed / name).symlink_to(run)
    both = [f"--{name}={tmp_path}/{{seed}}/{name}" for name in ("base", "instruct")]
    out = tmp_path / "shift.json"

    def call(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["shift", *both, "--seeds", "1", "2", *options])
        run_instrument("", shift.shift, questions=3)

    call("--out", str(out))
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    figure = written["result"]["chat"]["every"]["classes"]["unshifted"]
    assert figure["runs"][0] == figure["runs"][1] == pytest.approx(figure["share"])
    assert f"chat.every.classes.unshifted {figure['share']:.3f}" in " ".join(printed.split())
    assert written["settings"]["questions"] == 3
    assert [run["instruct"]["step"] for run in written["runs"]] == [6, 6]
    for wrong in (
        ["--out", str(tmp_path)],
        ["--questions", "0"],
        ["--out", f"{tmp_path}/no/x.json"],
    ):
        with pytest.raises(SystemExit):
            call(*wrong)
        assert capsys.readouterr().err.count("\n") == 1
