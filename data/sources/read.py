"""People's files: text, and conversations in the shapes that people have them in."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from data.chat import ROLES, Message

T = TypeVar("T")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PLAIN_SUFFIXES = (".txt", ".md", ".txt.gz", ".txt.zst")  # a document each
TEXT_SUFFIXES, QA_SUFFIXES = (*PLAIN_SUFFIXES, *ROW_SUFFIXES), (".json", *ROW_SUFFIXES)
PIECE = 1 << 20  # characters read at a time, so that memory does not grow with a document


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files to read, each once, folders searched for TEXT_SUFFIXES but not for hidden files.

    Raises:
        ValueError: a path is missing or of an unknown kind, or a folder holds no text.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} not found")
        found = [path]
        if path.is_dir():
            inside = (f.relative_to(path) for f in sorted(path.rglob("*")))
            found = [path / f for f in inside if not any(p.startswith(".") for p in f.parts)]
        found = [f for f in found if f.is_file() and f.name.lower().endswith(TEXT_SUFFIXES)]
        if not found:
            raise ValueError(f"{path}: no text there; it can be {', '.join(TEXT_SUFFIXES)}")
        files += found
    return distinct(files)


def distinct(files: Sequence[Path]) -> list[Path]:
    """The files without those that are an earlier one again, by its name or by a link to it."""
    first = dict[Path, Path]()
    for file in files:
        first.setdefault(file.resolve(), file)
    return [*first.values()]


def read_files(
    files: Sequence[Path],
    read: Callable[[Path, IO[bytes]], Iterator[T]],
    advance: Callable[[int], object] | None = None,
) -> Iterator[T]:
    """What `read` finds in the files one after another; `advance` is told the bytes gone over."""
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} not found")
        seen = 0
        with open(file, "rb") as raw:
            for item in read(file, raw):
                yield item
                # A reader that has seen it all may have closed the file.
                at = file.stat().st_size if raw.closed else raw.tell()
                if advance and at != seen:
                    advance(at - seen)
                    seen = at


def read_documents(file: Path, raw: IO[bytes], field: str) -> Iterator[Iterator[str]]:
    """The documents of one open file, each as pieces of at most about PIECE characters.

    Raises:
        ValueError: damaged, not UTF-8, not JSON, or no text under `field`; with the place.
    """
    name = file.name.lower()
    if name.endswith(PLAIN_SUFFIXES):

        def pieces() -> Iterator[str]:
            with readable(file):
                f = open_text(file, raw)
                while piece := f.read(PIECE):
                    yield piece

        yield pieces()
        return
    rows = read_rows(file, raw, [field]) if name.endswith(".parquet") else read_lines(file, raw)
    for place, document in rows:
        if isinstance(document, ValueError):
            raise ValueError(f"{place}: {document}")
        if not isinstance(document, dict) or field not in document:
            held = f"; it has {', '.join(document)}" if isinstance(document, dict) else ""
            raise ValueError(f"{place}: no text under {field!r}; name the field with --field{held}")
        if not isinstance(text := document[field], str):
            raise ValueError(f"{place}: {field!r} holds {type(text).__name__}, not text")
        if not is_unicode(text):
            raise ValueError(f"{place}: half a surrogate pair")
        yield iter([text[i : i + PIECE] for i in range(0, len(text), PIECE)])


def open_text(file: Path, raw: IO[bytes]) -> io.TextIOWrapper:
    """The text of an open file, unpacked as it is read.

    Raises:
        EOFError: a packed file without a byte.
    """
    source, suffix = raw, file.suffix.lower()
    if suffix in (".gz", ".zst") and not file.stat().st_size:
        raise EOFError("it is empty")
    if suffix == ".gz":
        source = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    elif suffix == ".zst":
        source = import_pyarrow(file).CompressedInputStream(raw, "zstd")
    return io.TextIOWrapper(source, encoding="utf-8-sig", newline="\n")


def read_lines(file: Path, raw: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """(place, JSON value) of each line that is not blank; a ValueError where it is not JSON."""
    with readable(file):
        for number, line in enumerate(open_text(file, raw), 1):
            if line.strip():
                value: Any
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    value = ValueError(f"not JSON ({error})")
                yield f"{file}, line {number}", value


def read_rows(file: Path, raw: IO[bytes], columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(place, row) of a parquet file; only those columns, or all empty if it has none of them."""
    pyarrow, before = import_pyarrow(file), 0
    with readable(file):
        try:
            # By itself it reads whole columns ahead, of a row group or of all the file.
            shard = pyarrow.parquet.ParquetFile(raw, buffer_size=PIECE, pre_buffer=False)
            n_rows, names = shard.metadata.num_rows, shard.schema_arrow.names
            kept = [name for name in names if name in columns]
            if not kept:  # nothing to convert, and it might not be possible
                for number in range(1, n_rows + 1):
                    yield f"{file}, row {number}", dict.fromkeys(names)
                return
            for batch in shard.iter_batches(256, columns=kept, use_threads=False):
                for number, row in enumerate(batch.to_pylist(), before + 1):
                    yield f"{file}, row {number}", row
                before += batch.num_rows
        except pyarrow.ArrowException as error:
            raise EOFError(error) from None
        except (ValueError, OverflowError) as error:  # such as a time that Python cannot hold
            raise ValueError(f"{file}: {', '.join(kept)} cannot be read: {error}") from None
        if before != n_rows:
            raise EOFError(f"{before:,} rows instead of {n_rows:,}")


