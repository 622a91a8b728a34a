"""The tables of docs/speed.md, made from bench/results/*.json alone.

python -m bench.table
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.rounds import RESULTS, ROOT, Row, summarise
from runtime.cli import one_line_errors
from runtime.files import read_json

PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
ORDER = ("train", "loss", "sft", "sample", "prepare")
TITLES = {
    "train": "Training",
    "loss": "Time to a fixed validation loss",
    "sft": "Instruction tuning",
    "sample": "Sampling",
    "prepare": "Text to token files",
}


def number(value: float) -> str:
    """Three digits or more."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def scaled(factor: float) -> Callable[[float], str]:
    """A number in another unit."""
    return lambda value: number(value * factor)


# Of each figure: the column's title, and how a value is written.
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "tokens_per_second": ("tokens/s", number),
    "seconds_to_loss": ("s to the loss", number),
    "tokens_to_loss": ("tokens to the loss, thousands", scaled(1e-3)),
    "useful_tokens_per_second": ("useful tokens/s", number),
    "useful_share": ("useful share of computed", lambda v: f"{v:.0%}"),
    "first_token_seconds_one": ("first token of 1, ms", scaled(1e3)),
    "tokens_per_second_one": ("tokens/s, 1 prompt", number),
    "first_token_seconds_many": ("first tokens of many, ms", scaled(1e3)),
    "tokens_per_second_many": ("tokens/s, many prompts", number),
    "tokens_per_second_ragged": ("tokens/s, many of unlike length", number),
    "megabytes_per_second_core": ("MB/s, one core", number),
    "megabytes_per_second_machine": ("MB/s, all cores", number),
    "mfu": ("MFU", lambda v: f"{v:.1%}"),
    "start_seconds": ("s to the first step", number),
    "cold_start_seconds": ("s to the first step, nothing compiled yet", number),
    "training_seconds": ("s of training alone", number),
    "total_seconds": ("s of the whole run", number),
    "val_loss": ("last val loss", lambda v: f"{v:.4f}"),
    "peak_memory": ("peak memory, MB", scaled(1e-6)),
}
NO_RATIO = ("useful_share", "mfu", "val_loss")


def cell(row: Row, name: str, is_first: bool) -> str:
    """Median, spread, and the ratio to the first row's with its own spread."""
    figure, write = row["figures"].get(name), COLUMNS[name][1]
    if figure is None:
        return ""
    text = write(figure["median"])
    if figure["min"] != figure["max"]:
        text += f" ({write(figure['min'])}..{write(figure['max'])})"
    ratio = row["ratios"].get(name)
    if is_first or ratio is None or name in NO_RATIO:
        return text
    spread = f" ({ratio['min']:.2f}..{ratio['max']:.2f})" if ratio["min"] != ratio["max"] else ""
    return f"{text}<br>x{ratio['median']:.2f}{spread}"


def table(result: dict[str, Any]) -> list[str]:
    """One result file as Markdown."""
    rows = summarise(result["rows"])
    names = [name for name in COLUMNS if any(row["figures"].get(name) for row in rows)]
    lines = [f"### {TITLES[result['what']]}: {result['case']}, {result['machine']['type']}", ""]
    lines += ["| | " + " | ".join(COLUMNS[name][0] for name in names) + " |"]
    lines += ["|---" * (len(names) + 1) + "|"]
    for row in rows:
        said = row["name"] + (f" ({row['note']})" if "note" in row else "")
        if "error" in row:
            lines.append(f"| {said} | {row['error'].replace('|', '/')} |")
            continue
        cells = " | ".join(cell(row, name, row is rows[0]) for name in names)
        lines.append(f"| {said} | {cells} |")
    return [*lines, "", *about(result), ""]


def about(result: dict[str, Any]) -> list[str]:
    """Where, when and of what."""
    m, passes = result["machine"], max(len(row["runs"]) for row in result["rows"])
    where = m["cpu"] if m["type"] == "cpu" else m["device"]
    peers = "".join(f", {name} {commit}" for name, commit in result["peers"].items())
    return [
        f"Runs each: {passes}; medians (smallest..largest), x: ratio to the first row. "
        f"{result['date']}, {where}, {m['threads']} of {m['cores']} CPU cores; torch {m['torch']}, "
        f"Python {m['python']}, ours {m['commit']}{peers}. Here matrix products run at "
        f"{number(m['matrix_flops'] / 1e9)} GFLOP/s ({m['matrix_dtype']}), copies at "
        f"{number(m['copy_bytes_per_second'] / 1e9)} GB/s.",
        "",
        f"`{result['command']}`",
    ]


def render(results: list[dict[str, Any]]) -> str:
    """All tables, in a fixed order."""
    key = [(ORDER.index(r["what"]), r["machine"]["type"], r["case"]) for r in results]
    ordered = [results[i] for i in sorted(range(len(results)), key=key.__getitem__)]
    return "\n".join(line for result in ordered for line in table(result))


def put(page: str, tables: str) -> str:
    """A page with its generated part replaced.

    Raises:
        ValueError: it has not both marks, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} needs the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    p.add_argument("--page", type=Path, default=PAGE, help="the page to write into")
    a = p.parse_args(argv)
    with one_line_errors():
        files = [f for f in sorted(a.results.glob("*.json")) if "-quick" not in f.name]
        if not files:
            raise ValueError(f"{a.results} holds no results; run python -m bench.train, ... first")
        page = a.page.read_text(encoding="utf-8") if a.page.exists() else f"{BEGIN}\n{END}\n"
        a.page.write_text(put(page, render([read_json(f) for f in files])), encoding="utf-8")
        print(f"written: {a.page.name}, from {len(files)} results")


if __name__ == "__main__":
    main()
