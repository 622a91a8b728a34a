"""Text and Q&A into prepared folders: `python -m data.prepare {world,text,qa,fetch} --help`."""

import contextlib
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import docstring_parser
from rich.console import Console
from rich.progress import Progress, track
from rich.text import Text

from data import shards
from data.chat import template_fingerprint
from data.shards import FORMAT, Meta, write_folder, write_qa, write_text
from data.sources import read
from data.tokenizer import CONTROL_TOKENS, Tokenizer, create_tokenizer
from data.world import World, WorldConfig
from model.check import check_range
from runtime.cli import Parser, one_line_errors, say, visible
from runtime.files import read_meta, resolve_checkpoint, sha256_file


@contextlib.contextmanager
def _reading(label: str, files: Sequence[Path]) -> Iterator[Callable[[int], object]]:
    """A progress bar over the bytes of files; yields what is to be told the bytes gone over."""
    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        yield partial(bar.advance, bar.add_task(label, total=sum(f.stat().st_size for f in files)))


def _sources(files: Sequence[Path]) -> list[Meta]:
    for f in files:
        if not f.is_file():  # before gigabytes are hashed
            raise ValueError(f"{f} is no file" if f.exists() else f"{f} not found")
    return [{"file": f.name, "bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in files]


def _request(files: list[Meta], tokenizer: str | Tokenizer, **options: object) -> Meta:
    """What a folder is made by: text by a tokenizer still to be made, Q&A by one that is there."""
    if isinstance(tokenizer, str):
        return {"format": FORMAT, "text": files, "tokenizer": tokenizer, **options}
    given = {"tokenizer": tokenizer.fingerprint, "template": template_fingerprint()}
    options = {k: v for k, v in options.items() if k != "trees" or v}  # older folders have none
    return {"format": FORMAT, "qa": files, **given, **options}


def prepare_world(config: WorldConfig, out: Path, tokenizer: str, val_fraction: float) -> Meta:
    """Biographies and Q&A of a synthetic world, with a tokenizer trained on both. The Q&A is taken
    without names: those of the people asked about would be in fewer pieces than others'.
    """
    world = World(config)
    made = {"world": asdict(config), "world_fingerprint": world.fingerprint}

    def fill(folder: Path) -> tuple[Tokenizer, Meta]:
        biographies, conversations = list(world.biographies()), list(world.conversations())
        # The base must learn of questions and of turns from nobody: hold the corpus to it.
        assert not any(mark in b for b in biographies for mark in ("?", *CONTROL_TOKENS))
        words = (world.names.sub("", message["content"]) for c in conversations for message in c)
        trained = create_tokenizer(tokenizer, chain(biographies, words))
        bar = partial(track, transient=True, disable=not sys.stdout.isatty())
        options = (trained, folder, val_fraction, config.seed)
        pieces = ((True, biography) for biography in bar(biographies, "encoding"))
        text = write_text(pieces, *options, shuffle=not config.adjacent)
        qa = write_qa(bar(conversations, "rendering"), *options)
        return trained, {"text": text, "qa": qa, **made}

    request = {"format": FORMAT, **made, "tokenizer": tokenizer, "val_fraction": val_fraction}
    request |= {"template": template_fingerprint(), "names_in_vocabulary": "of the text"}
    return write_folder(out, request, fill)


def prepare_text(
    paths: Sequence[Path], out: Path, tokenizer: str, val_fraction: float, field: str, seed: int
) -> Meta:
    """Token files from files of TEXT_SUFFIXES, and from folders of them."""
    files, reader = read.text_files(paths), partial(read.read_documents, field=field)

    def fill(folder: Path) -> tuple[Tokenizer, Meta]:
        with _reading("reading", files) as advance:
            texts = (text for _, text in read.read_files(files, reader, advance))
            trained = create_tokenizer(tokenizer, texts)
        with _reading("encoding", files) as advance:
            pieces = read.read_files(files, reader, advance)
            return trained, {"text": write_text(pieces, trained, folder, val_fraction, seed)}

    options = {"val_fraction": val_fraction, "field": field, "seed": seed}
    return write_folder(out, _request(_sources(files), tokenizer, **options), fill)


def prepare_qa(
    files: Sequence[Path],
    out: Path,
    tokenizer_of: Path | Tokenizer,
    val_fraction: float,
    seed: int,
    skip_bad: bool = False,
    trees: bool = False,
    shown: int | None = None,
) -> Meta:
    """Conversations of QA_SUFFIXES in `tokenizer_of`'s tokens; options of `read_conversations`."""
    files, tokenizer = read.distinct(files), tokenizer_of
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)

    def fill(folder: Path) -> tuple[Tokenizer, Meta]:
        with _reading("rendering", files) as advance:
            conversations = read.read_conversations(files, skip_bad, trees, shown, advance)
            return tokenizer, {"qa": write_qa(conversations, tokenizer, folder, val_fraction, seed)}

    options = {"val_fraction": val_fraction, "seed": seed, "skip_bad": skip_bad, "trees": trees}
    return write_folder(out, _request(_sources(files), tokenizer, **options), fill)


def fetch(
    name: str,
    out: Path,
    downloads: Path | None = None,
    tokenizer: str | None = None,
    tokenizer_of: Path | None = None,
    n_files: int | None = None,
    val_fraction: float | None = None,
    seed: int = 1,
) -> Meta:
    """Downloads and prepares a named data set, or `n_files` of it. Raises ValueError: no such."""
    from data.sources import named as sets  # takes a while to import, as `download` does
    from data.sources.download import download

    if name not in sets.NAMED:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(sets.NAMED)}")
    named = sets.NAMED[name]
    spec, is_text = tokenizer or named.tokenizer, named.kind == "text"
    downloads = downloads or Path("out/downloads", name)
    if is_text and tokenizer_of:
        raise ValueError("--tokenizer-of is for Q&A; text takes --tokenizer gpt2, byte or bpe:N")
    if not is_text and spec.startswith("bpe") and not tokenizer_of:
        raise ValueError(f"{spec} is trained on text: name the base with --tokenizer-of FOLDER")
    # Before anything is downloaded: no such folder, a vocabulary that cannot be had, other data.
    tokens = Tokenizer.load(tokenizer_of) if tokenizer_of else create_tokenizer(spec, [])
    files = sets.remote_files(named, n_files, downloads)
    found = [{"file": Path(f.name).name, "bytes": f.size, "sha256": f.sha256} for f in files]
    share = val_fraction or (0.1 if named.size < 1e9 else 0.005)
    options: Meta = {"val_fraction": share, "seed": seed}
    options |= {"field": "text"} if is_text else {"skip_bad": True, "trees": named.trees}
    given: Any = spec if is_text else tokens
    is_made = shards.check_folder(out, _request(found, given, **options))
    preparing = 0 if is_made else sets.bytes_to_prepare(named, files, tokens.kind)
    sets.print_plan(name, files, downloads, preparing, shards.n_cores())
    prepare = prepare_text if is_text else partial(prepare_qa, shown=1)
    meta = prepare(download(files, downloads, [(out, preparing, "prepare")]), out, given, **options)
    if tokenizer_of and "request" in read_meta(resolve_checkpoint(tokenizer_of)):
        tokenizer_of = None  # a data folder, not a base
    say(f"next: {sets.next_command(named, out, tokenizer_of)}")
    return meta


