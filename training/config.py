"""What a run is told besides model, data and optimizer; and whether two configs differ."""

import contextlib
import re
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal

from model.check import check_range
from runtime.files import at_home

# What a resumed run may change: where things are (their contents are checked by fingerprint) and
# what alters the result by rounding at most.
MAY_CHANGE = {
    *("run.dir", "run.device", "run.compile", "run.loss_chunk", "run.activation_checkpointing"),
    *("run.shard", "run.wandb", "run.wandb_project", "run.wandb_artifact", "base", "init_from"),
    *("tune.init", "verify", "data.path", "data.replay_path", "data.micro_batch_size"),
    "data.layout",
}


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it does besides training. Raises ValueError: intervals below 1."""

    dir: str
    """The run's folder. The same command given again goes on from its newest checkpoint."""
    seed: int = 1
    """Of the weights and of the order of the data."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu) or a device of torch such as cuda:1."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: auto uses it on CUDA, where it works and the run is long enough to earn it."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at a time: less memory for a large vocabulary, the same result, a
    little slower. None for all."""
    activation_checkpointing: bool = False
    """Computes each block again in the backward pass: memory of its input alone, a third more time,
    the same result."""
    shard: bool = False
    """Over the processes of torchrun, each keeps a share of weights, gradients and optimizer state
    (FSDP2): for a model past one card. Slower than copies of it, which is what else they keep."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between evaluations; the last step is always evaluated."""
    save_every: int | str = 500
    """Steps between checkpoints; or "log", which saves steps 1, 2, 4, 8 and so on, or "log:1.5",
    powers of 1.5, rounded. The last step is always saved."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases, besides metrics.jsonl."""
    wandb_project: str = "diptych"
    """Project name there."""
    wandb_artifact: bool = False
    """Upload the last checkpoint there."""

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("run.dir is empty; name a folder")
        object.__setattr__(self, "dir", at_home(self.dir))
        check_range("run.seed", self.seed, f"0 or more and below {2**63}")
        for name in ("loss_chunk", "log_every", "eval_every", "save_every"):
            if not isinstance(value := getattr(self, name), str):
                check_range(f"run.{name}", value, f"1 or more and below {2**63}")
            elif not re.fullmatch(r"log(:(?!1(\.0*)?$)[1-9]\d{0,5}(\.\d{1,9})?)?", value):
                raise ValueError(f"run.{name} is {value!r:.80}; give steps, log, or log:1.5")


def changes(old: dict[str, Any], config: Any) -> list[str]:
    """What differs between a checkpoint's config and today's, but for what may change."""
    found = differences(with_defaults(old, config), asdict(config))
    return [text for text in found if text.split(" ")[0] not in MAY_CHANGE]


def with_defaults(old: Any, config: Any) -> Any:
    """An old config or table with the defaults of keys it lacks; `config` says which there are."""
    if not isinstance(old, dict) or not is_dataclass(config) or isinstance(config, type):
        return old
    known = {f.name: getattr(config, f.name) for f in fields(config) if f.name in old}
    known = {name: with_defaults(old[name], value) for name, value in known.items()}
    with contextlib.suppress(TypeError, ValueError):  # what could not be built today differs
        # Made anew, because a default may follow from other keys.
        return asdict(type(config)(**known)) | old | known
    return old | known


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Text such as "optim.lr 0.1 -> 0.2" for every leaf in which two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = f"{key}." if key else ""
        return [d for k in old | new for d in differences(old.get(k), new.get(k), f"{prefix}{k}")]
    return [] if old == new else [f"{key} {old} -> {new}"]
