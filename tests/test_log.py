import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from training.config import RunConfig
from training.log import RunLog, is_due, read_metrics
from training.optim import OptimConfig
from training.step import StepResult

STEPS = 10
ABOUT = {"kind": "base", "environment": {"commit": "abc"}, "config": {}}


@dataclass(frozen=True)
class Config:
    run: RunConfig
    optim: OptimConfig
    data: None = None


def make_log(
    run: Path,
    row: dict[str, Any] | None = None,
    log_every: int = 1,
    peak: float | None = None,
    **options: Any,
) -> RunLog:
    run_config = RunConfig(str(run), log_every=log_every, **options)
    return RunLog(Config(run_config, OptimConfig(steps=STEPS)), row or {}, ABOUT, peak)


def result(step: int, loss: float = 2.0, replay_loss: float | None = None) -> StepResult:
    return StepResult(step, 0.1, 64, loss, 1.5, replay_loss)


def log_steps(log: RunLog, last: int) -> dict[str, Any]:
    """Logs up to step `last` as the scripts do; returns the row of the last one."""
    with log:
        log.write(log.first_step, {})
        for step in range(log.first_step + 1, last + 1):
            log.add(result(step, loss=4.0 / step))
            log.write(step, {})
        return log.row


def rows_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def test_the_loss_of_replayed_text_has_a_column_of_its_own(tmp_path: Path) -> None:
    with make_log(tmp_path) as log:
        for step, replay_loss in ((1, None), (2, 0.7)):
            log.add(result(step, replay_loss=replay_loss))
            log.write(step, {})
    plain, replayed = rows_of(tmp_path)
    assert "replay_loss" not in plain
    assert replayed["replay_loss"] == pytest.approx(0.7)
    assert replayed["loss"] == 2.0


def test_it_says_where_validation_loss_was_lowest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, Any] = {}
    for last, expected in ((3, None), (6, (4, 1.0, 1.2)), (9, (4, 1.0, 1.5)), (STEPS, None)):
        with make_log(tmp_path, row) as log:
            for step in range(log.first_step, last + 1):
                if step > log.first_step:
                    log.add(result(step))
                log.write(step, {"val_loss": 0.5 if step == STEPS else 1 + 0.1 * abs(step - 4)})
            assert log.overfitted == (expected and (expected[0], *map(pytest.approx, expected[1:])))
            row = log.row | {"val_loss": 1.0}
    said = capsys.readouterr().out.splitlines()
    assert "(lowest at step 4)" in next(line for line in said if "step 5/" in line)
    assert "lowest" not in next(line for line in said if "step 3/" in line)


@pytest.mark.parametrize("loss", ["NaN", "1e999", '"x"', "null", "[1]", "{}"])
def test_an_edited_loss_is_no_lowest_one(loss: str, tmp_path: Path) -> None:
    row = log_steps(make_log(tmp_path), 3)
    rows = f'{{"step": 1, "val_loss": {loss}}}\n{{"step": 2, "val_loss": 1.5}}\n'
    (tmp_path / "metrics.jsonl").write_text(rows)
    with make_log(tmp_path, row) as log:
        log.add(result(4))
        log.write(4, {"val_loss": 2.0})
        assert log.overfitted == (2, 1.5, 2.0)


def test_a_sample_takes_two_lines_of_a_terminal_and_is_whole_in_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "begins" + "\x1b[2J\n" * 200 + "ends"
    with make_log(tmp_path) as log:
        log.add(result(1))
        log.samples(text, ["continuation"], [[text]])
        log.write(1, {})
    line = next(line for line in capsys.readouterr().out.splitlines() if "sample:" in line)
    assert len(line) <= 160
    assert line.startswith("  sample: 'begins")
    assert line.endswith("ends'")
    (row,) = (json.loads(line) for line in (tmp_path / "samples.jsonl").open())
    assert row == {"step": 1, "columns": ["continuation"], "rows": [[text]]}


@pytest.mark.parametrize("cut", ["", '{"step": 7, "los', '{"step": 7, "loss": 1.0}'])
def test_after_a_resume_every_step_is_logged_once(tmp_path: Path, cut: str) -> None:
    saved = log_steps(make_log(tmp_path), 3)
    log_steps(make_log(tmp_path, saved), 6)  # killed at 6, its last checkpoint was at 3
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(cut)
    log_steps(make_log(tmp_path, saved), STEPS)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[2] == saved
    assert [row["tokens"] for row in rows] == [64 * step for step in range(1, STEPS + 1)]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(rows))
    assert all(line.startswith("{") for line in (tmp_path / "metrics.jsonl").open())


def test_a_run_without_a_checkpoint_begins_its_log_anew(tmp_path: Path) -> None:
    log_steps(make_log(tmp_path), 4)
    log_steps(make_log(tmp_path), 2)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]


def test_rows_are_due_at_intervals_at_the_end_and_with_an_evaluation(tmp_path: Path) -> None:
    with make_log(tmp_path, log_every=4) as log:
        for step in range(1, STEPS + 1):
            log.add(result(step))
            log.write(step, {"val_loss": 3.0} if step == 5 else {})
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [4, 5, 8, 10]
    assert [row.get("val_loss") for row in rows] == [None, 3.0, None, None]
    names = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert rows[0].keys() == names
    assert (rows[0]["loss"], rows[0]["grad_norm"], rows[0]["lr"]) == (2.0, 1.5, 0.1)


class Clock:
    """Stands in for the clock of time.perf_counter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def step(self, number: int, seconds: float) -> StepResult:
        self.now += seconds
        return result(number)


def test_speed_is_that_of_the_steps_since_the_last_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with make_log(tmp_path, log_every=2) as log:
        for step, seconds in enumerate((1.0, 3.0, 0.5, 0.5), 1):
            log.add(clock.step(step, seconds))
            clock.now += 7  # an evaluation or a save: not a step's time
            log.write(step, {})
    rows = rows_of(tmp_path)
    assert [row["tokens_per_second"] for row in rows] == [32.0, 128.0]
    assert [row["seconds"] for row in rows] == [11.0, 26.0]


def test_mfu_is_told_exactly_where_the_peak_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "mfu" not in log_steps(make_log(tmp_path), 2)
    clock = Clock(monkeypatch)
    with make_log(tmp_path, peak=512.0) as log:
        log.add(clock.step(1, 0.5))
        assert log.row["mfu"] == 0.25  # 128 of 512 a second


def test_is_due_at_every_interval_and_at_the_last_step() -> None:
    assert [step for step in range(1, 11) if is_due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 5) if is_due(step, 100, 4)] == [4]


@pytest.mark.parametrize("factor", [1.0001, 1.1, 1.5, 1.585, 2.0, 2.5, 10.0])
def test_a_logarithmic_schedule_is_the_powers_of_its_factor_rounded(factor: float) -> None:
    last, powers = 3000, set[int]()
    for k in itertools.takewhile(lambda k: factor**k < last, itertools.count()):
        powers.add(round(factor**k))
    due = {step for step in range(1, last + 1) if is_due(step, f"log:{factor}", last)}
    assert due == powers | {last}
    assert factor != 2 or due == {s for s in range(1, last + 1) if is_due(s, "log", last)}
