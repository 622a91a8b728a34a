"""What every instrument starts from: two checkpoints, the world they know, and questions."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat import Message, parse, render_prompt
from data.files import (
    fingerprint,
    load_examples,
    one_line_errors,
    open_prepared,
    sha256_file,
    write_json,
)
from data.read import read_conversations
from data.tokenizer import Tokenizer
from data.world import ATTRIBUTES, Attribute, Person, World, WorldConfig, exchange
from lab.stats import lines, pool, to_json
from sample import load_pair
from training.checkpoint import PREPARED_QA, Checkpoint
from training.runtime import environment

Prompt = Callable[[list[Message], Tokenizer], list[int]]


@dataclass(frozen=True)
class Pair:
    """A base, what became of it, and what they are asked.

    Attributes:
        world: the synthetic people that both were trained on; None where they were not.
        conversations: each a question with the turns before it, and its true reply at the end:
            about held-out people of the world, else from the instruct model's validation set.
    """

    base: Checkpoint
    instruct: Checkpoint
    world: World | None
    conversations: list[list[Message]]


def open_pair(base: str, instruct: str, device: str, qa: Path | None) -> Pair:
    """Loads two checkpoints and finds what to ask them.

    Args:
        qa: conversations to use instead: a Q&A file, or a folder of prepared ones.

    Raises:
        ValueError: they are no pair, have different shapes, or there is nothing to ask.
    """
    pair = load_pair(base, instruct, device)
    shapes = [(c.meta["model"], c.meta["vocab_size"]) for c in pair]
    if shapes[0] != shapes[1]:
        raise ValueError("the two checkpoints have different model shapes; they cannot be compared")
    world = world_of(*pair)
    if qa is None and world is not None:
        conversations = [exchange(*asked) for asked in questions_about(world, "held_out")]
    else:
        conversations = read_qa(qa or qa_of(pair[1]), pair[1].tokenizer)
    return Pair(*pair, world, conversations)


def world_of(base: Checkpoint, instruct: Checkpoint) -> World | None:
    """The world that the base has read about; None if it read something else.

    Raises:
        ValueError: the instruct model belongs to another world or base, or the code makes another
            world by now.
    """
    prepared, tuned_on = base.meta["prepared"], instruct.meta["prepared"]
    tuned_from_it = instruct.meta["base"]["fingerprint"] == fingerprint(base.meta["files"])
    if "world" not in prepared:
        if not tuned_from_it:
            note = "was not tuned from this base: the change between their weights means little"
            print(f"note: {instruct.path} {note}", file=sys.stderr)
        return None
    if not tuned_from_it:
        raise ValueError(f"{instruct.path} was not tuned from {base.path}, but from another base")
    world = World(WorldConfig(**prepared["world"]))
    if world.fingerprint != prepared["world_fingerprint"]:
        raise ValueError(
            "data/world.py has changed since these checkpoints were trained, so what they learned "
            "can no longer be told right from wrong; make the data and train again"
        )
    if tuned_on.get("world_fingerprint", world.fingerprint) != world.fingerprint:
        raise ValueError(
            f"{instruct.path} was tuned on questions about another world than the one that "
            f"{base.path} has read about"
        )
    return world


def questions_about(world: World, split: str) -> list[tuple[Person, Attribute, str]]:
    """Every fact of a split once, in random order, with a phrasing that tuning uses."""
    rng = random.Random(f"questions about {split} {world.config.seed}")
    facts = [(p, a) for p in world.by_split[split] for a in ATTRIBUTES]
    rng.shuffle(facts)
    return [(p, a, rng.choice(a.questions)) for p, a in facts]


def qa_of(instruct: Checkpoint) -> Path:
    """The prepared Q&A that an instruct model was tuned on."""
    config = instruct.meta["config"]
    path = Path(config["data"]["path"])
    if path.suffix in (".json", ".jsonl"):
        path = Path(config["run"]["dir"]) / PREPARED_QA
    if not path.exists():
        raise ValueError(f"{path}, which {instruct.path} was tuned on, is gone; name others: --qa")
    return path


def read_qa(path: Path, tokenizer: Tokenizer) -> list[list[Message]]:
    """The conversations of a Q&A file, or the validation ones of a prepared folder.

    Raises:
        ValueError: not readable, or none ends with a reply.
    """
    if path.is_dir():
        open_prepared(str(path), "qa")
        found = [parse(ids.tolist(), Tokenizer.load(path)) for ids, _ in load_examples(path, "val")]
    else:
        found = read_conversations([path], skip_bad=False)
    found = [c for c in found if c[-1]["role"] == "assistant"]
    if not found:
        raise ValueError(f"{path} has no conversation that ends with a reply")
    return found


def plain_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """A conversation as plain text, for a base that has never seen the template's tokens."""
    names = {"user": "Question", "assistant": "Answer", "system": "Note"}
    text = [f"{names[m['role']]}:\n{m['content']}\n" for m in messages]
    return [tokenizer.end_of_text, *tokenizer.encode("".join(text) + "Answer:\n")]


