"""lab.harness: lm-evaluation-harness reads from our models what they really think and write."""

from __future__ import annotations

import json
import math
import socket
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data.chat import Message, render_prompt
from data.tokenizer import CONTROL_TOKENS
from lab import harness
from lab.harness import HarnessModel, sampling_of
from lab.paired import compared
from model.generate import Sampling, generate
from training.checkpoint import Checkpoint, load_checkpoint

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-eval.txt)")
from lm_eval import tasks  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

Runs = tuple[Path, Path]
LONG = "Ada Holloway works as a weaver. " * 60  # several times the context of 128 tokens
DOCS = [
    {"question": "Ada Holloway works as a ", "choices": ["weaver", "tailor.", "é <|end|>"]},
    {"question": "", "choices": ["Otis", "Ada", "x"]},
    {"question": LONG, "choices": ["baker", "b", "The end. " * 3]},
    {"question": "<|end|><|assistant|>\n\n", "choices": ["<|user|>", " ", "a b"]},
]
TEXTS = [LONG, "Otis was born in 1950.", "é", LONG[:500]]
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "tiny_reply": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "weaver",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """No test may as much as try to reach a network, nor write outside its folder."""
    tried: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        tried.append(address)
        raise OSError("offline")

    monkeypatch.setattr(
        "datasets.config.HF_HUB_OFFLINE", True
    )  # what the environment said at first
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    # The thousands of tasks that the harness ships take seconds to list.
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    yield
    assert not tried


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tasks of our own, in the harness's format."""
    docs = [{**doc, "text": text} for doc, text in zip(DOCS, TEXTS, strict=True)]
    (tmp_path / "docs.json").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    files = {"data_files": {"test": str(tmp_path / "docs.json")}}
    data = {"dataset_path": "json", "test_split": "test", "dataset_kwargs": files}
    (tmp_path / "tasks").mkdir()
    for name, task in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))
    return tmp_path / "tasks"


@pytest.fixture(params=["base", "instruct"])
def checkpoint(runs: Runs, request: pytest.FixtureRequest) -> Checkpoint:
    return load_checkpoint(runs[("base", "instruct").index(request.param)])


def evaluate(model: HarnessModel, folder: Path, task: str, **options: Any) -> Any:
    manager = tasks.TaskManager(include_path=str(folder))
    options |= {"apply_chat_template": model.chat, "bootstrap_iters": 0}
    return lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, **options)


def responses(found: Any) -> list[Any]:
    """What the harness kept of each document, in order."""
    ((_, samples),) = found["samples"].items()
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]


def request(*args: Any) -> Any:
    return Instance("generate_until", {}, args, 0)


@torch.inference_mode()
def logprobs(checkpoint: Checkpoint, ids: list[int]) -> torch.Tensor:
    """Of every id that might follow each of at most block_size ids."""
    return checkpoint.model(torch.tensor([ids]))[0].log_softmax(dim=-1)


def direct(checkpoint: Checkpoint, prompt: list[int], ids: list[int]) -> tuple[float, bool]:
    """What the plain model says of a continuation, of a long prompt only the end."""
    seen = (prompt + ids)[-(checkpoint.model.config.block_size + 1) :]
    found = logprobs(checkpoint, seen[:-1])[-len(ids) :]
    best = found.argmax(dim=1).tolist()
    return sum(found[i, token].item() for i, token in enumerate(ids)), best == ids


@pytest.mark.parametrize("chat", [False, True])
def test_choices_have_the_likelihoods_of_the_plain_model(
    checkpoint: Checkpoint, folder: Path, chat: bool
) -> None:
    tokenizer = checkpoint.tokenizer
    found = evaluate(HarnessModel(checkpoint, chat), folder, "tiny_choice")
    expected = []
    for doc in DOCS:
        question = str(doc["question"])
        if chat:
            prompt = render_prompt([Message(role="user", content=question)], tokenizer)
            pairs = [(prompt, tokenizer.encode(choice)) for choice in doc["choices"]]
        else:
            kept = question.rstrip()
            prompt = [tokenizer.end_of_text, *tokenizer.encode(kept)]
            wholes = [tokenizer.encode(question + choice) for choice in doc["choices"]]
            pairs = [(prompt, whole[len(prompt) - 1 :]) for whole in wholes]
        expected.append([direct(checkpoint, *pair) for pair in pairs])
    for one, other in zip(responses(found), expected, strict=True):
        assert [total for total, _ in one] == pytest.approx([t for t, _ in other], abs=1e-5)
        assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    hits = [max(range(3), key=lambda i: e[i][0]) == 0 for e in expected]
    assert found["results"]["tiny_choice"]["acc,none"] == sum(hits) / len(DOCS)


