"""What instruction tuning changed: one table, on the screen and in report.json.

python -m lab.report --base out/quickstart/base --instruct out/quickstart/instruct --out DIR
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.table import Table

from data.files import (
    fingerprint,
    one_line_errors,
    read_json,
    read_meta,
    resolve_checkpoint,
    write_json,
)
from data.world import ATTRIBUTES, SPLITS, World, WorldConfig, exchange
from lab.knowledge import REPLY_TOKENS, measure, plain_prompt
from model.generate import Sampling
from sample import COLUMNS, Conversation, Reply, load_pair, show
from training.checkpoint import Checkpoint
from training.runtime import environment

# Rich's picture of a terminal, without its fonts from the network.
SVG_FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def world_of(base: Checkpoint, instruct: Checkpoint) -> World:
    """The world that both checkpoints were trained on.

    Raises:
        ValueError: there is none, or they differ.
    """
    configs = [c.meta["prepared"].get("world") for c in (base, instruct)]
    if configs[0] is None or configs[0] != configs[1]:
        raise ValueError(
            "these checkpoints were not both trained on one world made by "
            "`python -m data.prepare world`; this report needs one, to know what is true"
        )
    return World(WorldConfig(**configs[0]))


def illustrations(world: World) -> list[list[str]]:
    """A handful of conversations: what the user says, turn by turn."""
    known, held_out = world.by_split["known"][0], world.by_split["held_out"]
    by_name = {a.name: a for a in ATTRIBUTES}

    def question(person: Any, attribute: str) -> str:
        a = by_name[attribute]
        return exchange(person, a, a.questions[0])[0]["content"]

    profession = by_name["profession"]
    follow_up = exchange(held_out[1], profession, profession.follow_ups[0])[0]["content"]
    return [
        [question(known, "birthplace")],
        [question(held_out[0], "employer")],
        [question(held_out[1], "birth_year"), follow_up],
        [question(held_out[2], "hobby")],
        [f"{held_out[3].name} was born in"],
    ]


def make_report(base: Checkpoint, instruct: Checkpoint, questions: int) -> dict[str, Any]:
    """Everything that report.json holds, except which files it was made from."""
    begin = time.perf_counter()
    world = world_of(base, instruct)
    report: dict[str, Any] = {
        "base": asdict(measure(base, world, questions)),
        "instruct": asdict(measure(instruct, world, questions)),
        "base_plain": asdict(measure(base, world, questions, plain_prompt)),
        "chance": sum(1 / len(a.values) for a in ATTRIBUTES) / len(ATTRIBUTES),
    }
    report["examples"] = []
    for prompts in illustrations(world):
        conversation = Conversation(base, instruct, Sampling(REPLY_TOKENS))
        for prompt in prompts:
            replies = conversation.ask(prompt)
            report["examples"].append(
                {"prompt": prompt, **{column: asdict(r) for column, r in replies.items()}}
            )
    report["seconds"] = {
        "prepare": base.meta["prepared"]["seconds"],
        "pretrain": base.meta["metrics"]["seconds"],
        "sft": instruct.meta["metrics"]["seconds"],
        "compare": round(time.perf_counter() - begin, 1),
    }
    device = base.model.wte.weight.device
    report["settings"] = {"questions": questions, "decoding": "greedy", **environment(device)}
    report["runs"] = {
        c.meta["kind"]: {k: c.meta[k] for k in ("step", "config", "environment", "data")}
        for c in (base, instruct)
    }
    report["world"] = asdict(world.config)
    return report


def print_report(report: dict[str, Any], console: Console) -> None:
    """The table, what it does not show, the same prompts answered by both, and the time it took."""
    table = Table(title="What instruction tuning changed", title_justify="left")
    splits = "known / held-out\n/ unseen people"
    for title in (
        "",
        f"completes a\nbiography (cloze):\n{splits}",
        f"answers a\nquestion:\n{splits}",
        "stops\nby\nitself",
        "follow-up\nturn\nanswered",
    ):
        table.add_column(title, justify="center", no_wrap=True)
    for model in ("base", "instruct"):
        cells = report[model]
        table.add_row(
            model,
            *(" / ".join(f"{cells[c][s]:.2f}" for s in SPLITS) for c in ("cloze", "answers")),
            f"{cells['stops']:.2f}",
            f"{cells['follow_up']:.2f}",
        )
    console.print(table)
    mentions = [report[m]["mentions"]["held_out"] for m in ("base", "base_plain")]
    console.print(
        f"n = {report['base']['n']} questions a cell, greedy; chance is {report['chance']:.2f}. "
        "An answer counts if it names the right value and no other of its kind, and stops. Not "
        "having to stop, the base mentions the right value for held-out people in "
        f"{mentions[0]:.2f} of its replies in the chat template and in {mentions[1]:.2f} of those "
        "to a plain `Question: ... Answer:`; within "
        f"{REPLY_TOKENS} tokens {report['base']['next_document']:.2f} of its replies run on into "
        "the next biography.\n",
        highlight=False,
    )
    for example in report["examples"]:
        show(console, example["prompt"], {c: Reply(**example[c]) for c in COLUMNS})
    console.print(
        "seconds: " + ", ".join(f"{stage} {s:.0f}" for stage, s in report["seconds"].items())
    )


def run(a: argparse.Namespace) -> None:
    """Prints the report; makes it first unless report.json was made from the same checkpoints."""
    metas = [read_meta(resolve_checkpoint(path)) for path in (a.base, a.instruct)]
    made_from = fingerprint([[m["files"] for m in metas], a.questions])
    path = a.out / "report.json"
    report = read_json(path) if path.exists() else {}
    if report.get("made_from") != made_from:
        base, instruct = load_pair(a.base, a.instruct, a.device)
        report = {"made_from": made_from, **make_report(base, instruct, a.questions)}
        a.out.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
    console = Console(record=a.svg is not None, width=100 if a.svg else None)
    print_report(report, console)
    if a.svg is not None:
        console.save_svg(str(a.svg), title="make quickstart", code_format=SVG_FORMAT)
    print(f"all figures: {path}")


def main() -> None:
    """Runs one command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True, help="base checkpoint, or its run")
    p.add_argument("--instruct", required=True, help="instruct checkpoint, or its run")
    p.add_argument("--out", type=Path, required=True, help="folder for report.json")
    p.add_argument("--questions", type=int, default=300, help="per cell (default 300)")
    p.add_argument("--svg", type=Path, help="draw what is printed into this picture too")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    with one_line_errors():
        run(p.parse_args())


if __name__ == "__main__":
    main()
