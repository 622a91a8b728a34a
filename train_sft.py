"""Instruction tuning: base checkpoint + Q&A pairs -> instruct checkpoint.

python train_sft.py --config configs/quickstart/sft.toml --base=out/my-run --run.dir=out/my-sft
"""

from __future__ import annotations

import gc
import shutil
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from data.chat import template_fingerprint
from data.prepare import prepare_qa
from data.sft import SFTData, SFTDataConfig
from data.sources.read import QA_SUFFIXES
from model.generate import Sampling, generate
from model.gpt import GPT, skips_documents
from runtime.cli import run_cli
from runtime.device import StopOnSignal, compile_model, has_bf16, pick_device, set_up
from runtime.files import fingerprint
from runtime.processes import (
    any_process,
    distribute,
    first_alone,
    is_first,
    start_processes,
    world_size,
)
from training.checkpoint import (
    PREPARED_QA,
    Checkpoint,
    check_origin,
    describe,
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

STOP_PROMPTS, STOP_WITHIN = 64, 128  # validation prompts asked at an evaluation, tokens to stop in
SAMPLES = 8  # of them shown beside the base's replies, in wandb


@dataclass(frozen=True)
class SFTConfig:
    """Everything that an instruction-tuning run depends on."""

    base: str
    """The base checkpoint, or its run (then the newest one)."""
    data: SFTDataConfig
    run: RunConfig
    optim: OptimConfig = field(default_factory=OptimConfig)


def load_data(config: SFTConfig, base: Checkpoint, new: bool) -> SFTData:
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
    if path.name.lower().endswith(QA_SUFFIXES):
        path, files = Path(config.run.dir) / PREPARED_QA, [path]
        with first_alone():
            if new and is_first():  # of a start that failed: the file may have been mended since
                shutil.rmtree(path, ignore_errors=True)
            prepare_qa(files, path, base.path, config.data.val_fraction, config.run.seed)
    read = base.meta["config"]["data"]
    replay, mask = config.data.replay_path or read["path"], read.get("document_mask", False)
    if config.data.replay and replay is None:
        raise ValueError(
            f"{config.base} was imported, so its text is not known; name the text to replay with "
            "--data.replay_path"
        )
    packed = config.data.layout == "packed"
    if config.data.layout == "auto":  # where attention can skip what it does not see
        skips = skips_documents(base.model.config) and has_bf16(pick_device(config.run.device))
        packed = skips and world_size() == 1  # packed, there may be fewer rows than processes
    seed = config.run.seed
    data = SFTData(path, config.data, base.tokenizer, block_size, seed, replay, mask, packed)
    same = fingerprint(data.replay_files) == base.meta["data"]["fingerprint"]
    if data.replay_files and config.data.replay_path is None and not same:
        raise ValueError(
            f"{replay} is no longer the text that the base was trained on; name the text to replay "
            "with --data.replay_path"
        )
    return data


def answer(model: GPT, data: SFTData, n: int) -> list[list[int]]:
    """Greedy replies to the first `n` validation prompts."""
    return generate(model, data.val_prompts(n), Sampling(STOP_WITHIN), {data.tokenizer.end_of_turn})


def evaluate(model: GPT, data: SFTData, replies: list[list[int]]) -> dict[str, float]:
    """Validation loss of the true replies, and whether the model would stop where they do.

    `stop_logprob` is the mean log-probability of the end-of-turn token at the true end of a reply;
    `stop_rate` the share of the model's own `replies` that end by themselves.
    """
    batches, end = data.val_batches(), data.tokenizer.end_of_turn
    ends = [
        b._replace(weights=b.weights * (b.targets == end)) for b in batches if b.weights is not None
    ]
    return {
        "val_loss": mean_loss(model, batches),
        "stop_logprob": -mean_loss(model, ends),
        "stop_rate": sum(reply[-1] == end for reply in replies) / len(replies),
    }


def main(config: SFTConfig) -> Path:
    """Trains to config.optim.steps, or until Ctrl-C; returns the newest checkpoint."""
    run, run_dir, steps = config.run, Path(config.run.dir), config.optim.steps
    device_name = start_processes(run.device)
    checkpoint = open_run(run_dir, asdict(config))

    base = load_checkpoint(config.base)
    if base.meta["kind"] != "base":
        raise ValueError(f"--base={config.base} is an {base.meta['kind']} checkpoint, not a base")
    data = load_data(config, base, new=checkpoint is None)
    replayed = data.replay_files
    made_from = {
        "data": {"fingerprint": fingerprint(data.meta["files"])},
        "base": {"step": base.meta["step"], "fingerprint": identity(base.meta)},
        "replay": {"fingerprint": fingerprint(replayed)} if replayed else None,
    }
    if checkpoint:
        check_origin(checkpoint, made_from)
        if is_complete(checkpoint, steps):
            print(f"{run_dir}: complete at step {steps}, nothing to do")
            return checkpoint

    device = set_up(device_name, run.seed)
    model = base.model.to(device).train()
    optimizers = build_optimizers(model, config.optim)
    model.loss_chunk = run.loss_chunk
    compile_model(model, run.compile)
    prompts, decode = data.val_prompts(STOP_PROMPTS), base.tokenizer.decode
    shown_there = run.wandb != "disabled" and is_first()
    before = answer(model, data, SAMPLES) if shown_there else []
    row = resume(checkpoint, model, optimizers) if checkpoint else {}
    distributed = distribute(model, run.seed, row.get("step", 0))
    meta = describe("instruct", config, device, data.meta) | made_from
    meta["template"] = template_fingerprint()
    save = partial(save_checkpoint, run_dir, model, optimizers, base.tokenizer, meta)

    print(
        f"{model.n_params():,} parameters on {device.type}, from step {base.meta['step']} of "
        f"{config.base}; step {row.get('step', 0)} of {steps}, {data.steps_per_epoch} an epoch"
    )
    print(data.shares())
    with RunLog(config, row, meta) as log, StopOnSignal() as stop:
        for step in count(log.first_step):
            due = partial(is_due, step, last=steps)
            stopped = any_process(stop.requested)
            if step == steps or stopped or (step > log.first_step and due(run.save_every)):
                newest = save(step, log.row())
            scores: dict[str, float] = {}
            if step and due(run.eval_every) and is_first() and not stopped:
                replies = answer(model, data, STOP_PROMPTS)
                scores = evaluate(model, data, replies)
                shown = step % len(replies)
                log.say(f"  sample: {decode(prompts[shown] + replies[shown])!r}")
                sides = zip(prompts, before, replies, strict=False)
                log.samples(["prompt", "base", "instruct"], [list(map(decode, s)) for s in sides])
            log.write(step, scores)
            if step == steps or stopped:
                break
            log.count(step_within_memory(model, optimizers, data, step, config.optim, distributed))
            if step == log.first_step:
                gc.freeze()  # what is there now stays; collections need not look through it again
    gc.unfreeze()
    print(f"instruct checkpoint: {newest}")
    return newest


if __name__ == "__main__":
    run_cli(SFTConfig, main, __doc__ or "")
