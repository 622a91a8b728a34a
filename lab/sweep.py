"""Config keys on a grid, with seeds: one run after another, one table, one picture.

A sweep is a TOML file. `[world]`, `[pretrain]`, `[more]`, `[qa]` and `[sft]` hold what is fixed,
`[grid]` the values of each varied key (all combinations), `[[cells]]` combinations one by one
(each with every one of the grid, if there are both). A key is that of the script behind the name
of its stage: "sft.data.examples". The stages:

    world      python -m data.prepare world
    pretrain   train_pretrain.py
    more       train_pretrain.py again, from the base's weights; left out without keys or steps
    qa         other Q&A about the world (`lab.qa.conversations`); else its own
    sft        train_sft.py
    qa2, sft2  other Q&A, and train_sft.py once more from the instruct model (`tune.init`), with the
               keys of sft and its own over them; left out without a key of either

Every run is measured in the same way (`measure_row`); `[instruments]` adds others by name, each
with its number of questions, and `[[tables]]` says which Markdown tables to make (`lab.tables`).

A sweep whose `[pretrain]` names `data.path` is on prepared text instead: without the stages world
and qa, with the Q&A that `[sft]` names, or of pretraining alone without `[sft]`. Its rows are what
the runs have logged, and the share of replies that stop (`measure_own_text`).

What two cells share is run once. Give the same command again after an interruption: a finished
run is not run again, and a killed one goes on.

python -m lab.sweep configs/sweeps/examples.toml
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import itertools
import json
import math
import random
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from data.prepare import prepare_world
from data.sources.read import QA_SUFFIXES
from data.world import ATTRIBUTES, SPLITS, Person, World, WorldConfig
from lab.behaviour import behaviour, measure_point
from lab.bits import bits
from lab.exposures import exposures
from lab.facts import public_facts
from lab.figures import instrument_plots, sweep_plot
from lab.forgetting import forgetting
from lab.forms import forms
from lab.knowledge import (
    ask_all,
    complete,
    draw_and_complete,
    knowledge,
    measure,
    recite,
    summarize,
)
from lab.names import names
from lab.pair import NothingFitsError, Pair, measured_by, open_pair, replayed
from lab.phrasings import phrasings
from lab.positions import positions
from lab.probe import probes
from lab.qa import asked_about, conversations, strangers_taught
from lab.questions import draw, openings
from lab.report import OF_A_WORLD
from lab.rows import rows
from lab.shift import shift
from lab.stats import Mean, Share, difference, kind_of, pool, to_json
from lab.tables import at, default_columns, markdown, named_cells, problem_of
from lab.trace import trace
from lab.weights import weights
from runtime import files
from runtime.cli import Parser, listed, one_line_errors, parse_config, read_text, say
from runtime.device import environment, pick_device
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain
from train_sft import SFTConfig
from train_sft import main as sft
from training.checkpoint import read_checkpoint
from training.config import MAY_CHANGE
from training.log import read_metrics

INSTRUMENTS: dict[str, Callable[[Pair, int], Any]] = {
    "knowledge": knowledge,
    "behaviour": behaviour,
    "shift": lambda pair, n: {k: replace(s, strips=[]) for k, s in shift(pair, n).items()},
    "weights": weights,
    "bits": bits,
    "positions": positions,
    "probes": probes,
    "trace": trace,
    "forgetting": forgetting,
    "phrasings": phrasings,
    "forms": forms,
    "names": names,
    "rows": rows,
    "exposures": exposures,
    "facts": public_facts,
}
STAGES = ("world", "pretrain", "more", "qa", "sft", "qa2", "sft2")
# What a run has logged of its last step that says how it went.
LOGGED = ("tokens", "val_loss", "val_bpb", "stop_rate")
# Set by the sweep itself.
OWN = ("seed", "run.seed", "run.dir", "data.path", "base", "init_from", "tune.init")
MOST = 1000  # cells, or seeds
T = TypeVar("T")
Settings = dict[str, dict[str, Any]]  # of each stage, by key
Row = dict[str, Share]


def read_sweep(path: Path) -> dict[str, Any]:
    """A sweep's TOML file.

    Raises:
        ValueError: it is missing, is not TOML, or has keys that mean nothing here.
    """
    try:
        spec = tomllib.loads(read_text(path))
        json.dumps(spec)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:  # the last: a date, which JSON does not have
        raise ValueError(f"{path}: {error}") from None
    if not spec or not isinstance(spec.get("about", ""), str):
        raise ValueError(
            f"{path} holds no key, or no text under about; configs/sweeps has examples"
        )
    defaults: dict[str, Any] = {"about": "", "seeds": [1], "questions": 200}
    spec = defaults | spec
    own = ("about", "seeds", "labels", "questions", "grid", "cells", "instruments", "tables")
    known = {*own, *STAGES}
    if unknown := sorted(set(spec) - known):
        raise ValueError(f"{path}: unknown {listed(unknown)}; known are {', '.join(known)}")
    for name in ("grid", "instruments", *STAGES):
        if not isinstance(spec.get(name, {}), dict):
            raise ValueError(f"{path}: {name} = {spec[name]}; it is a table: [{name}]")
    cells = spec.get("cells", [{}])
    if not isinstance(cells, list) or not cells:
        raise ValueError(f"{path}: cells are a list of tables: [[cells]]")
    for key, values in spec.get("grid", {}).items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: {key} = {values}; the values on a grid are a list")
    seeds, n = spec["seeds"], spec["questions"]
    n_cells = math.prod(len(values) for values in spec.get("grid", {}).values()) * len(cells)
    if max(n_cells, len(seeds) if isinstance(seeds, list) else 0) > MOST:
        raise ValueError(f"{path}: {n_cells:,} cells; a sweep has at most {MOST} of them, or seeds")
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise ValueError(f"{path}: seeds = {seeds}; give a list such as [1, 2, 3]")
    if len(set(seeds)) < len(seeds) or any(cells_of(spec).count(c) > 1 for c in cells_of(spec)):
        raise ValueError(f"{path}: a seed or a cell stands there twice; it would count twice")
    if type(n) is not int or n < 1:
        raise ValueError(f"{path}: questions = {n}; it must be 1 or more")
    labels = spec.get("labels", [""] * len(cells_of(spec)))
    if not isinstance(labels, list) or not all(isinstance(text, str) for text in labels):
        raise ValueError(f"{path}: labels = {labels}; they are a list of texts")
    if len(labels) != len(cells_of(spec)):
        raise ValueError(f"{path}: there are {len(labels)} labels of {len(cells_of(spec))} cells")
    for name, asked in spec.get("instruments", {}).items():
        if name not in INSTRUMENTS or type(asked) is not int or asked < 1:
            known_ones = ", ".join(INSTRUMENTS)
            raise ValueError(
                f"{path}: {name} = {asked}; [instruments] are questions each of {known_ones}"
            )
    tables = spec.get("tables", [])
    for wanted in tables if isinstance(tables, list) else [tables]:
        if problem := problem_of(wanted):
            raise ValueError(f"{path}: [[tables]]: {problem}")
    for key in keys_of(spec):
        stage, _, name = key.partition(".")
        if stage not in STAGES or not name:
            raise ValueError(f"{path}: {key} does not begin with a stage: {', '.join(STAGES)}")
        if name in OWN and not (name == "data.path" and on_own_text(spec)):
            remedy = (
                "pretrain.data.path names your own text"
                if name == "data.path"
                else "seeds have a line"
            )
            raise ValueError(f"{path}: {key} is the sweep's own to set; {remedy}")
    if on_own_text(spec):
        check_own_text(path, spec)
    elif "facts" in spec.get("instruments", {}):
        raise ValueError(f"{path}: facts are public ones, and an invented world has none of them")
    return spec


def keys_of(spec: dict[str, Any]) -> list[str]:
    """Every key that a sweep sets, its stage before it."""
    fixed = [f"{stage}.{key}" for stage in STAGES for key in spec.get(stage, {})]
    return [*fixed, *(key for cell in cells_of(spec) for key in cell)]


def on_own_text(spec: dict[str, Any]) -> bool:
    """Whether a sweep is on somebody's own text instead of a world."""
    return "pretrain.data.path" in keys_of(spec)


