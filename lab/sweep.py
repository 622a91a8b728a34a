"""Config keys on a grid, with seeds: one run after another, one table, one picture.

A sweep is a TOML file. `[world]`, `[pretrain]`, `[more]`, `[qa]` and `[sft]` hold what is fixed,
`[grid]` the values of each varied key (all combinations), or `[[cells]]` the combinations one by
one. A key is that of the script behind the name of its stage: "sft.data.examples". The stages:

    world      python -m data.prepare world
    pretrain   train_pretrain.py
    more       train_pretrain.py again, from the base's weights; left out without keys or steps
    qa         the world's Q&A with other people in it (`World.conversations`); else its own
    sft        train_sft.py

What two cells share is run once. Give the same command again after an interruption: a finished
run is not run again, and a killed one goes on.

python -m lab.sweep configs/sweeps/examples.toml --out out/sweeps
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import fingerprint, one_line_errors, read_json, sha256_file, write_json
from data.prepare import prepare_world
from data.world import SPLITS, World, WorldConfig
from lab.knowledge import complete, draw, measure
from lab.pair import Pair, open_pair
from lab.plots import sweep_plot
from lab.stats import Share, pool, to_json
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain
from train_sft import SFTConfig
from train_sft import main as sft
from training.config import parse_config
from training.runtime import environment, pick_device

STAGES = ("world", "pretrain", "more", "qa", "sft")
Settings = dict[str, dict[str, Any]]  # of each stage, by key
Row = dict[str, Share]


def read_sweep(path: Path) -> dict[str, Any]:
    """A sweep's TOML file.

    Raises:
        ValueError: it is missing, is not TOML, or has keys that mean nothing here.
    """
    try:
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    known = {"about", "seeds", "questions", "grid", "cells", *STAGES}
    if unknown := sorted(set(spec) - known):
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    for cell in cells_of(spec):
        for key in cell:
            if key.partition(".")[0] not in STAGES or not key.partition(".")[2]:
                raise ValueError(f"{path}: {key} does not begin with a stage: {', '.join(STAGES)}")
    return spec


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


class Store:
    """The folder in which every stage of every sweep has a place of its own, by its settings."""

    def __init__(self, folder: Path, settings: Settings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        at: list[Any] = [seed]
        self.place: dict[str, Path] = {}
        for stage in STAGES:
            # The world's own Q&A, and no further pretraining, are no stage.
            if stage in ("world", "pretrain", "sft") or settings[stage]:
                at = [*at, stage, settings[stage]]
            self.place[stage] = folder / "runs" / f"{stage}-{fingerprint(at)}"

    def check(self) -> None:
        """Raises ValueError for what no stage would take."""
        try:
            WorldConfig(seed=self.seed, **self.settings["world"])
            World(WorldConfig(people=2, unseen=0)).conversations(**self.settings["qa"])
        except TypeError as error:  # an unknown key
            raise ValueError(f"[world] or [qa]: {error}") from None
        self.pretrain_config()
        self.more_config()
        self.sft_config()

    def pretrain_config(self) -> PretrainConfig:
        """The first pretraining."""
        return self._pretrain("pretrain", {})

    def more_config(self) -> PretrainConfig | None:
        """The second one, if there is any."""
        steps = self.settings["more"].get("optim.steps")
        if not steps:
            return None
        return self._pretrain("more", {"init_from": str(self.place["pretrain"])})

    def _pretrain(self, stage: str, values: dict[str, Any]) -> PretrainConfig:
        given = self.settings["pretrain"] | self.settings[stage] | values
        place = {"data.path": str(self.place["world"]), "run.dir": str(self.place[stage])}
        return parse_config(PretrainConfig, options(given | place | {"run.seed": self.seed}))

    def sft_config(self) -> SFTConfig:
        """Instruction tuning from the last base."""
        base = self.place["more" if self.more_config() else "pretrain"]
        data = self.place["world"]
        if self.settings["qa"]:
            data = self.place["qa"].with_suffix(".jsonl")
        place = {"base": str(base), "data.path": str(data), "run.dir": str(self.place["sft"])}
        given = self.settings["sft"] | place | {"run.seed": self.seed}
        return parse_config(SFTConfig, options(given))


def train(store: Store, device: str) -> Pair:
    """Runs what is not yet there of one cell at one seed."""
    config = WorldConfig(seed=store.seed, **store.settings["world"])
    prepare_world(config, store.place["world"], "bpe:2048", 0.02)
    finish(pretrain, store.pretrain_config())
    if more := store.more_config():
        finish(pretrain, more)
    if store.settings["qa"]:
        conversations = World(config).conversations(**store.settings["qa"])
        text = "".join(json.dumps({"messages": c}) + "\n" for c in conversations)
        store.place["qa"].with_suffix(".jsonl").write_text(text, encoding="utf-8")
    tuning = store.sft_config()
    finish(sft, tuning)
    return open_pair(tuning.base, tuning.run.dir, device, None)


def finish(main: Callable[[Any], Path], config: Any) -> None:
    """Trains to the end, or stops the whole sweep as Ctrl-C has stopped this run."""
    if main(config).name != f"step_{config.optim.steps:06d}":
        raise KeyboardInterrupt


def measure_row(pair: Pair, n: int) -> Row:
    """The figures of one run: the base's cloze, and what the instruct model knows and does."""
    assert pair.world is not None
    rng = random.Random(f"row {pair.world.config.seed}")
    row: Row = {}
    for split in SPLITS:
        facts = draw(pair.world, split, n, rng)
        row[f"base_cloze_{split}"] = complete(pair.base, pair.world, facts, rng)["all"]
    found = measure(pair.instruct, pair.world, n, thorough=False)
    for split in SPLITS:
        row[f"cloze_{split}"] = found.cloze[split]["all"]
        row[f"answers_{split}"] = found.answers[split].right["all"]
        row[f"rephrased_{split}"] = found.rephrased[split].right["all"]
        row[f"abstains_{split}"] = found.answers[split].abstains
        row[f"stops_{split}"] = found.answers[split].stops
    return row


