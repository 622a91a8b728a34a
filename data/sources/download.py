"""Files of the Hugging Face hub, or of any server: resumed, checked, whole or absent."""

import contextlib
import glob
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import requests
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from runtime.cli import say
from runtime.files import fingerprint, full_disk, lock, sha256_file

RETRIES = 5  # failures in a row that bring no byte more than the best before them
CONNECT = 3  # seconds for a host's name and its connection: who has no network wants to know
BACKOFF = 1.0  # seconds before the first retry, doubled for each further one
PATIENCE = 60  # seconds to wait at most where a server names a time
BLOCK = 1 << 13  # bytes; a cut loses what has come of a block
ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[\w./~-]*)?")
PAGES, LISTING = 1000, 1 << 25  # most pages of a listing, and bytes of all: some 90,000 files
OWN = "(text goes to `python -m data.prepare text FILES`, Q&A to `... qa`)"
ELSEWHERE = f"set HTTPS_PROXY to a working proxy, or download it with a browser {OWN}"
MIRROR = "set HTTPS_PROXY to a working proxy, HF_ENDPOINT to a mirror, or fetch the files elsewhere"
BY_HAND = {"datasets": f"{MIRROR} {OWN}", "models": f"{MIRROR} and give their folder"}
REMEDIES = dict.fromkeys((401, 404), "check the name, and set HF_TOKEN if it is private")
REMEDIES[403] = "accept its terms in a browser, then set HF_TOKEN to your access token"
NEVER = (ValueError, requests.TooManyRedirects, requests.exceptions.ContentDecodingError)  # passes
Kind = Literal["models", "datasets"]
Need = tuple[Path, float, str]  # a folder, the bytes that it needs, and a verb that says what for


@dataclass(frozen=True)
class RemoteFile:
    """A file to download: `name` is its path under the target folder, size is in bytes."""

    name: str
    url: str
    size: int
    sha256: str | None = None


class NoAnswer(requests.ConnectionError):
    """Of a request no answer has begun."""


def endpoint() -> str:
    """The hub, or the mirror that HF_ENDPOINT names. Raises ValueError: it names none."""
    address = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"
    if not ADDRESS.fullmatch(address):  # which is not shown: a password may stand in it
        raise ValueError("HF_ENDPOINT is no address such as https://hub.example.org; set it again")
    return address


