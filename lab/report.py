"""What instruction tuning changed: one table, on the screen and in report.json.

python -m lab.report --base out/quickstart/base --instruct out/quickstart/instruct --out DIR
"""

from __future__ import annotations

import argparse
import random
import re
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
    sha256_file,
    write_json,
)
from data.world import ATTRIBUTES, SPLITS, Person, World, WorldConfig, exchange
from lab import knowledge
from lab.knowledge import Answers, answer, draw, measure, plain_prompt, reply_tokens
from model.generate import Sampling
from sample import COLUMNS, Conversation, Reply, load_pair, show
from training.checkpoint import Checkpoint
from training.runtime import environment


def world_of(base: Checkpoint, instruct: Checkpoint) -> World:
    """The world that both checkpoints were trained on.

    Raises:
        ValueError: there is none, they differ, the code makes another one by now, or the instruct
            model was not tuned from this base.
    """
    if instruct.meta["base"]["fingerprint"] != fingerprint(base.meta["files"]):
        raise ValueError(f"{instruct.path} was not tuned from {base.path}, but from another base")
    configs = [c.meta["prepared"].get("world") for c in (base, instruct)]
    if configs[0] is None or configs[0] != configs[1]:
        raise ValueError(
            "these checkpoints were not both trained on one world made by "
            "`python -m data.prepare world`; this report needs one, to know what is true"
        )
    world = World(WorldConfig(**configs[0]))
    if world.fingerprint != base.meta["prepared"]["world_fingerprint"]:
        raise ValueError(
            "data/world.py has changed since these checkpoints were trained, so what they learned "
            "can no longer be told right from wrong; make the data and train again"
        )
    return world


def illustrations(world: World) -> list[list[str]]:
    """A handful of conversations: what the user says, turn by turn."""
    known, people = world.by_split["known"][0], world.by_split["held_out"]
    held_out = [people[i % len(people)] for i in range(4)]
    by_name = {a.name: a for a in ATTRIBUTES}

    def question(person: Person, attribute: str) -> str:
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


def ask_plainly(base: Checkpoint, world: World, n: int) -> Answers:
    """The base's answers about held-out people to `Question: ... Answer:`, without the template."""
    rng = random.Random(f"plain {world.config.seed}")
    facts = draw(world, "held_out", n, rng)
    questions = [(p, a, exchange(p, a, rng.choice(a.questions))[:1]) for p, a in facts]
    return answer(base, questions, plain_prompt)


def make_report(base: Checkpoint, instruct: Checkpoint, questions: int) -> dict[str, Any]:
    """Everything that report.json holds, except which files it was made from."""
    begin = time.perf_counter()
    world = world_of(base, instruct)
    report: dict[str, Any] = {
        "base": asdict(measure(base, world, questions)),
        "instruct": asdict(measure(instruct, world, questions)),
        "base_plain": asdict(ask_plainly(base, world, questions)),
        "chance": sum(1 / len(a.values) for a in ATTRIBUTES) / len(ATTRIBUTES),
    }
    sampling = Sampling(reply_tokens(base.tokenizer))
    report["examples"] = []
    for prompts in illustrations(world):
        conversation = Conversation(base, instruct, sampling)
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
    base, instruct = report["base"], report["instruct"]
    held_out = {
        "instruct, new phrasing": instruct["rephrased"]["held_out"],
        "base mentions the value": base["mentions"]["held_out"],
        "the same, asked plainly": report["base_plain"]["mentions"],
    }
    console.print(
        f"n = {base['n']} questions a cell, greedy; chance {report['chance']:.3f}. An answer "
        "counts if it names the right value, no other of its kind, and stops. Held-out people: "
        + ", ".join(f"{what}: {share:.2f}" for what, share in held_out.items())
        + f". Replies of the base that run on into another biography: {base['next_document']:.2f}."
        "\n",
        highlight=False,
    )
    for example in report["examples"]:
        show(console, example["prompt"], {c: Reply(**example[c]) for c in COLUMNS})
    console.print(
        "seconds: " + ", ".join(f"{stage} {s:.0f}" for stage, s in report["seconds"].items())
    )


def run(a: argparse.Namespace) -> None:
    """Prints the report; makes it first unless report.json was made from the same checkpoints."""
    if a.questions < 1:
        raise ValueError(f"--questions is {a.questions}; it must be 1 or more")
    metas = [read_meta(resolve_checkpoint(path)) for path in (a.base, a.instruct)]
    code = [sha256_file(Path(f)) for f in (__file__, knowledge.__file__)]
    made_from = fingerprint([[m["files"] for m in metas], a.questions, code])
    path = a.out / "report.json"
    try:
        report = read_json(path)
        stale = report["made_from"] != made_from
    except (ValueError, TypeError, KeyError):  # none yet, or not one of ours
        stale = True
    if stale:
        base, instruct = load_pair(a.base, a.instruct, a.device)
        report = {"made_from": made_from, **make_report(base, instruct, a.questions)}
        a.out.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
    console = Console(record=a.svg is not None, width=100 if a.svg else None)
    print_report(report, console)
    if a.svg is not None:
        picture = console.export_svg(title="make quickstart")
        # Without its fonts from the network: it must look the same offline.
        picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
        a.svg.write_text(picture, encoding="utf-8")
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
