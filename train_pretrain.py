"""Pretraining: text corpus -> base checkpoint.

python train_pretrain.py --config configs/quickstart/pretrain.toml --run.dir=out/my-run
"""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from data.pretrain import PretrainData, PretrainDataConfig
from model.generate import Sampling, generate
from model.gpt import GPT, ModelConfig
from runtime.cli import run_cli
from runtime.device import StopOnSignal, compile_model, peak_flops, set_up
from runtime.files import fingerprint
from runtime.processes import any_process, distribute, is_first, start_processes
from training.checkpoint import (
    check_origin,
    describe,
    differences,
    identity,
    load_checkpoint,
    open_run,
    resume,
    save_checkpoint,
)
from training.log import RunLog, is_complete, is_due
from training.optim import OptimConfig, build_optimizers
from training.run import RunConfig
from training.step import mean_loss, step_within_memory


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that a pretraining run depends on."""

    data: PretrainDataConfig
    run: RunConfig
    # Without a default: one would be made for a recipe before the config names another.
    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    init_from: str | None = None
    """Start from the weights of this checkpoint, or run, instead of random ones."""


def take_weights(path: str, model: GPT, data: PretrainData) -> dict[str, Any]:
    """Loads the weights of another run's checkpoint; returns what it was, for meta.json.

    Raises:
        ValueError: it has another architecture or another tokenizer.
    """
    start = load_checkpoint(path)
    theirs = start.meta["model"] | {"dropout": model.config.dropout}  # which no weight depends on
    if changed := differences(theirs, asdict(model.config), "model"):
        raise ValueError(f"init_from={path} has another architecture: {'; '.join(changed)}")
    if start.tokenizer.fingerprint != data.tokenizer.fingerprint:
        raise ValueError(f"init_from={path} has another tokenizer than {data.config.path}")
    model.load_state_dict(start.model.state_dict())
    return {"step": start.meta["step"], "fingerprint": identity(start.meta)}


def evaluate(model: GPT, data: PretrainData) -> dict[str, float]:
    """Validation loss in nats per token, and in bits per byte of text."""
    batches = data.val_batches()
    nats = mean_loss(model, batches)
    n_targets = sum(batch.targets.numel() for batch in batches)
    bits = nats * n_targets / math.log(2)
    return {"val_loss": nats, "val_bpb": bits / data.bytes_of(batches)}


def sample(model: GPT, data: PretrainData, seed: int) -> str:
    """The beginning of a document as the model would write it."""
    start = [data.tokenizer.end_of_text]
    reply = generate(model, [start], Sampling(48, temperature=0.8, seed=seed))[0]
    return data.tokenizer.decode(reply)


def main(config: PretrainConfig) -> Path:
    """Trains to config.optim.steps, or until Ctrl-C; returns the newest checkpoint."""
    run, run_dir, steps = config.run, Path(config.run.dir), config.optim.steps
    device_name = start_processes(run.device)
    checkpoint = open_run(run_dir, asdict(config))

    data = PretrainData(config.data, config.model.block_size, config.run.seed)
    made_from: dict[str, Any] = {"data": {"fingerprint": fingerprint(data.meta["files"])}}
    if checkpoint:
        check_origin(checkpoint, made_from)
        if is_complete(checkpoint, steps):
            print(f"{run_dir}: complete at step {steps}, nothing to do")
            return checkpoint

    device = set_up(device_name, run.seed)
    model = GPT(config.model, data.tokenizer.n_vocab).to(device)
    if config.init_from is not None:
        made_from["init_from"] = take_weights(config.init_from, model, data)
        if checkpoint:
            check_origin(checkpoint, made_from)
    optimizers = build_optimizers(model, config.optim)
    model.loss_chunk = run.loss_chunk
    compile_model(model, run.compile)
    row = resume(checkpoint, model, optimizers) if checkpoint else {}
    distributed = distribute(model, run.seed, row.get("step", 0))
    meta = describe("base", config, device, data.meta) | made_from
    save = partial(save_checkpoint, run_dir, model, optimizers, data.tokenizer, meta)

    epochs = steps * config.data.batch_size / data.n_blocks
    print(
        f"{model.n_params():,} parameters on {device.type}; {len(data):,} training tokens, "
        f"{epochs:.1f} epochs; step {row.get('step', 0)} of {steps}"
    )
    log = RunLog(config, row, meta, model.flops_per_token(), peak_flops(device))
    with log, StopOnSignal() as stop:
        for step in count(log.first_step):
            due = partial(is_due, step, last=steps)
            stopped = any_process(stop.requested)
            if step == steps or stopped or (step > log.first_step and due(run.save_every)):
                newest = save(step, log.row())
            scores: dict[str, float] = {}
            if step and due(run.eval_every) and is_first() and not stopped:
                scores = evaluate(model, data)
                text = sample(model, data, seed=step)
                log.say(f"  sample: {text!r}")
                log.samples(["continuation"], [[text]])
            log.write(step, scores)
            if step == steps or stopped:
                break
            log.count(step_within_memory(model, optimizers, data, step, config.optim, distributed))
            if step == log.first_step:
                gc.freeze()  # what is there now stays; collections need not look through it again
    gc.unfreeze()
    print(f"base checkpoint: {newest}")
    return newest


if __name__ == "__main__":
    run_cli(PretrainConfig, main, __doc__ or "")
