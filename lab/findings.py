"""All of docs/findings.md by one command: every sweep, and its tables put into the page.

    <!-- table replay 2 -->    what stands between these two lines is the second table that
    <!-- end -->               configs/sweeps/replay.toml asks for

Each sweep's table.json goes to docs/findings beside it, with the pictures that the page shows. Give
the command again after an interruption, or with the names of some sweeps to run those alone. Sweeps
share their runs, so several at once would train the same thing twice. `--curve out/curve` puts what
lab.curve wrote there into the page, as table "curve 1": by the folder's name.

python -m lab.findings
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from lab import curve, sweep
from lab.tables import markdown
from runtime.cli import Parser, one_line_errors, say
from runtime.files import as_ours, read_json, write_text

ROOT = Path(__file__).parents[1]
KNOWN = sorted(path.stem for path in (ROOT / "configs" / "sweeps").glob("*.toml"))
PLACE = re.compile(r"(<!-- table (\w+) (\d+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, tables: dict[str, list[str]]) -> str:
    """A page with the tables of some sweeps put where it names them; others stay as they are.

    Raises:
        ValueError: it names a table that its sweep does not make.
    """

    def put(match: re.Match[str]) -> str:
        begin, name, number, end = match.groups()
        if name not in tables:
            return match[0]
        if not 0 < int(number) <= len(tables[name]):
            raise ValueError(f"table {name} {number}: the sweep makes {len(tables[name])}")
        return f"{begin}{tables[name][int(number) - 1]}\n{end}"

    return PLACE.sub(put, page)


def shortened(value: Any) -> Any:
    """JSON with four digits a number."""
    if isinstance(value, dict):
        return {key: shortened(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shortened(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def hours(tables: list[dict[str, Any]]) -> float:
    """What some sweeps took: each of their runs once, and all the measuring."""
    training: dict[str, float] = {}
    for table in tables:
        training |= table["seconds"]["training"]
    measuring = sum(table["seconds"]["measuring"] for table in tables)
    return (sum(training.values()) + measuring) / 3600


def put_into(page: Path, name: str, kept: dict[str, Any], folder: Path, tables: list[str]) -> None:
    """Figures go beside the page, the tables into it, and the folder's pictures that it shows."""
    beside = page.with_suffix("")
    beside.mkdir(parents=True, exist_ok=True)
    write_text(beside / f"{name}.json", json.dumps(kept, separators=(",", ":")) + "\n")
    text = fill(page.read_text(encoding="utf-8"), {name: tables})
    for picture in folder.glob("*.svg"):
        if f"/{name}_{picture.name})" in text:
            write_text(beside / f"{name}_{picture.name}", picture.read_text(encoding="utf-8"))
    write_text(page, text)


def put_curve(folder: Path, page: Path) -> None:
    """Puts what lab.curve wrote into a folder into the page; what is not drawn is not kept.

    Raises:
        ValueError: it wrote nothing there, or the page has no place for a curve of this name.
    """
    name, places = folder.resolve().name, PLACE.finditer(page.read_text(encoding="utf-8"))
    if name not in {match[2] for match in places} - set(KNOWN):
        raise ValueError(f"{page} has no place for a curve: <!-- table {name} 1 -->")
    with as_ours(folder / "curve.json"):
        made = shortened(read_json(folder / "curve.json"))
        kept = {key: value for key, value in made.items() if key != "points"}
        put_into(page, name, kept, folder, [curve.markdown(kept)])
    say(f"written: table {name} of {page}, and {page.with_suffix('') / name}.json")


def run(names: list[str], out: Path, page: Path, device: str) -> None:
    """Runs sweeps by name, in their order, and writes the page after each one."""
    done = []
    for name in names:
        say(f"==== {name}")
        folder = sweep.run(ROOT / "configs" / "sweeps" / f"{name}.toml", out, device)
        table = shortened(read_json(folder / "table.json"))
        put_into(page, name, table, folder, markdown(table))
        done.append(table)
        say(f"hours so far, one process: {hours(done):.1f}")


def main() -> None:
    """Runs one command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help=f"sweeps: {', '.join(KNOWN)}")
    sweep.out_argument(p)
    p.add_argument(
        "--curve", type=Path, nargs="+", metavar="DIR", help="of lab.curve; alone, no sweep is run"
    )
    p.add_argument("--page", type=Path, default=ROOT / "docs" / "findings.md", help="what to fill")
    p.add_argument("--device", default="auto", help="for measuring: auto (default), cpu, cuda, ...")
    with one_line_errors():
        a = p.parse_args()
        if unknown := sorted(set(a.names) - set(KNOWN)):
            raise ValueError(f"no sweep is called {unknown[0]}; there are {', '.join(KNOWN)}")
        for folder in a.curve or []:
            put_curve(folder, a.page)
        if a.names or not a.curve:
            run(a.names or KNOWN, a.out, a.page, a.device)


if __name__ == "__main__":
    main()
