"""What a run tells: metrics.jsonl first, a progress bar or plain lines, wandb if asked for."""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from runtime.cli import say, shortened, visible
from runtime.files import write_json, write_text
from runtime.processes import is_first, world_size
from runtime.tracking import Tracker
from training.step import StepResult


class RunLog:
    """Collects the metrics of each step and writes those of the logged ones; of several processes
    only the first does. As a context it opens the file and drops what a killed process wrote beyond
    the checkpoint it resumes from, so that every step is logged once.

    Args:
        config: the whole config of the run, that of the script.
        row: metrics of the checkpoint resumed from; {} for a new run.
        about: what the run's checkpoints say of it, for wandb.
        peak_speed: tokens per second at the device's peak FLOP/s, for MFU; None if not known.
    """

    def __init__(
        self, config: Any, row: dict[str, Any], about: dict[str, Any], peak_speed: float | None
    ) -> None:
        self.config, self.run_dir, self.steps = config, Path(config.run.dir), config.optim.steps
        self.peak_speed = peak_speed
        self._since = time.perf_counter()
        self._begin = self._since - row.get("seconds", 0.0)
        self.first_step = row.get("step", 0)
        self._recent_tokens, self._recent_seconds = 0, 0.0
        self.row, self._about = row, about  # row: metrics of the newest step
        self._samples: dict[str, Any] | None = None
        self._val_losses = dict[int, float]()

    def __enter__(self) -> Self:
        if not is_first():
            return self
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(self.run_dir / "config.json", asdict(self.config))
        kept, samples = self._kept("metrics.jsonl"), self._kept("samples.jsonl")
        losses = ((r["step"], r.get("val_loss")) for r in kept)  # of a file that may be edited
        self._val_losses = {s: v for s, v in losses if isinstance(v, float) and math.isfinite(v)}
        self._file = open(self.run_dir / "metrics.jsonl", "a", encoding="utf-8")
        numbers, left = MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(
            *("step", numbers, BarColumn(), "{task.description}", left),
            console=Console(),
            disable=not sys.stdout.isatty(),
            transient=True,
        )
        about = asdict(self.config) | {k: v for k, v in self._about.items() if k != "config"}
        tables = {row["step"]: row for row in samples}
        rows = [(row, tables.get(row["step"])) for row in kept]
        self._tracker = Tracker(self.config.run, about, rows, self.first_step > 0, self.say)
        self._progress.start()
        self._task = self._progress.add_task("", total=self.steps, completed=self.first_step)
        return self

    def __exit__(self, *exception: object) -> None:
        if is_first():
            self._progress.stop()
            self._file.close()
            self._tracker.finish(failed=exception[0] is not None)

    def _kept(self, name: str) -> list[dict[str, Any]]:
        """Drops a file's rows that are not before the step resumed from; returns the others."""
        path = self.run_dir / name
        kept = [row for row in read_metrics(path) if row["step"] < self.first_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    @property
    def overfitted(self) -> tuple[int, float, float] | None:
        """Where validation loss was lowest, that loss and the last, if it has risen since."""
        if not self._val_losses:
            return None
        best, last = min(self._val_losses, key=self._val_losses.__getitem__), max(self._val_losses)
        return None if best == last else (best, self._val_losses[best], self._val_losses[last])

    def add(self, result: StepResult) -> None:
        """Takes in a step that was just taken; shown in the bar.

        `tokens` counts computed positions, padding included. `tokens_per_second` is of training
        since the last logged row, without evaluations and saves; `seconds` is the time since the
        run was set up, with them, over all resumes.
        """
        if not is_first():
            return
        now = time.perf_counter()
        self._recent_tokens += result.tokens
        self._recent_seconds += now - self._since
        speed, replayed = self._recent_tokens / self._recent_seconds, result.replay_loss
        self.row = {
            "step": result.step,
            "tokens": self.row.get("tokens", 0) + result.tokens,
            "loss": result.loss,
            **({"replay_loss": replayed} if replayed is not None else {}),
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": round(speed, 1),
            "seconds": round(now - self._begin, 3),
        }
        if self.peak_speed is not None:
            self.row["mfu"] = round(speed / self.peak_speed / world_size(), 4)
        shown = f"loss {result.loss:.4f}  {speed:,.0f} tokens/s"
        self._progress.update(self._task, completed=result.step, description=shown)

    def write(self, step: int, scores: dict[str, float]) -> None:
        """Logs step `step`, the newest, with its evaluation if it had one, where it is due. The
        time of the next step begins here.
        """
        self._since = time.perf_counter()
        due = scores or is_due(step, self.config.run.log_every, self.steps)
        if not (step and due and is_first()):
            return
        row = self.row | scores
        if bad := [key for key, value in row.items() if not math.isfinite(value)]:
            raise ValueError(f"step {step}: {bad[0]} is {row[bad[0]]}; try a lower learning rate")
        self._recent_tokens, self._recent_seconds = 0, 0.0
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._samples:
            with open(self.run_dir / "samples.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, **self._samples}) + "\n")
        self._tracker.log(row, self._samples)
        self._samples = None
        if "val_loss" in row:
            self._val_losses[step] = row["val_loss"]
        # On a terminal the bar shows the rest; a pipe gets every logged line.
        if scores or self._progress.disable:
            names = "loss replay_loss val_loss val_bpb val_kl stop_logprob stop_rate".split()
            shown = "  ".join(f"{k} {row[k]:.4f}" for k in names if k in row)
            speed = f"{row['tokens_per_second']:,.0f} tokens/s"
            risen = f"  (lowest at step {self.overfitted[0]})" if self.overfitted else ""
            self.say(f"step {step}/{self.steps}  {shown}{risen}  {speed}")

    def samples(self, text: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints two lines of what the model wrote; samples.jsonl, and wandb beside the next row,
        get a table of it.
        """
        if not is_first():
            return
        self.say(shortened(f"  sample: {text!r}", 2 * self._progress.console.width))
        self._samples = {"columns": [*columns], "rows": [[*row] for row in rows]}

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        text = visible(text)
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def is_due(step: int, every: int | str, last: int) -> bool:
    """Whether what happens as `RunConfig.save_every` says happens at a step, which is 1 or more."""
    if isinstance(every, int):
        return step % every == 0 or step == last
    factor = float(every.partition(":")[2] or 2)
    below = math.floor(math.log(step, factor))
    return step in (round(factor**below), round(factor ** (below + 1)), last)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. What is no row is left out, and told but for a last line that a
    kill cut short.
    """
    rows, bad = list[dict[str, Any]](), list[int]()
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            json.dumps(row, allow_nan=False)  # raises of what JSON does not have
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            if i < len(lines) or line.endswith("\n"):
                bad.append(i)
    if bad:
        say(f"note: {path}, line {bad[0]}: damaged, left out ({len(bad)} in all)")
    return rows
