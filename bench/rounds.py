"""What every bench shares: fresh processes in turns, statistics, one result file per case.

A round is A-B-B-A: every project once in order and once in reverse, each time in a fresh process.
A pass is half of it. Ratios are taken within a pass, between runs that lie close in time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.launch import MARK
from bench.peers import PEERS, commit, copy_tree
from runtime.files import write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
LAUNCH = ROOT / "bench" / "launch.py"
Figures = dict[str, float | None]  # of one run, by name; units are in bench/table.py
Row = dict[str, Any]


def sizes(case: Any) -> dict[str, Any]:
    """Of a case's model, by name."""
    return {k: getattr(case, k) for k in ("n_layer", "n_head", "n_embd", "block_size")}


class WorkerError(Exception):
    """A worker ended badly; says its last line."""


@dataclass(frozen=True)
class Output:
    """What a process printed.

    Attributes:
        lines: each with the seconds since the process was started.
        seconds: from start to end.
    """

    lines: list[tuple[float, str]]
    seconds: float

    def last_json(self) -> dict[str, Any]:
        """The last line, which is JSON."""
        value: dict[str, Any] = json.loads(self.lines[-1][1])
        return value

    def first(self, beginning: str) -> float:
        """When the first line that begins so was printed."""
        return next(seconds for seconds, line in self.lines if line.startswith(beginning))

    def peak_memory(self) -> int:
        """Bytes, as `bench/launch.py` says them."""
        return next(int(line.rsplit()[-1]) for _, line in self.lines if line.startswith(MARK))


def start(
    command: Sequence[str | Path], cwd: Path = ROOT, env: dict[str, str] | None = None
) -> Output:
    """Runs Python with this command line in a fresh process.

    Raises:
        WorkerError: it ended with another code than 0.
    """
    # Unbuffered, so that the time of a line is when it was printed.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        lines = [(time.perf_counter() - begin, line.rstrip("\n")) for line in process.stdout]
        code, seconds = process.wait(), time.perf_counter() - begin
        if code:
            errors.seek(0)
            said = [line.strip() for line in errors if line.strip()]
            raise WorkerError(said[-1] if said else f"ended with code {code}")
    return Output(lines, seconds)


def worker(module: str, **spec: Any) -> Callable[[int], Figures]:
    """A run is `python -m MODULE --one SPEC` in a fresh process, the same in every pass."""
    return lambda i: start(["-m", module, "--one", json.dumps(spec)]).last_json()


def order(names: Sequence[str], passes: int) -> list[tuple[int, str]]:
    """(pass, name) of every run: A B, B A, A B, ..., so that a drift meets all alike."""
    return [(i, name) for i in range(passes) for name in (names if i % 2 == 0 else reversed(names))]


def interleave(workers: Mapping[str, Callable[[int], Figures]], passes: int) -> list[Row]:
    """Runs every worker in every pass; a worker that fails is not run again.

    Returns:
        A row per worker: `name`, `runs` (figures by pass, None where it did not run) and, where it
        failed, `error`.

    Raises:
        ValueError: nothing of ours ran.
    """
    rows: dict[str, Row] = {name: {"name": name, "runs": [None] * passes} for name in workers}
    for i, name in order(list(workers), passes):
        if "error" in rows[name]:
            continue
        try:
            rows[name]["runs"][i] = figures = workers[name](i)
        except WorkerError as error:
            rows[name]["error"] = without_folders(str(error))
            print(f"{name}: error: {error}", file=sys.stderr)
        else:
            said = "  ".join(f"{k} {v:,.4g}" for k, v in figures.items() if v is not None)
            print(f"pass {i + 1} of {passes}, {name}: {said}", flush=True)
    ours = [row for name, row in rows.items() if name.startswith("ours")]
    if all("error" in row for row in ours):
        raise ValueError(f"nothing of ours ran: {ours[0]['error']}")
    return list(rows.values())


