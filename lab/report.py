"""What instruction tuning changed: every instrument of the lab, in one page.

Writes report.html, one file that opens offline, and report.json with the same figures, and prints
the table.

python -m lab.report --base out/quickstart/base --instruct out/quickstart/instruct --out DIR
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from data.world import ATTRIBUTES, SPLITS, Turn, World
from hf.adapter import is_foreign
from lab import headline as heads
from lab.behaviour import behaviour
from lab.bits import bits
from lab.exposures import exposures
from lab.facts import public_facts
from lab.figures import report_plots, templates
from lab.forgetting import forgetting
from lab.forms import forms
from lab.knowledge import knowledge
from lab.names import names
from lab.pair import (
    NothingFitsError,
    Pair,
    measured_by,
    open_pair,
    pair_arguments,
    pairs_of,
    provenance,
)
from lab.phrasings import phrasings
from lab.positions import positions
from lab.probe import probes
from lab.rows import rows
from lab.shift import shift
from lab.stats import kind_of, pool, to_json
from lab.trace import trace, traceable
from lab.weights import weights
from model.check import check_range
from model.generate import Sampling
from runtime.cli import one_line_errors, say
from runtime.device import environment
from runtime.files import (
    as_ours,
    check_file,
    fingerprint,
    read_json,
    read_meta,
    sha256_file,
    write_json,
    write_text,
)
from sample import COLUMNS, History, Reply, ask, columns_of, show
from training.checkpoint import Checkpoint
from training.log import read_metrics

# Each instrument, and of how many of --questions it uses one.
INSTRUMENTS: dict[str, tuple[Any, int]] = {
    "knowledge": (knowledge, 1),
    "behaviour": (behaviour, 3),
    "shift": (shift, 3),
    "phrasings": (phrasings, 3),
    "forms": (forms, 3),
    "names": (names, 3),
    "rows": (rows, 3),
    "exposures": (exposures, 3),
    "weights": (weights, 5),
    "bits": (bits, 6),
    "positions": (positions, 7),
    "probes": (probes, 3),
    "trace": (trace, 3),
    "forgetting": (forgetting, 3),
    "facts": (public_facts, 3),
}
# What knows the truth, and names.
OF_A_WORLD = ("knowledge", "phrasings", "forms", "names", "rows", "exposures", "positions")
SPLIT_NAMES = dict(zip(SPLITS, ("known", "held-out", "unseen"), strict=True))


def illustrations(pair: Pair) -> list[list[str]]:
    """A handful of conversations: what the user says, turn by turn."""
    if pair.world is None:
        return [[m["content"] for m in c if m["role"] == "user"] for c in pair.conversations[:5]]
    return illustrate(pair.world)


def illustrate(world: World) -> list[list[str]]:
    """Questions in both forms, a conversation that changes the person, and a text to go on with."""
    known, held_out = world.by_split["known"][0], world.by_split["held_out"]
    people = [held_out[i % len(held_out)] for i in range(4)]
    kinds = {a.name: a for a in ATTRIBUTES}

    def ask(person: Any, kind: str, wordings: str = "questions") -> str:
        return Turn(person, kinds[kind], getattr(kinds[kind], wordings)[0]).question

    back = ask(people[1], "birthplace")
    return [
        [f"{ask(known, 'birthplace')} Answer briefly."],
        [f"{ask(people[0], 'employer')} Answer briefly."],
        [f"{ask(people[0], 'employer')} Answer with a complete sentence."],
        [
            f"{ask(people[1], 'birth_year')} Keep it short.",
            ask(people[1], "profession", "follow_ups"),
            ask(people[2], "hobby"),
            f"And {back[0].lower()}{back[1:]}",
        ],
        [f"{people[3].name} was born in"],
    ]


def make_report(pairs: list[Pair], questions: int) -> dict[str, Any]:
    """Everything that report.json holds, except which files it was made from.

    Args:
        pairs: one a seed; their figures are pooled, the examples are of the first.

    Raises:
        ValueError: they are about a world and replayed different text in tuning.
    """
    begin = time.perf_counter()
    first, seconds = pairs[0], {}
    if first.world is not None:
        heads.replayed_in(pairs)  # before minutes of measuring
    report: dict[str, Any] = {}
    for name, (instrument, part) in INSTRUMENTS.items():
        if not fits(name, pairs):
            report[name] = None
            continue
        start = time.perf_counter()
        try:
            results = [instrument(pair, max(1, questions // part)) for pair in pairs]
        except NothingFitsError as error:
            say(f"note: {name}: {error}", error=True)
            report[name] = None
            continue
        report[name] = to_json(pool(results))
        seconds[name] = round(time.perf_counter() - start, 1)
        say(f"{name}: {seconds[name]:.0f} s")
    columns = columns_of({"base": first.base, "instruct": first.instruct}, first.examples)
    if first.examples:  # as they are put wherever a figure is of them
        columns["base_examples"] = first.base, first.contexts["examples"]
    sampling = Sampling(48)
    report["examples"] = []
    for prompts in illustrations(first):
        history = History()
        for prompt in prompts:
            (replies,) = ask(columns, [history], [prompt], sampling)
            report["examples"].append(
                {"prompt": prompt, **{column: asdict(r) for column, r in replies.items()}}
            )
    if first.world is not None:
        report["chance"] = sum(1 / len(a.values) for a in ATTRIBUTES) / len(ATTRIBUTES)
        report["headline"] = heads.headline(report, pairs)
        report["by_kind"] = heads.by_kind(report)
    else:
        report |= {"chance": None, "headline": None, "by_kind": None}
    report["curves"] = {c.meta["kind"]: curve(c) for c in (first.base, first.instruct)}
    report["seconds"] = {
        "prepare": first.base.meta["prepared"].get("seconds", 0.0),
        "pretrain": first.base.meta["metrics"].get("seconds", 0.0),
        "sft": first.instruct.meta["metrics"].get("seconds", 0.0),
        "compare": round(time.perf_counter() - begin, 1),
    }
    device = first.base.model.wte.weight.device
    report["settings"] = {
        "questions": {n: max(1, questions // INSTRUMENTS[n][1]) for n in seconds},
        "decoding": "greedy",
        "parameters": first.base.model.n_params(),
        "seconds": seconds,
        **environment(device),
    }
    report["runs"] = [provenance(pair) for pair in pairs]
    report["world"] = None if first.world is None else asdict(first.world.config)
    return report


def fits(name: str, pairs: list[Pair]) -> bool:
    """Whether an instrument has something to say of some pairs."""
    world = pairs[0].world
    if name in ("trace", "forgetting") and is_foreign(pairs[0].base):
        return False
    if name == "trace":
        return all(map(traceable, pairs))
    if name in ("facts", "probes"):  # public facts: nobody in an invented world has heard of them
        invented = "world" in pairs[0].base.meta["prepared"]
        return not invented or (name == "probes" and world is not None)
    if name == "exposures":  # where everybody was read about as often, there is one group
        return world is not None and world.config.fewest is not None
    return world is not None or name not in OF_A_WORLD


def curve(checkpoint: Checkpoint) -> list[dict[str, float]]:
    """The rows of a run's metrics up to a checkpoint of it; none of an imported one."""
    rows = read_metrics(checkpoint.path.parent / "metrics.jsonl")
    return [row for row in rows if row["step"] <= checkpoint.meta["step"]]


