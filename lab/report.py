"""What instruction tuning changed: every instrument of the lab, in one page.

Writes report.html, one file that opens offline, and report.json with the same figures, and prints
the table.

python -m lab.report --base out/quickstart/base --instruct out/quickstart/instruct --out DIR
"""

from __future__ import annotations

import argparse
import base64
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from data.world import ATTRIBUTES, SPLITS, World, exchange
from lab.behaviour import behaviour
from lab.figures import report_plots, templates
from lab.forgetting import forgetting
from lab.knowledge import knowledge
from lab.pair import Pair, measured_by, open_pair, pair_arguments, pairs_of, provenance
from lab.shift import shift
from lab.stats import pool, to_json
from lab.weights import weights
from model.generate import Sampling
from runtime.cli import one_line_errors
from runtime.device import environment
from runtime.files import (
    fingerprint,
    read_json,
    read_meta,
    resolve_checkpoint,
    sha256_file,
    write_json,
    write_text,
)
from sample import COLUMNS, Conversation, Reply, show

# Each instrument, and of how many of --questions it uses one.
INSTRUMENTS: dict[str, tuple[Any, int]] = {
    "knowledge": (knowledge, 1),
    "behaviour": (behaviour, 3),
    "shift": (shift, 3),
    "weights": (weights, 5),
    "forgetting": (forgetting, 3),
}
SPLIT_NAMES = dict(zip(SPLITS, ("known", "held-out", "unseen"), strict=True))


def illustrations(pair: Pair) -> list[list[str]]:
    """A handful of conversations: what the user says, turn by turn."""
    if pair.world is None:
        return [[m["content"] for m in c if m["role"] == "user"] for c in pair.conversations[:5]]
    return illustrate(pair.world)


def illustrate(world: World) -> list[list[str]]:
    """Questions about known and held-out people, a follow-up, and a beginning to complete."""
    known, people = world.by_split["known"][0], world.by_split["held_out"]
    held_out = [people[i % len(people)] for i in range(4)]
    by_name = {a.name: a for a in ATTRIBUTES}
    profession = by_name["profession"]
    asked = (("birthplace", known), ("employer", held_out[0]), ("birth_year", held_out[1]))
    questions = [
        exchange(person, by_name[name], by_name[name].questions[0])[0]["content"]
        for name, person in (*asked, ("hobby", held_out[2]))
    ]
    follow_up = exchange(held_out[1], profession, profession.follow_ups[0])[0]["content"]
    return [
        [questions[0]],
        [questions[1]],
        [questions[2], follow_up],
        [questions[3]],
        [f"{held_out[3].name} was born in"],
    ]


