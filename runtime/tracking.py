"""Weights & Biases beside metrics.jsonl; none of its failures ends a run of ours.

Every step is logged there once, though after a kill it is not known which of the last rows wandb,
which keeps them in memory for a while, has stored. For that, wandb.json in the run's folder holds
`id`, the run's at wandb; `told`, the last step logged by processes that ended in order; and `open`,
where a process that has not ended logs: "online", or the folder of its offline run.
"""

import contextlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.files import checkpoints, read_json, write_json

Row = dict[str, Any]  # of metrics.jsonl or samples.jsonl
# In seconds. What is not uploaded by then stays on disk.
TIMEOUTS = {"init_timeout": 60, "finish_timeout": 300, "finish_timeout_raises": True}


class Tracker:
    """A run at wandb that goes on after a resume. Does nothing if disabled or once wandb failed."""

    def __init__(
        self,
        config: Any,  # the run's training.config.RunConfig: `wandb` is disabled, offline or online
        about: dict[str, Any],  # what wandb shows as the run's config
        rows: Sequence[tuple[Row, Row | None]],  # metrics and samples before the step to start from
        resumed: bool,  # whether it starts from a checkpoint; if not, it is a new run at wandb
        say: Callable[[str], None],
    ) -> None:
        self._config, self._folder, self._say = config, Path(config.dir), say
        self._file = self._folder / "wandb.json"
        self._run: Any = None
        if config.wandb == "disabled":
            return
        with self._failure_ends_tracking():
            self._state = _read_state(self._file) if resumed else _new_state()
            self._start(about)
            for row, samples in rows:
                self.log(row, samples)

    def _start(self, about: dict[str, Any]) -> None:
        import wandb  # slow, so only where it is used

        self._wandb, unfinished, online = wandb, self._state["open"], self._config.wandb == "online"
        ours = not (self._folder / "wandb").is_symlink()
        if ours and unfinished and re.fullmatch(r"offline-run-[\w-]+", unfinished):
            shutil.rmtree(self._folder / "wandb" / unfinished, ignore_errors=True)  # logged again
        options: dict[str, Any] = {"resume": "allow", "reinit": "create_new", "settings": TIMEOUTS}
        options |= {"project": self._config.wandb_project, "name": self._folder.name}
        options |= {"dir": str(self._folder), "config": about, "job_type": about.get("kind")}
        if online:
            try:
                if not wandb.login(prompt=False):
                    raise ValueError("it has no API key here")
                self._run = wandb.init(mode="online", id=self._state["id"], **options)
            except Exception as error:
                online, reason = False, " ".join(str(error).split())[:200]
                self._say(f"wandb: offline, because {reason}; `wandb sync` sends it later")
                wandb.teardown()  # the attempt still holds the id
        if not online:
            if unfinished == "online":  # offline, wandb cannot be asked which steps it has
                self._say("wandb: a new run there, with all steps from the first one")
                self._state = _new_state()
            self._run = wandb.init(mode="offline", id=self._state["id"], **options)
        # The axis is our step: on its own, wandb drops rows of a step that it has passed.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._told = max(self._state["told"], int(self._run.summary.get("step") or 0))
        self._state["open"] = "online" if online else Path(self._run.dir).parent.name
        write_json(self._file, self._state)

    def log(self, row: Row, samples: Row | None = None) -> None:
        """Logs the metrics of a step, and a table of its samples, unless wandb has that step."""
        if self._run is not None and row["step"] > self._told:
            with self._failure_ends_tracking():
                table: Row = {}
                # Where samples.jsonl was edited by somebody.
                with contextlib.suppress(LookupError, TypeError, ValueError, AssertionError):
                    if samples:
                        table["samples"] = self._wandb.Table(samples["columns"], samples["rows"])
                self._run.log(row | table)
                self._told = row["step"]

    def finish(self, failed: bool) -> None:
        """Ends the run at wandb, after the upload of the newest checkpoint if the config asks."""
        if self._run is None:
            return
        with self._failure_ends_tracking():
            newest = checkpoints(self._folder)[-1:]
            if self._config.wandb_artifact and newest:
                name, aliases = f"model-{self._state['id']}", [newest[0].name]
                self._run.log_artifact(str(newest[0]), name, "model", aliases=aliases)
            run, self._run = self._run, None
            run.finish(exit_code=int(failed))
            write_json(self._file, self._state | {"told": self._told, "open": None})

    @contextlib.contextmanager
    def _failure_ends_tracking(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._say(f"wandb failed and is off from here: {' '.join(str(error).split())[:200]}")
            run, self._run = self._run, None
            with contextlib.suppress(Exception):  # where it has not begun there is none to end
                run.finish(exit_code=1)


def _new_state() -> dict[str, Any]:
    return {"id": uuid.uuid4().hex[:12], "told": 0, "open": None}


def _read_state(file: Path) -> dict[str, Any]:
    """What wandb.json says; a new run's state where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        state: dict[str, Any] = read_json(file)
        if (type(state["id"]), type(state["told"]), type(state["open"] or "")) == (str, int, str):
            return state
    return _new_state()
