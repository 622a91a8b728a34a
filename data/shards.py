"""What a prepared folder holds: text, Q&A or both. Only this module writes and reads it.

    meta.json            the request it was made by, counts, and the sha256 of each file
    tokenizer.tiktoken   its vocabulary (data/tokenizer.py)
    train.bin, val.bin   text: ids one after another, an end-of-text token before each document
    qa_PART_ids.npy      Q&A, PART being train or val: rendered conversations end to end
    qa_PART_mask.npy     for each of these ids, 1 where it is supervised, else 0
    qa_PART_offsets.npy  where each conversation begins, and where the last one ends
    .hashed.json         what the files looked like when they were last hashed (`check_files`)

Ids are little-endian, of 2 bytes, or of 4 where the vocabulary has more than 65,536 entries.
"""

import contextlib
import math
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from data.chat import Message, render, template_fingerprint
from data.sources.read import PIECE
from data.tokenizer import Tokenizer
from runtime import files
from runtime.cli import say

Meta = dict[str, Any]
FORMAT, HASHED = 1, ".hashed.json"


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type of the ids in a file: the smaller of two that holds the whole vocabulary."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")


def open_prepared(path: str | Path, kind: str, verify: bool = False) -> Meta:
    """Checks a prepared folder that must hold "text" or "qa"; returns its meta.json.
    Raises ValueError: not a prepared folder, nothing of that kind in it, or as `check_files`.
    """
    meta = files.read_meta(path)
    if kind not in meta:
        raise ValueError(f"{path} holds no {kind}; make it with `python -m data.prepare {kind}`")
    with files.as_ours(path):
        _ = meta["tokenizer"]["fingerprint"], meta[kind]["dtype" if kind == "text" else "template"]
        if check_files(Path(path), meta["files"], verify):
            for part in meta.keys() & {"text", "qa"}:
                _check_ids(Path(path), part, meta["tokenizer"]["n_vocab"])
    return meta


def _check_ids(folder: Path, kind: str, n_vocab: int) -> None:
    """Raises ValueError: an id that the vocabulary does not have, which a GPU would die of."""
    for part in ("train", "val"):
        ids = load_tokens(folder, part) if kind == "text" else _load(folder / f"qa_{part}_ids.npy")
        if ids.max(initial=0) >= n_vocab:
            raise ValueError(f"{folder}: an id of {part} is outside of its vocabulary")


def check_files(folder: Path, checksums: dict[str, str], verify: bool = False) -> bool:
    """Checks the sha256 of files; returns whether any was hashed. One whose size, modification time
    and inode number are those of .hashed.json is not, unless `verify`: this misses a change that
    keeps the size and sets the time back, and bytes that the disk loses by itself. Raises
    ValueError: a file is missing, or has another sha256.
    """
    known, states = Meta(), _file_states(folder, checksums)  # of before it is hashed
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        known = {} if verify else dict(files.read_json(folder / HASHED))
    doubtful = [n for n in checksums if n not in states or states[n] != known.get(n)]
    files.verify_checksums(folder, {name: checksums[name] for name in doubtful})
    if doubtful:
        # A read-only disk, or another start at this moment.
        with contextlib.suppress(OSError, ValueError):
            files.write_json(folder / HASHED, states)
    return bool(doubtful)


def _file_states(folder: Path, checksums: dict[str, str]) -> Meta:
    """What .hashed.json holds, of each file that is there."""
    stats = {name: (folder / name).stat() for name in checksums if (folder / name).exists()}
    return {n: [checksums[n], s.st_size, s.st_mtime_ns, s.st_ino] for n, s in stats.items()}


def load_tokens(folder: str | Path, part: str) -> np.ndarray:
    """The ids of train.bin or val.bin, (n,), left on disk until they are used."""
    with files.as_ours(folder):
        meta = files.read_meta(folder)
        if (dtype := meta["text"]["dtype"]) not in ("<u2", "<u4"):
            raise ValueError(f"{folder} has ids of the type {dtype!r:.40}; make it again")
        return np.memmap(Path(folder, f"{part}.bin"), dtype, "r")


