"""Both models in a browser: one prompt, two replies side by side that grow as they are sampled.

The page keeps its conversation. A request brings along all that its answer depends on, so that the
server remembers nothing and no two people's conversations can mix.

python -m lab.web --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import secrets
import threading
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any

import jinja2

from data.chat import Message, Prompt, render_prompt
from data.files import one_line_errors
from lab.likelihood import predictions
from lab.pair import CONTEXTS, plain_prompt, qa_of, questions_about, read_qa, world_of
from lab.plots import CLASS_COLORS
from lab.shift import class_of, ranks_of
from model.generate import Sampling, stream
from sample import continue_text, load_to_sample, put, unseen
from training.checkpoint import Checkpoint

MODELS = ("base", "instruct")
# How the base reads the conversation; the instruct model always reads the template.
FORMS: dict[str, Prompt] = {"chat": render_prompt, "plain": plain_prompt, "raw": continue_text}
SETTINGS = {"temperature": float, "top_k": int, "top_p": float, "seed": int, "max_new_tokens": int}
MAX_NEW_TOKENS = 4096  # of a reply, so that nobody holds the models for hours
MAX_BYTES = 1 << 20  # of a request
EXAMPLES = 5
GENERAL_EXAMPLES = ["What is a whale?", "How do I make tea?", "The best thing about winter is"]
# What a browser lets the page do: ask this server, draw itself, and nothing else.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; frame-ancestors 'none'"
)

Event = dict[str, Any]  # what becomes a line of JSON


@dataclass(frozen=True)
class Asked:
    """A request of the page.

    Attributes:
        messages: what was said with "base" and with "instruct", a prompt at the end of each.
        form: how the base reads it, one of FORMS.
        ids: the instruct model's reply, where it is to be looked at.
    """

    messages: dict[str, list[Message]]
    form: str
    sampling: Sampling
    ids: list[int]


def read_request(body: bytes) -> Asked:
    """Parses and checks what came over the network.

    Raises:
        ValueError: an empty prompt, settings out of range, or nothing that the page would send.
    """
    try:
        request = json.loads(body)
        turns, prompt, form = request["turns"], request["prompt"], request["form"]
        given, ids = dict(request["settings"]), list(request.get("ids", []))
        texts = [prompt, *given.values(), *(t[k] for t in turns for k in ("prompt", *MODELS))]
        if form not in FORMS or not all(type(text) is str for text in texts):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("this is not a request of the page; reload it") from None
    if not prompt.strip():
        raise ValueError("the prompt is empty; write something")
    messages: dict[str, list[Message]] = {}
    for name in MODELS:
        said = [("user", "prompt"), ("assistant", name)]
        messages[name] = [Message(role=role, content=t[key]) for t in turns for role, key in said]
        messages[name].append(Message(role="user", content=prompt))
    return Asked(messages, form, read_sampling(given), ids)


def read_sampling(given: dict[str, str]) -> Sampling:
    """Settings as they were typed; an empty field is the default.

    Raises:
        ValueError: not a number, or out of range.
    """
    values: dict[str, Any] = {}
    for name, number in SETTINGS.items():
        if text := given.get(name, "").strip():
            try:
                values[name] = number(text)
            except ValueError:
                kind = "a whole number" if number is int else "a number"
                raise ValueError(f"{name} is {text!r}; it must be {kind}") from None
    sampling = Sampling(**values)
    if sampling.max_new_tokens > MAX_NEW_TOKENS:
        found = sampling.max_new_tokens
        raise ValueError(f"max_new_tokens is {found}; on this page it is at most {MAX_NEW_TOKENS}")
    return sampling


def speak(checkpoint: Checkpoint, ids: list[int], sampling: Sampling) -> Iterator[Event]:
    """Yields each token of a reply with the text that it completes, then how the reply ended.

    A character of several tokens is held back until it is whole. The end of turn has no text.
    """
    tokenizer, token = checkpoint.tokenizer, None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for (token,) in stream(checkpoint.model, [ids], sampling, {tokenizer.end_of_turn}):
        assert token is not None  # the only row has not ended
        said = b"" if token == tokenizer.end_of_turn else tokenizer.token_bytes(token)
        yield {"id": token, "text": decoder.decode(said)}
    yield {"stopped": token == tokenizer.end_of_turn, "text": decoder.decode(b"", final=True)}


class Panels:
    """A base and an instruct model that several people ask at once.

    The lock lets one step of one model run at a time: two would only slow each other down, and
    while CUDA captures a graph no other thread may use the device.
    """

    def __init__(self, base: Checkpoint, instruct: Checkpoint) -> None:
        self.models = dict(zip(MODELS, (base, instruct), strict=True))
        self.lock = threading.Lock()

    def reply(self, asked: Asked) -> Iterator[Event]:
        """Yields what both models say, a token of each in turn."""
        speaking = {}
        for name, checkpoint in self.models.items():
            messages, before = asked.messages[name], len(asked.messages[name])
            form = FORMS[asked.form] if name == "base" else render_prompt
            ids = put(form, messages, checkpoint, asked.sampling.max_new_tokens)
            notes = [unseen(checkpoint, ids)]
            if forgotten := (before - len(messages)) // 2:
                notes.append(f"old turns that no longer fit: {forgotten}")
            yield {"model": name, "note": "; ".join(filter(None, notes))}
            speaking[name] = speak(checkpoint, ids, asked.sampling)
        try:
            while speaking:
                for name in list(speaking):
                    with self.lock:
                        event = next(speaking[name], None)
                    if event is None:
                        del speaking[name]
                    else:
                        yield {"model": name, **event}
        finally:
            with self.lock:  # also for giving back what a generator holds on the device
                speaking.clear()

    def ranks(self, asked: Asked) -> Iterator[Event]:
        """Yields each token of an instruct reply, and where the base would have had it.

        Raises:
            ValueError: no reply, or one that does not fit into the base's context.
        """
        base = self.models["base"]
        tokenizer, ids = base.tokenizer, asked.ids
        if not ids or not all(type(i) is int and 0 <= i < tokenizer.n_vocab for i in ids):
            raise ValueError("this is not a reply of the page; reload it")
        room = base.model.config.block_size + 1 - len(ids)
        if room < 1:
            raise ValueError(f"a reply of {len(ids)} tokens is too long to be ranked at once")
        messages, limit = asked.messages["instruct"], asked.sampling.max_new_tokens
        context = put(CONTEXTS[asked.form], messages, base, limit)
        with self.lock:
            logprobs = predictions(base, [context[-room:]], [ids])[0]
            ranks, favourites = ranks_of(ids, logprobs), logprobs.argmax(dim=1).tolist()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for n, (i, rank, favourite) in enumerate(zip(ids, ranks, favourites, strict=True), 1):
            text = decoder.decode(tokenizer.token_bytes(i), final=n == len(ids))
            first = tokenizer.decode([favourite])
            yield {"text": text, "rank": rank, "class": class_of(rank), "favourite": first}


class Server(ThreadingTCPServer):
    """Sends the page, and answers it with lines of JSON.

    Raises:
        OSError: the address cannot be listened at.
    """

    allow_reuse_address = daemon_threads = True  # a new start need not wait, nor the end of this

    def __init__(self, host: str, port: int, base: Checkpoint, instruct: Checkpoint) -> None:
        super().__init__((host, port), Handler)
        at = self.server_address[0]
        self.names = {at, "localhost"} if str(at).startswith("127.") else None
        self.panels = Panels(base, instruct)
        self.page = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
        ).get_template("web.html")
        self.about = {
            "paths": {"base": str(base.path), "instruct": str(instruct.path)},
            "parameters": base.model.n_params(),
            "block_size": base.model.config.block_size,
            "examples": examples(base, instruct),
            "colors": CLASS_COLORS,
        }

    def answer(self, path: str, body: bytes) -> Generator[Event]:
        """Yields what is asked for, or as the last event what went wrong."""
        try:
            asked = read_request(body)
            yield from self.panels.reply(asked) if path == "/reply" else self.panels.ranks(asked)
        except ValueError as error:
            yield {"error": str(error)}
        except Exception as error:  # whatever a model may raise: the page says it, others go on
            traceback.print_exc()
            yield {"error": f"the model failed: {type(error).__name__}: {error}"}


class Handler(BaseHTTPRequestHandler):
    """One request, in a thread of its own. If the other side goes away, its generation ends."""

    server: Server
    timeout = 60  # seconds in which the other side sends or takes nothing
    disable_nagle_algorithm = True  # a token leaves when it is known

    def handle(self) -> None:
        """Ends without a word where the other side has gone."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def parse_request(self) -> bool:
        """Refuses other names for this machine: a foreign site may point its own at it."""
        if not super().parse_request():
            return False
        name = self.headers.get("Host", "").rsplit(":", 1)[0]
        if self.server.names and name not in self.server.names:
            self.send_error(403)
            return False
        return True

    def do_GET(self) -> None:
        """The page."""
        if self.path != "/":
            self.send_error(404)
            return
        nonce = secrets.token_urlsafe()
        page = self.server.page.render(self.server.about, nonce=nonce)
        policy = f"{POLICY}; script-src 'nonce-{nonce}'"
        self.begin("text/html; charset=utf-8", {"Content-Security-Policy": policy})
        self.wfile.write(page.encode())

    def do_POST(self) -> None:
        """Replies or ranks, each event as soon as it is known."""
        size = self.headers.get("Content-Length", "")
        if self.path not in ("/reply", "/ranks"):
            self.send_error(404)
        elif self.headers.get_content_type() != "application/json":
            self.send_error(415)  # what a foreign site can send unasked is of another type
        elif not size.isdecimal() or int(size) > MAX_BYTES:
            self.send_error(413)
        else:
            body = self.rfile.read(int(size))
            self.begin("application/x-ndjson", {})
            with contextlib.closing(self.server.answer(self.path, body)) as events:
                for event in events:
                    self.wfile.write(json.dumps(event).encode() + b"\n")

    def begin(self, content_type: str, more: dict[str, str]) -> None:
        """Sends the head of an answer."""
        self.send_response(200)
        always = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        for name, value in ({"Content-Type": content_type} | always | more).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing about requests."""


def examples(base: Checkpoint, instruct: Checkpoint) -> list[str]:
    """First questions of a few conversations that the lab would have with these models."""
    try:
        world = world_of(base, instruct)
        conversations = read_qa(qa_of(instruct)) if world is None else questions_about(world)
    except (ValueError, OSError):  # the data is gone, or not theirs; they can still be talked to
        return GENERAL_EXAMPLES
    first = [next(m["content"] for m in c if m["role"] == "user") for c in conversations]
    return list(dict.fromkeys(first))[:EXAMPLES]


def main() -> None:
    """Serves the page until Ctrl-C."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True, help="base checkpoint, or its run")
    p.add_argument("--instruct", required=True, help="instruct checkpoint, or its run")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    p.add_argument("--host", default="127.0.0.1", help="other than 127.0.0.1, others can see it")
    p.add_argument("--port", type=int, default=7860, help="default 7860; 0 takes a free one")
    a = p.parse_args()
    with one_line_errors():
        pair = load_to_sample(a.base, a.instruct, a.device)
        try:
            server = Server(a.host, a.port, *pair)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"cannot listen at --host {a.host} --port {a.port}: {reason}"
            ) from None
        address = f"http://{a.host}:{server.server_address[1]}"
        print(f"open {address} in a browser; Ctrl-C ends", flush=True)
        with server, contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