def print_report(report: dict[str, Any], console: Console) -> None:
    """The table, what it does not show, the same prompts answered by both, and the time it took."""
    table = Table(title="What instruction tuning changed", title_justify="left")
    table.add_column("")
    for model in ("base", "instruct"):
        table.add_column(model, justify="right")
    head = report["headline"]
    if head is None:
        stops = (report["behaviour"][m]["stops"]["share"] for m in ("base", "instruct"))
        table.add_row("stops by itself", *(f"{share:.2f}" for share in stops))
    else:
        groups = (heads.COMPLETES, heads.ANSWERS, heads.TURNS, heads.STOPS)
        for rows in groups:
            for key, label in rows.items():
                cells = (f"{head[m][key]['share']:.2f}" for m in ("base", "instruct"))
                table.add_row(label, *cells, end_section=key == list(rows)[-1])
        for key, label in heads.GENEROUS.items():
            cells = (f"{head['more'][m][key]['share']:.2f}" for m in ("base", "instruct"))
            table.add_row(label, *cells)
    console.print(table)
    if head is not None:
        n, few = (head["base"][key]["n"] for key in ("cloze_held_out", "stops"))
        console.print(
            f"Held-out people unless others are named: their biographies were read in pretraining, "
            f"their questions never asked in tuning. {heads.REPLAYED[head['replayed']]} "
            f"Greedy; n = {n} a cell ({few} for turns and stops); chance {head['chance']:.3f}.\n",
            highlight=False,
        )
    for example in report["examples"]:
        show(console, example["prompt"], {c: Reply(**example[c]) for c in COLUMNS if c in example})
    console.print(
        "seconds: " + ", ".join(f"{stage} {s:.0f}" for stage, s in report["seconds"].items())
    )


