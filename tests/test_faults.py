"""What goes wrong around a run: planted links, two at once, no numbers, foreign files."""

from __future__ import annotations

import json
import math
import os
import pty
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train_sft
from data.prepare import prepare_text
from data.shards import load_examples
from data.tokenizer import create_tokenizer
from model.gpt import GPT, ModelConfig
from runtime.cli import LONGEST, listed, one_line_errors, shortened, visible
from runtime.device import StopOnSignal
from runtime.files import (
    check_file,
    checkpoints,
    new_directory,
    read_meta,
    sha256_file,
    write_json,
    write_meta,
)
from tests.conftest import pretrain_config
from tests.forked import Forked
from training.checkpoint import load_checkpoint, resume, save_checkpoint
from training.log import read_metrics
from training.optim import OptimConfig, build_optimizers
from training.run import find_checkpoint, tidy

ROOT = Path(__file__).parents[1]
BYTE = create_tokenizer("byte", [])
TINY = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8)


def fresh() -> tuple[GPT, list[torch.optim.Optimizer]]:
    """A model and optimizers that have state."""
    model = GPT(TINY, BYTE.n_vocab)
    optimizers = build_optimizers(model, OptimConfig(3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


def save(run: Path, model: GPT, optimizers: list[torch.optim.Optimizer], step: int = 1) -> Path:
    meta = {"kind": "base", "config": {"data": {}}, "prepared": {}, "environment": {}}
    return save_checkpoint(run, model, optimizers, BYTE, meta, step, {"step": step})


def sealed_again(folder: Path) -> Path:
    """Seals what somebody has edited, as they could."""
    meta = read_meta(folder)
    meta["files"] = {name: sha256_file(folder / name) for name in meta["files"]}
    write_meta(folder, meta)
    return folder


# ---- links that somebody put where temporary files go --------------------------------------------


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "kept").write_text("mine")
    (tmp_path / ".new.0123abcd.tmp").symlink_to(folder)
    with pytest.raises(OSError, match="0123abcd"), new_directory(tmp_path / "new"):
        raise AssertionError("it was taken for what a killed process left")
    assert [p.name for p in folder.iterdir()] == ["kept"]


def test_a_folder_of_somebody_elses_beside_a_new_one_is_left_alone(tmp_path: Path) -> None:
    for name in (".new.tmp", ".new.mine.tmp", ".newer.0123abcd.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("mine")
    with new_directory(tmp_path / "new") as made:
        (made / "file").write_text("new")
    assert len([*tmp_path.glob("*/kept")]) == 3


# ---- two at once ---------------------------------------------------------------------------------

HOLDS = """
import sys
from pathlib import Path
from runtime.files import new_directory
with new_directory(Path(sys.argv[1])) as made:
    (made / "file").write_text("first")
    print(flush=True)
    sys.stdin.read()
"""


def test_one_process_makes_a_folder_and_a_second_one_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "new")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as first:
        assert first.stdout is not None
        first.stdout.readline()
        busy = pytest.raises(ValueError, match="another process is making")
        with busy, new_directory(tmp_path / "new"):
            raise AssertionError("both make it")
        first.communicate()
    assert first.returncode == 0
    assert (tmp_path / "new" / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_what_a_killed_process_left_is_gone_from_a_new_folder(tmp_path: Path) -> None:
    left = tmp_path / ".new.0123abcd.tmp"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "file").write_text("half")
    (left / "link").symlink_to(tmp_path)
    with new_directory(tmp_path / "new") as made:
        assert not list(made.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


# ---- what a terminal would obey ------------------------------------------------------------------


def test_control_characters_are_shown_not_sent() -> None:
    assert visible("a\x1b[2Jb\r\x9b\u202ec") == r"a\x1b[2Jb\r\x9b\u202ec"
    plain = "tab\tline\nÄ é 漢 🙂 \u00a0 \u200d"
    assert visible(plain) == plain


def test_an_error_is_one_short_visible_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError("begins " + "\x1b]0;x\x07\n" * 1000 + " ends")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert line.startswith("error: begins")
    assert line.endswith(" ends")
    assert len(line) <= LONGEST


def test_a_name_that_cannot_be_written_is_no_traceback(tmp_path: Path) -> None:
    code = "from runtime.cli import one_line_errors\nwith one_line_errors(): print('\\udcff')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


# ---- numbers that are none -----------------------------------------------------------------------


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model, optimizers = fresh()
    save(tmp_path, model, optimizers)
    name, weight = next(iter(model.named_parameters()))
    kept = weight.data[0, 0].clone()
    weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match=f"step 2: {name} is not finite, so it is not saved"):
        save(tmp_path, model, optimizers, 2)
    weight.data[0, 0] = kept
    momentum = next(v for s in optimizers[-1].state.values() for v in s.values() if v.dim())
    momentum[0] = math.nan
    with pytest.raises(ValueError, match="is not finite, so it is not saved"):
        save(tmp_path, model, optimizers, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_what_is_not_finite_is_not_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, *fresh())
    weights = load_file(path / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[3] = math.nan
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is not finite"):
        load_checkpoint(sealed_again(path))


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil",))


def foreign_pickle(path: Path) -> None:
    torch.save({"optimizers": Evil()}, path)


def no_archive(path: Path) -> None:
    path.write_bytes(b"\x80\x04garbage")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_state(path: Path) -> None:
    torch.save({"optimizers": [{"state": {}, "param_groups": []}], "rng": 3}, path)


def no_table(path: Path) -> None:
    torch.save([1, 2], path)


def not_a_number(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    first = next(iter(state["optimizers"][0]["state"].values()))
    next(v for v in first.values() if v.dim()).view(-1)[0] = math.nan
    torch.save(state, path)


@pytest.mark.parametrize(
    "forged", [foreign_pickle, no_archive, empty, other_state, no_table, not_a_number]
)
def test_a_state_that_is_not_ours_is_one_line(
    forged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "run", *fresh())
    forged(path / "train_state.pt")
    with pytest.raises(ValueError, match=r"train_state\.pt is not this project's") as error:
        resume(sealed_again(path), *fresh())
    assert len(str(error.value)) < len(str(path)) + 200
    assert "\n" not in str(error.value)
    assert not Path("evil").exists()


# ---- folders and logs ----------------------------------------------------------------------------


def test_offsets_whose_differences_overflow_are_refused(tmp_path: Path) -> None:
    values = {"ids": np.zeros(9, "<u2"), "mask": np.array([0, 1] * 4 + [1], np.uint8)}
    values["offsets"] = np.array([0, 2**62, 2**63 - 1, -(2**62), 9])
    for name, array in values.items():
        np.save(tmp_path / f"qa_train_{name}.npy", array)
    with pytest.raises(ValueError, match="do not fit together"):
        load_examples(tmp_path, "train")


def test_a_pattern_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, *fresh())
    meta = read_meta(path)
    meta["tokenizer"]["pattern"] = r"(?:(a|a?)+\1)+(?!c)b$"  # a text of a's is a panic in tiktoken
    write_meta(path, meta)
    with pytest.raises(ValueError, match="its pattern is not ours"):
        load_checkpoint(path)


def test_a_copy_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    path = save(tmp_path, *fresh())
    for name in ("step_000005_backup", "step_", "step_abc", "step_٣", "step_0000000010"):
        path.rename(tmp_path / name)
        assert checkpoints(tmp_path) == []
        path = tmp_path / name


def test_a_checkpoint_without_its_meta_is_tidy_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "step_000004").mkdir()
    (tmp_path / "step_000004" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step_000004_mine").mkdir()
    (tmp_path / "step_000004.incomplete").write_text("of an earlier time")
    (tmp_path / ".step_000003.0123abcd.tmp").mkdir()
    (tmp_path / ".step_000003.0123abcd.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".config.json.0123abcd.tmp").write_text("{")
    save(tmp_path, *fresh())
    tidy(tmp_path)
    assert "step_000004.incomplete1" in capsys.readouterr().out
    names = sorted(p.name for p in tmp_path.iterdir())
    aside = ["step_000004.incomplete", "step_000004.incomplete1"]
    assert names == ["step_000001", *aside, "step_000004_mine"]
    tidy(tmp_path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("noted", [4, 10**30, "x", -1, None])
def test_a_checkpoint_under_another_ones_name_is_not_believed(noted: Any, tmp_path: Path) -> None:
    path = save(tmp_path, *fresh())
    meta = read_meta(path)
    meta["config"] = asdict(config := pretrain_config(tmp_path, tmp_path, 4))
    if noted == 4:
        path = path.rename(tmp_path / "step_000004")
    else:
        meta["metrics"]["step"] = noted
    write_meta(path, meta)
    with pytest.raises(ValueError, match=r"is of step 1; name it so|metrics is missing"):
        find_checkpoint(tmp_path, config)


def test_rows_after_a_damaged_one_are_kept_and_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step}) for step in (1, 2, 3)]
    bad = ['{"step": 2, "lo', "[1]", "[" * 100_000, '{"step": 2, "loss": NaN}']
    bad.append('{"step": 2, "loss": 1e999}')
    path.write_text("\n".join((rows[0], *bad, *rows[1:], '{"st')))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"note: {path}, line 2: damaged, left out (5 in all)"


# ---- signals -------------------------------------------------------------------------------------


def test_a_signal_that_nohup_ignores_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "module", ["train_pretrain", "train_sft", "sample", "convert", "lab.report"]
)
def test_ctrl_c_while_modules_are_imported_is_one_line(module: str) -> None:
    # As if it came while torch is imported, which takes seconds.
    code = f"""
import sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
import {module}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "interrupted\n"
    assert done.returncode in (130, -signal.SIGINT)


# ---- no memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("'x' * 2**62", "error: out of memory: an input is too large for this machine"),
        ("import numpy; numpy.ones(2**50)", "error: out of memory: Unable to allocate"),
        ("import torch; torch.ones(2**50)", "error: out of memory: [enforce fail at"),
    ],
)
def test_no_memory_is_one_line(use: str, said: str, tmp_path: Path) -> None:
    code = f"from runtime.cli import one_line_errors\nwith one_line_errors():\n  {use}"
    (tmp_path / "code.py").write_text(code)
    with Forked([sys.executable, str(tmp_path / "code.py")]) as process:
        error = process.stderr.read()
    assert process.returncode == 1
    assert error.startswith(said)
    assert error.count("\n") == 1


def test_a_list_in_a_message_is_short() -> None:
    assert listed("abc") == "a, b, c"
    assert listed(range(12), "; ") == "0; 1; 2; 3; 4; 5; 6; 7; 8; 9 and 2 more"
    assert len(listed(["x" * 1000] * 1000)) < 900
    for n in range(20, 60):
        text = shortened("0123456789" * 6, n)
        assert len(text) == n
        assert text.startswith("0123")
        assert text.endswith("6789")
    assert shortened("0123456789" * 6, 60) == "0123456789" * 6


# ---- what is left out ----------------------------------------------------------------------------


def test_empty_documents_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["To be, or not to be.", "", "That is the question.", ""]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    meta = prepare_text([tmp_path / "a.jsonl"], tmp_path / "out", "byte", 0.1, "text", 1)
    assert meta["text"]["documents"] == 2
    assert "left out: 2 empty documents" in capsys.readouterr().out


PIPES = """
import sys
from pathlib import Path
from runtime.files import read_meta, sha256_file, write_json
from training.log import read_metrics
folder = Path(sys.argv[1])
assert read_metrics(folder / "metrics.jsonl") == []
write_json(folder / "metrics.jsonl", [1])
try:
    sha256_file(folder / "weights")
except ValueError as error:
    print(error)
read_meta(folder)
"""


def test_a_pipe_where_a_file_of_a_run_is_expected_hangs_nobody(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "meta.json", "weights"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "pipes.py").write_text(PIPES)
    command = [sys.executable, str(tmp_path / "pipes.py"), str(tmp_path)]
    process = Forked(command)
    process.wait(60)
    assert "meta.json is no file" in process.stderr.read()
    assert "weights is no file" in process.stdout.read()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == [1]


def test_a_link_is_no_place_for_a_result(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "file.json")
    check_file("--out", tmp_path / "file.json")
    check_file("--out", None)
    for name in ("link.json", ".", "no/file.json"):
        with pytest.raises(ValueError, match=r"--out .* is no file that could be written"):
            check_file("--out", tmp_path / name)
    if Path("/proc").is_dir():  # a folder in which nobody can write
        with pytest.raises(ValueError, match="no file that could be written"):
            check_file("--out", Path("/proc/x"))
    assert not [*tmp_path.glob(".*.tmp")]


def test_a_terminal_that_is_closed_costs_nothing(world_dir: Path, tmp_path: Path) -> None:
    config = pretrain_config(world_dir, tmp_path / "run", steps=20_000)
    quiet = replace(config.run, save_every=10**6, eval_every=10**6, log_every=10**6)
    write_json(tmp_path / "config.json", asdict(replace(config, run=quiet)))
    command = [sys.executable, "train_pretrain.py", "--config", str(tmp_path / "config.json")]
    process, terminal = pty.fork()
    if not process:
        os.chdir(ROOT)
        os.execve(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1"})
    seen = b""
    while b"loss " not in seen:
        seen += os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    (saved,) = checkpoints(tmp_path / "run")
    assert read_meta(saved)["metrics"]["step"] > 0


def test_what_somebody_has_in_a_folder_is_not_deleted(
    runs: tuple[Path, Path], tmp_path: Path, fails: Any
) -> None:
    mine = tmp_path / "run" / "prepared_qa" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    (tmp_path / "bad.jsonl").write_text("{")
    for name in ("nowhere.jsonl", "bad.jsonl"):
        options = [f"--base={runs[0]}", f"--data.path={tmp_path / name}"]
        fails(train_sft, *options, f"--run.dir={tmp_path / 'run'}")
        assert mine.read_text() == "mine"
