"""README.md's commands, as they are printed there, in their order, on small data."""

from __future__ import annotations

import gzip
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TEXT = "The whale is a large animal of the sea, and no fish. It breathes air like a man.\n"
# What the two commands and the network would have left behind.
STAND_INS = {"quickstart/base": 0, "quickstart/instruct": 1, "gpt2-dolly": 1}
SHORT = ["--optim.steps=2", "--optim.warmup_steps=0", "--run.device=cpu", "--data.batch_size=2"]
# Of a command all of whose words these are, why it is not run here.
NOT_RUN = {
    "make quickstart": "minutes; the same scripts on small data are in test_scripts.py",
    "make test": "this",
    "pip install": "needs a network",
    "uv": "the same",
    "data.prepare fetch tinystories": "needs a network; test_fetch.py has a hub of its own",
    "data.prepare fetch fineweb-edu": "the same",
    "data.prepare fetch dolly": "the same",
    "convert.py import gpt2": "the same; test_convert.py",
    "train_sft.py configs/gpt2-finetune/sft.toml": "its base and data need a network",
    "lab.report out/smollm2": "the same; test_adapter.py",
    "lab.harness": "its tasks need a network; test_harness.py",
    "lab.sweep": "hours; test_sweep.py resolves every shipped one",
    "lab.curve": "minutes; test_curve.py",
}


def commands() -> list[list[str]]:
    """The words of each command, comments left out."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [w for w in split if w and w[0] in ("python", "pip", "make", "torchrun", "uv")]


def why_not(words: list[str]) -> str | None:
    """Why a command is not run; None if it is."""
    return next((why for few, why in NOT_RUN.items() if {*few.split()} <= {*words}), None)


@pytest.fixture(scope="module")
def folder(
    runs: tuple[Path, Path], world_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A clone in which the quickstart was made, with somebody's text and questions."""
    clone = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in ("out", ".git", ".venv"):
            (clone / path.name).symlink_to(path)
    for name, i in STAND_INS.items():
        shutil.copytree(runs[i], clone / "out" / name)
    shutil.copytree(world_dir, clone / "out/quickstart/data")
    (clone / "books").mkdir()
    (clone / "books" / "moby.txt").write_text(TEXT * 300)
    (clone / "notes.md").write_text(TEXT * 30)
    with gzip.open(clone / "corpus.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"text": TEXT * n}) + "\n" for n in range(1, 20))
    rows = [{"question": f"What is whale {n}?", "answer": "An animal."} for n in range(40)]
    (clone / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return clone


def test_every_reason_not_to_run_a_command_is_of_one() -> None:
    for few in NOT_RUN:
        assert any({*few.split()} <= {*words} for words in commands()), few


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_runs_as_printed(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (word for word in words if word.endswith((".toml", ".txt"))):
        assert (ROOT / file).exists(), file
    if reason := why_not(words):
        pytest.skip(reason)
    if words[0] == "torchrun":  # as one process; several are in test_processes.py
        words = ["python", *words[2:]]
    assert words.pop(0) == "python"
    is_module = words[0] == "-m"
    name, *options = words[is_module:]
    if name.startswith("train_"):
        options += SHORT
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *options])
    monkeypatch.setattr("builtins.input", end_of_input)
    if name == "lab.web":
        monkeypatch.setattr("uvicorn.Server.run", lambda *a, **k: None)
    run: Any = runpy.run_module if is_module else runpy.run_path
    run(name, run_name="__main__")  # an error ends it by SystemExit, which fails a test


def end_of_input(*_: Any) -> str:
    raise EOFError