def cached_row(pair: Pair, n: int, folder: Path) -> Row:
    """`measure_row`, kept by what was measured and with which code."""
    code = [sha256_file(f) for f in sorted(Path(__file__).parent.glob("*.py"))]
    files = [c.meta["files"] for c in (pair.base, pair.instruct)]
    path = folder / "rows" / f"{fingerprint([files, n, code])}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {k: [s.hits, s.n] for k, s in measure_row(pair, n).items()})
    return {k: Share(*counts) for k, counts in read_json(path).items()}


def run(path: Path, out: Path, device: str) -> Path:
    """Runs a sweep; returns the folder of its table.json, table.csv and picture.svg."""
    spec = read_sweep(path)
    cells, seeds, n = cells_of(spec), spec.get("seeds", [1]), spec.get("questions", 200)
    plan = [
        (cell, seed, Store(out, settings_of(spec, cell), seed)) for cell in cells for seed in seeds
    ]
    for _, _, store in plan:  # a mistake in the last cell shows before the first one trains
        store.check()
    rows: list[tuple[dict[str, Any], int, Row]] = []
    for i, (cell, seed, store) in enumerate(plan):
        print(f"== run {i + 1} of {len(plan)}: seed {seed}, {label(cell) or 'no key varied'}")
        rows.append((cell, seed, cached_row(train(store, device), n, out)))
    folder = out / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder, spec, cells, rows, device)
    return folder


def label(cell: dict[str, Any]) -> str:
    """A cell in words."""
    return ", ".join(f"{key}={value}" for key, value in cell.items())


def write_tables(
    folder: Path,
    spec: dict[str, Any],
    cells: list[dict[str, Any]],
    rows: list[tuple[dict[str, Any], int, Row]],
    device: str,
) -> None:
    """One row a run, and the seeds of a cell pooled; as JSON, CSV and a picture."""
    pooled = [pool([row for c, _, row in rows if c == cell]) for cell in cells]
    table = {
        "about": spec.get("about", ""),
        "spec": spec,
        "environment": environment(pick_device(device)),
        "runs": [{"cell": c, "seed": seed, **to_json(row)} for c, seed, row in rows],
        "cells": [{"cell": c, **to_json(row)} for c, row in zip(cells, pooled, strict=True)],
    }
    write_json(folder / "table.json", table)
    keys = list(dict.fromkeys(key for cell in cells for key in cell))
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow([*keys, "seed", *rows[0][2], "n"])
        for cell, seed, row in rows:
            shares = [f"{s.value:.4f}" for s in row.values()]
            writer.writerow(
                [*(cell.get(k, "") for k in keys), seed, *shares, spec.get("questions", 200)]
            )
    (folder / "picture.svg").write_text(sweep_plot(table), encoding="utf-8")


def main() -> None:
    """Runs one command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("sweep", type=Path, help="the TOML file")
    p.add_argument("--out", type=Path, required=True, help="folder of all sweeps: they share runs")
    p.add_argument("--device", default="auto", help="for measuring: auto (default), cpu, cuda, ...")
    with one_line_errors():
        a = p.parse_args()
        print(f"table: {run(a.sweep, a.out, a.device)}")


if __name__ == "__main__":
    main()
