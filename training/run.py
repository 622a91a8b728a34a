"""A training run: its folder, what it goes on from, and when it saves, evaluates and stops."""

import contextlib
import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.optim import Optimizer

from data.chat import template_fingerprint
from data.prepare import prepare_qa
from data.sources.read import QA_SUFFIXES
from data.tokenizer import Tokenizer
from model.gpt import GPT
from runtime import device, processes
from runtime.cli import listed, say
from runtime.files import checkpoints, is_checkpoint, lock, read_meta, step_of, verify_checksums
from training.checkpoint import read_checkpoint, resume, save_checkpoint
from training.config import changes, differences
from training.log import RunLog, is_due, read_metrics
from training.step import StepResult

PREPARED_QA = "prepared_qa"  # in an SFT run: what was made of a Q&A file
# What closes a run of this process, by the folder that it has locked.
_locks: dict[Path, contextlib.ExitStack] = {}


class Run:
    """All of a run that is not training itself; it never computes a loss. The scripts ask it in
    their loop whether to save, to evaluate and to stop. As a context it is the run's time of
    training: the log is open, and Ctrl-C, SIGTERM and SIGHUP ask to stop. Raises ValueError: the
    folder holds something else, a run with another config, or one that another process trains.
    Raises SystemExit: at the end of a time that was ended by a signal, with the exit code that a
    shell expects of it.
    """

    def __init__(self, kind: Literal["base", "instruct"], config: Any) -> None:
        self.kind, self.config = kind, config
        if kind == "base":
            device.check_size(config.model, rows=config.data.batch_size)
        self.folder, self.last_step = Path(config.run.dir), config.optim.steps
        self.device = processes.start_processes(config.run.device)  # its name
        self.newest = find_checkpoint(self.folder, config)  # the newest checkpoint; None: none yet
        # Most rows of a forward pass; halved where memory runs out.
        self.rows = config.data.micro_batch_size or config.data.batch_size
        self._signals, self._interrupted = device.StopOnSignal(), False
        # Of a run in this process that failed before it trained: this one takes its place.
        _locks.pop(self.folder, contextlib.ExitStack()).close()
        # Of the folder's lock, once it is taken (in `_locks` then); in training of log and signals.
        self._held = contextlib.ExitStack()

    def made_from(self, prepared: dict[str, Any], **origin: dict[str, Any] | None) -> None:
        """Notes what the run is made of; ValueError if its newest checkpoint is of other data."""
        self.prepared, self.origin = {k: v for k, v in prepared.items() if k != "files"}, origin
        meta = read_meta(self.newest) if self.newest else origin
        for name, value in origin.items():
            if changed := differences(meta.get(name), value, name):
                what = f"{self.newest} was made from another {name} than the config now names"
                raise ValueError(f"{what} ({listed(changed, '; ')}); give another --run.dir")

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint, of a run that has one."""
        assert self.newest is not None
        return self.newest

    def is_complete(self) -> bool:
        """Whether its last step is saved and that step's evaluation logged, which it says."""
        last = read_metrics(self.folder / "metrics.jsonl")[-1:]
        logged = [row["step"] for row in last if "val_loss" in row] == [self.last_step]
        if self.newest is None or step_of(self.newest) != self.last_step or not logged:
            return False
        say(f"{self.folder}: complete at step {self.last_step}, nothing to do")
        return True

    def _take(self) -> None:
        """Makes the folder this process's own until the run ends; ValueError if it is another's."""
        if processes.is_first() and _locks.get(self.folder) is not self._held:
            with contextlib.ExitStack() as taken:
                taken.enter_context(lock(self.folder, "training in"))
                if find_checkpoint(self.folder, self.config) != self.newest:
                    what = f"another process was training in {self.folder}"
                    raise ValueError(f"{what}; the same command goes on")
                tidy(self.folder)
                self._held = _locks[self.folder] = taken.pop_all()

    def _is_own(self, folder: Path) -> bool:
        """Whether a folder is whole, and what the newest checkpoint was made from."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            meta, mine = read_meta(folder), read_meta(self.newest or folder)["prepared"]
            verify_checksums(folder, meta["files"])
            return bool(meta["request"] == mine["request"])
        return False

    def prepare_qa(self, path: str, tokenizer_of: Path) -> Path:
        """The folder of prepared conversations: `path`, or what is made of that Q&A file."""
        if not path.lower().endswith(QA_SUFFIXES):
            return Path(path)
        self._take()
        folder, share = self.folder / PREPARED_QA, self.config.data.val_fraction
        prepare = partial(
            prepare_qa, [Path(path)], folder, tokenizer_of, share, self.config.run.seed
        )
        if not processes.is_first():
            processes.any_process(False)  # returns once the first one has made it, and says so
        try:
            prepare()
        except ValueError:  # perhaps it is of a start with other Q&A, which was refused
            # Bad Q&A, or something there that this project did not make.
            if not Path(path).is_file() or not (folder / "meta.json").exists():
                raise
            if self._is_own(folder):
                what = f"{self.newest} was made from another data than {path}"
                raise ValueError(f"{what}; give another --run.dir") from None
            shutil.rmtree(folder, ignore_errors=True)
            prepare()
        if processes.is_first():
            processes.any_process(False)
        return folder

    def resume(
        self,
        model: GPT,
        optimizers: list[Optimizer],
        tokenizer: Tokenizer,
        loss: nn.Module | None = None,
    ) -> nn.Module:
        """Puts all back as the newest checkpoint has it; returns what to train, `loss` or model."""
        self._take()
        run, where = self.config.run, model.wte.weight.device
        model.loss_chunk = run.loss_chunk
        model.activation_checkpointing = run.activation_checkpointing
        n_tokens = self.last_step * self.config.data.batch_size * model.config.block_size
        flops, tunes = n_tokens * device.flops_per_token(model), self.kind == "instruct"
        device.compile_model(model, run.compile, flops, dynamic=tunes)
        row = resume(self.newest, model, optimizers) if self.newest else {}
        self.first_step = row.get("step", 0)
        self._state = model, optimizers, tokenizer
        self._meta: dict[str, Any] = {"kind": self.kind, "config": asdict(self.config)}
        self._meta |= {"prepared": self.prepared, "environment": device.environment(where)}
        self._meta |= self.origin
        if self.kind == "instruct":
            self._meta["template"] = template_fingerprint()
        peak = device.peak_flops(where)
        peak_speed = peak / device.flops_per_token(model) if peak and self.kind == "base" else None
        self.log = RunLog(self.config, row, self._meta, peak_speed)  # takes in what happens
        return processes.distribute(loss or model, self.config.run.seed, self.first_step)

    def __enter__(self) -> Self:
        self._held.enter_context(self.log)
        self._held.enter_context(self._signals)
        return self

    def __exit__(self, *exception: Any) -> None:
        gc.unfreeze()
        self._held.__exit__(*exception)
        if exception[0] is None and self.log.overfitted:
            step, lowest, last = self.log.overfitted
            path = self.folder / f"step_{step:06d}"
            where = path if path.exists() else f"step {step}, of which no checkpoint was saved"
            say(f"val_loss was lowest, {lowest:.4f}, at {where}; it is {last:.4f} now")
        if isinstance(exception[1], RuntimeError) and self._signals.number:
            # Such as a compiler that the same Ctrl-C has ended.
            say(f"interrupted: {exception[1]!s:.80}")
            raise SystemExit(128 + self._signals.number)
        if exception[0] is None and processes.any_process(self._signals.number > 0):
            say(f"stopped at step {self._step} of {self.last_step}; the same command goes on")
            raise SystemExit(128 + (self._signals.number or signal.SIGTERM))

    def steps(self) -> Iterator[int]:
        """How many steps have been taken: first what the checkpoint says, in the end all."""
        for step in range(self.first_step, self.last_step + 1):
            self._interrupted = processes.any_process(self._signals.number > 0)
            self._step = step
            yield step
            if step == self.first_step:
                gc.freeze()  # what is there now stays; collections need not look through it again

    def must_save(self, step: int) -> bool:
        """Whether a checkpoint is due."""
        due = step > self.first_step and is_due(step, self.config.run.save_every, self.last_step)
        return due or self.must_stop(step)

    def must_evaluate(self, step: int) -> bool:
        """Whether an evaluation is due; only the first process makes it, or all that share one."""
        due = step > 0 and is_due(step, self.config.run.eval_every, self.last_step)
        mine = processes.is_first() or self.config.run.shard
        return due and mine and not self._interrupted

    def must_stop(self, step: int) -> bool:
        """Whether the run ends here: at its last step, or because a signal asked for it."""
        return step == self.last_step or self._interrupted

    def save(self, step: int) -> None:
        """Writes a checkpoint."""
        self.newest = save_checkpoint(self.folder, *self._state, self._meta, step, self.log.row)

    def within_memory(self, train: Callable[[int, int], StepResult], step: int) -> StepResult:
        """`train(step, rows)`, again with half the rows if out of memory; ValueError if at 1."""
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                return train(step, self.rows)
            # Out of the handler, which holds on to everything that was computed.
            if self.rows == 1 or processes.world_size() > 1:
                remedy = "lower it, set run.activation_checkpointing or run.loss_chunk"
                raise ValueError(f"out of memory at data.micro_batch_size={self.rows}; {remedy}")
            self.rows //= 2
            self._state[0].zero_grad()
            torch.cuda.empty_cache()
            say(f"out of memory: going on with micro-batches of {self.rows} rows, same step size")


def find_checkpoint(folder: Path, config: Any) -> Path | None:
    """The checkpoint from which a run goes on, or None. Raises ValueError as `Run`."""
    if steps := checkpoints(folder):
        meta = read_checkpoint(steps[-1])[1]
        if changed := changes(meta["config"], config):
            what = f"{folder} holds a run with another config: {listed(changed, '; ')}"
            remedy = "Give the same config to go on with it, or another --run.dir"
            raise ValueError(f"{what}. {remedy}")
        noted = meta["metrics"].get("step", meta["step"])
        if not meta["step"] == noted == step_of(steps[-1]):
            raise ValueError(f"{steps[-1]} is of step {meta['step']}; name it so, or delete it")
        return steps[-1]
    # What a start that failed early leaves behind is ours: prepared Q&A, dotted names.
    names = {p.name for p in folder.glob("[!.]*")}
    ours = (folder / "config.json").exists() or names <= {PREPARED_QA}
    if not ours or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is not empty and holds no run; give another --run.dir")
    return None


def tidy(folder: Path) -> None:
    """Deletes what a killed process left half written in a run's folder. Renames what has a
    checkpoint's name and is none, such as a folder that was copied while it was written: its step
    is to be saved there.
    """
    for left in folder.glob(f".*.{'[0-9a-f]' * 8}.tmp"):
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    for part in filter(is_checkpoint, folder.iterdir()):
        if not (part / "meta.json").exists():
            names = (f"{part.name}.incomplete{i or ''}" for i in count())
            name = next(n for n in names if not os.path.lexists(folder / n))
            part.rename(folder / name)
            say(f"{part} has no meta.json, so it is no whole checkpoint: now {name}")
