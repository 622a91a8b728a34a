"""Training speed: tokens/s, MFU, peak memory, and time from process start to the first step.

Ours is train_pretrain.py and nanoGPT is its own train.py, each as its users run it; nanochat is its
GPT and its optimizer in a plain loop. Ours comes twice: `gpt2` made the very network of nanoGPT
(no biases, exact GELU) with AdamW, and `modern` with Muon. Tokens/s leave out the first ten steps,
and with them compilation. Where a case has several micro-batch sizes, each project runs with all
of them once, and the rounds are run with the best for each. --text is tinyshakespeare.txt, say;
without it the ids are random.

python -m bench.train --text tinyshakespeare.txt --nanogpt DIR --nanochat DIR
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import inputs, peers
from bench.peers import WARM_UP
from bench.rounds import (
    LAUNCH,
    ROOT,
    Bench,
    Figures,
    Output,
    WorkerError,
    arguments,
    interleave,
    opened,
    parse,
    sizes,
    start,
    without_folders,
)
from model.gpt import GPT, ModelConfig
from runtime.cli import one_line_errors
from runtime.files import read_meta
from training.log import read_metrics


@dataclass(frozen=True)
class Case:
    """A model and a step: sizes, rows per step, and the micro-batch sizes to try."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    micro_batch_sizes: tuple[int, ...]
    vocab_size: int
    steps: int
    tokenizer: str = "byte"
    """Of a text; nanoGPT then has its own characters ("byte") or the same ids (any other)."""


CASES = {
    "4x128": Case(4, 4, 128, 64, 12, (12,), 261, 100),
    "4x192": Case(4, 4, 192, 256, 16, (16,), 4096, 30, "bpe:4096"),
    "124M": Case(12, 12, 768, 1024, 128, (16, 32, 64), 50304, 40, "gpt2"),
    "350M": Case(24, 16, 1024, 1024, 64, (8, 16, 32), 50304, 30, "gpt2"),
    "quick": Case(2, 2, 32, 16, 4, (4,), 261, WARM_UP + 2),
}
OURS = {
    "ours, gpt2, AdamW": [
        *("--model.recipe=gpt2", "--model.bias=false", "--model.activation=gelu_exact"),
        *("--optim.optimizer=adamw", "--optim.lr=1e-3", "--optim.weight_decay=0.1"),
    ],
    "ours, modern, Muon": ["--model.recipe=modern", "--optim.optimizer=muon"],
}


def nanogpt_dataset(bench: Bench, tokenizer: str, text: Path | None, prepared: Path) -> str:
    """Makes nanoGPT's data set in its tree: its own characters of a text, or our ids."""
    tree = bench.peers["nanoGPT"]
    if text is None or tokenizer != "byte":
        return peers.nanogpt_data(tree, prepared)
    folder = tree / "data" / "shakespeare_char"
    inputs.plain(text, folder / "input.txt")
    start([LAUNCH, folder / "prepare.py"], cwd=tree)
    return folder.name


def train_ours(bench: Bench, case: Case, name: str, prepared: Path, micro: int) -> Figures:
    """Runs train_pretrain.py once."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as run:
        command: list[str | Path] = [
            *(LAUNCH, ROOT / "train_pretrain.py"),
            *OURS[name],
            *(f"--model.{key}={value}" for key, value in sizes(case).items()),
            f"--optim.steps={case.steps}",
            f"--data.path={prepared}",
            f"--data.batch_size={case.batch_size}",
            f"--data.micro_batch_size={micro}",
            f"--data.val_tokens={micro * case.block_size}",
            f"--run.dir={run}",
            f"--run.device={bench.device}",
            f"--run.compile={'on' if bench.options.compile else 'off'}",
            "--run.log_every=1",
            f"--run.eval_every={case.steps}",
            f"--run.save_every={case.steps}",
        ]
        output = start(command, env=cache(bench, name))
        rows = {row["step"]: row for row in read_metrics(Path(run) / "metrics.jsonl")}
    first, last = rows[WARM_UP], rows[case.steps]
    return {
        # By the clock of the whole loop: data, logging and all.
        "tokens_per_second": (last["tokens"] - first["tokens"])
        / (last["seconds"] - first["seconds"]),
        "start_seconds": output.first("step 1/"),
        "peak_memory": output.peak_memory(),
    }


def train_nanogpt(bench: Bench, case: Case, dataset: str, micro: int) -> Figures:
    """Runs nanoGPT's train.py once: its CPU recipe with the case's sizes."""
    output = nanogpt(
        bench,
        dataset=dataset,
        compile=bench.options.compile,
        eval_interval=10**9,  # it evaluates before the first step in any case
        log_interval=1,
        batch_size=micro,
        gradient_accumulation_steps=case.batch_size // micro,
        max_iters=case.steps,
        lr_decay_iters=case.steps,
        warmup_iters=0,
        **sizes(case),
    )
    seconds = [s for i, s in peers.iterations(output).items() if i >= WARM_UP]
    return {
        "tokens_per_second": len(seconds) * case.batch_size * case.block_size / sum(seconds),
        "start_seconds": output.first("iter 0:"),
        "peak_memory": output.peak_memory(),
    }


def nanogpt(bench: Bench, **options: Any) -> Output:
    """Runs nanoGPT's train.py with the options of its README's CPU recipe and those given."""
    fixed = {"device": bench.device, "eval_iters": 20, "dropout": 0.0}
    words = [f"--{key}={value}" for key, value in (fixed | options).items()]
    tree = bench.peers["nanoGPT"]
    command: list[str | Path] = [LAUNCH, "train.py", "config/train_shakespeare_char.py", *words]
    return start(command, cwd=tree, env=cache(bench, "nanoGPT"))


def train_nanochat(bench: Bench, case: Case, prepared: Path, micro: int) -> Figures:
    """Runs the loop around nanochat's modules once."""
    n_vocab = read_meta(prepared)["tokenizer"]["n_vocab"]
    spec = {
        "tree": str(bench.peers["nanochat"]),
        "sizes": {**sizes(case), "vocab_size": n_vocab},
        "device": bench.device,
        "tokens": str(prepared / "train.bin"),
        "batch_size": case.batch_size,
        "micro_batch_size": micro,
        "steps": case.steps,
        "compiled": bench.options.compile,
    }
    switches = peers.nanochat_environment(bench.device, bench.options.compile)
    output = start(
        ["-m", "bench.peers", json.dumps(spec)], env={**cache(bench, "nanochat"), **switches}
    )
    return output.last_json() | {"start_seconds": output.first(peers.FIRST_STEP)}


