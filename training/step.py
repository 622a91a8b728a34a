"""One optimizer step and one evaluation: the loss of the whole project is defined here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from model.gpt import GPT, Batch
from training.optim import OptimConfig, lr_factor, set_lr
from training.runtime import autocast


@dataclass(frozen=True)
class StepResult:
    """What a step did: its mean loss in nats, gradient norm before clipping, size and duration."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float


def total_weight(batch: Batch) -> float:
    """The sum of a batch's weights: its number of targets where all weigh 1."""
    return batch.targets.numel() if batch.weights is None else float(batch.weights.sum())


def train_step(
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    micro_batches: list[Batch],
    step: int,
    config: OptimConfig,
) -> StepResult:
    """Optimizer step `step` (from 0) on all its micro-batches.

    The loss is sum(weight * cross_entropy) / sum(weight) over the whole step, so how the step is
    cut into micro-batches does not matter, whatever the weights.

    Raises:
        ValueError: no weight at all, or a loss or gradient that is not finite; the weights and
            the optimizer are then as they were before the step.
    """
    begin = time.perf_counter()
    device = model.wte.weight.device
    weight = sum(map(total_weight, micro_batches))
    if not weight:
        raise ValueError(f"step {step + 1}: no token of the batch has a weight; nothing to learn")
    loss = torch.zeros((), device=device)
    for batch in micro_batches:
        moved = to_device(batch, device)
        with autocast(device):
            part = model(*moved) / weight
        part.backward()
        loss += part.detach()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if config.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
    loss_value, norm_value = torch.stack((loss, norm.to(loss))).tolist()
    if not math.isfinite(loss_value + norm_value):
        model.zero_grad()
        raise ValueError(
            f"step {step + 1}: loss {loss_value}, gradient norm {norm_value}; the weights were not "
            "changed. Start again in another --run.dir with a lower learning rate, or look at the "
            f"batch, micro_batches({step})"
        )
    factor = lr_factor(step, config)
    set_lr(optimizers, factor)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    tokens = sum(batch.targets.numel() for batch in micro_batches)
    seconds = time.perf_counter() - begin
    return StepResult(loss_value, norm_value, config.lr * factor, tokens, seconds)


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
    """A batch on the model's device."""
    given = {k: t for k, t in batch._asdict().items() if t is not None}
    return Batch(**{k: t.to(device, non_blocking=True) for k, t in given.items()})
