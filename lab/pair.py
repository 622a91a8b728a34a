"""What every instrument starts from: two checkpoints, the world they know, and questions."""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from data.chat import (
    Message,
    Prompt,
    documents_prompt,
    parse,
    plain_prompt,
    raw_prompt,
)
from data.fitting import after_examples
from data.shards import load_examples, open_prepared
from data.sources.read import QA_SUFFIXES, read_conversations
from data.tokenizer import Tokenizer
from data.world import FORMS, World, WorldConfig
from hf.adapter import chat_prompt, load_models
from lab.likelihood import reply_limit
from lab.questions import facts_of, openings
from lab.stats import lines, pool, to_json
from model.check import check_range
from runtime.cli import Parser, one_line_errors, say
from runtime.device import environment
from runtime.files import as_ours, check_file, fingerprint, sha256_file, write_json
from training.checkpoint import Checkpoint, identity
from training.run import PREPARED_QA

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """A base, what became of it, and what they are asked.

    Attributes:
        world: the synthetic people that both were trained on; None where they were not.
        conversations: each a question with the turns before it, and its true reply at the end:
            about held-out people of the world, else from the instruct model's validation set.
            All fit into the model's context, however they are put.
        limit: tokens in which a reply to one of them must end.
        examples: answered questions that the base is also given before each question; none of the
            conversations is among them.
        shots: how many these are.
    """

    base: Checkpoint
    instruct: Checkpoint
    world: World | None
    conversations: list[list[Message]]
    limit: int
    examples: list[Message] = field(default_factory=list)
    shots: int = 0

    @property
    def contexts(self) -> dict[str, Prompt]:
        """How a conversation can be put to the base; a reply has the same tokens after each."""
        return contexts_of(self.world, self.examples)


def contexts_of(world: World | None, examples: list[Message] | None = None) -> dict[str, Prompt]:
    """The chat template, plain text, each message as a document; plain text after examples.

    Plain text is as near as a question comes to what a base has read: `Question: ... Answer:`
    where that is real text. Of a world's biographies it has seen neither these words nor a new
    line, so there it is running text, in which the world's replies begin with a space as all else
    does. The question's own words are strange to it all the same: see `lab.knowledge.Lint`.
    """
    plain = plain_prompt if world is None else raw_prompt
    contexts = {"chat": chat_prompt, "plain": plain, "documents": documents_prompt}
    return contexts | ({"examples": after_examples(plain, examples)} if examples else {})


def open_pair(
    base: str, instruct: str | None, device: str, qa: Path | None, shots: int = 0
) -> Pair:
    """Loads two checkpoints and finds what to ask them.

    Args:
        instruct: None for a base alone, which then stands on both sides.
        qa: conversations to use instead, as if there were no world: a Q&A file, or a folder of
            prepared ones.
        shots: how many answered questions the base is also given before each question: about known
            people of a world, else the first of the conversations, which are then not asked.

    Raises:
        ValueError: they are no pair, have different shapes, or there is nothing to ask.
    """
    return pair_of(open_both(base, instruct, device), qa, shots)


def pair_of(pair: tuple[Checkpoint, Checkpoint], qa: Path | None, shots: int) -> Pair:
    """Two checkpoints and what to ask them. Arguments and errors as those of `open_pair`."""
    world, conversations, examples = asked_of(pair, qa, shots)
    limit = reply_limit(pair[0], (c[-1]["content"] for c in conversations))
    conversations = fitting(conversations, pair[0], limit, contexts_of(world, examples))
    return Pair(*pair, world, conversations, limit, examples, shots)


def asked_of(
    pair: tuple[Checkpoint, Checkpoint], qa: Path | None, shots: int
) -> tuple[World | None, list[list[Message]], list[Message]]:
    """The world to ask a pair about, the conversations to ask, and `shots` answered ones as
    examples. Arguments and errors as those of `open_pair`.
    """
    world = world_of(*pair)
    if qa is None and world is not None:
        conversations = questions_about(world)
        shown = questions_about(world, "known")[:shots]
    elif qa is None and pair[0] is pair[1]:
        raise ValueError(f"{pair[0].path} has read about no world: say what to ask it, with --qa")
    else:
        world, conversations = None, read_qa(qa or qa_of(pair[1]))
        shown, conversations = conversations[:shots], conversations[shots:]
    if not conversations:
        raise ValueError(f"--shots {shots} leaves no question to ask; give fewer, or more Q&A")
    return world, conversations, [message for c in shown for message in c]


def open_both(base: str, instruct: str | None, device: str) -> tuple[Checkpoint, Checkpoint]:
    """Loads two checkpoints, or a base that stands on both sides.

    Raises:
        ValueError: they are no pair, or have different shapes.
    """
    found = load_models({"base": base, "instruct": instruct}, device)
    pair = found["base"], found.get("instruct", found["base"])
    shapes = [(c.meta["model"], c.meta["vocab_size"]) for c in pair]
    if shapes[0] != shapes[1]:
        raise ValueError("the two checkpoints have different model shapes; they cannot be compared")
    return pair


