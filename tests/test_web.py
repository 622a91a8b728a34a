"""lab.web: the replies are those of sample.py, and the page holds in a real browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

import sample
from data.chat import Message, plain_prompt, render_prompt
from data.tokenizer import Tokenizer
from lab import web
from lab.figures import CLASS_COLORS
from lab.likelihood import ask
from model.generate import Sampling, stream
from training.checkpoint import Checkpoint, load_checkpoint

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

Runs = tuple[Path, Path]
SAMPLED = {"temperature": "1", "seed": "3", "max_new_tokens": "8"}
PATIENCE = 20  # seconds after which something that should happen did not


@pytest.fixture(scope="module")
def pair(runs: Runs) -> tuple[Checkpoint, Checkpoint]:
    return load_checkpoint(runs[0]), load_checkpoint(runs[1])


def request(prompt: str, turns: object = (), form: str = "chat", **more: Any) -> bytes:
    asked = {"prompt": prompt, "turns": list(turns), "form": form, "settings": SAMPLED}  # type: ignore
    return json.dumps(asked | more).encode()


def said(panels: web.Panels, body: bytes) -> dict[str, sample.Reply]:
    """What both models say in the end."""
    events = list(panels.reply(web.read_request(body)))
    found = {}
    for model in web.MODELS:
        mine = [e for e in events if e["model"] == model]
        text = "".join(e.get("text", "") for e in mine)
        found[model] = sample.Reply(text, sum("id" in e for e in mine), mine[-1]["stopped"])
    return found


@pytest.mark.parametrize(("form", "column"), [("chat", "base_chat"), ("raw", "base_raw")])
def test_replies_are_those_of_sample_over_more_turns_than_fit(
    pair: tuple[Checkpoint, Checkpoint], form: str, column: str
) -> None:
    models = sample.columns_of(dict(zip(web.MODELS, pair, strict=True)))
    history = sample.History()
    panels, turns, sampling = web.Panels(*pair), list[dict[str, str]](), web.read_sampling(SAMPLED)
    for n in range(12):
        prompt = f"What of {n}?"
        (expected,) = sample.ask(models, [history], [prompt], sampling)
        found = said(panels, request(prompt, turns, form))
        assert found == {"base": expected[column], "instruct": expected["instruct"]}
        turns.append({"prompt": prompt, **{model: r.text for model, r in found.items()}})
    forgetting = list(panels.reply(web.read_request(request("And?", turns, form))))
    assert "no longer fit" in forgetting[1]["note"]


def test_the_base_in_plain_text_replies_as_in_the_lab(pair: tuple[Checkpoint, Checkpoint]) -> None:
    settings = {"temperature": "0", "max_new_tokens": "5", "top_k": " ", "top_p": ""}
    body = request("Who?", form="plain", settings=settings)
    prompt = plain_prompt(web.read_request(body).messages["base"], pair[0].tokenizer)
    (expected,) = ask(pair[0], [prompt], 5)
    assert said(web.Panels(*pair), body)["base"].text == pair[0].tokenizer.decode(expected)


def test_a_character_is_held_back_until_it_is_whole(
    pair: tuple[Checkpoint, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, text = pair[0].tokenizer, "né 猫 🙂."
    ids = byte_by_byte(text + "猫", tokenizer)
    cut = [*ids[:-2], tokenizer.end_of_turn]
    monkeypatch.setattr(web, "stream", lambda *_: ([i] for i in cut))
    events = list(web.speak(pair[0], [0], Sampling()))
    assert not any("\ufffd" in e["text"] for e in events[:-1])
    assert "".join(e["text"] for e in events) == tokenizer.decode(cut[:-1]) == text + "\ufffd"
    assert [e["id"] for e in events[:-1]] == cut
    assert events[-1]["stopped"]


def byte_by_byte(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text in the most tokens that it can have."""
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.n_vocab)}
    return [single[bytes([b])] for b in text.encode()]


