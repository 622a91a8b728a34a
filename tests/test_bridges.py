"""The last section of docs/cookbook.md: other people's tools see the models that we have."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from data.chat import Message, render_prompt
from lab.residual import changing, listening
from training.checkpoint import load_checkpoint

if not all(map(importlib.util.find_spec, ("transformer_lens", "nnsight"))):  # imported when run
    pytest.skip("requirements-bridges.txt is not installed", allow_module_level=True)
COOKBOOK = Path(__file__).parents[1] / "docs" / "cookbook.md"


@pytest.fixture(scope="module")
def session(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the section's blocks leave behind, on a tiny pair."""
    base, instruct = map(load_checkpoint, runs)
    prompt = render_prompt([Message(role="user", content="Who?")], base.tokenizer)
    names = {"torch": torch, "base": base, "instruct": instruct, "prompt": prompt}
    names["tokenizer"] = base.tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("bridges"))
        text = COOKBOOK.read_text(encoding="utf-8")
        for block in re.finditer(r"^```py\n(.*?)^```", text, re.M | re.S):
            lines = "\n" * text.count("\n", 0, block.start(1))  # nnsight reads its own source
            exec(compile(lines + block[1], str(COOKBOOK), "exec"), names)
    return names


@torch.inference_mode()
def test_transformer_lens_has_our_logits(session: dict[str, Any]) -> None:
    for kind in ("base", "instruct"):
        ids = torch.tensor([session["prompt"]])
        ours = session[kind].model(ids)
        theirs = session["bridges"][kind](ids)
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_patched_run_is_what_our_own_hooks_give(session: dict[str, Any]) -> None:
    base, instruct, ids = session["base"].model, session["instruct"].model, [session["prompt"]]
    with listening(instruct) as streams:
        instruct.hidden(torch.tensor(ids))
    for layer, found in enumerate(session["patched"]):

        def patch(module: Any, args: Any, x: torch.Tensor, after: int = layer + 1) -> torch.Tensor:
            return torch.cat((x[:, :-1], streams[after][:, -1:]), dim=1)

        with changing([base.blocks[layer]], patch):
            expected = base(torch.tensor(ids))[0, -1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(session["patched"][0], base(torch.tensor(ids))[0, -1])


@torch.inference_mode()
def test_nnsight_reads_and_changes_what_our_hooks_do(session: dict[str, Any]) -> None:
    model, ids = session["base"].model, torch.tensor([session["prompt"]])
    with listening(model) as streams:
        model.hidden(ids)
    assert torch.equal(session["stream"], streams[1])
    with changing([model.blocks[-1].attn], lambda module, args, x: torch.zeros_like(x)):
        expected = model(ids)
    torch.testing.assert_close(session["without"], expected)
    assert not torch.allclose(expected, model(ids))
