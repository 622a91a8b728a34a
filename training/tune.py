"""What instruction tuning may do to a base: which weights move, how far, and from where."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from model.check import check_range
from model.gpt import GPT
from runtime.cli import say
from training.optim import OptimConfig, build_optimizers


@dataclass(frozen=True)
class TuneConfig:
    """Restrictions of tuning, all off by default. Raises ValueError if out of range."""

    freeze: str | None = None
    """Parameters that stay as they are, by parts of their names with commas between: wte, attn,
    mlp, lm_head, blocks.0, blocks.0.attn.query. A tied head is wte too."""
    lora_rank: int | None = None
    """The change of each matrix in the blocks is a product of this rank (LoRA), trained by AdamW;
    all else is trained as ever, unless it is frozen. None: any change."""
    lora_alpha: float = 32.0
    """That product is multiplied by lora_alpha / lora_rank."""
    kl: float = 0.0
    """Weight of KL(model || base) beside the cross-entropy of each token of a reply, and so in
    `loss`; not on replayed text. `val_kl` is that KL."""
    init: str | None = None
    """Initial weights: an instruct checkpoint of the same base, or its run; None for the base's."""

    def __post_init__(self) -> None:
        check_range("tune.lora_alpha", self.lora_alpha, "above 0")
        check_range("tune.kl", self.kl, "0 or more")


def tuned_optimizers(model: GPT, config: OptimConfig, tune: TuneConfig) -> list[Optimizer]:
    """Freezes what `tune` names; the optimizers of the rest. ValueError: it names none, or all."""
    if model.is_sharded:  # sampling has left the embedding and the head whole
        model.reshard()  # type: ignore[operator]
    params = dict(model.named_parameters(remove_duplicate=False))  # a tied head under both names
    for name in map(str.strip, tune.freeze.split(",") if tune.freeze else ()):
        if not (found := [p for full, p in params.items() if f".{name}." in f".{full}."]):
            there = ", ".join(dict.fromkeys(".".join(params).split(".")))
            raise ValueError(f"tune.freeze: {name!r:.80} is in no parameter's name; of {there}")
        for p in found:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in params.values()):
        raise ValueError(f"tune.freeze={tune.freeze} leaves nothing to train; name less")
    optimizers = build_optimizers(model, config)  # which pass over what has no gradient
    if tune.lora_rank is not None:  # before those that would move all of a matrix
        optimizers.insert(0, LoRA(model, config, tune.lora_rank, tune.lora_alpha))
    return optimizers


class LoRA(AdamW):
    """Trains A (rank, columns) and B (rows, rank) for each matrix W of the blocks that is not
    frozen, and keeps W at W0 + alpha / rank * B A; at first A is random and B = 0 (Hu et al. 2021,
    arXiv 2106.09685, section 4.1). Their gradients follow from W's by the chain rule: model and
    checkpoints stay what they are, and neither memory nor time is saved. Weight decay draws A and B
    to 0, so W to W0; clipping and `grad_norm` are of W's gradient. ValueError: too large a rank.
    """

    def __init__(self, model: GPT, config: OptimConfig, rank: int, alpha: float) -> None:
        if model.is_sharded:
            raise ValueError("run.shard is not for tune.lora_rank: leave one of them out")
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and p.requires_grad]
        full = max((min(W.shape) for W in matrices), default=0)
        check_range("tune.lora_rank", rank, f"1 to {full}", "the rank of what is not frozen")
        self.scale, self.parts = alpha / rank, list[tuple[Tensor, Tensor, Tensor, Tensor]]()
        for W in matrices:
            A = torch.randn(rank, W.shape[1]) / W.shape[1] ** 0.5  # drawn alike for any device
            B = torch.zeros(W.shape[0], rank)
            self.parts.append((W, W.detach().clone(), nn.Parameter(A.to(W)), nn.Parameter(B.to(W))))
        self.adapters = [p for _, _, A, B in self.parts for p in (A, B)]
        say(f"LoRA: {sum(map(torch.numel, self.adapters)):,} adapter parameters of rank {rank}")
        group, betas = {"params": self.adapters, "peak_lr": config.lr}, (config.beta1, config.beta2)
        super().__init__([group], config.lr, betas, weight_decay=config.weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Moves A, B and W. It uses up W's gradient, so that no other optimizer moves W."""
        for W, _, A, B in self.parts:
            for p in (A, B):  # AdamW's state holds them too, so that they are saved and put back
                p.copy_(self.state[p].get("value", p))
            G, W.grad = self.scale * cast(Tensor, W.grad), None
            A.grad, B.grad = B.mT @ G, G @ A.mT
        super().step()
        for W, W0, A, B in self.parts:
            W.copy_(torch.addmm(W0, B, A, alpha=self.scale))
            self.state[A]["value"], self.state[B]["value"] = A.detach(), B.detach()


class KLToBase(nn.Module):
    """The loss of a model with `weight` * KL(model || base) beside the cross-entropy, and weighted
    as that is; in eval mode the KL alone. The base is what the model is now.
    """

    def __init__(self, model: GPT, weight: float, loss_chunk: int | None = None) -> None:
        super().__init__()
        if loss_chunk is not None or model.is_sharded:
            raise ValueError("tune.kl takes neither run.loss_chunk nor run.shard: leave them out")
        self.model, self.weight = model, weight
        # A function, so that the base is no part of this module, and not trained with it.
        self.base = copy.deepcopy(model).eval().requires_grad_(False).forward

    def forward(self, idx: Tensor, targets: Tensor, *more: Tensor | None) -> Tensor:
        """A sum in nats over a `Batch` on its device. Replayed text has no weights, and no KL."""
        weights, documents, kept, bounds = more
        if weights is None:
            return cast(Tensor, self.model(idx, targets, *more))
        model = self.model if self.training else self.model.forward  # as in `mean_loss`
        p = model(idx, None, None, documents, kept, bounds).log_softmax(-1)
        with torch.no_grad():
            q = self.base(idx, None, None, documents, kept, bounds).log_softmax(-1)
        losses = (p.exp() * (p - q)).sum(-1)
        if self.training:
            losses = F.nll_loss(p, targets.flatten()[kept], reduction="none") + self.weight * losses
        return (losses * weights.flatten()[kept]).sum()
