"""Files that are whole or absent: atomic writes, checksums, prepared and checkpoint folders."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read as a stream."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """A short digest of any JSON-ready value; equal values have equal fingerprints."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` in one rename, so that a reader or a crash never meets half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory that becomes `path` in one rename, or never.

    What a killed process left behind under the temporary name is removed first.

    Raises:
        FileExistsError: `path` exists and is not empty.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~mask)  # safetensors keeps its files to their owner
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        if path.exists():
            raise FileExistsError(f"{path} already exists; delete it or choose another name")
        temporary.rename(path)
        _fsync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Says where the disk is full, and what to do.

    Raises:
        ValueError: in place of the OSError that tells it.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"{path}: the disk is full; make room and give the same command again"
        ) from None


@contextlib.contextmanager
def lock(folder: Path, doing: str) -> Iterator[None]:
    """Makes a folder this process's own for a while.

    Raises:
        ValueError: another process holds it; `doing` says for what, such as "downloading into".
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is {doing} {folder}") from None
            except OSError:
                pass  # a file system without locks: work unguarded rather than not at all
        yield


def _fsync_directory(path: Path) -> None:
    """Makes a rename inside `path` survive a power cut (POSIX only; elsewhere a no-op)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Parses a JSON file.

    Raises:
        ValueError: missing, not UTF-8 or not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:  # bad JSON and bad UTF-8 are both ValueErrors
        raise ValueError(f"{path} is not a JSON file: {error}") from None


def read_meta(path: str | Path) -> dict[str, Any]:
    """The `meta.json` of a prepared-data folder or of a checkpoint, with its format checked.

    Raises:
        ValueError: the folder or its meta.json is missing, damaged, or somebody else's.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder" if folder.exists() else f"{folder} not found")
    if not (folder / "meta.json").exists():
        raise ValueError(
            f"{folder} has no meta.json: it is neither data made by `python -m data.prepare` "
            "nor a checkpoint of this project"
        )
    meta = read_json(folder / "meta.json")
    seal = meta.pop("seal", None) if isinstance(meta, dict) else None
    if seal is None:
        raise ValueError(f"{folder / 'meta.json'} was not written by this project")
    if seal != fingerprint(meta):
        raise ValueError(f"{folder / 'meta.json'} was changed; delete {folder} and make it again")
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Writes meta.json, sealed with its own fingerprint."""
    write_json(folder / "meta.json", {**meta, "seal": fingerprint(meta)})


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first (a folder counts once its rename happened)."""
    found = [p for p in run_dir.glob("step_*") if (p / "meta.json").exists()]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder from itself or from its run's folder (then the newest whole one)."""
    folder = Path(path)
    if (folder / "meta.json").exists() or not folder.is_dir():
        return folder  # whatever is wrong with it, read_meta says so
    steps = checkpoints(folder)
    if not steps and (folder / "config.json").exists():
        raise ValueError(f"{folder} is a run without a checkpoint yet; train it further first")
    return steps[-1] if steps else folder


def verify_checksums(folder: Path, checksums: dict[str, str]) -> None:
    """Refuses a folder whose files are not the ones its meta.json was written for.

    Raises:
        ValueError: a file is missing or its bytes have changed.
    """
    for name, expected in checksums.items():
        if not (folder / name).exists():
            raise ValueError(f"{folder / name} is missing; delete {folder} and make it again")
        if sha256_file(folder / name) != expected:
            raise ValueError(
                f"{folder / name} has changed since it was written (its sha256 differs from "
                f"meta.json); delete {folder} and make it again"
            )
