"""Files of the Hugging Face hub, or of any server: resumed, checked, whole or absent."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

import requests
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from runtime.files import fingerprint, full_disk, lock, sha256_file

T = TypeVar("T")
RETRIES = 5  # failures in a row that bring no byte more than the best before them
FIRST_RETRIES = 2  # where no server is reached for a listing: nothing is lost yet
BACKOFF = 1.0  # seconds before the first retry, doubled for each further one
PATIENCE = 60  # seconds to wait at most where a server names a time
BLOCK = 1 << 13  # bytes; a cut loses what has come of a block
MIRROR = "set HF_ENDPOINT to a mirror, or fetch the files elsewhere"
BY_HAND = {
    "datasets": f"{MIRROR} (text goes to `python -m data.prepare text FILES`, Q&A to `... qa`)",
    "models": f"{MIRROR} and give their folder",
}


@dataclass(frozen=True)
class RemoteFile:
    """A file to download: `name` is its path under the target folder, size is in bytes."""

    name: str
    url: str
    size: int
    sha256: str | None = None


def endpoint() -> str:
    """The hub, or the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_files(
    repo: str, kind: Literal["models", "datasets"], patterns: Sequence[str], revision: str = "main"
) -> list[RemoteFile]:
    """The files of a hub repository that match one of the fnmatch patterns, sorted by name.

    Raises:
        ValueError: unknown or closed repository, unreachable hub, or no file matches.
    """
    where = f"{endpoint()}/{'' if kind == 'models' else 'datasets/'}{repo}"
    tree = f"{endpoint()}/api/{kind}/{repo}/tree/{quote(revision, safe='')}"
    files, query, asked = list[RemoteFile](), "recursive=true", set[str]()
    try:
        with requests.Session() as session:
            while query:
                asked.add(query)
                entries, query = _patiently(
                    partial(_page, session, f"{tree}?{query}"), unreached=FIRST_RETRIES
                )
                for entry in entries:
                    if entry["type"] == "file":
                        path, size = entry["path"], entry["size"]
                        digest = (entry.get("lfs") or {}).get("oid")
                        if type(path) is not str or type(size) is not int or size < 0:
                            raise TypeError(entry)
                        url = f"{where}/resolve/{quote(revision, safe='')}/{quote(path)}"
                        files.append(RemoteFile(path, url, size, digest))
                if query in asked:
                    raise KeyError(query)  # it would go round for ever
    except (requests.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{tree} is not the listing of a hub; {BY_HAND[kind]}") from None
    except requests.RequestException as error:
        raise ValueError(f"cannot reach {endpoint()} ({_reason(error)}); {BY_HAND[kind]}") from None
    kept = [f for f in files if any(fnmatch(f.name, pattern) for pattern in patterns)]
    if not kept:
        held = ", ".join(f.name for f in files[:5]) or "no file"
        raise ValueError(f"{where}: no file matches {', '.join(patterns)}; it holds {held} ...")
    return sorted(kept, key=lambda f: f.name)


def download(
    files: Sequence[RemoteFile], folder: Path, later: Sequence[tuple[Path, float, str]] = ()
) -> list[Path]:
    """Brings the files into `folder`; what is there already and right is not fetched again.

    A file is written under a temporary name, from which it can go on after a cut, and renamed
    once its size and its sha256 are right. `later` is the room that must stay for what comes
    after the download: (folder, bytes, a verb for it).

    Raises:
        ValueError: an unsafe name, too little disk, a server that fails, wrong bytes, or another
            process that downloads into `folder`.
    """
    pairs = [(file, _target(folder, file.name)) for file in files]
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, transient=True, disable=not sys.stdout.isatty())
    with lock(folder, "downloading into"), bar, requests.Session() as session:
        task = bar.add_task("checking", total=sum(file.size for file in files))
        missing = [(f, t) for f, t in pairs if not t.is_file() or _difference(f, t)]
        there = sum(part.stat().st_size for _, t in missing if (part := _part(t)))
        needed = sum(file.size for file, _ in missing) - there
        _check_space([(folder, needed, "download"), *later])
        done = sum(t.stat().st_size for f, t in pairs if (f, t) not in missing)

        def show(n_bytes: int) -> None:
            bar.update(task, completed=done + n_bytes)

        for file, target in missing:
            bar.update(task, description=escape(file.name))
            _download(session, file, target, show)
            done += target.stat().st_size
            if bar.disable:
                print(f"{target}: {target.stat().st_size:,} bytes", flush=True)
    return [target for _, target in pairs]


def _check_space(needs: Sequence[tuple[Path, float, str]]) -> None:
    """Refuses before anything is written what would not fit: (folder, bytes, what they are)."""
    disks = defaultdict[int, list[tuple[Path, float, str]]](list)
    for path, n_bytes, what in needs:
        disks[_disk(path)].append((path, n_bytes, what))
    for found in disks.values():
        path, needed = found[0][0], sum(n_bytes for _, n_bytes, _ in found)
        if needed > (free := shutil.disk_usage(_existing(path)).free):
            whats = " and ".join(what for _, _, what in found)
            raise ValueError(
                f"{path}: {needed / 1e9:.2f} GB to {whats} do not fit in {free / 1e9:.2f} GB of "
                "free disk; make room, or choose a folder on another disk"
            )


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(p for p in (path, *path.resolve().parents) if p.exists())


def _disk(path: Path) -> int:
    return _existing(path).stat().st_dev


def _target(folder: Path, name: str) -> Path:
    """Where a file goes; its name comes from a server and must not lead out of the folder."""
    path = PureWindowsPath(name)  # knows every separator there is
    if not path.name or ".." in path.parts or path.anchor or "\0" in name:
        raise ValueError(f"the server names a file {name!r}, which is not inside {folder}; refused")
    return folder / PurePosixPath(name)


