"""Fresh processes in turns: a round is A-B-B-A, everybody in order and then in reverse."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from bench.cases import ROOT, Figures

Row = dict[str, Any]


class WorkerError(ValueError):
    """A process ended badly; says its last line."""


class Output(NamedTuple):
    """What a process printed, each line with the seconds since its start, and when it ended."""

    lines: list[tuple[float, str]]
    seconds: float

    def first(self, beginning: str) -> tuple[float, str]:
        """When the first line that begins so was printed, and the line."""
        return next(line for line in self.lines if line[1].startswith(beginning))

    def steps(self, pattern: str) -> dict[int, float]:
        """When the lines that begin with a pattern were printed, by the number in its group."""
        found = [(seconds, re.match(pattern, line)) for seconds, line in self.lines]
        return {int(match[1]): seconds for seconds, match in found if match}

    def figures(self) -> Figures:
        """What a function returned, and the peak memory in bytes."""
        return dict(json.loads(self.lines[-1][1]))


def start(command: Sequence[Any], values: dict[str, Any], cwd: Path = ROOT, **env: str) -> Output:
    """Runs a command line of bench/launch.py, $NAMES replaced; WorkerError if its code is not 0."""
    words = [Template(str(word)).safe_substitute(values) for word in command]
    # Unbuffered, so that the time of a line is when it was printed.
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **env}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        begin, lines = time.perf_counter(), list[tuple[float, str]]()
        command = [sys.executable, str(ROOT / "bench/launch.py"), *words]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "errors": "replace"}
        with subprocess.Popen(command, cwd=cwd, env=env, **pipes) as process:
            for line in process.stdout or ():
                lines.append((time.perf_counter() - begin, line.rstrip("\n")))
        seconds = time.perf_counter() - begin
        if code := process.returncode:
            errors.seek(0)
            said = [*filter(None, map(str.strip, errors))] or [f"ended with code {code}"]
            raise WorkerError(re.sub("^(ValueError|error): ", "", said[-1]))
    return Output(lines, seconds)


def call(function: str, **arguments: Any) -> Figures:
    """What "module:function" returns in a fresh process, and its peak memory."""
    return start([function, json.dumps(arguments)], {}).figures()


def interleave(workers: Mapping[str, Callable[[], Figures]], passes: int) -> list[Row]:
    """Runs every worker in every pass: A B, B A, A B, ..., so that a drift meets all alike. Of each
    its `name`, `runs` (figures by pass) and `error`. Raises ValueError: nothing of ours ran.
    """
    rows: list[Row] = [{"name": name, "runs": [None] * passes} for name in workers]
    for i in range(passes):
        for row in [row for row in rows[:: -1 if i % 2 else 1] if "error" not in row]:
            try:
                row["runs"][i] = figures = workers[row["name"]]()
                said = "  ".join(f"{k} {v:,.4g}" for k, v in figures.items())
                print(f"pass {i + 1} of {passes}, {row['name']}: {said}", flush=True)
            except WorkerError as error:
                row["error"] = without_folders(str(error))
                print(f"{row['name']}: error: {error}", file=sys.stderr)
    errors = [row.get("error") for row in rows if row["name"].startswith("ours")]
    if errors and all(errors):
        raise ValueError(f"nothing of ours ran: {errors[0]}")
    return rows


def without_folders(text: str) -> str:
    """A text whose absolute paths are cut down to their last part: results name no machine."""
    return re.sub(r"(?<![\w.])/(?:[^/\s'\":=]+/)+", "", text)
