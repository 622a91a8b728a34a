"""Data by name, against a hub of our own on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import tiktoken

import data.prepare as prepare
from data.chat import parse
from data.shards import load_examples
from data.sources import download as downloads
from data.sources.download import RemoteFile, download, hub_files
from data.sources.named import NAMED, next_command
from data.sources.read import read_conversations
from data.tokenizer import Tokenizer, create_tokenizer
from runtime.files import lock, read_meta, sha256_file, write_meta
from tests.conftest import Fails
from tests.hub import Hub

ROOT = Path(__file__).resolve().parent.parent

REPO, CONTENT = "datasets/me/mine", bytes(range(256)) * 999


@pytest.fixture
def one(hub: Hub) -> RemoteFile:
    """The only file of a repository, of which size and sha256 are known."""
    hub.files[REPO]["data/one.parquet"] = CONTENT
    [file] = hub_files("me/mine", "datasets", ["data/*"])
    return file


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def ranges(hub: Hub) -> list[str | None]:
    return [headers.get("Range") for headers in hub.requests("/cdn/")]


# ---- the listing ---------------------------------------------------------------------------


def test_the_listing_is_read_to_its_end_and_filtered(hub: Hub) -> None:
    names = [f"data/train-{i}.parquet" for i in range(5)] + ["data/test-0.parquet", "card é.md"]
    hub.files["me/model"] = {name: name.encode() for name in names}
    hub.files["models/me/model"] = hub.files["me/model"]
    found = hub_files("me/model", "models", ["data/train-*.parquet", "*.md"])
    assert [f.name for f in found] == ["card é.md", *names[:5]]
    assert found[0].sha256 is None
    assert found[1].sha256 == hashlib.sha256(names[0].encode()).hexdigest()
    assert found[1].size == len(names[0])
    assert found[0].url == f"{hub.url}/me/model/resolve/main/card%20%C3%A9.md"


def test_the_token_goes_to_the_hub_and_to_nobody_else(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.files[REPO]["a.txt"] = b"words"
    files = hub_files("me/mine", "datasets", ["*"])
    download(files, tmp_path)
    assert (tmp_path / "a.txt").read_bytes() == b"words"
    assert hub.requests("/api/")[0]["Authorization"] == "Bearer secret"
    assert [p for p, headers in hub.log if "Authorization" in headers and "/cdn/" in p] == []
    other = f"http://localhost:{hub.server_port}/{REPO}/resolve/main/a.txt"
    download([RemoteFile("b.txt", other, 5)], tmp_path)
    assert "Authorization" not in hub.log[-2][1]


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "answers 404; check the name"), (401, "set HF_TOKEN"), (403, "accept its terms")],
)
def test_a_refused_repository_is_one_clear_error(hub: Hub, status: int, reason: str) -> None:
    hub.refuse["/api/"] = status
    with pytest.raises(ValueError, match=reason):
        hub_files("me/nothing", "datasets", ["*"])


def test_what_is_no_hub_is_one_clear_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files[REPO]["a.txt"] = b""
    with pytest.raises(ValueError, match=r"no file matches \*\.parquet; it holds a\.txt"):
        hub_files("me/mine", "datasets", ["*.parquet"])
    hub.refuse["/api/"] = 503
    with pytest.raises(ValueError, match=r"cannot reach .* answers 503.*HF_ENDPOINT to a mirror"):
        hub_files("me/mine", "datasets", ["*"])
    hub.refuse["/api/"] = 200  # with a page that is no listing
    with pytest.raises(ValueError, match="is not the listing of a hub"):
        hub_files("me/mine", "datasets", ["*"])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"cannot reach http://127.0.0.1:1 \(ConnectionError\)"):
        hub_files("me/mine", "datasets", ["*"])


# ---- downloads -----------------------------------------------------------------------------


def test_a_second_call_asks_for_nothing(
    hub: Hub, one: RemoteFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [path] = download([one], tmp_path)
    assert path == tmp_path / "data" / "one.parquet"
    assert path.read_bytes() == CONTENT
    assert capsys.readouterr().out == f"{path}: {len(CONTENT):,} bytes\n"
    before = len(hub.log)
    assert download([one], tmp_path) == [path]
    assert len(hub.log) == before
    path.write_bytes(CONTENT[:-1] + b"?")  # of the right size
    download([one], tmp_path)
    assert path.read_bytes() == CONTENT
    assert left(tmp_path) == ["one.parquet"]


def test_a_cut_connection_goes_on_where_it_was(hub: Hub, one: RemoteFile, tmp_path: Path) -> None:
    hub.cuts["data/one.parquet"] = [1000, *[499] * 3, 5000, 70_000, *[500] * 9]
    [path] = download([one], tmp_path)
    assert path.read_bytes() == CONTENT
    starts = [1000] * 4 + [6000, *range(76_000, 80_501, 500)]
    assert ranges(hub) == [None, *(f"bytes={start}-" for start in starts)]
    assert left(tmp_path) == ["one.parquet"]


def test_without_ranges_it_begins_again(hub: Hub, one: RemoteFile, tmp_path: Path) -> None:
    hub.ranges = False
    hub.cuts["data/one.parquet"] = [1000, 500, 2000]
    [path] = download([one], tmp_path)
    assert path.read_bytes() == CONTENT
    assert left(tmp_path) == ["one.parquet"]


@pytest.mark.parametrize("with_ranges", [True, False])
def test_what_stays_cut_is_one_clear_error_and_can_go_on(
    hub: Hub, one: RemoteFile, with_ranges: bool, tmp_path: Path
) -> None:
    hub.ranges = with_ranges
    hub.cuts["data/one.parquet"] = [1000] + [0 if with_ranges else 1000] * 20
    with pytest.raises(ValueError, match=r"cannot be fetched.*1,000 bytes are kept") as info:
        download([one], tmp_path)
    assert "\n" not in str(info.value)
    [part] = left(tmp_path)
    assert part.endswith(".part")
    assert len(ranges(hub)) == 1 + downloads.RETRIES
    hub.cuts.clear()
    hub.log.clear()
    [path] = download([one], tmp_path)  # another process, for all it knows
    assert path.read_bytes() == CONTENT
    assert ranges(hub) == ["bytes=1000-"]
    assert left(tmp_path) == ["one.parquet"]


def interrupted(hub: Hub, file: RemoteFile, folder: Path, n_bytes: int) -> None:
    """What a killed process leaves: the first bytes under the temporary name."""
    hub.cuts[file.name] = [n_bytes] + [0] * 20
    with pytest.raises(ValueError, match="bytes are kept"):
        download([file], folder)
    hub.cuts.clear()
    hub.log.clear()


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 5])
def test_a_file_that_changed_on_the_server_begins_again(
    hub: Hub, one: RemoteFile, size: int, tmp_path: Path
) -> None:
    interrupted(hub, one, tmp_path, 1000)
    hub.files[REPO][one.name] = new = bytes(size)
    one = dataclasses.replace(one, size=size, sha256=hashlib.sha256(new).hexdigest())
    [path] = download([one], tmp_path)
    assert path.read_bytes() == new
    assert ranges(hub) == ["bytes=1000-", None]
    assert left(tmp_path) == ["one.parquet"]


def test_a_partial_file_longer_than_the_servers_begins_again(
    hub: Hub, one: RemoteFile, tmp_path: Path
) -> None:
    interrupted(hub, one, tmp_path, 1000)
    hub.files[REPO][one.name] = new = b"short"
    [path] = download(
        [RemoteFile(one.name, one.url, 5)], tmp_path
    )  # the answer to the range is 416
    assert path.read_bytes() == new
    assert left(tmp_path) == ["one.parquet"]


def test_a_whole_partial_file_is_only_checked(hub: Hub, one: RemoteFile, tmp_path: Path) -> None:
    interrupted(hub, one, tmp_path, 1000)
    [part] = (tmp_path / "data").iterdir()
    part.write_bytes(CONTENT)  # killed before the last step
    download([one], tmp_path)
    assert hub.log == []
    assert left(tmp_path) == ["one.parquet"]


@pytest.mark.parametrize(
    ("lie", "reason"),
    [({"sha256": "0" * 64}, f"sha256 .* instead of {'0' * 64}"), ({"size": 7}, "instead of 7")],
)
def test_a_wrong_byte_leaves_nothing(
    hub: Hub, one: RemoteFile, lie: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    reason = f"data/one.parquet .* damaged.*{reason}.*; give the same command again"
    with pytest.raises(ValueError, match=reason) as info:
        download([dataclasses.replace(one, **lie)], tmp_path)
    assert "\n" not in str(info.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/a", "", ".", "..\\a", "C:\\a", "C:a"])
def test_a_name_that_leaves_the_folder_is_refused(hub: Hub, name: str, tmp_path: Path) -> None:
    hub.files[REPO]["a"] = b"x"
    with pytest.raises(ValueError, match="not inside"):
        download([RemoteFile(name, f"{hub.url}/{REPO}/resolve/main/a", 1)], tmp_path / "in")
    assert hub.log == []
    assert left(tmp_path) == []


def test_what_cannot_fit_is_refused_before_it_begins(
    hub: Hub, one: RemoteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(hub, one, tmp_path, 1000)
    free = len(CONTENT) - 1001
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(ValueError, match=r"GB to download do not fit in .* GB of free disk"):
        download([one], tmp_path)
    assert hub.log == []
    free += 1
    download([one], tmp_path)


def test_a_full_disk_leaves_what_is_there_to_go_on_with(
    hub: Hub, one: RemoteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > 3000:
                super().write(data[: 3000 - self.tell()])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "open", Full, raising=False)
        with pytest.raises(ValueError, match=r"one\.parquet: the disk is full; make room") as info:
            download([one], tmp_path)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "data" / "one.parquet").exists()
    hub.log.clear()
    download([one], tmp_path)
    assert ranges(hub) == ["bytes=3000-"]
    assert left(tmp_path) == ["one.parquet"]


def test_two_downloads_into_one_folder_are_not_mixed(
    hub: Hub, one: RemoteFile, tmp_path: Path
) -> None:
    with (
        lock(tmp_path, "downloading into"),
        pytest.raises(ValueError, match=f"another process is downloading into {tmp_path}$"),
    ):
        download([one], tmp_path)
    assert hub.requests("/resolve/") == []
    with pytest.raises(ValueError, match="damaged"):
        download([dataclasses.replace(one, size=7)], tmp_path)
    [path] = download([one], tmp_path)  # a failure holds nothing
    assert path.read_bytes() == CONTENT


def test_a_lock_ends_with_its_process_and_follows_no_link(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from runtime.files import lock\n"
    code += "with lock(Path(sys.argv[1]), ''): print(1, flush=True); sys.stdin.read()"
    command, pipe = [sys.executable, "-c", code, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe) as other:
        assert other.stdout
        assert other.stdout.read(1) == b"1"
        with pytest.raises(ValueError, match="another process is at"), lock(tmp_path, "at"):
            pass
        other.kill()
    with lock(tmp_path, "at"):
        pass
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=r"\.lock"), lock(tmp_path, "at"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_worked_on_unguarded(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", none)
    with lock(tmp_path, "at"), lock(tmp_path, "at"):
        assert left(tmp_path) == []


def test_a_body_longer_than_the_listing_says_is_not_read_to_its_end(
    hub: Hub, one: RemoteFile, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"\(1,000 bytes instead of 700\)"):  # of two blocks
        download([dataclasses.replace(one, size=700, sha256=None)], tmp_path)
    assert left(tmp_path) == []


@pytest.mark.parametrize("chunked", [True, False])
def test_a_server_that_tells_no_length_is_resumed_too(
    hub: Hub, one: RemoteFile, chunked: bool, tmp_path: Path
) -> None:
    hub.lengths, hub.chunked = False, chunked
    hub.cuts["data/one.parquet"] = [1000, 500]
    [path] = download([one], tmp_path)
    assert path.read_bytes() == CONTENT
    assert ranges(hub) == [None, "bytes=1000-", "bytes=1500-"]


@pytest.mark.parametrize("token", ["sec\rret", "secrét", "sec\u2028ret"])
def test_a_token_that_is_none_is_named_and_never_shown(
    hub: Hub, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files[REPO]["a.txt"] = b"words"
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match="HF_TOKEN holds a character") as info:
        hub_files("me/mine", "datasets", ["*"])
    assert "ret" not in str(info.value).replace("secret", "")
    assert hub.log == []
    monkeypatch.setenv("HF_TOKEN", " secret\r\n")
    hub_files("me/mine", "datasets", ["*"])
    assert hub.requests("/api/")[0]["Authorization"] == "Bearer secret"


def test_a_listing_and_a_file_wait_for_a_busy_server(
    hub: Hub, one: RemoteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(downloads, "BACKOFF", 1)
    hub.busy = [{}, {"Retry-After": "7"}, {"Retry-After": "9999"}, {"Retry-After": "Sun"}, {}]
    assert hub_files("me/mine", "datasets", ["*"]) == [one]
    assert waits == [1, 7, downloads.PATIENCE, 8, 16]
    hub.busy, waits[:] = [{}, {"Retry-After": "3"}], []
    [path] = download([one], tmp_path)
    assert path.read_bytes() == CONTENT
    assert waits == [1, 3]
    hub.busy, waits[:] = [{}] * 9, []
    with pytest.raises(ValueError, match=r"cannot reach .* answers 429"):
        hub_files("me/mine", "datasets", ["*"])
    assert waits == [1, 2, 4, 8, 16]
    waits.clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot reach"):
        hub_files("me/mine", "datasets", ["*"])
    assert waits == []  # nobody there: the network, or the name
    waits.clear()
    for address in ("hub.example.org", "http://me:secret@127.0.0.1", "http://[bad", "ftp://x"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(ValueError, match="HF_ENDPOINT is no address") as error:
            hub_files("me/mine", "datasets", ["*"])
        assert "secret" not in str(error.value)
    assert waits == []  # what never passes is not waited for


@pytest.mark.parametrize(
    "lie", [{"size": "5"}, {"size": -1}, {"size": True}, {"size": 10**400}, {"path": 5}]
)
def test_a_listing_of_another_shape_is_one_clear_error(hub: Hub, lie: dict[str, Any]) -> None:
    hub.files[REPO]["a.txt"] = b"words"
    hub.listed["a.txt"] = lie
    with pytest.raises(ValueError, match="is not the listing of a hub"):
        hub_files("me/mine", "datasets", ["*"])


@pytest.mark.parametrize("n_files", [0, 9])  # a page leads to itself, or the last to the first
def test_a_listing_that_goes_round_is_one_clear_error(hub: Hub, n_files: int) -> None:
    hub.files[REPO].update({f"{i}.txt": b"" for i in range(n_files)})
    hub.round = True
    with pytest.raises(ValueError, match="is not the listing of a hub"):
        hub_files("me/mine", "datasets", ["*"])
    assert len(hub.log) < 9


def test_a_listing_without_an_end_is_one_clear_error(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files[REPO].update({f"{i}.txt": b"" for i in range(9)})
    reason = "listing of a hub, or one without an end; set HTTPS_PROXY"
    monkeypatch.setattr(downloads, "PAGES", 30)
    hub.more = 100
    with pytest.raises(ValueError, match=reason):
        hub_files("me/mine", "datasets", ["*"])
    assert len(hub.log) == 30
    hub.more = 0
    monkeypatch.setattr(downloads, "LISTING", 1000)  # bytes, of two pages that hold 2000
    monkeypatch.setattr("tests.hub.PAGE", 5)
    hub.padding = 700
    with pytest.raises(ValueError, match=reason):
        hub_files("me/mine", "datasets", ["*"])
    hub.padding, hub.log[:] = 10**7, []
    with pytest.raises(ValueError, match=reason):
        hub_files("me/mine", "datasets", ["*"])
    assert len(hub.log) == 1


def test_a_listing_of_thousands_of_files_is_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.hub.PAGE", 1000)
    hub.files[REPO].update({f"data/train-{i:05}.parquet": b"" for i in range(9000)})
    assert len(hub_files("me/mine", "datasets", ["data/*"])) == 9000
    assert len(hub.log) == 10


# ---- without a network ---------------------------------------------------------------------

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would be slept."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def test_the_first_contact_fails_at_once_and_names_what_helps(
    waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    reason = "cannot reach .*HTTPS_PROXY.*HF_ENDPOINT.*`python -m data.prepare text FILES`"
    with pytest.raises(ValueError, match=reason) as info:
        hub_files("me/mine", "datasets", ["*"])
    assert len(str(info.value)) < 400
    with pytest.raises(ValueError, match=r"cannot be fetched .*HTTPS_PROXY.*HF_ENDPOINT"):
        download([RemoteFile("a.txt", f"{NOBODY}/a.txt", 5)], tmp_path)
    monkeypatch.delenv("HF_ENDPOINT")
    reason = r"cannot be fetched .*HTTPS_PROXY.*with a browser .*`python -m data.prepare text FILES"
    with pytest.raises(ValueError, match=reason) as info:
        download([RemoteFile("a.txt", f"{NOBODY}/a.txt", 5)], tmp_path)
    assert len(str(info.value)) < 400
    assert "HF_ENDPOINT" not in str(info.value)
    assert waits == []


def test_later_failures_are_waited_for(
    hub: Hub, one: RemoteFile, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "BACKOFF", 1)
    hub.cuts["data/one.parquet"] = [0, 0]  # it had answered
    with pytest.raises(ValueError, match=r"b\.txt cannot be fetched"):
        download([one, RemoteFile("b.txt", f"{NOBODY}/b.txt", 5)], tmp_path)
    assert waits == [1, 2, 1, 2, 4, 8, 16]
    assert (tmp_path / "data" / "one.parquet").read_bytes() == CONTENT
    waits.clear()
    real = downloads._get
    pages = iter([real, real, lambda url: real(NOBODY), real, real])
    monkeypatch.setattr(downloads, "_get", lambda url: next(pages)(url))
    hub.files[REPO].update({f"{i}.txt": b"" for i in range(3)})
    assert len(hub_files("me/mine", "datasets", ["*"])) == 4
    assert waits == [1]


@pytest.fixture
def silent() -> Iterator[tuple[str, int]]:
    """An address that takes no connection and refuses none: its backlog is full."""
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(address.getsockname())
        yield address.getsockname()


def resolved(*addresses: tuple[str, int]) -> Callable[..., Any]:
    """A getaddrinfo by which every name has these addresses."""
    kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    return lambda *args, **options: [(*kind, address) for address in addresses]


def test_a_resolver_and_addresses_that_are_silent_are_not_waited_for(
    silent: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("requests.get", lambda url, **options: asked.append(url))
    monkeypatch.setattr(downloads, "CONNECT", 0.2)
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:1")
    monkeypatch.setenv("no_proxy", "localhost")
    never = threading.Event()
    for names in (lambda *args, **options: [never.wait(60)][:0], resolved(*[silent] * 8)):
        with monkeypatch.context() as patch:
            patch.setattr("socket.getaddrinfo", names)
            with pytest.raises(ValueError, match=r"localhost:1 \(no connection within 0.2 s\)"):
                hub_files("me/mine", "datasets", ["*"])
    never.set()
    assert asked == []  # which has no limit for a name, and one for each address


def test_a_host_that_is_slow_to_find_is_not_refused(
    hub: Hub, silent: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files[REPO]["a.txt"] = b"words"
    monkeypatch.setattr(downloads, "CONNECT", 0.5)
    at = ("127.0.0.1", hub.server_port)
    monkeypatch.setattr("socket.getaddrinfo", resolved(silent, silent, at))
    monkeypatch.setenv("HF_ENDPOINT", f"http://localhost:{hub.server_port}")
    monkeypatch.setenv("no_proxy", "localhost")
    assert len(hub_files("me/mine", "datasets", ["*"])) == 1


def test_a_proxy_is_the_host_that_must_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files[REPO]["a.txt"] = b"words"
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", hub.url)
    never, real = threading.Event(), socket.getaddrinfo

    def names(host: str, *args: Any, **options: Any) -> Any:  # but for the proxy's, silent
        return real(host, *args, **options) if host == "127.0.0.1" else [never.wait(60)][:0]

    monkeypatch.setattr("socket.getaddrinfo", names)
    assert len(hub_files("me/mine", "datasets", ["*"])) == 1
    never.set()


def test_only_the_connection_has_a_short_limit(
    hub: Hub, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[Any] = []

    def get(url: str, timeout: Any = None, **options: Any) -> None:
        limits.append(timeout)
        raise requests.ConnectTimeout

    monkeypatch.setattr("requests.get", get)
    monkeypatch.setattr(downloads, "_knock", lambda url: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    with pytest.raises(ValueError, match="cannot reach"):
        hub_files("me/mine", "datasets", ["*"])
    with pytest.raises(ValueError, match="GPT-2's vocabulary is neither cached nor reachable"):
        create_tokenizer("gpt2", [])
    assert limits == [(downloads.CONNECT, 60)] * 2
    assert downloads.CONNECT < 4  # of 5 in all


# ---- the named sets ------------------------------------------------------------------------

STORIES = [f"Story {i}: é <|endoftext|>" + " once" * (i % 7) for i in range(40)]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    f = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), f, row_group_size=7)
    return f.getvalue()


def shards(folder: str) -> dict[str, bytes]:
    """The stories in two files, and others that are not part of the set."""
    rows = [{"id": i, "text": story, "score": 0.5} for i, story in enumerate(STORIES)]
    parts = {f"{folder}-0000{i}-of-00002.parquet": rows[i * 25 : i * 25 + 25] for i in range(2)}
    others = {"data/test-0.parquet": parquet(rows[:1]), "README.md": b"# card"}
    return {name: parquet(part) for name, part in parts.items()} | others


def turns(*contents: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def tree(i: int) -> list[dict[str, Any]]:
    """A tree whose best path is q, a, q2, a2; it goes on with a question that nobody answered."""

    def message(name: str, parent: str | None, rank: int | None, **more: Any) -> dict[str, Any]:
        role = "prompter" if name.startswith("q") else "assistant"
        content = {"message_id": f"{name}{i}", "parent_id": parent and f"{parent}{i}", "rank": rank}
        more = {"lang": "en", "deleted": False, "labels": {"name": ["x"]}, **more}
        return {**content, "text": f"{name} of {i}", "role": role, **more}

    return [
        message("q", None, None),
        message("abad", "q", 1),
        message("a", "q", 0),
        message("agone", "q", -1, deleted=True),
        message("q2", "a", None),
        message("qother", "a", None),
        message("aforeign", "q2", 0, lang="de"),
        message("a2", "q2", 1),
        message("qend", "a2", 0),
    ]


N = 12
QA_FILES: dict[str, dict[str, bytes]] = {
    "dolly": {
        "databricks-dolly-15k.jsonl": lines(
            [
                {"instruction": f"q{i}", "context": "c" * (i % 2), "response": f"a{i}"}
                for i in range(N)
            ]
            + [{"instruction": "q", "context": "", "response": " "}] * 2
        )
    },
    "alpaca": {
        "alpaca_data_cleaned.json": json.dumps(
            [{"instruction": f"q{i}", "input": "c" * (i % 2), "output": f"a{i}"} for i in range(N)]
        ).encode(),
        "alpaca_data.json": b"[]",
    },
    "smoltalk": {
        "data/all/train-00000-of-00001.parquet": parquet(
            [{"messages": turns(f"q{i}", "a", "b", "c" * (i + 1)), "source": "x"} for i in range(N)]
        ),
        "data/all/test-00000-of-00001.parquet": b"",
        "data/other/train-00000-of-00001.parquet": b"",
    },
    "oasst1": {
        "data/train-00000-of-00001-b42a.parquet": parquet(
            [row for i in range(N) for row in tree(i)]
            + [{**tree(99)[0], "lang": "es"}, {**tree(98)[0], "message_id": "lonely"}]
        )
    },
}
CONTEXTS = [turns(f"q{i}" + "\n\nc" * (i % 2), f"a{i}") for i in range(N)]
QA_EXPECTED = {
    "dolly": CONTEXTS,
    "alpaca": CONTEXTS,
    "smoltalk": [turns(f"q{i}", "a", "b", "c" * (i + 1)) for i in range(N)],
    "oasst1": [turns(*(f"{name} of {i}" for name in ("q", "a", "q2", "a2"))) for i in range(N)],
}
SHARDS = {
    "tinystories": "data/train",
    "fineweb-edu": "sample/10BT/000",
    "openwebtext": "plain_text/train",
}


def conversations(folder: Path) -> list[Any]:
    tokenizer = Tokenizer.load(folder)
    rows = [row for part in ("train", "val") for row in load_examples(folder, part)]
    return sorted([parse(ids.tolist(), tokenizer) for ids, _ in rows], key=repr)


def tokens_of(folder: Path) -> dict[str, str]:
    return {f.name: sha256_file(f) for f in folder.glob("[!.]*") if f.name != "meta.json"}


@pytest.mark.parametrize("name", SHARDS)
def test_a_named_text_set_has_the_tokens_of_its_text(
    name: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files[f"datasets/{NAMED[name].source}"] = shards(SHARDS[name])
    out, folder = tmp_path / "out", tmp_path / "downloads"
    meta = prepare.fetch(name, out, folder, "byte", val_fraction=0.1, seed=3)
    assert meta["text"]["documents"] == len(STORIES)
    (tmp_path / "same.jsonl").write_bytes(lines([{"text": story} for story in STORIES]))
    prepare.prepare_text([tmp_path / "same.jsonl"], tmp_path / "same", "byte", 0.1, "text", 3)
    assert tokens_of(out) == tokens_of(tmp_path / "same")
    printed = capsys.readouterr().out
    assert f"{name}: 2 file(s), " in printed
    assert NAMED[name].licence in printed
    told = f"next: python train_pretrain.py --config {NAMED[name].recipe} --data.path={out}\n"
    assert told in printed
    hub.log.clear()
    assert prepare.fetch(name, out, folder, "byte", val_fraction=0.1, seed=3) == meta
    assert "nothing to do" in capsys.readouterr().out
    assert hub.requests("/resolve/") == []
    first = prepare.fetch(name, tmp_path / "first", folder, "byte", n_files=1, val_fraction=0.1)
    assert first["text"]["documents"] == 25


def test_every_set_names_a_recipe_that_is_there() -> None:
    for name, named in NAMED.items():
        assert (ROOT / named.recipe).is_file(), name
        assert ("pretrain" in named.recipe or "modern" in named.recipe) == (named.kind == "text")


def test_a_set_that_is_one_file_is_checked_against_its_sha256(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files[REPO]["input.txt"] = play = b"First Citizen:\r\nBefore we proceed" * 9
    real = NAMED["tinyshakespeare"]
    local = dataclasses.replace(real, source=f"{hub.url}/{REPO}/resolve/main/input.txt")
    monkeypatch.setitem(NAMED, "tinyshakespeare", local)
    with pytest.raises(ValueError, match=r"input\.txt .*297 bytes instead of 1,115,394"):
        prepare.fetch("tinyshakespeare", tmp_path / "out", tmp_path / "downloads")
    assert left(tmp_path) == []
    digest = hashlib.sha256(play).hexdigest()
    local = dataclasses.replace(local, size=len(play), sha256=digest)
    monkeypatch.setitem(NAMED, "tinyshakespeare", local)
    prepare.fetch("tinyshakespeare", tmp_path / "out", tmp_path / "downloads")
    (tmp_path / "same.txt").write_bytes(play)
    prepare.prepare_text([tmp_path / "same.txt"], tmp_path / "same", "byte", 0.1, "text", 1)
    assert tokens_of(tmp_path / "out") == tokens_of(tmp_path / "same")
    shared = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    if shared.exists():
        assert (shared.stat().st_size, sha256_file(shared)) == (real.size, real.sha256)


@pytest.mark.parametrize("name", QA_FILES)
def test_a_named_qa_set_has_its_conversations(
    name: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files[f"datasets/{NAMED[name].source}"] = QA_FILES[name]
    out = tmp_path / "out"
    meta = prepare.fetch(name, out, tmp_path / "downloads", "byte")
    assert conversations(out) == sorted(QA_EXPECTED[name], key=repr)
    assert meta["tokenizer"]["kind"] == "byte"
    printed = capsys.readouterr().out
    told = f"next: python train_sft.py --config {NAMED[name].recipe} --data.path={out}\n"
    assert told in printed
    n_bad = {"dolly": 2, "oasst1": 1}.get(name, 0)
    assert (f"skipped {n_bad} of {N + n_bad} examples" in printed) == bool(n_bad)
    assert printed.count("skipped") == 2 * bool(n_bad)
    again = prepare.fetch(name, tmp_path / "other", tmp_path / "downloads", tokenizer_of=out)
    assert again["tokenizer"] == meta["tokenizer"]
    assert tokens_of(tmp_path / "other") == tokens_of(out)
    assert "--base" not in capsys.readouterr().out  # a data folder is none
    base, meta = tmp_path / "a base", read_meta(shutil.copytree(out, tmp_path / "a base"))
    del meta["request"]
    write_meta(base, meta)
    prepare.fetch(name, tmp_path / "third", tmp_path / "downloads", tokenizer_of=base)
    assert f" '--base={base}' --data.path={tmp_path / 'third'}\n" in capsys.readouterr().out


def test_the_next_command_names_the_data_only_where_the_recipe_does_not() -> None:
    command = "python train_pretrain.py --config configs/tinystories/pretrain.toml"
    assert next_command(NAMED["tinystories"], Path("out/tinystories/data"), None) == command


@pytest.fixture
def stories(hub: Hub, tmp_path: Path) -> Callable[..., Any]:
    """Fetches two small files by a name."""
    hub.files["datasets/roneneldan/TinyStories"] = shards("data/train")

    def fetched(out: str = "out", tokenizer: str = "byte", **options: Any) -> Any:
        folder = tmp_path / "downloads"
        return prepare.fetch("tinystories", tmp_path / out, folder, tokenizer, **options)

    return fetched


def test_an_out_that_cannot_be_is_refused_before_the_download(
    hub: Hub, stories: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"mine has no meta\.json"):
        stories("mine")
    assert hub.requests("/resolve/") == []
    stories()
    shutil.rmtree(tmp_path / "downloads")
    hub.log.clear()
    for options, key in (
        ({"tokenizer": "bpe:300"}, "tokenizer"),
        ({"val_fraction": 0.3}, "val_fraction"),
        ({"seed": 2}, "seed"),
        ({"n_files": 1}, "text"),
    ):
        with pytest.raises(ValueError, match=rf"other inputs \({key}\)"):
            stories(**options)
    hub.files["datasets/roneneldan/TinyStories"] |= {"data/train-00000-of-00002.parquet": b"new"}
    with pytest.raises(ValueError, match=r"other inputs \(text\)"):
        stories()
    assert hub.requests("/resolve/") == []


def test_what_cannot_be_prepared_is_refused_before_the_download(
    hub: Hub, stories: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(len(content) for name, content in shards("data/train").items() if "train" in name)
    free = {"downloads": size, "out": 8 * size, "mine": 8 * size - 1}  # of byte tokens, twice
    numbers = {"downloads": 1, "out": 2, "mine": 3}  # of disks

    def existing(path: Path) -> Any:
        return SimpleNamespace(
            name=path.name, stat=lambda: SimpleNamespace(st_dev=numbers[path.name])
        )

    monkeypatch.setattr(downloads, "_existing", existing)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[path.name]))
        with pytest.raises(ValueError, match=r"mine: .* GB to prepare do not fit"):
            stories("mine")
        numbers["out"] = numbers["downloads"]
        free["downloads"] = 9 * size - 1
        with pytest.raises(ValueError, match=r"downloads: .* GB to download and prepare do not"):
            stories()
        assert hub.requests("/resolve/") == []
        free["downloads"] = 9 * size
        stories()
        free["downloads"] = 0
        stories()  # of what is there already nothing is needed


def test_without_the_hub_what_came_before_is_named(
    hub: Hub, stories: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stories()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=rf"cannot reach .* is in {tmp_path / 'downloads'}$"):
        stories()


def test_trees_end_even_if_a_message_answers_itself(tmp_path: Path) -> None:
    rows = [*tree(0), {**tree(0)[7], "message_id": "a0", "rank": 0}]
    (tmp_path / "a.jsonl").write_bytes(lines([*rows, {"text": "x"}, *tree(1), *tree(2)]))
    base, file = tmp_path / "base", tmp_path / "a.jsonl"
    (tmp_path / "a.txt").write_text("words " * 20)
    prepare.prepare_text([tmp_path / "a.txt"], base, "byte", 0.1, "text", 1)
    options: dict[str, Any] = {"val_fraction": 0.1, "seed": 1, "skip_bad": True, "trees": True}
    prepare.prepare_qa([file], tmp_path / "qa", base, **options)
    assert len(conversations(tmp_path / "qa")) == 3


@pytest.mark.parametrize("odd", [{"parent_id": []}, {"message_id": [1]}, {"rank": "x"}])
def test_a_message_of_a_tree_of_another_shape_is_one_clear_error(
    odd: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([*tree(0), {**tree(1)[0], **odd}]))
    with pytest.raises(ValueError, match="of a message of a tree is no"):
        list(read_conversations([tmp_path / "a.jsonl"], skip_bad=False, trees=True))


def test_a_damaged_shard_is_one_clear_error_and_no_folder(hub: Hub, tmp_path: Path) -> None:
    files = shards("data/train")
    hub.files["datasets/roneneldan/TinyStories"] = files
    files["data/train-00001-of-00002.parquet"] = files["data/train-00001-of-00002.parquet"][:-30]
    with pytest.raises(ValueError, match=r"00001-of-00002\.parquet is not a whole parquet file"):
        prepare.fetch("tinystories", tmp_path / "out", tmp_path / "downloads", "byte")
    assert not (tmp_path / "out").exists()


def test_the_command_line_fetches_and_fails_in_one_line(
    hub: Hub, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "data.prepare", "fetch", *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )

    listed = call("--list").stdout
    assert all(name in listed and s.licence in listed for name, s in NAMED.items())
    assert len(listed.splitlines()) == 1 + len(NAMED)
    hub.files["datasets/databricks/databricks-dolly-15k"] = QA_FILES["dolly"]
    done = call("dolly", "--tokenizer", "byte")
    assert (done.returncode, done.stderr) == (0, "")
    assert left(tmp_path / "out" / "downloads" / "dolly") == ["databricks-dolly-15k.jsonl"]
    assert len(conversations(tmp_path / "out" / "dolly" / "data")) == N
    file = tmp_path / "out" / "dolly" / "data" / "qa_train_ids.npy"
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "up to date" in call("dolly", "--tokenizer", "byte").stdout
    monkeypatch.chdir(tmp_path)
    for arguments, reason in (
        (("dolly", "--tokenizer", "byte", "--verify"), "qa_train_ids.npy has changed"),
        (
            ("dolly", "--val-fraction", "1.5"),
            "--val-fraction is 1.5; it must be above 0 and below 1",
        ),
        (("dolly", "--files", "0"), "--files is 0; it must be 1 or more"),
        (("alpaca", "--tokenizer", "byte"), "the server answers 401; check the name"),
        (("dolly", "--tokenizer", "bpe:300"), "name the base with --tokenizer-of"),
        (("tinystories", "--tokenizer-of", "x"), "--tokenizer-of is for Q&A"),
        (("novels",), "no data set is called 'novels'; there are tinyshakespeare, "),
    ):
        assert reason in fails(prepare, "fetch", *arguments)
