"""Several processes train as one: the same losses, files written once, resumed by any number."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train_pretrain
import train_sft
from model.gpt import ModelConfig
from model.seen import Batch
from runtime import processes
from tests.conftest import pretrain_config, sft_config
from tests.forked import Forked
from training.checkpoint import load_checkpoint
from training.log import read_metrics
from training.tune import TuneConfig

ROOT = Path(__file__).parents[1]

# What torchrun starts: the scripts on some configs, one after another. Where `stop_at` is not None,
# the last process, and it alone, is asked to stop in the middle of that step.
WORKER = """
import json, os, signal, sys
import train_pretrain, train_sft
from runtime.cli import parse_config
from runtime.processes import finish_processes, is_first

train_sft.STOP_WITHIN = 8
for name, file, stop_at in json.loads(sys.argv[1]):
    script = {"train_pretrain": train_pretrain, "train_sft": train_sft}[name]
    real = script.train_step
    def train_step(network, optimizers, batches, step, config, *more):
        if step == stop_at and not is_first():
            os.kill(os.getpid(), signal.SIGINT)
        return real(network, optimizers, batches, step, config, *more)
    script.train_step = train_step
    kind = script.PretrainConfig if name == "train_pretrain" else script.SFTConfig
    try:
        script.main(parse_config(kind, ["--config", file]))
    except SystemExit:
        assert stop_at is not None
    script.train_step = real
