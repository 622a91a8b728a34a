"""What only a CUDA device can show. Skipped without one."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.generate import Sampling, generate
from model.gpt import GPT, ModelConfig
from model.seen import Batch
from runtime.device import compile_model, to_device
from tests.conftest import pretrain_config, sft_config
from tests.test_scripts import outcome
from train_pretrain import main as pretrain
from train_sft import main as sft
from training.checkpoint import load_checkpoint
from training.optim import OptimConfig, build_optimizers
from training.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_steps_follow_fp32_steps(recipe: str, compiled: bool) -> None:
    config = ModelConfig(recipe=recipe, n_layer=2, n_head=2, n_embd=128, block_size=64)  # type: ignore[arg-type]
    idx = torch.randint(500, (8, 65), generator=torch.Generator().manual_seed(1))
    batch = Batch(idx[:, :-1], idx[:, 1:])
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = GPT(config, 500).to(device)
        if compiled and device == "cuda":
            model.compile()
        optim = OptimConfig(steps=10)
        optimizers = build_optimizers(model, optim)
        losses.append([train_step(model, optimizers, [batch], s, optim).loss for s in range(10)])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_both_scripts_train_resume_and_load_elsewhere(world_dir: Path, tmp_path: Path) -> None:
    def on_gpu(config: Any, steps: int) -> Any:
        run = replace(config.run, device="cuda", compile="auto")
        return replace(config, run=run, optim=replace(config.optim, steps=steps))

    pretrain(on_gpu(pretrain_config(world_dir, tmp_path / "base", 8), 8))
    sft(on_gpu(sft_config(world_dir, tmp_path / "base", tmp_path / "instruct", 8), 8))
    rows, _, name = outcome(tmp_path / "instruct")
    assert (len(rows), name) == (8, "step_000008")
    for device in ("cpu", "cuda"):
        checkpoint = load_checkpoint(tmp_path / "instruct", device)
        assert generate(checkpoint.model, [[1, 2], [3]], Sampling(8, temperature=1.0))


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_is_the_eager_one_to_the_token(recipe: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    config = ModelConfig(recipe, n_layer=2, n_head=2, n_embd=64, block_size=64)
    model = GPT(config, 300).to("cuda", dtype).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    prompts = [[5, 6, 7], [8], list(range(40))]
    captured = generate(model, prompts, Sampling(100))  # the window fills and moves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", lambda: None)
        patch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
        assert generate(model, prompts, Sampling(100)) == captured
    if dtype == torch.float32:  # in bf16 a near tie may turn with the number of rows
        for prompt, reply in zip(prompts, captured, strict=True):
            assert generate(model, [prompt], Sampling(20))[0] == reply[:20]


def random_documents(rows: int, T: int) -> torch.Tensor:
    lengths = torch.randint(1, 60, (rows, T), generator=torch.Generator().manual_seed(3))
    return torch.stack([torch.arange(T).repeat_interleave(row)[:T] for row in lengths])


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_documents_on_a_gpu_are_isolated_bit_by_bit_and_as_the_mask_says(recipe: Any) -> None:
    torch.manual_seed(1)
    config = ModelConfig(recipe, n_layer=2, n_head=2, n_embd=128, block_size=256)
    model = GPT(config, 300).to("cuda")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    idx, documents = torch.randint(300, (4, 256)), random_documents(4, 256)
    changed = torch.where(documents == 1, (idx + 1) % 300, idx)
    kernel, other, mask = (
        to_device(Batch(i, i, None, documents), torch.device("cuda")) for i in (idx, changed, idx)
    )
    with torch.autocast("cuda", torch.bfloat16):
        a, b = (model(x.idx, None, None, x.documents, None, x.bounds) for x in (kernel, other))
        c = model(mask.idx, None, None, mask.documents)
    untouched = (documents != 1).cuda()
    assert torch.equal(a[untouched], b[untouched])
    assert not torch.equal(a[~untouched], b[~untouched])
    torch.testing.assert_close(a, c, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("loss_chunk", [None, 100])
def test_compiled_steps_on_packed_documents_follow_eager_ones(loss_chunk: int | None) -> None:
    config, outcomes = OptimConfig(steps=8), []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=128, block_size=256), 500).to("cuda")
        model.loss_chunk, optimizers, losses = loss_chunk, build_optimizers(model, config), []
        if compiled:
            compile_model(model, "on")
        for step in range(8):
            rows = 2 + step % 3
            idx = torch.randint(500, (rows, 256), generator=torch.Generator().manual_seed(step))
            weights = (idx % 3 == 0).float()
            batch = Batch(idx, idx.flip(1), weights, random_documents(rows, 256))
            losses.append(train_step(model, optimizers, [batch], step, config).loss)
        outcomes.append(losses)
    assert outcomes[1] == pytest.approx(outcomes[0], rel=0.02)


def test_a_step_waits_once_and_one_that_is_not_finite_moves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    config = OptimConfig(steps=10)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=128, block_size=64), 500).to("cuda")
    optimizers, idx = build_optimizers(model, config), torch.randint(500, (8, 64))
    weights = (torch.rand(8, 64) > 0.5).float()
    batches = [Batch(idx, idx, weights, random_documents(8, 64)), Batch(idx, idx)]
    train_step(model, optimizers, batches, 0, config)  # what is allocated once may wait
    waits, tolist = list[int](), torch.Tensor.tolist

    def read(values: torch.Tensor) -> Any:
        waits.append(values.numel())
        torch.cuda.set_sync_debug_mode("default")
        found = tolist(values)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            train_step(model, optimizers, batches, step, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        monkeypatch.undo()
    assert waits == [2, 2, 2]  # loss and gradient norm

    def state() -> list[torch.Tensor]:
        states = [s for o in optimizers for s in o.state_dict()["state"].values()]
        tensors = [*model.parameters(), *(v for s in states for v in s.values())]
        return [t.detach().clone() for t in tensors]

    before = state()
    poisoned = batches[0]._replace(weights=weights * torch.inf)
    with pytest.raises(ValueError, match="step 5: loss"):
        train_step(model, optimizers, [poisoned], 4, config)
    assert all(map(torch.equal, before, state()))
    train_step(model, optimizers, batches, 5, config)
    assert not all(map(torch.equal, before, state()))


def test_a_chunked_loss_needs_less_memory() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=64, block_size=512), 50_000).to("cuda")
    idx, peaks, losses = torch.randint(50_000, (8, 512), device="cuda"), [], []
    for model.loss_chunk in (None, 256):
        torch.cuda.reset_peak_memory_stats()
        loss = model(idx, idx)
        loss.backward()
        model.zero_grad()
        losses.append(loss.item())
        peaks.append(torch.cuda.max_memory_allocated())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert peaks[1] < 0.5 * peaks[0]