class NothingFitsError(ValueError):
    """No question leaves room for a reply in a model's context."""


def fitting(
    conversations: list[list[Message]],
    checkpoint: Checkpoint,
    limit: int,
    contexts: dict[str, Prompt],
) -> list[list[Message]]:
    """The conversations that leave room for a reply of `limit` tokens, and whose own is no longer.

    Raises:
        NothingFitsError: there are none.
    """
    tokenizer, room = checkpoint.tokenizer, checkpoint.model.config.block_size - limit
    found = [
        c
        for c in conversations
        if max(len(put(c[:-1], tokenizer)) for put in contexts.values()) <= room
        and len(tokenizer.encode(c[-1]["content"])) < limit
    ]
    if not found:
        raise NothingFitsError(f"no question fits into {room} tokens with a reply in {limit} more")
    if left_out := len(conversations) - len(found):
        say(f"note: {left_out} of {len(conversations)} questions do not fit", error=True)
    return found


def world_of(base: Checkpoint, instruct: Checkpoint) -> World | None:
    """The world that the base has read about; None if it read something else. A base alone is given
    as both.

    Raises:
        ValueError: the instruct model belongs to another world or base, or the code makes another
            world by now.
    """
    prepared, tuned_on = base.meta["prepared"], instruct.meta["prepared"]
    # Of all files: how runs before 2026-11-22 noted it.
    known_as = (identity(base.meta), fingerprint(base.meta["files"]))
    alone = instruct is base
    tuned_from_it = alone or instruct.meta["base"].get("fingerprint") in known_as
    if "world" not in prepared:
        if not tuned_from_it and instruct.meta["base"]:  # else nobody knows
            note = "was not tuned from this base: the change between their weights means little"
            say(f"note: {instruct.path} {note}", error=True)
        return None
    if not tuned_from_it:
        raise ValueError(f"{instruct.path} was not tuned from {base.path}, but from another base")
    with as_ours(base.path):
        world = World(WorldConfig(**prepared["world"]))
    if world.fingerprint != prepared.get("world_fingerprint"):
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


def questions_about(world: World, split: str = "held_out") -> list[list[Message]]:
    """Every fact about some people once, in random order, as tuning would ask for it."""
    rng = random.Random(f"questions about {split.replace('_', '-')} people {world.config.seed}")
    facts = facts_of(world, split)
    rng.shuffle(facts)
    asked = openings(facts, rng, FORMS)
    return [[*q.messages, Message(role="assistant", content=q.reply)] for q in asked]


def qa_of(instruct: Checkpoint) -> Path:
    """The prepared Q&A that an instruct model was tuned on."""
    config = instruct.meta["config"]
    if config["data"]["path"] is None:
        raise ValueError(f"nobody knows what {instruct.path} was tuned on; give questions: --qa")
    path = Path(config["data"]["path"])
    if path.name.lower().endswith(QA_SUFFIXES):
        path = Path(config["run"]["dir"]) / PREPARED_QA
    if not path.exists():
        raise ValueError(f"{path}, which {instruct.path} was tuned on, is gone; name others: --qa")
    return path


def read_qa(path: Path) -> list[list[Message]]:
    """The conversations of a Q&A file, or the validation ones of a prepared folder.

    Raises:
        ValueError: not readable.
    """
    if not path.is_dir():
        return list(read_conversations([path], skip_bad=False))
    open_prepared(str(path), "qa")
    tokenizer = Tokenizer.load(path)
    return [parse(ids.tolist(), tokenizer) for ids, _ in load_examples(path, "val")]


def needs_world(pair: Pair) -> World:
    """The world that a pair was trained on. ValueError: there is none to ask about."""
    if pair.world is None:
        raise ValueError(
            "this is asked about a world: of checkpoints that were trained on one made by "
            "`python -m data.prepare world`, and without --qa"
        )
    return pair.world


def of_both(pair: Pair, measure: Callable[[Checkpoint, World, int], T], n: int) -> dict[str, T]:
    """The same measurement of both models about their world, on n questions, and of the base after
    examples if there are some.

    Raises:
        ValueError: there is no world to ask about.
    """
    world, models = needs_world(pair), {"base": pair.base, "instruct": pair.instruct}
    if pair.examples:
        models["base_examples"] = after_shown(pair)
    return {name: measure(checkpoint, world, n) for name, checkpoint in models.items()}


def after_shown(pair: Pair) -> Checkpoint:
    """The base, with plain text after the pair's examples as its chat prompt: of a longer one it
    sees the newest tokens, as always."""
    tokenizer, put = copy.copy(pair.base.tokenizer), pair.contexts["examples"]
    tokenizer.chat_prompt = lambda messages: put(messages, pair.base.tokenizer)  # type: ignore[attr-defined]
    return replace(pair.base, tokenizer=tokenizer)


# ---- command line --------------------------------------------------------------------------


QA = ("--qa", "ask from this Q&A file or folder, not about the world")


