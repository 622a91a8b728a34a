"""Preparation speed: MB of text per second, from the file to token files, start-up included.

Ours is `python -m data.prepare text`. With gpt2 tokens, nanoGPT is the way of its openwebtext
(Hugging Face `datasets`, a document at a time) where that package is there, and else its
data/shakespeare/prepare.py, which encodes the whole text at once; with bytes it is its
data/shakespeare_char/prepare.py. Its scripts are given the plain text, ours the file as it is.
Each runs on one core, and on all of them. gpt2 needs its vocabulary (TIKTOKEN_CACHE_DIR).

python -m bench.prepare --text books.jsonl.gz --nanogpt DIR
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from bench import inputs
from bench.rounds import LAUNCH, Bench, Figures, arguments, interleave, opened, parse, start
from data.shards import n_cores
from runtime.cli import one_line_errors

HAS_DATASETS = importlib.util.find_spec("datasets") is not None


def both_ways(
    bench: Bench, megabytes: float, command: Callable[[Path], list[str | Path]], i: int
) -> Figures:
    """Runs a command on one core and on all; it is given a fresh folder to write to."""
    figures: Figures = {}
    for name, pin in (("machine", []), ("core", ["--pin"])):
        with tempfile.TemporaryDirectory(dir=bench.folder) as out:
            output = start(
                [LAUNCH, *pin, *command(Path(out))],
                env={
                    "HF_HOME": out,
                    "HF_HUB_OFFLINE": "1",
                    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                },
            )
        figures[f"megabytes_per_second_{name}"] = megabytes / output.seconds
    return {**figures, "peak_memory": output.peak_memory()}


def ours(text: Path, tokenizer: str, out: Path) -> list[str | Path]:
    """Our command."""
    to = out / "tokens"
    return ["-m", "data.prepare", "text", text, "--out", to, "--tokenizer", tokenizer]


def whole_text(script: Path, out: Path) -> list[str | Path]:
    """One of nanoGPT's scripts, which reads and writes beside itself."""
    return [script]


def by_documents(text: Path, out: Path) -> list[str | Path]:
    """The worker below."""
    return ["-m", "bench.prepare", "--one", json.dumps({"text": str(text), "out": str(out)})]


def map_documents(text: str, out: str) -> None:
    """Token files in the manner of nanoGPT's openwebtext: `map` over documents, then memmaps."""
    datasets: Any = importlib.import_module("datasets")
    gpt2 = tiktoken.get_encoding("gpt2")
    loaded = datasets.load_dataset("json", data_files=text, split="train")
    parts = loaded.train_test_split(test_size=0.1, seed=1, shuffle=True)
    cores = n_cores()

    def encode(document: dict[str, str]) -> dict[str, Any]:
        ids = [*gpt2.encode_ordinary(document["text"]), gpt2.eot_token]
        return {"ids": ids, "len": len(ids)}

    for name, part in parts.items():
        tokens = part.map(
            encode, remove_columns=part.column_names, num_proc=cores if cores > 1 else None
        )
        size = int(np.sum(tokens["len"], dtype=np.uint64))
        target = np.memmap(Path(out) / f"{name}.bin", np.uint16, mode="w+", shape=(size,))
        shards, at = min(1024, len(tokens)), 0
        for shard in range(shards):
            chosen = tokens.shard(num_shards=shards, index=shard, contiguous=True)
            ids = np.concatenate(chosen.with_format("numpy")["ids"])
            target[at : at + len(ids)] = ids
            at += len(ids)
        target.flush()


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    p = arguments(__doc__ or "")
    p.add_argument("--tokenizer", nargs="+", choices=("gpt2", "byte"), help="default: both")
    a = parse(p, argv)
    with one_line_errors():
        if a.one:
            map_documents(**json.loads(a.one))
            return
        with opened("prepare", a) as bench:
            text = a.text
            if a.quick and text is None:
                text = inputs.random_words(bench.folder / "words.txt", 200_000)
            if text is None:
                raise ValueError("--text is missing: the file to prepare, such as books.jsonl.gz")
            for tokenizer in a.tokenizer or (["byte"] if a.quick else ["gpt2", "byte"]):
                run(bench, text, tokenizer)


def run(bench: Bench, text: Path, tokenizer: str) -> None:
    """All projects with one kind of tokens, and their result file."""
    megabytes = inputs.size_of(text) / 1e6
    commands: dict[str, Callable[[Path], list[str | Path]]] = {
        f"ours, {tokenizer}": partial(ours, text.resolve(), tokenizer)
    }
    if tree := bench.peers.get("nanoGPT"):
        if tokenizer == "gpt2" and HAS_DATASETS and text.name.endswith((".jsonl", ".jsonl.gz")):
            commands["nanoGPT, datasets.map"] = partial(by_documents, text.resolve())
        else:
            folder = tree / "data" / ("shakespeare" if tokenizer == "gpt2" else "shakespeare_char")
            inputs.plain(text, folder / "input.txt")
            commands["nanoGPT, whole text"] = partial(whole_text, folder / "prepare.py")
    rows = interleave(
        {name: partial(both_ways, bench, megabytes, c) for name, c in commands.items()},
        bench.passes,
    )
    case = "quick" if bench.options.quick else text.name.partition(".")[0]
    settings = {"text": text.name, "megabytes": megabytes, "tokenizer": tokenizer}
    bench.write(f"{case}-{tokenizer}", settings, rows)


if __name__ == "__main__":
    main()
