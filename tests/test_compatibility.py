"""What older code made still loads, resumes and samples: the files in tests/before_rebuild.

They were made by commit aab21bc with these commands, and then thinned out:

    python -m data.prepare world --people 6 --unseen 2 --bios 2 --tokenizer bpe:280 --out data
    python train_pretrain.py --data.path=data --run.dir=base --model.n_layer=1 --model.n_head=1 \\
        --model.n_embd=8 --model.block_size=64 --model.recipe=modern OPTIONS
    python train_sft.py --base=base --data.path=data --run.dir=instruct --data.replay=0.25 OPTIONS

with --run.log_every=1 --run.save_every=2 --run.eval_every=4 --optim.steps=4 --data.batch_size=4.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import train_pretrain
import train_sft
from data.chat import Message, render_prompt
from data.prepare import prepare_world
from data.world import WorldConfig
from model.generate import Sampling, generate
from runtime.cli import parse_config
from training.checkpoint import load_checkpoint
from training.log import read_metrics

OLD = Path(__file__).parent / "before_rebuild"
CLOCKS = ("seconds", "tokens_per_second")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_a_world_of_older_words_is_not_overwritten(old: Path) -> None:
    # Its words changed on 2026-11-24 (docs/findings.md, erratum); its runs go on all the same.
    before = {f.name: f.read_bytes() for f in (old / "data").iterdir()}
    with pytest.raises(ValueError, match=r"data made from other inputs \(world, world_fingerprint"):
        prepare_world(WorldConfig(people=6, unseen=2, bios=2), Path("data"), "bpe:280", 0.02)
    assert before.items() <= {f.name: f.read_bytes() for f in (old / "data").iterdir()}.items()


@pytest.mark.parametrize("kind", ["base", "instruct"])
def test_an_old_run_goes_on_from_its_own_config_with_the_losses_it_had(
    kind: str, old: Path
) -> None:
    expected = read_metrics(old / kind / "metrics.jsonl")
    if kind == "base":
        shutil.rmtree("base/step_000004")
        config = parse_config(train_pretrain.PretrainConfig, ["--config=base/config.json"])
        assert train_pretrain.main(config).name == "step_000004"
    else:
        tuning = parse_config(train_sft.SFTConfig, ["--config=instruct/config.json"])
        assert train_sft.main(tuning).name == "step_000004"
    rows = read_metrics(old / kind / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, was in zip(rows, expected, strict=True):
        # In tuning `loss` was that of replies and replayed text together; now it is the replies'.
        if "replay_loss" in row:
            assert was.pop("loss") == pytest.approx(row["loss"], rel=0.1)
        for key in was.keys() - CLOCKS:
            assert row[key] == pytest.approx(was[key], rel=1e-5), key


def test_an_old_checkpoint_loads_and_samples(old: Path) -> None:
    for kind, step in (("base", 4), ("instruct", 2)):
        checkpoint = load_checkpoint(kind)
        assert (checkpoint.meta["kind"], checkpoint.meta["step"]) == (kind, step)
        prompt = render_prompt([Message(role="user", content="Who?")], checkpoint.tokenizer)
        assert len(generate(checkpoint.model, [prompt], Sampling(5))[0]) == 5
