"""Hostile and mistaken command lines of every command: each does its work, or says in one line why
not and leaves nothing behind.

make fuzz                    10,000 of them; FUZZ=n: that many, FUZZ_SEED=n: others
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import convert
from data.sources import download
from runtime.cli import LONGEST, run_cli, visible
from runtime.files import resolve_checkpoint
from tests.test_fuzz import CASES, NASTY, SEED, TooSlowError, damaged
from tests.test_sweep import GRID, SPEC
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain
from train_sft import SFTConfig
from train_sft import main as sft

ROOT = Path(__file__).parents[1]
CUT = "an option without its value"
SECONDS = 30  # that one may take: a report takes ten where cores are busy
NOT_UTF8, LONG = os.fsdecode(b"\xff\xfe"), "x" * 10_000
TEXTS = [v if isinstance(v, str) else json.dumps(v) for v in NASTY if v != "\ud800"]
TEXTS += [NOT_UTF8, LONG, "-", "--", "a\nb", "--out", "{seed}", "/" * 5000, "é漢", "%s%n"]
# What options take, by kind: values that no command can use, and values that some can.
KINDS: dict[str, tuple[list[str], list[str]]] = {
    "int": (
        [*("nan", "inf", "1e5", "0.5", "", "x", "0xx", "1" * 5000, "\x1b[2J", NOT_UTF8, LONG)],
        ["0", "-1", str(10**14), str(10**30), "2", "٣", "1_0", "0x10", "--seed"],
    ),
    "steps": (["nan", "-1", "1e5", "", "x", "1" * 5000, LONG], ["0", "2"]),
    "float": (
        ["nan", "", "x", "0x1p3", "\x1b[2J", "1,5", NOT_UTF8, LONG],
        ["inf", "-inf", "1e999", "0", "-1", "1e-45", "1e308", str(10**14), str(10**30), "1"],
    ),
    "device": (
        ["meta", "cuda:99", "", LONG, "\x1b[2J", "cpu:x", "cpu:-2", NOT_UTF8, "fpga", "hip", "xla"],
        ["auto", "cpu:0", "cpu:7"],
    ),
    "in": (
        [
            *("nothing", "no/thing", "~nobody/x", "/proc/self/mem", "x" * 300, NOT_UTF8),
            *("", "a/" * 3000, "\x1b]0;x\x07", "../in/loop", "file/x", "\udcff/x"),
        ],
        [
            *(".", "..", "full", "../in/text.txt", "../in/qa.jsonl", "../in/data", "../in/hf"),
            *("../in/base", "../in/instruct", "../in/cut", "../in/broken", "../in/spoilt.jsonl"),
            *("/dev/null", "../in/empty.txt", "locked"),
        ],
    ),
    "folder": (
        [
            "/proc/nothing",
            "file",
            "pipe",
            "full",
            "x" * 300,
            "file/x",
            "/dev/null/x",
            "../in/loop",
            "",
        ],
        [NOT_UTF8, "\u202egnp", "\x1b[2J", "a/b/c", "é"],
    ),
    "place": (
        ["/proc/nothing", "file", "pipe", "x" * 300, "file/x", "/dev/null/x", "../in/loop", ""],
        [NOT_UTF8, "\u202egnp", "\x1b[2J", "a/b/c", "é", "full"],
    ),
    "file": (
        ["", ".", "/proc/x", "pipe", "full", "x" * 300, "file/x", "no/x", "/dev/null/x"],
        [NOT_UTF8, "\u202egnp", "\x1b[2J", "file", "é.json", "é.png", "link"],
    ),
    "text": ([], TEXTS),
    "never": (TEXTS, []),
}


@dataclass(frozen=True)
class Command:
    """A command line that works: its options with their values ("" names a positional one), what
    all of its options take, and the one that names what it makes.
    """

    module: str
    options: dict[str, str]
    kinds: dict[str, str]
    makes: str = "nothing"
    cheap: bool = True  # so that it is run as it stands, too


PAIR = {"--base": "../in/base", "--instruct": "../in/instruct"}
PAIR_KINDS = {"--base": "in", "--instruct": "in", "--device": "device"}
ASKED = {**PAIR, "--questions": "2", "--device": "cpu"}
ASKED_KINDS = {**PAIR_KINDS, "--questions": "int", "--qa": "in", "--seeds": "never"}
OUT = {"--out": "folder", "--val-fraction": "float", "--seed": "int", "--tokenizer": "never"}
RUN = {
    **dict.fromkeys(("--config", "--data", "--optim", "--run", "--data.path"), "in"),
    **{"--run.dir": "folder", "--run.device": "device", "--run.wandb": "never"},
    **dict.fromkeys(("--optim.lr", "--optim.grad_clip", "--optim.weight_decay"), "float"),
    **dict.fromkeys(("--data.batch_size", "--run.seed", "--run.save_every"), "int"),
    **dict.fromkeys(("--data.micro_batch_size", "--run.loss_chunk"), "int"),
    "--optim.steps": "steps",  # of very many there is nothing to say
    **dict.fromkeys(
        ("--verify", "--optim.optimizer", "--run.compile", "--optim.schedule"), "never"
    ),
}
SHORT = {"--optim.warmup_steps": "0", "--data.batch_size": "2"}
SHORT |= {"--run.device": "cpu", "--run.dir": "out"}
COMMANDS = [
    Command(
        "data.prepare world",
        {"--people": "16", "--unseen": "12", "--bios": "1", "--tokenizer": "byte", "--out": "out"},
        {**dict.fromkeys(("--people", "--unseen", "--bios", "--fewest"), "int"), **OUT},
        "--out",
    ),
    Command(
        "data.prepare text",
        {"": "../in/text.txt", "--tokenizer": "bpe:300", "--out": "out"},
        {"": "in", "--field": "text", **OUT},
        "--out",
    ),
    Command(
        "data.prepare qa",
        {"": "../in/qa.jsonl", "--tokenizer-of": "../in/data", "--out": "out"},
        {"": "in", "--tokenizer-of": "in", "--inspect": "int", **OUT},
        "--out",
    ),
    Command(
        "data.prepare fetch",
        {"": "dolly", "--out": "out", "--tokenizer-of": "../in/base"},
        {"": "never", "--downloads": "folder", "--files": "int", "--tokenizer-of": "in", **OUT},
        cheap=False,  # it always fails: there is no network
    ),
    Command(
        "train_pretrain --optim.steps=2",
        {**SHORT, "--data.path": "../in/data", "--model.n_layer": "1", "--model.n_embd": "16"}
        | {"--model.recipe": "modern", "--model.n_head": "1", "--model.block_size": "32"},
        {**RUN, "--model": "in", "--model.recipe": "never", "--init_from": "in"}
        | dict.fromkeys(("--model.n_layer", "--model.n_embd", "--model.block_size"), "int"),
        "--run.dir",
    ),
    Command(
        "train_sft --optim.steps=2",
        {**SHORT, "--base": "../in/base", "--data.path": "../in/qa.jsonl"},
        {**RUN, "--base": "in", "--data.replay": "float", "--data.examples": "int"}
        | {"--data.block_size": "int", "--data.layout": "never"},
        "--run.dir",
    ),
    Command(
        "sample",
        {**PAIR, "--prompt": "Who?", "--max-new-tokens": "3", "--json": "out.json"},
        {**PAIR_KINDS, "--prompt": "text", "--prompts": "in", "--json": "file", "--top-k": "int"}
        | {"--temperature": "float", "--top-p": "float", "--seed": "int"}
        | {"--max-new-tokens": "int", "--samples": "int"},
        "--json",
    ),
    Command("convert import", {"": "../in/hf", " ": "out"}, {"": "in", " ": "folder"}, " "),
    Command("convert export", {"": "../in/instruct", " ": "out"}, {"": "in", " ": "folder"}, " "),
    *(
        Command(
            f"lab.{path.stem}",
            {**ASKED, "--out": "out.json"},
            {**ASKED_KINDS, "--out": "file"},
            "--out",
            cheap=path.stem == "forms",
        )
        for path in sorted((ROOT / "lab").glob("*.py"))
        if "run_instrument(__doc__" in path.read_text(encoding="utf-8")
    ),
    Command(
        "lab.facts",
        {**ASKED, "--facts": "../in/facts.jsonl", "--out": "out.json"},
        {**PAIR_KINDS, "--questions": "int", "--facts": "in", "--out": "file", "--seeds": "never"},
        "--out",
        cheap=False,
    ),
    Command(
        "lab.report",
        {**ASKED, "--out": "out", "--svg": "out.svg"},
        {**ASKED_KINDS, "--out": "place", "--svg": "file"},
        "--out",
        cheap=False,
    ),
    Command(
        "lab.sweep",
        {"": "../in/sweep.toml", "--out": "out", "--device": "cpu"},
        {"": "in", "--out": "place", "--device": "device"},
        "--out",
        cheap=False,
    ),
    Command(
        "lab.curve forms",
        {"--run": "../in/base", "--questions": "2", "--device": "cpu", "--out": "out"},
        {"--run": "in", "--tune": "in", "--questions": "int", "--qa": "in", "--seeds": "never"}
        | {"--figures": "never", "--steps": "int", "--device": "device", "--out": "place"},
        "--out",
        cheap=False,
    ),
    Command("lab.findings nothing", {}, {"": "never", "--device": "device"}, cheap=False),
    Command(
        "lab.plot",
        {"": "../in/base", " ": "../in/instruct", "--out": "out.png"},
        {"": "in", " ": "in", "--out": "file", "--against": "never", "--smooth": "int"},
        "--out",
    ),
    Command("lab.web", {**PAIR, "--port": "0"}, {**PAIR_KINDS, "--host": "never", "--port": "int"}),
    Command(
        "lab.harness --limit 0",  # so that the harness is not asked: its list of tasks takes long
        {"": "../in/instruct", "--tasks": "nothing"},
        {"": "in", "--tasks": "never", "--num-fewshot": "int", "--out": "file"}
        | {"--include-path": "in", "--batch-size": "int", "--device": "device"},
        cheap=False,
    ),
    Command(
        "bench table",
        {"--out": "../in/results", "--page": "page.md"},
        {"--out": "in", "--page": "in"},
        cheap=False,
    ),
    Command(
        "bench train --rounds 0",
        {},
        {"--case": "never", "--text": "in", "--device": "device"},
        cheap=False,
    ),
]


def wrong(command: Command, rng: random.Random) -> tuple[list[str], bool]:
    """The words of a command line, mostly with one or two mistakes; and whether it must fail."""
    pairs = [(name, value, False) for name, value in command.options.items()]  # is it bad?
    ways = ("value", "value", "value", "value", "add", "leave out", "cut", "twice")
    for _ in range(rng.choice((0, 1, 1, 1, 1, 2)) if command.cheap else 1):
        what = rng.choice(ways if command.cheap else ways[:5])
        if what == "add":
            name = rng.choice(
                ("--nothing", f"--{LONG}", "--\x1b[2J", f"--{'a.' * 10_000}a", "--a.b")
            )
            pairs.append((name, rng.choice(TEXTS), True))
        elif what == "leave out":
            pairs.pop(rng.randrange(len(pairs)))
        elif what == "cut":
            pairs.append((rng.choice([*command.kinds]), CUT, False))
        elif what == "twice":
            pairs.append(rng.choice(pairs))
        else:
            name = rng.choice([*command.kinds])
            bad, maybe = KINDS[command.kinds[name]]
            is_bad = not maybe or (bool(bad) and (not command.cheap or rng.random() < 0.6))
            value = rng.choice(bad if is_bad else maybe)
            pairs = [pair for pair in pairs if pair[0] != name] + [(name, value, is_bad)]
    words = list[str]()
    for name, value, _ in pairs:
        if value is CUT or not name.strip():
            words.append(name if value is CUT else value)
        elif command.module.startswith("train_") or rng.random() < 0.5:
            words.append(f"{name}={value}")
        else:
            words += [name, value]
    return words, any(is_bad for *_, is_bad in pairs)


@pytest.fixture(scope="module")
def given(
    runs: tuple[Path, Path], world_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder beside an empty one, with good and bad inputs of every kind."""
    home = tmp_path_factory.mktemp("commands")
    there = home / "in"
    shutil.copytree(runs[0], there / "base")
    shutil.copytree(runs[1], there / "instruct")
    shutil.copytree(world_dir, there / "data")
    cut = shutil.copytree(resolve_checkpoint(runs[1]), there / "cut")
    (cut / "meta.json").unlink()
    broken = shutil.copytree(resolve_checkpoint(runs[1]), there / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(damaged(data, random.Random(1)))
    convert.export_checkpoint(str(runs[1]), there / "hf")
    (there / "text.txt").write_text("A whale is an animal of the sea.\n\nIt is no fish.\n\n" * 50)
    rows = [{"question": f"What is whale {n}?", "answer": "An animal."} for n in range(40)]
    (there / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fact = {"relation": "sea", "cloze": "{subject} is a", "question": "What is {subject}?"}
    facts = [fact | {"subject": f"A{n}", "value": "whale" if n else "fish"} for n in range(9)]
    (there / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts))
    (there / "spoilt.jsonl").write_text('{"question": "Why?", "answer": 3}\n{"a"')
    (there / "empty.txt").write_text("")
    (there / "sweep.toml").write_text(SPEC + GRID)
    (there / "loop").symlink_to("loop")
    (there / "results").mkdir()
    return home


def prepared(home: Path) -> Path:
    """The folder that a command is run in, anew."""
    folder = home / "here"
    if (folder / "locked").exists():
        (folder / "locked").chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "full").mkdir(parents=True)
    (folder / "full" / "mine").write_text("mine")
    for name in ("file", "page.md"):
        (folder / name).write_text("mine")
    (folder / "link").symlink_to("file")
    (folder / "locked").mkdir(mode=0)
    os.mkfifo(folder / "pipe")
    return folder