def statistic(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median, smallest and largest of the values that are there."""
    there = [v for v in values if v is not None]
    if not there:
        return None
    return {"median": statistics.median(there), "min": min(there), "max": max(there)}


def summarise(rows: list[Row]) -> list[Row]:
    """Rows with `figures`, the statistic of each, and `ratios`, that of each to the first row's.

    A ratio is taken in each pass, and these have their own median and spread.
    """
    first = rows[0]["runs"]
    summary = []
    for row in rows:
        names = dict.fromkeys(name for run in row["runs"] if run for name in run)
        figures, ratios = {}, {}
        for name in names:
            values = [(run or {}).get(name) for run in row["runs"]]
            base = [(run or {}).get(name) for run in first]
            figures[name] = statistic(values)
            ratios[name] = statistic(
                [v / b if v is not None and b else None for v, b in zip(values, base, strict=True)]
            )
        summary.append({**row, "figures": figures, "ratios": ratios})
    return summary


def without_folders(text: str) -> str:
    """A text whose absolute paths are cut down to their last part: results name no machine."""
    return re.sub(r"(?<![\w.])/(?:[^/\s'\":=]+/)+", "", text)


@dataclass(frozen=True)
class Bench:
    """One bench under way.

    Attributes:
        what: its name, such as "train".
        options: the command line.
        folder: scratch, deleted at the end.
        machine: what `bench.machine` found.
        peers: a scratch copy of each given checkout, by the project's name.
        commits: of each of them.
    """

    what: str
    options: argparse.Namespace
    folder: Path
    machine: dict[str, Any]
    peers: dict[str, Path]
    commits: dict[str, str]

    @property
    def device(self) -> str:
        """What the workers are told: a name that torch knows."""
        named: str = self.options.device
        return str(self.machine["type"]) if named == "auto" else named

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU of that kind."""
        return bool(self.machine["type"] == "cuda")

    @property
    def passes(self) -> int:
        """Two per round."""
        return 1 if self.options.quick else 2 * self.options.rounds

    def write(self, case: str, settings: dict[str, Any], rows: list[Row]) -> Path:
        """Writes the result file, replacing that of the same bench, device and case."""
        folder: Path = self.options.out
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.what}-{self.machine['type']}-{case}.json"
        command = ["python", "-m", f"bench.{self.what}", *self.options.argv]
        result = {
            "what": self.what,
            "case": case,
            "date": datetime.date.today().isoformat(),
            "command": " ".join(shlex.quote(re.sub(r"[^\s=]*/", "", word)) for word in command),
            "machine": self.machine,
            "peers": self.commits,
            "settings": settings,
            "rows": summarise(rows),
        }
        write_json(path, result)
        print(f"written: {without_folders(str(path))}")
        return path


def arguments(about: str, cases: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options that every bench has."""
    p = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (_, option) in PEERS.items():
        p.add_argument(f"--{option}", type=Path, metavar="DIR", help=f"your checkout of {name}")
    p.add_argument("--text", type=Path, help="a .txt, .md, .jsonl or .jsonl.gz file")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    p.add_argument("--rounds", type=int, default=3, help="A-B-B-A rounds (default 3)")
    p.add_argument("--quick", action="store_true", help="tiny sizes, half a round: does it run?")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    p.add_argument("--one", help=argparse.SUPPRESS)  # a worker's settings, as JSON
    if cases:
        p.add_argument("--case", choices=cases, help="what is measured; the device has a default")
    return p


def parse(p: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Options, and the command line itself under `argv`."""
    words = sys.argv[1:] if argv is None else argv
    return argparse.Namespace(**vars(p.parse_args(words)), argv=words)


@contextlib.contextmanager
def opened(what: str, a: argparse.Namespace) -> Iterator[Bench]:
    """Checks the options, looks at the machine and copies the peers' checkouts.

    Raises:
        ValueError: an option that cannot be used.
    """
    if a.rounds < 1:
        raise ValueError(f"--rounds is {a.rounds}; it must be 1 or more")
    if a.text is not None and not a.text.is_file():
        raise ValueError(f"--text {a.text} is no file")
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        given = {name: getattr(a, option) for name, (_, option) in PEERS.items()}
        given = {name: path for name, path in given.items() if path is not None}
        peers = {name: copy_tree(name, path, folder / name) for name, path in given.items()}
        commits = {name: commit(path) for name, path in given.items()}
        yield Bench(what, a, folder, look(a.device, a.quick), peers, commits)


def look(device: str, quick: bool) -> dict[str, Any]:
    """The machine, from a fresh process.

    Raises:
        ValueError: no such device.
    """
    try:
        quickly = ["--quick"] if quick else []
        return start(["-m", "bench.machine", "--device", device, *quickly]).last_json()
    except WorkerError as error:
        raise ValueError(str(error).removeprefix("error: ")) from None
