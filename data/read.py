"""People's files: text, and conversations in the shapes that people have them in."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from data.chat import ROLES, Message

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz")
PIECE = 1 << 20  # characters read at a time, so that memory does not grow with a document


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files to read, folders searched for TEXT_SUFFIXES.

    Raises:
        ValueError: a path is missing or of an unknown kind, or a folder holds no text.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} not found")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [f for f in found if f.is_file() and f.name.lower().endswith(TEXT_SUFFIXES)]
        if not found:
            raise ValueError(f"{path}: no text there; it can be {', '.join(TEXT_SUFFIXES)}")
        files += found
    return files


def read_documents(file: Path, raw: IO[bytes], field: str) -> Iterator[Iterator[str]]:
    """The documents of one open file, each as pieces of at most about PIECE characters.

    Raises:
        ValueError: not UTF-8, not JSON, or a line without text under `field`; with the line.
    """
    source = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if file.suffix.lower() == ".gz" else raw
    f = io.TextIOWrapper(source, encoding="utf-8-sig", newline="\n")

    def pieces() -> Iterator[str]:
        with readable(file):
            while piece := f.read(PIECE):
                yield piece

    if file.name.lower().endswith((".txt", ".md")):
        yield pieces()
        return
    with readable(file):
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
            text = document.get(field) if isinstance(document, dict) else None
            if not isinstance(text, str):
                raise ValueError(
                    f"{file}, line {number}: no text under {field!r}; name the field with --field"
                )
            if not is_unicode(text):
                raise ValueError(f"{file}, line {number}: half a surrogate pair")
            yield iter([text[i : i + PIECE] for i in range(0, len(text), PIECE)])


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
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is not a whole gzip file: {error}") from None


def read_examples(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value) of each example of a .jsonl file or of a .json list.

    A line that is not JSON comes as the ValueError that says so, for the caller to count.
    """
    with readable(file):
        text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    yield number, ValueError(f"not JSON ({error})")
        return
    if file.suffix != ".json":
        raise ValueError(f"{file}: Q&A comes as .json or .jsonl")
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise ValueError(f"{file}: a .json file must hold a list of examples")
    decoder, position = json.JSONDecoder(), _skip_space(text, position + 1)
    number, counted = 1, 0
    while text[position : position + 1] != "]":
        number, counted = number + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
        yield number, value
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


def read_conversations(files: Sequence[Path], skip_bad: bool) -> list[list[Message]]:
    """All conversations of Q&A files, in order.

    Raises:
        ValueError: a bad example (unless `skip_bad`, which prints and counts them), or none good.
    """
    conversations, bad = [], []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} not found")
        for number, example in read_examples(file):
            try:
                if isinstance(example, ValueError):
                    raise example
                conversations.append(parse_example(example))
            except ValueError as error:
                bad.append(f"{file}, line {number}: {error}")
    if bad and not skip_bad:
        more = f" (and {len(bad) - 1} more bad examples)" if len(bad) > 1 else ""
        raise ValueError(f"{bad[0]}{more}; mend the file, or prepare it with --skip-bad")
    for line in bad:
        print(f"skipped {line}")
    if bad:
        print(f"skipped {len(bad)} of {len(bad) + len(conversations)} examples")
    if not conversations:
        raise ValueError(f"{', '.join(map(str, files))}: no usable example")
    return conversations


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


# How other formats name the roles (ShareGPT's `from`).
_ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def parse_example(example: Any) -> list[Message]:
    """A conversation from one JSON object in any of the shapes that people have.

    `messages` (role, content), `conversations` (from, value), `question` / `answer`, or
    `instruction` / `output`; an `input` beside the last two is added to what the user says.

    Raises:
        ValueError: the reason why it cannot be used.
    """
    if not isinstance(example, dict):
        raise ValueError(f"expected a JSON object, not {type(example).__name__}")
    for key in ("messages", "conversations"):
        if key in example:
            messages = example[key]
            if isinstance(messages, list):
                messages = [_rename_turn(m) if isinstance(m, dict) else m for m in messages]
            return check_messages(messages)
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
    role = turn.get("role", turn.get("from"))
    name = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    return {"role": name, "content": turn.get("content", turn.get("value"))}
