"""A sweep's figures as Markdown tables, as its TOML file asks for them.

A `[[tables]]` entry is one of three kinds. A path is dotted, through table.json's cells.

    columns         a row for each cell of the sweep: {label = path}, and after these STANDARD,
                    of a sweep on no world all figures of its rows, unless only = true
    of, columns     a table a cell, a row for each entry of what `of` names: {label = path in it}
    rows, columns   a table a cell: {label = path with a {}}, {label = what goes there}; or, for
                    the keys of what it leads to, columns_of = path

A sweep that asks for none has one of the first kind, with DEFAULTS of its instruments.

The sweep's `labels` name the cells, in their order; without them they are named by their keys.
"""

from __future__ import annotations

import re
from typing import Any

from lab.stats import kind_of
from runtime.cli import listed

# Held-out people are asked about in the chat template where no others are named.
STANDARD = {
    "replayed": "replayed",
    "bare value, known people": "answers_known",
    "bare value": "answers_held_out",
    "stop or not": "right_held_out",
    "stops": "stops_held_out",
    "difference from the first row": "from_the_first.answers_held_out",
    "in a sentence": "sentence_held_out",
    "new phrasings": "rephrased_held_out",
    "cloze after": "cloze_held_out",
    "unseen people": "answers_unseen",
}
# Of each instrument, what is shown where nobody says which figures.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "knowledge": (
        *("base.cloze.held_out.all", "instruct.cloze.held_out.all"),
        "instruct.answers.held_out.answered.all",
    ),
    "behaviour": ("base.stops", "instruct.stops", "base.ranking", "instruct.ranking"),
    "shift": ("chat.words.classes.unshifted", "chat.words.kl"),
    "phrasings": (
        *("base.groups.used.right.all", "instruct.groups.used.right.all"),
        "instruct.groups.untaught.right.all",
    ),
    "forms": (
        "base.bare.hobby.right",
        "instruct.bare.hobby.answers",
        "instruct.sentence.hobby.answers",
    ),
    "names": (
        "base.held_out.whole.answers",
        "instruct.held_out.whole.answers",
        "instruct.held_out.cut.answers",
    ),
    "rows": ("none.unsaid.answers", "unsaid.unsaid.answers", "none.said.answers"),
    "exposures": ("base.-1.cloze", "instruct.-1.answers"),
    "weights": ("interpolation.0:5.stops", "interpolation.0:5.right"),
    "bits": ("smallest.rank", "smallest.magnitude", "smallest.quantised"),
    "positions": ("words.only.right", "last.only.right"),
    "probes": (
        *("base.places.name.-1.rank", "base.places.cloze.-1.rank"),
        "instruct.places.reply.-1.rank",
    ),
    "trace": ("layers.-1.size", "layers.-1.words"),
    "facts": (
        *("base.cloze.first.right.all", "instruct.cloze.first.right.all"),
        "instruct.chat.first.right.all",
    ),
    "forgetting": ("tuning.-1.kept", "recovery.all.-1.kept"),
}


def markdown(table: dict[str, Any]) -> list[str]:
    """The tables that a sweep's spec asks for, in its order.

    Raises:
        ValueError: a path that leads nowhere, or a column twice.
    """
    cells = named_cells(table)
    wanted = table["spec"].get("tables") or [{"columns": default_columns(table)}]
    return [made(cells, entry) for entry in wanted]


def default_columns(table: dict[str, Any]) -> dict[str, str]:
    """What of DEFAULTS a sweep's instruments have found in each of its cells."""
    names, cells = table["spec"].get("instruments", {}), table["cells"]
    paths = [f"{name}.{path}" for name in names for path in DEFAULTS[name]]
    paths = [path for path in paths if all(leads(cell, path) for cell in cells)]
    return {path: path for path in paths if all(kind_of(at(cell, path)) for cell in cells)}


def problem_of(wanted: Any) -> str:
    """What is wrong with the shape of an entry of `[[tables]]`; empty if nothing."""
    if not isinstance(wanted, dict):
        return f"{wanted!r:.40} is no table"
    for key in ("columns", "rows"):
        paths = wanted.get(key, {})
        if not isinstance(paths, dict) or not all(isinstance(p, str) for p in paths.values()):
            return f"{key} = {paths!r:.40}; they are {{label = path}}"
    for key in ("of", "columns_of"):
        if not isinstance(wanted.get(key, ""), str):
            return f"{key} = {wanted[key]!r:.40}; it is a path"
    return ""