def pair_arguments(
    about: str, file: tuple[str, str] = QA, shots: bool = True
) -> argparse.ArgumentParser:
    """The options that every instrument has; `file` is the one that names what is asked, and its
    help. Without `shots` there is no base after examples to show.
    """
    p = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True, help="base checkpoint or run, or hf:NAME, hf:FOLDER")
    p.add_argument("--instruct", required=True, help="instruct checkpoint; hf: is of transformers")
    p.add_argument(
        "--seeds", nargs="+", help="pool several pairs: each of these for {seed} in both paths"
    )
    p.add_argument(file[0], dest="qa", type=Path, metavar="FILE", help=file[1])
    p.set_defaults(shots=0)
    if shots:
        help_ = "also ask the base after so many answered questions"
        p.add_argument("--shots", type=int, help=help_)
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    return p


def pairs_of(a: argparse.Namespace) -> list[tuple[str, str]]:
    """The paths that a command line names, a pair a seed.

    Raises:
        ValueError: several seeds for one path, or a place for a seed without one.
    """
    found = for_each_seed([a.base, a.instruct], a.seeds, "--base and in --instruct")
    return [(base, instruct) for base, instruct in found]


def for_each_seed(paths: list[str], seeds: list[str] | None, where: str) -> list[list[str]]:
    """Some paths with each seed in the place of {seed}, or as they are if there are no seeds.

    Args:
        where: what the paths are given to, for the message.

    Raises:
        ValueError: several seeds for one path, or a place for a seed without one.
    """
    if seeds is None:
        if any("{seed}" in path for path in paths):
            raise ValueError("a path holds {seed}; say which with --seeds 1 2 3")
        return [paths]
    if not all("{seed}" in path for path in paths):
        raise ValueError(f"--seeds needs {{seed}} in {where}, such as out/seed{{seed}}")
    return [[path.replace("{seed}", seed) for path in paths] for seed in seeds]


def provenance(pair: Pair) -> dict[str, Any]:
    """Where the figures of a pair come from, and what text was replayed in tuning."""
    text = {"replayed": replayed(pair.instruct.meta)}
    return {"base": origin(pair.base), "instruct": origin(pair.instruct) | text}


def replayed(instruct: dict[str, Any]) -> str:
    """What an instruct model's meta.json says of replayed text: "none", "known" or "all"."""
    data = instruct["config"]["data"]
    return data.get("replay_people", "all") if data.get("replay") else "none"


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a checkpoint comes from."""
    kept = {k: checkpoint.meta[k] for k in ("step", "config", "environment", "data")}
    return {"path": str(checkpoint.path), **kept}


def measured_by() -> str:
    """A fingerprint of the code that figures depend on: not of what draws and arranges them,
    or measures for others."""
    root = Path(__file__).parents[1]
    files = [
        f
        for folder in ("data", "model", "runtime", "training", "hf", "lab")
        for f in (*(root / folder).rglob("*.py"), *(root / folder).glob("*.toml"))
    ]
    files += [root / "sample.py"]
    drawn = {"harness", "plot", "figures", "report", "sweep", "tables", "findings", "web", "curve"}
    return fingerprint(sorted(sha256_file(f) for f in files if f.stem not in drawn))


def run_instrument(
    about: str,
    instrument: Callable[[Any, int], Any],
    questions: int,
    opened: Callable[[str, str, str, Path | None, int], Pair] = open_pair,
    file: tuple[str, str] = QA,
    shots: bool = True,
) -> None:
    """The command line of one instrument: prints its figures, and with --out writes them.

    Args:
        questions: default of --questions, which is the instrument's second argument.
        opened: makes its first argument of two paths, a device, what the option `file` names, and
            --shots.
        file, shots: see `pair_arguments`.
    """
    p = pair_arguments(about, file, shots)
    p.add_argument(
        "--questions", type=int, default=questions, help=f"per figure (default {questions})"
    )
    p.add_argument("--out", type=Path, help="a .json file to write, settings and runs included")
    a = p.parse_args()
    with one_line_errors():
        if a.questions < 1:
            raise ValueError(f"--questions is {a.questions}; it must be 1 or more")
        check_range("--shots", a.shots, "0 to 1000")
        check_file("--out", a.out)
        pairs = [opened(*paths, a.device, a.qa, a.shots) for paths in pairs_of(a)]
        if pairs[0].world is not None:
            texts = sorted({replayed(pair.instruct.meta) for pair in pairs})
            say(f"replayed in tuning: {'/'.join(texts)}")
        result = to_json(pool([instrument(pair, a.questions) for pair in pairs]))
        say("\n".join(lines(result)))
        if a.out is not None:
            device = pairs[0].base.model.wte.weight.device
            settings = {"questions": a.questions, "decoding": "greedy", "shots": a.shots}
            if a.qa is not None:
                whole = sha256_file(a.qa) if a.qa.is_file() else None
                settings |= {"file": str(a.qa), "sha256": whole}
            settings |= environment(device)
            runs = [provenance(pair) for pair in pairs]
            write_json(a.out, {"settings": settings, "runs": runs, "result": result})
            say(f"written: {a.out}")
