"""sample.py and lab.report: what they show, write and refuse."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sample
from data.chat import Message, raw_prompt, render_prompt
from data.fitting import recent_turns
from hf.adapter import load_models
from model.generate import Sampling, generate
from model.gpt import GPT
from tests.conftest import Fails
from training.checkpoint import load_checkpoint

Runs = tuple[Path, Path]


COLUMNS = ("base_raw", "base_chat", "instruct")


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
    assert set(result) == {"prompt", "seed", *COLUMNS}
    assert all(1 <= result[c]["tokens"] <= 5 for c in COLUMNS)
    printed = capsys.readouterr().out
    assert all(f"[{sample.COLUMNS[c]}]" in printed for c in COLUMNS)


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


def test_examples_are_given_to_the_base_and_end_at_the_next_question(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shown.json").write_text('[{"question": "Who sat?", "answer": "Ada."}]')
    asked = list[str]()

    def says(model: GPT, prompts: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        asked.extend(map(tokenizer.decode, prompts))
        return [tokenizer.encode(" Otis.\nQuestion:\nWho else?") for _ in prompts]

    tokenizer = load_checkpoint(runs[0]).tokenizer
    monkeypatch.setattr(sample, "generate", says)
    options = ("--examples", tmp_path / "shown.json", "--json", tmp_path / "out.json")
    call(sample, monkeypatch, runs, "--prompt", "Who ran?", *options)
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert set(result) == {"prompt", "seed", *COLUMNS, "base_examples"}
    found = result["base_examples"]
    assert (found["text"], found["stopped"]) == (" Otis.", True)
    assert not result["base_chat"]["stopped"]
    assert (
        "<|endoftext|>Question:\nWho sat?\nAnswer:\nAda.\nQuestion:\nWho ran?\nAnswer:\n" in asked
    )


def test_many_prompts_are_answered_at_once_and_each_as_if_alone(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = sample.columns_of(load_models({"base": str(runs[0]), "instruct": str(runs[1])}, "cpu"))
    prompts, seeds, rows = ["Who?", "Where was she born?", "x " * 300], [5, 6, 7], list[int]()
    sampling = Sampling(8, temperature=1.0, seeds=seeds)
    alone = [
        (prompt, seed, sample.ask(models, [{}], [prompt], replace(sampling, seeds=[seed]))[0])
        for prompt in prompts
        for seed in seeds
    ]

    def counted(model: GPT, prompts: list[list[int]], *rest: Any, **more: Any) -> list[list[int]]:
        rows.append(len(prompts))
        return generate(model, prompts, *rest, **more)

    monkeypatch.setattr(sample, "generate", counted)
    monkeypatch.setattr(sample, "rows_at_once", lambda tokens: tokens // 32)
    assert list(sample.answer(models, prompts, sampling)) == alone
    assert rows == [4] * 6 + [1] * 3  # of the 9 asked for, in each of three columns
    assert len({reply["instruct"].text for _, _, reply in alone[:3]}) == 3


def test_samples_of_a_prompt_have_their_seeds_in_the_json(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompt", "Who?", "--temperature", 1, "--max-new-tokens", 8, "--json")
    call(sample, monkeypatch, runs, "--samples", 3, *options, tmp_path / "all.json", "--seed", 4)
    printed = capsys.readouterr().out
    call(sample, monkeypatch, runs, *options, tmp_path / "one.json", "--seed", 5)
    three, one = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("all", "one"))
    assert three["settings"]["seeds"] == [r["seed"] for r in three["results"]] == [4, 5, 6]
    assert three["results"][1:2] == one["results"]
    assert [f"prompt: Who? (seed {seed})" in printed for seed in (4, 5, 6)] == [True] * 3


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ([], 0),
        (["--top-k", 5], 1),
        (["--top-p", 0.5], 1),
        (["--samples", 2], 1),
        (["--top-k", 5, "--temperature", 0.7], 0.7),
        (["--samples", 2, "--temperature", 0], 0),
    ],
)
def test_what_only_draws_can_heed_is_not_greedy_unless_it_is_said(
    options: list[object],
    temperature: float,
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "out.json"
    more = ("--prompt", "Who?", "--max-new-tokens", 1, "--json", file)
    call(sample, monkeypatch, runs, *more, *options)
    assert json.loads(file.read_text())["settings"]["temperature"] == temperature


def test_one_checkpoint_alone_answers_as_beside_the_other(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {}
    options = ("--prompt", "Who is it?", "--max-new-tokens", 5, "--json", tmp_path / "out.json")
    for kinds in (["base", "instruct"], ["base"], ["instruct"]):
        given = [f"--{kind}={runs[kind == 'instruct']}" for kind in kinds]
        monkeypatch.setattr(sys, "argv", ["sample", *given, *map(str, options)])
        sample.main()
        written[kinds[-1] if len(kinds) == 1 else "both"] = json.loads(options[-1].read_text())
    both = written.pop("both")
    (together,) = both["results"]
    for kind, one in written.items():
        (alone,) = one["results"]
        assert set(alone) == {"prompt", "seed", *(c for c in COLUMNS if kind in c)}
        assert alone.items() <= together.items()
        assert one["settings"].items() <= both["settings"].items()
    assert len(written["base"]["results"][0]) > 3
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--prompt", "Who?"], "--base, --instruct or both"),
        (["--base", "nowhere", "--samples", "2"], "--samples is for --prompt and --prompts"),
        (["--base", "nowhere", "--prompt", "Who?", "--samples", "0"], "--samples is 0"),
        (["--base", "nowhere", "--prompt", " "], "--prompt is empty"),
        (["--instruct", "nowhere", "--examples", "qa.json"], "--examples are for a base"),
    ],
)
def test_what_cannot_be_asked_is_one_line(options: list[str], reason: str, fails: Fails) -> None:
    assert reason in fails(sample, *options)


def test_a_prompt_that_is_not_seen_whole_is_named_once_a_column(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--samples", 3, "--max-new-tokens", 1, "--prompt", "So " + "long " * 400)
    call(sample, monkeypatch, runs, *options)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 3
    assert all("of this prompt, the model sees the last 128: " in note for note in notes)
    assert all("So long long" in note for note in notes)


def test_a_chat_on_a_terminal_recalls_what_was_typed(runs: Runs, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    ours, theirs = pty.openpty()
    command = [sys.executable, "sample.py", f"--base={runs[0]}", f"--json={tmp_path}/out.json"]
    settings = {"INPUTRC": os.devnull, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--max-new-tokens=1"],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),  # type: ignore[call-overload]
        cwd=Path(__file__).parents[1],
        env=os.environ | settings,
    )
    os.close(theirs)
    for typed in (b"Who?\n", b"\x10\n", b"\x04"):  # a line; the line before it; the end
        shown = b""
        while b"you> " not in shown:
            shown += os.read(ours, 1 << 16)
        os.write(ours, typed)
    with contextlib.suppress(OSError):  # where the other side is closed
        while os.read(ours, 1 << 16):
            pass
    os.close(ours)
    assert process.wait(60) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["prompt"] for result in results] == ["Who?", "Who?"]


def test_chat_keeps_the_context_of_earlier_turns(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\nAnd where?\n/reset\nWho?\n"))
    call(sample, monkeypatch, runs, "--chat", "--max-new-tokens", 4)
    shown = [line for line in capsys.readouterr().out.splitlines() if "[instruct]" in line]
    assert len(shown) == 3
    assert shown[0] == shown[2]


def test_a_long_conversation_forgets_whole_turns(runs: Runs) -> None:
    models = {"base": load_checkpoint(runs[0]), "instruct": load_checkpoint(runs[1])}
    history, tokenizer = sample.History(), models["base"].tokenizer
    for turn in range(12):
        sample.ask(
            sample.columns_of(models),
            [history],
            [f"What of number {turn}?"],
            Sampling(max_new_tokens=4),
        )
        messages = history["instruct"]
        assert messages[0]["role"] == "user"
        assert messages[-2]["content"] == f"What of number {turn}?"
        block = models["base"].model.config.block_size
        assert len(render_prompt(messages[:-1], tokenizer)) <= block


@pytest.mark.parametrize("max_new_tokens", [4, 20, 1000])
def test_turns_make_room_for_a_reply_and_no_more(runs: Runs, max_new_tokens: int) -> None:
    checkpoint = load_checkpoint(runs[0])
    tokenizer, block_size = checkpoint.tokenizer, checkpoint.model.config.block_size
    said = [Message(role=r, content=f"{n}?") for n in range(20) for r in ("user", "assistant")]
    said.append(Message(role="user", content="And?"))
    room = sample.room_for(checkpoint, max_new_tokens)
    assert room == block_size - min(max_new_tokens, block_size // 2)
    kept = recent_turns(render_prompt, said, tokenizer, room)
    assert kept == said[-len(kept) :]
    one_more = render_prompt(said[-len(kept) - 2 :], tokenizer)
    assert len(render_prompt(kept, tokenizer)) <= room < len(one_more)
    assert recent_turns(raw_prompt, said, tokenizer, room) == said
    assert recent_turns(render_prompt, said, tokenizer, 1) == said[-1:]  # the last in any case


def test_a_raw_prompt_is_one_running_text(runs: Runs) -> None:
    tokenizer = load_checkpoint(runs[0]).tokenizer
    said = [("user", "0?"), ("assistant", " I."), ("user", "1?")]
    ids = raw_prompt([Message(role=r, content=c) for r, c in said], tokenizer)
    assert tokenizer.decode(ids) == "<|endoftext|>0? I. 1?"


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