def test_models_take_turns_and_end_when_nobody_listens(
    pair: tuple[Checkpoint, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, panels = count_streams(monkeypatch), web.Panels(*pair)
    speak = web.speak

    def locked(*arguments: Any) -> Iterator[web.Event]:
        for event in speak(*arguments):
            assert panels.lock.locked()
            yield event

    monkeypatch.setattr(web, "speak", locked)
    events = panels.reply(web.read_request(request("Who?")))
    order = [next(events)["model"] for _ in range(8)]
    assert order == ["base", "instruct"] * 4
    assert len(alive) == 2
    assert not panels.lock.locked()  # others may go on while this token is on its way
    events.close()  # type: ignore[attr-defined]
    assert not alive


def count_streams(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that has one entry for each generation that goes on."""
    alive = list[object]()

    def counted(*arguments: Any) -> Iterator[list[int | None]]:
        alive.append(arguments)
        try:
            yield from stream(*arguments)
        finally:
            alive.remove(arguments)

    monkeypatch.setattr(web, "stream", counted)
    return alive


@pytest.mark.parametrize("form", web.FORMS)
def test_ranks_are_those_of_the_base(form: str, pair: tuple[Checkpoint, Checkpoint]) -> None:
    base, tokenizer = pair[0], pair[0].tokenizer
    body = request("Who?", settings={"max_new_tokens": "5"}, form=form)
    messages = web.read_request(body).messages["base"]
    (own,) = ask(base, [web.FORMS[form](messages, tokenizer)], 5)
    tokens = list(web.Panels(*pair).ranks(web.read_request(request("Who?", form=form, ids=own))))
    assert [t["rank"] for t in tokens] == [1] * len(own)  # what it would have said itself
    assert "".join(t["text"] for t in tokens) == tokenizer.decode(own)
    other = [own[0], tokenizer.end_of_turn]
    last = list(web.Panels(*pair).ranks(web.read_request(request("Who?", form=form, ids=other))))
    assert last[1]["rank"] > 1
    assert last[1]["favourite"] == tokenizer.decode([own[1]])
    assert last[1]["class"] in CLASS_COLORS


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"[", "not a request of the page"),
        (b"[" * 99_999, "not a request of the page"),
        (b'{"prompt": "Who?"}', "not a request of the page"),
        (request("Who?", [{"prompt": 1, "base": "", "instruct": ""}]), "not a request of the page"),
        (request("Who?", form="song"), "not a request of the page"),
        (request(" \n"), "prompt is empty"),
        (request("Who?", settings={"seed": "1.5"}), "seed is '1.5'; it must be a whole number"),
        (request("Who?", settings={"temperature": "hot"}), "temperature is 'hot'"),
        (request("Who?", settings={"seed": "x" * 99}), f"seed is '{'x' * 40}'; it"),
        (request("Who?", settings={"temperature": "nan"}), "temperature is nan"),
        (request("Who?", settings={"top_p": "2"}), "top_p is 2.0"),
        (request("Who?", settings={"max_new_tokens": "5000"}), "at most 4096"),
    ],
)
def test_what_cannot_be_answered_says_why(
    body: bytes, reason: str, pair: tuple[Checkpoint, Checkpoint]
) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        web.read_request(body)


@pytest.mark.parametrize("ids", [[], [-1], [10**6], ["1"], [5] * 129])
def test_only_replies_of_these_models_are_ranked(
    ids: list[Any], pair: tuple[Checkpoint, Checkpoint]
) -> None:
    with pytest.raises(ValueError, match=r"not a reply|too long"):
        next(web.Panels(*pair).ranks(web.read_request(request("Who?", ids=ids))))


def test_without_the_data_there_are_other_examples(
    pair: tuple[Checkpoint, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    about_people = web.examples(*pair)
    assert len(set(about_people)) == web.EXAMPLES
    monkeypatch.setattr(web, "world_of", lambda *_: None)  # its Q&A is in the same folder
    assert len(set(web.examples(*pair)) - set(about_people)) > 0
    monkeypatch.setattr(web, "qa_of", lambda _: Path("nowhere"))
    assert web.examples(*pair) == web.GENERAL_EXAMPLES


def test_command_lines_that_cannot_work_end_in_one_line(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    base, instruct = runs
    for options, reason in (
        ((base, base), "other kind"),
        ((base / "nowhere", instruct), "not found"),
        ((base, instruct, "--device", "abacus"), "device 'abacus'"),
        ((base, instruct, "--port", taken.getsockname()[1]), "already in use"),
        ((base, instruct, "--port", 70_000), "--port 70000"),
        ((base, instruct, "--host", "é..é"), "cannot listen"),
    ):
        arguments = ["web", "--base", options[0], "--instruct", *options[1:]]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        with pytest.raises(SystemExit) as stop:
            web.main()
        error = capsys.readouterr().err
        assert stop.value.code == 1
        assert reason in error
        assert error.count("\n") == 1
    taken.close()


# ---- over the network ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(pair: tuple[Checkpoint, Checkpoint]) -> Iterator[SimpleNamespace]:
    """The page's address; `alive` generations; `steps`, which lets so many events pass if set."""
    with pytest.MonkeyPatch.context() as patch:
        alive = count_streams(patch)
        passed = web.Panels.reply
        state = SimpleNamespace(alive=alive, steps=None)

        def held_back(panels: web.Panels, asked: web.Asked) -> Iterator[web.Event]:
            for event in passed(panels, asked):
                if state.steps is not None:
                    assert state.steps.acquire(timeout=PATIENCE)
                yield event

        patch.setattr(web.Panels, "reply", held_back)
        listening = socket.create_server(("127.0.0.1", 0))
        state.port = listening.getsockname()[1]
        state.url = f"http://127.0.0.1:{state.port}/"
        app = web.make_app(*pair, ["127.0.0.1", "localhost"])
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        yield state
        server.should_exit = True
        thread.join()


@pytest.fixture
def held(served: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """Generations wait for `steps.release(n)`: n events more. The first two are no tokens."""
    served.steps = threading.Semaphore(0)
    yield served
    served.steps.release(10**6)
    served.steps = None


class Meeting:
    """Lets an event of one generation pass only together with one of another, until released."""

    def __init__(self) -> None:
        self.met = 0
        self.barrier = threading.Barrier(2, self.count)

    def count(self) -> None:
        self.met += 1

    def acquire(self, timeout: float) -> bool:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.barrier.wait(timeout)
        return True

    def release(self, n: int = 1) -> None:
        self.barrier.abort()


@pytest.mark.parametrize(
    ("path", "headers", "size", "status"),
    [
        ("/reply", {"Content-Type": "text/plain"}, 2, 415),
        ("/reply", {"Host": "evil.example"}, 2, 400),
        ("/reply", {}, web.MAX_BYTES + 1, 413),
        ("/elsewhere", {}, 2, 404),
        ("/reply", {}, 2, 200),
    ],
)
def test_only_the_page_is_answered(
    served: SimpleNamespace, path: str, headers: dict[str, str], size: int, status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    always = {"Content-Type": "application/json"}
    connection.request("POST", path, body=b"{}".ljust(size), headers=always | headers)
    assert connection.getresponse().status == status
    connection.close()


def test_a_model_that_fails_says_so_and_the_next_request_works(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fetch() -> list[web.Event]:
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/reply", request("Who?"), {"Content-Type": "application/json"})
        return [json.loads(line) for line in connection.getresponse().read().splitlines()]

    class PanicError(BaseException):
        """As a tokenizer's, which is no Exception."""

    for error in (ZeroDivisionError, PanicError):
        with monkeypatch.context() as patch:
            patch.setattr(web, "speak", Mock(side_effect=error("of all things")))
            assert fetch()[-1]["error"] == f"the model failed: {error.__name__}: of all things"
        assert "stopped" in fetch()[-1]


# ---- in a browser ----------------------------------------------------------------------------


class Tab:
    """A page of its own browser context, with short names for what a person does and sees."""

    def __init__(self, browser: Any, url: str) -> None:
        self.page = browser.new_context().new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.complaints, self.requests = list[str](), list[str]()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.set("max new tokens", "6")

    def set(self, label: str, value: str) -> None:
        self.page.get_by_label(label, exact=True).fill(value)

    def type(self, prompt: str) -> None:
        self.set("prompt", prompt)
        self.page.keyboard.press("Enter")

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).click()

    def ask(self, prompt: str) -> None:
        """Waits for the end of both replies."""
        n = self.page.locator(".turn").count()
        self.type(prompt)
        self.see(f".turn:nth-child({n + 1})", "token")
        self.idle()

    def idle(self) -> None:
        self.page.locator("#send[aria-disabled=false]").wait_for()

    def see(self, selector: str, text: str, n: int = 0) -> None:
        self.page.locator(selector).filter(has_text=text).nth(n).wait_for()

    def texts(self, selector: str = ".text") -> list[str]:
        found: list[str] = self.page.locator(selector).all_text_contents()
        return found


@pytest.fixture
def tab(browser: Any, served: SimpleNamespace) -> Iterator[Tab]:
    opened = Tab(browser, served.url)
    yield opened
    assert not opened.complaints
    assert all(url.startswith((served.url, "data:")) for url in opened.requests)
    opened.page.context.close()
    wait_until(lambda: not served.alive)  # nobody listens, so nothing goes on


def wait_until(condition: Any) -> None:
    done = threading.Event()
    for _ in range(PATIENCE * 50):
        if condition():
            return
        done.wait(0.02)
    raise AssertionError("waited in vain")


def test_replies_grow_token_by_token_and_say_how_they_ended(
    tab: Tab, held: SimpleNamespace
) -> None:
    tab.type("Who?")
    seen = []
    for tokens in (1, 3):
        held.steps.release(2 + 2 * tokens if tokens == 1 else 4)
        tab.see(".foot", f"{tokens} token", n=1)
        tab.see(".foot", "writing", n=1)
        seen.append(tab.texts())
    assert all(later.startswith(earlier) for earlier, later in zip(*seen, strict=True))
    assert all(len(later) > len(earlier) for earlier, later in zip(*seen, strict=True))
    held.steps.release(100)
    tab.see(".foot", "6 tokens, ran into the limit", n=1)
    assert tab.texts("h2") == ["base, given the chat template", "instruct"]


def test_stop_keeps_what_was_said_and_clear_begins_again(tab: Tab, held: SimpleNamespace) -> None:
    tab.set("max new tokens", "4096")
    tab.type("Who?")
    held.steps.release(2 + 6)
    tab.see(".foot", "3 tokens, writing", n=1)
    before = tab.texts()
    tab.press("Stop")
    tab.see(".foot", "3 tokens, stopped by you", n=1)
    assert tab.texts() == before
    assert all(before)
    held.steps.release(1000)
    wait_until(lambda: not held.alive)
    tab.set("max new tokens", "6")
    tab.ask("And where?")
    assert tab.texts(".prompt") == ["Who?", "And where?"]
    tab.press("Clear")
    assert tab.page.locator(".turn").count() == 0
    tab.page.locator(".examples button").first.click()
    tab.see(".foot", "ran into the limit", n=1)
    assert len(tab.texts(".prompt")) == 1


def test_a_conversation_goes_on_as_in_sample_and_outlives_a_reload(
    tab: Tab, pair: tuple[Checkpoint, Checkpoint]
) -> None:
    models = sample.columns_of(dict(zip(web.MODELS, pair, strict=True)))
    history = sample.History()
    sampling = Sampling(6, temperature=1.0, seed=5)
    tab.set("temperature", "1")
    tab.set("seed", "5")
    for prompt in ("Who?", "And\nwhere?"):
        tab.ask(prompt)
        (replies,) = sample.ask(models, [history], [prompt], sampling)
        assert tab.texts()[-2:] == [replies["base_chat"].text, replies["instruct"].text]
    before = tab.texts(), tab.texts(".prompt"), tab.texts(".foot")
    tab.set("prompt", "half a qu")
    tab.page.reload()
    assert (tab.texts(), tab.texts(".prompt"), tab.texts(".foot")) == before
    assert tab.page.get_by_label("seed").input_value() == "5"
    assert tab.page.get_by_label("prompt", exact=True).input_value() == "half a qu"
    another = tab.page.context.new_page()
    another.goto(tab.page.url)
    assert another.locator(".turn").count() == 0
    tab.ask("Why?")
    (replies,) = sample.ask(models, [history], ["Why?"], sampling)
    assert tab.texts()[-1] == replies["instruct"].text


def test_a_reload_while_models_write_ends_that_and_keeps_the_beginning(
    tab: Tab, held: SimpleNamespace
) -> None:
    tab.type("Who?")
    held.steps.release(2 + 4)
    tab.see(".foot", "2 tokens, writing", n=1)
    tab.page.reload()
    tab.see(".foot", "2 tokens, broken off", n=1)
    held.steps.release(1000)
    wait_until(lambda: not held.alive)


def test_errors_are_shown_and_do_no_harm(tab: Tab, pair: tuple[Checkpoint, Checkpoint]) -> None:
    tab.type("   ")
    tab.see("#error", "the prompt is empty")
    tab.set("temperature", "warm")
    tab.type("Who?")
    tab.see("#error", "temperature is 'warm'; it must be a number")
    assert tab.page.locator(".turn").count() == 0
    assert tab.page.get_by_label("prompt", exact=True).input_value() == "Who?"
    tab.set("temperature", "")
    long = "word " * 100
    tab.ask(long)
    assert tab.texts("#error") == [""]
    n = len(render_prompt([Message(role="user", content=long)], pair[0].tokenizer))
    tab.see(".foot", f"of the {n} tokens of this prompt, the model sees the last 128", n=1)


def test_text_is_shown_as_text(
    tab: Tab, pair: tuple[Checkpoint, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = "<img src=x onerror=alert(1)> **bold** <b>é</b>"
    ids = byte_by_byte(attack, pair[0].tokenizer)
    monkeypatch.setattr(web, "stream", lambda *_: ([i] for i in ids))
    tab.ask(attack)
    assert tab.texts(".prompt") == [attack]
    assert tab.texts() == [attack] * 2
    assert tab.page.locator("main img, main b").count() == 0


def test_two_people_at_once_keep_apart(tab: Tab, held: SimpleNamespace, browser: Any) -> None:
    other, held.steps = Tab(browser, held.url), Meeting()
    tab.type("Who is the first?")
    other.type("Who is the second?")
    wait_until(lambda: held.steps.met >= 8)  # two events of each say no token yet
    held.steps.release()
    for opened, prompt in ((tab, "Who is the first?"), (other, "Who is the second?")):
        opened.see(".foot", "6 tokens", n=1)
        opened.idle()
        assert opened.texts(".prompt") == [prompt]
    assert not other.complaints
    other.page.context.close()


def test_colour_shows_every_token_of_the_reply(tab: Tab) -> None:
    for form in web.FORMS:
        tab.page.get_by_label("the base reads").select_option(form)
        tab.ask("Who?")
    plain = tab.texts()
    tab.page.get_by_label("colour by the base's rank").check()
    wait_until(lambda: tab.page.locator("main .token").count() == 3 * 6)
    for title, rank in tab.page.locator("main .token").evaluate_all(
        "all => all.map((e) => [e.title, e.querySelector('sub')?.textContent ?? '1'])"
    ):
        assert f"has rank {rank}: " in title  # said without colour and without a pointer
    tab.page.get_by_label("prompt", exact=True).focus()
    tab.page.keyboard.press("Shift+Tab")
    last = tab.page.locator("main .token").last.get_attribute("title")
    assert tab.texts("#told") == [last]
    colour = tab.page.locator("#legend .marginal").evaluate("e => getComputedStyle(e).borderColor")
    assert CLASS_COLORS["marginal"].lower() in "#" + "".join(
        f"{int(part):02x}" for part in re.findall(r"\d+", colour)[-3:]
    )
    tab.page.get_by_label("colour by the base's rank").uncheck()
    assert tab.texts() == plain


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_legend_says_in_words_what_the_colours_mean(
    scheme: str, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {1: "1, its first choice", 2: "2 or 3", 3: "2 or 3", 4: "above 3", 5: "above 3"}
    monkeypatch.setattr(web, "ranks_of", lambda ids, _: [1 + n % 5 for n in range(len(ids))])
    look = """all => all.map((e) => [e.querySelector("sub")?.textContent ?? "1", e.textContent,
        getComputedStyle(e).backgroundColor + getComputedStyle(e).borderBottom])"""
    tab.page.emulate_media(color_scheme=scheme)
    legend = tab.page.get_by_role("group", name="colour legend")
    tab.ask("Who?")
    assert not legend.is_visible()
    for turn_on in (tab.page.get_by_label("colour by the base's rank").check, tab.page.reload):
        turn_on()
        wait_until(lambda: tab.page.locator("main .token").count() == 6)
        assert legend.is_visible()
        meant = {text: style for _, text, style in legend.locator(".token").evaluate_all(look)}
        assert list(meant) == list(dict.fromkeys(words.values()))
        assert len(set(meant.values())) == 3
        for rank, _, style in tab.page.locator("main .token").evaluate_all(look):
            assert style == meant[words[int(rank)]]
    tab.page.get_by_label("colour by the base's rank").uncheck()
    assert not legend.is_visible()


def test_the_last_prompt_is_asked_again_with_other_settings_in_place_of_the_last_exchange(
    tab: Tab, pair: tuple[Checkpoint, Checkpoint]
) -> None:
    panels = web.Panels(*pair)
    again = tab.page.get_by_role("button", name="Ask again")
    assert again.get_attribute("aria-disabled") == "true"
    for prompt in ("Who?", "And where?"):
        tab.ask(prompt)
    first, before = tab.texts()[:2], tab.texts()[2:]
    replies = said(panels, request("Who?", settings={"temperature": "0", "max_new_tokens": "6"}))
    turns = [{"prompt": "Who?", **{model: r.text for model, r in replies.items()}}]
    tab.set("temperature", "hot")
    again.click()
    tab.see("#error", "temperature is 'hot'")
    assert tab.texts() == first + before  # what cannot be asked replaces nothing
    settings = {"temperature": "2", "top_k": "40", "seed": "8", "max_new_tokens": "7"}
    for name, value in settings.items():
        tab.set(name.replace("top_k", "top-k").replace("_", " "), value)
    tab.page.get_by_label("the base reads").select_option("plain")
    tab.set("prompt", "a draft")
    again.press("Enter")
    tab.see(".turn:nth-child(2) h2", "Question: … Answer:")
    tab.idle()
    body = request("And where?", turns, "plain", settings=settings)
    expected = [r.text.removeprefix(" ") for r in said(panels, body).values()]
    assert tab.texts() == first + expected
    assert all(a != b for a, b in zip(before, expected, strict=True))
    assert tab.texts(".prompt") == ["Who?", "And where?"]
    assert tab.page.get_by_label("prompt", exact=True).input_value() == "a draft"
    assert tab.page.evaluate("document.activeElement.id") == "again"
    tab.page.reload()
    with tab.page.expect_request("**/reply") as sent:
        again.click()
    assert sent.value.post_data_json["turns"] == turns
    tab.idle()
    assert tab.texts() == first + expected
    tab.press("Clear")
    assert again.get_attribute("aria-disabled") == "true"
    tab.ask("Why?")
    tab.set("max new tokens", "1")
    again.click()
    tab.see(".foot", "1 token, ran", n=1)
    assert tab.texts(".prompt") == ["Why?"]  # also where the last exchange is the only one


@pytest.mark.parametrize(
    ("prompt", "beginning"),
    [
        ("line\n" * 6 + "end", "line\n" * 5 + "line"),
        ("word " * 1000, "word " * 120),
        ("🙂" * 601, "🙂" * 600),
        ("line\n" * 5 + "end", None),
        ("x" * 600, None),
    ],
)
def test_a_long_prompt_is_folded_when_shown_and_sent_whole(
    prompt: str, beginning: str | None, tab: Tab
) -> None:
    tab.page.set_viewport_size({"width": 360, "height": 320})
    with tab.page.expect_request("**/reply") as sent:
        tab.ask(prompt)
    assert sent.value.post_data_json["prompt"] == prompt
    fold = tab.page.locator("main button")
    if beginning is None:
        assert tab.texts(".prompt") == [prompt]
        assert fold.count() == 0
        return
    with tab.page.expect_request("**/reply") as sent:
        tab.press("Ask again")
    assert sent.value.post_data_json["prompt"] == prompt
    tab.idle()
    for _ in range(2):
        folded = beginning + " …"
        for text, name, then in (
            (folded, "Show the whole prompt", prompt),
            (prompt, "Show less", folded),
        ):
            assert tab.texts(".prompt") == [text]
            assert tab.texts("main button") == [name]
            fold.press("Enter")
            assert tab.texts(".prompt") == [then]
            assert fold.evaluate("e => e === document.activeElement")
        assert tab.page.locator(".prompt").bounding_box()["y"] > -1  # the reader is taken back
        tab.page.reload()


@pytest.mark.parametrize("width", [1280, 360])
def test_panels_stand_side_by_side_or_stacked(tab: Tab, width: int) -> None:
    tab.page.set_viewport_size({"width": width, "height": 800})
    tab.ask("Who" * 200)
    left, right = (box.bounding_box() for box in tab.page.locator(".reply").all())
    assert (left["y"] == right["y"]) == (width == 1280)
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.set("prompt", "a")
    tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("b")
    assert tab.page.get_by_label("prompt", exact=True).input_value() == "a\nb"
    unnamed = tab.page.locator("input, select, textarea").evaluate_all(
        "all => all.filter(e => !e.labels.length).length"
    )
    assert unnamed == 0


def test_the_page_follows_a_reply_unless_the_reader_went_elsewhere(
    tab: Tab,
    pair: tuple[Checkpoint, Checkpoint],
    held: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = byte_by_byte("a\n" * 20, pair[0].tokenizer)
    monkeypatch.setattr(web, "stream", lambda *_: ([i] for i in ids))
    at_end = "innerHeight + scrollY > document.documentElement.scrollHeight - 2"
    for _ in range(2):
        held.steps.release(2 + 2 * len(ids) + 2)
        tab.ask("Who?")
        assert tab.page.evaluate(at_end)
        tab.page.evaluate("scrollTo(0, 0)")
    tab.type("Who?")
    held.steps.release(2 + 2)
    tab.see(".turn:nth-child(3) .foot", "1 token, writing", n=1)
    assert tab.page.evaluate(at_end)
    tab.page.evaluate("scrollTo(0, 0)")
    held.steps.release(100)
    tab.idle()
    assert tab.page.evaluate("scrollY") == 0


def test_a_draft_is_kept(tab: Tab, held: SimpleNamespace) -> None:
    tab.type("Who?")
    tab.set("prompt", "And wh")
    held.steps.release(100)
    tab.see(".foot", "6 tokens", n=1)
    tab.press("Clear")
    tab.page.locator(".examples button").first.click()
    tab.see(".foot", "6 tokens", n=1)
    assert tab.page.get_by_label("prompt", exact=True).input_value() == "And wh"


def test_the_focus_is_never_lost(tab: Tab, held: SimpleNamespace) -> None:
    def focused() -> str:
        tab.idle()
        found: str = tab.page.evaluate("document.activeElement.id")
        return found

    held.steps.release(10**6)
    tab.page.locator(".examples button").first.press("Enter")
    tab.see(".turn:nth-child(1) .foot", "6 tokens", n=1)
    assert focused() == "prompt"
    tab.set("prompt", "Who?")
    tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("Enter")
    tab.see(".turn:nth-child(2) .foot", "6 tokens", n=1)
    assert focused() == "prompt"
    tab.set("prompt", "Who?")
    tab.page.locator("#send").dblclick()
    tab.see(".turn:nth-child(3) .foot", "6 tokens", n=1)
    assert focused() in ("prompt", "send")
    held.steps = threading.Semaphore(2 + 2)
    tab.type("Who?")
    tab.see(".foot", "1 token, writing", n=1)
    tab.page.locator("#stop").press("Enter")
    assert focused() == "prompt"


def test_a_reply_that_cannot_be_coloured_says_so_itself(
    tab: Tab, pair: tuple[Checkpoint, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = byte_by_byte("x" * 140, pair[0].tokenizer)
    tab.page.get_by_label("colour by the base's rank").check()
    with monkeypatch.context() as patch:
        patch.setattr(web, "stream", lambda *_: ([i] for i in ids))
        tab.ask("Who?")
    tab.see(
        ".foot", "140 tokens, ran into the limit; not coloured: a reply of 140 tokens is too long"
    )
    tab.ask("And?")
    tab.page.locator(".turn:nth-child(2) .token").first.wait_for()
    tab.see(".turn:nth-child(1) .foot", "not coloured")
    assert tab.texts("#error") == [""]
    tab.type(" ")
    tab.see("#error", "the prompt is empty")


def test_a_small_window_is_not_all_composer(tab: Tab) -> None:
    tab.page.set_viewport_size({"width": 320, "height": 256})
    tab.page.get_by_label("colour by the base's rank").check()
    tab.set("max new tokens", "1" * 4000)
    tab.type("Who?")
    tab.see("#error", "max_new_tokens is 111")
    assert tab.page.locator("#error").bounding_box()["height"] < 128
    tab.set("max new tokens", "6")
    tab.ask("Who?")
    tab.page.evaluate("scrollTo(0, 0)")
    assert tab.page.locator("#composer").bounding_box()["y"] > 128


@pytest.mark.parametrize(
    "storage",
    [
        "sessionStorage.diptych = '{'",
        "Object.defineProperty(window, 'sessionStorage', { get() { throw new Error('no'); } })",
    ],
)
def test_the_page_works_without_its_memory(tab: Tab, storage: str) -> None:
    tab.page.add_init_script(storage)
    tab.page.reload()
    tab.ask("Who?")
    tab.page.reload()
    assert tab.page.locator(".turn").count() == 0


def test_clear_while_ranks_are_asked_for_ends_that(tab: Tab) -> None:
    asked: list[Any] = []
    for prompt in ("Who?", "Where?"):
        tab.ask(prompt)
    tab.page.route("**/ranks", lambda route: asked.append(route))
    tab.page.get_by_label("colour by the base's rank").check()
    wait_until(lambda: tab.page.locator(".turn").count() == 2 and asked)
    tab.press("Clear")
    with tab.page.expect_response("**/ranks"):
        asked[0].continue_()
    tab.ask("Why?")
    wait_until(lambda: tab.page.locator(".turn").count() == 1 and len(asked) > 1)
    asked[1].continue_()
    tab.page.locator("main .token").first.wait_for()
    assert [json.loads(a.request.post_data)["prompt"] for a in asked] == ["Who?", "Why?"]


def test_what_went_wrong_between_page_and_server_is_told_apart(tab: Tab) -> None:
    tab.type("x" * web.MAX_BYTES)
    tab.see("#error", "too long to be sent; shorten it, or begin again with Clear")
    tab.page.route("**/reply", lambda route: route.abort())
    tab.type("Who?")
    tab.see("#error", "the server cannot be reached")
    tab.page.evaluate("() => { window.post = () => null.ours; }")
    tab.type("Who?")
    tab.see("#error", "reading 'ours'")
    assert all("Failed to load" in complaint for complaint in tab.complaints)
    tab.complaints.clear()


def test_hebrew_is_written_from_the_right(tab: Tab) -> None:
    tab.ask("מי זה?")
    tab.set("prompt", "ומה?")
    for selector in (".prompt", "#prompt"):
        direction = tab.page.locator(selector).evaluate("e => getComputedStyle(e).direction")
        assert direction == "rtl"