def load_examples(folder: str | Path, part: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, mask) of each rendered conversation of "train" or "val": views of the files.
    Raises ValueError: the three files do not fit together.
    """
    ids, mask, offsets = (
        _load(Path(folder, f"qa_{part}_{name}.npy")) for name in ("ids", "mask", "offsets")
    )
    fits = ids.ndim == mask.ndim == offsets.ndim == 1 and len(ids) == len(mask)
    fits = fits and (ids.dtype.kind, mask.dtype.kind, offsets.dtype.kind) == ("u", "u", "i")
    fits = fits and len(offsets) > 0 and (offsets[0], offsets[-1]) == (0, len(ids))
    fits = fits and bool((offsets[:-1] < offsets[1:]).all())  # a difference may overflow
    # A conversation has two tokens or more, and begins with one that is not supervised.
    if not fits or (np.diff(offsets) < 2).any() or mask[offsets[:-1]].any():
        raise ValueError(f"{folder}: its files qa_{part}_*.npy do not fit together")
    cuts = offsets[1:-1]
    return list(zip(np.split(ids, cuts), np.split(mask, cuts), strict=True))


def _load(path: Path) -> np.ndarray:
    """An array of a .npy file, left on disk until it is used."""
    try:
        return np.asarray(np.load(path, "r", allow_pickle=False))
    except Exception as error:  # its header is read as Python, which has many ways to be wrong
        raise ValueError(f"{path} is no array: {error!s:.100}") from None


def save_tokens(folder: Path, part: str, ids: np.ndarray, spans: np.ndarray) -> dict[str, int]:
    """Writes train.bin or val.bin; returns counts for meta.json. The ids are of `id_dtype`; written
    are the documents that lie at these spans, (documents, 2) as (start, end), in their order.
    """
    with open(folder / f"{part}.bin", "wb") as f:
        f.writelines(ids[start:end].data for start, end in spans)
    return {f"{part}_tokens": int(np.diff(spans).sum())}


def save_examples(
    folder: Path, part: str, ids: np.ndarray, mask: np.ndarray, spans: np.ndarray
) -> dict[str, int]:
    """Writes the Q&A files of a part in the same way; the mask is of uint8."""
    offsets = np.append(0, np.diff(spans).cumsum())
    shape = (int(offsets[-1]),)
    np.save(folder / f"qa_{part}_offsets.npy", offsets)
    for name, values in (("ids", ids), ("mask", mask)):
        with open(folder / f"qa_{part}_{name}.npy", "wb") as f:
            header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(f, header)
            f.writelines(np.ascontiguousarray(values[start:end]).data for start, end in spans)
    supervised = _load(folder / f"qa_{part}_mask.npy").sum()
    counts = {"examples": len(spans), "tokens": offsets[-1], "supervised": supervised}
    return {f"{part}_{name}": int(count) for name, count in counts.items()}


def n_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def in_threads(
    work: Callable[[list[Any]], Any], items: Iterable[Any], size: Callable[[Any], int]
) -> Iterator[Any]:
    """What `work` makes of the items, in order: lists of about PIECE characters, few at a time."""
    total, waiting = 0, deque[Future[list[np.ndarray]]]()

    def batch_of(item: Any) -> int:
        nonlocal total
        total += size(item)
        return total // PIECE

    with ThreadPoolExecutor(n_cores()) as pool:
        for _, batch in groupby(items, batch_of):
            waiting.append(pool.submit(work, list(batch)))
            if len(waiting) > 2 * n_cores():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def on_disk(
    folder: Path, tables: Iterable[tuple[np.ndarray, Any]], dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Puts tables one after another into a scratch file; memory might not hold them. With each
    comes where documents begin in it. Yields all of them as one, and the documents' spans. Raises
    ValueError: there is nothing in them.
    """
    bounds, n = list[Any](), 0
    with tempfile.TemporaryFile(dir=folder) as scratch:
        for table, begins in tables:
            scratch.write(table.data)
            bounds.append(n + np.flatnonzero(begins))
            n += len(table)
        if not n:
            raise ValueError("the corpus is empty: there is no text to train on")
        cuts = np.concatenate([*bounds, [n]])
        yield np.memmap(scratch, dtype, "r"), sliding_window_view(cuts, 2)


def write_text(
    pieces: Iterable[tuple[bool, str]],
    tokenizer: Tokenizer,
    folder: Path,
    val_fraction: float,
    seed: int,
    shuffle: bool = True,
) -> Meta:
    """Writes train.bin and val.bin from documents in pieces, each with whether a document begins
    with it; returns meta.json's `text`. The documents are shuffled, but without `shuffle` those of
    training stay in their given order.
    Raises ValueError: no text at all, or a share that leaves training or validation empty.
    """
    dtype, counts = id_dtype(tokenizer), list[tuple[int, int]]()  # of empty documents, and of bytes
    end_of_text = np.array([tokenizer.end_of_text], dtype)

    def encode(batch: list[tuple[bool, str]]) -> tuple[np.ndarray, Any]:
        filled = [(begins, text) for begins, text in batch if text]
        counts.append((len(batch) - len(filled), sum(len(text.encode()) for _, text in filled)))
        ids = [(end_of_text[:begins], tokenizer.encode_array(text)) for begins, text in filled]
        joined = np.concatenate([end_of_text[:0], *chain(*ids)]).astype(dtype)
        return joined, joined == tokenizer.end_of_text

    tables = in_threads(encode, pieces, lambda piece: len(piece[1]) or 1)
    with on_disk(folder, tables, dtype) as (ids, spans):
        n_empty, n_bytes = map(sum, zip(*counts, strict=True))
        if n_empty:
            say(f"left out: {n_empty:,} empty document{'s' * (n_empty > 1)}")
        meta: Meta = {"dtype": dtype.str, "documents": len(spans), "bytes": n_bytes}
        parts = split_documents(np.random.default_rng(seed).permutation(spans), val_fraction)
        if not shuffle:
            parts["train"] = parts["train"][parts["train"][:, 0].argsort()]
        for part, chosen in parts.items():
            meta |= save_tokens(folder, part, ids, chosen)
    if min(meta["train_tokens"], meta["val_tokens"]) < 2:
        share = f"a val_fraction of {val_fraction}"
        raise ValueError(f"{share} leaves training or validation empty; use more text")
    return meta


