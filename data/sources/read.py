"""People's files: text, and conversations in the shapes that people have them in."""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from data.chat import ROLES, Message
from runtime.cli import listed, say

T = TypeVar("T")
Rows = Iterator[tuple[str, Any]]  # (place, JSON value); in place of what is not JSON a ValueError
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PLAIN_SUFFIXES = (".txt", ".md", ".txt.gz", ".txt.zst")  # a document each
TEXT_SUFFIXES, QA_SUFFIXES = (*PLAIN_SUFFIXES, *ROW_SUFFIXES), (".json", *ROW_SUFFIXES)
PIECE = 1 << 20  # characters read at a time, so that memory does not grow with a document
PACKED = {".gz": "gzip", ".zst": "zstd"}
SEPARATOR = re.compile(r"\s*(,\s*|(?=\]))")  # what follows an example in a list of JSON
# What is looked at in an example of Q&A, and in a message of OASST's trees.
QA_KEYS = "messages conversations question answer instruction instances input output".split()
QA_KEYS += ["context", "response"]
TREE_KEYS = "message_id parent_id role text lang rank deleted".split()
# How other formats name the roles (ShareGPT's `from`, OASST).
ROLE_NAMES = dict.fromkeys(("human", "prompter"), "user")
ROLE_NAMES |= dict.fromkeys(("gpt", "bot", "model"), "assistant")


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files to read, each once, folders searched for TEXT_SUFFIXES but not for hidden files.
    Raises ValueError: a path is missing or of an unknown kind, or a folder holds no text.
    """
    files = list[Path]()
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} not found")
        inside = [path]
        if path.is_dir():
            walk = os.walk(path, onerror=_raise)
            inside = sorted(Path(at, name) for at, _, names in walk for name in names)
        shown = [f for f in inside if not any(p[0] == "." for p in f.relative_to(path).parts)]
        found = [f for f in shown if f.is_file() and f.name.lower().endswith(TEXT_SUFFIXES)]
        if not found:
            raise ValueError(f"{path}: no text there; it can be {', '.join(TEXT_SUFFIXES)}")
        files += found
    return distinct(files)


def _raise(error: OSError) -> None:
    raise error


def distinct(files: Sequence[Path]) -> list[Path]:
    """The files without those that are an earlier one again, by its name or by a link to it."""
    first = dict[str, Path]()
    for file in files:
        first.setdefault(os.path.realpath(file), file)
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
        try:
            with open(file, "rb") as raw:
                for item in read(file, raw):
                    yield item
                    # A reader that has seen it all may have closed the file.
                    at = file.stat().st_size if raw.closed else raw.tell()
                    if advance and at != seen:
                        advance(at - seen)
                        seen = at
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error.reason}") from None
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            kind = PACKED.get(file.suffix.lower(), "parquet")
            raise ValueError(f"{file} is not a whole {kind} file: {error}") from None


def read_documents(file: Path, raw: IO[bytes], field: str) -> Iterator[tuple[bool, str]]:
    """The documents of one open file, in pieces of at most PIECE characters; with each, whether a
    document begins with it. Of an empty one there is an empty piece. Read it by `read_files`, which
    names a damaged file. Raises ValueError: not JSON, or no text under `field`; with the place.
    """
    if file.name.lower().endswith(PLAIN_SUFFIXES):
        whole = _open_text(file, raw)
        yield True, whole.read(PIECE)
        yield from ((False, piece) for piece in iter(partial(whole.read, PIECE), ""))
        return
    parquet = file.suffix.lower() == ".parquet"
    rows = _read_rows(file, raw, [field]) if parquet else _read_lines(file, raw)
    for place, document in rows:
        if isinstance(document, ValueError):
            raise ValueError(f"{place}: {document}")
        if not isinstance(document, dict) or field not in document:
            held = f"; it has {listed(document)}" if isinstance(document, dict) else ""
            raise ValueError(f"{place}: no text under {field!r}; name the field with --field{held}")
        if not isinstance(text := document[field], str):
            raise ValueError(f"{place}: {field!r} holds {type(text).__name__}, not text")
        if not _is_unicode(text):
            raise ValueError(f"{place}: half a surrogate pair")
        yield from ((i == 0, text[i : i + PIECE]) for i in range(0, len(text) or 1, PIECE))


def _open_text(file: Path, raw: Any) -> io.TextIOWrapper:
    """The text of an open file, unpacked as it is read."""
    if (suffix := file.suffix.lower()) in PACKED and not file.stat().st_size:
        raise EOFError("it is empty")
    if suffix == ".gz":
        raw = gzip.GzipFile(fileobj=raw)
    elif suffix == ".zst":
        raw = _import_pyarrow(file).CompressedInputStream(raw, "zstd")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n")


def _read_lines(file: Path, raw: IO[bytes]) -> Rows:
    for number, line in enumerate(_open_text(file, raw), 1):
        if line.strip():
            try:
                yield f"{file}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{file}, line {number}", ValueError(f"not JSON ({error})")


def _read_rows(file: Path, raw: IO[bytes], columns: Sequence[str]) -> Rows:
    """The rows of a parquet file; only those columns hold something, if it has any of them."""
    pyarrow, number = _import_pyarrow(file), 0
    try:
        # By itself it reads whole columns ahead, of a row group or of all the file.
        shard = pyarrow.parquet.ParquetFile(raw, buffer_size=PIECE, pre_buffer=False)
        n_rows, names = shard.metadata.num_rows, shard.schema_arrow.names
        if kept := [name for name in names if name in columns]:
            unread = dict.fromkeys(names, "")  # named where an example cannot be used
            batches = shard.iter_batches(256, columns=kept, use_threads=False)
            rows = ({**unread, **row} for batch in batches for row in batch.to_pylist())
        else:  # nothing to convert, and it might not be possible
            rows = (dict.fromkeys(names) for _ in range(n_rows))
        for number, row in enumerate(rows, 1):
            yield f"{file}, row {number}", row
    except pyarrow.ArrowException as error:
        raise EOFError(error) from None
    except (ValueError, OverflowError) as error:  # such as a time that Python cannot hold
        raise ValueError(f"{file}: {', '.join(kept)} cannot be read: {error}") from None
    if number != n_rows:
        raise EOFError(f"{number:,} rows instead of {n_rows:,}")


def _import_pyarrow(file: Path) -> Any:
    """The library, which takes a while to import and is only needed for some kinds of files."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file} needs pyarrow to be read; pip install pyarrow") from None
    return pyarrow


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold half of a surrogate pair."""
    return text.encode(errors="replace").decode() == text


def read_examples(file: Path, raw: IO[bytes], trees: bool = False) -> Rows:
    """The examples of an open Q&A file; of `trees`, one from each tree."""
    if not file.name.lower().endswith(QA_SUFFIXES):
        raise ValueError(f"{file}: Q&A comes as {', '.join(QA_SUFFIXES)}")
    read_rows = partial(_read_rows, columns=TREE_KEYS if trees else QA_KEYS)
    readers: dict[str, Callable[..., Rows]] = {".json": _read_list, ".parquet": read_rows}
    examples = readers.get(file.suffix.lower(), _read_lines)(file, raw)
    return _best_paths(examples) if trees else _split_instances(examples)


def _read_list(file: Path, raw: IO[bytes]) -> Rows:
    """The examples of a .json file, which must hold a list."""
    text = raw.read().decode("utf-8-sig")
    if not (begin := re.match(r"\s*\[\s*", text)):
        raise ValueError(f"{file}: a .json file must hold a list of examples")
    decoder, number, counted, position = json.JSONDecoder(), 1, 0, begin.end()
    while not text.startswith("]", position):
        number, counted = number + text.count("\n", counted, position), position
        place = f"{file}, line {number}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error})") from None
        yield place, value
        if not (separator := SEPARATOR.match(text, position)):
            raise ValueError(f"{place}: no comma or bracket after this example")
        position = separator.end()
    if rest := text[position + 1 :].lstrip():
        number = 1 + text.count("\n", 0, len(text) - len(rest))
        raise ValueError(f"{file}, line {number}: text after the end of the list")


def _split_instances(rows: Rows) -> Rows:
    """The examples; of an instruction with `instances` (Self-instruct), one for each of these."""
    for place, example in rows:
        instances = example.get("instances") if isinstance(example, dict) else None
        if not isinstance(instances, list) or not instances:
            yield place, example
            continue
        for instance in instances:
            yield place, {**example, **instance} if isinstance(instance, dict) else instance


def _best_paths(rows: Iterable[tuple[str, Any]]) -> Rows:
    """OASST's messages, a row each, as an example per English tree: the best reply at each step."""
    replies = dict[Any, list[tuple[str, Any]]]()
    for place, row in rows:
        if not isinstance(row, dict) or not row.keys() >= set(TREE_KEYS[:4]):
            yield place, ValueError(f"no message of a tree: needs {', '.join(TREE_KEYS[:4])}")
        elif not all(isinstance(row[key], str | None) for key in TREE_KEYS[:2]):
            yield place, ValueError("the id of a message of a tree is no text")
        elif not isinstance(row.get("rank") or 0, int | float):
            yield place, ValueError("the rank of a message of a tree is no number")
        elif row.get("lang", "en") == "en" and not row.get("deleted"):
            replies.setdefault(row["parent_id"], []).append((place, row))
    for place, row in replies.pop(None, []):
        path = [row]
        while below := replies.pop(path[-1]["message_id"], []):
            path.append(min(below, key=lambda r: (r[1].get("rank") is None, r[1].get("rank")))[1])
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
    """All conversations of Q&A files, in order, as they are read. With `skip_bad`, bad examples are
    counted, and all or `shown` of them printed at the end. Raises ValueError: at the end, a bad
    example (unless `skip_bad`), or none good.
    """
    bad, n_bad, n_good = list[str](), 0, 0
    for place, example in read_files(files, partial(read_examples, trees=trees), advance):
        try:
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
        raise ValueError(f"{bad[0]}{more}; mend it, or `python -m data.prepare qa --skip-bad`")
    for line in [*bad, f"{n_bad:,} of {n_bad + n_good:,} examples"] if n_bad else []:
        say(f"skipped {line}")
    if not n_good:
        raise ValueError(f"{listed(files)}: no usable example")


