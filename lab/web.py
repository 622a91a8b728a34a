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
import socket
import threading
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.chat import Message, plain_prompt, raw_prompt
from data.fitting import recent_turns
from hf.adapter import chat_prompt, load_pair
from lab.figures import CLASS_COLORS, templates
from lab.likelihood import predictions
from lab.pair import qa_of, questions_about, read_qa, world_of
from lab.shift import class_of, ranks_of
from model.generate import Sampling, stream
from runtime.cli import Parser, one_line_errors, say
from sample import room_for, unseen
from training.checkpoint import Checkpoint

if TYPE_CHECKING:
    from starlette.applications import Starlette

MODELS = ("base", "instruct")
# How the base reads the conversation; the instruct model always reads the template.
FORMS = {"chat": chat_prompt, "plain": plain_prompt, "raw": raw_prompt}
SETTINGS = {"temperature": float, "top_k": int, "top_p": float, "seed": int, "max_new_tokens": int}
MAX_NEW_TOKENS = 4096  # of a reply, so that nobody holds the models for hours
MAX_BYTES = 1 << 19  # of a request; of a million spaces the tokenizer panics
EXAMPLES = 5
GENERAL_EXAMPLES = ["What is a whale?", "How do I make tea?", "The best thing about winter is"]
# What a browser lets the page do: ask this server, draw itself, and nothing else.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
ALWAYS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
PATHS = ("/reply", "/ranks")

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
                raise ValueError(f"{name} is {text[:40]!r}; it must be {kind}") from None
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
            messages, tokenizer = asked.messages[name], checkpoint.tokenizer
            form = FORMS[asked.form] if name == "base" else chat_prompt
            room = room_for(checkpoint, asked.sampling.max_new_tokens)
            recent = recent_turns(form, messages, tokenizer, room)
            ids = form(recent, tokenizer)
            notes = [unseen(checkpoint, ids)]
            if forgotten := (len(messages) - len(recent)) // 2:
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
        form, limit = FORMS[asked.form], room_for(base, asked.sampling.max_new_tokens)
        recent = recent_turns(form, asked.messages["instruct"], tokenizer, limit)
        context = form(recent, tokenizer)
        with self.lock:
            logprobs = next(predictions(base, [context[-room:]], [ids]))
            ranks, favourites = ranks_of(ids, logprobs), logprobs.argmax(dim=1).tolist()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for n, (i, rank, favourite) in enumerate(zip(ids, ranks, favourites, strict=True), 1):
            text = decoder.decode(tokenizer.token_bytes(i), final=n == len(ids))
            first = tokenizer.decode([favourite])
            yield {"text": text, "rank": rank, "class": class_of(rank), "favourite": first}


def answers(panels: Panels, path: str, body: bytes) -> Generator[str]:
    """Yields what is asked for as lines of JSON, the last of them what went wrong, if it did."""
    try:
        asked = read_request(body)
        for event in panels.reply(asked) if path == "/reply" else panels.ranks(asked):
            yield json.dumps(event) + "\n"
    except ValueError as error:
        yield json.dumps({"error": str(error)}) + "\n"
    except GeneratorExit:
        raise
    except BaseException as error:  # a panic of the tokenizer, too: the page says it, others go on
        traceback.print_exc()
        yield json.dumps({"error": f"the model failed: {type(error).__name__}: {error}"}) + "\n"


def make_app(base: Checkpoint, instruct: Checkpoint, names: Sequence[str]) -> Starlette:
    """The page, and what answers it.

    Args:
        names: under which this machine may be asked for; a foreign site may point its own at it.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send

    class Lines(StreamingResponse):
        """Lines as they come. Where the other side goes away, they end, and what makes them."""

        def __init__(self, lines: Generator[str]) -> None:
            super().__init__(lines, media_type="application/x-ndjson", headers=ALWAYS)
            self.lines = lines

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                self.lines.close()

    panels = Panels(base, instruct)
    page = templates().get_template("web.html")
    about = {
        "paths": {"base": str(base.path), "instruct": str(instruct.path)},
        "parameters": base.model.n_params(),
        "block_size": base.model.config.block_size,
        "examples": examples(base, instruct),
        "colors": CLASS_COLORS,
    }

    def show(request: Request) -> Response:
        nonce = secrets.token_urlsafe()
        policy = f"{POLICY}; script-src 'nonce-{nonce}'"
        headers = ALWAYS | {"Content-Security-Policy": policy}
        return HTMLResponse(page.render(about, nonce=nonce), headers=headers)

    async def answer(request: Request) -> Response:
        if request.headers.get("Content-Type") != "application/json":
            return PlainTextResponse("JSON, please", 415)  # a foreign site can send other types
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BYTES:
                return PlainTextResponse("too long", 413)
        return Lines(answers(panels, request.url.path, bytes(body)))

    routes = [Route("/", show), *(Route(at, answer, methods=["POST"]) for at in PATHS)]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(names))
    return Starlette(routes=routes, middleware=[hosts])


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
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True, help="base checkpoint, or its run; hf:NAME")
    p.add_argument("--instruct", required=True, help="instruct checkpoint, or its run; hf:NAME")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    p.add_argument("--host", default="127.0.0.1", help="other than 127.0.0.1, others can see it")
    p.add_argument("--port", type=int, default=7860, help="default 7860; 0 takes a free one")
    a = p.parse_args()
    with one_line_errors():
        try:
            import uvicorn
        except ModuleNotFoundError:
            raise ValueError("the page needs `pip install -r requirements-web.txt`") from None
        pair = load_pair(a.base, a.instruct, a.device, to_sample=True)
        try:
            listening = socket.create_server((a.host, a.port))
        except (OSError, OverflowError, TypeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"cannot listen at --host {a.host} --port {a.port}: {reason}"
            ) from None
        at, port = listening.getsockname()[:2]
        app = make_app(*pair, [at, "localhost"] if at.startswith("127.") else ["*"])
        say(f"open http://{a.host}:{port} in a browser; Ctrl-C ends")
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    main()
