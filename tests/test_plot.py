"""lab.plot: what is drawn is what was logged, whatever state a run is in."""

from __future__ import annotations

import json
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab import plot
from lab.figures import svg
from runtime.cli import visible
from tests.test_log import log_steps, make_log
from training.log import read_metrics

Runs = tuple[Path, Path]


def row(step: int, **values: Any) -> dict[str, Any]:
    speed = {"tokens_per_second": 9000.0 + step, "seconds": step / 2}
    logged = {"loss": 4 / step, "lr": 0.1, "grad_norm": 1.5 / step**3}
    return {"step": step, "tokens": 64 * step, **logged, **speed, **values}


def make_run(run: Path, rows: list[dict[str, Any]], end: str = "") -> Path:
    run.mkdir(parents=True)
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (run / "metrics.jsonl").write_text(lines + end, encoding="utf-8")
    return run


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, arguments)])
    plot.main()


def drawn(axes: Axes) -> list[list[tuple[float, float]]]:
    """The points of each line that has any."""
    lines = [np.column_stack(line.get_data()).tolist() for line in axes.lines]
    return [[(x, y) for x, y in line] for line in lines if line]


def logged(rows: list[dict[str, Any]], key: str, against: str) -> list[tuple[float, float]]:
    return [(r[against], r[key]) for r in rows if key in r]


@pytest.mark.parametrize("against", plot.AXES)
def test_every_line_holds_what_both_stages_logged(runs: Runs, against: str) -> None:
    rows = {run.name: plot.read_run(run, against) for run in runs}
    base, instruct = rows.values()
    figure = plot.plot(rows, against)
    assert len(figure.axes) == 6  # no MFU on a CPU; bits per byte of one, stop rate of the other
    for axes, keys in zip(figure.axes, [k for k in plot.PANELS if k != ("mfu",)], strict=True):
        expected = [logged(r, key, against) for key in keys for r in (base, instruct)]
        assert drawn(axes) == [line for line in expected if line]
        assert expected[0] or expected[1]
    assert base == read_metrics(runs[0] / "metrics.jsonl")
    assert figure.axes[-1].get_xlabel() == plot.AXES[against]


def test_only_what_is_noisy_is_smoothed_and_stays_to_be_seen() -> None:
    rows = [row(step, val_loss=1.0 * step) for step in range(1, 10)]
    figure = plot.plot({"a": rows}, smooth=3)
    loss, speed = figure.axes[0], figure.axes[3]
    assert [len(axes.lines) for axes in figure.axes] == [3, 1, 2, 2]
    assert drawn(loss)[0] == logged(rows, "loss", "step")
    assert drawn(loss)[2] == logged(rows, "val_loss", "step")
    means = [sum(r["loss"] for r in rows[i - 1 : i + 2]) / 3 for i in range(1, 8)]
    assert [y for _, y in drawn(loss)[1][1:-1]] == pytest.approx(means)
    assert drawn(loss)[1][0] == drawn(loss)[0][0]
    assert drawn(loss)[1][-1] == drawn(loss)[0][-1]
    assert drawn(speed)[1] == drawn(speed)[0]  # a slope stays where it is


def test_an_axis_is_logarithmic_where_that_helps_and_says_so() -> None:
    def scales(**values: float) -> list[str]:
        rows = [row(1), row(2), row(3, **values)]
        axes = plot.plot({"a": rows}).axes
        for a in axes:
            assert ("log" in a.get_ylabel().split(", ")) == (a.get_yscale() == "log")
        return [a.get_yscale() for a in axes]

    assert scales() == ["linear", "linear", "log", "linear"]
    assert scales(grad_norm=1.0) == ["linear"] * 4
    assert scales(grad_norm=0.0) == ["linear"] * 4
    assert scales(val_loss=0.01)[0] == "log"


@pytest.mark.parametrize("largest", [21, 50, 150, 1e3, 1e5, 1e8, 1e14])
def test_a_logarithmic_axis_has_a_few_numbers(largest: float) -> None:
    with mpl.rc_context(plot.PAPER):
        figure = plot.plot({"a": [row(n + 1, grad_norm=largest ** (n / 9)) for n in range(10)]})
        figure.draw_without_rendering()
    axes = figure.axes[2]
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log"
    assert 2 <= sum(low <= tick <= high for tick in axes.yaxis.get_majorticklocs()) <= 6


def test_a_run_of_one_row_is_to_be_seen() -> None:
    axes_of = plot.plot({"a": [row(1, val_loss=4.0)], "b": [row(1), row(2)]}).axes
    for axes in axes_of:
        once = [line for line in axes.lines if np.size(line.get_data()[0]) == 1]
        assert once
        assert not any(line.get_marker() == "None" for line in once)
    training, _, validation, _ = axes_of[0].lines
    assert training.get_marker() != validation.get_marker()


