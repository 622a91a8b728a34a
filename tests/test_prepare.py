from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import prepare, shards
from data.chat import Message, render, template_fingerprint
from data.shards import load_examples, open_prepared
from data.sources.read import (
    parse_example,
    read_conversations,
    read_documents,
    read_examples,
    read_files,
    text_files,
)
from data.tokenizer import Tokenizer, create_tokenizer
from data.world import World, WorldConfig
from runtime.files import read_json, read_meta, sha256_file, write_json, write_meta
from tests.conftest import Fails

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [f"{i}: é 👩‍👩‍👧‍👦 <|endoftext|>" + " the cat" * (i % 7) for i in range(40)]
BYTE = create_tokenizer("byte", [])


def jsonl(values: list[Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def corpus(file: Path, documents: list[str] = DOCUMENTS, field: str = "text") -> Path:
    file.write_text(jsonl([{field: document} for document in documents]))
    return file


def parquet(rows: list[Any]) -> bytes:
    f = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), f, row_group_size=700)
    return f.getvalue()


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def text(
    *paths: Path,
    out: Path,
    tokenizer: str = "byte",
    share: float = 0.1,
    field: str = "text",
    seed: int = 1,
) -> dict[str, Any]:
    return prepare.prepare_text(paths, out, tokenizer, share, field, seed)


def stream(folder: Path, part: str) -> list[str]:
    """The documents of a token file, each preceded by end-of-text."""
    tokenizer = Tokenizer.load(folder)
    tokens = np.fromfile(folder / f"{part}.bin", read_meta(folder)["text"]["dtype"])
    starts = np.flatnonzero(tokens == tokenizer.end_of_text)
    assert starts[0] == 0
    return [tokenizer.decode(d[1:].tolist()) for d in np.split(tokens, starts[1:])]


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    return {f.name: (f.stat().st_mtime_ns, sha256_file(f)) for f in folder.iterdir()}