def named_cells(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The cells of a sweep by their labels, or by their keys if it gives none."""
    cells = table["cells"]
    names = table["spec"].get("labels") or [name_of(cell["cell"]) for cell in cells]
    return dict(zip(names, cells, strict=True))


def made(cells: dict[str, dict[str, Any]], wanted: dict[str, Any]) -> str:
    """One entry of `[[tables]]`; of several cells, with each one's name above its table."""
    columns = wanted.get("columns", {})
    if "of" not in wanted and "rows" not in wanted:
        standard = {} if wanted.get("only") else standard_columns(list(cells.values()))
        if twice := sorted(columns.keys() & standard.keys()):
            raise ValueError(f"{twice[0]!r} is a standard column's name; give it another")
        columns = columns | standard
        rows = [
            [name, *(figure(at(cell, path)) for path in columns.values())]
            for name, cell in cells.items()
        ]
        return grid(list(columns), rows)
    parts = []
    for name, cell in cells.items():
        if "of" in wanted:
            rows = [
                [key, *(figure(at(entry, path)) for path in columns.values())]
                for key, entry in at(cell, wanted["of"]).items()
            ]
        else:
            if "columns_of" in wanted:
                columns = {key: key.replace(".", ":") for key in at(cell, wanted["columns_of"])}
            rows = [
                [label, *(figure(at(cell, path.replace("{}", c))) for c in columns.values())]
                for label, path in wanted["rows"].items()
            ]
        title = f"{name}:\n\n" if len(cells) > 1 else ""
        parts.append(title + grid(list(columns), rows))
    return "\n\n".join(parts)


def standard_columns(cells: list[dict[str, Any]]) -> dict[str, str]:
    """What of STANDARD all cells have; of a sweep on no world, all figures of a row."""
    if cells and "answers_known" not in cells[0]:
        return {key: key for key, value in cells[0].items() if kind_of(value)}
    return {name: path for name, path in STANDARD.items() if all(leads(c, path) for c in cells)}


def leads(value: Any, path: str) -> bool:
    """Whether a dotted path leads anywhere."""
    try:
        at(value, path)
    except ValueError:
        return False
    return True


def at(value: Any, path: str) -> Any:
    """What a dotted path leads to, "-1" being the last entry; an empty one to the value itself.

    Raises:
        ValueError: it leads nowhere.
    """
    for key in path.split(".") if path else []:
        # A key may have a dot of its own ("0.25"), written as ":".
        key = key.replace(":", ".")
        if not isinstance(value, dict) or (key != "-1" and key not in value) or not value:
            there = f"there are {listed(value)}" if isinstance(value, dict) else "it has no parts"
            raise ValueError(f"the figure {path} leads nowhere at {key!r}: {there}")
        value = list(value.values())[-1] if key == "-1" else value[key]
    return value


def figure(value: Any) -> str:
    """A figure with that of each run, a difference with its interval; text as it is."""
    kind = kind_of(value)
    if not kind:
        return f"{value:.3g}" if isinstance(value, float) else str(value)
    if value[kind] is None:
        return "-"
    runs = [run for run in value.get("runs", []) if run is not None]
    # Of one number a run, such as a loss, a third decimal means something.
    decimals = 3 if kind == "mean" and value["n"] == max(1, len(runs)) else 2
    text = number(value[kind], decimals)
    if kind == "difference" and value["low"] is not None:
        return f"{text} [{number(value['low'])}, {number(value['high'])}]"
    if not runs or kind == "difference":
        return text
    return f"{text} ({', '.join(number(run, decimals) for run in runs)})"


def number(value: float, decimals: int = 2) -> str:
    """So many decimals, without a zero before them or a sign of nothing; none of a thousand."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return re.sub(r"^(-?)0\.", r"\1.", f"{round(value, decimals) + 0.0:.{decimals}f}")


def name_of(cell: dict[str, Any]) -> str:
    """A cell by its keys."""
    return ", ".join(f"`{key}` {value}" for key, value in cell.items())


def grid(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column has no heading."""
    lines = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("|  |", "| |")
