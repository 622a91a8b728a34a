"""Data sets that can be fetched by name, as named.toml lists them: what they are and cost."""

import shlex
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from data.sources.download import RemoteFile, hub_files
from runtime.cli import say

ROOT = Path(__file__).resolve().parents[2]
# Into gpt2 tokens, measured on one core of an AMD EPYC.
MEGABYTES_PER_SECOND = {"text": 15, "qa": 9}


@dataclass(frozen=True)
class NamedSet:
    """Facts about a data set."""

    kind: Literal["text", "qa"]
    source: str  # a hub repository, of which the files that match `patterns` are taken, or a URL
    patterns: list[str]
    size: int  # of the download, in bytes; about right, but exact with a `sha256`
    recipe: str  # the config that trains on it
    licence: str
    shape: str  # what a document or an example looks like
    tokenizer: str = "gpt2"  # what it is prepared with unless told otherwise
    trees: bool = False  # whether rows are OASST's single messages, of which a tree is an example
    sha256: str | None = None  # of a URL's file (the hub names those of its own)


TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
NAMED = {name: NamedSet(**table) for name, table in TABLES.items()}


def print_names() -> None:
    """The sets, as a table."""
    table = Table("name", "kind", "about", "licence", "source", "shape", box=None)
    for name, s in NAMED.items():
        source = s.source.removeprefix("https://").partition("/master/")[0]
        table.add_row(name, s.kind, decimal(s.size), s.licence, source, s.shape)
    console = Console()
    console.width = max(console.width, 0 if console.is_terminal else 200)
    console.print(table)


def remote_files(named: NamedSet, n_files: int | None, downloads: Path) -> list[RemoteFile]:
    """The files of a set, or the first `n_files`. Raises ValueError: as `hub_files`."""
    if "://" in named.source:
        return [RemoteFile(Path(named.source).name, named.source, named.size, named.sha256)]
    try:
        return hub_files(named.source, "datasets", named.patterns)[:n_files]
    except ValueError as error:
        if not downloads.exists():
            raise
        raise ValueError(f"{error}; what came before is in {downloads}") from None


def bytes_to_prepare(named: NamedSet, files: Sequence[RemoteFile], tokenizer: str) -> int:
    """About the room for the token files and a scratch copy, guessed from that of the download."""
    # A token is 2 bytes of a file and about 4 of text; in Q&A another byte says what is taught.
    per_byte = 2 if tokenizer == "byte" else 0.5
    return int(2 * text_bytes(files) * per_byte * (1.5 if named.kind == "qa" else 1))


def text_bytes(files: Sequence[RemoteFile]) -> int:
    """About how much text there is in the files: parquet packs it to a half."""
    return sum(file.size for file in files) * (2 if files[0].name.endswith(".parquet") else 1)


def print_plan(
    name: str, files: Sequence[RemoteFile], folder: Path, preparing: int, n_cores: int
) -> None:
    """What fetching these files of a set takes; `preparing` is bytes of disk."""
    named, size = NAMED[name], sum(file.size for file in files)
    folder.mkdir(parents=True, exist_ok=True)
    free, rate = shutil.disk_usage(folder).free, MEGABYTES_PER_SECOND[named.kind]
    say(
        f"{name}: {len(files)} file(s), {decimal(size)} from {named.source} ({named.licence})\n"
        f"disk: about {decimal(size + preparing)} for the download, the token files and "
        f"a scratch copy of them; {decimal(free)} are free\n"
        f"preparing: about {text_bytes(files) / 60e6 / rate / n_cores:.1f} minutes, at {rate} MB/s "
        f"of text on each of {n_cores} core(s)"
    )


def next_command(named: NamedSet, out: Path, base: Path | None) -> str:
    """What trains on a set by its recipe, told of the data and the base only where they differ."""
    stage = "pretrain" if named.kind == "text" else "sft"
    command = ["python", f"train_{stage}.py", "--config", named.recipe]
    recipe = tomllib.loads((ROOT / named.recipe).read_text(encoding="utf-8"))
    command += [f"--base={base}"] if base else []
    command += [f"--data.path={out}"] if out != Path(recipe["data"]["path"]) else []
    return shlex.join(command)
