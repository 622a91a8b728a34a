"""Pretraining: text corpus -> base checkpoint.

python train_pretrain.py --config configs/quickstart/pretrain.toml --run.dir=out/my-run
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from data.pretrain import PretrainData, PretrainDataConfig
from model.generate import Sampling, generate
from model.gpt import GPT, RECIPES, ModelConfig
from runtime.cli import recipes_help, run_cli, say
from runtime.device import set_up
from runtime.processes import place
from training.checkpoint import take_weights
from training.config import RunConfig
from training.optim import OptimConfig, build_optimizers
from training.run import Run
from training.step import StepResult, mean_loss, train_step


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that a pretraining run depends on."""

    data: PretrainDataConfig
    run: RunConfig
    # No default: it would hold one recipe's switches, which a config of the other could not undo.
    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    init_from: str | None = None
    """Initial weights: a checkpoint, or a run's newest; None for random ones."""
    verify: bool = False
    """Hash all prepared data at the start, not only files that look changed since the last time."""


def evaluate(run: Run, model: GPT, data: PretrainData, step: int) -> dict[str, float]:
    """Validation loss in nats per token and bits per byte; prints a sample."""
    start = [data.tokenizer.end_of_text]  # it begins each document
    ids = generate(model, [start], Sampling(48, temperature=0.8, seed=step))[0]
    text = data.tokenizer.decode(ids)
    run.log.samples(text, ["continuation"], [[text]])
    batches = data.val_batches(run.rows)
    nats = mean_loss(model, batches)
    n_targets = sum(batch.targets.numel() for batch in batches)
    bits = nats * n_targets / math.log(2)
    return {"val_loss": nats, "val_bpb": bits / data.bytes_of(batches)}


def main(config: PretrainConfig) -> Path:
    """Trains to config.optim.steps; Ctrl-C saves and exits. Returns the newest checkpoint."""
    run = Run("base", config)
    data = PretrainData(config.data, config.model.block_size, config.run.seed, config.verify)
    origin = {"data": {"fingerprint": data.fingerprint}}
    run.made_from(data.meta, **origin)
    if run.is_complete():
        return run.checkpoint

    device = set_up(run.device, config.run.seed)
    model = place(GPT(config.model, data.tokenizer.n_vocab), device, config.run.shard)
    taken = take_weights(config.init_from, model, data.tokenizer)  # not needed once complete
    run.made_from(data.meta, **origin, init_from=taken)
    optimizers = build_optimizers(model, config.optim)
    network = run.resume(model, optimizers, data.tokenizer)

    def train(step: int, rows: int) -> StepResult:
        return train_step(network, optimizers, data.micro_batches(step, rows), step, config.optim)

    epochs = config.optim.steps * config.data.batch_size / data.n_blocks
    say(
        f"{model.n_params():,} parameters on {device.type}; {data.n_tokens:,} training tokens, "
        f"{epochs:.1f} epochs; step {run.first_step} of {run.last_step}"
    )
    with run:
        for step in run.steps():
            if run.must_save(step):
                run.save(step)
            scores = evaluate(run, model, data, step) if run.must_evaluate(step) else {}
            run.log.write(step, scores)
            if run.must_stop(step):
                break
            run.log.add(run.within_memory(train, step))
    say(f"base checkpoint: {run.checkpoint}")
    return run.checkpoint


if __name__ == "__main__":
    run_cli(PretrainConfig, main, f"{__doc__}\n{recipes_help(RECIPES)}")