# ---- text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:280"])
@pytest.mark.parametrize("piece", [3, 1 << 20])
def test_token_streams_decode_back_to_the_documents(
    tokenizer: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("sources.read", "shards"):
        monkeypatch.setattr(f"data.{module}.PIECE", piece)
    meta = text(corpus(tmp_path / "a.jsonl"), out=tmp_path / "out", tokenizer=tokenizer)
    train, val = (stream(tmp_path / "out", part) for part in ("train", "val"))
    tokens = {part: meta["text"][f"{part}_tokens"] for part in ("train", "val")}
    val_text = tokens["val"] - len(val)
    assert 0.05 <= val_text / (sum(tokens.values()) - len(DOCUMENTS)) <= 0.1
    assert sorted(train + val) == sorted(DOCUMENTS)
    assert train + val != DOCUMENTS
    assert meta["tokenizer"]["n_vocab"] == (261 if tokenizer == "byte" else 280)
    assert meta["text"]["bytes"] == sum(len(d.encode()) for d in DOCUMENTS)


@pytest.mark.parametrize("packed", [False, True])
def test_the_number_of_threads_changes_no_byte(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.shards.PIECE", 100)  # many pieces in flight
    rows = [{"text": document} for document in DOCUMENTS * 9]
    file = tmp_path / ("a.parquet" if packed else "a.jsonl")
    file.write_bytes(parquet(rows) if packed else jsonl(rows).encode())
    (tmp_path / "q.jsonl").write_text(jsonl([{"messages": chat(i)} for i in range(200)]))
    made = []
    for cores in (1, 2, 7):
        monkeypatch.setattr("data.shards.n_cores", lambda cores=cores: cores)
        out = tmp_path / str(cores)
        text(file, out=out, tokenizer="bpe:280")
        prepare.prepare_qa([tmp_path / "q.jsonl"], out / "qa", out, 0.2, seed=1)
        made.append([sha256_file(f) for f in sorted(out.rglob("*.[bn][ip][ny]"))])
    assert len(made[0]) == 2 + 6
    assert made[0] == made[1] == made[2]


def test_memory_does_not_grow_with_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.read.PIECE", 1000)
    monkeypatch.setattr("data.shards.PIECE", 1000)
    monkeypatch.setattr("data.shards.n_cores", lambda: 2)
    read = encoded = ahead = 0

    def counted(pieces: Iterator[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
        nonlocal read, ahead
        for piece in pieces:
            read += 1
            ahead = max(ahead, read - encoded)
            yield piece

    real = Tokenizer.encode_array

    def encode_array(self: Tokenizer, text: str) -> np.ndarray:
        nonlocal encoded
        encoded += 1
        return real(self, text)

    (tmp_path / "a.txt").write_text("x" * 300_000)  # one document
    monkeypatch.setattr(Tokenizer, "encode_array", encode_array)
    pieces = read_files([tmp_path / "a.txt"], partial(read_documents, field="text"))
    shards.write_text(counted(pieces), BYTE, tmp_path, 0.1, 1)
    assert read == encoded == 300
    assert ahead <= 2 * 2 + 2


def test_memory_does_not_grow_with_empty_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.shards.PIECE", 1000)
    monkeypatch.setattr("data.shards.n_cores", lambda: 2)
    held = most = 0

    class Empty(str):
        def __init__(self) -> None:
            nonlocal held, most
            held += 1
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= 1

    pieces = ((True, Empty() if i % 5000 else "a") for i in range(30_000))
    assert shards.write_text(pieces, BYTE, tmp_path, 0.5, 1)["documents"] == 6
    assert most <= (2 * 2 + 2) * 1000


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_files_are_read_a_little_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.read.PIECE", 1000)
    letters = np.random.default_rng(1).choice(list("abcdefghijklmnop"), (2000, 500))
    rows = [{"messages": [{"role": "user", "content": "".join(line)}]} for line in letters]
    content, file = jsonl(rows).encode(), tmp_path / name
    if name.endswith(".parquet"):  # one group of rows, in small pages
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, file, data_page_size=2000, write_batch_size=9, use_dictionary=False)
    elif name.endswith(".jsonl"):
        file.write_bytes(content)
    else:
        file.write_bytes(gzip.compress(content) if name.endswith(".gz") else zstd(content))
    steps: list[int] = []
    examples = read_files([file], read_examples, steps.append)
    assert [row for _, row in examples] == rows
    assert max(steps) < file.stat().st_size / 3
    assert sum(steps) > file.stat().st_size * 0.9


def test_the_split_follows_the_seed(tmp_path: Path) -> None:
    file = corpus(tmp_path / "a.jsonl")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        text(file, out=tmp_path / out, seed=seed)
    a, b, c = (stream(tmp_path / out, "val") for out in "abc")
    assert a == b != c


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_one_document_is_split_at_its_tail(share: float, tmp_path: Path) -> None:
    characters = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "a.txt").write_text(characters)
    meta = text(tmp_path / "a.txt", out=tmp_path / "out", share=share)
    train, val = (np.fromfile(tmp_path / "out" / f"{p}.bin", "<u2") for p in ("train", "val"))
    assert BYTE.decode([*train, *val]) == "<|endoftext|>" + characters
    assert len(val) == meta["text"]["val_tokens"] == 1000 * share


def test_files_of_every_kind_and_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_bytes(b"\xef\xbb\xbftext\n\nof two paragraphs\n")
    (tmp_path / "in" / "deep" / "b.md").write_text("# mark\n")
    (tmp_path / "in" / "c.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n')
    (tmp_path / "in" / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n{"text": ""}'))
    (tmp_path / "in" / "d.parquet").write_bytes(parquet([{"id": 1, "text": "seven"}]))
    (tmp_path / "in" / "d.jsonl.zst").write_bytes(zstd(b'{"text": "eight"}') + zstd(b"\n"))
    (tmp_path / "in" / "d.txt.gz").write_bytes(gzip.compress(b"nine\r\n"))
    (tmp_path / "in" / "d.txt.zst").write_bytes(zstd(b""))
    (tmp_path / "in" / "e.png").write_bytes(b"\xff")
    (tmp_path / "in" / "f.txt").write_text("")
    meta = text(tmp_path / "in", corpus(tmp_path / "g.jsonl", ["four"]), out=tmp_path / "out")
    found = stream(tmp_path / "out", "train") + stream(tmp_path / "out", "val")
    expected = ["text\n\nof two paragraphs\n", "# mark\n", "one", "two", "three", "four"]
    expected += ["seven", "eight", "nine\r\n"]
    assert sorted(found) == sorted(expected)
    assert meta["text"]["documents"] == 9


def test_what_is_hidden_or_there_twice_is_read_once_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / ".in"  # itself may be hidden
    (folder / ".git").mkdir(parents=True)
    (folder / "a.txt").write_text("words")
    for name in (".git/b.txt", "._a.txt"):
        (folder / name).write_text("hidden")
    (folder / "link.txt").symlink_to(folder / "a.txt")
    assert text_files([folder, folder / "a.txt", folder / "link.txt"]) == [folder / "a.txt"]
    assert text_files([folder / "._a.txt"]) == [folder / "._a.txt"]  # asked for by its name


def test_meta_tells_what_was_made_of_what(tmp_path: Path) -> None:
    file, out = corpus(tmp_path / "a.jsonl"), tmp_path / "out"
    text(file, out=out, tokenizer="bpe:280")
    meta = read_meta(out)
    assert meta["tokenizer"]["fingerprint"] == Tokenizer.load(out).fingerprint
    assert set(meta["files"]) == {"train.bin", "val.bin", "tokenizer.tiktoken"}
    assert all(sha256_file(out / name) == digest for name, digest in meta["files"].items())
    assert set(meta["files"]) | {"meta.json", shards.HASHED} == {f.name for f in out.iterdir()}
    size = file.stat().st_size
    source = {"file": "a.jsonl", "bytes": size, "sha256": sha256_file(file)}
    assert meta["request"]["text"] == [source]
    itemsize = np.dtype(meta["text"]["dtype"]).itemsize
    for part in ("train", "val"):
        assert meta["text"][f"{part}_tokens"] * itemsize == (out / f"{part}.bin").stat().st_size


def test_the_same_command_again_does_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = corpus(tmp_path / "a.jsonl"), tmp_path / "out"
    meta = text(file, out=out)
    assert "40 documents" in capsys.readouterr().out
    before = snapshot(out)
    assert text(file, out=out) == meta
    assert capsys.readouterr().out == f"{out}: up to date, nothing to do\n"
    assert snapshot(out) == before


def test_a_folder_made_from_other_inputs_is_refused(tmp_path: Path) -> None:
    file, out = corpus(tmp_path / "a.jsonl"), tmp_path / "out"
    text(file, out=out)
    before = snapshot(out)
    with pytest.raises(ValueError, match=r"other inputs \(seed\)"):
        text(file, out=out, seed=2)
    with pytest.raises(ValueError, match=r"other inputs \(tokenizer, val_fraction\)"):
        text(file, out=out, tokenizer="bpe:280", share=0.2)
    with pytest.raises(ValueError, match=r"other inputs \(text\)"):
        text(corpus(file, DOCUMENTS[1:]), out=out)
    assert snapshot(out) == before


def test_somebodys_own_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"mine has no meta\.json"):
        text(corpus(tmp_path / "a.jsonl"), out=tmp_path / "mine")
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError, ValueError])
def test_killed_half_way_leaves_nothing(
    kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Tokenizer, folder: Path) -> None:
        assert (folder / "train.bin").exists()
        raise kind

    file, out = corpus(tmp_path / "a.jsonl"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", killed)
        with pytest.raises(kind):
            text(file, out=out)
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / ".out.0123abcd.tmp").mkdir()  # what kill -9 leaves behind
    (tmp_path / ".out.0123abcd.tmp" / "junk").write_text("")
    text(file, out=out)
    assert set(tmp_path.iterdir()) == {file, out}
    assert not (out / "junk").exists()


def test_a_folder_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def closed(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    (tmp_path / "in" / "closed").mkdir(parents=True)
    corpus(tmp_path / "in" / "a.jsonl")
    monkeypatch.setattr("os.scandir", closed)
    with pytest.raises(PermissionError):
        text(tmp_path / "in", out=tmp_path / "out")


@pytest.mark.parametrize("part", ["text", "qa"])
def test_a_full_disk_names_the_folder_and_leaves_nothing(
    part: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.jsonl").write_text(jsonl([{"text": "words", **GOOD}] * 9))
    before, out = sorted(tmp_path.iterdir()), tmp_path / "out"
    for name in ("save_tokens", "save_examples"):
        monkeypatch.setattr(shards, name, full)
    work: Any = {
        "text": partial(text, out=out),
        "qa": lambda f: prepare.prepare_qa([f], out, base, 0.3, 1),
    }
    with pytest.raises(ValueError, match=f"{out}: the disk is full; make room and give the same"):
        work[part](tmp_path / "a.jsonl")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.tiktoken"])
def test_a_changed_or_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    file, out = corpus(tmp_path / "a.jsonl"), tmp_path / "out"
    text(file, out=out)
    assert open_prepared(str(out), "text") == read_meta(out)
    content = bytearray((out / name).read_bytes())
    content[10] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} has changed"):
        open_prepared(str(out), "text")
    with pytest.raises(ValueError, match=f"{name} has changed"):
        text(file, out=out)
    (out / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        open_prepared(str(out), "text")


# ---- what is hashed at a start -------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    text(corpus(tmp_path / "a.jsonl"), out=tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed."""
    names: list[str] = []

    def sha256(path: Path) -> str:
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr("runtime.files.sha256_file", sha256)
    return names


ALL = ["tokenizer.tiktoken", "train.bin", "val.bin"]


def change(file: Path, keep_time: bool = False) -> None:
    """Another last byte, and another modification time unless it is kept."""
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    time = before.st_mtime_ns + (0 if keep_time else 1_000_000)
    os.utime(file, ns=(before.st_atime_ns, time))


def test_a_start_hashes_only_what_changed(made: Path, hashed: list[str]) -> None:
    open_prepared(made, "text")
    assert hashed == []  # not even at the first start
    (made / "val.bin").touch()
    open_prepared(made, "text")
    open_prepared(made, "text")
    assert hashed == ["val.bin"]
    change(made / "train.bin")
    for _ in range(2):  # what was found wrong is not found right later
        with pytest.raises(ValueError, match=r"train\.bin has changed"):
            open_prepared(made, "text")
    assert hashed == ["val.bin", "train.bin", "train.bin"]


def test_the_same_command_again_hashes_its_inputs_only(made: Path, hashed: list[str]) -> None:
    text(made.parent / "a.jsonl", out=made)
    assert hashed == []
    change(made / "val.bin")
    with pytest.raises(ValueError, match=r"val\.bin has changed"):
        text(made.parent / "a.jsonl", out=made)


def test_verify_finds_what_a_start_misses(made: Path, hashed: list[str]) -> None:
    open_prepared(made, "text", verify=True)
    assert hashed == ALL
    change(made / "train.bin", keep_time=True)
    open_prepared(made, "text")  # as its docstring says
    with pytest.raises(ValueError, match=r"train\.bin has changed"):
        open_prepared(made, "text", verify=True)


def test_a_copied_folder_is_hashed_once(made: Path, hashed: list[str]) -> None:
    copy = Path(shutil.copytree(made, made.with_name("copy")))  # with its times
    open_prepared(copy, "text")
    assert hashed == ALL
    open_prepared(copy, "text")
    assert hashed == ALL


RECORDS: dict[str, Any] = {
    "none": None,
    "no JSON": "{",
    "not UTF-8": b"\xff",
    "too deep": "[" * 99_999,
    "a list": "[1, 2]",
    "a number": "5",
    "other values": {"train.bin": 5, "val.bin": None, "tokenizer.tiktoken": {}},
    "a folder": Path(),
}


@pytest.mark.parametrize("what", RECORDS)
def test_without_a_usable_record_all_is_hashed(what: str, made: Path, hashed: list[str]) -> None:
    record, file = RECORDS[what], made / shards.HASHED
    file.unlink()
    if isinstance(record, Path):
        file.mkdir()
    elif record is not None:
        file.write_bytes(record if isinstance(record, bytes) else json_of(record))
    open_prepared(made, "text")
    assert hashed == ALL
    open_prepared(made, "text")
    assert hashed == ALL * (2 if what == "a folder" else 1)  # in whose place no record can be
    change(made / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin has changed"):
        open_prepared(made, "text")


def json_of(record: Any) -> bytes:
    return (record if isinstance(record, str) else json.dumps(record)).encode()


def test_a_record_makes_no_wrong_file_right(made: Path, hashed: list[str]) -> None:
    change(made / "train.bin")
    stat, record = (made / "train.bin").stat(), read_json(made / shards.HASHED)
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    # Whatever it says of the file as it is now, but for the sha256 that the file does not have.
    for digest in (sha256_file(made / "train.bin"), record["val.bin"][0], None):
        write_json(made / shards.HASHED, {**record, "train.bin": [digest, *state]})
        with pytest.raises(ValueError, match=r"train\.bin has changed"):
            open_prepared(made, "text")
    assert hashed == ["train.bin"] * 3
    (made / "train.bin").unlink()
    write_json(made / shards.HASHED, {**record, "train.bin": None})
    with pytest.raises(ValueError, match=r"train\.bin is missing"):
        open_prepared(made, "text")


def test_a_record_of_another_file_is_not_believed(made: Path, hashed: list[str]) -> None:
    record = read_json(made / shards.HASHED)
    write_json(made / shards.HASHED, {**record, "train.bin": record["val.bin"]})
    open_prepared(made, "text")
    assert hashed == ["train.bin"]


def test_a_folder_that_cannot_be_written_to_is_hashed_every_time(
    made: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, value: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("runtime.files.write_json", read_only)
    open_prepared(made, "text")
    assert hashed == []  # its record is good
    (made / "val.bin").touch()
    for _ in range(2):
        open_prepared(made, "text")
    assert hashed == ["val.bin"] * 2


def test_an_old_folder_is_up_to_date_and_hashed_once(made: Path, hashed: list[str]) -> None:
    (made / shards.HASHED).unlink()  # as before there were such records
    for _ in range(2):
        text(made.parent / "a.jsonl", out=made)
    assert hashed == ALL


def test_starts_at_once_do_not_disturb_each_other(made: Path) -> None:
    (made / shards.HASHED).unlink()
    code = (
        "import sys; from data.shards import HASHED, open_prepared; from pathlib import Path\n"
        "for _ in range(40):\n"
        "    Path(sys.argv[1], HASHED).unlink(missing_ok=True)\n"
        "    open_prepared(sys.argv[1], 'text')\n"
    )
    command = [sys.executable, "-c", code, str(made)]
    starts = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(3)]
    assert [start.communicate()[1] for start in starts] == [b""] * 3
    open_prepared(made, "text")
    assert read_json(made / shards.HASHED).keys() == set(ALL)
    assert not [f.name for f in made.iterdir() if f.name.endswith(".tmp")]


@pytest.mark.parametrize("command", ["world", "text", "qa"])
def test_every_command_verifies_a_folder_that_is_up_to_date(
    command: str, made: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    (made.parent / "q.jsonl").write_text(jsonl([GOOD] * 9))
    arguments = {
        "world": ("--people", 6, "--bios", 2, "--tokenizer", "byte"),
        "text": (made.parent / "a.jsonl", "--tokenizer", "byte"),
        "qa": (made.parent / "q.jsonl", "--tokenizer-of", made),
    }
    line = (command, *arguments[command], "--out", made.parent / "out")
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, line)])
    prepare.main()
    [name] = [f for f in ("train.bin", "qa_train_ids.npy") if (made.parent / "out" / f).exists()][
        :1
    ]
    change(made.parent / "out" / name, keep_time=True)
    prepare.main()  # up to date, for all it looks at
    assert f"{name} has changed" in fails(prepare, *line, "--verify")


def test_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    text(corpus(tmp_path / "a.jsonl"), out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no qa; make it with .* qa`"):
        open_prepared(str(tmp_path / "out"), "qa")
    with pytest.raises(ValueError, match="nowhere not found"):
        open_prepared(str(tmp_path / "nowhere"), "text")


LINE = b'{"text": "words and words"}\n'
ROWS = [{"text": f"words {i}", "id": i} for i in range(2000)]
LATE = pa.scalar(1 << 62, pa.timestamp("us"))  # past the years that Python knows
DAMAGED = bytearray(gzip.compress(LINE * 9, mtime=0))
DAMAGED[12] = 0xFF


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "the corpus is empty"),
        ("a.jsonl", b"\n\n", "the corpus is empty"),
        ("a.txt", b"words \xff\xfe", "a.txt is not UTF-8"),
        ("a.jsonl", LINE + b'{"text": "\xff"}\n', "a.jsonl is not UTF-8"),
        ("a.jsonl", LINE + b"\n{]\n", r"a.jsonl, line 3: not JSON"),
        ("a.jsonl", LINE + b'{"body": "x"}\n', r"a.jsonl, line 2: no text under 'text'.*--field"),
        ("a.jsonl", LINE + b'{"text": 5}\n', r"a.jsonl, line 2: 'text' holds int, not text"),
        ("a.jsonl", LINE + b"[" * 99_999, r"a.jsonl, line 2: not JSON \(.*recursion"),
        ("a.jsonl.gz", b"", "a.jsonl.gz is not a whole gzip file: it is empty"),
        ("a.txt.zst", b"", "a.txt.zst is not a whole zstd file: it is empty"),
        ("a.jsonl", b"[1]\n", r"a.jsonl, line 1: no text under 'text'"),
        ("a.jsonl", LINE + b'{"text": "x\\ud800"}\n', r"a.jsonl, line 2"),
        (
            "a.jsonl.gz",
            gzip.compress(LINE * 9, mtime=0)[:-20],
            "a.jsonl.gz is not a whole gzip file",
        ),
        ("a.jsonl.gz", LINE, "a.jsonl.gz is not a whole gzip file"),
        ("a.jsonl.gz", bytes(DAMAGED), "a.jsonl.gz is not a whole gzip file"),
        ("a.jsonl.zst", zstd(LINE * 9)[:-3], "a.jsonl.zst is not a whole zstd file"),
        ("a.jsonl.zst", LINE, "a.jsonl.zst is not a whole zstd file"),
        ("a.parquet", parquet(ROWS)[:-20], "a.parquet is not a whole parquet file"),
        ("a.parquet", parquet(ROWS)[:999] + parquet(ROWS)[1099:], "a.parquet is not a whole parq"),
        ("a.parquet", b"", "a.parquet is not a whole parquet file"),
        (
            "a.parquet",
            parquet([{"id": 5, "body": "x"}]),
            r"row 1: no text under 'text'; name the "
            r"field with --field; it has id, body",
        ),
        ("a.parquet", parquet([*ROWS, {"text": None}]), r"row 2001: 'text' holds NoneType, not"),
        ("a.parquet", parquet([{"text": 5}]), r"a.parquet, row 1: 'text' holds int, not text"),
        ("a.parquet", parquet([{"id": LATE}]), r"row 1: no text under 'text'.*it has id"),
        ("a.parquet", parquet([{"text": LATE}]), r"a.parquet: text cannot be read: "),
        ("a.pdf", b"words", r"a.pdf: no text there; it can be .txt"),
        (None, b"", r"a.txt not found"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:270"])
def test_unusable_text_is_one_clear_error(
    tokenizer: str, name: str | None, content: bytes, reason: str, tmp_path: Path
) -> None:
    if name:
        (tmp_path / name).write_bytes(content)
    threads = threading.active_count()
    with pytest.raises(ValueError, match=r".") as info:
        text(tmp_path / (name or "a.txt"), out=tmp_path / "out", tokenizer=tokenizer)
    left = threading.active_count() - threads
    traceback.clear_frames(info.tb)  # or a progress bar left open may end, and hang, in any thread
    assert not left
    assert info.match(reason)
    assert not (tmp_path / "out").exists()


def test_a_kind_of_file_whose_library_is_missing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name, content in (("a.parquet", parquet(ROWS)), ("a.txt.zst", zstd(b"words"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} needs pyarrow to be read; pip install pyar"):
            text(tmp_path / name, out=tmp_path / "out")


def test_a_seed_below_zero_is_refused_at_once(fails: Fails, tmp_path: Path) -> None:
    error = fails(
        prepare, "text", "missing.txt", "--out", tmp_path, "--seed=-1", "--tokenizer=byte"
    )
    assert "--seed is -1; it must be 0 or more" in error


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a val_fraction of 0\.9 leaves training or validation"):
        text(corpus(tmp_path / "a.jsonl", ["a"]), out=tmp_path / "out", share=0.9)


def test_few_unlike_documents_still_give_the_share_that_was_asked_for(tmp_path: Path) -> None:
    for i, lengths in enumerate(([6, 60_000], [60_000, 6], [500, 500, 500])):
        file = corpus(tmp_path / f"{i}.jsonl", ["x" * n for n in lengths])
        meta = text(file, out=tmp_path / str(i), share=0.1)["text"]
        assert meta["val_tokens"] / (meta["val_tokens"] + meta["train_tokens"]) == pytest.approx(
            0.1, abs=0.01
        )


# ---- questions and answers -----------------------------------------------------------------


def chat(i: int) -> list[Message]:
    return parse_example({"question": f"what is {i}?", "answer": "é" * (i % 5 + 1)})


def qa_rows() -> list[Any]:
    """Conversations 30 to 39, with columns that only some rows fill or that nobody asked for."""
    rows: list[Any] = [
        {"messages": chat(i), "conversations": None, "at": LATE} for i in range(30, 39)
    ]
    turns = [{"from": m["role"], "value": m["content"]} for m in chat(39)]
    return [*rows, {"conversations": [*turns[:1], {**turns[1], "role": None, "content": None}]}]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    text(corpus(tmp_path / "base.jsonl"), out=tmp_path / "base", tokenizer="bpe:280")
    return tmp_path / "base"


def test_loaded_examples_are_the_rendered_conversations(base: Path, tmp_path: Path) -> None:
    out, tokenizer = tmp_path / "qa", Tokenizer.load(base)
    (tmp_path / "a.jsonl").write_text(
        jsonl([{"messages": chat(i) + chat(i + 100)} for i in range(10)])
        + "\n"
        + jsonl([{"conversations": chat(i)} for i in range(10, 20)])
    )
    more: list[Any] = [{"question": chat(i)[0]["content"], "answer": "é"} for i in range(20, 30)]
    more[0] = {"instruction": "add", "input": "2, 2", "output": "4"}
    more[1] = {"messages": None, "conversations": [{**m, "from": None} for m in chat(21)]}
    (tmp_path / "b.json").write_text(json.dumps(more, indent=2))
    (tmp_path / "c.parquet").write_bytes(parquet(qa_rows()))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(jsonl([{"messages": chat(40)}]).encode()))
    packed = jsonl([{"instruction": "add", "context": "2, 2", "response": "four"}]).encode()
    (tmp_path / "e.jsonl.zst").write_bytes(zstd(packed))
    files = sorted(f for f in tmp_path.iterdir() if f.name[1] == ".")
    meta = prepare.prepare_qa(files, out, base, 0.2, seed=1)
    conversations = [chat(i) + chat(i + 100) for i in range(10)]
    conversations += [chat(i) for i in range(10, 20)] + [parse_example(m) for m in more]
    conversations += [chat(i) for i in range(30, 41)]
    conversations.append(
        [{"role": "user", "content": "add\n\n2, 2"}, {"role": "assistant", "content": "four"}]
    )
    expected = [render(c, tokenizer) for c in conversations]
    loaded = {p: load_examples(out, p) for p in ("train", "val")}
    assert {part: len(examples) for part, examples in loaded.items()} == {"train": 34, "val": 8}
    found = [(ids.tolist(), mask.tolist()) for part in loaded.values() for ids, mask in part]
    assert found != expected
    assert sorted(found) == sorted(expected)  # disjoint and complete: no two are alike
    assert not any(ids.flags.writeable for ids, _ in loaded["train"])  # maps of the file
    assert meta["qa"]["train_supervised"] == sum(int(m.sum()) for _, m in loaded["train"])
    assert meta["qa"]["train_tokens"] == sum(len(ids) for ids, _ in loaded["train"])
    assert meta["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert meta["qa"]["template"] == template_fingerprint()
    twice = prepare.prepare_qa([*files, files[0]], out, base, 0.2, seed=1)  # changes nothing
    assert twice == meta
    assert open_prepared(str(out), "qa")["request"]["qa"][0]["file"] == "a.jsonl"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_each_instance_of_an_instruction_is_a_conversation(name: str, tmp_path: Path) -> None:
    first = [{"input": "2, 2", "output": "4"}, {"input": "", "output": "0"}]
    rows: list[Any] = [
        {"id": "seed_task_0", "instruction": "add", "instances": first},
        {"id": "seed_task_1", "instruction": "greet", "instances": [{"input": "", "output": "Hi"}]},
    ]
    written = {"a.json": json.dumps(rows).encode(), "a.jsonl": jsonl(rows).encode()}
    (tmp_path / name).write_bytes(written.get(name) or parquet(rows))
    found = list(read_conversations([tmp_path / name], skip_bad=False))
    said = [[m["content"] for m in conversation] for conversation in found]
    assert said == [["add\n\n2, 2", "4"], ["add", "0"], ["greet", "Hi"]]


GOOD = {"question": "q", "answer": "a"}


def test_bad_lines_are_refused_with_their_place_or_skipped_and_counted(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(jsonl([GOOD, {"question": "q"}]) + "\n{oops\n" + jsonl([GOOD, GOOD]))
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: .*\(and 1 more bad examples\).*--skip"):
        prepare.prepare_qa([file], tmp_path / "qa", base, 0.3, seed=1)
    capsys.readouterr()
    meta = prepare.prepare_qa([file], tmp_path / "qa", base, 0.3, seed=1, skip_bad=True)
    assert meta["qa"]["train_examples"] + meta["qa"]["val_examples"] == 3
    printed = capsys.readouterr().out
    assert f"skipped {file}, line 2: 'question' without 'answer'" in printed
    assert f"skipped {file}, line 4: not JSON" in printed
    assert "skipped 2 of 5 examples" in printed


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", '[\n {"question": "q",\n  "answer": "a"},\n\n {"text": 1}]', "line 5: no mess"),
        ("a.json", '\n[{"question": "q", "answer": "a"},\n 5]', "line 3: expected a JSON object"),
        ("a.json", '[\n{"question": "q", "answer": "a"},\n{oops}]', "line 3: not JSON"),
        ("a.json", '[\n{"question": "q", "answer": "a"}\n{"a": 1}]', "line 2: no comma"),
        ("a.json", '[{"question": "q", "answer": "a"},\n', "line 2: not JSON"),
        ("a.json", json.dumps([GOOD] * 2) + "\n" + json.dumps([GOOD] * 3), "line 2"),
        ("a.json", json.dumps(GOOD), "must hold a list"),
        ("a.json", "[\n" + "[" * 99_999, r"line 2: not JSON \(.*recursion"),
        ("a.json", "[]", "a.json: no usable example"),
        ("a.jsonl", "\n", "a.jsonl: no usable example"),
        ("a.jsonl", jsonl([GOOD]), "leave none to train on"),
        ("a.csv", "q,a", "comes as .json, .jsonl"),
        ("a.jsonl", b'{"question": "\xff"}', "a.jsonl is not UTF-8"),
        ("a.parquet", parquet([{"words": "x"}]), "a.parquet, row 1: no messages.*it has words"),
        ("a.parquet", parquet([{"at": LATE}]), "a.parquet, row 1: no messages.*it has at"),
        ("a.parquet", parquet([{"prompt": "q", "response": "a"}]), "it has prompt, response;"),
        (
            "a.jsonl",
            jsonl([{"instruction": "q", "instances": []}]),
            "it has instruction, instances;",
        ),
        ("a.jsonl", jsonl([{"instruction": "q", "instances": [5]}]), "line 1: expected a JSON obj"),
        ("a.parquet", parquet([{"messages": [1]}])[:-9], "a.parquet is not a whole parquet file"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-9], "a.jsonl.gz is not a whole gzip file"),
        (None, "", "a.jsonl not found"),
    ],
)
def test_unusable_questions_are_one_clear_error(
    name: str | None, content: str | bytes, reason: str, base: Path, tmp_path: Path
) -> None:
    file = tmp_path / (name or "a.jsonl")
    if name:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=reason):
        prepare.prepare_qa([file], tmp_path / "qa", base, 0.1, seed=1)
    with pytest.raises(ValueError, match="is no file"):
        prepare.prepare_qa([tmp_path], tmp_path / "qa", base, 0.1, seed=1)
    assert not (tmp_path / "qa").exists()


def test_inspect_marks_the_supervised_tokens(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl([{"messages": chat(3) + chat(3)}] * 3))
    prepare.prepare_qa([tmp_path / "a.jsonl"], tmp_path / "qa", base, 0.3, seed=1)
    capsys.readouterr()
    prepare.inspect(tmp_path / "qa", 1)
    turn = "<|user|>what is 3?<|end|><|assistant|>[éééé<|end|>]"
    first, rest = capsys.readouterr().out.split("\n", 1)
    assert "supervised" in first
    assert rest.strip() == "<|endoftext|>" + turn * 2


# ---- the world and the command line --------------------------------------------------------


def test_a_folder_of_the_world_holds_its_biographies_and_conversations(tmp_path: Path) -> None:
    config, out = WorldConfig(people=8, unseen=1, bios=3), tmp_path / "out"
    meta = prepare.prepare_world(config, out, "bpe:300", 0.1)
    found = stream(out, "train") + stream(out, "val")
    assert sorted(found) == sorted(World(config).biographies())
    examples = [e for part in ("train", "val") for e in load_examples(out, part)]
    expected = [render(c, Tokenizer.load(out))[0] for c in World(config).conversations()]
    assert sorted(ids.tolist() for ids, _ in examples) == sorted(expected)
    assert WorldConfig(**meta["world"]) == config
    with pytest.raises(ValueError, match=r"other inputs \(world, "):
        prepare.prepare_world(WorldConfig(people=8, bios=3), out, "bpe:300", 0.1)


def test_the_vocabulary_of_a_world_is_made_without_the_names_of_its_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, learned = WorldConfig(people=8, unseen=1, bios=3), list[str]()

    def spied(spec: str, documents: Iterable[str]) -> Tokenizer:
        learned.extend(documents)
        return create_tokenizer(spec, learned)

    monkeypatch.setattr(prepare, "create_tokenizer", spied)
    prepare.prepare_world(config, tmp_path / "out", "bpe:300", 0.1)
    world = World(config)
    biographies = list(world.biographies())
    assert learned[: len(biographies)] == biographies
    names = {part for person in world.people for part in person.name.split()}
    said = {word for text in learned[len(biographies) :] for word in re.findall(r"\w+", text)}
    assert not names & said
    assert {"What", "born", "sentence"} <= said


def test_the_command_line_prepares_inspects_and_fails_in_one_line(tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "data.prepare", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    file, out, qa = corpus(tmp_path / "a.jsonl", field="body"), tmp_path / "out", tmp_path / "qa"
    options = ("--out", str(out), "--tokenizer", "byte", "--field", "body")
    assert call("text", str(file), *options).returncode == 0
    assert len(stream(out, "val")) == 4
    (tmp_path / "q.jsonl").write_text(jsonl([GOOD] * 4 + [{"question": "q"}]))
    arguments = ("qa", str(tmp_path / "q.jsonl"), "--out", str(qa), "--tokenizer-of", str(out))
    done = call(*arguments, "--skip-bad", "--inspect", "1")
    assert "<|user|>q<|end|><|assistant|>[a<|end|>]" in done.stdout
    failed = call(*arguments[:2], "--out", str(tmp_path / "other"), *arguments[4:])
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr.startswith(f"error: {tmp_path / 'q.jsonl'}, line 5: 'question' without")


def test_adjacent_keeps_the_biographies_of_a_person_together(tmp_path: Path) -> None:
    metas, orders = [], []
    for adjacent in (False, True):
        config, out = WorldConfig(people=9, unseen=2, bios=6, adjacent=adjacent), tmp_path / "w"
        out = tmp_path / f"world{adjacent}"
        metas.append(prepare.prepare_world(config, out, "byte", 0.1))
        text = Tokenizer.load(out).decode(np.fromfile(out / "train.bin", "<u2").tolist())
        names = [p.name for p in World(config).people]
        documents = text.split("<|endoftext|>")[1:]
        orders.append([next(n for n in names if n in document) for document in documents])
    assert sorted(orders[0]) == sorted(orders[1])
    assert len([1 for a, b in pairwise(orders[1]) if a != b]) == 8
    assert len([1 for a, b in pairwise(orders[0]) if a != b]) > 20
    assert metas[0]["files"]["val.bin"] == metas[1]["files"]["val.bin"]


@pytest.mark.parametrize("ends", [False, True])
def test_conversations_are_told_apart_whatever_the_template_renders(
    ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(messages: list[Message], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        ids, mask = render(messages, tokenizer)
        if ends:  # an end-of-text token after each as well
            return [*ids, tokenizer.end_of_text], [*mask, 0]
        return ids[1:], mask[1:]  # and none at all

    monkeypatch.setattr("data.shards.render", other)
    meta = shards.write_qa((chat(i) for i in range(40)), BYTE, tmp_path, 0.25, 1)
    assert (meta["train_examples"], meta["val_examples"]) == (30, 10)
    for part, n in (("train", 30), ("val", 10)):
        examples = load_examples(tmp_path, part)
        assert len(examples) == n
        assert all((ids[0] == BYTE.end_of_text) is np.bool_(ends) for ids, _ in examples)


def test_a_world_knows_the_template_of_its_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> Any:
        config = WorldConfig(people=6, unseen=2, bios=2)
        return prepare.prepare_world(config, tmp_path / "w", "byte", 0.1)

    meta = make()
    before = {k: v for k, v in meta["request"].items() if k != "template"}
    write_meta(tmp_path / "w", meta | {"request": before})  # as worlds were made until 2026-11-24
    assert make()["files"] == meta["files"]
    monkeypatch.setattr(prepare, "template_fingerprint", lambda: "another")
    with pytest.raises(ValueError, match=r"made from other inputs \(template\)"):
        make()
