from __future__ import annotations

import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train_pretrain
import train_sft
from data.prepare import prepare_world
from data.pretrain import PretrainDataConfig
from data.sft import SFTDataConfig
from data.sources import download as downloads
from data.world import WorldConfig
from lab import likelihood
from model.gpt import ModelConfig
from runtime.cli import run_cli
from tests.hub import Hub
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain
from train_sft import SFTConfig
from train_sft import main as sft
from training.config import RunConfig
from training.optim import OptimConfig

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has told to be ignored

Fails = Callable[..., str]
GPT2_CACHE = Path(__file__).parents[2] / "shared" / "data" / "tiktoken-cache"
TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=128)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)  # tiny matrices: two threads only wait for each other


@pytest.fixture(autouse=True, scope="session")
def short_replies() -> Iterator[None]:
    """A model that knows nothing ends no reply; an evaluation draws 64, of 128 tokens then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "STOP_WITHIN", 8)
        patch.setattr(likelihood, "REPLY_ROOM", 1)
        yield


@pytest.fixture(autouse=True, scope="session")
def nothing_of_this_machine() -> Iterator[None]:
    """lm_eval asks a dozen programs, pip among them, after each of its evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", str)
        yield


@pytest.fixture(scope="session")
def world_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "world"
    prepare_world(WorldConfig(people=40, unseen=12, bios=4), out, "bpe:400", 0.1)
    return out


@pytest.fixture(scope="session")
def runs(world_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an instruct run, each of a few steps."""
    out = tmp_path_factory.mktemp("runs")
    pretrain(pretrain_config(world_dir, out / "base", steps=12))
    sft(sft_config(world_dir, out / "base", out / "instruct", steps=6))
    return out / "base", out / "instruct"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A running Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


def pretrain_config(data: Path, out: Path, steps: int) -> PretrainConfig:
    return PretrainConfig(
        PretrainDataConfig(str(data), batch_size=4, micro_batch_size=2, val_tokens=500),
        RunConfig(str(out), device="cpu", log_every=1, eval_every=5, save_every=4),
        TINY,
        OptimConfig(steps=steps),
    )


def sft_config(data: Path, base: Path, out: Path, steps: int) -> SFTConfig:
    return SFTConfig(
        str(base),
        SFTDataConfig(str(data), batch_size=4, replay=0.25),
        RunConfig(str(out), device="cpu", log_every=1, eval_every=5, save_every=4),
        OptimConfig(steps=steps, lr=1e-3, muon_lr=0.005),
    )


@pytest.fixture
def gpt2_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes GPT-2's vocabulary available, or skips."""
    if not GPT2_CACHE.is_dir():
        pytest.skip(f"no GPT-2 vocabulary in {GPT2_CACHE}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command line in this process; returns the one line that it must fail with."""

    def run(script: Any, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, args)])
        capsys.readouterr()
        command: Any = {
            train_pretrain: lambda: run_cli(PretrainConfig, script.main, ""),
            train_sft: lambda: run_cli(SFTConfig, script.main, ""),
        }
        with pytest.raises(SystemExit) as stop:
            command.get(script, script.main)()
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(downloads, "BACKOFF", 0)
        monkeypatch.setattr(downloads, "BLOCK", 500)
        yield server
        server.shutdown()
        thread.join()
