"""Text and Q&A into token files: `python -m data.prepare {world,text,qa,fetch} --help`.

A prepared folder holds its tokenizer, token files and a meta.json with counts, checksums and
sources. Text is `train.bin` and `val.bin`: token ids one after another, each document preceded
by the end-of-text token. Q&A is `qa_{train,val}_{ids,mask,offsets}.npy`: rendered conversations
end to end, what is supervised, and where each begins. A folder of the world holds both.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import math
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from rich.progress import Progress

from data.chat import Message, render, template_fingerprint
from data.files import (
    full_disk,
    load_examples,
    new_directory,
    one_line_errors,
    read_meta,
    resolve_checkpoint,
    sha256_file,
    verify_checksums,
    write_meta,
)
from data.read import (
    PIECE,
    QA_SUFFIXES,
    TEXT_SUFFIXES,
    distinct,
    read_conversations,
    read_documents,
    read_files,
    text_files,
)
from data.tokenizer import CONTROL_TOKENS, Tokenizer, create_tokenizer
from data.world import World, WorldConfig

T = TypeVar("T")
R = TypeVar("R")
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


@contextlib.contextmanager
def reading(label: str, files: Sequence[Path]) -> Iterator[Callable[[int], object]]:
    """A progress bar over the bytes of files; yields what is to be told the bytes gone over."""
    with progress() as bar:
        yield partial(bar.advance, bar.add_task(label, total=sum(f.stat().st_size for f in files)))


# ---- writing -------------------------------------------------------------------------------


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned integer type that holds every id."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")


def n_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def in_threads(
    pool: ThreadPoolExecutor,
    work: Callable[[list[T]], R],
    items: Iterable[T],
    size: Callable[[T], int],
) -> Iterator[R]:
    """What `work` makes of the items, in order: lists of about PIECE characters, few at a time."""
    waiting, batch, held = deque[Future[R]](), list[T](), 0
    for item in items:
        batch.append(item)
        held += size(item)
        if held >= PIECE:
            waiting.append(pool.submit(work, batch))
            batch, held = [], 0
            if len(waiting) > 2 * n_cores():
                yield waiting.popleft().result()
    if batch:
        waiting.append(pool.submit(work, batch))
    while waiting:
        yield waiting.popleft().result()


def copy_spans(scratch: IO[bytes], spans: np.ndarray, f: IO[bytes]) -> None:
    """Writes to `f` the stretches of a file that `spans` gives: (n, 2), first byte and end."""
    for start, end in spans:
        scratch.seek(start)
        for position in range(start, end, PIECE):
            f.write(scratch.read(min(PIECE, end - position)))


def write_text(
    documents: Iterable[Iterable[str]],
    tokenizer: Tokenizer,
    out: Path,
    val_fraction: float,
    seed: int,
    shuffle: bool = True,
) -> dict[str, Any]:
    """Writes train.bin and val.bin; returns the `text` part of meta.json.

    Documents are encoded once into a scratch file, a thread per core, then copied out in shuffled
    order, so memory holds only their offsets. Without `shuffle` the training documents stay in
    their given order.

    Raises:
        ValueError: no text at all, or a share that leaves training or validation empty.
    """
    dtype = id_dtype(tokenizer)
    end_of_text = np.array([tokenizer.end_of_text], dtype)

    def encode(pieces: list[tuple[int, str]]) -> tuple[np.ndarray, int]:
        ids = [(end_of_text[:first], tokenizer.encode_array(piece)) for first, piece in pieces]
        n_bytes = sum(len(piece.encode()) for _, piece in pieces)
        return np.concatenate([*chain(*ids)]).astype(dtype), n_bytes

    # With each piece, how many end-of-text tokens go before it. A document without any is none.
    pieces = ((int(i == 0), piece) for d in documents for i, piece in enumerate(d))
    bounds, position, n_bytes = array.array("q"), 0, 0
    with tempfile.TemporaryFile(dir=out) as scratch:
        with ThreadPoolExecutor(n_cores()) as pool:
            for ids, size in in_threads(pool, encode, pieces, lambda item: len(item[1])):
                scratch.write(ids.data)
                bounds.extend((position + np.flatnonzero(ids == end_of_text)).tolist())
                position += len(ids)
                n_bytes += size
        if not position:
            raise ValueError("the corpus is empty: there is no text to train on")
        meta: dict[str, Any] = {"dtype": dtype.str, "documents": len(bounds), "bytes": n_bytes}
        order = np.random.default_rng(seed).permutation(len(bounds))
        bounds.append(position)
        spans = np.stack([bounds[:-1], bounds[1:]], axis=1)[order]
        parts = split_documents(spans, val_fraction)
        if not shuffle:
            parts["train"] = parts["train"][parts["train"][:, 0].argsort()]
        for part, part_spans in parts.items():
            with open(out / f"{part}.bin", "wb") as f:
                copy_spans(scratch, part_spans * dtype.itemsize, f)
            meta[f"{part}_tokens"] = int(np.diff(part_spans).sum())
    if min(meta["train_tokens"], meta["val_tokens"]) < 2:
        raise ValueError(
            f"--val-fraction {val_fraction} leaves training or validation empty; use more text"
        )
    return meta


def split_documents(spans: np.ndarray, val_fraction: float) -> dict[str, np.ndarray]:
    """Divides documents, (n, 2) as (start, end), so that val has that share of the tokens.

    Validation takes whole documents, in order, as long as they fit. Where that gives less than half
    of the share (a single document, a few unlike ones), the tail of the longest one is added.
    """
    # The end-of-text token before each document does not count.
    lengths = np.diff(spans)[:, 0] - 1
    wanted, taken, held_back = int(lengths.sum()) * val_fraction, 0, np.zeros(len(spans), bool)
    for i, length in enumerate(lengths):
        if taken + length <= wanted:
            held_back[i] = True
            taken += int(length)
    parts = {"train": spans[~held_back], "val": spans[held_back]}
    if taken < wanted / 2:
        longest = np.diff(parts["train"])[:, 0].argmax()
        end = parts["train"][longest, 1]
        cut = end - math.ceil(wanted - taken - 1e-6)
        parts["train"][longest, 1] = cut
        parts["val"] = np.concatenate([parts["val"], [[cut, end]]])
    return parts


def write_qa(
    conversations: Iterable[list[Message]],
    tokenizer: Tokenizer,
    out: Path,
    val_fraction: float,
    seed: int,
) -> dict[str, Any]:
    """Renders and writes the Q&A files; returns the `qa` part of meta.json.

    As with text, memory holds only lengths.

    Raises:
        ValueError: a share that leaves training or validation empty.
    """
    dtypes = {"ids": id_dtype(tokenizer), "mask": np.dtype(np.uint8)}

    def rendered(batch: list[list[Message]]) -> tuple[list[int], np.ndarray, bytes]:
        ids, masks = zip(*(render(conversation, tokenizer) for conversation in batch), strict=True)
        counts = [n for mask in masks for n in (len(mask), sum(mask))]
        return counts, np.array([*chain(*ids)], dtypes["ids"]), bytes(chain(*masks))

    def size(conversation: list[Message]) -> int:
        return sum(len(message["content"]) for message in conversation)

    counted = array.array("q")  # of each: its tokens, and how many of them are supervised
    with contextlib.ExitStack() as stack:
        scratch = {n: stack.enter_context(tempfile.TemporaryFile(dir=out)) for n in dtypes}
        with ThreadPoolExecutor(n_cores()) as pool:
            for counts, ids, mask in in_threads(pool, rendered, conversations, size):
                counted.extend(counts)
                scratch["ids"].write(ids.data)
                scratch["mask"].write(mask)
        lengths, supervised = np.array(counted, np.int64).reshape(-1, 2).T
        ends = lengths.cumsum()
        order = np.random.default_rng(seed).permutation(len(lengths))
        n_val = max(1, round(len(lengths) * val_fraction))
        if n_val >= len(lengths):
            raise ValueError(
                f"{len(lengths)} example(s) with --val-fraction {val_fraction} leave none to "
                "train on"
            )
        meta: dict[str, Any] = {"template": template_fingerprint()}
        for part, chosen in (("train", order[n_val:]), ("val", order[:n_val])):
            offsets = np.append(0, lengths[chosen].cumsum())
            n_tokens = int(offsets[-1])
            spans = np.stack([ends[chosen] - lengths[chosen], ends[chosen]], axis=1)
            for name, dtype in dtypes.items():
                with open(out / f"qa_{part}_{name}.npy", "wb") as f:
                    header = {"descr": dtype.str, "fortran_order": False, "shape": (n_tokens,)}
                    np.lib.format.write_array_header_1_0(f, header)
                    copy_spans(scratch[name], spans * dtype.itemsize, f)
            np.save(out / f"qa_{part}_offsets.npy", offsets)
            meta[f"{part}_examples"] = len(chosen)
            meta[f"{part}_tokens"] = n_tokens
            meta[f"{part}_supervised"] = int(supervised[chosen].sum())
    return meta


def check_folder(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The meta.json of what `out` holds already, made by this request; None if it holds nothing.

    Raises:
        ValueError: `out` holds data made from other inputs, or somebody's files.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    meta = read_meta(out)
    old = meta.get("request", {})
    if keys := [k for k in {**old, **request} if not same(old.get(k), request.get(k))]:
        raise ValueError(
            f"{out} holds data made from other inputs ({', '.join(keys)}); "
            "delete it or choose another --out"
        )
    return meta


def same(old: Any, new: Any) -> bool:
    """Whether two values of a request agree; a new file whose sha256 is None may have any."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        new = [{**n, "sha256": n["sha256"] or o["sha256"]} for o, n in zip(old, new, strict=True)]
    return bool(old == new)