def check_own_text(path: Path, spec: dict[str, Any]) -> None:
    """Raises ValueError: a sweep on somebody's own text lacks data, or asks for a world's."""
    keys, text = keys_of(spec), "this sweep is on the text of pretrain.data.path"
    if of_a_world := [key for key in keys if key.startswith(("world.", "qa"))]:
        raise ValueError(f"{path}: {of_a_world[0]}: {text}, there is no world to make")
    tunes = any(key.startswith("sft") for key in keys)
    for stage in ("pretrain", "sft") if tunes else ("pretrain",):
        for cell in cells_of(spec):
            if "data.path" not in settings_of(spec, cell)[stage]:
                raise ValueError(f"{path}: {text}; {stage}.data.path is needed for every cell")
    for name in spec.get("instruments", {}):
        if name in OF_A_WORLD or not tunes:
            what = "asks about a world" if name in OF_A_WORLD else "needs an instruct model: [sft]"
            raise ValueError(f"{path}: {name} {what}; {text}")


def cells_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination to run."""
    grid = spec.get("grid", {})
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [point | cell for cell in spec.get("cells", [{}]) for point in points]


def settings_of(spec: dict[str, Any], cell: dict[str, Any]) -> Settings:
    """What each stage is given: what is fixed, and the cell's values over it."""
    settings = {stage: dict(spec.get(stage, {})) for stage in STAGES}
    for key, value in cell.items():
        stage, _, name = key.partition(".")
        settings[stage][name] = value
    return settings


