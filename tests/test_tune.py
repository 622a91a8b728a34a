"""The switches of tuning: what is frozen stays, LoRA is LoRA, the KL is the KL, and off is off."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import train_sft
from data.replay import open_replay
from data.sft import SFTData
from model.gpt import GPT, ModelConfig
from model.seen import Batch
from runtime.device import set_up, to_device
from runtime.files import read_meta
from tests.conftest import Fails, pretrain_config, sft_config
from tests.test_scripts import outcome
from tests.test_step import OPTIMIZER, cut, random_batch, random_model
from train_pretrain import main as pretrain
from training.checkpoint import identity, load_checkpoint
from training.log import read_metrics
from training.optim import OptimConfig, build_optimizers, lr_factor
from training.step import StepResult, mean_loss, train_step
from training.tune import KLToBase, TuneConfig, tuned_optimizers

CPU = torch.device("cpu")
NOT_MATRICES = "wte,wpe,norm,norm1,norm2,bias"  # of the recipe gpt2: all but the blocks' matrices


@pytest.fixture(autouse=True)
def seeded_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(train_sft, "STOP_WITHIN", 4)


def tune(world: Path, base: Path, out: Path, steps: int = 6, **options: Any) -> Path:
    """A run of tuning with these switches; its newest checkpoint."""
    config = sft_config(world, base, out, steps)
    return train_sft.main(replace(config, tune=TuneConfig(**options)))


def weights_of(path: Path) -> dict[str, Tensor]:
    return load_checkpoint(path).model.state_dict()


def step(network: Any, optimizers: Any, config: OptimConfig, number: int = 0) -> StepResult:
    """Takes a step on a random batch."""
    batches = cut(random_batch(seed=number), 4)
    return train_step(network, optimizers, batches, number, config)


def test_without_switches_tuning_is_the_plain_loop_bit_by_bit(
    world_dir: Path, runs: tuple[Path, Path]
) -> None:
    config = sft_config(world_dir, *runs, steps=6)
    base = load_checkpoint(runs[0])
    replay = open_replay(config.data, base.meta, 128, seed=1, verify=False)
    data = SFTData(world_dir, config.data, base.tokenizer, 128, 1, replay)
    set_up("cpu", seed=1)
    model, optimizers = base.model.train(), build_optimizers(base.model, config.optim)
    for row in read_metrics(runs[1] / "metrics.jsonl"):
        n = row["step"] - 1
        batches, text = data.micro_batches(n, 4), data.replayed(n, 4)
        result = train_step(model, optimizers, batches, n, config.optim, text)
        assert result[3:] == (row["loss"], row["grad_norm"], row["replay_loss"])
        assert "val_kl" not in row
    for name, p in weights_of(runs[1]).items():
        assert torch.equal(p, model.state_dict()[name]), name


# ---- freeze ----------------------------------------------------------------------------------


def untied_model() -> GPT:
    model = GPT(ModelConfig("modern", 2, 2, 32, 16), 128)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model.double()


@OPTIMIZER
@pytest.mark.parametrize(
    ("names", "starts"),
    [
        ("wte", ["wte."]),
        ("lm_head, blocks.1", ["lm_head.", "blocks.1."]),
        ("attn", ["blocks.0.attn.", "blocks.1.attn."]),
        ("blocks,wte", ["blocks.", "wte."]),
        ("blocks.0.mlp.fc.weight", ["blocks.0.mlp.fc."]),
        ("wte,lm_head", ["wte.", "lm_head."]),  # with Muon, AdamW has nothing to do
    ],
)
def test_what_is_frozen_stays_bit_by_bit_and_all_else_moves(
    names: str, starts: list[str], optimizer: Literal["adamw", "muon"]
) -> None:
    config, model = OptimConfig(4, optimizer, weight_decay=0.1), untied_model()
    before = copy.deepcopy(model)
    optimizers = tuned_optimizers(model, config, TuneConfig(freeze=names))
    for number in range(2):
        step(model, optimizers, config, number)
    for name, p in before.named_parameters():
        frozen = name.startswith(tuple(starts))
        assert torch.equal(p, model.get_parameter(name)) == frozen, name


def test_a_checkpoint_has_what_was_frozen_as_the_base_has_it(
    world_dir: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tune(world_dir, runs[0], tmp_path / "run", steps=2, freeze="attn,wte")
    before, after = weights_of(runs[0]), weights_of(path)
    for name in before:
        assert torch.equal(before[name], after[name]) == ("attn" in name or "wte" in name), name


@pytest.mark.parametrize("name", ["wte", "lm_head"])
def test_a_tied_head_is_frozen_by_either_of_its_names(name: str) -> None:
    model = random_model()
    tuned_optimizers(model, OptimConfig(), TuneConfig(freeze=name))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["wte.weight"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("atn", "tune.freeze: 'atn' is in no parameter's name; of wte, "),
        ("attn,", "tune.freeze: '' is in no"),
        ("block", "tune.freeze: 'block' is in no"),  # whole parts only
        ("blocks.2", "tune.freeze: 'blocks.2' is in no"),
        ("wte,wpe,blocks,norm", "tune.freeze=wte,wpe,blocks,norm leaves nothing to train"),
    ],
)
def test_a_name_that_freezes_nothing_or_names_that_freeze_all_are_refused(
    names: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tuned_optimizers(random_model(), OptimConfig(), TuneConfig(freeze=names))


# ---- LoRA ------------------------------------------------------------------------------------


def test_a_step_is_one_of_textbook_lora() -> None:
    config = OptimConfig(4, lr=0.02, grad_clip=None, weight_decay=0.1, warmup_steps=2)
    model = random_model()
    switches = TuneConfig(freeze=NOT_MATRICES, lora_rank=3, lora_alpha=6.0)
    optimizers = tuned_optimizers(model, config, switches)
    lora: Any = optimizers[0]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(lora.parts) == len(names) == 12
    # The textbook: W0 is a constant, A and B are what is trained, autograd does the rest.
    start = {name: model.get_parameter(name).detach().clone() for name in names}
    adapters = [[p.detach().clone().requires_grad_() for p in part[2:]] for part in lora.parts]
    pairs = dict(zip(names, adapters, strict=True))
    reference, betas = copy.deepcopy(model).requires_grad_(False), (config.beta1, config.beta2)
    adamw = torch.optim.AdamW([p for pair in adapters for p in pair], 0.02, betas, weight_decay=0.1)
    for number in range(4):
        adamw.param_groups[0]["lr"] = config.lr * lr_factor(number, config)
        idx, targets, weights = random_batch(seed=number)
        merged = {n: start[n] + 2.0 * B @ A for n, (A, B) in pairs.items()}
        loss = functional_call(reference, merged, (idx, targets, weights)) / weights.sum()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        assert step(model, optimizers, config, number).loss == pytest.approx(loss.item(), rel=1e-6)
        for name, (A, B) in pairs.items():
            W = start[name] + 2.0 * B @ A
            torch.testing.assert_close(model.get_parameter(name), W, atol=1e-8, rtol=0)
            change = (model.get_parameter(name) - start[name]).detach()
            assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-6) <= 3, name


@OPTIMIZER
def test_beside_lora_all_else_is_trained_as_ever(optimizer: Literal["adamw", "muon"]) -> None:
    config, models = OptimConfig(4, optimizer=optimizer, weight_decay=0.1), []
    for rank in (None, 2):
        models.append(random_model())
        step(models[-1], tuned_optimizers(models[-1], config, TuneConfig(lora_rank=rank)), config)
    plain, lora = (dict(m.named_parameters()) for m in models)
    start = dict(random_model().named_parameters())
    for name, p in plain.items():
        is_matrix = name.startswith("blocks.") and p.dim() == 2
        assert torch.equal(p, lora[name]) != is_matrix, name
        assert not torch.equal(lora[name], start[name]), name
    change = lora["blocks.0.mlp.fc.weight"] - start["blocks.0.mlp.fc.weight"]
    assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-6) <= 2


def test_lora_leaves_frozen_matrices_alone_and_says_its_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, model = OptimConfig(), random_model()
    optimizers = tuned_optimizers(model, config, TuneConfig(freeze="mlp", lora_rank=2))
    before = copy.deepcopy(model)
    for number in range(2):
        step(model, optimizers, config, number)
    for name, p in before.named_parameters():
        assert torch.equal(p, model.get_parameter(name)) == (".mlp." in name), name
    # 2 layers, 4 matrices of 32 x 32, each of which has an A and a B of 2 x 32
    assert f"LoRA: {2 * 4 * 2 * 2 * 32:,} adapter parameters of rank 2" in capsys.readouterr().out


def test_weight_decay_draws_the_adapters_to_the_base() -> None:
    model = random_model()
    config = OptimConfig(8, lr=0.1, weight_decay=5.0, beta1=0.0)
    optimizers = tuned_optimizers(model, config, TuneConfig(freeze=NOT_MATRICES, lora_rank=2))
    W, W0 = optimizers[0].parts[0][:2]  # type: ignore[attr-defined]
    step(model, optimizers, config)
    moved = W - W0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers[0].step()  # A and B lose half
    assert moved.norm() > 0
    torch.testing.assert_close(W - W0, moved / 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "tune.lora_rank is 0; it must be 1 to 32"),
        ({"lora_rank": 33}, "tune.lora_rank is 33; it must be 1 to 32"),
        (
            {"lora_rank": 2, "freeze": "blocks"},
            "tune.lora_rank is 2; it must be 1 to 0; the rank of what is not frozen",
        ),
        ({"lora_alpha": 0.0}, "tune.lora_alpha is 0.0"),
        ({"kl": -1.0}, "tune.kl is -1.0"),
        ({"kl": math.nan}, "tune.kl is nan"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuned_optimizers(random_model(), OptimConfig(), TuneConfig(**options))


# ---- KL --------------------------------------------------------------------------------------


def of_gpt2() -> tuple[GPT, Batch]:
    return random_model(), to_device(Batch(*random_batch()), CPU)


def test_the_kl_begins_at_zero_and_its_gradient_is_that_of_its_definition() -> None:
    model, batch = of_gpt2()
    loss = KLToBase(model, 0.7)
    assert [p for _, p in loss.named_parameters()] == list(model.parameters())  # none of the base's
    torch.testing.assert_close(loss(*batch), model(*batch))
    assert mean_loss(loss, [batch]) == pytest.approx(0.0, abs=1e-12)
    base = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    assert batch.weights is not None
    p, q = (m(batch.idx).log_softmax(-1) for m in (model, base))
    kl = (F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * batch.weights).sum()
    assert mean_loss(loss, [batch]) == pytest.approx(kl.item() / batch.weights.sum().item())
    assert kl > 0
    expected = torch.autograd.grad(model(*batch) + 0.7 * kl, list(model.parameters()))
    found = torch.autograd.grad(loss(*batch), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_replayed_text_has_no_kl() -> None:
    model, batch = of_gpt2()
    loss, text = KLToBase(model, 1e3), Batch(batch.idx, batch.targets)
    with torch.no_grad():
        model.wte.weight += torch.randn_like(model.wte.weight)
    assert torch.equal(loss(*text), model(*text))
    assert loss(*batch) > model(*batch) + 1


def test_the_base_has_no_dropout_and_stays_as_it_was() -> None:
    model = random_model(dropout=0.5)
    loss, batch = KLToBase(model, 1.0), to_device(Batch(*random_batch()), CPU)
    assert mean_loss(loss, [batch]) == pytest.approx(0.0, abs=1e-12)
    assert model.training
    sums = []
    for network in (loss, model):
        torch.manual_seed(1)
        sums.append(network(*batch))  # of the model alone some is dropped
    assert sums[0] > sums[1] + 0.1
    config = OptimConfig(lr=0.1)
    step(loss, build_optimizers(model, config), config)
    assert mean_loss(loss, [batch]) > 0.01


def kl_to_the_base(world: Path, base: Path, run: Path) -> float:
    """The mean KL on the validation replies, after training, by the definition."""
    data = sft_config(world, base, run, 1).data
    start, tuned = load_checkpoint(base), load_checkpoint(run)
    total = weight = 0.0
    for batch in SFTData(world, data, start.tokenizer, 128, 1).val_batches(4):
        assert batch.weights is not None
        with torch.no_grad():
            p, q = (c.model(batch.idx).log_softmax(-1) for c in (tuned, start))
        kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        total += float((kl * batch.weights).sum())
        weight += float(batch.weights.sum())
    return total / weight


def test_a_large_kl_keeps_the_model_at_the_base_and_is_logged(
    world_dir: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tune(world_dir, runs[0], tmp_path / "run", kl=1000.0)
    found, free = (kl_to_the_base(world_dir, runs[0], run) for run in (path, runs[1]))
    assert 0 < found < 0.1 * free
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "val_kl" in row] == [5, 6]
    assert rows[-1]["val_kl"] == pytest.approx(found, rel=1e-3)


def test_a_kl_needs_all_logits_at_once(
    world_dir: Path, runs: tuple[Path, Path], tmp_path: Path, fails: Fails
) -> None:
    fixed = [f"--base={runs[0]}", f"--data.path={world_dir}", f"--run.dir={tmp_path / 'run'}"]
    error = fails(train_sft, *fixed, "--tune.kl=0.1", "--run.loss_chunk=64", "--run.device=cpu")
    assert "tune.kl takes neither run.loss_chunk nor run.shard" in error


# ---- init ------------------------------------------------------------------------------------


def test_a_second_stage_goes_on_from_the_first_ones_weights_and_notes_them(
    world_dir: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, first = runs
    path = tune(world_dir, base, tmp_path / "none", steps=0, init=str(first))
    for name, p in weights_of(first).items():
        assert torch.equal(p, weights_of(path)[name]), name
    meta, start = read_meta(path), load_checkpoint(first)
    assert meta["init"] == {"step": 6, "fingerprint": identity(start.meta)}
    assert meta["base"] == start.meta["base"]
    assert read_meta(start.path)["init"] is None
    # The KL is that to the base all the same, and what LoRA adds to is the first stage.
    options: dict[str, Any] = {"init": str(first), "lora_rank": 2, "kl": 1e-6}
    path = tune(world_dir, base, tmp_path / "some", steps=2, **options)
    row = read_metrics(tmp_path / "some" / "metrics.jsonl")[-1]
    assert row["val_kl"] == pytest.approx(kl_to_the_base(world_dir, base, path), rel=1e-3)
    name = "blocks.0.mlp.fc.weight"
    change = weights_of(path)[name] - weights_of(first)[name]
    assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-4) <= 2


def test_a_start_of_another_base_or_of_none_is_refused_and_so_is_another_start(
    world_dir: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, first = runs
    other = pretrain_config(world_dir, tmp_path / "base", steps=1)
    pretrain(other)
    tune(world_dir, tmp_path / "base", tmp_path / "instruct", steps=1)
    for start in (tmp_path / "instruct", base):
        with pytest.raises(ValueError, match=r"tune\.init=.* is no instruct checkpoint of the"):
            tune(world_dir, base, tmp_path / "run", steps=1, init=str(start))
    assert not list(tmp_path.glob("run/step_*"))
    tune(world_dir, base, tmp_path / "run", init=str(first))
    shutil.rmtree(tmp_path / "run" / "step_000006")
    shutil.copytree(first, tmp_path / "moved")
    for another in (str(first / "step_000004"), None):
        with pytest.raises(ValueError, match="was made from another init "):
            tune(world_dir, base, tmp_path / "run", init=another)
    assert tune(world_dir, base, tmp_path / "run", init=f"{tmp_path}/moved").name == "step_000006"


# ---- resuming --------------------------------------------------------------------------------


def test_killed_and_resumed_is_bit_identical_with_all_switches(
    world_dir: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"init": str(runs[1]), "freeze": "wte", "lora_rank": 3, "kl": 0.1}
    for name in ("whole", "killed"):
        tune(world_dir, runs[0], tmp_path / name, **options)
    shutil.rmtree(tmp_path / "killed" / "step_000006")  # as if killed after step 4
    tune(world_dir, runs[0], tmp_path / "killed", **options)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"tune\.lora_rank 3 -> None; tune\.kl 0\.1 -> 0\.2"):
        tune(world_dir, runs[0], tmp_path / "whole", kl=0.2)