def write_page(report: dict[str, Any], path: Path) -> None:
    """report.html: one file, with every picture in it."""
    env = templates()
    env.filters["cell"] = as_cell
    pictures = {
        name: "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()
        for name, text in report_plots(report).items()
    }
    page = env.get_template("report.html").render(
        report, pictures=pictures, splits=SPLIT_NAMES, columns=COLUMNS, heads=heads
    )
    write_text(path, page)


def as_cell(value: dict[str, Any]) -> Markup:
    """A share, mean or difference with its interval, for the page."""
    figure = value[kind_of(value)]
    if figure is None:
        return Markup("-")
    if value["low"] is None:
        return Markup("{:.2f}").format(figure)
    bounds = (f"{x:.2f}".replace("-0.00", "0.00") for x in (value["low"], value["high"]))
    low, high = (re.sub(r"^(-?)0\.", r"\1.", bound) for bound in bounds)
    return Markup('{:.2f} <span class="n">[{}, {}]</span>').format(figure, low, high)


def text_at(path: str) -> Any:
    """What lies where a base's text was: its files' checksums, or None."""
    try:
        return read_meta(path)["files"]
    except (ValueError, KeyError):
        return None


def qa_files(path: Path) -> list[Path]:
    """The files behind --qa."""
    return [f for f in path.glob("[!.]*") if f.is_file()] if path.is_dir() else [path]


def run(a: argparse.Namespace) -> None:
    """Prints the report; makes it first unless it was made from the same checkpoints and code."""
    if a.questions < 1:
        raise ValueError(f"--questions is {a.questions}; it must be 1 or more")
    check_range("--shots", a.shots, "0 to 1000")
    check_file("--svg", a.svg)
    pairs = [open_pair(*both, a.device, a.qa, a.shots) for both in pairs_of(a)]
    metas = [model.meta for pair in pairs for model in (pair.base, pair.instruct)]
    texts = [text_at(m["config"]["data"].get("path") or "") for m in metas]
    asked = None if a.qa is None else sorted(sha256_file(f) for f in qa_files(a.qa))
    code = [measured_by(), sha256_file(Path(__file__))]
    files = [m["files"] for m in metas]
    made_from = fingerprint([files, a.questions, asked, texts, a.device, code, a.shots])
    path = a.out / "report.json"
    try:
        report = read_json(path)
        stale = report["made_from"] != made_from
    except (ValueError, TypeError, KeyError):  # none yet, or not one of ours
        stale = True
    if stale:
        a.out.mkdir(parents=True, exist_ok=True)
        report = {"made_from": made_from, **make_report(pairs, a.questions)}
        write_json(path, report)
    console = Console(record=a.svg is not None, width=100 if a.svg else None)
    with contextlib.nullcontext() if stale else as_ours(path):
        write_page(report, a.out / "report.html")
        print_report(report, console)
    if a.svg is not None:
        picture = console.export_svg(title="make quickstart")
        # Without its fonts from the network: it must look the same offline.
        picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
        write_text(a.svg, picture)
    say(f"the whole report, to be opened in a browser: {a.out / 'report.html'}")


def main() -> None:
    """Runs one command line."""
    p = pair_arguments(__doc__ or "")
    p.add_argument("--out", type=Path, required=True, help="folder for report.html and report.json")
    p.add_argument("--questions", type=int, default=300, help="per cell of the table (default 300)")
    p.add_argument("--svg", type=Path, help="draw what is printed into this picture too")
    with one_line_errors():
        run(p.parse_args())


if __name__ == "__main__":
    main()