def hub_files(repo: str, kind: Kind, patterns: Sequence[str]) -> list[RemoteFile]:
    """The files of a hub repository that match a pattern, by name. Raises ValueError: none does."""
    where = f"{endpoint()}/{'' if kind == 'models' else 'datasets/'}{repo}"
    tree = f"{endpoint()}/api/{kind}/{repo}/tree/main"
    files, query, asked, room = list[RemoteFile](), "recursive=true", set[str](), LISTING

    def page() -> tuple[bytes, str]:
        """A page, and the next one's query: no more, as a mirror may name the hub itself there."""
        with _get(f"{tree}?{query}") as response:
            body = b"".join(islice(response.iter_content(BLOCK), room // BLOCK))
            return body, response.links.get("next", {}).get("url", "").partition("?")[2]

    try:
        while query:
            asked.add(query)
            body, query = _patiently(page, first=len(asked) == 1)
            room -= len(body)
            if query in asked or len(asked) == PAGES:
                raise KeyError(query)  # it would go round, or on, for ever
            for entry in (e for e in json.loads(body) if e["type"] == "file"):
                name, size = entry["path"], entry["size"]
                if type(name) is not str or type(size) is not int or not 0 <= size < 1 << 63:
                    raise TypeError(entry)
                url, lfs = f"{where}/resolve/main/{quote(name)}", entry.get("lfs") or {}
                files.append(RemoteFile(name, url, size, lfs.get("oid")))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        what = f"{tree} is not the listing of a hub, or one without an end"
        raise ValueError(f"{what}; {BY_HAND[kind]}") from None
    except requests.RequestException as error:
        raise ValueError(f"cannot reach {endpoint()} ({_reason(error)}); {BY_HAND[kind]}") from None
    if not (kept := [f for f in files if any(fnmatch(f.name, p) for p in patterns)]):
        held = ", ".join(f.name for f in files[:5]) or "no file"
        raise ValueError(f"{where}: no file matches {', '.join(patterns)}; it holds {held} ...")
    return sorted(kept, key=lambda f: f.name)


def download(files: Sequence[RemoteFile], folder: Path, later: Sequence[Need] = ()) -> list[Path]:
    """Brings the files into `folder`; what is there already and right is not fetched again.

    A file has a temporary name, from which it can go on after a cut, until its size and its sha256
    are right. `later` is room that must stay after the download. Raises ValueError: an unsafe name,
    too little disk, a server that fails, wrong bytes, or another process that downloads there.
    """
    targets = {_target(folder, file.name): file for file in files}
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, transient=True, disable=not sys.stdout.isatty())
    with lock(folder, "downloading into"), bar:
        task = bar.add_task("checking", total=(total := sum(file.size for file in files)))
        missing = {t: f for t, f in targets.items() if not t.is_file() or _difference(f, t)}
        there = sum(_part(t)[1] if t in missing else f.size for t, f in targets.items())
        _check_space([(folder, total - there, "download"), *later])
        bar.update(task, completed=there)
        for i, (target, file) in enumerate(missing.items()):
            bar.update(task, description=escape(file.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            append = partial(_append, file, target, partial(bar.advance, task))
            try:
                with full_disk(target):
                    part: Path = _patiently(append, target, first=i == 0)
            except requests.RequestException as error:
                way = MIRROR if file.url.startswith(endpoint()) else ELSEWHERE
                what = f"{file.url} cannot be fetched ({_reason(error)})"
                kept = f"{_part(target)[1]:,} bytes are kept: give the same command again to go on"
                raise ValueError(f"{what}; {kept}, or {way}") from None
            if difference := _difference(file, part):
                part.unlink()
                what = f"{file.name} from {file.url} is damaged ({difference}) and was deleted"
                raise ValueError(f"{what}; give the same command again")
            part.replace(target)
            if bar.disable:
                say(f"{target}: {file.size:,} bytes")
    return [*targets]


def read_url(url: str) -> bytes:
    """The bytes of a small file. Raises RequestException or ValueError: they cannot be had."""
    with _get(url) as response:
        return bytes(response.content)


def _check_space(needs: Sequence[Need]) -> None:
    """Refuses before anything is written what would not fit."""
    disks = defaultdict[int, list[Need]](list)
    for need in needs:
        disks[_existing(need[0]).stat().st_dev].append(need)
    for paths, sizes, whats in (zip(*group, strict=True) for group in disks.values()):
        if sum(sizes) > (free := shutil.disk_usage(_existing(paths[0])).free):
            raise ValueError(
                f"{paths[0]}: {sum(sizes) / 1e9:.2f} GB to {' and '.join(whats)} do not fit in "
                f"{free / 1e9:.2f} GB of free disk; make room, or choose a folder on another disk"
            )


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(p for p in (path, *Path(os.path.realpath(path)).parents) if p.exists())


def _target(folder: Path, name: str) -> Path:
    """Where a file goes; its name comes from a server and must not lead out of the folder."""
    path = PureWindowsPath(name)  # knows every separator there is
    if not path.name or ".." in path.parts or path.anchor or "\0" in name:
        raise ValueError(f"the server names a file {name!r}, which is not inside {folder}; refused")
    return folder / PurePosixPath(name)


def _part(target: Path) -> tuple[Path | None, int]:
    """The temporary file of an unfinished download, if there is one, and its bytes."""
    part = next(target.parent.glob(f".{'?' * 16}.{glob.escape(target.name)}.part"), None)
    return part, part.stat().st_size if part else 0


def _patiently(work: Callable[[], Any], target: Path | None = None, *, first: bool) -> Any:
    """What `work` returns; or its error, after RETRIES in a row that brought `target` no byte, or
    at once if the `first` request of all has no answer: nothing is lost, and there is no network.
    """
    best = failures = 0
    while True:
        try:
            return work()
        except requests.RequestException as error:
            there, answer = _part(target)[1] if target else 0, error.response
            failures, best = 1 if there > best else failures + 1, max(there, best)
            first = first and isinstance(error, NoAnswer)
            if first or failures > RETRIES or isinstance(error, NEVER):
                raise
            asked = "" if answer is None else answer.headers.get("Retry-After", "")
            wanted = min(int(asked), PATIENCE) if asked.isdecimal() else 0
            pause = max(BACKOFF * 2 ** (failures - 1), wanted)
            say(f"{_reason(error)}: again in {pause:g} s")
            time.sleep(pause)


def _append(file: RemoteFile, target: Path, advance: Callable[[int], None]) -> Path:
    """Adds what is missing to the temporary file, or begins it anew; returns it once it is whole.
    Its name is a digest of the server's version (ETag, size): is it the beginning of what is there?
    """
    old, position = _part(target)
    if old and position == file.size:
        return old
    with _get(file.url, position) as response:
        headers, resumed = response.headers, response.status_code == 206
        mark = fingerprint([headers.get("ETag") or headers.get("Last-Modified"), file.size])
        part = target.with_name(f".{mark}.{target.name}.part")
        if old and not (resumed and old == part):
            old.unlink()
            advance(-position)
            position = 0
            if resumed or response.status_code == 416:
                raise requests.ConnectionError("the file has changed on the server")
        with open(part, "ab") as f:
            for block in response.iter_content(BLOCK):
                f.write(block)
                advance(len(block))
                position += len(block)
                if position > file.size:  # never to be right, and perhaps without an end
                    break
            if position < file.size and "Content-Length" not in headers:
                raise requests.ConnectionError("the connection was cut")
            f.flush()
            os.fsync(f.fileno())
    return part


def _get(url: str, start: int = 0) -> requests.Response:
    """A usable response, unpacked as sizes are, and from byte `start` on if the server can."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ValueError("HF_TOKEN holds a character that no access token has; set it again")
    if token and urlsplit(url)[:2] == urlsplit(endpoint())[:2]:
        headers["Authorization"] = f"Bearer {token}"  # requests drops it when led to another host
    try:
        _knock(url)
        response = requests.get(url, headers=headers, stream=True, timeout=(CONNECT, 60))
    except (requests.ConnectionError, requests.Timeout) as error:
        raise NoAnswer(_reason(error)) from None
    if (code := response.status_code) in (200, 206) or (code == 416 and start):
        return response
    response.close()
    if code == 429 or code >= 500:
        raise requests.ConnectionError(f"the server answers {code}", response=response)
    remedy = REMEDIES.get(code, MIRROR)
    raise ValueError(f"{url.split('?')[0]}: the server answers {code}; {remedy}")


def _knock(url: str) -> None:
    """Raises ConnectTimeout if no address of the host, or of the proxy to it, takes a connection
    in time: requests would try one after the other, and wait for the names' server without limit.
    """
    settled = threading.Event()

    def dial(family: int, kind: int, protocol: int, _: str, address: Any) -> None:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as connection:
            connection.connect(address)
            settled.set()

    def resolve() -> None:
        with contextlib.suppress(OSError, ValueError):  # of which requests is to tell
            proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
            at = urlsplit(requests.utils.prepend_scheme_if_needed(proxy or url, "http"))
            port = at.port or (443 if at.scheme == "https" else 80)
            found = socket.getaddrinfo(at.hostname, port, type=socket.SOCK_STREAM)
            dials = [threading.Thread(target=dial, args=a, daemon=True) for a in found]
            for thread in dials:
                thread.start()
            for thread in dials:
                thread.join()
        settled.set()

    threading.Thread(target=resolve, daemon=True).start()
    if not settled.wait(CONNECT):
        raise requests.ConnectTimeout(f"no connection within {CONNECT} s")


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
