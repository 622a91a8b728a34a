"""What the benches run on: your text, or random ids where only the sizes matter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data.chat import template_fingerprint
from data.prepare import prepare_text
from data.shards import id_dtype, write_folder
from data.sources.read import read_documents
from data.tokenizer import CONTROL_TOKENS, Tokenizer


def any_tokenizer(n_vocab: int) -> Tokenizer:
    """One with so many entries (261 or more): all bytes, then pairs of them."""
    pairs = (bytes([i // 256, i % 256]) for i in range(n_vocab - 256 - len(CONTROL_TOKENS)))
    entries = [*(bytes([i]) for i in range(256)), *pairs]
    return Tokenizer("bpe", r"[\s\S]", {entry: rank for rank, entry in enumerate(entries)})


def random_text(out: Path, n_vocab: int, n_tokens: int) -> Path:
    """A prepared text folder of random ids; a tenth is for validation."""

    def fill(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
        tokenizer, rng = any_tokenizer(n_vocab), np.random.default_rng(1)
        dtype = id_dtype(tokenizer)
        sizes = {"train": n_tokens, "val": n_tokens // 10}
        for part, size in sizes.items():
            rng.integers(n_vocab, size=size).astype(dtype).tofile(folder / f"{part}.bin")
        counts = {f"{part}_tokens": size for part, size in sizes.items()}
        return tokenizer, {"text": {"dtype": dtype.str, "documents": 1, "bytes": 0, **counts}}

    write_folder(out, {"random ids": [n_vocab, n_tokens]}, fill)
    return out


def random_conversations(out: Path, n_vocab: int, lengths: list[int]) -> Path:
    """A prepared Q&A folder of random ids; the second half of each conversation is the reply.

    Args:
        lengths: tokens of each conversation.
    """

    def fill(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
        tokenizer, rng = any_tokenizer(n_vocab), np.random.default_rng(1)
        meta: dict[str, Any] = {"template": template_fingerprint()}
        for part, chosen in (("train", lengths), ("val", lengths[:1])):
            ids = rng.integers(256, size=sum(chosen)).astype(id_dtype(tokenizer))
            mask = np.concatenate([np.arange(n) >= n // 2 for n in chosen]).astype(np.uint8)
            offsets = np.cumsum([0, *chosen], dtype=np.int64)
            for name, array in (("ids", ids), ("mask", mask), ("offsets", offsets)):
                np.save(folder / f"qa_{part}_{name}.npy", array)
            meta |= {f"{part}_examples": len(chosen), f"{part}_tokens": len(ids)}
            meta[f"{part}_supervised"] = int(mask.sum())
        return tokenizer, {"qa": meta}

    write_folder(out, {"random conversations": [n_vocab, lengths]}, fill)
    return out


def random_words(path: Path, n_bytes: int) -> Path:
    """A .txt file of made-up words."""
    rng = np.random.default_rng(1)
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz   \n"), size=n_bytes)
    path.write_text("".join(letters))
    return path


def plain(text: Path, out: Path) -> Path:
    """A text file's documents one after another, a line's end between them, as one .txt file."""
    if text.suffix in (".txt", ".md"):
        return Path(shutil.copy(text, out))
    with open(text, "rb") as raw, open(out, "w", encoding="utf-8", newline="\n") as f:
        for document in read_documents(text, raw, "text"):
            f.writelines([*document, "\n"])
    return out


def prepared(text: Path, out: Path, tokenizer: str) -> Path:
    """A prepared folder of your text, a tenth of it for validation."""
    prepare_text([text], out, tokenizer, 0.1, "text", 1)
    return out


def size_of(text: Path) -> int:
    """Bytes of text in a file, as UTF-8 without its packing."""
    with open(text, "rb") as raw:
        return sum(len(p.encode()) for d in read_documents(text, raw, "text") for p in d)
