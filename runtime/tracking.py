"""Weights & Biases beside metrics.jsonl: its network, login and files never end a run of ours."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.files import checkpoints, write_json

MARK = (
    "wandb.json"  # in the run's folder: the id there, what parts that ended told, one that did not
)
ONLINE = "online"  # in its place for an offline part's folder
INIT_TIMEOUT, FINISH_TIMEOUT = 60, 300  # seconds; what is not uploaded by then lies on disk


class Tracker:
    """A run of wandb that goes on after a resume, or nothing where it is disabled or fails.

    Every logged step is told once, on the axis of our own steps. wandb keeps what it is told in
    memory for a while, so what a killed process had told is not known: offline, its part is
    thrown away and told again; online, we ask what arrived. A run that begins at step 0 is a new
    one there.

    Args:
        config: the run's; `config.wandb` is disabled, offline or online.
        about: its whole config, commit, data and machine.
        rows: the metrics of the steps before those to come, of metrics.jsonl.
        resumed: whether there were any, logged or not.
        say: prints a line.
    """

    def __init__(
        self,
        config: Any,
        about: dict[str, Any],
        rows: Sequence[dict[str, Any]],
        resumed: bool,
        say: Callable[[str], None],
    ) -> None:
        self._run: Any = None
        self._tables: dict[str, Any] = {}
        self._config, self._folder, self._say = config, Path(config.dir), say
        if config.wandb == "disabled":
            return
        with self._harmless():
            self._begin(about, rows, resumed)

    def _begin(self, about: dict[str, Any], rows: Sequence[dict[str, Any]], resumed: bool) -> None:
        import wandb  # slow to import, so only where it is used

        file, mode = self._folder / MARK, self._config.wandb
        self._mark = read_mark(file) if resumed else new_mark()
        unfinished = self._mark["open"]
        if unfinished and re.fullmatch(r"offline-run-[\w-]+", unfinished):
            shutil.rmtree(self._folder / "wandb" / unfinished, ignore_errors=True)
        options: dict[str, Any] = {
            "project": self._config.wandb_project,
            "name": self._folder.name,
            "id": self._mark["id"],
            "job_type": about.get("kind"),
            "resume": "allow",
            "dir": str(self._folder),
            "config": about,
            "reinit": "create_new",
            "settings": wandb.Settings(
                init_timeout=INIT_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
                finish_timeout_raises=True,
            ),
        }
        if mode == "online":
            try:
                if not wandb.login(prompt=False):
                    raise ValueError("it has no API key here")
                self._run = wandb.init(mode="online", **options)
            except Exception as error:
                reason = _one_line(error)
                self._say(f"wandb: offline, because {reason}; `wandb sync` sends it later")
                mode = "offline"
                wandb.teardown()  # the attempt still holds the id
        if self._run is None:
            if unfinished == ONLINE:  # what arrived of it cannot be asked for
                self._say("wandb: a new run there, with all steps from the first one")
                self._mark = new_mark()
                options["id"] = self._mark["id"]
            self._run = wandb.init(mode=mode, **options)
        # Our own axis: wandb's own drops points whose step is not new to it.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._told = self._mark["told"]
        self._mark["open"] = ONLINE if mode == "online" else Path(self._run.dir).parent.name
        if mode == "online":
            self._told = max(self._told, int(self._run.summary.get("step") or 0))
        write_json(file, self._mark)
        for row in rows:
            self.log(row)

    def log(self, row: dict[str, Any]) -> None:
        """Tells the metrics of a step, unless they have been told."""
        tables, self._tables = self._tables, {}
        if self._run is None or row["step"] <= self._told:
            return
        with self._harmless():
            self._run.log(row | tables)
            self._told = row["step"]

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Tells a table of texts with the next metrics."""
        if self._run is not None:
            with self._harmless():
                import wandb

                self._tables[name] = wandb.Table(list(columns), [list(row) for row in rows])

    def finish(self, failed: bool) -> None:
        """Ends it, and uploads the newest checkpoint where the config asks for it."""
        if self._run is None:
            return
        with self._harmless():
            newest = checkpoints(self._folder)[-1:]
            if self._config.wandb_artifact and newest:
                import wandb

                artifact = wandb.Artifact(f"model-{self._mark['id']}", "model")
                artifact.add_dir(str(newest[0]))
                self._run.log_artifact(artifact, aliases=[newest[0].name])
            run, self._run = self._run, None
            run.finish(exit_code=int(failed))
            write_json(self._folder / MARK, self._mark | {"told": self._told, "open": None})

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Makes any failure the end of wandb, and of nothing else."""
        try:
            yield
        except Exception as error:
            self._say(f"wandb failed and is off from here: {_one_line(error)}")
            run, self._run = self._run, None
            if run is not None:
                with contextlib.suppress(Exception):
                    run.finish(exit_code=1)


def new_mark() -> dict[str, Any]:
    """Of a run of which nothing has been told."""
    return {"id": uuid.uuid4().hex[:12], "told": 0, "open": None}


def read_mark(file: Path) -> dict[str, Any]:
    """What MARK says; a new one where it is missing or damaged."""
    try:
        mark = json.loads(file.read_text(encoding="utf-8"))
        kinds = (type(mark["id"]), type(mark["told"]), type(mark["open"] or ""))
    except (OSError, ValueError, TypeError, KeyError):
        return new_mark()
    return mark if kinds == (str, int, str) else new_mark()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