def inspect(folder: Path, n: int) -> None:
    """Prints `n` rendered conversations, the supervised tokens in green (in a pipe: in [ ])."""
    console, tokenizer = Console(highlight=False), Tokenizer.load(folder)
    for i, (ids, mask) in enumerate(shards.load_examples(folder, "train")[:n], 1):
        text = Text(f"--- example {i}: {len(ids)} tokens, {mask.sum()} supervised\n")
        for kept, span in groupby(zip(ids.tolist(), mask, strict=True), lambda token: token[1]):
            words, style = tokenizer.decode([n for n, _ in span]), "bold green" if kept else "dim"
            words = visible(words)
            text.append(f"[{words}]" if kept and not console.is_terminal else words, style)
        console.print(text, soft_wrap=True)


def parser() -> ArgumentParser:
    """The command line."""
    top = Parser(prog="python -m data.prepare", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    add = partial(commands.add_parser, formatter_class=ArgumentDefaultsHelpFormatter)
    world = add("world", help="synthetic people: biographies and Q&A, no download")
    world.add_argument("--tokenizer", default="bpe:2048", help="byte, gpt2 or bpe:N")
    for field in docstring_parser.parse_from_object(WorldConfig).params:
        default = getattr(WorldConfig, field.arg_name)
        kind = {"action": BooleanOptionalAction} if isinstance(default, bool) else {"type": int}
        world.add_argument(f"--{field.arg_name}", default=default, help=field.description, **kind)
    text = add("text", help=f"your own text: {', '.join(read.TEXT_SUFFIXES)}")
    text.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders")
    text.add_argument("--tokenizer", required=True, help="gpt2, byte or bpe:N such as bpe:4096")
    text.add_argument("--field", default="text", help="the key or column that holds the text")
    qa = add("qa", help=f"your own questions and answers: {', '.join(read.QA_SUFFIXES)}")
    qa.add_argument("files", nargs="+", type=Path, metavar="FILE", help="Q&A files")
    qa.add_argument("--tokenizer-of", type=Path, required=True, help="data folder or checkpoint")
    qa.add_argument("--skip-bad", action="store_true", help="leave out bad lines, counted")
    qa.add_argument("--inspect", type=int, default=0, metavar="N", help="print N examples")
    p = add("fetch", help="a data set by its name, downloaded and prepared")
    p.add_argument("name", nargs="?", help="one of those that --list shows")
    p.add_argument("--list", action="store_true", help="show names, sizes and licences")
    p.add_argument("--downloads", type=Path, help="where the files go (out/downloads/NAME)")
    p.add_argument("--tokenizer", help="gpt2, byte, or for text bpe:N")
    p.add_argument("--tokenizer-of", type=Path, help="of Q&A: data folder or checkpoint")
    p.add_argument("--files", type=int, dest="n_files", metavar="N", help="take the first N files")
    for name, p in commands.choices.items():
        share = {"world": 0.02, "fetch": None}.get(name, 0.1)
        held_back = "held back" if share else "held back; None: 0.1, above a gigabyte 0.005"
        p.add_argument("--out", type=Path, required=name != "fetch", help="folder to make")
        p.add_argument("--val-fraction", type=float, default=share, help=held_back)
        p.add_argument("--seed", type=int, default=1, help="of the shuffle, the split and a world")
        p.add_argument("--verify", action="store_true", help="hash all that --out holds already")
    return top


def main() -> None:
    """Runs one command line."""
    a = vars(parser().parse_args())
    command, verify, shown = a.pop("command"), a.pop("verify"), a.pop("inspect", 0)
    with one_line_errors():
        check_range("--val-fraction", a["val_fraction"], "above 0 and below 1")
        check_range("--files", a.get("n_files"), "1 or more")
        check_range("--seed", a["seed"], "0 or more")
        check_range("--inspect", shown, "0 or more")
        if command == "fetch" and (a.pop("list") or not a["name"]):
            from data.sources.named import print_names

            print_names()
            return
        out = a["out"] = a["out"] or Path("out", a["name"], "data")
        if verify and (out / "meta.json").exists():
            shards.check_files(out, read_meta(out)["files"], verify=True)
        if command == "world":
            a["config"] = WorldConfig(**{name: a.pop(name) for name in asdict(WorldConfig())})
        run = dict[str, Any](world=prepare_world, text=prepare_text, qa=prepare_qa, fetch=fetch)
        run[command](**a)
        if shown:
            inspect(out, shown)


if __name__ == "__main__":
    main()
