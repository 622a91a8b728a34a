"""Instruction-tuning speed: useful tokens/s, prompts and replies without their padding.

One epoch over the same conversations, with one model and AdamW, in three ways: `SFTData`'s batches
of like length with the head run on supervised tokens alone; random batches padded to their
longest; and random batches padded to the model's context. The last two compute the loss as is
usual: logits everywhere, and targets that are ignored. Conversations are random ids whose lengths
are log-normal (median 120, sigma .7, 8 to 1024); the second half of each is the reply.

python -m bench.sft
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import inputs
from bench.launch import peak_memory
from bench.rounds import Figures, arguments, interleave, opened, parse, sizes, worker
from data.sft import SFTData, SFTDataConfig
from data.shards import load_examples
from data.tokenizer import Tokenizer
from model.gpt import GPT, ModelConfig
from runtime.cli import one_line_errors
from runtime.device import autocast, set_up
from training.optim import OptimConfig, build_optimizers
from training.step import train_step

IGNORED = -100
NAMES = ("ours, bucketed", "padded to longest", "padded to context")
Pairs = list[tuple[Tensor, Tensor]]  # (ids, targets) of the forward passes of a step, each (B, T)


@dataclass(frozen=True)
class Case:
    """A model, rows per step and per forward pass, and steps per epoch."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    micro_batch_size: int
    steps: int = 8
    batch_size: int = 32
    block_size: int = 1024


CASES = {
    "4x128": Case(4, 4, 128, 1088, 32),
    "4x128-32k": Case(4, 4, 128, 32768, 8),
    "124M": Case(12, 12, 768, 50304, 16, 40),
    "quick": Case(2, 2, 32, 320, 4, steps=2, batch_size=4, block_size=64),
}


def draw_lengths(case: Case) -> list[int]:
    """Tokens of each conversation of an epoch."""
    drawn = np.random.default_rng(1).lognormal(np.log(120), 0.7, size=case.steps * case.batch_size)
    return [int(n) for n in drawn.clip(8, case.block_size)]


def plain_batches(
    rows: list[tuple[np.ndarray, np.ndarray]], case: Case, to_context: bool
) -> Iterator[Pairs]:
    """An epoch of random batches, padded at the right."""
    order = np.random.default_rng(1).permutation(len(rows))
    for step in np.split(order, case.steps):
        pairs: Pairs = []
        for chosen in np.split(step, case.batch_size // case.micro_batch_size):
            longest = max(len(rows[i][0]) - 1 for i in chosen)
            T = case.block_size if to_context else longest
            idx = torch.zeros(len(chosen), T, dtype=torch.long)
            targets = torch.full_like(idx, IGNORED)
            for r, i in enumerate(chosen):
                ids, mask = (torch.from_numpy(x.astype(np.int64)) for x in rows[i])
                idx[r, : len(ids) - 1] = ids[:-1]
                targets[r, : len(ids) - 1] = ids[1:].masked_fill(mask[1:] == 0, IGNORED)
            pairs.append((idx, targets))
        yield pairs


def plain_step(model: GPT, optimizers: list[torch.optim.Optimizer], pairs: Pairs) -> None:
    """A step as projects usually take it: logits of every position, some targets ignored."""
    device = model.wte.weight.device
    supervised = sum(int((targets != IGNORED).sum()) for _, targets in pairs)
    loss = torch.zeros((), device=device)
    for idx, targets in pairs:
        with autocast(device):
            logits = model(idx.to(device)).flatten(0, 1)
            wanted = targets.to(device).flatten()
            part = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        torch.autograd.backward(part / supervised)
        loss += part.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    float(loss)  # waits for the device, as ours does


def measure(name: str, folder: str, case: dict[str, int], device: str) -> Figures:
    """What one worker measures, in a fresh process: an epoch, after a warm-up."""
    c, where = Case(**case), set_up(device, seed=1)
    tokenizer = Tokenizer.load(folder)
    model = GPT(ModelConfig(**sizes(c)), tokenizer.n_vocab).to(where)
    optim = OptimConfig(2 * c.steps, optimizer="adamw", lr=1e-3)
    optimizers = build_optimizers(model, optim)
    data_config = SFTDataConfig(folder, c.batch_size, c.micro_batch_size)
    data = SFTData(Path(folder), data_config, tokenizer, c.block_size, seed=1)
    rows = load_examples(Path(folder), "train")
    computed = 0

    def ours(steps: int) -> None:
        nonlocal computed
        for step in range(steps):
            batches = data.micro_batches(step)
            computed += sum(batch.idx.numel() for batch in batches)
            train_step(model, optimizers, batches, step, optim)

    def plain(steps: int) -> None:
        nonlocal computed
        batches = plain_batches(rows, c, to_context=name == "padded to context")
        for _, pairs in zip(range(steps), batches, strict=False):
            computed += sum(idx.numel() for idx, _ in pairs)
            plain_step(model, optimizers, pairs)

    epoch: Callable[[int], None] = ours if name.startswith("ours") else plain
    # On CUDA all of it once, so that the allocator has met every shape.
    epoch(c.steps if where.type == "cuda" else 1)
    computed, begin = 0, time.perf_counter()
    epoch(c.steps)
    if where.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    useful = sum(len(ids) - 1 for ids, _ in rows)
    return {
        "useful_tokens_per_second": useful / seconds,
        "useful_share": useful / computed,
        "peak_memory": peak_memory(),
    }


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    p = arguments(__doc__ or "", [*CASES])
    p.add_argument("--steps", type=int, help="per epoch; the case has a default")
    a = parse(p, argv)
    with one_line_errors():
        if a.one:
            print(json.dumps(measure(**json.loads(a.one))))
            return
        with opened("sft", a) as bench:
            at = "quick" if a.quick else a.case or ("124M" if bench.on_cuda else "4x128")
            case = Case(**asdict(CASES[at]) | ({"steps": a.steps} if a.steps else {}))
            folder = bench.folder / "conversations"
            inputs.random_conversations(folder, case.vocab_size, draw_lengths(case))
            fixed = {"folder": str(folder), "case": asdict(case), "device": bench.device}
            workers = {name: worker("bench.sft", name=name, **fixed) for name in NAMES}
            settings = {
                **asdict(case),
                "text": "random ids, log-normal lengths",
                "recipe": "modern",
            }
            bench.write(at, settings, interleave(workers, bench.passes))


if __name__ == "__main__":
    main()