def import_pyarrow(file: Path) -> Any:
    """The library, which takes a while to import and is only needed for some kinds of files.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file} needs pyarrow to be read; pip install pyarrow") from None
    return pyarrow


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Names the file whose bytes turn out not to be what they should."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason}") from None
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        kind = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower(), "parquet")
        raise ValueError(f"{file} is not a whole {kind} file: {error}") from None


def read_examples(file: Path, raw: IO[bytes], trees: bool = False) -> Iterator[tuple[str, Any]]:
    """(place, JSON value) of each example of an open Q&A file; of `trees`, one from each tree.

    A line that is not JSON comes as the ValueError that says so, for the caller to count.
    """
    name = file.name.lower()
    if not name.endswith(QA_SUFFIXES):
        raise ValueError(f"{file}: Q&A comes as {', '.join(QA_SUFFIXES)}")
    if name.endswith(".json"):
        examples = read_list(file, raw)
    elif name.endswith(".parquet"):
        examples = read_rows(file, raw, TREE_KEYS if trees else QA_KEYS)
    else:
        examples = read_lines(file, raw)
    return best_paths(examples) if trees else examples


def read_list(file: Path, raw: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """(place, value) of each example of a .json file, which must hold a list."""
    with readable(file):
        text = raw.read().decode("utf-8-sig")
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise ValueError(f"{file}: a .json file must hold a list of examples")
    decoder, position = json.JSONDecoder(), _skip_space(text, position + 1)
    number, counted = 1, 0
    while text[position : position + 1] != "]":
        number, counted = number + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
        yield f"{file}, line {number}", value
        position = _skip_space(text, position)
        if text[position : position + 1] not in (",", "]"):
            raise ValueError(f"{file}, line {number}: no comma or bracket after this example")
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    rest = _skip_space(text, position + 1)
    if text[rest:]:
        number = 1 + text.count("\n", 0, rest)
        raise ValueError(f"{file}, line {number}: text after the end of the list")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


TREE_KEYS = ("message_id", "parent_id", "role", "text", "lang", "rank", "deleted")


def best_paths(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """OASST's messages, a row each, as conversations: (place of the root, example).

    Only English, one per tree: at every step the reply of the best rank (0), or the first one.
    """
    replies: dict[str | None, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for place, row in rows:
        if not isinstance(row, dict) or not row.keys() >= set(TREE_KEYS[:4]):
            yield place, ValueError(f"no message of a tree: needs {', '.join(TREE_KEYS[:4])}")
        elif row.get("lang", "en") == "en" and not row.get("deleted"):
            replies[row["parent_id"]].append((place, row))
    for place, row in replies.pop(None, []):
        path = [row]
        while below := replies.pop(path[-1]["message_id"], []):
            ranks = [(r.get("rank") is None, r.get("rank")) for _, r in below]
            path.append(below[ranks.index(min(ranks))][1])
        if path[-1]["role"] != "assistant":
            path.pop()
        yield place, {"messages": [{"role": r["role"], "content": r["text"]} for r in path]}


def read_conversations(
    files: Sequence[Path],
    skip_bad: bool,
    trees: bool = False,
    shown: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> Iterator[list[Message]]:
    """All conversations of Q&A files, in order, as they are read.

    With `skip_bad`, bad examples are counted, and all or `shown` of them printed at the end.

    Raises:
        ValueError: at the end, a bad example (unless `skip_bad`), or none good.
    """
    bad, n_bad, n_good = list[str](), 0, 0
    for place, example in read_files(files, partial(read_examples, trees=trees), advance):
        try:
            if isinstance(example, ValueError):
                raise example
            conversation = parse_example(example)
        except ValueError as error:
            n_bad += 1
            if shown is None or n_bad <= shown:
                bad.append(f"{place}: {error}")
            continue
        n_good += 1
        if skip_bad or not n_bad:
            yield conversation
    if n_bad and not skip_bad:
        more = f" (and {n_bad - 1} more bad examples)" if n_bad > 1 else ""
        raise ValueError(f"{bad[0]}{more}; mend the file, or prepare it with --skip-bad")
    for line in bad:
        print(f"skipped {line}")
    if n_bad:
        print(f"skipped {n_bad:,} of {n_bad + n_good:,} examples")
    if not n_good:
        raise ValueError(f"{', '.join(map(str, files))}: no usable example")


def check_messages(messages: Any) -> list[Message]:
    """A conversation in our form: an optional system message, then user and assistant in turn.

    Raises:
        ValueError: the reason why it cannot be trained on.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation must be a non-empty list of messages")
    checked: list[Message] = []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is not an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {i} has role {role!r}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            kind = type(content).__name__
            raise ValueError(f"message {i} ({role}) has no text, but content of type {kind}")
        if not content.strip():
            raise ValueError(f"message {i} ({role}) has no text")
        if not is_unicode(content):
            raise ValueError(f"message {i} ({role}) has half a surrogate pair")
        checked.append(Message(role=role, content=content))
    turns = [m["role"] for m in checked[checked[0]["role"] == "system" :]]
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise ValueError(
            "turns must alternate user, assistant and end with an assistant's reply, not "
            + ", ".join(m["role"] for m in checked)
        )
    return checked