def split_documents(spans: np.ndarray, val_fraction: float) -> dict[str, np.ndarray]:
    """Divides documents, (n, 2) as (start, end), so that val has that share of the tokens: whole
    documents, in order, as long as they fit. Where that gives less than half of the share (a single
    document, a few unlike ones), the tail of the longest one is added.
    """
    lengths = np.diff(spans)[:, 0] - 1  # without the end-of-text token
    wanted, taken, held_back = int(lengths.sum()) * val_fraction, 0, np.zeros(len(spans), bool)
    for i, length in enumerate(lengths.tolist()):
        held_back[i] = taken + length <= wanted
        taken += length * held_back[i]
    train, val = spans[~held_back], spans[held_back]
    if taken < wanted / 2:
        longest = np.diff(train).argmax()
        cut = train[longest, 1] - math.ceil(wanted - taken - 1e-6)
        val = np.concatenate([val, [[cut, train[longest, 1]]]])
        train[longest, 1] = cut
    return {"train": train, "val": val}


def write_qa(
    conversations: Iterable[list[Message]],
    tokenizer: Tokenizer,
    folder: Path,
    val_fraction: float,
    seed: int,
) -> Meta:
    """Renders and writes Q&A; returns meta.json's `qa`. Raises ValueError: none is to train on."""
    dtype = np.dtype([("ids", id_dtype(tokenizer)), ("mask", np.uint8)])

    def encode(batch: list[list[Message]]) -> tuple[np.ndarray, Any]:
        ids, masks = zip(*(render(conversation, tokenizer) for conversation in batch), strict=True)
        begins = [i == 0 for conversation in ids for i in range(len(conversation))]
        table = np.empty(len(begins), dtype)
        table["ids"], table["mask"] = [*chain(*ids)], bytearray(chain(*masks))
        return table, begins

    tables = in_threads(encode, conversations, lambda c: sum(len(m["content"]) for m in c))
    with on_disk(folder, tables, dtype) as (table, spans):
        n_val = max(1, round(len(spans) * val_fraction))
        if n_val >= len(spans):
            what = f"{len(spans)} example(s) at val_fraction {val_fraction}"
            raise ValueError(f"{what} leave none to train on")
        spans = np.random.default_rng(seed).permutation(spans)
        meta: Meta = {"template": template_fingerprint()}
        for part, chosen in (("train", spans[n_val:]), ("val", spans[:n_val])):
            meta |= save_examples(folder, part, table["ids"], table["mask"], chosen)
    return meta


def check_folder(out: Path, request: Meta) -> Meta | None:
    """The meta.json of what `out` holds already, made by this request; None if it holds nothing.
    Raises ValueError: `out` holds data made from other inputs, or somebody's files.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    meta = files.read_meta(out)
    # Older worlds have the template beside their request.
    with files.as_ours(out):
        old = {"template": meta.get("qa", {}).get("template"), **meta.get("request", {})}
    if keys := [k for k in {**old, **request} if not _agree(old.get(k), request.get(k))]:
        what = f"{out} holds data made from other inputs ({', '.join(keys)})"
        raise ValueError(f"{what}; delete it or choose another folder")
    return meta


def _agree(old: Any, new: Any) -> bool:
    """Whether two values of a request are equal; a new file whose sha256 is None may have any."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return all(map(_agree, old, new))
    if isinstance(old, dict) and isinstance(new, dict) and new.get("sha256", "") is None:
        new = {**new, "sha256": old.get("sha256")}
    return bool(old == new)


def write_folder(out: Path, request: Meta, fill: Callable[[Path], tuple[Tokenizer, Meta]]) -> Meta:
    """Makes `out` by `fill`, sealed with meta.json; if it is there already, only checks it."""
    if meta := check_folder(out, request):
        check_files(out, meta["files"])
        say(f"{out}: up to date, nothing to do")
        return meta
    begin = time.perf_counter()
    with files.full_disk(out), files.new_directory(out) as folder:
        tokenizer, parts = fill(folder)
        meta = {"request": request, "tokenizer": tokenizer.save(folder), **parts}
        meta["files"] = {f.name: files.sha256_file(f) for f in sorted(folder.iterdir())}
        meta["seconds"] = round(time.perf_counter() - begin, 3)
        files.write_json(folder / HASHED, _file_states(folder, meta["files"]))
        files.write_meta(folder, meta)
    say("{}: {kind} tokenizer of {n_vocab:,} entries".format(out, **meta["tokenizer"]))
    if text := meta.get("text"):
        line = "{documents:,} documents, {bytes:,} bytes -> {train_tokens:,} train + {val_tokens:,}"
        say(f"  text: {line.format(**text)} val tokens")
    if qa := meta.get("qa"):
        line = "{train_examples:,} train + {val_examples:,} val conversations, {train_tokens:,}"
        share = qa["train_supervised"] / qa["train_tokens"]
        say(f"  Q&A: {line.format(**qa)} train tokens, {share:.0%} supervised")
    return meta
