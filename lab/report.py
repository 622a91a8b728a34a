"""What instruction tuning changed: one table, on the screen and in report.json.

python -m lab.report --base out/quickstart/base --instruct out/quickstart/instruct --out DIR
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from sample import Conversation, Reply, load_pair, show
from training.checkpoint import Checkpoint
from training.runtime import environment


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


def print_report(report: dict[str, Any]) -> None:
    """The table and its illustration on the screen; in a pipe, the table has plain borders."""
    console = Console()
    table = Table(title="What instruction tuning changed", title_justify="left")
    table.add_column("")
    names = " / ".join(s.replace("_", "-") for s in SPLITS)
    for title in (
        f"completes a biography (cloze)\n{names}",
        f"answers a question\n{names}",
        "stops by\nitself",
        "follow-up turn\nanswered",
    ):
        table.add_column(title, justify="center")
    for model in ("base", "instruct"):
        cells = report[model]
        table.add_row(
            model,
            *(" / ".join(f"{cells[c][s]:.2f}" for s in SPLITS) for c in ("cloze", "answers")),
            f"{cells['stops']:.2f}",
            f"{cells['follow_up']:.2f}",
        )
    console.print(table)
    plain = report["base_plain"]["mentions"]["held_out"]
    print(
        f"n = {report['base']['n']} questions a cell, greedy decoding; chance is "
        f"{report['chance']:.2f}. An answer counts if it names the right value, no other, and "
        "stops.\nWithout having to stop, the base mentions the right value in "
        f"{report['base']['mentions']['held_out']:.2f} of its replies about held-out people in the "
        f"chat template,\nand in {plain:.2f} after a plain `Question: ... Answer:`.\n"
    )
    for example in report["examples"]:
        columns = ("base_raw", "base_chat", "instruct")
        show(console, example["prompt"], {c: Reply(**example[c]) for c in columns})
    seconds = ", ".join(f"{stage} {s:.0f}" for stage, s in report["seconds"].items())
    print(f"seconds: {seconds}")


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
    print_report(report)
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
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    with one_line_errors():
        run(p.parse_args())


if __name__ == "__main__":
    main()