def raw_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """A conversation as nothing but text, each message a document of its own."""
    ids = [tokenizer.end_of_text]
    for message in messages:
        ids += [*tokenizer.encode(message["content"]), tokenizer.end_of_text]
    return ids


# How a conversation is put to a model: a base cannot know the template's tokens. In all of them a
# reply begins without a space, so that its tokens are the same.
CONTEXTS: dict[str, Prompt] = {"chat": render_prompt, "plain": plain_prompt, "raw": raw_prompt}


# ---- command line --------------------------------------------------------------------------


def pair_arguments(about: str) -> argparse.ArgumentParser:
    """The options that every instrument has."""
    p = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True, help="base checkpoint, or its run")
    p.add_argument("--instruct", required=True, help="instruct checkpoint, or its run")
    p.add_argument(
        "--seeds", nargs="+", help="pool several pairs: each of these for {seed} in both paths"
    )
    p.add_argument("--qa", type=Path, help="Q&A file or folder to ask from, instead of their own")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    return p


def pairs_of(a: argparse.Namespace) -> list[tuple[str, str]]:
    """The paths that a command line names, a pair a seed.

    Raises:
        ValueError: several seeds for one path, or a place for a seed without one.
    """
    both = (a.base, a.instruct)
    if a.seeds is None:
        if any("{seed}" in path for path in both):
            raise ValueError("a path holds {seed}; say which with --seeds 1 2 3")
        return [both]
    if not all("{seed}" in path for path in both):
        raise ValueError("--seeds needs {seed} in --base and in --instruct, such as out/seed{seed}")
    return [(a.base.replace("{seed}", s), a.instruct.replace("{seed}", s)) for s in a.seeds]


def provenance(pair: Pair) -> dict[str, Any]:
    """Where the figures of a pair come from."""
    return {
        c.meta["kind"]: {
            "path": str(c.path),
            **{k: c.meta[k] for k in ("step", "config", "environment", "data")},
        }
        for c in (pair.base, pair.instruct)
    }


def measured_by() -> str:
    """A fingerprint of the code that figures depend on: not of what draws and arranges them."""
    root = Path(__file__).parents[1]
    files = [f for folder in ("data", "model", "lab") for f in (root / folder).glob("*.py")]
    files += [root / "sample.py", root / "training" / "step.py", root / "training" / "optim.py"]
    drawn = ("plots.py", "report.py", "sweep.py")
    return fingerprint(sorted(sha256_file(f) for f in files if f.name not in drawn))


def run_instrument(about: str, instrument: Callable[[Pair, int], Any], questions: int) -> None:
    """The command line of one instrument: prints its figures, and with --out writes them.

    Args:
        questions: default of --questions, which is the instrument's second argument.
    """
    p = pair_arguments(about)
    p.add_argument(
        "--questions", type=int, default=questions, help=f"per figure (default {questions})"
    )
    p.add_argument("--out", type=Path, help="a .json file to write, settings and runs included")
    a = p.parse_args()
    with one_line_errors():
        if a.questions < 1:
            raise ValueError(f"--questions is {a.questions}; it must be 1 or more")
        if a.out is not None and (a.out.is_dir() or not a.out.absolute().parent.is_dir()):
            raise ValueError(f"--out {a.out} is no file that could be written")
        pairs = [open_pair(*paths, a.device, a.qa) for paths in pairs_of(a)]
        result = to_json(pool([instrument(pair, a.questions) for pair in pairs]))
        print("\n".join(lines(result)))
        if a.out is not None:
            device = pairs[0].base.model.wte.weight.device
            settings = {"questions": a.questions, "decoding": "greedy", **environment(device)}
            runs = [provenance(pair) for pair in pairs]
            write_json(a.out, {"settings": settings, "runs": runs, "result": result})
            print(f"written: {a.out}")
