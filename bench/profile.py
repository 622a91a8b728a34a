"""Where the time of one training step goes: torch.profiler's operators, the largest first.

python -m bench.profile --recipe modern --block 128 --batch 16 --vocab 1088
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from model.gpt import GPT, Batch, ModelConfig
from runtime.cli import one_line_errors
from runtime.device import set_up
from training.optim import OptimConfig, build_optimizers
from training.step import train_step


def run(a: argparse.Namespace) -> None:
    """Profiles some steps on random ids and prints a table in Markdown."""
    device = set_up(a.device, 1)
    shape = {"n_layer": a.layers, "n_head": a.heads, "n_embd": a.width, "block_size": a.block}
    model = GPT(ModelConfig(recipe=a.recipe, **shape), a.vocab).to(device)
    config = OptimConfig(optimizer="adamw" if a.recipe == "gpt2" else "muon")
    optimizers = build_optimizers(model, config)
    idx = torch.randint(a.vocab, (a.batch, a.block + 1))
    batch = Batch(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    if a.compile:
        model.compile()

    def step() -> float:
        begin = time.perf_counter()
        # Made a float, so that a GPU has done the step.
        float(train_step(model, optimizers, [batch], 0, config).loss)
        return time.perf_counter() - begin

    for _ in range(5):
        step()
    seconds = statistics.median(step() for _ in range(a.steps))
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        for _ in range(a.steps):
            step()
    on_gpu = device.type == "cuda"
    costs = sorted(
        (
            (e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key)
            for e in profiler.key_averages()
        ),
        reverse=True,
    )
    total = sum(cost for cost, _, _ in costs)
    tokens, per_token = batch.idx.numel(), model.flops_per_token()
    print(
        f"{tokens / seconds:,.0f} tokens/s, {1e3 * seconds:.1f} ms a step, "
        f"{per_token * tokens / seconds / 1e9:,.0f} GFLOP/s by the formula of flops_per_token\n"
    )
    print("| operator | calls a step | ms a step | share |\n|---|---|---|---|")
    for cost, calls, name in costs[: a.rows]:
        per_step = f"{calls / a.steps:.0f} | {cost / 1e3 / a.steps:.2f}"
        print(f"| `{name}` | {per_step} | {cost / total:.1%} |")


def main() -> None:
    """Runs one command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--recipe", choices=("gpt2", "modern"), default="modern")
    for name, value in {"layers": 4, "heads": 4, "width": 128, "block": 128, "batch": 16}.items():
        p.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    p.add_argument("--vocab", type=int, default=1088, help="default 1088")
    p.add_argument("--steps", type=int, default=20, help="steps that are profiled (default 20)")
    p.add_argument("--rows", type=int, default=12, help="operators to show (default 12)")
    p.add_argument("--compile", action="store_true", help="compile the model first")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    with one_line_errors():
        run(p.parse_args())


if __name__ == "__main__":
    main()
