"""What is measured, as bench/cases.toml says, and what it runs on: texts, tokens, checkouts."""

import pickle
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from data.chat import template_fingerprint
from data.shards import id_dtype, load_tokens, save_examples, save_tokens, write_folder
from data.sources.read import read_documents, read_files
from data.tokenizer import CONTROL_TOKENS, WORD_PATTERN, Tokenizer

Case = dict[str, Any]
Figures = dict[str, Any]  # what is measured in one run, by name
ROOT = Path(__file__).parents[1]
BENCHES: dict[str, Any] = tomllib.loads((ROOT / "bench/cases.toml").read_text(encoding="utf-8"))
PEERS: dict[str, list[str]] = BENCHES.pop("peers")
READS: dict[str, str] = BENCHES.pop("reads")
LEFT_OUT = (".git", ".venv", "__pycache__", "out*", "wandb", "*.bin", "*.pkl", "*.pt", "input.txt")


def sizes(case: Case) -> dict[str, Any]:
    """Those of a case's model, by name."""
    return {name: case[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}


def random_data(out: Path, n_vocab: int, n_tokens: int, lengths: Sequence[int]) -> None:
    """A prepared folder of random ids: text, and conversations whose second half is the reply."""

    def fill(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
        ranks = {i.to_bytes(1 + (i > 255)): i for i in range(n_vocab - len(CONTROL_TOKENS))}
        tokenizer = Tokenizer("bpe", WORD_PATTERN, ranks)
        rng, dtype = np.random.default_rng(1), id_dtype(tokenizer)
        text: dict[str, Any] = {"dtype": dtype.str, "documents": 1, "bytes": 0}
        qa: dict[str, Any] = {"template": template_fingerprint()}
        for part, size, own in (("train", n_tokens, lengths), ("val", n_tokens // 10, lengths[:1])):
            ids = rng.integers(n_vocab, size=size).astype(dtype)
            text |= save_tokens(folder, part, ids, np.array([[0, size]]))
            ids = rng.integers(256, size=sum(own)).astype(dtype)
            mask = np.concatenate([np.arange(n) >= n // 2 for n in own]).astype(np.uint8)
            spans = sliding_window_view(np.cumsum([0, *own]), 2)
            ids[spans[:, 1] - 1] = tokenizer.end_of_turn
            qa |= save_examples(folder, part, ids, mask, spans)
        return tokenizer, {"text": text, "qa": qa}

    write_folder(out, {"random ids": [n_vocab, n_tokens, *lengths]}, fill)


def plain(text: Path, out: Path) -> Path:
    """A text file's documents one after another, a line's end between them, as one .txt file."""
    pieces = read_files([text], lambda file, raw: read_documents(file, raw, "text"))
    with open(out, "w", encoding="utf-8", newline="\n") as f:
        f.writelines("\n" * (begins and f.tell() > 0) + piece for begins, piece in pieces)
    return out


def nanogpt_data(folder: Path, prepared: Path) -> None:
    """Makes a data set of nanoGPT's of our prepared tokens, if its 16 bits hold the ids."""
    if (n_vocab := Tokenizer.load(prepared).n_vocab) > 1 << 16:
        raise ValueError("nanoGPT reads 16-bit ids; use a smaller vocabulary")
    for part in ("train", "val"):
        load_tokens(prepared, part).astype(np.uint16).tofile(folder / f"{part}.bin")
    padded = -(-n_vocab // 64) * 64  # as ours is
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": padded}))


def copy_tree(name: str, checkout: Path, to: Path) -> Path:
    """Copies a checkout, which its scripts write to; ValueError: it is not of that project."""
    if missing := [file for file in PEERS[name] if not (checkout / file).is_file()]:
        option = f"--{name.lower()} {checkout}"
        raise ValueError(f"{option} is no checkout of {name}: no {missing[0]} there")
    return Path(shutil.copytree(checkout, to, ignore=shutil.ignore_patterns(*LEFT_OUT)))