def options(values: dict[str, Any]) -> list[str]:
    """Config keys as a command line; `config` first, so that the others win."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    first = ["--config", texts.pop("config")] if "config" in texts else []
    return first + [f"--{key}={text}" for key, text in texts.items()]


@dataclass(frozen=True)
class Plan:
    """One cell at one seed: every stage, in a folder named by all that it depends on.

    Attributes:
        world: None of a sweep on somebody's own text.
        data: what the first pretraining reads.
        tunings: the Q&A and the config of each; none in a sweep of pretraining alone.
    """

    world: WorldConfig | None
    data: Path
    pretrain: PretrainConfig
    more: PretrainConfig | None
    tunings: list[tuple[dict[str, Any], SFTConfig]]

    @property
    def stages(self) -> dict[str, PretrainConfig | SFTConfig]:
        """The configs of what is trained, by stage, in their order."""
        more = {"more": self.more} if self.more else {}
        tuned = zip(("sft", "sft2"), (config for _, config in self.tunings), strict=False)
        return {"pretrain": self.pretrain, **more, **dict(tuned)}


def make_plan(folder: Path, settings: Settings, seed: int) -> Plan:
    """Resolves every config of a cell.

    Raises:
        ValueError: a key or value that a stage does not take.
    """
    world, at = None, list[Any]()
    if own := settings["pretrain"].get("data.path"):
        data = Path(own)
    else:
        try:
            world = WorldConfig(seed=seed, **settings["world"])
            for stage in ("qa", "qa2"):
                next(conversations(World(world), **settings[stage]))
        except TypeError as error:  # an unknown key or a wrong type
            raise ValueError(f"[world], [qa] or [qa2]: {error}") from None
        at.append(asdict(world))
        data = folder / "runs" / f"world-{files.fingerprint(at)}"

    def resolve(config_class: type[T], stage: str, given: dict[str, Any]) -> T:
        """A stage's config, and its place by what it and the stages before it are."""
        given = given | {"run.seed": seed, "run.dir": "to be named"}
        config: Any = parse_config(config_class, options(given))
        if own:
            at.append(content_of(config.data.path))
        at.extend([stage, sorted(f for f in leaves(config) if f[0] not in MAY_CHANGE)])
        place = folder / "runs" / f"{stage}-{files.fingerprint(at)}"
        resolved: T = replace(config, run=replace(config.run, dir=str(place)))
        return resolved

    text = settings["pretrain"] | {"data.path": str(data)}
    pretrain = base = resolve(PretrainConfig, "pretrain", text)
    more = None
    if settings["more"]:
        given = text | settings["more"] | {"init_from": pretrain.run.dir}
        if parse_config(PretrainConfig, options(given | {"run.dir": "unused"})).optim.steps:
            more = base = resolve(PretrainConfig, "more", given)
    plan = Plan(world, data, pretrain, more, [])
    if own and not settings["sft"]:
        return plan
    tuning = {"data.path": str(data)} | settings["sft"] | {"base": base.run.dir}
    asked: dict[str, Any] = {}  # by a second tuning, the same again if it names nothing else
    for qa, stage in ((settings["qa"], "sft"), (settings["qa2"], "sft2")):
        if plan.tunings:
            if not qa and not settings[stage]:
                break
            tuning |= settings[stage] | {"tune.init": plan.tunings[0][1].run.dir}
        if qa:
            at.append(sorted(qa.items()))
            tuning["data.path"] = str(folder / "runs" / f"qa-{files.fingerprint(at)}.jsonl")
        asked = qa or asked
        plan.tunings.append((asked, resolve(SFTConfig, stage, tuning)))
    return plan


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a config, but for defaults: a run keeps its name when a later
    version has more keys."""
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{part.name}.")
        elif value != part.default:
            yield f"{prefix}{part.name}", value


def content_of(path: str) -> dict[str, Any]:
    """What prepared data or a Q&A file holds, by checksums, and the world of which it is.

    Raises:
        ValueError: it is neither.
    """
    if path.lower().endswith(QA_SUFFIXES):
        return {"sha256": files.sha256_file(Path(path))}
    meta = files.read_meta(path)
    return {key: meta.get(key) for key in ("files", "world_fingerprint")}


def train(plan: Plan) -> list[dict[str, Any]]:
    """Runs what is not yet there; returns what each stage's last checkpoint notes of itself."""
    if plan.world is not None:
        prepare_world(plan.world, plan.data, "bpe:2048", 0.02)
    pretrain(plan.pretrain)
    if plan.more:
        pretrain(plan.more)
    for qa, config in plan.tunings:
        if plan.world is not None and qa:
            made = conversations(World(plan.world), **qa)
            text = "".join(json.dumps({"messages": c}) + "\n" for c in made)
            files.write_text(Path(config.data.path), text)
        sft(config)
    return [read_checkpoint(config.run.dir)[1] for config in plan.stages.values()]


