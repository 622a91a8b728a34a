"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from model.check import check_range
from runtime.processes import share_of, whole


@dataclass(frozen=True)
class OptimConfig:
    """Number of steps, optimizer, learning rates. Raises ValueError if out of range."""

    steps: int = 1000
    """Optimizer steps of the whole run; with 0 a run only saves its first weights."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    schedule: Literal["cosine", "wsd"] = "wsd"
    """After the warm-up: a cosine to the end, or constant and then a linear decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_fraction: float = 0.5
    """Share of the run that the linear decay of `wsd` takes."""
    final_lr_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices and embeddings; biases and norms are never decayed."""
    beta1: float = 0.9
    """AdamW's beta1, of the mean of gradients."""
    beta2: float = 0.95
    """AdamW's beta2, of the mean of squared gradients."""
    momentum: float = 0.95
    """Muon's momentum."""
    grad_clip: float | None = 1.0
    """Clips the global gradient norm to this; None does not clip."""

    def __post_init__(self) -> None:
        ranges = {
            "0 or more": "steps warmup_steps weight_decay",
            "above 0": "lr muon_lr",
            "0 to 1": "decay_fraction final_lr_fraction",
            "0 or more and below 1": "beta1 beta2 momentum",
        }
        for rule, names in ranges.items():
            for name in names.split():
                check_range(f"optim.{name}", getattr(self, name), rule)
        check_range("optim.grad_clip", self.grad_clip, "above 0", "null turns clipping off")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps={self.warmup_steps} does not fit into "
                f"optim.steps={self.steps}; make the warm-up shorter or the run longer"
            )


def lr_factor(step: int, config: OptimConfig) -> float:
    """The learning rate of step `step` (from 0) as a share of its peak, 0 to 1."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = min(config.decay_fraction * config.steps, config.steps - config.warmup_steps)
        shape = min(1.0, (config.steps - step) / max(1.0, decay))
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * shape


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to G (n, rows, columns), approximately.

    Newton-Schulz iteration with the quintic of Jordan et al. 2024, "Muon: an optimizer for hidden
    layers": singular values end between about 0.7 and 1.2. Computes in bfloat16 on CUDA and in
    G's own type elsewhere, because CPUs emulate bfloat16 about 100 times slower.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16() if G.is_cuda else G
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if G.is_cuda or G.shape[-2] == G.shape[-1]:
        for _ in range(steps):
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    else:
        # The same steps on the small A = X X^T alone, with X multiplied once at the end: every X_n
        # is Q_n X. Not on CUDA: in bfloat16 the rounding errors would add up.
        A, Q = X @ X.mT, torch.eye(X.shape[-2]).to(X)
        for _ in range(steps):
            P = torch.baddbmm(A, A, A, beta=b, alpha=c)
            P.diagonal(dim1=-2, dim2=-1).add_(a)
            Q, A = P @ Q, P @ (A @ P)
        X = Q @ X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024). For the blocks' matrices only.

    The momentum is Nesterov's. An update of a (rows, columns) matrix has about the spectral norm
    lr * sqrt(max(1, rows / columns)).
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        defaults = {"lr": lr, "peak_lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        # Matrices of one shape are one group, so that they are orthogonalised in one batch.
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        super().__init__([{"params": group} for group in shapes.values()], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            lr, beta, grads = group["lr"], group["momentum"], [p.grad for p in params]
            momenta = [self.state[p]["momentum"] for p in params]
            # One call for all matrices of a shape: on a GPU, launching more would take longer.
            torch._foreach_lerp_(momenta, grads, 1 - beta)
            updates = [whole(update) for update in torch._foreach_lerp(grads, momenta, beta)]
            rows, columns = params[0].shape
            moves = orthogonalize(torch.stack(updates)) * (lr * math.sqrt(max(1.0, rows / columns)))
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(
                params, [share_of(m, p) for m, p in zip(moves, params, strict=True)]
            )


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the blocks' matrices if the config says so; each parameter is in one."""
    muon, decayed, vectors = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for name, p in model.named_parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif name.startswith("blocks.") and config.optimizer == "muon":
            muon.append(p)
        else:
            decayed.append(p)
    groups = [(decayed, config.weight_decay), (vectors, 0.0)]
    named = [{"params": p, "weight_decay": decay, "peak_lr": config.lr} for p, decay in groups if p]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = [AdamW(named, config.lr, betas, fused=True)]
    if muon:
        optimizers.append(Muon(muon, config.muon_lr, config.momentum, config.weight_decay))
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Sets every learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