# What `parse_example` looks at.
QA_KEYS = tuple(
    "messages conversations question answer instruction input output context response".split()
)
# How other formats name the roles (ShareGPT's `from`, OASST).
_ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def parse_example(example: Any) -> list[Message]:
    """A conversation from one JSON object in any of the shapes that people have.

    `messages` (role, content), `conversations` (from, value), `question` / `answer`, or
    `instruction` / `output`; an `input` beside the last two is added to what the user says.
    Dolly calls the last ones `response` and `context`.

    Raises:
        ValueError: the reason why it cannot be used.
    """
    if not isinstance(example, dict):
        raise ValueError(f"expected a JSON object, not {type(example).__name__}")
    # A table has a column for every key of any row, empty where a row has no such key.
    kept = ("answer", "output")  # of which a missing text is said below
    example = {k: v for k, v in example.items() if v is not None or k in kept} or example
    for key in ("messages", "conversations"):
        if key in example:
            messages = example[key]
            if isinstance(messages, list):
                messages = [_rename_turn(m) if isinstance(m, dict) else m for m in messages]
            return check_messages(messages)
    if "response" in example and example.get("output") is None:
        example = {**example, "output": example["response"], "input": example.get("context")}
    for prompt, answer in (("question", "answer"), ("instruction", "output")):
        if prompt in example:
            if answer not in example:
                raise ValueError(f"{prompt!r} without {answer!r}")
            user, extra = example[prompt], example.get("input") or ""
            if not isinstance(extra, str):
                raise ValueError("'input' is not text")
            if isinstance(user, str) and extra.strip():
                user = f"{user}\n\n{extra}"
            reply = {"role": "assistant", "content": example[answer]}
            return check_messages([{"role": "user", "content": user}, reply])
    raise ValueError(
        "no messages, conversations, question/answer or instruction/output; it has "
        + (", ".join(map(str, example)) or "no keys")
    )


def _rename_turn(turn: dict[str, Any]) -> dict[str, Any]:
    role = turn.get("role") or turn.get("from")
    name = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    content = turn.get("content")
    return {"role": name, "content": turn.get("value") if content is None else content}
