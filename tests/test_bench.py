"""The benches: that each runs, in which order, and what the tables say. No real peer is needed."""

from __future__ import annotations

import json
import pickle
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import cases, measure, rounds, table, workers
from bench.__main__ import main
from bench.cases import BENCHES, ROOT
from bench.launch import FIRST_STEP
from data.shards import load_examples, load_tokens
from model.gpt import GPT, ModelConfig
from runtime.device import environment
from tests.forked import Forked

FIGURES = {
    "train": {"tokens_per_second", "start_seconds", "peak_memory"},
    "loss": {"total_seconds", "val_loss", "seconds_to_loss", "tokens_to_loss"},
    "sft": {"useful_tokens_per_second", "useful_share", "peak_memory"},
    "sample": {"tokens_per_second_one", "first_token_seconds_one", "tokens_per_second_ragged"},
    "prepare": {"megabytes_per_second_core", "megabytes_per_second_machine", "peak_memory"},
    "profile": {"milliseconds", "calls", "share"},
    "gpu": {"seconds"},
}
BESIDE_NANOGPT = ("train", "loss", "prepare", "sample", "gpu")
NANOGPT = {
    "train.py": """
import sys, time
o = dict(word[2:].split("=") for word in sys.argv[1:] if word.startswith("--"))
if torch := sys.modules.get("torch"):  # the first step is waited for
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()
for i in range(int(o["max_iters"]) + 1):
    if i % int(o["eval_interval"]) == 0:
        print(f"step {i}: train loss 4.0000, val loss 3.5000")
    time.sleep(1e-4)
    if i % int(o["log_interval"]) == 0:
        print(f"iter {i}: loss 4.0000, time 1.00ms, mfu 1.00%")
""",
    "model.py": """
from types import SimpleNamespace as GPTConfig
import torch
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
    def generate(self, ids, n, top_k):
        return torch.cat([ids, ids[:, :1].repeat(1, n)], 1)
""",
    "configurator.py": "",
    "data/shakespeare_char/prepare.py": """
from pathlib import Path
assert len(Path(__file__).with_name("input.txt").read_text()) > 1000
""",
}