def state(folder: Path) -> dict[Path, Any]:
    """What lies in a folder, but for locks and what is ours to leave: see `find_checkpoint`."""
    found = [p for p in folder.rglob("*") if not {".hashed.json", "prepared_qa"} & {*p.parts}]
    files = {
        p: p.lstat() for p in found if p.name != ".lock" and (p.is_symlink() or not p.is_dir())
    }
    return {p: (s.st_mode, s.st_size, s.st_mtime_ns) for p, s in files.items()}


def start(module: str) -> None:
    """Runs a command as `python` does."""
    if module == "train_pretrain":  # not anew: a command line of a new class takes long to make
        run_cli(PretrainConfig, pretrain, "")
    elif module == "train_sft":
        run_cli(SFTConfig, sft, "")
    else:
        runpy.run_module(module, run_name="__main__")


def end_of_input(*_: Any) -> str:
    raise EOFError


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.module)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of runpy: a module is there already
def test_command_lines(
    command: Command, given: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    monkeypatch.setattr(download, "BACKOFF", 0)
    monkeypatch.setattr("builtins.input", end_of_input)
    monkeypatch.setattr("uvicorn.Server.run", lambda *a, **k: None)
    for name in ("HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    module, *words = command.module.split()
    for i in range(max(1, CASES // len(COMMANDS))):
        rng = random.Random(f"{command.module} {SEED} {i}")
        folder = prepared(given)
        monkeypatch.chdir(folder)
        given_words, must_fail = wrong(command, rng)
        monkeypatch.setattr(sys, "argv", [module, *words, *given_words])
        shown, was, code = f"{[w[:80] for w in sys.argv]}", state(given), 0
        signal.alarm(SECONDS)
        try:
            start(module)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error!s:.300} of {shown}") from error
        finally:
            signal.alarm(0)
        out, err = capsys.readouterr()
        assert visible(out) == out, f"control characters on standard output of {shown}"
        if code == 0:
            assert not must_fail, f"silent success of {shown}"
            if command.makes in " ".join(["", *given_words, ""]):
                assert state(given) != was, f"nothing made by {shown}"
            continue
        assert code in (1, 2), f"{code} of {shown}"
        *usage, line = err.removesuffix("\n").split("\n")
        usage = [u for u in usage if not u.startswith(("usage:", "  ", "note: "))]
        assert not usage, f"more than a line of {shown}: {usage}"
        assert "error: " in line, shown
        assert len(line) <= LONGEST, f"{len(line)} characters of {shown}"
        assert visible(line) == line, f"control characters of {shown}"
        left = {p for p, s in state(given).items() if was.get(p) != s} | {*was} - {*state(given)}
        # A run that fails in a step keeps what it has logged.
        logged = "error: step " in line
        assert not left or logged, f"left by {shown}: {line}: {sorted(map(str, left))[:5]}"
    signal.signal(signal.SIGALRM, before)
