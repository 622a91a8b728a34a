"""What instruments find at each checkpoint of a run: when in training does something come about?

    --run BASE                 a pretraining: what is found of each base by itself
    --run BASE --tune FILE     the same, and of an instruct model that is tuned from each base
    --run INSTRUCT             a tuning: each instruct model beside the base that it was tuned from
    --run BASE INSTRUCT        one after the other

A figure is a dotted path into what an instrument finds, its name first, as in a sweep's tables:
knowledge.base.cloze.held_out.all. `--figures NAME=PATH` calls it NAME in the table and the picture;
"-1" is the last of several entries, and ":" stands for a dot of a name.

Writes curve.json with all figures, curve.csv and curve.svg of those that are drawn. Checkpoints are
measured from the last to the first; `--steps` takes only some. What was measured or tuned is kept
beside these and not made again: the same command goes on after an interruption, and other figures
of the same instruments cost nothing. A run whose run.save_every is "log" has its early steps close
together; its steps are drawn on a log axis.

python -m lab.curve knowledge probes --run out/quickstart/base \\
    --tune configs/quickstart/sft.toml --out out/curve
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from lab.figures import Curves, curve_plot
from lab.pair import Pair, for_each_seed, measured_by, open_both, open_pair, replayed
from lab.report import INSTRUMENTS, OF_A_WORLD, qa_files, text_at
from lab.stats import Difference, Mean, Share, kind_of, pool, to_json
from lab.sweep import content_of, leaves
from lab.tables import DEFAULTS, at, figure, grid, leads
from runtime import files
from runtime.cli import Parser, listed, one_line_errors, parse_config, say
from runtime.device import environment, pick_device
from train_sft import SFTConfig
from train_sft import main as sft
from training.checkpoint import identity, read_checkpoint
from training.config import MAY_CHANGE

OF_EACH = ("knowledge", "behaviour", "phrasings", "forms", "names", "exposures", "probes", "facts")
KINDS = {kind.__name__: kind for kind in (Share, Mean, Difference)}
Step = tuple[str, int]  # "pretraining" or "tuning", and how many were taken


@dataclass(frozen=True)
class Point:
    """A checkpoint of a run.

    Attributes:
        base: itself, or the base that it was tuned from.
        instruct: itself, or None.
        tuning: makes an instruct model of the base; None where there is nothing to make.
        logarithmic: whether its run saves on a logarithmic schedule.
    """

    base: Path
    instruct: Path | None
    tuning: SFTConfig | None
    logarithmic: bool

    @property
    def alone(self) -> bool:
        """Whether there is a base alone, and will be."""
        return self.instruct is None and self.tuning is None


def points_of(run: str, tune: list[str], out: Path) -> dict[Step, Point]:
    """Every checkpoint of a run, oldest first.

    Args:
        tune: a config of train_sft.py to tune each base with, and keys over it, KEY=VALUE.

    Raises:
        ValueError: there are none, or the base that they were tuned from is gone.
    """
    points = dict[Step, Point]()
    for path in files.checkpoints(Path(files.at_home(run))):
        meta = read_checkpoint(path)[1]
        with files.as_ours(path):
            logarithmic = isinstance(meta["config"]["run"]["save_every"], str)
            if meta["kind"] == "base":
                tuning = tuning_of(path, meta, tune, out) if tune else None
                points["pretraining", meta["step"]] = Point(path, None, tuning, logarithmic)
            else:
                base = read_checkpoint(meta["config"]["base"])[0]
                points["tuning", meta["step"]] = Point(base, path, None, logarithmic)
    if not points:
        raise ValueError(f"{run} is no run with checkpoints")
    return points


def tuning_of(base: Path, meta: dict[str, Any], tune: list[str], out: Path) -> SFTConfig:
    """The config of a tuning from a base, in a folder named by all that it depends on.

    Raises:
        ValueError: what train_sft.py does not take, or questions about another world.
    """
    file, *keys = tune
    if own := [key for key in keys if key.partition("=")[0] in ("base", "run.dir")]:
        raise ValueError(f"--tune {own[0]}: the curve sets this itself")
    options = ["--config", file, *(f"--{key}" for key in keys), f"--base={base}"]
    config = parse_config(SFTConfig, [*options, "--run.dir=to be named"])
    questions = content_of(config.data.path)
    worlds = [meta["prepared"].get("world_fingerprint"), questions.get("world_fingerprint")]
    if None not in worlds and worlds[0] != worlds[1]:
        what = f"{config.data.path} holds questions about another world than {base} has read about"
        raise ValueError(f"{what}; name its own behind --tune: data.path=FOLDER")
    fixed = sorted(leaf for leaf in leaves(config) if leaf[0] not in MAY_CHANGE)
    made_of = files.fingerprint([identity(meta), fixed, questions])
    folder = out / "tuned" / f"{meta['step']}-{made_of}"
    return replace(config, run=replace(config.run, dir=str(folder)))


def figures_of(given: list[str] | None, names: list[str], alone: bool) -> dict[str, str]:
    """The figures to draw, by the names to give them.

    Args:
        given: what --figures says; None for DEFAULTS.
        alone: whether there are only bases, of which nothing else is found.

    Raises:
        ValueError: one that is not of an instrument, or not of a base.
    """
    if given is None:
        paths = [f"{name}.{path}" for name in names for path in DEFAULTS[name]]
        return {path: path for path in paths if not alone or path.split(".")[1] == "base"}
    figures = dict[str, str]()
    for text in given:
        name, _, path = text.rpartition("=")
        first, *rest = path.split(".")
        if first not in names:
            raise ValueError(f"--figures {text} begins with none of {listed(names)}")
        if alone and not "".join(rest[:1]).startswith("base"):
            raise ValueError(
                f"--figures {text} is not of a base alone: it would be {first}.base..."
            )
        figures[name or path] = path
    return figures


def check_instruments(names: list[str], points: Collection[Point], qa: Path | None) -> None:
    """Raises ValueError: an instrument is not known, or has nothing to say of some checkpoints."""
    prepared = [read_checkpoint(base)[1]["prepared"] for base in {p.base for p in points}]
    has_world = qa is None and all("world" in of for of in prepared)
    for name in names:
        about = name in OF_A_WORLD or (name == "probes" and any("world" in of for of in prepared))
        if about and not has_world:
            raise ValueError(f"{name} asks about a world, and these models have read about none")
        if name not in OF_EACH and any(point.alone for point in points):
            what = f"{name} says what tuning changed, and there is a base alone"
            raise ValueError(f"{what}; give --tune a config, or name a tuning's run only")


def stored(result: Any) -> Any:
    """A result as JSON of which `restored` makes figures that pool. Texts, lists and tallies are
    left out, and what each question was about.
    """
    if type(result).__name__ in KINDS:
        kept = {f.name: getattr(result, f.name) for f in fields(result)}
        return [
            type(result).__name__,
            {k: v for k, v in kept.items() if k not in ("runs", "flags")},
        ]
    if is_dataclass(result):
        return {f.name: stored(getattr(result, f.name)) for f in fields(result)}
    if isinstance(result, dict):
        return {str(key): stored(value) for key, value in result.items()}
    return result if isinstance(result, int | float) else None


def restored(value: Any) -> Any:
    """What `stored` has put away."""
    if isinstance(value, list):
        return KINDS[value[0]](**value[1])
    return {k: restored(v) for k, v in value.items()} if isinstance(value, dict) else value


def measure(point: Point, names: list[str], a: argparse.Namespace) -> dict[str, Any]:
    """What instruments find at a checkpoint, by name: measured, or kept from before."""
    both = [path for path in (point.base, point.instruct) if path is not None]
    metas = [read_checkpoint(path)[1] for path in both]
    texts = [text_at(m["config"]["data"].get("path") or "") for m in metas]
    asked = None if a.qa is None else sorted(map(files.sha256_file, qa_files(a.qa)))
    code = [measured_by(), files.sha256_file(Path(__file__))]
    of = [[meta["files"] for meta in metas], texts, asked, a.questions, code]
    rows = {name: a.out / "rows" / f"{files.fingerprint([name, of])}.json" for name in names}
    if missing := [name for name in names if not rows[name].exists()]:
        instruct = None if point.instruct is None else str(point.instruct)
        if set(missing) <= {"facts", "probes"} and "world" not in metas[0]["prepared"]:
            pair = Pair(*open_both(str(point.base), instruct, a.device), None, [], 0)  # no Q&A
        else:
            pair = open_pair(str(point.base), instruct, a.device, a.qa)
        for name in missing:
            found = stored(INSTRUMENTS[name][0](pair, a.questions))
            if instruct is None:
                found = {key: part for key, part in found.items() if key.startswith("base")}
            rows[name].parent.mkdir(parents=True, exist_ok=True)
            files.write_json(rows[name], found)
    found = {}
    for name, row in rows.items():
        with files.as_ours(row):
            found[name] = restored(files.read_json(row))
    return found


def cells_of(point: dict[str, Any], figures: dict[str, str]) -> dict[str, dict[str, Any] | None]:
    """The figures of a checkpoint by name; None where there is nothing to tell."""
    cells = dict[str, dict[str, Any] | None]()
    for name, path in figures.items():
        value: Any = at(point, path) if leads(point, path) else None
        if isinstance(value, int | float):
            value = {"mean": value, "n": 1, "low": None, "high": None}
        cells[name] = value if kind_of(value) and value[kind_of(value)] is not None else None
    return cells


def check_figures(point: dict[str, Any], figures: dict[str, str]) -> None:
    """Raises ValueError: one that a checkpoint with all that there can be does not have."""
    for path in figures.values():
        value = at(point, path)
        if not kind_of(value) and not isinstance(value, int | float):
            what = f"has parts: {listed(value)}" if isinstance(value, dict) else "is no number"
            raise ValueError(f"the figure {path} {what}")


def markdown(curve: dict[str, Any]) -> str:
    """The table of what curve.json holds: a row a checkpoint, a column a figure."""
    several = len({point["stage"] for point in curve["drawn"]}) > 1
    rows = list[list[str]]()
    for point in curve["drawn"]:
        cells = ("-" if cell is None else figure(cell) for cell in point["cells"].values())
        rows.append(
            [f"{point['stage']} {point['step']}" if several else str(point["step"]), *cells]
        )
    return grid(list(curve["figures"]), rows)


def write_curve(out: Path, curve: dict[str, Any]) -> None:
    """curve.json, curve.csv and curve.svg."""
    files.write_json(out / "curve.json", curve)
    stages: dict[str, Curves] = {}
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["stage", "step", "figure", "value", "low", "high", "n"])
    for point in curve["drawn"]:
        stage, step = point["stage"], point["step"]
        curves = stages.setdefault(stage, {name: {} for name in curve["figures"]})
        for name, cell in point["cells"].items():
            if cell is not None:
                curves[name][step] = cell
                numbers = (cell[key] for key in (kind_of(cell), "low", "high"))
                texts = ["" if x is None else f"{x:.4f}" for x in numbers]
                writer.writerow([stage, step, name, *texts, cell["n"]])
    files.write_text(out / "curve.csv", lines.getvalue())
    files.write_text(out / "curve.svg", curve_plot(stages, curve["logarithmic"]))


def run(a: argparse.Namespace) -> None:
    """Measures what is not yet measured, prints the table and writes all of it."""
    if unknown := [name for name in a.instruments if name not in INSTRUMENTS]:
        raise ValueError(
            f"no instrument is called {unknown[0]}; there are {', '.join(INSTRUMENTS)}"
        )
    if a.questions < 1:
        raise ValueError(f"--questions is {a.questions}; it must be 1 or more")
    device = pick_device(a.device)
    names = list(dict.fromkeys(a.instruments))
    curves: list[dict[Step, Point]] = []
    # All at once, so that a mistake in the last one shows before the first is tuned.
    for seed, runs in zip(
        a.seeds or [""], for_each_seed(a.run, a.seeds, "each --run"), strict=True
    ):
        tune = [text.replace("{seed}", seed) if seed else text for text in a.tune or []]
        parts = [points_of(path, tune, a.out) for path in runs]
        if len({stage for part in parts for stage, _ in part}) < len(parts):
            raise ValueError("--run is given two runs of one kind; pool them with --seeds")
        every = [pair for part in parts for pair in part.items()]
        curves.append({step: point for step, point in every if step[1] in (a.steps or [step[1]])})
        if missing := set(a.steps or []) - {number for _, number in curves[-1]}:
            what = f"--steps {min(missing)}: {' and '.join(runs)} has no checkpoint of this step"
            raise ValueError(what)
    points = [point for curve in curves for point in curve.values()]
    if a.tune and not any(point.tuning for point in points):
        raise ValueError("--tune is for the run of a base; this one is a tuning already")
    check_instruments(names, points, a.qa)
    figures = figures_of(a.figures, names, all(point.alone for point in points))
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    if left_out := sorted({step for curve in curves for step in curve} - set(steps)):
        say(f"note: not of every seed, left out: {listed(' '.join(map(str, s)) for s in left_out)}")
    found, replay = dict[Step, dict[str, Any]](), set[str]()
    for step in reversed(steps):
        each = list[dict[str, Any]]()
        for i, curve in enumerate(curves):
            say(f"== step {step[1]} of {step[0]}" + (f", seed {a.seeds[i]}" if a.seeds else ""))
            point = curve[step]
            if point.tuning is not None:
                point = curve[step] = replace(point, instruct=sft(point.tuning))
            if point.instruct is not None:
                replay.add(replayed(read_checkpoint(point.instruct)[1]))
            each.append(measure(point, names, a))
        checkpoints = [[str(p) for p in (c[step].base, c[step].instruct) if p] for c in curves]
        pooled = to_json({name: pool([one[name] for one in each]) for name in names})
        found[step] = {"stage": step[0], "step": step[1], "checkpoints": checkpoints, **pooled}
        if step == steps[-1]:
            check_figures(found[step], figures)
    made = {
        "settings": {"questions": a.questions, "decoding": "greedy", **environment(device)},
        "seeds": a.seeds,
        "replayed": "/".join(sorted(replay)),
        "logarithmic": sorted(
            {s for c in curves for (s, _), point in c.items() if point.logarithmic}
        ),
        "figures": figures,
        "drawn": [
            {"stage": stage, "step": step, "cells": cells_of(found[stage, step], figures)}
            for stage, step in steps
        ],
        "points": [found[step] for step in steps],
    }
    write_curve(a.out, made)
    say(markdown(made))
    if replay:
        say(f"replayed in tuning: {made['replayed']}")
    say(f"written: {a.out / 'curve.json'}, curve.csv and curve.svg")


def main() -> None:
    """Runs one command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "instruments", nargs="+", metavar="INSTRUMENT", help=f"some of {', '.join(INSTRUMENTS)}"
    )
    p.add_argument("--run", nargs="+", required=True, metavar="DIR", help="one run of a stage")
    p.add_argument("--out", type=Path, required=True, help="folder for all that is made")
    p.add_argument(
        "--tune",
        nargs="+",
        metavar=("FILE", "KEY=VALUE"),
        help="tune each base of a pretraining by this config of train_sft.py, but for the keys",
    )
    p.add_argument(
        "--figures", nargs="+", metavar="[NAME=]PATH", help="what is drawn, in its order"
    )
    p.add_argument("--steps", nargs="+", type=int, metavar="STEP", help="only these checkpoints")
    p.add_argument("--questions", type=int, default=100, help="per figure (default 100)")
    p.add_argument(
        "--seeds", nargs="+", help="pool several: each of these for {seed} in --run and --tune"
    )
    p.add_argument("--qa", type=Path, help="ask from this Q&A file or folder, not about the world")
    p.add_argument("--device", default="auto", help="for measuring: auto (default), cpu, cuda, ...")
    with one_line_errors():
        run(p.parse_args())


if __name__ == "__main__":
    main()
