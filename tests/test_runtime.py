"""The machine under a run. Devices, compilation and signals are tested where they are used."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest
import torch

from data.sources.read import distinct
from runtime.cli import LONGEST, Parser, visible
from runtime.device import running, set_up
from runtime.files import check_file, new_directory, new_file
from tests.forked import Forked

FAULTS = """
import resource, sys, torch
from runtime.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def touch():  # as a step does: large blocks, more than one at a time, all freed in the end
    blocks = [torch.ones(16 << 20) for _ in range(3)]
for _ in range(5):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_freed_memory_is_not_mapped_anew(tmp_path: Path) -> None:
    (tmp_path / "faults.py").write_text(FAULTS)
    command = [sys.executable, str(tmp_path / "faults.py")]
    faults = {way: int(Forked([*command, way]).stdout.read()) for way in ("kept", "as it comes")}
    assert faults["as it comes"] > 1000
    assert faults["kept"] < 0.1 * faults["as it comes"]


@pytest.mark.parametrize(
    "words",
    [
        ["--" + "x" * 10_000],
        [f"--{'a.' * 10_000}a=1"],
        ["--\x1b[2J\n\u202e"],
        ["--n", "x" * 10_000],
        ["--n", "\udcff\x1b"],
        ["--text=--"],
    ],
    ids=["long", "deep", "controls", "long value", "not UTF-8", "no value"],
)
def test_an_error_of_argparse_is_one_short_visible_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser("command")
    parser.add_argument("--n", type=int)
    parser.add_argument("--text")
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    assert end.value.code == 2
    line = capsys.readouterr().err.partition("command: error: ")[2]
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert len(line) < LONGEST
    assert visible(line) == line


def test_a_file_to_be_written_is_a_file_or_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name in ("pipe", ".", "no/file", "/dev/null", "file/x"):
        with pytest.raises(ValueError, match="is no file that could be written"):
            check_file("--out", tmp_path / name)
    for path in (None, tmp_path / "file", tmp_path / "new"):
        check_file("--out", path)


def test_of_two_who_write_a_file_each_writes_a_whole_one(tmp_path: Path) -> None:
    with new_file(tmp_path / "a.json") as first, new_file(tmp_path / "a.json") as second:
        first.write_text("one")
        second.write_text("two")
    with pytest.raises(KeyError), new_file(tmp_path / "a.json"):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "one"  # the inner one ended first


def test_a_temporary_file_is_none_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.files.secrets.token_hex", lambda n: "guessed")
    (tmp_path / "mine").write_text("mine")
    planted = tmp_path / ".a.json.guessed.tmp"
    for link in (planted.hardlink_to, planted.symlink_to):
        link(tmp_path / "mine")
        with pytest.raises(FileExistsError), new_file(tmp_path / "a.json"):
            raise AssertionError("it was opened")
        planted.unlink()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_loop_of_links_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"), new_directory(tmp_path / "loop" / "new"):
        raise AssertionError("it was made")
    assert distinct([tmp_path / "loop"]) == [tmp_path / "loop"]


@pytest.mark.parametrize(
    ("load", "threads", "says"), [(10, 2, True), (10, 1, False), (2, 2, False)]
)
def test_more_work_than_cores_is_said_with_its_remedy(
    load: int,
    threads: int,
    says: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("runtime.device.running", lambda: load)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    set_up("cpu")
    said = capsys.readouterr()
    assert (
        ("2 cores have work for 9 already" in said.err) == says == ("OMP_NUM_THREADS=1" in said.err)
    )
    assert said.out == ""


@pytest.mark.parametrize(("text", "n"), [("0.5 0.4 0.3 7/99 123\n", 7), ("", 1), ("x y z ?", 1)])
def test_what_runs_on_a_machine_is_read_or_taken_for_this_alone(
    text: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert running() == n
