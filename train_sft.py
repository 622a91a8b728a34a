"""Instruction tuning: base checkpoint + Q&A pairs -> instruct checkpoint.

python train_sft.py --config configs/quickstart/sft.toml --base=out/my-run --run.dir=out/my-sft
"""

from dataclasses import dataclass, field
from pathlib import Path

from data.replay import open_replay
from data.sft import SFTData, SFTDataConfig
from model.check import check_range
from model.generate import Sampling, generate
from model.gpt import GPT
from runtime.cli import run_cli, say
from runtime.device import has_bf16, pick_device, set_up
from runtime.processes import place, world_size
from training.checkpoint import Checkpoint, load_checkpoint, origin_of, take_weights
from training.config import RunConfig
from training.optim import OptimConfig
from training.run import Run
from training.step import StepResult, mean_loss, train_step
from training.tune import KLToBase, TuneConfig, tuned_optimizers

STOP_PROMPTS, STOP_WITHIN, SAMPLES = 64, 128, 8  # for stop_rate; replies shown in wandb


@dataclass(frozen=True)
class SFTConfig:
    """Everything that an instruction-tuning run depends on."""

    base: str
    """The base checkpoint, or its run (then the newest one)."""
    data: SFTDataConfig
    run: RunConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    verify: bool = False
    """Hash all prepared data at the start, not only files that look changed since the last time."""


def load_data(config: SFTConfig, run: Run, base: Checkpoint) -> SFTData:
    """The Q&A, and the text to replay."""
    longest, seed, verify = base.model.config.block_size, config.run.seed, config.verify
    block_size = config.data.block_size or longest
    check_range("data.block_size", block_size, f"2 to {longest}", "the base's model.block_size")
    folder = run.prepare_qa(config.data.path, base.path)
    replay = open_replay(config.data, base.meta, block_size, seed, verify)
    # auto packs if attention skips other documents; in several processes rows would be too few
    skips = base.model.config.has_varlen and has_bf16(pick_device(run.device)) and world_size() == 1
    packed = config.data.layout == "packed" or (config.data.layout == "auto" and skips)
    return SFTData(folder, config.data, base.tokenizer, block_size, seed, replay, packed, verify)


def answer(model: GPT, data: SFTData, n: int) -> list[list[int]]:
    """Greedy replies to the first `n` validation prompts."""
    return generate(model, data.val_prompts(n), Sampling(STOP_WITHIN), {data.tokenizer.end_of_turn})


def evaluate(
    run: Run, model: GPT, data: SFTData, step: int, before: list[list[int]], kl: KLToBase | None
) -> dict[str, float]:
    """Validation loss of the true replies, their KL to the base if that is trained, and how well
    the model ends: `stop_logprob` is the mean log-probability of the end-of-turn token at the true
    end of a reply, `stop_rate` the share of its own replies that end by themselves. Prints one of
    these, chosen by the step; samples.jsonl and wandb get SAMPLES beside the base's, `before`.
    """
    batches, end = data.val_batches(run.rows), data.tokenizer.end_of_turn
    ends = [
        b._replace(weights=b.weights * (b.targets == end)) for b in batches if b.weights is not None
    ]
    replies = answer(model, data, STOP_PROMPTS)
    prompts, decode = data.val_prompts(STOP_PROMPTS), data.tokenizer.decode
    table = [[*map(decode, row)] for row in zip(prompts, before, replies, strict=False)]
    n = step % len(replies)
    run.log.samples(decode(prompts[n] + replies[n]), ["prompt", "base", "instruct"], table)
    return {
        "val_loss": mean_loss(model, batches),
        **({"val_kl": mean_loss(kl, batches)} if kl else {}),
        "stop_logprob": -mean_loss(model, ends),
        "stop_rate": sum(reply[-1] == end for reply in replies) / len(replies),
    }


def main(config: SFTConfig) -> Path:
    """Trains to config.optim.steps; Ctrl-C saves and exits. Returns the newest checkpoint."""
    run = Run("instruct", config)
    base = load_checkpoint(config.base, kind="base")
    data = load_data(config, run, base)
    text = {"fingerprint": data.replay.fingerprint} if data.replay else None
    origin = {"data": {"fingerprint": data.fingerprint}, "base": origin_of(base.meta)}
    run.made_from(data.meta, **origin, replay=text)
    if run.is_complete():
        return run.checkpoint

    device = set_up(run.device, config.run.seed)
    model = place(base.model, device, config.run.shard).train()
    before = answer(model, data, SAMPLES)  # by the base
    kl = KLToBase(model, config.tune.kl, config.run.loss_chunk) if config.tune.kl else None
    taken = take_weights(config.tune.init, model, base.tokenizer, base.meta)
    run.made_from(data.meta, **origin, replay=text, init=taken)
    optimizers = tuned_optimizers(model, config.optim, config.tune)
    network = run.resume(model, optimizers, base.tokenizer, kl)

    def train(step: int, rows: int) -> StepResult:
        batches, replayed = data.micro_batches(step, rows), data.replayed(step, rows)
        return train_step(network, optimizers, batches, step, config.optim, replayed)

    at = f"from {config.tune.init or base.path}; step {run.first_step} of {run.last_step}"
    say(f"{model.n_params():,} parameters on {device.type}, {at}, {data.steps_per_epoch} an epoch")
    say(data.shares(run.rows))
    with run:
        for step in run.steps():
            if run.must_save(step):
                run.save(step)
            scores = evaluate(run, model, data, step, before, kl) if run.must_evaluate(step) else {}
            run.log.write(step, scores)
            if run.must_stop(step):
                break
            run.log.add(run.within_memory(train, step))
    say(f"instruct checkpoint: {run.checkpoint}")
    return run.checkpoint


if __name__ == "__main__":
    run_cli(SFTConfig, main, __doc__ or "")
