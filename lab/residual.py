"""The residual stream: what each layer leaves at each token, read, and written to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from data.tokenizer import Tokenizer
from model.gpt import GPT
from training.checkpoint import Checkpoint

ROWS = 64  # computed at once


@torch.inference_mode()
def read(checkpoint: Checkpoint, rows: Sequence[list[int]], places: Sequence[int]) -> Tensor:
    """The stream at one place of each row: (n_layer + 1, len(rows), C), in float64 on the CPU.

    Layer 0 is what goes into the first block, layer n what comes out of the n-th.
    """
    found = list[Tensor]()
    for i in range(0, len(rows), ROWS):
        chosen = rows[i : i + ROWS]
        width = max(map(len, chosen))
        padded = [row + [0] * (width - len(row)) for row in chosen]  # at the end: seen by no token
        at = torch.tensor(places[i : i + ROWS])
        with listening(checkpoint.model) as streams:
            checkpoint.model.hidden(torch.tensor(padded, device=checkpoint.model.wte.weight.device))
        each = torch.arange(len(chosen))
        found.append(torch.stack([stream.cpu()[each, at].double() for stream in streams]))
    return torch.cat(found, dim=1)


def name_tokens(row: list[int], name: str, tokenizer: Tokenizer) -> list[int]:
    """Places of the tokens that hold the last mention of a name in a row."""
    ends = list(accumulate(len(tokenizer.decode([token])) for token in row))
    start = tokenizer.decode(row).rindex(name)
    begins = [0, *ends]
    stop = start + len(name)
    return [i for i, end in enumerate(ends) if start < end and begins[i] < stop]


@contextlib.contextmanager
def listening(model: GPT) -> Iterator[list[Tensor]]:
    """Collects the stream (B, T, C) of the next forward pass, layer by layer."""
    streams = list[Tensor]()
    first = model.blocks[0].register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    after = [b.register_forward_hook(lambda _, args, x: streams.append(x)) for b in model.blocks]
    try:
        yield streams
    finally:
        for hook in (first, *after):
            hook.remove()


@contextlib.contextmanager
def changing(modules: Sequence[nn.Module], change: Callable[..., Tensor]) -> Iterator[None]:
    """Puts `change(module, arguments, output)` in place of what some modules give out."""
    hooks = [module.register_forward_hook(change) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
