"""Files of the Hugging Face hub, or of any server: resumed, checked, whole or absent."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal
from urllib.parse import quote, urlsplit

import requests
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from data.files import fingerprint, sha256_file

RETRIES = 4  # failures in a row that bring no byte more than the best before them
BACKOFF = 0.5  # seconds before the first retry, doubled for each further one
BLOCK = 1 << 16  # bytes; a cut loses what has come of a block
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
    size: int | None = None
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
    files, query = list[RemoteFile](), "recursive=true"
    try:
        with requests.Session() as session:
            while query:
                response = _get(session, f"{tree}?{query}")
                for entry in response.json():
                    if entry["type"] == "file":
                        path, digest = entry["path"], (entry.get("lfs") or {}).get("oid")
                        url = f"{where}/resolve/{quote(revision, safe='')}/{quote(path)}"
                        files.append(RemoteFile(path, url, entry["size"], digest))
                # Only the cursor of the next page is taken: a mirror may name the hub itself here.
                query = urlsplit(response.links.get("next", {}).get("url", "")).query
    except (requests.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{tree} is not the listing of a hub; {BY_HAND[kind]}") from None
    except requests.RequestException as error:
        raise ValueError(f"cannot reach {endpoint()} ({_reason(error)}); {BY_HAND[kind]}") from None
    kept = [f for f in files if any(fnmatch(f.name, pattern) for pattern in patterns)]
    if not kept:
        held = ", ".join(f.name for f in files[:5]) or "no file"
        raise ValueError(f"{where}: no file matches {', '.join(patterns)}; it holds {held} ...")
    return sorted(kept, key=lambda f: f.name)


def download(files: Sequence[RemoteFile], folder: Path) -> list[Path]:
    """Brings the files into `folder`; what is there already and right is not fetched again.

    A file is written under a temporary name, from which it can go on after a cut, and renamed
    once its size and its sha256 are right.

    Raises:
        ValueError: an unsafe name, too little disk, a server that fails, or wrong bytes.
    """
    pairs = [(file, _target(folder, file.name)) for file in files]
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, transient=True, disable=not sys.stdout.isatty())
    with bar, requests.Session() as session:
        known = None not in {file.size for file in files}
        task = bar.add_task("checking", total=sum(f.size or 0 for f in files) if known else None)
        missing = [(f, t) for f, t in pairs if not t.is_file() or _difference(f, t)]
        there = sum(part.stat().st_size for _, target in missing for part in _parts(target))
        needed = sum(file.size or 0 for file, _ in missing) - there
        folder.mkdir(parents=True, exist_ok=True)
        if needed > (free := shutil.disk_usage(folder).free):
            raise ValueError(
                f"{folder}: {needed / 1e9:.2f} GB to download do not fit in {free / 1e9:.2f} GB "
                "of free disk; make room, or choose another folder"
            )
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
    best = failures = 0
    while True:
        try:
            part = _append(session, file, target, show)
            break
        except requests.RequestException as error:
            there = max((p.stat().st_size for p in _parts(target)), default=0)
            failures = 1 if there > best else failures + 1
            best = max(best, there)
            if failures > RETRIES:
                raise ValueError(
                    f"{file.url} cannot be fetched ({_reason(error)}); {there:,} bytes are kept: "
                    f"give the same command again to go on, or {MIRROR}"
                ) from None
            time.sleep(BACKOFF * 2 ** (failures - 1))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ValueError(
                f"{target}: the disk is full; make room and give the same command again to go on"
            ) from None
    if difference := _difference(file, part):
        part.unlink()
        raise ValueError(f"{file.name} from {file.url} is damaged ({difference}) and was deleted")
    part.replace(target)


def _append(
    session: requests.Session, file: RemoteFile, target: Path, show: Callable[[int], None]
) -> Path:
    """Adds what is missing to the temporary file, or begins it anew; returns it once it is whole.

    Its name tells the server's version of the file (a digest of ETag and size), so that a later
    process too knows whether its bytes are a beginning of what the server has now.

    Raises:
        requests.RequestException: the connection broke, or a passing trouble of the server.
    """
    old = next(iter(_parts(target)), None)
    start = old.stat().st_size if old else 0
    if old and start == file.size:
        return old
    with _get(session, file.url, start) as response:
        headers, resumed = response.headers, response.status_code == 206
        total = int(headers.get("Content-Length", -1)) + start * resumed
        mark = fingerprint([headers.get("ETag") or headers.get("Last-Modified"), total])
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
            f.flush()
            os.fsync(f.fileno())
    return part


def _parts(target: Path) -> list[Path]:
    """The temporary file of an unfinished download, if there is one."""
    return list(target.parent.glob(f".{'?' * 16}.{glob.escape(target.name)}.part"))


def _get(session: requests.Session, url: str, start: int = 0) -> requests.Response:
    """A usable response, from byte `start` on if the server can.

    Raises:
        requests.RequestException: no connection, or a passing trouble of the server.
        ValueError: the server refuses.
    """
    headers = {"Accept-Encoding": "identity"}  # sizes and ranges are those of the file itself
    if start:
        headers["Range"] = f"bytes={start}-"
    token = os.environ.get("HF_TOKEN")
    if token and urlsplit(url)[:2] == urlsplit(endpoint())[:2]:
        headers["Authorization"] = f"Bearer {token}"  # requests drops it when led to another host
    response = session.get(url, headers=headers, stream=True, timeout=(10, 60))
    code = response.status_code
    if code in (200, 206) or (code == 416 and start):
        return response
    response.close()
    if code == 429 or code >= 500:
        raise requests.ConnectionError(f"the server answers {code}")
    remedy = "check the name, and set HF_TOKEN if it is private" if code in (401, 404) else MIRROR
    if code == 403:
        remedy = "accept its terms in a browser, then set HF_TOKEN to your access token"
    raise ValueError(f"{url.partition('?')[0]}: the server answers {code}; {remedy}")


def _difference(file: RemoteFile, path: Path) -> str:
    """What is wrong with the bytes at `path`; empty if nothing."""
    if file.size is not None and file.size != (size := path.stat().st_size):
        return f"{size:,} bytes instead of {file.size:,}"
    if file.sha256 and file.sha256 != (found := sha256_file(path)):
        return f"sha256 {found} instead of {file.sha256}"
    return ""


def _reason(error: requests.RequestException) -> str:
    """Our own words, or the kind of what a library says at length."""
    return next((a for a in error.args if isinstance(a, str)), type(error).__name__)