def test_the_legend_takes_nothing_from_the_panels_and_stays_inside() -> None:
    def figure_of(*names: str) -> Figure:
        with mpl.rc_context(plot.PAPER):
            figure = plot.plot({name: [row(1), row(2)] for name in names})
            figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        return figure

    few, many = figure_of("a"), figure_of(*("long name " * 9 + str(i) for i in range(21)))
    heights = [figure.axes[0].get_window_extent().height for figure in (few, many)]
    assert heights[1] > 0.9 * heights[0]
    assert len({text.get_text() for text in many.legends[0].get_texts()}) == 21


def test_mfu_has_a_panel_if_any_run_has_it() -> None:
    rows = [row(1), row(2, mfu=0.4)]
    axes = plot.plot({"a": [row(1)], "b": rows}).axes
    assert drawn(axes[-1]) == [[(2, 0.4)]]
    assert len(axes) == 5


def test_a_file_is_whole_the_same_each_time_and_names_its_runs(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = make_run(tmp_path / "_a $x$ <&> \x01 é", [row(1)])
    call(monkeypatch, *runs, odd, "--out", tmp_path / "1.svg")
    call(monkeypatch, *runs, odd, "--out", tmp_path / "2.svg")
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()
    texts = {t.text for t in ElementTree.parse(tmp_path / "1.svg").iter() if t.tag.endswith("text")}
    assert {"base", "instruct", "_a $x$ <&> ? é", "training", "validation"} <= texts
    for suffix, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        call(monkeypatch, runs[0], "--out", tmp_path / f"x{suffix}")
        call(monkeypatch, runs[0], "--out", tmp_path / f"y{suffix}")
        written = (tmp_path / f"x{suffix}").read_bytes()
        assert written.startswith(magic)
        assert written == (tmp_path / f"y{suffix}").read_bytes()
    assert b"/Type3" not in written  # bitmaps of letters, which no publisher takes
    call(monkeypatch, odd)
    assert (odd / "plot.svg").is_file()
    assert capsys.readouterr().out.splitlines()[-1] == visible(f"written: {odd / 'plot.svg'}")
    assert not list(tmp_path.rglob("*.tmp*"))


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "x" / seed / "base" for seed in ("1", "2")]
    assert plot.names_of([paths[0]]) == ["base"]
    assert plot.names_of(paths) == ["1/base", "2/base"]
    assert plot.names_of([paths[0], tmp_path / "y" / "1" / "base"]) == ["x/1/base", "y/1/base"]
    many = {str(i): [row(1), row(2)] for i in range(21)}
    lines = plot.plot(many).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 21


def test_a_resumed_run_is_drawn_once(tmp_path: Path) -> None:
    saved = log_steps(make_log(tmp_path), 3)
    log_steps(make_log(tmp_path, saved), 6)  # killed at 6, its last checkpoint was at 3
    log_steps(make_log(tmp_path, saved), 5)
    loss = plot.plot({"run": plot.read_run(tmp_path, "step")}).axes[0]
    assert [x for x, _ in drawn(loss)[0]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("end", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}'])
def test_a_run_is_drawn_as_far_as_it_is_whole(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", [row(1), row(2)], end)
    rows = plot.read_run(run, "step")
    assert [r["step"] for r in rows] == ([1, 2, 3] if end.endswith("}") else [1, 2])
    noted = capsys.readouterr().err
    assert ("up to line 2" in noted) == (len(rows) == 2)
    call(monkeypatch, run)
    svg(plot.plot({"run": rows}))


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([row(1, lr="high")], [], "step 1: lr is high"),
        ([row(1, val_loss=None)], [], "step 1: val_loss is None"),
        ([{"step": 1, "loss": 2.0}], ["--against", "tokens"], "step 1: there is no tokens"),
        ([{"step": 1}], [], "nothing to draw"),
        ([], [], "no whole row yet"),
        (None, [], "run is no run that has begun"),
        ([row(1)], ["--out", "x.jpg"], "must end in .svg, .png, .pdf"),
        ([row(1)], ["--out", "x"], "must end in .svg, .png, .pdf"),
        ([row(1)], ["--out", "gone/x.svg"], "no file that could be written"),
        ([row(1)], ["--smooth", "0"], "--smooth is 0"),
        ([row(1)], ["--smooth", "4"], "must be odd"),
        ([row(1)], ["./run"], "named twice"),
        ([row(1)], ["run"] * 21, "22 runs are too many to tell apart; draw at most 21"),
    ],
)
def test_mistakes_are_told_in_one_line(
    lines: list[dict[str, Any]] | None,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if lines is not None:
        make_run(tmp_path / "run", lines)
    with pytest.raises(SystemExit, match="1"):
        call(monkeypatch, "run", *options)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.svg"))


def test_matplotlib_says_nothing_of_real_figures(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extreme = make_run(
        tmp_path / ("long name " * 5 + "猫"), [row(s, val_loss=10.0**-s) for s in (1, 5)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(monkeypatch, *runs, extreme, "--out", tmp_path / "x.png")
    assert capsys.readouterr().err == ""
