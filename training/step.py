"""One optimizer step, one evaluation: how losses are averaged (cross-entropy: `GPT.loss`)."""

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.seen import Batch
from runtime.device import autocast, cudnn_attention, to_device
from runtime.processes import my_share, sum_over_processes, whole, world_size
from training.optim import OptimConfig, lr_factor, set_lr


class StepResult(NamedTuple):
    """What a step did.

    Attributes:
        step: its number, 1 for the first.
        lr: AdamW's learning rate.
        tokens: positions in it, padding included.
        loss: mean loss in nats.
        grad_norm: norm of the gradient before clipping.
        replay_loss: mean loss of replayed text; None where none is.
    """

    step: int
    lr: float
    tokens: int
    loss: float
    grad_norm: float
    replay_loss: float | None = None


def total_weight(batch: Batch) -> float:
    """The sum of a batch's weights: its number of targets where all weigh 1."""
    return batch.targets.numel() if batch.weights is None else float(batch.weights.sum())


def train_step(
    network: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    micro_batches: list[Batch],
    step: int,
    config: OptimConfig,
    replayed: Sequence[Batch] = (),
) -> StepResult:
    """Takes optimizer step `step` (from 0) on all its micro-batches.

    What is minimized is sum(weight * cross_entropy) / sum(weight) over the whole step, so how the
    step is cut into micro-batches, and over how many processes, does not matter, whatever the
    weights. `replayed` are micro-batches of it whose loss is reported apart. Each process
    is given all micro-batches, and the network that `Run.resume` returned. Raises ValueError: no
    weight at all, or a loss or gradient that is not finite; the weights and the optimizer are then
    as they were before the step.
    """
    parts = [part for part in (micro_batches, list(replayed)) if part]
    weights = [sum(map(total_weight, part)) for part in parts]
    weight = sum(weights)
    if not all(weights):
        raise ValueError(f"step {step + 1}: no token of the batch has a weight; nothing to learn")
    losses = add_gradients(network, parts, weight)
    loss, *others = (loss * (weight / own) for loss, own in zip(losses, weights, strict=True))
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads))
    if config.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(network.parameters(), config.grad_clip, norm)
    # The one wait for a GPU in a step. The optimizers' work hides most of it: while they run, the
    # next step is sent off.
    values: list[float] = torch.stack((loss, norm.to(loss), *others)).tolist()
    if not math.isfinite(sum(values)):
        network.zero_grad()
        what = f"step {step + 1}: loss {values[0]}, gradient norm {values[1]}"
        remedy = "Start again in another --run.dir with a lower learning rate, or look at the batch"
        batch = f"data.micro_batches({step}, rows)"
        raise ValueError(f"{what}; the weights were not changed. {remedy}, {batch}")
    set_lr(optimizers, factor := lr_factor(step, config))
    try:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    except torch.OutOfMemoryError:  # not for `Run.within_memory`: some weights moved
        raise ValueError("out of memory for the optimizer's state; train a smaller model") from None
    tokens = sum(batch.targets.numel() for part in parts for batch in part)
    return StepResult(step + 1, config.lr * factor, tokens, *values)


def add_gradients(network: nn.Module, parts: list[list[Batch]], weight: float) -> Tensor:
    """Adds the gradients of this process's share of each part of a step's micro-batches; returns
    what the parts, over all processes, have of the mean loss, (len(parts),).

    `weight` is the total weight of the step, over all processes.
    """
    device, n = next(network.parameters()).device, world_size()
    losses = torch.zeros(len(parts), device=device)
    mine = [(k, batch) for k, part in enumerate(parts) for batch in my_share(part)]
    for i, (k, batch) in enumerate(mine, 1):
        moved = to_device(batch, device)
        with contextlib.ExitStack() as stack:
            if isinstance(network, DistributedDataParallel) and i < len(mine):
                stack.enter_context(network.no_sync())  # all-reduce only at the last one
            # Where all batches are of one shape and have no mask: rows of text.
            stack.enter_context(cudnn_attention(batch.weights is None and batch.documents is None))
            with autocast(device):
                part = network(*moved) / weight
            (part * n).backward()  # DDP averages gradients: times n, their sum
        losses[k] += part.detach()
    return sum_over_processes(losses)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """sum(weight * cross_entropy) / sum(weight) over batches, in nats, without training.
    Raises ValueError: no weight at all.
    """
    device, training = next(model.parameters()).device, model.training
    loss = weight = 0.0
    model.eval()
    for batch in batches:
        with autocast(device):
            # Not `model(...)`: what is compiled would be compiled again, for every shape.
            loss += float(model.forward(*to_device(batch, device)))
        weight += total_weight(batch)
    model.train(training)
    if not weight:
        raise ValueError("nothing to evaluate: no token has a weight")
    return loss / weight
