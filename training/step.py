"""One optimizer step and one evaluation: the loss of the whole project is defined here."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.gpt import GPT, Batch, document_bounds
from runtime.device import autocast, has_bf16
from runtime.processes import my_share, sum_over_processes, world_size
from training.optim import OptimConfig, lr_factor, set_lr


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Its numbers stay on a GPU until somebody reads them, because reading waits for the step.

    Attributes:
        step: its number, 1 for the first.
        values: mean loss in nats and gradient norm before clipping, (2,).
        lr: AdamW's learning rate.
        tokens: positions in it, padding included.
        began: when, on the clock of time.perf_counter.
    """

    step: int
    values: Tensor
    lr: float
    tokens: int
    began: float

    def read(self) -> tuple[float, float]:
        """The loss and the gradient norm.

        Raises:
            ValueError: one of them is not finite; that step has left the weights as they were.
        """
        loss, norm = self.values.tolist()
        if not math.isfinite(loss + norm):
            raise ValueError(
                f"step {self.step}: loss {loss}, gradient norm {norm}; the weights were not "
                "changed. Start again in another --run.dir with a lower learning rate, or look at "
                f"the batch, micro_batches({self.step - 1})"
            )
        return loss, norm

    @property
    def loss(self) -> float:
        """The mean loss in nats."""
        return self.read()[0]

    @property
    def grad_norm(self) -> float:
        """The norm of the gradient before clipping."""
        return self.read()[1]


def total_weight(batch: Batch) -> float:
    """The sum of a batch's weights: its number of targets where all weigh 1."""
    return batch.targets.numel() if batch.weights is None else float(batch.weights.sum())


def train_step(
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    micro_batches: list[Batch],
    step: int,
    config: OptimConfig,
    distributed: nn.Module | None = None,
) -> StepResult:
    """Optimizer step `step` (from 0) on all its micro-batches.

    The loss is sum(weight * cross_entropy) / sum(weight) over the whole step, so how the step is
    cut into micro-batches, and over how many processes, does not matter, whatever the weights.
    With several processes every one is given all micro-batches, and `distributed` is the model as
    `distribute` wraps it. On a GPU nothing here waits for it.

    Raises:
        ValueError: no weight at all, or a loss or gradient that is not finite (on a GPU when the
            result is read); the weights and the optimizer are then as they were before the step.
    """
    began = time.perf_counter()
    weight = sum(map(total_weight, micro_batches))
    if not weight:
        raise ValueError(f"step {step + 1}: no token of the batch has a weight; nothing to learn")
    loss = gradients(model, my_share(micro_batches), weight, distributed)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if config.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
    factor = lr_factor(step, config)
    tokens = sum(batch.targets.numel() for batch in micro_batches)
    values = torch.stack((loss, norm.to(loss)))
    result = StepResult(step + 1, values, config.lr * factor, tokens, began)
    if values.device.type != "cuda":
        try:
            result.read()
        except ValueError:
            model.zero_grad()
            raise
    else:
        for optimizer in optimizers:  # what each then finds to be 1, it does not move by
            optimizer.found_inf = 1 - values.isfinite().all().float()  # type: ignore[attr-defined]
    set_lr(optimizers, factor)
    try:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    except torch.OutOfMemoryError:
        raise ValueError("out of memory for the optimizer's state; train a smaller model") from None
    return result


class Data(Protocol):
    """What trains: micro-batches of at most so many rows for each step."""

    micro_batch_size: int

    def micro_batches(self, step: int) -> list[Batch]: ...  # noqa: D102


def step_within_memory(
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    data: Data,
    step: int,
    config: OptimConfig,
    distributed: nn.Module | None = None,
) -> StepResult:
    """`train_step` on what `data` has for it; when memory runs out, in half as large micro-batches.

    The step, and up to rounding its result, stay the same, and so do the smaller micro-batches.

    Raises:
        ValueError: not even single rows fit; or as in `train_step`.
    """
    while True:
        micro_batches = data.micro_batches(step)
        try:
            return train_step(model, optimizers, micro_batches, step, config, distributed)
        except torch.OutOfMemoryError:
            rows = max(len(batch.idx) for batch in micro_batches)
        # Out of the handler, which holds on to everything that was computed.
        if rows == 1 or world_size() > 1:
            raise ValueError(
                f"out of memory at micro-batches of {rows} rows; lower data.micro_batch_size, "
                "set run.loss_chunk, or use shorter blocks"
            )
        data.micro_batch_size = rows // 2
        model.zero_grad()
        torch.cuda.empty_cache()
        print(f"out of memory: going on with micro-batches of {rows // 2} rows, same step size")


def gradients(
    model: GPT, micro_batches: list[Batch], weight: float, distributed: nn.Module | None
) -> Tensor:
    """Adds up the gradients of some micro-batches over the processes; returns their mean loss."""
    device, n = model.wte.weight.device, world_size()
    loss = torch.zeros((), device=device)
    for i, batch in enumerate(micro_batches, 1):
        moved = to_device(batch, device)
        with contextlib.ExitStack() as stack:
            if isinstance(distributed, DistributedDataParallel) and i < len(micro_batches):
                stack.enter_context(distributed.no_sync())  # the last one sends the sum of all
            with autocast(device):
                part = (distributed or model)(*moved) / weight
            (part * n).backward()  # the processes' gradients are averaged: n makes it their sum
        loss += part.detach()
    return sum_over_processes(loss)


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[Batch]) -> float:
    """sum(weight * cross_entropy) / sum(weight) over batches, in nats, without training.

    Raises:
        ValueError: no weight at all.
    """
    device = model.wte.weight.device
    loss, weight, training = 0.0, 0.0, model.training
    model.eval()
    for batch in batches:
        moved = to_device(batch, device)
        with autocast(device):
            loss += float(model(*moved))
        weight += total_weight(batch)
    model.train(training)
    if not weight:
        raise ValueError("nothing to evaluate: no token has a weight")
    return loss / weight


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on the model's device, with what a GPU would have to be waited for to find out."""
    if batch.weights is not None and batch.kept is None:
        batch = batch._replace(kept=batch.weights.flatten().nonzero().squeeze(1))
    if device.type != "cuda":
        return batch.map(lambda t: t.to(device))
    if batch.documents is not None and has_bf16(device):
        batch = batch._replace(bounds=document_bounds(batch.documents))
    # From pinned memory the copy runs beside the step before.
    return batch.map(lambda t: t if t.is_cuda else t.pin_memory().to(device, non_blocking=True))
