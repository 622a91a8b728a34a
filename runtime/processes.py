"""Several processes that train one model, as `torchrun` starts them; one process needs none of it.

All processes compute the same step: the order of the data is a function of (seed, step), so each
knows the whole batch and takes its part of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.gpt import GPT, Batch


def start_processes(device: str) -> str:
    """Joins the processes that torchrun started, if it did, and returns the device to use.

    Only the first one prints. Each takes a CUDA device of its own where `device`, a config's, is
    "cuda", or where it is "auto" and there is one.

    Raises:
        ValueError: a device that several processes cannot share out.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "LOCAL_RANK" not in os.environ:
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu"):
        raise ValueError(f"run.device is {device}; for several processes give cuda, cpu or auto")
    if dist.is_initialized():
        return device
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"{local + 1} processes or more, {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local)
    # Both kinds, so that what is asked of the processes need not wait for their GPUs. Patient,
    # because the others wait while the first one evaluates and saves.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=4))
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return device


def finish_processes() -> None:
    """Waits for the others and ends the process, if there are several; all have done their work."""
    if world_size() > 1:
        sum_over_processes(torch.zeros(()))
        exit_now(0)


def exit_now(code: int) -> NoReturn:
    """Ends one of several processes at once, whatever the others do.

    Taking the group down in order can hang where another has failed, and gloo's threads now and
    then abort in it (torch 2.13: "terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
        sum_over_processes(torch.zeros(()))
    yield
    if is_first():
        sum_over_processes(torch.zeros(()))


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over the processes; all of them must call it."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def any_process(value: bool) -> bool:
    """Whether `value` is true in any process; all of them must call it."""
    return value if world_size() == 1 else bool(sum_over_processes(torch.tensor(float(value))))


def distribute(model: GPT, seed: int, step: int) -> nn.Module:
    """The model whose backward pass averages the gradients over the processes.

    Dropout then differs between processes, and after a resume at another step.
    """
    if world_size() == 1:
        return model
    torch.manual_seed(
        int(np.random.SeedSequence([seed, step, dist.get_rank()]).generate_state(1)[0])
    )
    return DistributedDataParallel(model, broadcast_buffers=False)


def my_share(micro_batches: list[Batch]) -> list[Batch]:
    """What of a step's micro-batches this process computes; never nothing.

    Whole micro-batches where there are enough for all, else a part of the rows of each of them.
    """
    n = world_size()
    if n == 1:
        return micro_batches
    rank = dist.get_rank()
    if len(micro_batches) >= n:
        return micro_batches[rank::n]
    parts = [batch.map(lambda t: t[rank::n].contiguous()) for batch in micro_batches]
    parts = [part for part in parts if len(part.idx)]
    if parts:
        return parts
    first = micro_batches[0].map(lambda t: t[:1])
    return [first._replace(weights=torch.zeros_like(first.targets, dtype=torch.float32))]