def check_messages(messages: Any) -> list[Message]:
    """A conversation in our form: an optional system message, then user and assistant in turn.
    Raises ValueError: the reason why it cannot be trained on.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation must be a non-empty list of messages")
    checked: list[Message] = []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is not an object")
        role = message.get("role") or message.get("from")  # as in ShareGPT, with `value`
        role = ROLE_NAMES.get(str(role), role)
        content = message.get("value") if message.get("content") is None else message["content"]
        if role not in ROLES:
            raise ValueError(f"message {i} has role {role!r}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            kind = type(content).__name__
            raise ValueError(f"message {i} ({role}) has no text, but content of type {kind}")
        if not content.strip() or not _is_unicode(content):
            what = "half a surrogate pair" if content.strip() else "no text"
            raise ValueError(f"message {i} ({role}) has {what}")
        checked.append(Message(role=role, content=content))
    turns = [m["role"] for m in checked[checked[0]["role"] == "system" :]]
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        rule = "turns must alternate user, assistant and end with an assistant's reply"
        raise ValueError(f"{rule}, not {listed(m['role'] for m in checked)}")
    return checked


def parse_example(example: Any) -> list[Message]:
    """A conversation from one JSON object in any of the shapes that people have: `messages` (role,
    content), `conversations` (from, value), `question` / `answer`, or `instruction` / `output`; an
    `input` beside the last two is added to what the user says. Dolly calls the last ones `response`
    and `context`. Raises ValueError: why it cannot be used, and if its shape is none, its keys.
    """
    if isinstance(example, ValueError):
        raise example
    if not isinstance(example, dict):
        raise ValueError(f"expected a JSON object, not {type(example).__name__}")
    # A table has a column for every key of any row, empty where a row has no such key.
    kept = ("answer", "output")  # of which a missing text is said below
    example = {k: v for k, v in example.items() if v is not None or k in kept} or example
    held = f"it has {listed(example) or 'no keys'}"
    for key in ("messages", "conversations"):
        if key in example:
            return check_messages(example[key])
    if "response" in example and example.get("output") is None:
        example = {**example, "output": example["response"], "input": example.get("context")}
    for prompt, answer in (("question", "answer"), ("instruction", "output")):
        if prompt in example:
            if answer not in example:
                raise ValueError(f"{prompt!r} without {answer!r}; {held}")
            user, extra = example[prompt], example.get("input") or ""
            if not isinstance(extra, str):
                raise ValueError("'input' is not text")
            if isinstance(user, str) and extra.strip():
                user = f"{user}\n\n{extra}"
            reply = {"role": "assistant", "content": example[answer]}
            return check_messages([{"role": "user", "content": user}, reply])
    shapes = "messages, conversations, question/answer or instruction/output"
    raise ValueError(f"no {shapes}; {held}")
