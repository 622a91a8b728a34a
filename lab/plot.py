"""The curves of one run or several in one figure: loss, learning rate, gradient norm, throughput.

Drawn from what the runs have logged so far, as wide as one column of a two-column paper. Of the
loss, lines are training and dots validation.

python -m lab.plot out/quickstart/base out/quickstart/instruct --out curves.pdf
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from lab.figures import BASE, GREEN, GREY, INSTRUCT, PURPLE, SKY, STYLE, as_share, stack
from runtime.cli import Parser, one_line_errors, say
from runtime.files import check_file, new_file
from training.log import read_metrics

PAPER = {
    **STYLE,
    "font.size": 8,
    "pdf.fonttype": 42,  # TrueType, as publishers ask: text that can be searched
    "savefig.dpi": 300,
}
COLORS = (BASE, INSTRUCT, GREEN, PURPLE, SKY, "#D55E00", "black")
DASHES = ("-", "--", ":")  # of the first seven runs, the next seven, ...
TRAINING: Any = {"lw": 0.9}
VALIDATION: Any = {"lw": 0, "marker": "o", "ms": 3}
EVALUATION = VALIDATION | TRAINING  # of panels that have no training curve
# Without a date, so that the same figures make the same bytes.
METADATA: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None},
    ".png": {},
    ".pdf": {"CreationDate": None},
}
AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds since the first step"}
# What of a row is in a panel, and the panel's label; it is there if any row has any of it.
PANELS: dict[tuple[str, ...], str] = {
    ("loss", "val_loss"): "loss\n(nats per token)",
    ("val_bpb",): "bits\nper byte",
    ("lr",): "learning\nrate",
    ("grad_norm",): "gradient\nnorm",
    ("tokens_per_second",): "tokens\nper second",
    ("mfu",): "MFU\n(share)",
    ("stop_rate",): "stop rate\n(share)",
}
NOISY = ("loss", "grad_norm", "tokens_per_second", "mfu")
STYLES = {"val_loss": VALIDATION, "val_bpb": EVALUATION, "stop_rate": EVALUATION}
LOG_RATIO = 20  # of the largest to the smallest value, from which on a logarithm shows more

Rows = list[dict[str, Any]]


def read_run(run: Path, against: str) -> Rows:
    """The rows that a run has logged so far.

    Raises:
        ValueError: no run, nothing logged yet, or something that cannot be drawn.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is no run that has begun: there is no metrics.jsonl in it")
    rows = read_metrics(path)
    if not rows:
        raise ValueError(f"{path} holds no whole row yet; wait until the run has logged a step")
    with open(path, "rb") as f:
        if len(rows) < sum(1 for _ in f):
            note = f"note: {path} is drawn up to line {len(rows)}; the next one is not whole"
            say(note, error=True)
    drawn = [key for keys in PANELS for key in keys]
    if not any(key in row for row in rows for key in drawn):
        raise ValueError(f"{path} holds nothing to draw, such as loss or lr")
    for row in rows:
        if against not in row:
            raise ValueError(f"{path}, step {row['step']}: there is no {against}")
        for key in (against, *drawn):
            value = row.get(key, 0)
            if type(value) not in (int, float):
                raise ValueError(f"{path}, step {row['step']}: {key} is {value}, no number")
    return rows


def names_of(runs: list[Path]) -> list[str]:
    """The end of each run's path, as many parts of it as tell all of them apart.

    Raises:
        ValueError: a run is named twice.
    """
    parts = [Path(os.path.realpath(run)).parts for run in runs]
    for run, own in zip(runs, parts, strict=True):
        if parts.count(own) > 1:
            raise ValueError(f"{run} is named twice")
    length = 1
    while len({own[-length:] for own in parts}) < len(parts):
        length += 1
    return ["/".join(own[-length:]) for own in parts]


def printable(name: str) -> str:
    """A name as matplotlib and XML can write it and the figure is wide enough for.

    Without formulas and control characters, and of a long name only both ends.
    """
    if len(name) > 40:
        name = f"{name[:19]}…{name[-20:]}"
    return "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")


