"""Text and Q&A into token files: `python -m data.prepare {world,text,qa,fetch} --help`.

A prepared folder holds its tokenizer, token files and a meta.json with counts, checksums and
sources. Text is `train.bin` and `val.bin`: token ids one after another, each document preceded
by the end-of-text token. Q&A is `qa_{train,val}_{ids,mask,offsets}.npy`: rendered conversations
end to end, what is supervised, and where each begins. A folder of the world holds both.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from data.chat import template_fingerprint
from data.shards import (
    FORMAT,
    check_folder,
    load_examples,
    n_cores,
    write_folder,
    write_qa,
    write_text,
)
from data.sources.read import (
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
from runtime.cli import one_line_errors
from runtime.files import (
    read_meta,
    resolve_checkpoint,
    sha256_file,
)

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
    from data.sources.download import download
    from data.sources.named import NAMED, bytes_of_tokens, next_command, print_plan, remote_files

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
                from data.sources.named import (
                    print_names,  # takes a while to import, as `download` does
                )

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
