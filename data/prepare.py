"""Text and Q&A into token files: `python -m data.prepare {world,text,qa} --help`.

A prepared folder holds its tokenizer, token files and a meta.json with counts, checksums and
sources. Text is `train.bin` and `val.bin`: token ids one after another, each document preceded
by the end-of-text token. Q&A is `qa_{train,val}_{ids,mask,offsets}.npy`: rendered conversations
end to end, what is supervised, and where each begins. A folder of the world holds both.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from data.chat import Message, render, template_fingerprint
from data.files import (
    load_examples,
    new_directory,
    one_line_errors,
    read_meta,
    sha256_file,
    verify_checksums,
    write_meta,
)
from data.read import TEXT_SUFFIXES, read_conversations, read_documents, text_files
from data.tokenizer import CONTROL_TOKENS, Tokenizer, create_tokenizer
from data.world import World, WorldConfig

FORMAT = 1
WORLD_HELP = {
    "people": "people with biographies, half of them known, half held out",
    "unseen": "people that appear nowhere, for controls",
    "bios": "biographies per person",
    "paraphrases": "wordings per fact, 1 to 8",
    "permute": "sentences of a biography in random order",
    "adjacent": "a person's biographies one after another instead of shuffled",
}


def progress() -> Progress:
    """A progress bar that goes away when it is done, and is not there in a pipe."""
    return Progress(transient=True, disable=not sys.stdout.isatty())


# ---- writing -------------------------------------------------------------------------------


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned integer type that holds every id."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")


def write_text(
    documents: Iterable[Iterable[str]],
    tokenizer: Tokenizer,
    out: Path,
    val_fraction: float,
    seed: int,
    shuffle: bool = True,
) -> dict[str, Any]:
    """Writes train.bin and val.bin; returns the `text` part of meta.json.

    Documents are encoded once into a scratch file, then copied out in shuffled order, so memory
    holds only their offsets. Without `shuffle` the training documents stay in their given order.

    Raises:
        ValueError: no text at all, or a share that leaves training or validation empty.
    """
    dtype = id_dtype(tokenizer)
    starts, position, n_bytes = [], 0, 0
    with tempfile.TemporaryFile(dir=out) as scratch:
        for document in documents:
            starts.append(position)
            ids: list[int] = [tokenizer.end_of_text]
            for piece in document:
                n_bytes += len(piece.encode())
                ids += tokenizer.encode(piece)
                scratch.write(np.array(ids, dtype).tobytes())
                position += len(ids)
                ids = []
            if ids:  # an empty document is no document
                starts.pop()
        if not position:
            raise ValueError("the corpus is empty: there is no text to train on")
        scratch.flush()
        tokens = np.memmap(scratch, dtype, mode="r")
        spans = list(zip(starts, [*starts[1:], position], strict=True))
        order = np.random.default_rng(seed).permutation(len(spans))
        parts = split_documents([spans[i] for i in order], val_fraction)
        meta: dict[str, Any] = {"dtype": dtype.str, "documents": len(starts), "bytes": n_bytes}
        if not shuffle:
            parts["train"].sort()
        for part, part_spans in parts.items():
            with open(out / f"{part}.bin", "wb") as f:
                for start, end in part_spans:
                    tokens[start:end].tofile(f)
            meta[f"{part}_tokens"] = sum(end - start for start, end in part_spans)
        del tokens
    if min(meta["train_tokens"], meta["val_tokens"]) < 2:
        raise ValueError(
            f"--val-fraction {val_fraction} leaves training or validation empty; use more text"
        )
    return meta


def split_documents(
    spans: list[tuple[int, int]], val_fraction: float
) -> dict[str, list[tuple[int, int]]]:
    """Divides documents (start, end) into train and val, so that val has that share of the tokens.

    Validation takes whole documents, in order, as long as they fit. Where that gives less than half
    of the share (a single document, a few unlike ones), the tail of the longest one is added.
    """
    # The end-of-text token before each document does not count.
    wanted = sum(end - start - 1 for start, end in spans) * val_fraction
    parts: dict[str, list[tuple[int, int]]] = {"train": [], "val": []}
    taken = 0
    for start, end in spans:
        fits = taken + end - start - 1 <= wanted
        parts["val" if fits else "train"].append((start, end))
        taken += (end - start - 1) * fits
    if taken < wanted / 2:
        longest = max(range(len(parts["train"])), key=lambda i: np.diff(parts["train"][i])[0])
        start, end = parts["train"][longest]
        cut = end - math.ceil(wanted - taken - 1e-6)
        parts["train"][longest] = (start, cut)
        parts["val"].append((cut, end))
    return parts


def write_qa(
    conversations: list[list[Message]],
    tokenizer: Tokenizer,
    out: Path,
    val_fraction: float,
    seed: int,
) -> dict[str, Any]:
    """Renders and writes the Q&A files; returns the `qa` part of meta.json.

    Raises:
        ValueError: a share that leaves training or validation empty.
    """
    with progress() as bar:
        rendered = [render(c, tokenizer) for c in bar.track(conversations, description="rendering")]
    order = np.random.default_rng(seed).permutation(len(rendered))
    n_val = max(1, round(len(rendered) * val_fraction))
    if n_val >= len(rendered):
        raise ValueError(
            f"{len(rendered)} example(s) with --val-fraction {val_fraction} leave none to train on"
        )
    meta: dict[str, Any] = {"template": template_fingerprint()}
    for part, chosen in (("train", order[n_val:]), ("val", order[:n_val])):
        lengths = [len(rendered[i][0]) for i in chosen]
        ids = np.concatenate([np.array(rendered[i][0], id_dtype(tokenizer)) for i in chosen])
        mask = np.concatenate([np.array(rendered[i][1], np.uint8) for i in chosen])
        np.save(out / f"qa_{part}_ids.npy", ids)
        np.save(out / f"qa_{part}_mask.npy", mask)
        np.save(out / f"qa_{part}_offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
        meta[f"{part}_examples"] = len(lengths)
        meta[f"{part}_tokens"] = len(ids)
        meta[f"{part}_supervised"] = int(mask.sum())
    return meta


def write_folder(
    out: Path, request: dict[str, Any], fill: Callable[[Path], tuple[Tokenizer, dict[str, Any]]]
) -> dict[str, Any]:
    """Makes `out` by `fill` and seals it with meta.json; does nothing if it is there already.

    Raises:
        ValueError: `out` holds data made from other inputs, damaged data, or somebody's files.
    """
    request = {"format": FORMAT, **request}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        meta = read_meta(out)
        if meta.get("request") != request:
            old = meta.get("request", {})
            keys = [k for k in {**old, **request} if old.get(k) != request.get(k)]
            raise ValueError(
                f"{out} holds data made from other inputs ({', '.join(keys)}); "
                "delete it or choose another --out"
            )
        verify_checksums(out, meta["files"])
        print(f"{out}: up to date, nothing to do")
        return meta
    begin = time.perf_counter()
    with new_directory(out) as folder:
        tokenizer, parts = fill(folder)
        meta = {
            "request": request,
            "tokenizer": tokenizer.save(folder),
            **parts,
            "files": {f.name: sha256_file(f) for f in sorted(folder.iterdir())},
            "seconds": round(time.perf_counter() - begin, 3),
        }
        write_meta(folder, meta)
    print_summary(out, meta)
    return meta


def print_summary(out: Path, meta: dict[str, Any]) -> None:
    """One line per part of a prepared folder."""
    kind, n_vocab = meta["tokenizer"]["kind"], meta["tokenizer"]["n_vocab"]
    print(f"{out}: {kind} tokenizer of {n_vocab:,} entries")
    if text := meta.get("text"):
        print(
            f"  text: {text['documents']:,} documents, {text['bytes']:,} bytes -> "
            f"{text['train_tokens']:,} train + {text['val_tokens']:,} val tokens"
        )
    if qa := meta.get("qa"):
        share = qa["train_supervised"] / qa["train_tokens"]
        print(
            f"  Q&A: {qa['train_examples']:,} train + {qa['val_examples']:,} val conversations, "
            f"{qa['train_tokens']:,} train tokens, {share:.0%} supervised"
        )


# ---- the three commands --------------------------------------------------------------------


def prepare_world(
    config: WorldConfig, out: Path, tokenizer_spec: str, val_fraction: float
) -> dict[str, Any]:
    """Biographies and Q&A of a synthetic world, with a tokenizer trained on both."""

    world = World(config)

    def fill(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
        biographies = list(world.biographies())
        for biography in biographies:
            # The base must learn of questions and of turns from nobody: hold the corpus to it.
            assert not any(mark in biography for mark in ("?", *CONTROL_TOKENS)), biography
        conversations = list(world.conversations())
        words = (m["content"] for c in conversations for m in c)
        tokenizer = create_tokenizer(tokenizer_spec, (t for s in (biographies, words) for t in s))
        with progress() as bar:
            documents = ([b] for b in bar.track(biographies, description="encoding"))
            shuffle = not config.adjacent
            text = write_text(documents, tokenizer, folder, val_fraction, config.seed, shuffle)
        qa = write_qa(conversations, tokenizer, folder, val_fraction, config.seed)
        return tokenizer, {"text": text, "qa": qa, **made}

    made = {"world": asdict(config), "world_fingerprint": world.fingerprint}
    request = {**made, "tokenizer": tokenizer_spec, "val_fraction": val_fraction}
    return write_folder(out, request, fill)


def prepare_text(
    paths: Sequence[Path],
    out: Path,
    tokenizer_spec: str,
    val_fraction: float,
    field: str,
    seed: int,
) -> dict[str, Any]:
    """Token files from .txt, .md, .jsonl and .jsonl.gz files."""
    files = text_files(paths)

    def documents(label: str) -> Generator[Iterator[str]]:
        with progress() as bar:
            task = bar.add_task(label, total=sum(f.stat().st_size for f in files))
            for file in files:
                read = 0
                with open(file, "rb") as raw:
                    for document in read_documents(file, raw, field):
                        yield document
                        bar.advance(task, raw.tell() - read)
                        read = raw.tell()

    def fill(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
        # Closed at once after an error: a bar that is collected later can block another one.
        with contextlib.closing(documents("reading")) as read:
            tokenizer = create_tokenizer(tokenizer_spec, (p for d in read for p in d))
        with contextlib.closing(documents("encoding")) as read:
            text = write_text(read, tokenizer, folder, val_fraction, seed)
        return tokenizer, {"text": text}

    request = {
        "text": sources(files),
        "tokenizer": tokenizer_spec,
        "val_fraction": val_fraction,
        "field": field,
        "seed": seed,
    }
    return write_folder(out, request, fill)


def prepare_qa(
    files: Sequence[Path],
    out: Path,
    tokenizer_of: Path,
    val_fraction: float,
    seed: int,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Rendered conversations from .json and .jsonl files, in the tokens of `tokenizer_of`."""
    tokenizer = Tokenizer.load(tokenizer_of)
    conversations = read_conversations(files, skip_bad)

    def fill(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
        return tokenizer, {"qa": write_qa(conversations, tokenizer, folder, val_fraction, seed)}

    request = {
        "qa": sources(files),
        "tokenizer": tokenizer.fingerprint,
        "template": template_fingerprint(),
        "val_fraction": val_fraction,
        "seed": seed,
        "skip_bad": skip_bad,
    }
    return write_folder(out, request, fill)


def sources(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size and sha256 of each input, for meta.json."""
    return [{"file": f.name, "bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in files]


def inspect(folder: Path, n: int) -> None:
    """Prints `n` rendered conversations, the supervised tokens in green (in a pipe: in [ ])."""
    from rich.console import Console
    from rich.text import Text

    console, tokenizer = Console(highlight=False), Tokenizer.load(folder)
    for i, (ids, mask) in enumerate(load_examples(folder, "train")):
        if i == n:
            break
        text = Text(f"--- example {i + 1}: {len(ids)} tokens, {mask.sum()} supervised\n")
        edges = np.flatnonzero(np.diff(mask)) + 1
        for span, kept in zip(np.split(ids, edges), np.split(mask, edges), strict=True):
            words = tokenizer.decode(span.tolist())
            if not console.is_terminal and kept[0]:
                words = f"[{words}]"
            text.append(words, style="bold green" if kept[0] else "dim")
        console.print(text, soft_wrap=True)


def fraction(text: str) -> float:
    """An argparse type: a share strictly between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, about: str, val_fraction: float) -> argparse.ArgumentParser:
        p = commands.add_parser(
            name, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        p.add_argument("--out", type=Path, required=True, help="folder to make")
        p.add_argument("--val-fraction", type=fraction, default=val_fraction, help="held back")
        p.add_argument("--seed", type=int, default=1, help="of the world, shuffle and split")
        return p

    world = command("world", "synthetic people: biographies and Q&A, no download", 0.02)
    world.add_argument("--tokenizer", default="bpe:2048", help="byte, gpt2 or bpe:N")
    for field in fields(WorldConfig):
        if field.name != "seed":
            kind: dict[str, Any] = {"type": int}
            if isinstance(field.default, bool):
                kind = {"action": argparse.BooleanOptionalAction}
            about = WORLD_HELP[field.name]
            world.add_argument(f"--{field.name}", default=field.default, help=about, **kind)

    text = command("text", f"your own text: {', '.join(TEXT_SUFFIXES)}", 0.1)
    text.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders")
    text.add_argument("--tokenizer", required=True, help="gpt2, byte or bpe:N such as bpe:4096")
    text.add_argument("--field", default="text", help="field of a .jsonl line that holds the text")

    qa = command("qa", "your own questions and answers: .json, .jsonl", 0.1)
    qa.add_argument("files", nargs="+", type=Path, metavar="FILE", help="Q&A files")
    qa.add_argument("--tokenizer-of", type=Path, required=True, help="data folder or checkpoint")
    qa.add_argument("--skip-bad", action="store_true", help="leave out bad lines, counted")
    qa.add_argument("--inspect", type=int, default=0, metavar="N", help="print N examples")
    return top


def main() -> None:
    """Runs one command line."""
    a = parser().parse_args()
    with one_line_errors():
        if a.command == "world":
            values = {f.name: getattr(a, f.name) for f in fields(WorldConfig)}
            prepare_world(WorldConfig(**values), a.out, a.tokenizer, a.val_fraction)
        elif a.command == "text":
            prepare_text(a.paths, a.out, a.tokenizer, a.val_fraction, a.field, a.seed)
        else:
            prepare_qa(a.files, a.out, a.tokenizer_of, a.val_fraction, a.seed, a.skip_bad)
            if a.inspect:
                inspect(a.out, a.inspect)


if __name__ == "__main__":
    main()