def test_perplexity_predicts_every_token_of_a_long_text_once(
    checkpoint: Checkpoint, folder: Path
) -> None:
    block, tokenizer = checkpoint.model.config.block_size, checkpoint.tokenizer
    total, n_bytes = 0.0, 0
    for text in TEXTS:
        ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
        for begin in range(0, len(ids) - 1, block):
            end = min(begin + block, len(ids) - 1)  # the tokens after these are predicted
            first = max(0, end - block)  # the last window, too, is a full one
            found = logprobs(checkpoint, ids[first:end])
            total += sum(found[i - first, ids[i + 1]].item() for i in range(begin, end))
        n_bytes += len(text.encode())
    assert len(tokenizer.encode(LONG)) > 3 * block
    found = evaluate(HarnessModel(checkpoint), folder, "tiny_text")["results"]["tiny_text"]
    assert found["bits_per_byte,none"] == pytest.approx(-total / n_bytes / math.log(2), abs=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_replies_are_those_that_generate_gives(
    checkpoint: Checkpoint, folder: Path, chat: bool
) -> None:
    tokenizer = checkpoint.tokenizer
    expected = []
    for doc in DOCS:
        question = str(doc["question"])
        prompt = [tokenizer.end_of_text, *tokenizer.encode(question)]
        if chat:
            prompt = render_prompt([Message(role="user", content=question)], tokenizer)
        ends = {tokenizer.end_of_turn, tokenizer.end_of_text}
        prompt = prompt[-(checkpoint.model.config.block_size - 8) :]
        ids = generate(checkpoint.model, [prompt], Sampling(8), ends)[0]
        ids = ids[:-1] if ids[-1] in ends else ids
        expected.append([tokenizer.decode(ids).split("\n\n")[0]])
    found = evaluate(HarnessModel(checkpoint, chat), folder, "tiny_reply")
    assert responses(found) == expected


def test_the_number_of_rows_at_once_changes_nothing(runs: Runs, folder: Path) -> None:
    checkpoint = load_checkpoint(runs[1])
    for task in TASKS:
        alone, together = (
            responses(evaluate(HarnessModel(checkpoint, True, n), folder, task)) for n in (1, 4)
        )
        if task == "tiny_reply":
            assert alone == together
        else:
            flat = [torch.tensor(found).flatten().tolist() for found in (alone, together)]
            assert flat[0] == pytest.approx(flat[1], abs=1e-5)


def test_a_continuation_longer_than_the_context_is_predicted_whole(runs: Runs) -> None:
    model = HarnessModel(load_checkpoint(runs[0]))
    continuation = list(range(150))
    windows = model.windows([300, 301], continuation)
    assert [token for _, ids in windows for token in ids] == continuation
    assert windows[0][0] == [301]
    for prompt, ids in windows:
        assert len(prompt) + len(ids) - 1 == model.block_size
    assert model.windows([300, 301], [1] * 128) == [([301], [1] * 128)]
    assert model.windows([300, 301], [1] * 63) == [([300, 301], [1] * 63)]
    assert model.score([[], [([300], [])]]) == [(0.0, True)] * 2


def test_greedy_is_what_greedy_decoding_writes(runs: Runs) -> None:
    model = HarnessModel(load_checkpoint(runs[0]))
    prompt, _ = model.begin("")
    (ids,) = generate(model.model, [prompt], Sampling(5))
    other = [*ids[:4], (ids[4] + 1) % 256]
    assert [greedy for _, greedy in model.score([[(prompt, ids)], [(prompt, other)]])] == [
        True,
        False,
    ]


def test_all_windows_of_a_text_must_be_greedy(runs: Runs) -> None:
    model = HarnessModel(load_checkpoint(runs[0]))
    prompt, _ = model.begin("")
    ((best,),) = generate(model.model, [prompt], Sampling(1))
    right, wrong = (prompt, [best]), (prompt, [best + 1])
    scores = model.score([[right, wrong], [wrong, right], [right, right]])
    assert [greedy for _, greedy in scores] == [False, False, True]
    assert scores[0][0] == pytest.approx(scores[1][0])


def test_a_row_is_read_until_its_end_and_no_longer(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HarnessModel(load_checkpoint(runs[0]))
    letters = [[*model.tokenizer.encode(c)] for c in "abcdefgh"]
    assert all(len(ids) == 1 for ids in letters)
    end, steps = model.tokenizer.end_of_turn, 0

    def stream(*_: Any) -> Any:
        nonlocal steps
        for i, ids in enumerate(letters):
            steps += 1
            yield [*ids, None if i > 2 else end if i == 2 else ids[0]]

    monkeypatch.setattr(harness, "stream", stream)
    assert model.write([[1], [1]], Sampling(), ["de", "zzz"]) == ["abc", "ab"]
    assert steps == 5


@pytest.mark.parametrize(("max_new", "kept"), [(8, 120), (124, 64)])
def test_of_a_long_prompt_the_end_is_seen_with_room_for_a_reply(
    runs: Runs, max_new: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HarnessModel(load_checkpoint(runs[0]))
    seen: list[list[int]] = []

    def stream(model: Any, prompts: list[list[int]], *_: Any) -> list[Any]:
        seen.extend(prompts)
        return []

    monkeypatch.setattr(harness, "stream", stream)
    assert model.generate_until([request(LONG, {"max_gen_toks": max_new})]) == [""]
    assert seen == [model.tokenizer.encode(LONG)[-kept:]]


def test_a_reply_ends_before_the_first_of_its_strings(runs: Runs) -> None:
    model = HarnessModel(load_checkpoint(runs[0]), batch_size=2)
    settings = {"max_gen_toks": 20, "temperature": 0.9, "do_sample": True, "until": []}
    (free,) = model.generate_until([request("The", settings)])
    assert len(free) > 12
    for until in ([free[7:10]], [free[9:11], free[5:6]], free[3:5], ["", "nowhere in it"]):
        (cut,) = model.generate_until([request("The", {**settings, "until": until})])
        ends = [e for e in ([until] if isinstance(until, str) else until) if e and e in free]
        assert cut == free[: min([free.index(e) for e in ends], default=len(free))]
    assert free.startswith(
        model.generate_until([request("The", {**settings, "max_gen_toks": 3})])[0]
    )


def test_a_question_asked_again_is_sampled_again(runs: Runs) -> None:
    model = HarnessModel(load_checkpoint(runs[0]))
    settings = {"max_gen_toks": 20, "temperature": 1.0, "do_sample": True}
    again = model.generate_until([request("Ada", settings)] * 3)
    assert len(set(again)) == 3
    assert again == model.generate_until([request("Ada", settings)] * 3)
    greedy = model.generate_until([request("Ada", {**settings, "do_sample": False})] * 2)
    assert greedy[0] == greedy[1]
    unknown = {**settings, "num_beams": 4}
    with pytest.raises(ValueError, match="num_beams"):
        model.generate_until([request("Ada", unknown)])


def test_no_text_can_forge_a_turn(runs: Runs) -> None:
    checkpoint = load_checkpoint(runs[1])
    tokenizer = checkpoint.tokenizer
    control = {tokenizer.control(token) for token in CONTROL_TOKENS}
    model = HarnessModel(checkpoint, chat=True)
    forged = model.apply_chat_template([{"role": "user", "content": "So?"}])
    for text in ("".join(CONTROL_TOKENS), forged, '"}]}', "\x00 \ud800 🙂 "):
        messages = [Message(role=r, content=text) for r in ("system", "user", "assistant", "user")]
        ids, rest = model.begin(model.apply_chat_template([{**m} for m in messages]))  # type: ignore
        assert (ids, rest) == (render_prompt(messages, tokenizer), "")
        assert Counter(ids)[tokenizer.end_of_turn] == 4
        assert not control & set(model.pair(model.apply_chat_template([]), text)[1])
        ids, _ = HarnessModel(checkpoint).pair(text or "x", text)
        assert control & set(ids) == {tokenizer.end_of_text}
    with pytest.raises(ValueError, match="by itself"):
        model.begin("a text")
    with pytest.raises(ValueError, match="tool"):
        model.apply_chat_template([{"role": "tool", "content": ""}])


def test_what_is_scored_is_the_text_however_its_tokens_join(checkpoint: Checkpoint) -> None:
    model, tokenizer = HarnessModel(checkpoint), checkpoint.tokenizer
    words = ["He", "work", "birth", "in the", "a ", " ", "was  born", ""]
    joined = 0
    for context in words:
        for continuation in ("r", "s", "er", "ading", "in", " born", "  x", "h", "\n"):
            before, after = model.pair(context, continuation)
            assert after, (context, continuation)
            assert tokenizer.decode((before + after)[1:]) == context + continuation
            joined += tokenizer.encode(context + continuation) != (before + after)[1:]
    assert joined > 2  # where a plain encoding has a token that lies in both


def test_settings_that_change_nothing_are_none_of_our_business() -> None:
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0, "temperature": None}
    sampling, _ = sampling_of({"until": [], "do_sample": True, "max_gen_toks": 5, **neutral}, 3)
    assert sampling == Sampling(5, 1.0, seed=3)
    with pytest.raises(ValueError, match="num_beams"):
        sampling_of({"until": [], "max_gen_toks": 5, "num_beams": 4}, 1)


def test_a_reply_that_is_begun_goes_on(runs: Runs) -> None:
    checkpoint = load_checkpoint(runs[1])
    tokenizer = checkpoint.tokenizer
    history = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It is "}]
    model = HarnessModel(checkpoint, chat=True)
    prompt = model.apply_chat_template(history, add_generation_prompt=False)
    asked = render_prompt([Message(role="user", content="Who?")], tokenizer)
    assert model.begin(prompt) == (asked, "It is ")
    kept = tokenizer.encode("It is")
    rest = tokenizer.encode("It is Ada")[len(kept) :]
    assert model.pair(prompt, "Ada") == (asked + kept, rest)


# ---- a pair on the same items ---------------------------------------------------------------


class Reader(HarnessModel):
    """Gives a choice that stands in its question, or one of a list, the higher likelihood."""

    favourites: tuple[str, ...] = ()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        self.swap(requests)
        found = [request.args for request in requests]
        return [
            (float(choice in (self.favourites or question)), False) for question, choice in found
        ]


@pytest.fixture
def reading(folder: Path) -> Path:
    """A task whose every question holds its answer."""
    words = ["ada", "bob", "cyd", "eve"]
    docs = [{"question": f"say {w} ", "choices": [w, words[i - 3]]} for i, w in enumerate(words)]
    file = folder / "reading.json"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    files = {"dataset_path": "json", "test_split": "test"}
    files["dataset_kwargs"] = {"data_files": {"test": str(file)}}  # type: ignore[assignment]
    task = {"task": "reading", **files, **TASKS["tiny_choice"]}
    (folder / "reading.yaml").write_text(json.dumps(task))
    return folder


def test_what_does_not_depend_on_the_question_is_exposed_by_another_items(
    runs: Runs, reading: Path
) -> None:
    checkpoint = load_checkpoint(runs[0])
    every = {}
    for column, favourites in {"base": ("ada", "bob"), "instruct": ()}.items():
        for swapped in (False, True):
            model = Reader(checkpoint, swapped=swapped)
            model.favourites = favourites
            every[column + harness.SWAPPED * swapped] = evaluate(model, reading, "reading")
    (found,) = harness.compare(every).values()
    assert found.scores["instruct"].value == 1
    assert found.swapped["instruct"].value == 0  # the other item's question holds the other choice
    assert found.scores["base"].value == found.swapped["base"].value
    assert found.differences["base - swapped"].value == 0
    assert found.differences["instruct - swapped"].value == 1
    assert found.scores["base"].value == 0.75  # wrong only of eve, whose other choice is ada
    assert found.differences["instruct - base"].value == 0.25
    assert (found.gained, found.lost) == (["3"], [])


def test_identical_models_differ_by_zero(runs: Runs, folder: Path) -> None:
    found = {t: evaluate(HarnessModel(load_checkpoint(runs[1])), folder, t) for t in TASKS}
    for task, result in found.items():
        columns = ("base", "instruct")
        every = {c + s: result for c in columns for s in ("", harness.SWAPPED)}
        compared = harness.compare(every)
        assert bool(compared) == (task != "tiny_text")  # bits a byte are no mean over items
        assert not harness.compare(every | {"instruct": result | {"results": {task: {}}}})
        for metric in compared.values():
            assert metric.differences["instruct - base"].value == 0
            assert (metric.gained, metric.lost) == ([], [])


def test_a_planted_difference_is_found_with_its_sign_and_interval() -> None:
    base = {str(i): float(i % 4 == 0) for i in range(40)}
    instruct = {str(i): float(i % 4 != 1) for i in range(40)}
    found = compared({"base": base, "instruct": instruct}, {"base": base, "instruct": base})
    difference = found.differences["instruct - base"]
    assert difference.value == pytest.approx(0.5)
    assert difference.low is not None
    assert 0 < difference.low < 0.5
    assert found.differences["instruct - swapped"] == difference
    assert found.gained == [str(i) for i in range(40) if i % 4 in (2, 3)]
    assert found.lost == []
    back = compared({"base": instruct, "instruct": base}, {"base": base, "instruct": base})
    assert back.differences["instruct - base"].value == pytest.approx(-0.5)
    assert (back.gained, back.lost) == ([], found.gained)
    with pytest.raises(ValueError, match="same items"):
        compared({"base": base, "instruct": {"0": 1.0}}, {})


def test_a_pair_is_asked_the_same_items_and_every_reply_is_logged(
    runs: Runs,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, log = tmp_path / "out.json", tmp_path / "log.jsonl"
    pair = ["--base", runs[0], "--instruct", runs[1], "--device", "cpu", "--chat", "--shots", 1]
    options = ["--tasks", "tiny_choice,tiny_reply", "--include-path", folder]
    call(monkeypatch, *pair, *options, "--out", out, "--log", log)
    printed = capsys.readouterr().out
    assert "tiny_choice acc.differences.instruct - base_examples" in printed
    assert "tiny_choice acc: items gained " in printed
    written = json.loads(out.read_text())
    assert written["runs"][0].keys() == {"base", "instruct"}
    assert written["settings"]["shots"] == 1
    assert written["settings"]["qa"] is None
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    columns = {f"{c}{s}" for c in ("base", "instruct", "base_examples") for s in ("", ", swapped")}
    assert {row["column"] for row in rows} == columns == written["columns"].keys()
    assert len(rows) == len(columns) * 2 * len(DOCS)
    asked = {(r["column"], r["item"]): r["asked"][0] for r in rows if r["task"] == "tiny_reply"}
    for i, doc in enumerate(DOCS):
        assert asked["base", i] == doc["question"]
        assert asked["base, swapped", i] == DOCS[(i + 1) % len(DOCS)]["question"]
    acc = written["compared"]["tiny_choice acc"]
    for column in ("base", "instruct", "base_examples"):
        alone = written["columns"][column]["results"]["tiny_choice"]["acc,none"]
        assert acc["scores"][column]["share"] == pytest.approx(alone)
        assert acc["scores"][column]["high"] > acc["scores"][column]["low"]
    call(monkeypatch, runs[1], *options, "--chat", "--out", out)
    alone = json.loads(out.read_text())["results"]
    assert alone == written["columns"]["instruct"]["results"]


def test_ifeval_runs_on_a_pair(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nltk = pytest.importorskip("nltk", reason="requirements-eval.txt")
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)  # for a few of its instructions
    ask = {"key": 1, "prompt": "Who? No commas.", "instruction_id_list": ["punctuation:no_comma"]}
    (tmp_path / "asked.json").write_text(json.dumps(ask | {"kwargs": [{}]}) + "\n")
    shipped = Path(lm_eval.__file__).parent / "tasks" / "ifeval" / "ifeval.yaml"
    files = {"data_files": {"train": str(tmp_path / "asked.json")}}
    task: dict[str, Any] = {"task": "few_ifeval", "include": str(shipped), "dataset_path": "json"}
    task |= {"dataset_kwargs": files, "generation_kwargs": {"until": [], "max_gen_toks": 8}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "few.yaml").write_text(json.dumps(task))
    pair = ["--base", runs[0], "--instruct", runs[1], "--device", "cpu", "--chat"]
    call(monkeypatch, *pair, "--tasks", "few_ifeval", "--include-path", tmp_path / "tasks")
    printed = capsys.readouterr().out
    assert "few_ifeval prompt_level_strict_acc.differences.instruct - base" in printed


@pytest.mark.parametrize("given", [[], ["--base", "a"], ["a", "--base", "b", "--instruct", "c"]])
def test_neither_one_checkpoint_nor_a_pair_is_told(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        call(monkeypatch, *given, "--tasks", "tiny_choice")
    assert "name one checkpoint, or --base and --instruct" in capsys.readouterr().err


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
    harness.main()


def test_the_command_prints_the_table_and_writes_where_it_comes_from(
    runs: Runs,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.json"
    options = ["--tasks", "tiny_choice,tiny_text", "--include-path", folder, "--device", "cpu"]
    call(monkeypatch, runs[1], *options, "--limit", 2, "--out", out, "--num-fewshot", 0)
    printed = capsys.readouterr()
    assert "|tiny_choice|" in printed.out
    assert "bits_per_byte" in printed.out
    written = json.loads(out.read_text())
    assert written["n-samples"]["tiny_choice"]["effective"] == 2
    assert written["settings"]["limit"] == 2
    assert {"lm_eval", "commit", "torch", "device"} <= set(written["settings"])
    assert written["runs"][0]["instruct"]["step"] == 6
    assert written["results"]["tiny_choice"]["acc,none"] in (0.0, 0.5, 1.0)
    call(monkeypatch, runs[1], *options, "--chat")
    assert "note: 3 of 12 texts are too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "tiny_choice,nosuch"], "the harness has no nosuch"),
        (["--tasks", "tiny_choice", "--limit", "0"], "--limit is 0"),
        (["--tasks", "tiny_choice", "--batch-size", "-1"], "--batch-size is -1"),
        (["--tasks", ","], "No tasks specified"),
        (["--tasks", "tiny_choice", "--include-path", "gone"], "--include-path gone"),
        (["--tasks", "tiny_choice", "--out", "gone/x.json"], "--out gone/x.json"),
        (["--tasks", "tiny_choice", "--shots", "2"], "--shots and --qa are for the base of a pair"),
        (["--tasks", "strange"], "--tasks: a task fails with UndefinedError: "),
        (["--tasks", "empty"], "--tasks: a task fails with "),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str],
    message: str,
    runs: Runs,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = json.loads((folder / "tiny_choice.yaml").read_text())
    strange = task | {"task": "strange", "doc_to_text": "{{nobody.asks}}"}
    (folder / "strange.yaml").write_text(json.dumps(strange))
    (folder.parent / "none.json").write_text("")
    none = {"data_files": {"test": str(folder.parent / "none.json")}}
    empty = task | {"task": "empty", "dataset_kwargs": none}
    (folder / "empty.yaml").write_text(json.dumps(empty))
    with pytest.raises(SystemExit, match="1"):
        call(monkeypatch, runs[0], "--include-path", folder, *options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_bug_of_our_own_is_not_told_as_a_tasks(
    runs: Runs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(HarnessModel, "score", fails)
    with pytest.raises(RuntimeError, match="ours"):
        call(monkeypatch, runs[0], "--include-path", folder, "--tasks", "tiny_choice")


def test_a_folder_that_is_no_checkpoint_and_a_missing_harness_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        call(monkeypatch, tmp_path, "--tasks", "tiny_choice")
    assert "meta.json" in capsys.readouterr().err
    monkeypatch.setattr(harness, "LM", object)
    with pytest.raises(SystemExit, match="1"):
        call(monkeypatch, tmp_path, "--tasks", "tiny_choice")
    assert "requirements-eval.txt" in capsys.readouterr().err