def make_report(pairs: list[Pair], questions: int) -> dict[str, Any]:
    """Everything that report.json holds, except which files it was made from.

    Args:
        pairs: one a seed; their figures are pooled, the examples are of the first.
    """
    begin = time.perf_counter()
    first, seconds = pairs[0], {}
    report: dict[str, Any] = {}
    for name, (instrument, part) in INSTRUMENTS.items():
        if name == "knowledge" and first.world is None:
            report[name] = None
            continue
        start = time.perf_counter()
        results = [instrument(pair, max(1, questions // part)) for pair in pairs]
        report[name] = to_json(pool(results))
        seconds[name] = round(time.perf_counter() - start, 1)
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    sampling = Sampling(48)
    report["examples"] = []
    for prompts in illustrations(first):
        conversation = Conversation(first.base, first.instruct, sampling)
        for prompt in prompts:
            replies = conversation.ask(prompt)
            report["examples"].append(
                {"prompt": prompt, **{column: asdict(r) for column, r in replies.items()}}
            )
    report["chance"] = sum(1 / len(a.values) for a in ATTRIBUTES) / len(ATTRIBUTES)
    report["seconds"] = {
        "prepare": first.base.meta["prepared"].get("seconds", 0.0),
        "pretrain": first.base.meta["metrics"].get("seconds", 0.0),
        "sft": first.instruct.meta["metrics"].get("seconds", 0.0),
        "compare": round(time.perf_counter() - begin, 1),
    }
    device = first.base.model.wte.weight.device
    report["settings"] = {
        "questions": {n: max(1, questions // part) for n, (_, part) in INSTRUMENTS.items()},
        "decoding": "greedy",
        "parameters": first.base.model.n_params(),
        "seconds": seconds,
        **environment(device),
    }
    report["runs"] = [provenance(pair) for pair in pairs]
    report["world"] = None if first.world is None else asdict(first.world.config)
    return report


def print_report(report: dict[str, Any], console: Console) -> None:
    """The table, what it does not show, the same prompts answered by both, and the time it took."""
    table = Table(title="What instruction tuning changed", title_justify="left")
    splits = "known / held-out\n/ unseen people"
    known = report["knowledge"]
    titles = (f"completes a\nbiography (cloze):\n{splits}", f"answers a\nquestion:\n{splits}")
    for title in ("", *(titles if known else ()), "stops\nby\nitself", "follow-up\nturn\nanswered"):
        table.add_column(title, justify="center", no_wrap=True)
    for model in ("base", "instruct"):
        cells = [model]
        if known:
            row = known[model]
            cells.append(" / ".join(f"{row['cloze'][s]['all']['share']:.2f}" for s in SPLITS))
            answers = [row["answers"][s]["right"]["all"]["share"] for s in SPLITS]
            cells.append(" / ".join(f"{share:.2f}" for share in answers))
        acts = report["behaviour"][model]
        follow_up = acts["follow_up"].get("with", {}).get("share")
        cells.append(f"{acts['stops']['share']:.2f}")
        cells.append("-" if follow_up is None else f"{follow_up:.2f}")
        table.add_row(*cells)
    console.print(table)
    if known:
        print_knowledge(report, console)
    for example in report["examples"]:
        show(console, example["prompt"], {c: Reply(**example[c]) for c in COLUMNS})
    console.print(
        "seconds: " + ", ".join(f"{stage} {s:.0f}" for stage, s in report["seconds"].items())
    )


def print_knowledge(report: dict[str, Any], console: Console) -> None:
    """What the table does not show."""
    base, instruct = report["knowledge"]["base"], report["knowledge"]["instruct"]
    held_out = {
        "instruct, new phrasing": instruct["rephrased"]["held_out"]["right"]["all"],
        "base mentions the value": base["answers"]["held_out"]["mentions"],
        "the same, asked plainly": base["plain"]["held_out"]["mentions"],
        "base runs on into another biography": base["answers"]["held_out"]["next_document"],
    }
    console.print(
        f"n = {base['cloze']['held_out']['all']['n']} questions a cell ("
        f"{report['behaviour']['base']['stops']['n']} for stops, follow-ups and what is asked "
        f"plainly), greedy; chance {report['chance']:.3f}. An answer counts if it names "
        "the right value, no other of its kind, and stops. Held-out people: "
        + ", ".join(f"{what}: {cell['share']:.2f}" for what, cell in held_out.items())
        + ".\n",
        highlight=False,
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
        report, report=report, pictures=pictures, splits=SPLIT_NAMES, columns=COLUMNS
    )
    write_text(path, page)


def as_cell(value: dict[str, Any]) -> Markup:
    """A share or mean with its interval, for the page."""
    figure = value.get("share", value.get("mean"))
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
    paths = pairs_of(a)
    metas = [read_meta(resolve_checkpoint(path)) for pair in paths for path in pair]
    texts = [text_at(m.get("config", {}).get("data", {}).get("path") or "") for m in metas]
    asked = None if a.qa is None else sorted(sha256_file(f) for f in qa_files(a.qa))
    code = [measured_by(), sha256_file(Path(__file__))]
    files = [m.get("files") for m in metas]
    made_from = fingerprint([files, a.questions, asked, texts, a.device, code])
    path = a.out / "report.json"
    try:
        report = read_json(path)
        stale = report["made_from"] != made_from
    except (ValueError, TypeError, KeyError):  # none yet, or not one of ours
        stale = True
    if a.svg is not None and not a.svg.absolute().parent.is_dir():
        raise ValueError(f"--svg {a.svg}: there is no folder {a.svg.parent}")
    if stale:
        pairs = [open_pair(*both, a.device, a.qa) for both in paths]
        a.out.mkdir(parents=True, exist_ok=True)
        report = {"made_from": made_from, **make_report(pairs, a.questions)}
        write_json(path, report)
    write_page(report, a.out / "report.html")
    console = Console(record=a.svg is not None, width=100 if a.svg else None)
    print_report(report, console)
    if a.svg is not None:
        picture = console.export_svg(title="make quickstart")
        # Without its fonts from the network: it must look the same offline.
        picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
        a.svg.write_text(picture, encoding="utf-8")
    print(f"the whole report, to be opened in a browser: {a.out / 'report.html'}")


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
