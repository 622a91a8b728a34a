"""What is forgotten during instruction tuning, and whether it comes back.

Every checkpoint of the instruct model's run is measured; then the last one returns to pretraining
text for a few steps and is measured on the way (as in Spurious Forgetting, arXiv 2501.13453). The
text is that of the base, held-out people's biographies included: what comes back may have been
hidden, or learned again.

python -m lab.forgetting --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.pretrain import PretrainData, PretrainDataConfig
from lab.behaviour import Point, probe
from lab.pair import Pair, run_instrument
from model.gpt import ModelConfig
from runtime.files import checkpoints, read_meta
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain
from training.checkpoint import Checkpoint, load_checkpoint
from training.config import RunConfig
from training.optim import OptimConfig
from training.step import mean_loss

RETURN_STEPS, RETURN_EVERY = 40, 10  # of pretraining after instruction tuning


@dataclass(frozen=True)
class Forgetting:
    """Curves, by step.

    Attributes:
        tuning: the base (step "0") and each checkpoint of the instruct model's run.
        recovery: steps of pretraining after it.
        text_loss: validation loss on pretraining text, nats per token, by "tuning" or "recovery"
            and step; empty where the text is gone.
    """

    tuning: dict[str, Point]
    recovery: dict[str, Point]
    text_loss: dict[str, dict[str, float]]


def forgetting(pair: Pair, questions: int) -> Forgetting:
    """Both curves; without the text that the base has read, the first alone."""
    text = text_of(pair.base)
    last = pair.instruct.path
    before = [p for p in checkpoints(last.parent) if step_of(p) < pair.instruct.meta["step"]]
    stages = {"tuning": [pair.base.path, *before, last], "recovery": list[Path]()}
    with tempfile.TemporaryDirectory() as folder:
        if text is not None:
            return_to_text(pair, Path(folder))
            stages["recovery"] = checkpoints(Path(folder))
        points: dict[str, dict[str, Point]] = {}
        losses: dict[str, dict[str, float]] = {}
        for stage, paths in stages.items():
            points[stage] = {}
            for path in paths:
                device = pair.base.model.wte.weight.device
                checkpoint = load_checkpoint(path, device)
                step = "0" if path == pair.base.path else str(checkpoint.meta["step"])
                points[stage][step] = probe(pair, checkpoint, questions)
                if text is not None:
                    rows = text.config.micro_batch_size or text.config.batch_size
                    loss = mean_loss(checkpoint.model, text.val_batches(rows))
                    losses.setdefault(stage, {})[step] = loss
    return Forgetting(points["tuning"], points["recovery"], losses)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint in a run's folder."""
    step: int = read_meta(checkpoint)["step"]
    return step


def text_of(base: Checkpoint) -> PretrainData | None:
    """The text that a base was trained on, if it is still where it was, unchanged."""
    config: dict[str, Any] = base.meta["config"]
    path = config["data"]["path"]
    if path is None or not Path(path).exists():  # an imported base has none
        return None
    settings = PretrainDataConfig(**config["data"])
    try:
        data = PretrainData(settings, base.model.config.block_size, config["run"]["seed"])
    except ValueError:  # damaged, or something else by now
        return None
    return data if data.fingerprint == base.meta["data"]["fingerprint"] else None


def finish(main: Callable[[Any], Path], config: Any) -> None:
    """Trains to the end; Ctrl-C, on which a script saves and returns, stops the caller too."""
    if main(config).name != f"step_{config.optim.steps:06d}":
        raise KeyboardInterrupt


def return_to_text(pair: Pair, run_dir: Path) -> None:
    """Trains the instruct model on pretraining text, from the rates of its tuning down to 0."""
    base, tuned = (c.meta["config"] for c in (pair.base, pair.instruct))
    rates = {k: tuned["optim"][k] for k in ("optimizer", "lr", "muon_lr")}
    run = {"seed": tuned["run"]["seed"], "device": str(pair.base.model.wte.weight.device)}
    config = PretrainConfig(
        PretrainDataConfig(**base["data"]),
        RunConfig(
            str(run_dir), compile="off", save_every=RETURN_EVERY, eval_every=RETURN_STEPS, **run
        ),
        ModelConfig(**pair.instruct.meta["model"]),
        OptimConfig(steps=RETURN_STEPS, schedule="wsd", decay_fraction=1.0, **rates),
        init_from=str(pair.instruct.path),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        finish(pretrain, config)


if __name__ == "__main__":
    run_instrument(__doc__ or "", forgetting, questions=100)