def write_folder(
    out: Path, request: dict[str, Any], fill: Callable[[Path], tuple[Tokenizer, dict[str, Any]]]
) -> dict[str, Any]:
    """Makes `out` by `fill` and seals it with meta.json; does nothing if it is there already.

    Raises:
        ValueError: as `check_folder`, damaged data, or a full disk.
    """
    if meta := check_folder(out, request):
        verify_checksums(out, meta["files"])
        print(f"{out}: up to date, nothing to do")
        return meta
    begin = time.perf_counter()
    with full_disk(out), new_directory(out) as folder:
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


# ---- the four commands ---------------------------------------------------------------------


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
            qa = write_qa(
                bar.track(conversations, description="rendering"),
                *(tokenizer, folder, val_fraction, config.seed),
            )
        return tokenizer, {"text": text, "qa": qa, **made}

    made = {"world": asdict(config), "world_fingerprint": world.fingerprint}
    request = {
        "format": FORMAT,
        **made,
        "tokenizer": tokenizer_spec,
        "val_fraction": val_fraction,
    }
    return write_folder(out, request, fill)


def prepare_text(
    paths: Sequence[Path],
    out: Path,
    tokenizer_spec: str,
    val_fraction: float,
    field: str,
    seed: int,
) -> dict[str, Any]:
    """Token files from files of TEXT_SUFFIXES, and from folders of them."""
    files = text_files(paths)
    read = partial(read_documents, field=field)

    def fill(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
        with reading("reading", files) as advance:
            pieces = (piece for d in read_files(files, read, advance) for piece in d)
            tokenizer = create_tokenizer(tokenizer_spec, pieces)
        with reading("encoding", files) as advance:
            documents = read_files(files, read, advance)
            text = write_text(documents, tokenizer, folder, val_fraction, seed)
        return tokenizer, {"text": text}

    request = text_request(sources(files), tokenizer_spec, val_fraction, field, seed)
    return write_folder(out, request, fill)


def text_request(
    files: list[dict[str, Any]], tokenizer_spec: str, val_fraction: float, field: str, seed: int
) -> dict[str, Any]:
    """What a folder of text is made from, for meta.json."""
    return {
        "format": FORMAT,
        "text": files,
        "tokenizer": tokenizer_spec,
        "val_fraction": val_fraction,
        "field": field,
        "seed": seed,
    }


def prepare_qa(
    files: Sequence[Path],
    out: Path,
    tokenizer_of: Path | Tokenizer,
    val_fraction: float,
    seed: int,
    skip_bad: bool = False,
    trees: bool = False,
    shown: int | None = None,
) -> dict[str, Any]:
    """Rendered conversations from files of QA_SUFFIXES, in the tokens of `tokenizer_of`.

    `trees` and `shown` are those of `read_conversations`.
    """
    files = distinct(files)
    tokenizer = (
        tokenizer_of if isinstance(tokenizer_of, Tokenizer) else Tokenizer.load(tokenizer_of)
    )

    def fill(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
        with reading("rendering", files) as advance:
            conversations = read_conversations(files, skip_bad, trees, shown, advance)
            return tokenizer, {"qa": write_qa(conversations, tokenizer, folder, val_fraction, seed)}

    request = qa_request(sources(files), tokenizer, val_fraction, seed, skip_bad, trees)
    return write_folder(out, request, fill)


def qa_request(
    files: list[dict[str, Any]],
    tokenizer: Tokenizer,
    val_fraction: float,
    seed: int,
    skip_bad: bool,
    trees: bool,
) -> dict[str, Any]:
    """What a folder of Q&A is made from, for meta.json."""
    return {
        "format": FORMAT,
        "qa": files,
        "tokenizer": tokenizer.fingerprint,
        "template": template_fingerprint(),
        "val_fraction": val_fraction,
        "seed": seed,
        "skip_bad": skip_bad,
        **({"trees": True} if trees else {}),
    }


def fetch(
    name: str,
    out: Path | None = None,
    downloads: Path | None = None,
    tokenizer: str | None = None,
    tokenizer_of: Path | None = None,
    n_files: int | None = None,
    val_fraction: float | None = None,
    seed: int = 1,
) -> dict[str, Any]:
    """Downloads a named data set, or its first `n_files` files, and prepares it.

    Raises:
        ValueError: no such name, or a step of it fails.
    """
    from data.download import download
    from data.named import NAMED, bytes_of_tokens, next_command, print_plan, remote_files

    if name not in NAMED:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(NAMED)}")
    named, out = NAMED[name], out or Path("out") / name / "data"
    downloads, spec = downloads or Path("out/downloads") / name, tokenizer or named.tokenizer
    val_fraction = val_fraction or named.val_fraction
    if named.kind == "text" and tokenizer_of:
        raise ValueError("--tokenizer-of is for Q&A; text takes --tokenizer gpt2, byte or bpe:N")
    if named.kind == "qa" and spec.startswith("bpe") and not tokenizer_of:
        raise ValueError(f"{spec} is trained on text: name the base with --tokenizer-of FOLDER")
    # Before anything is downloaded: no such folder, a vocabulary that cannot be had, other data.
    tokens = Tokenizer.load(tokenizer_of) if tokenizer_of else create_tokenizer(spec, [])
    try:
        files = remote_files(named, n_files)
    except ValueError as error:
        if not downloads.exists():
            raise
        raise ValueError(f"{error}; what came before is in {downloads}") from None
    found = [{"file": Path(f.name).name, "bytes": f.size, "sha256": f.sha256} for f in files]
    if named.kind == "text":
        request = text_request(found, spec, val_fraction, named.field, seed)
    else:
        request = qa_request(found, tokens, val_fraction, seed, True, named.trees)
    is_made = check_folder(out, request) is not None
    # The token files, and a scratch copy of them.
    preparing = 0 if is_made else 2 * bytes_of_tokens(named, files, tokens.kind)
    print_plan(name, named, files, downloads, preparing, n_cores())
    paths = download(files, downloads, [(out, preparing, "prepare")])
    if named.kind == "text":
        meta = prepare_text(paths, out, spec, val_fraction, named.field, seed)
    else:
        meta = prepare_qa(paths, out, tokens, val_fraction, seed, True, named.trees, shown=1)
    base = tokenizer_of
    if base and "request" in read_meta(resolve_checkpoint(base)):
        base = None  # a data folder
    print(f"next: {next_command(named, out, base)}")
    return meta


def sources(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size and sha256 of each input, for meta.json.

    Raises:
        ValueError: one is missing.
    """
    if missing := [f for f in files if not f.is_file()]:
        raise ValueError(f"{missing[0]} not found")
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


def positive(text: str) -> int:
    """An argparse type: 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(
        name: str, about: str, val_fraction: float | None, out_is_needed: bool = True
    ) -> argparse.ArgumentParser:
        p = commands.add_parser(
            name, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        held_back = "held back" if val_fraction else "held back; None: 0.1, above a gigabyte 0.005"
        p.add_argument("--out", type=Path, required=out_is_needed, help="folder to make")
        p.add_argument("--val-fraction", type=fraction, default=val_fraction, help=held_back)
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
    text.add_argument("--field", default="text", help="the key or column that holds the text")

    qa = command("qa", f"your own questions and answers: {', '.join(QA_SUFFIXES)}", 0.1)
    qa.add_argument("files", nargs="+", type=Path, metavar="FILE", help="Q&A files")
    qa.add_argument("--tokenizer-of", type=Path, required=True, help="data folder or checkpoint")
    qa.add_argument("--skip-bad", action="store_true", help="leave out bad lines, counted")
    qa.add_argument("--inspect", type=int, default=0, metavar="N", help="print N examples")

    p = command("fetch", "a data set by its name, downloaded and prepared", None, False)
    p.add_argument("name", nargs="?", help="one of those that --list shows")
    p.add_argument("--list", action="store_true", help="show names, sizes and licences")
    p.add_argument("--downloads", type=Path, help="where the files go (out/downloads/NAME)")
    p.add_argument("--tokenizer", help="gpt2, byte, or for text bpe:N")
    p.add_argument("--tokenizer-of", type=Path, help="of Q&A: data folder or checkpoint")
    p.add_argument("--files", type=positive, metavar="N", help="take only the first N files")
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
        elif a.command == "fetch":
            if a.list or not a.name:
                from data.named import print_names  # takes a while to import, as `download` does

                print_names()
            else:
                options = (a.tokenizer, a.tokenizer_of, a.files, a.val_fraction, a.seed)
                fetch(a.name, a.out, a.downloads, *options)
        else:
            prepare_qa(a.files, a.out, a.tokenizer_of, a.val_fraction, a.seed, a.skip_bad)
            if a.inspect:
                inspect(a.out, a.inspect)


if __name__ == "__main__":
    main()