def measure_row(pair: Pair, n: int, known: list[Person], strangers: list[Person]) -> Row:
    """The figures of one run: what the base completes, what the instruct model knows and does.

    Args:
        known: who of the known people is asked about in the Q&A; all others are left out.
        strangers: people whose facts stand in the Q&A alone.
    """
    assert pair.world is not None
    world = copy.copy(pair.world)
    world.by_split = world.by_split | {"known": known}
    row: Row = {}
    for split in SPLITS:
        completed, facts, rng = draw_and_complete(pair.base, world, split, n)
        row[f"base_cloze_{split}"] = completed["all"]
        if split != "unseen":
            row[f"base_recites_{split}"] = recite(pair.base, world, facts, rng)["all"]
    found = measure(pair.instruct, world, n, thorough=False)
    for split in SPLITS:
        row[f"cloze_{split}"] = found.cloze[split]["all"]
        row[f"answers_{split}"] = found.answers[split].answered["all"]
        row[f"right_{split}"] = found.answers[split].right["all"]
        row[f"rephrased_{split}"] = found.rephrased[split].answered["all"]
        row[f"abstains_{split}"] = found.answers[split].abstains
        row[f"stops_{split}"] = found.answers[split].stops
    row["right_rephrased_held_out"] = found.rephrased["held_out"].right["all"]
    ways = {
        "sentence": found.sentence,
        "named": found.named,
        "form": found.form,
        "untaught": found.untaught,
    }
    for way, answers in ways.items():
        row[f"{way}_held_out"] = answers.answered["all"]
        row[f"right_{way}_held_out"] = answers.right["all"]
    rng = random.Random(f"row {world.config.seed}")
    asked = openings(draw(world, "known", n, rng), rng, ("sentence",))
    row["sentence_known"] = summarize(ask_all(pair.instruct, world, asked)).answered["all"]
    facts = [(person, attribute) for person in strangers for attribute in ATTRIBUTES]
    chosen = rng.sample(facts, min(n, len(facts)))
    row["answers_strangers"] = row["cloze_strangers"] = Share(0, 0)
    if chosen:
        found_out = summarize(ask_all(pair.instruct, world, openings(chosen, rng)))
        row["answers_strangers"] = found_out.answered["all"]
        row["cloze_strangers"] = complete(pair.instruct, world, chosen, rng)["all"]
    return row