@pytest.fixture(scope="module")
def nanogpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of what could be nanoGPT."""
    checkout = tmp_path_factory.mktemp("peers") / "nanoGPT"
    for name, code in NANOGPT.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(code)
    return checkout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, nanogpt: Path) -> dict[str, Any]:
    """One result file of each bench, by its name."""
    out = tmp_path_factory.mktemp("results")
    found = workers.machine("cpu", quick=True)

    def call(function: str, **arguments: Any) -> cases.Figures:
        if function == "bench.workers:machine":  # once is enough
            return {**found, "peak_memory": 1}
        if arguments.get("name", "").startswith("ours, bucketed"):
            return rounds.call(function, **arguments)  # one in a process of its own will do
        return {**getattr(workers, function.split(":")[1])(**arguments), "peak_memory": 1}

    def run(what: str) -> None:
        beside = ["--nanogpt", str(nanogpt)] if what in BESIDE_NANOGPT else []
        main([what, "--quick", "--device=cpu", f"--out={out}", *beside])

    def start(command: Any, values: Any, *args: Any, **env: Any) -> rounds.Output:
        if command[:2] == ["-m", "bench"]:
            main([Template(str(word)).safe_substitute(values) for word in command[2:]])  # as above
        elif command[:2] != ["-m", "pytest"]:
            return rounds.start(command, values, *args, **env)
        return rounds.Output([], 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(measure, "call", call)
        patch.setattr(measure, "start", start)
        processes = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE)
        patch.setattr(rounds, "subprocess", processes)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, ("gpu", "loss", "prepare")))  # the first runs the others
    return {(r := json.loads(f.read_text()))["what"]: r for f in out.glob("*-cpu-quick*.json")}


def test_the_profile_of_a_drawn_token_is_of_one_forward_pass() -> None:
    case = BENCHES["profile"]["cases"]["quick"] | {"recipe": "modern", "compile": False}
    found = workers.profile(case | {"prompt_tokens": 4, "rows": 99}, "cpu")
    calls = {name: row["calls"] for name, row in found["operators"]}
    assert calls["aten::mm"] == 6 * case["n_layer"] + 1
    assert not any("Backward" in name for name in calls)


@pytest.mark.parametrize("what", FIGURES)
def test_each_runs_and_says_what_it_measured(what: str, results: dict[str, Any]) -> None:
    result = results[what]
    keys = {"what", "case", "date", "command", "machine", "peers", "settings", "rows"}
    assert set(result) == keys
    assert {"commit", "torch", "python", "device", "cpu", "cores"} <= set(result["machine"])
    assert min(result["machine"][k] for k in ("matrix_flops", "copy_bytes_per_second")) > 0
    assert result["command"].startswith(f"python -m bench {what} --quick --device=cpu --out=")
    assert result["peers"] == ({"nanoGPT": "unknown"} if what in BESIDE_NANOGPT else {})
    for row in result["rows"]:
        assert "error" not in row
        missing = FIGURES[what] - set(row["runs"][0])
        assert missing <= ({"tokens_per_second_ragged"} if row["name"] == "nanoGPT" else set()), (
            missing
        )
        if what != "loss" or row["name"] == "nanoGPT":
            assert all(v > 0 for v in row["runs"][0].values())
    for name, value in BENCHES[what]["cases"]["quick"].items():
        if name != "tokenizer":  # of a list of them, that of this result
            assert result["settings"][name] == value


def test_what_is_particular_to_a_bench_is_recorded(results: dict[str, Any]) -> None:
    train, loss, sample = (results[what] for what in ("train", "loss", "sample"))
    assert [row["micro_batch_size"] for row in train["rows"]] == [4, 4, 4]
    assert train["settings"]["micro_batch_search"].keys() == {row["name"] for row in train["rows"]}
    assert train["settings"]["text"] == "random ids"
    assert loss["settings"]["target"] == 3.5  # where nanoGPT ended
    assert [row.get("note") for row in loss["rows"]] == ["0 of 1 runs reached the loss"] * 2 + [
        None
    ]
    curve = loss["settings"]["curves"]["ours, gpt2, pass 1"]
    assert [tokens for _, tokens, _ in curve] == [192, 384, 576, 768]
    assert curve[0][0] < curve[-1][0] < loss["rows"][0]["runs"][0]["total_seconds"]
    assert sample["settings"]["decoding"] == "greedy"
    assert results["prepare"]["case"] == "quick-byte"
    assert [row["name"] for row in results["sft"]["rows"]] == [
        *("ours, bucketed", "padded to longest", "padded to context")
    ]


def test_results_and_tables_name_no_folder_of_this_machine(
    results: dict[str, Any], tmp_path: Path
) -> None:
    assert str(tmp_path.parent) not in json.dumps(results)
    assert rounds.without_folders("No such file: '/home/me/x y.py' and a/b") == (
        "No such file: 'x y.py' and a/b"
    )


def test_a_profile_is_a_table(results: dict[str, Any]) -> None:
    lines = table.table(results["profile"])
    assert lines[2:4] == ["| | calls a step | ms a step | share |", "|---|---|---|---|"]
    runs = [row["runs"][0] for row in results["profile"]["rows"]]
    milliseconds = [run["milliseconds"] for run in runs]
    assert len(runs) == 3
    assert milliseconds == sorted(milliseconds, reverse=True)
    step = 1e3 * 4 * 16 / results["profile"]["settings"]["tokens_per_second"]
    assert 0.002 * step < milliseconds[0] < 20 * step  # in the same unit
    assert milliseconds[0] / runs[0]["share"] == pytest.approx(milliseconds[1] / runs[1]["share"])


def test_the_command_for_a_gpu_runs_all_of_it(results: dict[str, Any]) -> None:
    rows = {row["name"]: row["runs"][0]["seconds"] for row in results["gpu"]["rows"]}
    assert [*rows] == [*BENCHES["gpu"]["commands"]]
    assert all(seconds > 0 for seconds in rows.values())


def test_what_fails_in_the_command_for_a_gpu_is_named_and_the_rest_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(words: Any, values: Any) -> rounds.Output:
        if "--data.layout=packed" in words:
            raise rounds.WorkerError("out of luck")
        return rounds.Output([], 1.0)

    monkeypatch.setattr(measure, "start", start)
    monkeypatch.setattr(measure, "call", lambda *_, **__: {"type": "cpu", "peak_memory": 1})
    with pytest.raises(SystemExit, match="1"):
        main(["gpu", "--quick", "--out", str(tmp_path)])
    assert "error: failed: tuning, packed" in capsys.readouterr().err
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows if "error" in row] == ["tuning, packed"]
    assert sum(row["runs"][0] == {"seconds": 1.0} for row in rows) == len(rows) - 1


def test_a_result_of_another_size_does_not_replace_that_of_the_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {"type": "cpu", "peak_memory": 1}
    monkeypatch.setattr(measure, "call", lambda *_, **__: dict(machine))
    monkeypatch.setattr(measure, "interleave", lambda calls, passes: [])
    for own in ([], ["--n-layer", "3"], ["--n-layer", "2"]):  # two layers are the case's own
        main(["sample", "--quick", "--out", str(tmp_path), *own])
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == ["sample-cpu-quick-n_layer-3.json", "sample-cpu-quick.json"]


def test_turns_are_a_b_b_a() -> None:
    ran: list[str] = []

    def worker(name: str) -> cases.Figures:
        ran.append(name)
        return {"speed": float(ran.count(name))}

    names = ("ours", "nanoGPT", "nanochat")
    rows = rounds.interleave({name: partial(worker, name) for name in names}, 4)
    assert ran == [*names, *names[::-1], *names, *names[::-1]]
    assert [row["runs"] for row in rows] == [[{"speed": v} for v in (1.0, 2.0, 3.0, 4.0)]] * 3


def test_a_failing_peer_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise ValueError('no module named /home/me/tiktoken')")

    def broken() -> cases.Figures:
        return rounds.start([script], {}).figures()

    ours, peer = rounds.interleave({"ours": lambda: {"speed": 2.0}, "nanochat": broken}, 2)
    assert peer == {
        "name": "nanochat",
        "runs": [None, None],
        "error": "no module named tiktoken",
    }
    assert ours["runs"] == [{"speed": 2.0}] * 2
    assert capsys.readouterr().err.count("nanochat: error: no module named") == 1
    with pytest.raises(ValueError, match="nothing of ours ran"):
        rounds.interleave({"ours": broken}, 1)


def bench(case: dict[str, Any], folder: Path, output: rounds.Output, **machine: Any) -> Any:
    """A bench under way whose runs print an output."""
    made = object.__new__(measure.Bench)
    made.case, made.folder, made.machine = case, folder, {"type": "cpu", "peak_flops": None}
    made.machine |= machine
    made.of, made.run = BENCHES["loss"], lambda *_, **__: (output, [])  # type: ignore[method-assign]
    return made


def test_speed_is_that_between_the_first_logged_line_and_the_last(tmp_path: Path) -> None:
    lines = [(2.0, FIRST_STEP), (2.1, "iter 0: loss 4.2, time 1ms"), (9.0, "iter 10: loss")]
    lines += [
        (10.0, "iter 20: loss 4.1"),
        (11.0, "iter 30: loss 4.0"),
        (11.5, '{"peak_memory": 7}'),
    ]
    case = {**BENCHES["train"]["cases"]["quick"], "compile": False}
    under_way = bench(case, tmp_path, rounds.Output(lines, 11.6), peak_flops=1e9)
    figures = under_way.train_once({"nanoGPT": []}, "nanoGPT", 4)
    assert figures["tokens_per_second"] == 20 * 4 * 16 / 2.0
    assert (figures["start_seconds"], figures["peak_memory"]) == (2.0, 7)
    assert 0 < figures["mfu"] < 1
    under_way.case["compile"] = True
    assert "cold_start_seconds" in under_way.train_once({"nanoGPT": []}, "nanoGPT", 4)
    (tmp_path / "nanoGPT-4").mkdir()  # what was compiled
    assert "start_seconds" in under_way.train_once({"nanoGPT": []}, "nanoGPT", 4)


def test_the_time_of_nanogpts_evaluations_is_not_of_training(tmp_path: Path) -> None:
    lines = [(float(i), f"iter {10 * i}: loss 4.2, time 1ms") for i in range(1, 5)]
    lines = [(0.5, "iter 0: loss"), *lines[:1], (7.0, "iter 20: loss 4"), (8.0, "iter 30: loss")]
    lines += [(20.0, "step 40: train loss 1.5000, val loss 1.8857"), (21.0, "iter 40: loss 4.0")]
    figures = bench(BENCHES["loss"]["cases"]["quick"], tmp_path, rounds.Output(lines, 22.0))
    assert figures.loss_of_nanogpt() == {
        "seconds_to_loss": 20.0,
        "tokens_to_loss": 40 * 12 * 16,
        "training_seconds": 0.5 + 1.0 + 2 * 0.75,  # two of four stretches hold an evaluation
        "total_seconds": 22.0,
        "val_loss": 1.8857,
    }


def test_a_loss_counts_from_the_first_evaluation_at_or_below_it() -> None:
    rows: list[rounds.Row] = [{"name": "ours, gpt2", "runs": [{}, {}]}]
    curves: dict[str, list[measure.Curve]] = {
        "ours, gpt2": [[(1.0, 10, 3.0), (2.0, 20, 2.0), (3.0, 30, 1.5)], [(1.0, 10, 3.0)]]
    }
    measure.settle(rows, curves, 2.0)
    assert rows[0]["runs"][0] == {"seconds_to_loss": 2.0, "tokens_to_loss": 20}
    assert rows[0]["runs"][1] == {"seconds_to_loss": None, "tokens_to_loss": None}
    assert rows[0]["note"] == "1 of 2 runs reached the loss"


def test_of_several_micro_batch_sizes_the_best_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def once(self: Any, commands: Any, name: str, micro: int) -> cases.Figures:
        if micro == 4 and "gpt2" in name:
            raise rounds.WorkerError("out of memory in /home/me/train.py")
        return {"tokens_per_second": float(micro)}

    monkeypatch.setattr(measure.Bench, "train_once", once)
    monkeypatch.setattr(measure, "call", lambda *_, **__: {"type": "cpu", "peak_memory": 1})
    command = ["--quick", "--micro-batch-sizes", "1", "2", "4", "--steps", "30", "--compile"]
    main(["train", *command, "--out", str(tmp_path)])
    result = json.loads(
        (tmp_path / "train-cpu-quick-compiled-micro_batch_sizes-1-2-4-steps-30.json").read_text()
    )
    assert [row["micro_batch_size"] for row in result["rows"]] == [2, 4]
    search = result["settings"]["micro_batch_search"]["ours, gpt2, AdamW"]
    assert search["4"] == {"tokens_per_second": 0.0, "error": "out of memory in train.py"}
    assert result["settings"]["steps"] == 30


@pytest.mark.parametrize(("bf16", "layout"), [(True, "packed"), (False, "bucketed")])
def test_tuning_is_laid_out_as_on_that_device(
    bf16: bool, layout: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def call(function: str, **arguments: Any) -> cases.Figures:
        if function == "bench.workers:machine":
            return {"type": "cuda" if bf16 else "cpu", "bf16": bf16, "peak_memory": 1}
        # The machine here is a CPU in any case; it can pack, only without profit.
        return workers.tune(**arguments | {"device": "cpu"})

    monkeypatch.setattr(measure, "call", call)
    case = ["--n-layer", "1", "--batch-size", "8", "--vocab-size", "300"]
    main(["sft", "--quick", "--out", str(tmp_path), *case])
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert rows[0]["name"] == f"ours, {layout}"
    shares = [row["runs"][0]["useful_share"] for row in rows]
    assert shares[0] >= shares[1] > shares[2]


def test_sampling_warms_up_in_the_buffers_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[tuple[int, int]] = []
    made = GPT.new_cache

    def new_cache(self: GPT, n_rows: int, room: int) -> Any:
        rooms.append((n_rows, room))
        return made(self, n_rows, room)

    monkeypatch.setattr(GPT, "new_cache", new_cache)
    case = BENCHES["sample"]["defaults"] | BENCHES["sample"]["cases"]["quick"]
    workers.sample("ours, modern", "", case, "cpu")
    one, many, ragged = (rooms[i : i + 3] for i in (0, 3, 6))
    assert one == [(1, 8 + 8)] * 3
    assert many == [(3, 8 + 8)] * 3
    assert len(set(ragged)) == 1


def test_nanogpt_samples_without_a_cache(nanogpt: Path) -> None:
    case = BENCHES["sample"]["defaults"] | BENCHES["sample"]["cases"]["quick"]
    figures = workers.sample("nanoGPT", str(nanogpt), case, "cpu")
    assert figures.keys() == {
        *("first_token_seconds_one", "tokens_per_second_one"),
        *("first_token_seconds_many", "tokens_per_second_many"),
    }


def test_random_data_are_prepared_data_of_any_vocabulary(tmp_path: Path) -> None:
    cases.random_data(tmp_path / "data", 50261, 5000, [8, 9, 10])
    assert load_tokens(tmp_path / "data", "train").max() > 50000
    assert len(load_tokens(tmp_path / "data", "val")) == 500
    examples = load_examples(tmp_path / "data", "train")
    assert [len(ids) for ids, _ in examples] == [8, 9, 10]
    assert examples[1][1].tolist() == [0] * 4 + [1] * 5
    for what in ("train", "sft"):  # as those of real tokenizers are
        assert all(case["vocab_size"] % 64 for case in BENCHES[what]["cases"].values())


def test_plain_batches_hold_every_conversation_once(tmp_path: Path) -> None:
    lengths = [8, 20, 12, 9, 30, 10, 11, 25]
    cases.random_data(tmp_path / "data", 300, 100, lengths)
    case = {"steps": 2, "micro_batch_size": 2, "block_size": 32}
    for to_context in (False, True):
        steps = [*workers.plain_batches(str(tmp_path / "data"), case, to_context)]
        batches = [batch for step in steps for batch in step]
        assert [len(step) for step in steps] == [2, 2]
        supervised = sum(
            float(batch.weights.sum()) for batch in batches if batch.weights is not None
        )
        assert supervised == sum(n - n // 2 for n in lengths)
        rows = [row.tolist() for batch in batches for row in batch.idx]
        examples = load_examples(tmp_path / "data", "train")
        whole = [
            next(r for r in rows if r[: len(ids) - 1] == ids[:-1].tolist()) for ids, _ in examples
        ]
        assert len({id(row) for row in whole}) == len(lengths)
        assert whole != rows  # in an order of their own
        assert {batch.idx.shape[1] for batch in batches} == {32} or not to_context


def test_the_plain_loss_is_ours() -> None:
    torch.manual_seed(1)
    ours = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16), 300)
    plain = workers.PlainGPT(ours.config, 300)
    plain.load_state_dict(ours.state_dict())
    idx, targets = torch.randint(300, (2, 2, 16))
    weights = (torch.rand(2, 16) < 0.5).float()
    assert torch.allclose(plain(idx, targets, weights), ours(idx, targets, weights))


def hand_made() -> dict[str, Any]:
    def runs(*speeds: float | None) -> list[dict[str, float] | None]:
        return [None if v is None else {"tokens_per_second": v, "mfu": v / 1e4} for v in speeds]

    return {
        "what": "train",
        "case": "4x128",
        "date": "2026-01-02",
        "command": "python -m bench train",
        "machine": {
            **{"type": "cpu", "device": "x86_64", "cpu": "A CPU", "cores": 2, "threads": 1},
            **{"commit": "abc", "torch": "2", "python": "3", "matrix_dtype": "float32"},
            **{"matrix_flops": 2e9, "copy_bytes_per_second": 3e9},
        },
        "peers": {"nanoGPT": "def"},
        "settings": {},
        "rows": [
            {"name": "ours", "runs": runs(100, 400, 200, 300)},
            {"name": "nanoGPT", "runs": runs(50, 400, 100, None)},
            {"name": "nanochat", "runs": runs(None, None), "error": "a | b"},
        ],
    }


def test_tables_are_made_of_the_result_files_alone() -> None:
    result = hand_made()
    text = table.render([result])
    # Ratios within a pass are .5, 1 and .5.
    assert "| ours | 250 (100..400) | 2.5% (1.0%..4.0%) |" in text
    assert "| nanoGPT | 100 (50.0..400)<br>x0.50 (0.50..1.00) | 1.0% (0.5%..4.0%) |" in text
    assert "| nanochat | a / b |" in text
    assert "2026-01-02, A CPU, 1 of 2 CPU cores; torch 2, Python 3, ours abc, nanoGPT def" in text
    assert table.render([result, {**hand_made(), "case": "0"}]).index("Training: 0") == 4
    assert text == table.render([json.loads(json.dumps(result))])


def test_the_page_shows_the_results_that_are_there(tmp_path: Path) -> None:
    page = ROOT / "docs" / "speed.md"
    copy = tmp_path / "speed.md"
    copy.write_text(page.read_text())
    main(["table", "--page", str(copy)])
    assert copy.read_text() == page.read_text()


def test_the_page_keeps_its_prose(tmp_path: Path) -> None:
    page, results = tmp_path / "speed.md", tmp_path / "results"
    results.mkdir()
    (results / "train-cpu-4x128.json").write_text(json.dumps(hand_made()))
    command = ["table", "--out", str(results), "--page", str(page)]
    main(command)
    page.write_text(f"# Speed\n\n{page.read_text()}\nWritten by hand.\n")
    once = page.read_text()
    main(command)
    assert page.read_text() == once
    assert once.startswith("# Speed")
    assert "x0.50" in once


def test_results_that_are_not_ours_are_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit, match="1"):
        main(["table", "--out", str(tmp_path), "--page", str(tmp_path / "speed.md")])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path} is damaged or of another version")
    assert error.count("\n") == 1
    assert not (tmp_path / "speed.md").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train --nanogpt {tmp}", "is no checkout of nanoGPT: no train.py there"),
        ("sample --nanochat {tmp}", "is no checkout of nanochat: no nanochat/gpt.py there"),
        ("prepare --text {tmp}/none.txt", "none.txt is no file"),
        ("prepare", "--text is missing: the file to prepare"),
        ("loss", "--text is missing: tinyshakespeare.txt"),
        ("sft --steps 0", "--steps is 0; it must be 1 or more"),
        ("sft --rounds 0", "--rounds is 0; it must be 1 or more"),
        ("train --steps 25", "--steps is 25; it must be a multiple of 10 above 10"),
        ("train --micro-batch-sizes 12 5", "--micro-batch-sizes: 5 does not divide 12 rows"),
        ("table --out {tmp}", "holds no results; run python -m bench train, ... first"),
    ],
)
def test_a_mistake_is_one_line(
    command: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure, "call", lambda *_, **__: {"type": "cpu", "peak_memory": 1})
    with pytest.raises(SystemExit, match="1"):
        main(command.format(tmp=tmp_path).split())
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_checkout_is_copied_without_its_data(nanogpt: Path, tmp_path: Path) -> None:
    (nanogpt / "data" / "shakespeare_char" / "val.bin").write_text("x")
    copy = cases.copy_tree("nanoGPT", nanogpt, tmp_path / "copy")
    assert (copy / "data/shakespeare_char/prepare.py").exists()
    assert not (copy / "data/shakespeare_char/val.bin").exists()
    assert environment(torch.device("cpu"), tmp_path)["commit"] == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a", "-C", str(copy)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith(environment(torch.device("cpu"), copy)["commit"])


def test_nanogpt_is_given_our_ids(tmp_path: Path) -> None:
    cases.random_data(tmp_path / "data", 300, 100, [2, 2])
    cases.nanogpt_data(tmp_path, tmp_path / "data")
    ids = np.fromfile(tmp_path / "train.bin", np.uint16)
    assert (ids == load_tokens(tmp_path / "data", "train")).all()
    assert (tmp_path / "meta.pkl").read_bytes() == pickle.dumps({"vocab_size": 320})


def test_limits_are_of_the_right_size() -> None:
    found = workers.machine("cpu", quick=True)
    assert 1e8 < found["matrix_flops"] < 1e14
    assert 1e7 < found["copy_bytes_per_second"] < 1e13
