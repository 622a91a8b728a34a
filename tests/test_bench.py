"""The benches: that each runs, in which order, and what the tables say. No peer is needed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import loss, machine, peers, prepare, rounds, sample, sft, table, train

BENCHES = {"train": train, "loss": loss, "sft": sft, "sample": sample, "prepare": prepare}
FIGURES = {
    "train": {"tokens_per_second", "start_seconds", "peak_memory"},
    "loss": {"total_seconds", "val_loss", "seconds_to_loss", "tokens_to_loss"},
    "sft": {"useful_tokens_per_second", "useful_share", "peak_memory"},
    "sample": {"tokens_per_second_one", "first_token_seconds_one", "tokens_per_second_ragged"},
    "prepare": {"megabytes_per_second_core", "megabytes_per_second_machine", "peak_memory"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One result file of each bench, by its name."""
    out = tmp_path_factory.mktemp("results")
    found = rounds.look("cpu", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(rounds, "look", lambda device, quick: found)  # once is enough

        def run(what: str) -> None:
            more = ["--target", "1000"] if what == "loss" else []
            BENCHES[what].main(["--quick", "--device", "cpu", "--out", str(out), *more])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, BENCHES))
    return {(r := json.loads(f.read_text()))["what"]: r for f in out.glob("*-cpu-quick*.json")}


@pytest.mark.parametrize("what", BENCHES)
def test_each_runs_alone_and_says_what_it_measured(what: str, results: dict[str, Any]) -> None:
    result = results[what]
    keys = {"what", "case", "date", "command", "machine", "peers", "settings", "rows"}
    assert set(result) == keys
    assert {"commit", "torch", "python", "device", "cpu", "cores"} <= set(result["machine"])
    assert min(result["machine"][k] for k in ("matrix_flops", "copy_bytes_per_second")) > 0
    assert result["command"].startswith(f"python -m bench.{what} --quick")
    assert result["peers"] == {}
    for row in result["rows"]:
        assert "error" not in row
        assert FIGURES[what] <= set(row["figures"])
        assert all(v is not None and v > 0 for v in row["runs"][0].values())


def test_results_and_tables_name_no_folder_of_this_machine(
    results: dict[str, Any], tmp_path: Path
) -> None:
    assert str(tmp_path.parent) not in json.dumps(results)
    assert rounds.without_folders("No such file: '/home/me/x y.py' and a/b") == (
        "No such file: 'x y.py' and a/b"
    )


def test_turns_are_a_b_b_a() -> None:
    ran: list[str] = []

    def worker(name: str, i: int) -> rounds.Figures:
        ran.append(name)
        return {"speed": float(i + 1)}

    names = ("ours", "nanoGPT", "nanochat")
    rows = rounds.interleave({name: partial(worker, name) for name in names}, 4)
    assert ran == [*names, *names[::-1], *names, *names[::-1]]
    assert [row["runs"] for row in rows] == [[{"speed": v} for v in (1.0, 2.0, 3.0, 4.0)]] * 3


def test_a_failing_peer_is_named_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(i: int) -> rounds.Figures:
        code = "import sys; sys.exit('no module named /home/me/tiktoken')"
        return rounds.start(["-c", code]).last_json()

    ours, peer = rounds.interleave({"ours": lambda i: {"speed": 2.0}, "nanochat": broken}, 2)
    assert peer == {
        "name": "nanochat",
        "runs": [None, None],
        "error": "no module named tiktoken",
    }
    assert ours["runs"] == [{"speed": 2.0}] * 2
    assert capsys.readouterr().err.count("nanochat: error: no module named") == 1
    with pytest.raises(ValueError, match="nothing of ours ran"):
        rounds.interleave({"ours": broken}, 1)


def test_a_loss_counts_from_the_first_evaluation_at_or_below_it() -> None:
    rows: list[rounds.Row] = [{"name": "ours, gpt2", "runs": [{}, {}]}]
    curves: dict[tuple[str, int], loss.Curve] = {
        ("ours, gpt2", 0): [(1.0, 10, 3.0), (2.0, 20, 2.0), (3.0, 30, 1.5)],
        ("ours, gpt2", 1): [(1.0, 10, 3.0)],
    }
    loss.settle(rows, curves, 2.0)
    assert rows[0]["runs"][0] == {"seconds_to_loss": 2.0, "tokens_to_loss": 20}
    assert rows[0]["runs"][1] == {"seconds_to_loss": None, "tokens_to_loss": None}
    assert rows[0]["note"] == "1 of 2 runs reached the loss"