def measure_own_text(pair: Pair, n: int) -> Row:
    """What a pair does that has read about no world: how many of n replies to its validation
    questions end by themselves."""
    return {"stops": measure_point(pair, pair.instruct, n).stops}


def logged(plan: Plan) -> dict[str, Mean]:
    """What each training behind a plan has logged last, of validation and of its own replies."""
    row = dict[str, Mean]()
    for stage, config in plan.stages.items():
        last = read_metrics(Path(config.run.dir) / "metrics.jsonl")[-1]
        row |= {f"{stage}_{key}": Mean.of([last[key]]) for key in LOGGED if key in last}
    return row


def known_in(world: World, qa: dict[str, Any]) -> list[Person]:
    """The known people who are asked about in the Q&A of a cell; all if it asks about none."""
    return asked_about(world, **qa) or world.by_split["known"]


def cached_row(pair: Pair, asked: list[Any], measure: Callable[[], Row], folder: Path) -> Row:
    """A row, kept by what was measured, what was asked, and with which code."""
    of = [c.meta["files"] for c in (pair.base, pair.instruct)]
    key = files.fingerprint([of, asked, measured_by(), files.sha256_file(Path(__file__))])
    path = folder / "rows" / f"{key}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = measure()
        files.write_json(path, {k: [s.hits, s.n, s.flags] for k, s in found.items()})
    with files.as_ours(path):
        rows = files.read_json(path).items()
        return {k: Share(hits, n, (), tuple(map(tuple, flags))) for k, (hits, n, flags) in rows}