def running_mean(values: list[float], n: int) -> list[float]:
    """The mean of each of n values in a row, n odd, at the middle one; of fewer at both ends.

    There, too, as many before it as after it, so that a slope stays where it is.
    """
    last = len(values) - 1
    reach = [min(n // 2, i, last - i) for i in range(len(values))]
    return [math.fsum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def plot(runs: dict[str, Rows], against: str = "step", smooth: int = 1) -> Figure:
    """The figure of some runs, by name, over steps, tokens or seconds.

    Args:
        smooth: what is noisy is drawn as a running mean over so many rows, the rows pale behind.
    """
    found = {key for rows in runs.values() for row in rows for key in row}
    panels = {keys: label for keys, label in PANELS.items() if found.intersection(keys)}
    figure, axes_of = stack(3.4, [1.9 if "loss" in keys else 0.95 for keys in panels])
    styles: list[Any] = [
        {"color": COLORS[i % 7], "ls": DASHES[i // 7 % 3]} for i in range(len(runs))
    ]
    for (keys, label), axes in zip(panels.items(), axes_of, strict=True):
        drawn: list[float] = []
        for key, (rows, style) in product(keys, zip(runs.values(), styles, strict=True)):
            xs = [row[against] for row in rows if key in row]
            ys = [row[key] for row in rows if key in row]
            drawn += ys
            style = style | STYLES.get(key, TRAINING)
            if len(xs) == 1:  # a line of one point would not be seen
                style = {"marker": "x", "ms": 3} | style
            if smooth > 1 and key in NOISY:
                axes.plot(xs, ys, **{**style, "alpha": 0.25})
                ys = running_mean(ys, smooth)
            axes.plot(xs, ys, **style)
        vertical_axis(axes, keys[0], label, drawn)
    axes_of[-1].set_xlabel(AXES[against] + (f";   means of {smooth} rows" if smooth > 1 else ""))
    if against == "tokens":
        axes_of[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.align_ylabels()
    legend = [Line2D([], [], label=printable(n), **s) for n, s in zip(runs, styles, strict=True)]
    if "val_loss" in found:
        legend.append(Line2D([], [], color=GREY, label="training", **TRAINING))
        legend.append(Line2D([], [], color=GREY, label="validation", **VALIDATION))
    columns = 2 if max(map(len, runs)) <= 20 else 1
    figure.set_figheight(figure.get_figheight() + 0.16 * math.ceil(len(legend) / columns))
    figure.legend(handles=legend, loc="outside upper left", ncols=columns)
    return figure


def vertical_axis(axes: Axes, key: str, label: str, values: list[float]) -> None:
    """Label, scale and numbers of a panel's vertical axis."""
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.yaxis.set_major_locator(MaxNLocator(6 if key == "loss" else 4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(EngFormatter(sep="") if max(values) >= 1000 else "{x:g}")
    if key == "stop_rate":
        as_share(axes)
        axes.set_ylim(-0.08, 1.08)  # whole marks at 0 and at 1
    if key in ("loss", "grad_norm") and 0 < LOG_RATIO * min(values) < max(values):
        axes.set_ylabel(f"{label}, log")
        axes.set_yscale("log")
        subs = (1, 3) if max(values) < 100 * min(values) else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def write(figure: Figure, out: Path) -> None:
    """Writes a figure as its file's name says; a reader or a crash never meets half of it."""
    with warnings.catch_warnings(), new_file(out) as temporary:
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # 猫 is drawn as a box
        figure.savefig(temporary, format=out.suffix[1:], metadata=METADATA[out.suffix])


def run(a: argparse.Namespace) -> None:
    """Draws what the command line asks for."""
    if a.smooth < 1 or not a.smooth % 2:
        raise ValueError(f"--smooth is {a.smooth}; it must be odd: a row and its neighbours")
    if len(a.runs) > (most := len(COLORS) * len(DASHES)):
        raise ValueError(f"{len(a.runs)} runs are too many to tell apart; draw at most {most}")
    runs = dict(zip(names_of(a.runs), [read_run(path, a.against) for path in a.runs], strict=True))
    out = a.out or a.runs[0] / "plot.svg"
    if out.suffix not in METADATA:
        raise ValueError(f"--out {out}: its name must end in {', '.join(METADATA)}")
    check_file("--out", out)
    with mpl.rc_context(PAPER):
        write(plot(runs, a.against, a.smooth), out)
    say(f"written: {out}")


def main() -> None:
    """Runs one command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    p.add_argument("--out", type=Path, help=".svg, .png or .pdf (default: plot.svg in the first)")
    p.add_argument("--against", choices=AXES, default="step", help="the x axis (default: step)")
    p.add_argument("--smooth", type=int, default=1, help="means of so many rows, an odd number")
    with one_line_errors():
        run(p.parse_args())


if __name__ == "__main__":
    main()
