"""Instruction tuning: base checkpoint + Q&A pairs -> instruct checkpoint.

python train_sft.py --config configs/quickstart/sft.toml --base=out/my-run --run.dir=out/my-sft
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data.chat import template_fingerprint
from data.files import fingerprint
from data.prepare import prepare_qa
from data.sft import SFTData, SFTDataConfig
from model.generate import Sampling, generate
from model.gpt import GPT, Batch
from training.checkpoint import Checkpoint, load_checkpoint, open_run, resume, save_checkpoint
from training.config import RunConfig, resolved, run_cli
from training.log import RunLog, is_complete, is_due
from training.optim import OptimConfig, build_optimizers
from training.runtime import StopOnSignal, compile_model, environment, peak_flops, set_up
from training.step import mean_loss, train_step

STOP_PROMPTS, STOP_WITHIN = 64, 128  # validation prompts asked at an evaluation, tokens to stop in


@dataclass(frozen=True)
class SFTConfig:
    """Everything that an instruction-tuning run depends on."""

    base: str
    """The base checkpoint, or its run (then the newest one)."""
    data: SFTDataConfig
    run: RunConfig
    optim: OptimConfig = field(default_factory=OptimConfig)


def load_data(config: SFTConfig, base: Checkpoint) -> SFTData:
    """The Q&A, prepared first if it is a file, and the text to replay.

    Raises:
        ValueError: unusable data, or a block size that the base does not have.
    """
    base_block = base.model.config.block_size
    block_size = config.data.block_size or base_block
    if block_size > base_block:
        raise ValueError(
            f"data.block_size={block_size} is longer than the base's {base_block}; lower it, or "
            "pretrain with a larger model.block_size"
        )
    path = Path(config.data.path)
    if path.suffix in (".json", ".jsonl"):
        path, files = Path(config.run.dir) / "data", [path]
        prepare_qa(files, path, base.path, config.data.val_fraction, config.run.seed)
    replay = config.data.replay_path or base.meta["config"]["data"]["path"]
    return SFTData(path, config.data, base.tokenizer, block_size, config.run.seed, replay)


def evaluate(model: GPT, data: SFTData, batches: list[Batch]) -> dict[str, float]:
    """Validation loss of the replies, and whether the model would stop where they do.

    `stop_logprob` is the mean log-probability of the end-of-turn token at the true end of a reply;
    `stop_rate` the share of greedy replies to validation prompts that end by themselves.
    """
    end = data.tokenizer.end_of_turn
    ends = [(idx, targets, w * (targets == end)) for idx, targets, w in batches if w is not None]
    replies = generate(model, data.val_prompts(STOP_PROMPTS), Sampling(STOP_WITHIN), {end})
    return {
        "val_loss": mean_loss(model, batches),
        "stop_logprob": -mean_loss(model, ends),
        "stop_rate": sum(reply[-1] == end for reply in replies) / len(replies),
    }


def sample(model: GPT, data: SFTData, seed: int) -> str:
    """A validation question and the model's greedy reply."""
    prompt = data.val_prompts(STOP_PROMPTS)[seed % len(data.val[:STOP_PROMPTS])]
    reply = generate(model, [prompt], Sampling(STOP_WITHIN), {data.tokenizer.end_of_turn})[0]
    return f"  sample: {data.tokenizer.decode(prompt + reply)!r}"


def main(config: SFTConfig) -> Path:
    """Trains to config.optim.steps, or until Ctrl-C; returns the newest checkpoint."""
    run_dir, last_step = Path(config.run.dir), config.optim.steps
    base = load_checkpoint(config.base)
    if base.meta["kind"] != "base":
        raise ValueError(f"--base={config.base} is an {base.meta['kind']} checkpoint, not a base")
    checkpoint = open_run(run_dir, resolved(config))
    data = load_data(config, base)
    val_batches = data.val_batches()
    if checkpoint and is_complete(run_dir, last_step):
        print(f"{run_dir}: complete at step {last_step}, nothing to do")
        return checkpoint

    device = set_up(config.run.device, config.run.seed)
    model, tokenizer = base.model.to(device).train(), base.tokenizer
    optimizers = build_optimizers(model, config.optim)
    compile_model(model, config.run.compile)
    made_from = {
        "data": {"fingerprint": fingerprint(data.meta["files"])},
        "base": {"step": base.meta["step"], "fingerprint": fingerprint(base.meta["files"])},
    }
    row = resume(checkpoint, model, optimizers, made_from) if checkpoint else {}
    meta = made_from | {
        "kind": "instruct",
        "config": resolved(config),
        "environment": environment(device),
        "prepared": {k: v for k, v in data.meta.items() if k != "files"},
        "template": template_fingerprint(),
    }
    print(f"{model.n_params():,} parameters on {device.type}; {data.shares()}")

    flops = model.flops_per_token()
    log = RunLog(run_dir, config.run, last_step, row, resolved(config), flops, peak_flops(device))
    step = log.first_step
    with log, StopOnSignal() as stop:
        while True:
            if step and is_due(step, config.run.eval_every, last_step) and not stop.requested:
                row |= evaluate(model, data, val_batches)
                log.say(sample(model, data, seed=step))
            log.write(row)
            if step == last_step or stop.requested:
                break
            batches = data.micro_batches(step)
            result = train_step(model, optimizers, batches, step, config.optim)
            step += 1
            row = log.count(step, result)
            if is_due(step, config.run.save_every, last_step):
                save_checkpoint(
                    run_dir, step, model, optimizers, tokenizer, meta | {"metrics": row}
                )
        return save_checkpoint(run_dir, step, model, optimizers, tokenizer, meta | {"metrics": row})


if __name__ == "__main__":
    run_cli(SFTConfig, main, __doc__ or "")
