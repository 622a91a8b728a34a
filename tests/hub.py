"""A Hugging Face hub of our own on this machine: its listing and its files."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

PAGE = 2  # entries of a listing's page


class Hub(ThreadingHTTPServer):
    """The hub's listing and files; what goes wrong is set by the tests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # Of each repository ("datasets/owner/name" or "owner/name"), by name.
        self.files: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.log: list[tuple[str, dict[str, str]]] = []
        self.cuts: dict[str, list[int]] = {}  # bytes after which the next answers for a file end
        self.refuse: dict[str, int] = {}  # status of every answer whose path begins so
        self.ranges = True
        self.lengths = True  # whether a file's answer tells its length; if not:
        self.chunked = False  # in chunks, or until the connection ends
        self.busy: list[dict[str, str]] = []  # headers of the next answers, which are 429
        self.round = False  # the last page of a listing leads to the first again
        self.more = 0  # empty pages after it
        self.padding = 0  # spaces before what a page lists
        self.listed: dict[str, dict[str, Any]] = {}  # lies of the listing about a file

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that has seen enough
            super().handle_error(request, client_address)

    def requests(self, part: str) -> list[dict[str, str]]:
        """Headers of the requests whose path contains `part`."""
        return [headers for path, headers in self.log if part in path]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.log.append((path, dict(self.headers)))
        if hub.busy:
            return self.answer(429, b"later", hub.busy.pop(0))
        for prefix, status in hub.refuse.items():
            if path.startswith(prefix):
                return self.answer(status, b"no")
        if path.startswith("/api/"):
            repo = path.removeprefix("/api/").removeprefix("models/").partition("/tree/")[0]
            return self.send_listing(repo)
        if path.startswith("/cdn/"):
            return self.send_content(path.removeprefix("/cdn/"))
        repo, _, rest = path.strip("/").partition("/resolve/main/")
        if rest in hub.files.get(repo, {}):  # another host, as the hub's own
            where = f"http://localhost:{hub.server_port}/cdn/{repo}/resolve/main/{rest}"
            return self.answer(302, b"", {"Location": where})
        return self.answer(404, b"no such file")

    def send_listing(self, repo: str) -> None:
        hub = self.server
        if repo not in hub.files:
            self.answer(401, b"unknown or private")
            return
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "data", "size": 0}]
        for name, content in hub.files[repo].items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": "0"}
            if name.endswith((".parquet", ".safetensors")):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
            entries.append(entry | hub.listed.get(name, {}))
        query = urlsplit(self.path).query
        assert "recursive=true" in query
        at = int(query.partition("cursor=")[2] or 0)
        headers = {}
        if (after := at + PAGE) < len(entries) + hub.more * PAGE or hub.round:
            here = f"https://elsewhere.invalid{urlsplit(self.path).path}"
            after = 0 if hub.round and after >= len(entries) else after
            headers["Link"] = f'<{here}?recursive=true&cursor={after}>; rel="next"'
        page = " " * hub.padding + json.dumps(entries[at : at + PAGE])
        self.answer(200, page.encode(), headers)

    def send_content(self, path: str) -> None:
        hub = self.server
        repo, _, name = path.partition("/resolve/main/")
        content = hub.files[repo][name]
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}
        start, status, wanted = 0, 200, self.headers.get("Range")
        if wanted and hub.ranges:
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            if start >= len(content):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = hub.cuts.get(name)
        limit = cut.pop(0) if cut else None
        if hub.lengths:
            self.answer(status, content[start:], headers, limit)
        else:
            self.answer_without_length(
                status, content[start:][:limit], headers | {"Whole": "no" if limit else "yes"}
            )

    def answer_without_length(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """As `answer`; what is cut ends the connection without a last chunk."""
        chunked, self.close_connection = self.server.chunked, True
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header(
            *(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close"))
        )
        self.end_headers()
        for i in range(0, len(body), 500):
            block = body[i : i + 500]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if chunked else block)
        if chunked and headers["Whole"] == "yes":
            self.wfile.write(b"0\r\n\r\n")

    def answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
