"""What only a CUDA device can show. Skipped without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.generate import Sampling, generate
from model.gpt import GPT, Batch, ModelConfig
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


def test_cached_batches_on_cuda_equal_the_whole_context() -> None:
    torch.manual_seed(1)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=64), 300).to("cuda").eval()
    torch.nn.init.normal_(model.lm_head.weight)
    prompts = [[5, 6, 7], [8]]
    replies = generate(model, prompts, Sampling(20))
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = list(prompt)
        for _ in reply:
            with torch.inference_mode():
                logits = model(torch.tensor([ids], device="cuda"))
            ids.append(int(logits[0, -1].argmax()))
        assert ids[len(prompt) :] == reply