def _download(
    session: requests.Session, file: RemoteFile, target: Path, show: Callable[[int], None]
) -> None:
    """One file, through cuts of the connection. `show` is told the bytes that are there."""
    target.parent.mkdir(parents=True, exist_ok=True)

    def there() -> int:
        return part.stat().st_size if (part := _part(target)) else 0

    try:
        with full_disk(target):
            part = _patiently(partial(_append, session, file, target, show), there)
    except requests.RequestException as error:
        raise ValueError(
            f"{file.url} cannot be fetched ({_reason(error)}); {there():,} bytes are kept: "
            f"give the same command again to go on, or {MIRROR}"
        ) from None
    if difference := _difference(file, part):
        part.unlink()
        raise ValueError(
            f"{file.name} from {file.url} is damaged ({difference}) and was deleted; give the "
            "same command again"
        )
    part.replace(target)


def _patiently(
    work: Callable[[], T], there: Callable[[], int] = lambda: 0, unreached: int = RETRIES
) -> T:
    """What `work` returns, tried again through a passing trouble of the server or the network.

    Raises:
        requests.RequestException: more than RETRIES failures in a row that brought `there` no
            further, or `unreached` where no server was reached.
    """
    best = failures = 0
    while True:
        try:
            return work()
        except requests.RequestException as error:
            failures = 1 if there() > best else failures + 1
            best = max(best, there())
            limit = unreached if error.response is None else RETRIES
            if failures > limit or isinstance(error, ValueError):  # the latter never passes
                raise
            asked = "" if error.response is None else error.response.headers.get("Retry-After", "")
            pause = BACKOFF * 2 ** (failures - 1)
            if asked.isdecimal():
                pause = max(pause, min(int(asked), PATIENCE))
            if pause:
                print(f"{_reason(error)}: again in {pause:g} s", flush=True)
            time.sleep(pause)


def _page(session: requests.Session, url: str) -> tuple[Any, str]:
    """A page of a listing, and the query of the next one, empty after the last."""
    with _get(session, url) as response:
        # Only the cursor of the next page is taken: a mirror may name the hub itself here.
        return response.json(), urlsplit(response.links.get("next", {}).get("url", "")).query


def _append(
    session: requests.Session, file: RemoteFile, target: Path, show: Callable[[int], None]
) -> Path:
    """Adds what is missing to the temporary file, or begins it anew; returns it once it is whole.

    Its name tells the server's version of the file (a digest of ETag and size), so that a later
    process too knows whether its bytes are a beginning of what the server has now.

    Raises:
        requests.RequestException: the connection broke, or a passing trouble of the server.
    """
    old = _part(target)
    start = old.stat().st_size if old else 0
    if old and start == file.size:
        return old
    with _get(session, file.url, start) as response:
        headers, resumed = response.headers, response.status_code == 206
        mark = fingerprint([headers.get("ETag") or headers.get("Last-Modified"), file.size])
        part = target.with_name(f".{mark}.{target.name}.part")
        if old and not (resumed and old == part):
            old.unlink()
            if resumed or response.status_code == 416:
                raise requests.ConnectionError("the file has changed on the server")
        position = start * resumed
        with open(part, "ab" if resumed else "wb") as f:
            for block in response.iter_content(BLOCK):
                f.write(block)
                show(position := position + len(block))
                if position > file.size:  # never to be right, and perhaps without an end
                    break
            if position < file.size and "Content-Length" not in headers:
                raise requests.ConnectionError("the connection was cut")
            f.flush()
            os.fsync(f.fileno())
    return part


def _part(target: Path) -> Path | None:
    """The temporary file of an unfinished download, if there is one."""
    return next(target.parent.glob(f".{'?' * 16}.{glob.escape(target.name)}.part"), None)


def _get(session: requests.Session, url: str, start: int = 0) -> requests.Response:
    """A usable response, from byte `start` on if the server can.

    Raises:
        requests.RequestException: no connection, or a passing trouble of the server.
        ValueError: the server refuses.
    """
    headers = {"Accept-Encoding": "identity"}  # sizes and ranges are those of the file itself
    if start:
        headers["Range"] = f"bytes={start}-"
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ValueError("HF_TOKEN holds a character that no access token has; set it again")
    if token and urlsplit(url)[:2] == urlsplit(endpoint())[:2]:
        headers["Authorization"] = f"Bearer {token}"  # requests drops it when led to another host
    response = session.get(url, headers=headers, stream=True, timeout=(10, 60))
    code = response.status_code
    if code in (200, 206) or (code == 416 and start):
        return response
    response.close()
    if code == 429 or code >= 500:
        raise requests.ConnectionError(f"the server answers {code}", response=response)
    remedy = "check the name, and set HF_TOKEN if it is private" if code in (401, 404) else MIRROR
    if code == 403:
        remedy = "accept its terms in a browser, then set HF_TOKEN to your access token"
    raise ValueError(f"{url.partition('?')[0]}: the server answers {code}; {remedy}")


def _difference(file: RemoteFile, path: Path) -> str:
    """What is wrong with the bytes at `path`; empty if nothing."""
    if file.size != (size := path.stat().st_size):
        return f"{size:,} bytes instead of {file.size:,}"
    if file.sha256 and file.sha256 != (found := sha256_file(path)):
        return f"sha256 {found} instead of {file.sha256}"
    return ""


def _reason(error: requests.RequestException) -> str:
    """Our own words, or the kind of what a library says at length."""
    return next((a for a in error.args if isinstance(a, str)), type(error).__name__)
