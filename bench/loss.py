"""Wall time and tokens to a fixed validation loss: the one that nanoGPT's own recipe ends with.

nanoGPT runs its recipe to the end (of `shakespeare`: its README's for a CPU, 2000 iterations). Ours
runs the shipped configs with their schedule fitted to --steps, once per seed. The time of a row
goes from process start to the first evaluation that is at the loss or below it; data preparation
is not in it. `books` gives both projects the same GPT-2 ids of a .jsonl.gz, and needs a GPU.
Without nanoGPT, give --target, or see how far ours gets.

python -m bench.loss --text tinyshakespeare.txt --nanogpt DIR
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench import inputs, peers
from bench.rounds import (
    LAUNCH,
    ROOT,
    Bench,
    Figures,
    Row,
    arguments,
    interleave,
    opened,
    parse,
    start,
)
from bench.train import cache, nanogpt, nanogpt_dataset
from runtime.cli import one_line_errors
from training.log import read_metrics

Curve = list[tuple[float, int, float]]  # seconds since process start, tokens, validation loss


@dataclass(frozen=True)
class Case:
    """Our configs by recipe, each with options over it; our steps; what nanoGPT is run with."""

    ours: dict[str, list[str]]
    steps: int
    tokenizer: str
    nanogpt: dict[str, Any] = field(default_factory=dict)


def recipe(config: str, *options: str) -> list[str]:
    """The command line of a shipped config."""
    return [f"--config={ROOT / 'configs' / config}", *options]


def shape(n_layer: int, n_head: int, n_embd: int, block_size: int) -> dict[str, int]:
    """A model's sizes as nanoGPT's options."""
    return {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}


MUON = ["--optim.optimizer=muon", "--optim.lr=3e-3", "--optim.muon_lr=0.02"]
WSD = ["--optim.schedule=wsd", "--optim.decay_fraction=0.5", "--optim.final_lr_fraction=0"]
TINY = [f"--model.{k}={v}" for k, v in shape(2, 2, 32, 16).items()]
CASES = {
    "shakespeare": Case(
        {
            "gpt2": recipe("shakespeare/gpt2.toml", "--data.val_tokens=50000"),
            "modern": recipe("shakespeare/modern.toml", "--data.val_tokens=50000"),
        },
        600,
        "byte",
        shape(4, 4, 128, 64) | {"batch_size": 12, "max_iters": 2000, "lr_decay_iters": 2000},
    ),
    "books": Case(
        {
            "gpt2": recipe("books/pretrain_gpu.toml"),
            "modern": recipe("books/pretrain_gpu.toml", "--model.recipe=modern", *MUON, *WSD),
        },
        600,
        "gpt2",
        shape(12, 12, 768, 1024)
        | {"batch_size": 32, "gradient_accumulation_steps": 4, "max_iters": 600}
        | {"lr_decay_iters": 600, "warmup_iters": 60, "learning_rate": 6e-4, "min_lr": 6e-5}
        | {"beta2": 0.95, "dropout": 0.1, "eval_interval": 100},
    ),
    "quick": Case(
        {name: recipe(f"shakespeare/{name}.toml", *TINY) for name in ("gpt2", "modern")},
        4,
        "byte",
        shape(2, 2, 32, 16)
        | {"batch_size": 12, "max_iters": 4, "lr_decay_iters": 4, "warmup_iters": 0}
        | {"eval_interval": 2, "eval_iters": 2},
    ),
}


def train_ours(
    bench: Bench,
    case: Case,
    name: str,
    prepared: Path,
    curves: dict[tuple[str, int], Curve],
    i: int,
) -> Figures:
    """Runs train_pretrain.py once, with the seed of the pass, and keeps its curve."""
    a = bench.options
    run = bench.folder / f"{name}-{i}"
    command: list[str | Path] = [
        *(LAUNCH, ROOT / "train_pretrain.py"),
        *case.ours[name],
        f"--data.path={prepared}",
        f"--optim.steps={a.steps or case.steps}",
        *(f"--optim.warmup_steps={w}" for w in [a.warmup_steps] if w is not None),
        f"--run.eval_every={a.eval_every or max(1, (a.steps or case.steps) // 20)}",
        f"--run.dir={run}",
        f"--run.device={bench.device}",
        f"--run.seed={a.seeds[i]}",
        *(f"--{override}" for override in a.override),
    ]
    output = start(command, env=cache(bench, name))
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row]
    shutil.rmtree(run)
    curves[f"ours, {name}", i] = [
        (output.first(f"step {row['step']}/"), row["tokens"], row["val_loss"]) for row in rows
    ]
    return {"total_seconds": output.seconds, "val_loss": rows[-1]["val_loss"]}


def train_nanogpt(bench: Bench, case: Case, dataset: str, i: int) -> Figures:
    """Runs nanoGPT's recipe once. Its seed is fixed."""
    compiled = bench.on_cuda  # as each project's default for the device
    output = nanogpt(bench, dataset=dataset, compile=compiled, log_interval=1, **case.nanogpt)
    last, losses = case.nanogpt["max_iters"], peers.val_losses(output)
    every, seconds = case.nanogpt.get("eval_interval", 250), peers.iterations(output)
    plain = {step: s for step, s in seconds.items() if step % every}
    # An iteration that evaluates is taken to train as long as the others.
    training = statistics.median(plain.values()) * (last - len(plain)) + sum(plain.values())
    rows = case.nanogpt["batch_size"] * case.nanogpt.get("gradient_accumulation_steps", 1)
    return {
        "seconds_to_loss": output.first(f"step {last}:"),
        "tokens_to_loss": last * rows * case.nanogpt["block_size"],
        "training_seconds": training,
        "total_seconds": output.seconds,
        "val_loss": losses[last],
    }


