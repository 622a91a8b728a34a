"""Several processes that train one model, as `torchrun` starts them; one process needs none of it.

All processes compute the same step: the order of the data is a function of (seed, step), so each
knows the whole batch and takes its part of it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.gpt import GPT, Batch


def join(device: str) -> None:
    """Joins the processes that torchrun started, if it did; only the first one prints.

    Each takes a CUDA device of its own where `device`, a config's, is "cuda", or "auto" finds some.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Long, because the others wait while the first process evaluates and saves.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=4))
    atexit.register(dist.destroy_process_group)
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that prints, logs, evaluates and saves."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the block before the others do."""
    if not is_first():
        dist.barrier()
    yield
    if is_first() and world_size() > 1:
        dist.barrier()


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over the processes."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def agree(value: bool, due: bool, device: torch.device) -> bool:
    """Whether `value` is true in any process; several ask each other only where it is `due`."""
    if world_size() == 1:
        return value
    return due and bool(total(torch.tensor(float(value), device=device)))


def distribute(model: GPT) -> nn.Module:
    """The model whose backward pass averages the gradients over the processes."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False)


def share(micro_batches: list[Batch]) -> list[Batch]:
    """What of a step's micro-batches this process computes; never nothing.

    Whole micro-batches where there are enough for all, else rows of each of them.
    """
    n = world_size()
    if n == 1:
        return micro_batches
    rank = dist.get_rank()
    if len(micro_batches) >= n:
        return micro_batches[rank::n]
    parts = [batch.map(lambda t: t[rank::n]) for batch in micro_batches]
    parts = [part for part in parts if len(part.idx)]
    if parts:
        return parts
    first = micro_batches[0].map(lambda t: t[:1])
    return [first._replace(weights=torch.zeros_like(first.targets, dtype=torch.float32))]
