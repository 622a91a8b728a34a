"""sample.py and lab.report: what they show, write and refuse."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import sample
from data.chat import Message, raw_prompt, render_prompt
from data.fitting import recent_turns
from model.generate import Sampling
from training.checkpoint import load_checkpoint

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
