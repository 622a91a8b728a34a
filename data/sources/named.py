"""Data sets that can be fetched by name: what they are, where they lie, what they cost."""

from __future__ import annotations

import shlex
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from data.sources.download import RemoteFile, hub_files

ROOT = Path(__file__).resolve().parents[2]
# Into gpt2 tokens, measured on one core of an AMD EPYC.
MEGABYTES_PER_SECOND = {"text": 15, "qa": 9}


@dataclass(frozen=True)
class NamedSet:
    """Facts about a data set.

    Attributes:
        source: a hub repository, of which the files that match `patterns` are taken, or a URL.
        size: of the download, in bytes; about right, but exact with a `sha256`.
        recipe: the config that trains on it.
        shape: what a document or an example looks like.
        trees: whether the rows are OASST's single messages, of which a tree is an example.
        field: of text, the key or column that holds it.
        tokenizer: what it is prepared with unless told otherwise.
        sha256: of a URL's file (the hub names those of its own).
    """

    kind: Literal["text", "qa"]
    source: str
    patterns: tuple[str, ...]
    size: int
    recipe: str
    licence: str
    shape: str
    field: str = "text"
    tokenizer: str = "gpt2"
    trees: bool = False
    sha256: str | None = None

    @property
    def val_fraction(self) -> float:
        """The share held back for validation unless told otherwise."""
        return 0.1 if self.size < 1e9 else 0.005


GITHUB = "https://raw.githubusercontent.com"
# fmt: off
NAMED = {
    "tinyshakespeare": NamedSet(
        "text", f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", (), 1_115_394,
        "configs/shakespeare/modern.toml",
        "public domain", "one document", tokenizer="byte",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "tinystories": NamedSet(
        "text", "roneneldan/TinyStories", ("data/train-*.parquet",), 1_000_000_000,
        "configs/tinystories/pretrain.toml", "cdla-sharing-1.0", "2 million short stories",
        tokenizer="bpe:8192",
    ),
    "fineweb-edu": NamedSet(
        "text", "HuggingFaceFW/fineweb-edu", ("sample/10BT/*.parquet",), 28_000_000_000,
        "configs/gpt2/pretrain.toml",
        "odc-by", "web pages, a sample of 10 billion tokens",
    ),
    "openwebtext": NamedSet(
        "text", "Skylion007/openwebtext", ("*train-*.parquet",), 24_000_000_000,
        "configs/gpt2/pretrain.toml",
        "cc0-1.0", "8 million web pages",
    ),
    "dolly": NamedSet(
        "qa", "databricks/databricks-dolly-15k", ("databricks-dolly-15k.jsonl",), 13_000_000,
        "configs/gpt2-finetune/sft.toml",
        "cc-by-sa-3.0", "instruction, context, response",
    ),
    "alpaca": NamedSet(
        "qa", "yahma/alpaca-cleaned", ("alpaca_data_cleaned.json",), 44_300_000,
        "configs/gpt2-finetune/sft.toml",
        "cc-by-4.0", "instruction, input, output",
    ),
    "smoltalk": NamedSet(
        "qa", "HuggingFaceTB/smoltalk", ("data/all/train-*.parquet",), 2_000_000_000,
        "configs/gpt2/sft.toml",
        "apache-2.0", "messages",
    ),
    "oasst1": NamedSet(
        "qa", "OpenAssistant/oasst1", ("data/train-*.parquet",), 40_000_000,
        "configs/gpt2-finetune/sft.toml",
        "apache-2.0", "trees of messages", trees=True,
    ),
}
# fmt: on


def in_words(n_bytes: float) -> str:
    """A size such as 28.0 GB or 13.1 MB."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def print_names() -> None:
    """The sets, as a table."""
    table = Table("name", "kind", "about", "licence", "source", "shape", box=None)
    for name, s in NAMED.items():
        source = s.source.removeprefix("https://").partition("/master/")[0]
        table.add_row(name, s.kind, in_words(s.size), s.licence, source, s.shape)
    console = Console()
    console.width = max(console.width, 0 if console.is_terminal else 200)
    console.print(table)


def remote_files(named: NamedSet, n_files: int | None) -> list[RemoteFile]:
    """The files of a set, or the first `n_files`.

    Raises:
        ValueError: as `hub_files`.
    """
    if "://" in named.source:
        name = named.source.rpartition("/")[2]
        return [RemoteFile(name, named.source, named.size, named.sha256)]
    return hub_files(named.source, "datasets", named.patterns)[:n_files]


def bytes_of_tokens(named: NamedSet, files: Sequence[RemoteFile], tokenizer: str) -> float:
    """About the size of the token files, guessed from that of the download."""
    # A token is 2 bytes of a file and about 4 of text; in Q&A another byte says what is taught.
    share = (2 if tokenizer == "byte" else 0.5) * (1.5 if named.kind == "qa" else 1)
    return text_bytes(files) * share


def text_bytes(files: Sequence[RemoteFile]) -> int:
    """About how much text there is in the files: parquet packs it to a half."""
    return sum(file.size for file in files) * (2 if files[0].name.endswith(".parquet") else 1)


def print_plan(
    name: str,
    named: NamedSet,
    files: Sequence[RemoteFile],
    folder: Path,
    preparing: float,
    n_cores: int,
) -> None:
    """What fetching these files takes; `preparing` is bytes of disk."""
    download = sum(file.size for file in files)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    rate = MEGABYTES_PER_SECOND[named.kind]
    minutes = text_bytes(files) / 60e6 / rate / n_cores
    print(
        f"{name}: {len(files)} file(s), {in_words(download)} from {named.source} "
        f"({named.licence})\n"
        f"disk: about {in_words(download + preparing)} for the download, the token files and "
        f"a scratch copy of them; {in_words(free)} are free\n"
        f"preparing: about {minutes:.1f} minutes, at {rate} MB/s of text on "
        f"each of {n_cores} core(s)",
        flush=True,
    )


def next_command(named: NamedSet, out: Path, base: Path | None) -> str:
    """What trains on a set by its recipe, told of the data and the base only where they differ."""
    stage = "pretrain" if named.kind == "text" else "sft"
    command = ["python", f"train_{stage}.py", "--config", named.recipe]
    recipe = tomllib.loads((ROOT / named.recipe).read_text(encoding="utf-8"))
    if base:
        command.append(f"--base={base}")
    if out != Path(recipe["data"]["path"]):
        command.append(f"--data.path={out}")
    return shlex.join(command)
