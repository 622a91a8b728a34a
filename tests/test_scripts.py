"""Both training scripts, end to end: what is logged, saved, resumed and refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train_pretrain
import train_sft
from data import prepare
from data.sft import SFTDataConfig
from data.world import WorldConfig
from model.gpt import GPT
from runtime.cli import run_cli
from runtime.device import flops_per_token
from tests.conftest import Fails, pretrain_config, sft_config
from tests.forked import Forked
from training.checkpoint import load_checkpoint
from training.log import read_metrics

ROOT = Path(__file__).parents[1]
CLOCKS = ("seconds", "tokens_per_second")


def outcome(run: Path) -> tuple[list[dict[str, Any]], bytes, str]:
    """What a run must reproduce: its metrics but for the clock, and its last weights."""
    rows = read_metrics(run / "metrics.jsonl")
    last = max(run.glob("step_*"))
    kept = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
    return kept, (last / "model.safetensors").read_bytes(), last.name


def start(script: str, config: Any, folder: Path) -> Forked:
    """The script as its own process, on a resolved config."""
    file = folder / f"{script}.json"
    file.write_text(json.dumps(asdict(config)))
    command = [sys.executable, str(ROOT / f"{script}.py"), "--config", str(file)]
    return Forked(command)


@pytest.mark.parametrize("script", ["train_pretrain", "train_sft"])
def test_killed_at_a_random_step_and_resumed_is_bit_identical(
    script: str, world_dir: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    def config(out: Path) -> Any:
        if script == "train_pretrain":
            c: Any = pretrain_config(world_dir, out, steps=60)
            eval_every = 20
        else:
            c = sft_config(world_dir, runs[0], out, steps=60)
            eval_every = 60  # it draws 64 replies each time
        return replace(c, run=replace(c.run, eval_every=eval_every, save_every=7))

    whole, killed = config(tmp_path / "whole"), config(tmp_path / "killed")
    reference = start(script, whole, tmp_path)
    assert reference.wait(300) == 0, reference.stderr.read()
    step = random.randint(1, 45)  # of 60: the kill must come before the end
    process = start(script, killed, tmp_path)
    metrics, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 300
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < step:
        assert time.monotonic() < deadline, f"step {step} never came"
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    resumed = start(script, killed, tmp_path)
    assert resumed.wait(300) == 0, resumed.stderr.read()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole"), f"killed after step {step}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("script", [train_pretrain, train_sft])
def test_a_signal_saves_and_the_same_command_goes_on(
    script: Any,
    number: signal.Signals,
    world_dir: Path,
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def config(out: Path) -> Any:
        if script is train_pretrain:
            return pretrain_config(world_dir, out, steps=9)
        return sft_config(world_dir, runs[0], out, steps=9)

    real = script.train_step

    def interrupted(*args: Any) -> Any:
        if args[3] == 4:  # during the fifth step, where nothing is due but an evaluation
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(script, "train_step", interrupted)
    with pytest.raises(SystemExit, match=str(128 + number)):  # so that what follows && is not run
        script.main(config(tmp_path / "run"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "stopped at step 5 of 9; the same command goes on"
    monkeypatch.setattr(script, "train_step", real)
    assert script.main(config(tmp_path / "run")).name == "step_000009"
    script.main(config(tmp_path / "whole"))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_finished_run_given_again_does_nothing(
    world_dir: Path, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, instruct = runs
    before = {p: p.stat().st_mtime_ns for run in runs for p in run.rglob("*")}
    train_pretrain.main(pretrain_config(world_dir, base, steps=12))
    train_sft.main(sft_config(world_dir, base, instruct, steps=6))
    assert capsys.readouterr().out.count("complete") == 2
    assert before == {p: p.stat().st_mtime_ns for run in runs for p in run.rglob("*")}


def test_metrics_have_the_documented_keys_and_losses_fall(runs: tuple[Path, Path]) -> None:
    for run, evaluations in zip(runs, ([5, 10, 12], [5, 6]), strict=True):
        rows = read_metrics(run / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert [row["step"] for row in rows if "val_loss" in row] == evaluations
        keys = {"tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
        assert all(keys <= set(row) for row in rows)
        assert rows[-1]["loss"] < rows[0]["loss"]
    assert "val_bpb" in read_metrics(runs[0] / "metrics.jsonl")[-1]
    assert {"stop_logprob", "stop_rate"} <= set(read_metrics(runs[1] / "metrics.jsonl")[-1])


def test_mfu_is_of_pretraining_alone(
    world_dir: Path, runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.device.peak_flops", lambda device: 1e10)
    train_pretrain.main(pretrain_config(world_dir, tmp_path / "base", steps=1))
    train_sft.main(sft_config(world_dir, runs[0], tmp_path / "instruct", steps=1))
    row = read_metrics(tmp_path / "base" / "metrics.jsonl")[-1]
    model = load_checkpoint(tmp_path / "base").model
    assert row["mfu"] == pytest.approx(
        row["tokens_per_second"] * flops_per_token(model) / 1e10, abs=1e-4
    )
    assert "mfu" not in read_metrics(tmp_path / "instruct" / "metrics.jsonl")[-1]


def test_checkpoints_say_what_they_are_and_what_they_were_made_from(
    runs: tuple[Path, Path],
) -> None:
    base, instruct = (json.loads((max(r.glob("step_*")) / "meta.json").read_text()) for r in runs)
    assert (base["kind"], instruct["kind"]) == ("base", "instruct")
    assert base["step"] == 12
    assert instruct["base"]["step"] == 12
    assert base["config"]["run"]["seed"] == 1
    for meta in (base, instruct):
        assert {"data", "prepared", "environment", "tokenizer", "metrics", "files"} <= set(meta)
        assert {"commit", "torch", "device"} <= set(meta["environment"])


def test_the_same_seed_repeats_a_run_and_another_does_not(world_dir: Path, tmp_path: Path) -> None:
    config = pretrain_config(world_dir, tmp_path / "a", steps=3)
    other = replace(config, run=replace(config.run, dir=str(tmp_path / "c"), seed=2))
    train_pretrain.main(config)
    train_pretrain.main(pretrain_config(world_dir, tmp_path / "b", steps=3))
    train_pretrain.main(other)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert outcome(tmp_path / "a") != outcome(tmp_path / "c")


# ---- a user's mistake is one line and exit code 1 --------------------------------------------


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--model.n_layr=3", "n_layr"),
        ("--optim.lr=fast", "optim.lr"),
        ("--model.n_head=3", "model.n_head=3 does not divide model.n_embd=32"),
        ("--optim.warmup_steps=500", "optim.warmup_steps=500 does not fit"),
        ("--data.micro_batch_size=99", "data.micro_batch_size"),
        ("--model.norm=batchnorm", "model.norm"),
        ("--run.device=abacus", "device 'abacus'"),
        ("--data.path=nowhere", "nowhere not found"),
        ("--model.block_size=100000", "model.block_size"),
        ("--config=nowhere.toml", "nowhere.toml"),
    ],
)
def test_pretrain_refuses(
    option: str, named: str, fails: Fails, world_dir: Path, tmp_path: Path
) -> None:
    fixed = [f"--data.path={world_dir}", f"--run.dir={tmp_path / 'r'}", "--model.n_embd=32"]
    assert named in fails(train_pretrain, *fixed, "--optim.steps=100", option)
    assert not (tmp_path / "r").exists()


def test_typos_in_a_config_file_are_named(fails: Fails, tmp_path: Path) -> None:
    file = tmp_path / "typo.toml"
    file.write_text('[data]\npath = "x"\n[run]\ndir = "y"\n[optim]\nlearning_rate = 1.0\n')
    assert "learning_rate" in fails(train_pretrain, "--config", file)
    file.write_text("[data\n")
    assert "typo.toml" in fails(train_pretrain, "--config", file)


def test_a_run_folder_that_holds_something_else_is_refused(
    fails: Fails, world_dir: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    fixed = [f"--data.path={world_dir}", "--optim.steps=12"]
    assert "holds no run" in fails(train_pretrain, *fixed, f"--run.dir={tmp_path}")
    error = fails(train_pretrain, *fixed, f"--run.dir={runs[0]}")
    assert "another config" in error
    assert "model.n_embd 32 -> 128" in error
    assert "another config" in fails(
        train_sft, f"--base={runs[0]}", f"--data.path={world_dir}", f"--run.dir={runs[0]}"
    )


def test_data_that_changed_under_a_run_is_refused(
    fails: Fails, world_dir: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(world_dir, data)
    with open(data / "train.bin", "r+b") as f:
        f.write(b"\x07\x00")
    fixed = ["--optim.steps=2", f"--run.dir={tmp_path / 'run'}"]
    assert "train.bin has changed" in fails(train_pretrain, f"--data.path={data}", *fixed)


def test_sft_refuses_what_cannot_be_tuned(
    fails: Fails,
    world_dir: Path,
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, instruct = runs
    fixed = [f"--run.dir={tmp_path / 'r'}", "--optim.steps=2"]
    on_world = [*fixed, f"--data.path={world_dir}"]
    assert "is of the other kind: instruct" in fails(train_sft, f"--base={instruct}", *on_world)
    assert "not a checkpoint" in fails(train_sft, f"--base={world_dir}", *on_world)
    assert "nowhere not found" in fails(train_sft, "--base=nowhere", *on_world)
    error = fails(train_sft, f"--base={base}", *on_world, "--data.block_size=999")
    assert "data.block_size is 999; it must be 2 to 128" in error

    qa = tmp_path / "qa.jsonl"
    fixed = [f"--run.dir={tmp_path / 'q'}", "--optim.steps=2", f"--data.path={qa}"]
    qa.write_text('{"question": "Who?", "answer": "  "}\n')
    assert "qa.jsonl, line 1" in fails(train_sft, f"--base={base}", *fixed)
    long = json.dumps({"question": "Who? " * 200, "answer": "Me."})
    qa.write_text(f"{long}\n" * 4)
    assert "no conversation" in fails(train_sft, f"--base={base}", *fixed)
    qa.write_text('{"question": "Who?", "answer": "Me."}\n' * 8)  # mended: the same command goes
    monkeypatch.setattr(sys, "argv", ["train_sft", f"--base={base}", *fixed])
    run_cli(train_sft.SFTConfig, train_sft.main, "")
    qa.unlink()
    assert "qa.jsonl not found" in fails(train_sft, f"--base={base}", *fixed)


def test_sft_refuses_data_of_another_tokenizer(
    fails: Fails, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("some words and some more words " * 50)
    (tmp_path / "qa.jsonl").write_text('{"question": "Who?", "answer": "Me."}\n' * 10)
    prepare.prepare_text([tmp_path / "a.txt"], tmp_path / "text", "byte", 0.1, "text", 1)
    prepare.prepare_qa([tmp_path / "qa.jsonl"], tmp_path / "qa", tmp_path / "text", 0.1, 1)
    options = [f"--base={runs[0]}", f"--data.path={tmp_path / 'qa'}"]
    assert "another tokenizer" in fails(train_sft, *options, f"--run.dir={tmp_path / 'r'}")


def test_sft_replays_only_what_the_base_read_unless_told_otherwise(
    fails: Fails, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    prepare.prepare_world(WorldConfig(seed=1, people=6, unseen=2, bios=4), data, "byte", 0.1)
    config = pretrain_config(data, tmp_path / "base", steps=1)
    base = train_pretrain.main(replace(config, model=replace(config.model, block_size=256)))
    shutil.rmtree(data)
    prepare.prepare_world(WorldConfig(seed=2, people=6, unseen=2, bios=4), data, "byte", 0.1)
    options = [f"--data.path={data}", f"--run.dir={tmp_path / 'r'}", "--optim.steps=1"]
    error = fails(train_sft, f"--base={base}", *options, "--data.replay=0.5")
    assert "no longer the text that the base was trained on" in error
    named = SFTDataConfig(str(data), replay=0.5, replay_path=str(data))
    sft = sft_config(data, base, tmp_path / "named", steps=1)
    assert train_sft.main(replace(sft, data=named)).name == "step_000001"


def test_a_damaged_base_is_refused(
    fails: Fails, world_dir: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(max(runs[0].glob("step_*")), tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    options = [f"--base={tmp_path / 'base'}", f"--data.path={world_dir}"]
    error = fails(train_sft, *options, f"--run.dir={tmp_path / 'r'}")
    assert "model.safetensors has changed" in error


def test_a_diverging_run_stops_before_the_weights_move(
    fails: Fails, world_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script: Any = train_pretrain
    real = script.train_step

    def poisoned(*args: Any) -> Any:
        if args[3] == 2:
            with torch.no_grad():
                args[0].lm_head.weight[0] = torch.nan
        return real(*args)

    monkeypatch.setattr(train_pretrain, "train_step", poisoned)
    options = [f"--data.path={world_dir}", f"--run.dir={tmp_path}/r", "--model.block_size=128"]
    assert "step 3: loss nan" in fails(train_pretrain, *options, "--optim.steps=5")


# ---- starting points -------------------------------------------------------------------------


def test_no_steps_save_the_first_weights_and_init_from_takes_weights_over(
    fails: Fails, world_dir: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    config = pretrain_config(world_dir, tmp_path / "a", steps=0)
    first = train_pretrain.main(config)
    assert first.name == "step_000000"
    n_vocab = load_checkpoint(first).tokenizer.n_vocab
    torch.manual_seed(config.run.seed)
    expected = GPT(config.model, n_vocab).state_dict()
    assert_same(load_checkpoint(first).model.state_dict(), expected)
    assert train_pretrain.main(config) == first

    taken = replace(config, init_from=str(runs[1]), run=replace(config.run, dir=f"{tmp_path}/b"))
    taken = replace(taken, model=replace(config.model, dropout=0.1))  # no weight depends on it
    begun = load_checkpoint(train_pretrain.main(taken))
    assert_same(begun.model.state_dict(), load_checkpoint(runs[1]).model.state_dict())
    assert begun.meta["kind"] == "base"
    assert begun.meta["init_from"]["step"] == 6

    longer = replace(taken, optim=replace(taken.optim, steps=2))
    longer = replace(longer, run=replace(longer.run, dir=f"{tmp_path}/d", save_every=1))
    shutil.rmtree(train_pretrain.main(longer))
    with pytest.raises(ValueError, match="another init_from than the config now names"):
        train_pretrain.main(replace(longer, init_from=None))

    options = [f"--data.path={world_dir}", f"--run.dir={tmp_path}/c", f"--init_from={runs[0]}"]
    error = fails(train_pretrain, *options)
    assert "another architecture: model.n_layer 2 -> 4" in error
    other = tmp_path / "bytes"
    prepare.prepare_world(WorldConfig(people=6, unseen=2, bios=4), other, "byte", 0.1)
    shape = [f"--model.{k}={getattr(config.model, k)}" for k in ("n_layer", "n_head", "n_embd")]
    options = [f"--data.path={other}", *options[1:], *shape, "--model.block_size=128"]
    assert "another tokenizer" in fails(train_pretrain, *options)


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("seed", [None, 7])
def test_the_quickstart_of_a_seed_keeps_to_a_folder_of_its_own(seed: int | None) -> None:
    given = [] if seed is None else [f"SEED={seed}"]
    make = ["make", "-n", "quickstart", *given]
    said = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    folder = "out/quickstart" if seed is None else f"out/quickstart-{seed}"
    steps = [line for line in said.splitlines() if "python" in line and folder in line]
    assert len(steps) == 4
    assert f"--seed {seed or 1} " in steps[0]
    assert {p for line in steps for p in re.findall(r"out/[\w-]+", line)} == {folder}
    for line in steps[1:3]:
        assert (f"--run.seed={seed} --data.path={folder}/data" in line) == (seed is not None)
