"""What is forgotten during instruction tuning, and whether it comes back.

Every checkpoint of the instruct model's run is measured; then the last one returns to pretraining
text for a few steps and is measured on the way (Spurious Forgetting, arXiv 2501.13453). The text is
that of the base, and in a world also that of its known people alone: what comes back on all of the
text may have been learned again, what comes back on other people's cannot. The rates rise slowly,
from 0 to a quarter of tuning's: at all of them it would be the rate that forgets.

python -m lab.forgetting --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from data.pretrain import PretrainData, PretrainDataConfig
from data.replay import about_known_people
from hf.adapter import is_foreign
from lab.behaviour import Point, measure_point
from lab.pair import Pair, run_instrument
from runtime.files import checkpoints, read_meta
from training.checkpoint import Checkpoint, load_checkpoint
from training.optim import OptimConfig, build_optimizers
from training.step import mean_loss, train_step

RETURN_STEPS, RETURN_EVERY = 40, 10  # of pretraining after instruction tuning
RETURN_RATE = 0.25  # the highest, of tuning's


@dataclass(frozen=True)
class Forgetting:
    """Curves, by step.

    Attributes:
        tuning: the base (step "0") and each checkpoint of the instruct model's run.
        recovery: steps of pretraining after it, by whose text: "all", and in a world "known".
        text_loss: validation loss on pretraining text, nats per token, by "tuning", "all" or
            "known", and step; empty where the text is gone.
    """

    tuning: dict[str, Point]
    recovery: dict[str, dict[str, Point]]
    text_loss: dict[str, dict[str, float]]


def forgetting(pair: Pair, questions: int) -> Forgetting:
    """All curves; without the text that the base has read, the first alone.

    Raises:
        ValueError: the models are of transformers, so there is no run to follow.
    """
    if is_foreign(pair.base):
        raise ValueError("a run of this project is followed, and trained on; these are none")
    text = text_of(pair.base)
    device = pair.base.model.wte.weight.device
    last = pair.instruct.path
    before = [p for p in checkpoints(last.parent) if step_of(p) < pair.instruct.meta["step"]]
    tuned = ((str(step_of(p)), load_checkpoint(p, device)) for p in (*before, last))
    curves: dict[str, Iterator[tuple[str, Checkpoint]]] = {
        "tuning": chain([("0", pair.base)], tuned)
    }
    if text is not None:
        curves["all"] = return_to_text(pair, text)
        if pair.world is not None:
            known = about_known_people(text.config.path)
            curves["known"] = return_to_text(
                pair, PretrainData(text.config, text.block_size, text.seed, wanted=known)
            )
    points: dict[str, dict[str, Point]] = {}
    losses: dict[str, dict[str, float]] = {}
    for curve, models in curves.items():
        points[curve] = {}
        for step, checkpoint in models:
            points[curve][step] = measure_point(pair, checkpoint, questions)
            if text is not None:
                loss = mean_loss(checkpoint.model, text.val_batches(rows_of(text)))
                losses.setdefault(curve, {})[step] = loss
    return Forgetting(points.pop("tuning"), points, losses)


def rows_of(text: PretrainData) -> int:
    """Rows of a forward pass over a base's text."""
    return text.config.micro_batch_size or text.config.batch_size


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


def return_to_text(pair: Pair, text: PretrainData) -> Iterator[tuple[str, Checkpoint]]:
    """The instruct model on its way through RETURN_STEPS of pretraining text: step and model.

    The rates reach RETURN_RATE of its tuning's at the last step.
    """
    tuned = pair.instruct.meta["config"]["optim"]
    rates = {key: RETURN_RATE * tuned[key] for key in ("lr", "muon_lr")}
    config = OptimConfig(
        steps=RETURN_STEPS, warmup_steps=RETURN_STEPS, optimizer=tuned["optimizer"], **rates
    )
    model = copy.deepcopy(pair.instruct.model).train()
    optimizers = build_optimizers(model, config)
    for step in range(RETURN_STEPS):
        train_step(model, optimizers, text.micro_batches(step, rows_of(text)), step, config)
        if (step + 1) % RETURN_EVERY == 0 or step + 1 == RETURN_STEPS:
            model.eval()
            yield str(step + 1), replace(pair.instruct, model=model)
            model.train()


if __name__ == "__main__":
    run_instrument(__doc__ or "", forgetting, questions=100, shots=False)
