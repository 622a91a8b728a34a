"""The tables of docs/speed.md, made from bench/results/*.json alone."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import BENCHES
from runtime.files import as_ours, check_file, read_json, write_text

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
Row = dict[str, Any]


def number(value: float) -> str:
    """Three digits or more."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def spread(values: Sequence[float], write: Callable[[float], str]) -> str:
    """Median, and smallest and largest where they differ."""
    least, most = min(values), max(values)
    return write(statistics.median(values)) + f" ({write(least)}..{write(most)})" * (least != most)


def cell(row: Row, first: Row, name: str, unit: float | str) -> str:
    """A figure in its unit, a factor or a format; of a factor, also its ratio to the first row's,
    taken within a pass, between runs that lie close in time.
    """
    values, base = ([(run or {}).get(name) for run in r["runs"]] for r in (row, first))
    there = [value for value in values if value is not None]
    if not there or isinstance(unit, str):
        return spread(there, lambda value: format(value, str(unit))) if there else ""
    text = spread(there, lambda value: number(value * unit))
    ratios = [v / b for v, b in zip(values, base, strict=True) if v is not None and b]
    return text if row is first or not ratios else f"{text}<br>x{spread(ratios, '{:.2f}'.format)}"


def table(result: dict[str, Any]) -> list[str]:
    """One result file as Markdown."""
    rows, m, bench = result["rows"], result["machine"], BENCHES[result["what"]]
    measured = {k for row in rows for run in row["runs"] for k, v in (run or {}).items() if v}
    columns = {name: of for name, of in bench["figures"].items() if name in measured}
    lines = [f"### {bench['title']}: {result['case']}, {m['type']}", ""]
    lines += ["| | " + " | ".join(heading for heading, _ in columns.values()) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    for row in rows:
        said = row["name"] + (f" ({row['note']})" if "note" in row else "")
        cells = [cell(row, rows[0], name, unit) for name, (_, unit) in columns.items()]
        cells = [row["error"].replace("|", "/")] if "error" in row else cells
        lines.append(f"| {' | '.join([said, *cells])} |")
    where = m["cpu"] if m["type"] == "cpu" else m["device"]
    peers = "".join(f", {name} {commit}" for name, commit in result["peers"].items())
    about = (
        f"Runs each: {len(rows[0]['runs'])}; medians (smallest..largest), x: ratio to the first "
        f"row. {result['date']}, {where}, {m['threads']} of {m['cores']} CPU cores; torch "
        f"{m['torch']}, Python {m['python']}, ours {m['commit']}{peers}. Here matrix products run "
        f"at {number(m['matrix_flops'] / 1e9)} GFLOP/s ({m['matrix_dtype']}), copies at "
        f"{number(m['copy_bytes_per_second'] / 1e9)} GB/s."
    )
    return [*lines, "", about, "", f"`{result['command']}`", ""]


def render(results: Sequence[dict[str, Any]]) -> str:
    """All tables, in a fixed order."""
    key = [([*BENCHES].index(r["what"]), r["machine"]["type"], r["case"]) for r in results]
    order = sorted(range(len(results)), key=key.__getitem__)
    return "\n".join(line for i in order for line in table(results[i]))


def write_page(folder: Path, page: Path) -> None:
    """Replaces the generated part of a page. Raises ValueError: there are no results, or others
    than ours, or the page has not both marks, in order.
    """
    check_file("--page", page)
    if not (files := [f for f in sorted(folder.glob("*.json")) if "-quick" not in f.name]):
        raise ValueError(f"{folder} holds no results; run python -m bench train, ... first")
    text = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page.name} needs the lines {BEGIN} and {END}, in this order")
    with as_ours(folder):
        tables = render([read_json(f) for f in files])
    write_text(page, f"{before}{BEGIN}\n{tables}\n{END}{after}")
    print(f"written: {page.name}, from {len(files)} results")