def cache(bench: Bench, name: str) -> dict[str, str]:
    """A project's own cache of compiled code for all its runs, empty at the beginning."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(bench.folder / "compiled" / name.replace(" ", "-"))}


def completed(bench: Bench, case: Case, run: Callable[[int], Figures]) -> Callable[[int], Figures]:
    """A run with MFU, by one formula for all, where the device's peak is known.

    The first compiled run of a micro-batch size fills the cache: its start is a figure of its own.
    """
    with torch.device("meta"):  # the recipes multiply alike, and nanochat's network nearly so
        flops = GPT(ModelConfig(**sizes(case)), case.vocab_size).flops_per_token()
    peak = bench.machine["peak_flops"]
    seen: set[int] = set()

    def wrapped(micro: int) -> Figures:
        figures = run(micro)
        if bench.options.compile and micro not in seen:
            figures["cold_start_seconds"] = figures.pop("start_seconds")
        seen.add(micro)
        speed = figures["tokens_per_second"]
        if peak is not None and speed is not None:
            figures["mfu"] = speed * flops / peak
        return figures

    return wrapped


def ignoring_pass(run: Callable[[int], Figures], micro: int, i: int) -> Figures:
    """The same run in every pass."""
    return run(micro)


def best(
    name: str, run: Callable[[int], Figures], sizes: tuple[int, ...]
) -> tuple[int, dict[str, Any]]:
    """The fastest micro-batch size, and what each gave; nothing is tried where there is no choice.

    A size that fails, for lack of memory most likely, is said and left out.
    """
    tried: dict[str, Any] = {}
    for size in sizes if len(sizes) > 1 else ():
        try:
            tried[str(size)] = run(size)
        except WorkerError as error:
            tried[str(size)] = {"tokens_per_second": 0.0, "error": without_folders(str(error))}
        print(f"{name}, micro-batch {size}: {tried[str(size)]}", flush=True)
    speeds = {size: found["tokens_per_second"] for size, found in tried.items()}
    return int(max(speeds, key=speeds.__getitem__, default=str(sizes[0]))), tried


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = arguments(__doc__ or "", [*CASES])
    p.add_argument("--compile", action="store_true", help="with torch.compile, all of them")
    p.add_argument("--steps", type=int, help="per run, over ten; the case has a default")
    p.add_argument("--micro-batch", type=int, nargs="+", help="sizes to try instead of the case's")
    return p


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    with one_line_errors(), opened("train", a := parse(parser(), argv)) as bench:
        at = "quick" if a.quick else a.case or ("124M" if bench.on_cuda else "4x128")
        given = asdict(CASES[at])
        given["steps"] = a.steps or given["steps"]
        given["micro_batch_sizes"] = tuple(a.micro_batch or given["micro_batch_sizes"])
        case = Case(**given)
        if case.steps <= WARM_UP:
            raise ValueError(f"--steps is {case.steps}; the first {WARM_UP} do not count")
        if bad := [m for m in case.micro_batch_sizes if m < 1 or case.batch_size % m]:
            raise ValueError(f"--micro-batch {bad[0]} does not divide {case.batch_size} rows")
        prepared = bench.folder / "tokens"
        if a.text is None:
            inputs.random_text(prepared, case.vocab_size, 1_000_000)
        else:
            inputs.prepared(a.text, prepared, case.tokenizer)
        trainers: dict[str, Callable[[int], Figures]] = {
            name: partial(train_ours, bench, case, name, prepared) for name in OURS
        }
        if "nanoGPT" in bench.peers:
            dataset = nanogpt_dataset(bench, case.tokenizer, a.text, prepared)
            trainers["nanoGPT"] = partial(train_nanogpt, bench, case, dataset)
        if "nanochat" in bench.peers:
            trainers["nanochat"] = partial(train_nanochat, bench, case, prepared)
        chosen: dict[str, int] = {}
        tried: dict[str, Any] = {}
        workers: dict[str, Callable[[int], Figures]] = {}
        for name, train in trainers.items():
            run = completed(bench, case, train)
            chosen[name], tried[name] = best(name, run, case.micro_batch_sizes)
            workers[name] = partial(ignoring_pass, run, chosen[name])
        rows = interleave(workers, bench.passes)
        for row in rows:
            row["micro_batch_size"] = chosen[row["name"]]
        settings = {
            **given,
            "text": a.text.name if a.text else "random ids",
            "compiled": a.compile,
            "micro_batch_search": tried,
        }
        bench.write(at + ("-compiled" if a.compile else ""), settings, rows)


if __name__ == "__main__":
    main()