def settle(rows: list[Row], curves: dict[tuple[str, int], Curve], target: float) -> None:
    """Adds to each run of ours when it was first at the target, None where it never was."""
    for row in rows:
        for i, run in enumerate(row["runs"]):
            if run is None or (curve := curves.get((row["name"], i))) is None:
                continue
            reached = next((point for point in curve if point[2] <= target), None)
            run["seconds_to_loss"], run["tokens_to_loss"] = reached[:2] if reached else (None, None)
        times = [run["seconds_to_loss"] for run in row["runs"] if run]
        if None in times:
            there = len(times) - times.count(None)
            row["note"] = f"{there} of {len(times)} runs reached the loss"


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    p = arguments(__doc__ or "", [*CASES])
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="a run of ours for each")
    p.add_argument("--steps", type=int, help="our budget; the case has a default")
    p.add_argument("--warmup-steps", type=int, help="of our schedule; the config has a default")
    p.add_argument("--eval-every", type=int, help="our steps between evaluations (default: 1/20)")
    p.add_argument("--target", type=float, help="the loss, instead of what nanoGPT ends with")
    p.add_argument(
        "--override", nargs="+", default=[], metavar="KEY=VALUE", help="over our configs, for both"
    )
    a = parse(p, argv)
    with one_line_errors(), opened("loss", a) as bench:
        at = "quick" if a.quick else a.case or ("books" if bench.on_cuda else "shakespeare")
        case, text = CASES[at], a.text
        if a.quick:
            a.seeds = a.seeds[:1]
            text = text or inputs.random_words(bench.folder / "words.txt", 20_000)
        if text is None:
            raise ValueError("--text is missing: tinyshakespeare.txt, or another text, to train on")
        prepared = inputs.prepared(text, bench.folder / "tokens", case.tokenizer)
        curves: dict[tuple[str, int], Curve] = {}
        workers: dict[str, Callable[[int], Figures]] = {
            f"ours, {name}": partial(train_ours, bench, case, name, prepared, curves)
            for name in case.ours
        }
        if "nanoGPT" in bench.peers:
            dataset = nanogpt_dataset(bench, case.tokenizer, text, prepared)
            workers["nanoGPT"] = partial(train_nanogpt, bench, case, dataset)
        rows = interleave(workers, len(a.seeds))
        target = a.target
        if target is None and "nanoGPT" in bench.peers:
            target = next((run["val_loss"] for run in rows[-1]["runs"] if run), None)
        if target is not None:
            settle(rows, curves, target)
        settings = {
            "text": text.name,
            "target": target,
            "seeds": a.seeds,
            "steps": a.steps or case.steps,
            "overrides": a.override,
            "nanogpt": case.nanogpt,
            "curves": {f"{name}, pass {i + 1}": curve for (name, i), curve in curves.items()},
        }
        bench.write(at, settings, rows)


if __name__ == "__main__":
    main()