finish_processes()
"""


def torchrun(jobs: list[tuple[Any, Any, int | None]], folder: Path, itself: bool = True) -> str:
    """Runs (script, config, stop_at) in two processes, one after another; what they print.

    torchrun itself imports torch three times. Else what it starts is started as it would.
    """
    listed = []
    for i, (script, config, stop_at) in enumerate(jobs):
        (folder / f"{i}.json").write_text(json.dumps(asdict(config)))
        listed.append((script.__name__, str(folder / f"{i}.json"), stop_at))
    (folder / "worker.py").write_text(WORKER)
    words = [str(folder / "worker.py"), json.dumps(listed)]
    if itself:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*launch, "--nproc_per_node=2", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [{**env, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    both = [Forked([sys.executable, *words], env=rank) for rank in ranks]
    codes = [process.wait() for process in both]
    assert codes == [0, 0], [process.stderr.read() for process in both]
    return "".join(process.stdout.read() for process in both)


def compare(run: Path, whole: Path) -> None:
    """Two runs are the same up to rounding, and each step stands in the log once."""
    rows, expected = (read_metrics(path / "metrics.jsonl") for path in (run, whole))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key in {"tokens", "loss", "grad_norm", "lr", "val_loss", "val_kl"} & row.keys():
            assert row[key] == pytest.approx(other[key], rel=1e-4), (key, row["step"])
    found, weights = (load_checkpoint(path).model.state_dict() for path in (run, whole))
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4)
    names, wanted = ({p.name for p in path.glob("[!.]*")} for path in (run, whole))
    assert names - {"step_000005"} == wanted  # of a run that was stopped there


@pytest.mark.parametrize(("recipe", "optimizer"), [("modern", "muon"), ("gpt2", "adamw")])
def test_two_processes_that_each_hold_a_share_train_as_one_that_holds_all(
    recipe: Any, optimizer: Any, world_dir: Path, tmp_path: Path
) -> None:
    def base(out: str, shard: bool = True) -> Any:
        config = pretrain_config(world_dir, tmp_path / out, steps=8)
        data, run = replace(config.data, batch_size=5), replace(config.run, shard=shard)
        c = config.model
        model = ModelConfig(recipe, c.n_layer, c.n_head, c.n_embd, c.block_size)
        optim = replace(config.optim, optimizer=optimizer)
        run = replace(run, activation_checkpointing=recipe == "gpt2")
        return replace(config, data=data, run=run, model=model, optim=optim)

    def instruct(out: str, shard: bool = True) -> Any:
        config = sft_config(world_dir, tmp_path / "one", tmp_path / out, steps=6)
        tune = TuneConfig(freeze="attn") if recipe == "gpt2" else TuneConfig()
        return replace(config, run=replace(config.run, shard=shard), tune=tune)

    train_pretrain.main(base("one", shard=False))
    train_sft.main(instruct("one_sft", shard=False))
    jobs: list[Any] = [(train_pretrain, base("two"), None)]
    jobs += [(train_pretrain, base("two_one"), 4), (train_pretrain, base("two_two"), 4)]
    jobs += [(train_sft, instruct("two_sft"), None)]
    torchrun([*jobs, (train_pretrain, base("two_two"), None)], tmp_path, itself=False)
    train_pretrain.main(base("two_one", shard=False))
    for run in ("two", "two_one", "two_two"):
        compare(tmp_path / run, tmp_path / "one")
    compare(tmp_path / "two_sft", tmp_path / "one_sft")


def test_one_process_has_nobody_to_share_with(world_dir: Path, tmp_path: Path) -> None:
    config = pretrain_config(world_dir, tmp_path / "run", steps=8)
    with pytest.raises(
        ValueError, match=r"run\.shard is for several processes; start them with tor"
    ):
        train_pretrain.main(replace(config, run=replace(config.run, shard=True)))


def test_two_processes_train_as_one_and_go_on_for_each_other(
    world_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def base(out: str) -> Any:
        config = pretrain_config(world_dir, tmp_path / out, steps=8)
        return replace(config, data=replace(config.data, batch_size=5))  # micro-batches of 2, 2, 1

    def instruct(out: str) -> Any:
        return sft_config(world_dir, tmp_path / "one", tmp_path / out, steps=6)

    def interrupted(network: Any, optimizers: Any, batches: Any, step: int, config: Any) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(network, optimizers, batches, step, config)

    def switched(out: str) -> Any:
        tune = TuneConfig(freeze="lm_head", lora_rank=3, kl=0.5, init=str(tmp_path / "one_sft"))
        return replace(instruct(out), tune=tune)

    train_pretrain.main(base("one"))
    train_sft.main(instruct("one_sft"))
    train_sft.main(switched("one_tuned"))
    # Begun by one process, to be finished by two.
    script: Any = train_pretrain
    real = script.train_step
    monkeypatch.setattr(script, "train_step", interrupted)
    with pytest.raises(SystemExit, match="130"):
        train_pretrain.main(base("one_two"))
    monkeypatch.undo()

    printed = torchrun(
        [
            (train_pretrain, base("two"), None),
            (train_pretrain, base("two_one"), 4),
            (train_pretrain, base("one_two"), None),
            (train_sft, instruct("two_sft"), None),
            (train_sft, switched("two_tuned"), None),
        ],
        tmp_path,
    )
    # Each once, not once a process.
    assert (printed.count("base checkpoint"), printed.count("stopped at step")) == (2, 1)
    compare(tmp_path / "two", tmp_path / "one")
    compare(tmp_path / "two_sft", tmp_path / "one_sft")
    compare(tmp_path / "two_tuned", tmp_path / "one_tuned")
    # Stopped by a signal to one of the two, finished by one.
    assert max((tmp_path / "two_one").glob("step_*")).name == "step_000005"
    train_pretrain.main(base("two_one"))
    for run in ("one_two", "two_one"):
        rows = read_metrics(tmp_path / run / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, 9))
        expected = read_metrics(tmp_path / "one" / "metrics.jsonl")
        assert [row["loss"] for row in rows] == pytest.approx(
            [r["loss"] for r in expected], rel=1e-4
        )


@pytest.mark.parametrize("sizes", [[4], [3, 3, 1], [1], [1, 2], [5, 5, 5, 5, 2]])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_shares_are_all_of_a_step_and_none_is_empty(
    sizes: list[int], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = 0
    batches = []
    for size in sizes:
        idx = torch.arange(first, first + size)[:, None]
        batches.append(Batch(idx, idx, None if size == 2 else torch.ones(size, 1)))
        first += size
    shared = []
    monkeypatch.setattr(processes, "world_size", lambda: n)
    for rank in range(n):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        mine = processes.my_share(batches)
        assert mine
        for batch in mine:
            assert len(batch.idx)
            if batch.weights is None or batch.weights.any():
                shared += batch.idx.flatten().tolist()
    assert sorted(shared) == list(range(first))


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "8"}])
def test_without_torchrun_a_process_is_alone(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():  # a cluster's scheduler may set a size of its own
        monkeypatch.setenv(name, value)
    assert processes.start_processes("auto") == "auto"
    assert processes.world_size() == 1
    assert processes.is_first()
    assert [processes.any_process(value) for value in (True, False)] == [True, False]


def test_several_processes_refuse_a_device_they_cannot_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device in ("cuda:1", "mps"):
        with pytest.raises(ValueError, match=f"run.device is {device}; for several processes"):
            processes.start_processes(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes or more, 1 GPUs"):
        processes.start_processes("cuda")