def run(path: Path, out: Path, device: str) -> Path:
    """Runs a sweep; returns the folder of its table.json, table.csv and picture.svg."""
    spec = read_sweep(path)
    pick_device(device)  # a wrong one is known before the first run trains
    cells, seeds, n = cells_of(spec), spec["seeds"], spec["questions"]
    # All at once, so that a mistake in the last cell shows before the first one trains.
    plans = [
        (cell, seed, make_plan(out, settings_of(spec, cell), seed))
        for cell in cells
        for seed in seeds
    ]
    for cell, _, plan in plans:
        if plan.world is None:
            continue
        world = World(plan.world)
        sizes = {split: len(people) for split, people in world.by_split.items()}
        sizes["known"] = len(known_in(world, plan.tunings[-1][0]))
        fewest = min(sizes.values()) * len(ATTRIBUTES)
        if n > fewest:
            raise ValueError(
                f"{path}: questions = {n}, but {label(cell)} has {fewest} facts a split"
            )
    folder = out / path.stem
    runs, made_of = list[Measured](), list[Any]()
    for i, (cell, seed, plan) in enumerate(plans):
        say(f"== run {i + 1} of {len(plans)}: seed {seed}, {label(cell) or 'no key varied'}")
        metas = train(plan)
        texts = dict.fromkeys(map(replayed, metas[len(metas) - len(plan.tunings) :]))
        runs.append(Measured(cell, seed, plan, "/".join(texts)))
        made_of.append([meta["files"] for meta in metas])
    asked = {key: value for key, value in spec.items() if key not in ("about", "labels", "tables")}
    made_from = files.fingerprint(
        [asked, made_of, device, measured_by(), files.sha256_file(Path(__file__))]
    )
    if (table := made_before(folder / "table.json", made_from)) is not None:
        with files.as_ours(folder / "table.json"):
            write_tables(folder, table | {"about": spec["about"], "spec": spec})
        return folder
    say(f"== measuring {len(runs)} runs")
    begin = time.perf_counter()
    measured = [measured_run(r, spec, out, device) for r in runs]
    seconds = {"training": seconds_of(runs), "measuring": round(time.perf_counter() - begin)}
    folder.mkdir(parents=True, exist_ok=True)
    about = {"made_from": made_from, "environment": environment(pick_device(device))}
    about["seconds"] = seconds
    write_tables(folder, table_of(spec, cells, measured) | about)
    return folder


@dataclass(frozen=True)
class Measured:
    """One cell at one seed.

    Attributes:
        replayed: what text was replayed in tuning; empty where nothing was tuned.
        logged: of a sweep on somebody's own text, what its runs have logged last.
        found: results of `[instruments]`, by name.
    """

    cell: dict[str, Any]
    seed: int
    plan: Plan | None
    replayed: str
    row: Row = field(default_factory=dict)
    logged: dict[str, Mean] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)


def measured_run(run: Measured, spec: dict[str, Any], out: Path, device: str) -> Measured:
    """A run with all its figures."""
    plan, n = run.plan, spec["questions"]
    assert plan is not None
    if not plan.tunings:
        return replace(run, logged=logged(plan))
    qa, last = plan.tunings[-1]
    pair = open_pair(last.base, last.run.dir, device, None)
    if plan.world is None:
        run = replace(run, logged=logged(plan))
        row = cached_row(pair, [n], lambda: measure_own_text(pair, n), out)
    else:
        world = World(plan.world)
        people = known_in(world, qa), strangers_taught(world, **qa)
        asked = [n, *([person.name for person in some] for some in people)]
        row = cached_row(pair, asked, lambda: measure_row(pair, n, *people), out)
    asked_of = spec.get("instruments", {}).items()
    found = dict[str, Any]()
    for name, n in asked_of:
        try:
            found[name] = INSTRUMENTS[name](pair, n)
        except NothingFitsError as error:  # after hours of training
            say(f"note: {name}: {error}", error=True)
    return replace(run, row=row, found=found)


def seconds_of(runs: list[Measured]) -> dict[str, float]:
    """How long each training behind some runs took, by the name of its folder."""
    found = dict[str, float]()
    for plan in (run.plan for run in runs if run.plan is not None):
        for config in plan.stages.values():
            metrics = files.read_meta(files.resolve_checkpoint(config.run.dir))["metrics"]
            found[Path(config.run.dir).name] = round(metrics.get("seconds", 0.0), 1)
    return found


def made_before(path: Path, made_from: str) -> dict[str, Any] | None:
    """A table that is there already, from the same runs by the same code; None if there is none."""
    try:
        table: dict[str, Any] = files.read_json(path)
        return table if table["made_from"] == made_from else None
    except (ValueError, TypeError, KeyError):
        return None


def label(cell: dict[str, Any]) -> str:
    """A cell in words."""
    return ", ".join(f"{key}={value}" for key, value in cell.items())