def hand_made() -> dict[str, Any]:
    def runs(*speeds: float | None) -> list[dict[str, float] | None]:
        return [None if v is None else {"tokens_per_second": v, "mfu": v / 1e4} for v in speeds]

    return {
        "what": "train",
        "case": "4x128",
        "date": "2026-01-02",
        "command": "python -m bench.train",
        "machine": {
            **{"type": "cpu", "device": "x86_64", "cpu": "A CPU", "cores": 2, "threads": 1},
            **{"commit": "abc", "torch": "2", "python": "3", "matrix_dtype": "float32"},
            **{"matrix_flops": 2e9, "copy_bytes_per_second": 3e9},
        },
        "peers": {"nanoGPT": "def"},
        "settings": {},
        "rows": [
            {"name": "ours", "runs": runs(100, 400, 200, 300)},
            {"name": "nanoGPT", "runs": runs(50, 400, 100, None)},
            {"name": "nanochat", "runs": runs(None, None), "error": "a | b"},
        ],
    }


def test_tables_are_made_of_the_result_files_alone() -> None:
    result = hand_made()
    text = table.render([result])
    # Ratios within a pass are .5, 1 and .5.
    assert "| ours | 250 (100..400) | 2.5% (1.0%..4.0%) |" in text
    assert "| nanoGPT | 100 (50.0..400)<br>x0.50 (0.50..1.00) | 1.0% (0.5%..4.0%) |" in text
    assert "| nanochat | a / b |" in text
    assert "2026-01-02, A CPU, 1 of 2 CPU cores; torch 2, Python 3, ours abc, nanoGPT def" in text
    assert table.render([result, {**hand_made(), "case": "0"}]).index("Training: 0") == 4
    assert text == table.render([json.loads(json.dumps(result))])


def test_the_page_keeps_its_prose(tmp_path: Path) -> None:
    page, results = tmp_path / "speed.md", tmp_path / "results"
    results.mkdir()
    (results / "train-cpu-4x128.json").write_text(json.dumps(hand_made()))
    command = ["--results", str(results), "--page", str(page)]
    table.main(command)
    page.write_text(f"# Speed\n\n{page.read_text()}\nWritten by hand.\n")
    once = page.read_text()
    table.main(command)
    assert page.read_text() == once
    assert once.startswith("# Speed")
    assert "x0.50" in once


@pytest.mark.parametrize(
    ("bench", "options", "said"),
    [
        (train, ["--nanogpt", "{tmp}"], "is no checkout of nanoGPT: no train.py there"),
        (sample, ["--nanochat", "{tmp}"], "is no checkout of nanochat: no nanochat/gpt.py there"),
        (prepare, ["--text", "{tmp}/none.txt"], "none.txt is no file"),
        (sft, ["--rounds", "0"], "--rounds is 0"),
    ],
)
def test_a_mistake_is_one_line(
    bench: Any, options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        bench.main([option.format(tmp=tmp_path) for option in options])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_checkout_is_copied_without_its_data(tmp_path: Path) -> None:
    checkout = tmp_path / "nanoGPT"
    for file in ("train.py", "model.py", "configurator.py", "data/x/prepare.py", "data/x/val.bin"):
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).write_text(file)
    copy = peers.copy_tree("nanoGPT", checkout, tmp_path / "copy")
    assert (copy / "data/x/prepare.py").read_text() == "data/x/prepare.py"
    assert not (copy / "data/x/val.bin").exists()
    assert peers.commit(tmp_path) == "unknown"


def test_limits_are_of_the_right_size() -> None:
    found = machine.limits(torch.device("cpu"), quick=True)
    assert 1e8 < found["matrix_flops"] < 1e14
    assert 1e7 < found["copy_bytes_per_second"] < 1e13
