"""sample.py and lab.report: what they show, write and refuse."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sample
from data.chat import render_prompt
from data.world import ATTRIBUTES, SPLITS, World, WorldConfig
from lab import knowledge, report
from model.generate import Sampling
from training.checkpoint import Checkpoint, load_checkpoint

Runs = tuple[Path, Path]


def call(module: Any, monkeypatch: pytest.MonkeyPatch, runs: Runs, *options: object) -> None:
    pair = ["--base", runs[0], "--instruct", runs[1], *options]
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, pair)])
    module.main()


def test_json_holds_three_replies_and_the_settings(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    options = ("--prompt", "Who is it?", "--max-new-tokens", 5, "--json", file)
    call(sample, monkeypatch, runs, *options)
    written = json.loads(file.read_text())
    assert written["settings"]["max_new_tokens"] == 5
    (result,) = written["results"]
    assert set(result) == {"prompt", *sample.COLUMNS}
    assert all(1 <= result[c]["tokens"] <= 5 for c in sample.COLUMNS)
    printed = capsys.readouterr().out
    assert all(f"[{title}]" in printed for title in sample.COLUMNS.values())


def test_a_prompt_is_answered_alike_alone_and_in_a_file(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Who?\n\nWhere was [bold]she[/bold] born?\n")
    options = ("--temperature", 1, "--seed", 3, "--max-new-tokens", 8, "--json")
    call(sample, monkeypatch, runs, "--prompts", prompts, *options, tmp_path / "all.json")
    call(sample, monkeypatch, runs, "--prompt", "Who?", *options, tmp_path / "one.json")
    both, one = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("all", "one"))
    assert len(both["results"]) == 2
    assert both["results"][0] == one["results"][0]


def test_chat_keeps_the_context_of_earlier_turns(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\nAnd where?\n/reset\nWho?\n"))
    call(sample, monkeypatch, runs, "--chat", "--max-new-tokens", 4)
    shown = [line for line in capsys.readouterr().out.splitlines() if "[instruct]" in line]
    assert len(shown) == 3
    assert shown[0] == shown[2]


def test_a_long_conversation_forgets_whole_turns(runs: Runs) -> None:
    pair = load_checkpoint(runs[0]), load_checkpoint(runs[1])
    conversation = sample.Conversation(*pair, Sampling(max_new_tokens=4))
    for turn in range(12):
        conversation.ask(f"What of number {turn}?")
        messages = conversation.messages["instruct"]
        assert messages[0]["role"] == "user"
        assert messages[-2]["content"] == f"What of number {turn}?"
        block = pair[0].model.config.block_size
        assert len(render_prompt(messages[:-1], pair[0].tokenizer)) <= block


def test_pairs_that_cannot_be_compared_are_refused(
    runs: Runs, world_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, instruct = runs
    for pair, reason in (
        ((instruct, base), "other kind"),
        ((base, base), "other kind"),
        ((world_dir, instruct), "not a checkpoint"),
        ((base / "nowhere", instruct), "not found"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(sample, monkeypatch, pair, "--prompt", "Who?")
        error = capsys.readouterr().err
        assert stop.value.code == 1
        assert reason in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value"), [("--temperature", -1), ("--top-p", 0), ("--max-new-tokens", 0)]
)
def test_settings_out_of_range_are_refused(
    option: str, value: int, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(sample, monkeypatch, runs, "--prompt", "Who?", option, value)
    assert stop.value.code == 1


# ---- lab -------------------------------------------------------------------------------------


def world_of(checkpoint: Checkpoint) -> World:
    return World(WorldConfig(**checkpoint.meta["prepared"]["world"]))


class Scripted:
    """Stands in for `lab.knowledge.ask`: replies that are known by construction."""

    def __init__(self, reply: Any, stop: bool) -> None:
        self.reply, self.stop = reply, stop

    def __call__(self, checkpoint: Any, prompts: list[list[int]], max_new: int) -> list[list[int]]:
        tokenizer = checkpoint.tokenizer
        texts = [self.reply(tokenizer.decode(prompt)) for prompt in prompts]
        end = [tokenizer.end_of_turn] if self.stop else []
        return [tokenizer.encode(text) + end for text in texts]


def test_a_model_that_knows_everything_scores_one_and_must_stop(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct = load_checkpoint(runs[0]), load_checkpoint(runs[1])
    world = report.world_of(base, instruct)

    def oracle(prompt: str) -> str:
        person = next(p for p in world.people if p.name in prompt)
        if "<|user|>" not in prompt:
            wording = prompt.removeprefix("<|endoftext|>")
            sentences = {
                s.format(S=person.name, V=person.facts[a.name]): person.facts[a.name]
                for a in ATTRIBUTES
                for s in a.sentences
            }
            return next(f" {v}. And so on" for s, v in sentences.items() if s == f"{wording} {v}.")
        last = prompt.rsplit("<|user|>", 1)[1]
        asked = next(
            a
            for a in ATTRIBUTES
            for q in (*a.questions, *a.unused_questions, *a.follow_ups)
            if last.startswith(q.format(name=person.name, they=person.pronoun) + "<|end|>")
        )
        return asked.reply.format(name=person.name, V=person.facts[asked.name])

    monkeypatch.setattr(knowledge, "ask", Scripted(oracle, stop=True))
    cells = knowledge.measure(instruct, world, 30)
    assert cells.cloze == cells.answers == cells.mentions == dict.fromkeys(SPLITS, 1.0)
    assert cells.rephrased == cells.answers
    assert (cells.stops, cells.follow_up) == (1.0, 1.0)

    monkeypatch.setattr(knowledge, "ask", Scripted(oracle, stop=False))
    cells = knowledge.measure(instruct, world, 30)
    assert cells.mentions == dict.fromkeys(SPLITS, 1.0)
    assert cells.answers == dict.fromkeys(SPLITS, 0.0)
    assert (cells.stops, cells.follow_up) == (0.0, 0.0)


def test_naming_every_value_is_no_answer(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = " ".join(v for a in ATTRIBUTES for v in a.values)
    monkeypatch.setattr(knowledge, "ask", Scripted(lambda prompt: everything, stop=True))
    instruct = load_checkpoint(runs[1])
    cells = knowledge.measure(instruct, world_of(instruct), 30)
    assert cells.answers == dict.fromkeys(SPLITS, 0.0)
    assert cells.mentions == dict.fromkeys(SPLITS, 1.0)


def test_batched_questions_get_the_replies_they_get_alone(runs: Runs) -> None:
    instruct = load_checkpoint(runs[1])
    world = world_of(instruct)
    prompts = [instruct.tokenizer.encode(p.name * (1 + i % 3)) for i, p in enumerate(world.people)]
    together = knowledge.ask(instruct, prompts, 8)
    assert together == [knowledge.ask(instruct, [prompt], 8)[0] for prompt in prompts]


def test_the_report_is_made_once_and_then_shown_again(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--out", tmp_path, "--questions", 20)
    call(report, monkeypatch, runs, *options)
    first = capsys.readouterr().out
    made = json.loads((tmp_path / "report.json").read_text())
    for model in ("base", "instruct"):
        assert set(made[model]["cloze"]) == set(made[model]["answers"]) == set(SPLITS)
        assert {"stops", "follow_up"} <= set(made[model])
        assert made[model]["n"] == 20
    assert set(made["seconds"]) == {"prepare", "pretrain", "sft", "compare"}
    assert made["runs"]["base"]["config"]["run"]["seed"] == 1
    monkeypatch.setattr(report, "make_report", None)  # would fail if it were called
    call(report, monkeypatch, runs, *options)
    assert capsys.readouterr().out == first
    assert "follow-up" in first


def test_a_report_without_a_world_is_refused(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(report, monkeypatch, runs, "--out", tmp_path, "--questions", 100_000)
    assert "fewer than --questions" in capsys.readouterr().err


def test_checkpoints_whose_truth_is_not_known_are_refused(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct = load_checkpoint(runs[0]), load_checkpoint(runs[1])
    assert report.world_of(base, instruct).people == world_of(base).people
    other = load_checkpoint(min(runs[0].glob("step_*")))
    with pytest.raises(ValueError, match="was not tuned from"):
        report.world_of(other, instruct)
    changed = replace(ATTRIBUTES[0], values=(*ATTRIBUTES[0].values, "2001"))
    monkeypatch.setattr("data.world.ATTRIBUTES", (changed, *ATTRIBUTES[1:]))
    with pytest.raises(ValueError, match=r"data/world\.py has changed"):
        report.world_of(base, instruct)
    monkeypatch.undo()
    del base.meta["prepared"]["world"]
    with pytest.raises(ValueError, match="not both trained on one world"):
        report.world_of(base, instruct)