def table_of(
    spec: dict[str, Any], cells: list[dict[str, Any]], runs: list[Measured]
) -> dict[str, Any]:
    """One row a run, and the seeds of a cell pooled.

    Each cell also brings its paired differences from the first one, where both were asked the same.
    """
    of_cell = [[run for run in runs if run.cell == cell] for cell in cells]
    first = [run.row for run in of_cell[0]]
    pooled = []
    for cell, found in zip(cells, of_cell, strict=True):
        rows = [run.row for run in found]
        differences = {
            key: pool([difference(a[key], b[key]) for a, b in zip(rows, first, strict=True)])
            for key in rows[0]
            if all(same_questions(a[key], b[key]) for a, b in zip(rows, first, strict=True))
        }
        pooled.append(
            {
                "cell": cell,
                "replayed": "/".join(sorted({run.replayed for run in found})),
                "from_the_first": to_json(differences),
                **to_json(pool([run.logged for run in found])),
                **to_json(pool(rows)),
                **to_json(pool([run.found for run in found])),
            }
        )
    return {
        "about": spec["about"],
        "spec": spec,
        "runs": [
            {"cell": r.cell, "seed": r.seed, "replayed": r.replayed} | to_json(r.logged | r.row)
            for r in runs
        ],
        "cells": pooled,
    }


def write_tables(folder: Path, table: dict[str, Any]) -> None:
    """A table as JSON, CSV, Markdown and a picture."""
    files.write_json(folder / "table.json", table)  # first: a mistake below costs no measuring
    files.write_text(folder / "tables.md", "\n\n".join(markdown(table)) + "\n")
    keys = list(dict.fromkeys(key for cell in table["cells"] for key in cell["cell"]))
    figures = [key for key in table["runs"][0] if key not in ("cell", "seed", "replayed")]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    shown = default_columns(table)
    writer.writerow([*keys, "seed", "replayed", *figures, *shown])
    for run in table["runs"]:
        values = [run[key][kind_of(run[key])] for key in figures]
        values += [of_run(table, run, path) for path in shown]
        texts = ["" if value is None else f"{value:.4f}" for value in values]
        writer.writerow(
            [*(run["cell"].get(k, "") for k in keys), run["seed"], run["replayed"], *texts]
        )
    files.write_text(folder / "table.csv", lines.getvalue())
    for name, text in {
        "picture": sweep_plot(table),
        **instrument_plots(named_cells(table)),
    }.items():
        files.write_text(folder / f"{name}.svg", text)


def of_run(table: dict[str, Any], run: dict[str, Any], path: str) -> float | None:
    """One run's part of a figure that its cell has pooled over the seeds."""
    cell = next(cell for cell in table["cells"] if cell["cell"] == run["cell"])
    figure, seeds = at(cell, path), table["spec"]["seeds"]
    pooled = figure.get("runs") or [figure[kind_of(figure)]]
    found: float | None = pooled[seeds.index(run["seed"])]
    return found


def same_questions(a: Share, b: Share) -> bool:
    """Whether two shares are of the same questions, and know so."""
    return bool(a.flags) and [topic for topic, _ in a.flags] == [topic for topic, _ in b.flags]


def out_argument(p: argparse.ArgumentParser) -> None:
    """The option --out."""
    default = Path("out/sweeps")
    p.add_argument(
        "--out", type=Path, default=default, help=f"folder of all sweeps (default {default})"
    )


def main() -> None:
    """Runs one command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sweep", type=Path, help="the TOML file")
    out_argument(p)
    p.add_argument("--device", default="auto", help="for measuring: auto (default), cpu, cuda, ...")
    with one_line_errors():
        a = p.parse_args()
        folder = run(a.sweep, a.out, a.device)
        say((folder / "tables.md").read_text(encoding="utf-8"))
        say(f"table: {folder}")


if __name__ == "__main__":
    main()
