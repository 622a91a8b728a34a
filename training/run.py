"""Stub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it does besides training.

    Raises:
        ValueError: intervals below 1.
    """

    dir: str
    """The run's folder. The same command given again goes on from its newest checkpoint."""
    seed: int = 1
    """Of the weights and of the order of the data."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu) or a device of torch such as cuda:1."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: auto uses it on CUDA where it works."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at a time: less memory for a large vocabulary, the same result, a
    little slower. None for all."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between evaluations; the last step is always evaluated."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases, besides metrics.jsonl."""
    wandb_project: str = "diptych"
    """Project name there."""
    wandb_artifact: bool = False
    """Upload the last checkpoint there."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"run.seed is {self.seed}; it must be 0 or more, and below 2**63")
        object.__setattr__(self, "dir", str(Path(self.dir).expanduser()))
        for name in ("loss_chunk", "log_every", "eval_every", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"run.{name} is {getattr(self, name)}; it must be 1 or more")
