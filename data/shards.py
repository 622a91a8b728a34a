"""The prepared format."""

from __future__ import annotations

import array
import contextlib
import math
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from data.chat import Message, render, template_fingerprint
from data.sources.read import PIECE
from data.tokenizer import Tokenizer
from runtime.files import (
    full_disk,
    new_directory,
    read_meta,
    sha256_file,
    verify_checksums,
    write_meta,
)

T = TypeVar("T")
R = TypeVar("R")
FORMAT = 1


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


def open_prepared(path: str, part: str) -> dict[str, Any]:
    """Reads and checks the "text" or the "qa" part of a prepared folder; returns its meta.json.

    Raises:
        ValueError: not a prepared folder, the part is not in it, or a file has changed.
    """
    meta = read_meta(path)
    if part not in meta:
        raise ValueError(f"{path} holds no {part}; make it with `python -m data.prepare {part}`")
    verify_checksums(Path(path), meta["files"])
    return meta


def load_examples(folder: Path, part: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, mask) of each rendered conversation of "train" or "val": views of the files."""
    ids, mask, offsets = (
        np.asarray(np.load(folder / f"qa_{part}_{name}.npy", mmap_mode="r", allow_pickle=False))
        for name in ("ids", "mask", "offsets")
    )
    cuts = offsets[1:-1]
    return list(zip(np.split(ids, cuts), np.split(mask, cuts), strict=True))


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
