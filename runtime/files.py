"""Files that are whole or absent: atomic writes, checksums, prepared and checkpoint folders."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What is raised of values that a file of this project does not hold.
ODD = (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read as a stream. Raises ValueError: it is no file."""
    if not path.is_file():  # to read a pipe might take for ever
        raise ValueError(f"{path} is no file" if path.exists() else f"{path} not found")
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """A short digest of any JSON-ready value; equal values have equal fingerprints."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a new file that replaces `path` in one rename: nobody ever meets half of one."""
    temporary = _temporary(path)
    temporary.touch(exist_ok=False)  # follows no link
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`new_file` of a text."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`write_text` of any JSON-ready value."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def check_file(option: str, path: Path | None) -> None:
    """Raises ValueError: no file can be written there, which is better known before the work. A
    device, a pipe or a link is none: to replace it would take it from others.
    """
    if path is not None:
        try:
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise FileExistsError
            (temporary := _temporary(path)).touch(exist_ok=False)
            temporary.unlink()
        except OSError:
            raise ValueError(f"{option} {path} is no file that could be written") from None


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory that becomes `path` in one rename, or never. Raises
    FileExistsError: `path` exists and is not empty. Raises ValueError: another process makes it.
    """
    path = Path(os.path.realpath(path))  # resolve() raises of a loop of links
    temporary, busy = _temporary(path), f"another process is making {path}"
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with _alone(left, os.O_DIRECTORY, busy):  # else a killed one was
            shutil.rmtree(left)
    temporary.mkdir(parents=True)
    with _alone(temporary, os.O_DIRECTORY, busy):
        try:
            yield temporary
            for file in temporary.iterdir():
                # As rights are here: safetensors keeps its files to their owner.
                file.chmod(temporary.stat().st_mode & 0o666)
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
            if path.exists() and not (path.is_dir() and not any(path.iterdir())):
                raise FileExistsError(f"{path} already exists; delete it or choose another name")
            temporary.rename(path)  # also in place of an empty folder
            descriptor = os.open(path.parent, os.O_RDONLY)
            os.fsync(descriptor)  # so that the rename survives a power cut
            os.close(descriptor)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _temporary(path: Path) -> Path:
    """The name of something new beside a path."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def lock(folder: Path, doing: str) -> contextlib.AbstractContextManager[None]:
    """Makes a folder this process's own for a while, by a file .lock in it. Raises ValueError:
    another process holds it; `doing` says for what, as in "downloading into".
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Of a file that can be written, since NFS locks no others.
    return _alone(folder / ".lock", os.O_RDWR | os.O_CREAT, f"another process is {doing} {folder}")


@contextlib.contextmanager
def _alone(path: Path, flags: int, otherwise: str) -> Iterator[None]:
    """Holds a file or a folder for this process alone. Raises ValueError, `otherwise`: another one
    has it, or has had it and given it another name.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o666)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # without locks it works unguarded rather than not at all
                if isinstance(error, BlockingIOError):
                    raise
            if not os.path.samestat(os.fstat(descriptor), path.stat()):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):
            raise ValueError(otherwise) from None
        yield


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turns the OSError of a full disk into a ValueError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        what = f"{path}: the disk is full; make room and give the same command again"
        raise ValueError(what) from None


@contextlib.contextmanager
def as_ours(folder: str | Path) -> Iterator[None]:
    """Turns what reading a folder raises that this project did not write into a ValueError."""
    try:
        yield
    except ODD as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{folder} is damaged or of another version ({what:.150})") from None


def at_home(path: str) -> str:
    """A path in its plain form, with a home folder in place of "~"; of nobody's it stays."""
    with contextlib.suppress(RuntimeError):
        return str(Path(path).expanduser())
    return str(Path(path))


def read_json(path: Path) -> Any:
    """Parses a JSON file. Raises ValueError, which names it: no file, not UTF-8 or not JSON."""
    if not path.is_file():  # to read a pipe might take for ever
        raise ValueError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 are both ValueErrors
        raise ValueError(f"{path} is not a JSON file: {error}") from None


def read_meta(path: str | Path) -> dict[str, Any]:
    """The meta.json of prepared data or a checkpoint. Raises ValueError: none, or damaged."""
    folder, file = Path(path), Path(path, "meta.json")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder" if folder.exists() else f"{folder} not found")
    if not file.exists():
        what = "neither data made by `python -m data.prepare` nor a checkpoint of this project"
        raise ValueError(f"{folder} has no meta.json: it is {what}")
    meta = read_json(file)
    if not isinstance(meta, dict) or "seal" not in meta:
        raise ValueError(f"{file} was not written by this project")
    if meta.pop("seal") != fingerprint(meta):
        raise ValueError(f"{file} was changed; delete {folder} and make it again")
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes meta.json, sealed with its own fingerprint."""
    write_json(folder / "meta.json", {**meta, "seal": fingerprint(meta)})


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first (a folder counts once its rename happened)."""
    found = filter(is_checkpoint, run_dir.iterdir() if run_dir.is_dir() else ())
    return sorted((p for p in found if (p / "meta.json").exists()), key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint; a copy of one has another."""
    return re.fullmatch(r"step_(\d{6}|[1-9]\d{6,17})", path.name, re.ASCII) is not None


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.name.removeprefix("step_"))


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder from itself or from its run's folder (then the newest whole one)."""
    if str(path).startswith("hf:"):
        raise ValueError(f"{path} can be compared, not trained: import it with convert.py first")
    folder = Path(at_home(str(path)))
    if (folder / "meta.json").exists() or not folder.is_dir():
        return folder  # whatever is wrong with it, read_meta says so
    steps = checkpoints(folder)
    if not steps and (folder / "config.json").exists():
        if any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} is a model of transformers; say hf:{folder}, or import it")
        raise ValueError(f"{folder} is a run without a checkpoint yet; train it further first")
    return steps[-1] if steps else folder


def verify_checksums(folder: Path, checksums: dict[str, str]) -> None:
    """Raises ValueError where a file is missing, or is not the one meta.json was written for."""
    remedy = f"delete {folder} and make it again"
    if not isinstance(checksums, dict) or not all(Path(n).name == n for n in checksums):
        raise ValueError(f"{folder}: its list of files is damaged; {remedy}")
    for name, expected in checksums.items():
        file = folder / name
        if not file.exists():
            raise ValueError(f"{file} is missing; {remedy}")
        if sha256_file(file) != expected:
            wrong = "has changed since it was written (its sha256 differs from meta.json)"
            raise ValueError(f"{file} {wrong}; {remedy}")
