"""docs/cookbook.md: every block runs, in order, and what is said of all models is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

COOKBOOK = Path(__file__).parents[1] / "docs" / "cookbook.md"


@pytest.fixture(scope="module")
def session(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that all blocks together leave behind, on tiny runs in the quickstart's place."""
    folder = tmp_path_factory.mktemp("cookbook")
    (folder / "out" / "quickstart").mkdir(parents=True)
    for run in runs:
        (folder / "out" / "quickstart" / run.name).symlink_to(run)
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        text = COOKBOOK.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, block.start(1))
            run_block("\n" * line + block[1], names)  # so that a traceback names the file's line
        assert (folder / "lens.png").stat().st_size > 1000
    return names


def run_block(source: str, names: dict[str, Any]) -> None:
    exec(compile(source, str(COOKBOOK), "exec"), names)


def test_attention_is_causal_and_adds_up(session: dict[str, Any]) -> None:
    for checkpoint in (session["base"], session["instruct"]):
        for layer in range(checkpoint.model.config.n_layer):
            weights = session["attention"](checkpoint, session["ids"], layer)
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:2]))
            assert not weights.triu(1).any()


def test_the_last_layer_of_the_lens_is_the_model(session: dict[str, Any]) -> None:
    for checkpoint in (session["base"], session["instruct"]):
        x = session["residuals"](checkpoint, session["ids"])
        assert len(x) == checkpoint.model.config.n_layer
        with torch.inference_mode():
            lens = checkpoint.model.logits(checkpoint.model.norm(x[-1]))
            real = checkpoint.model(torch.tensor([session["ids"]]))[0]
        torch.testing.assert_close(lens, real)


def test_all_parts_swapped_are_the_instruct_model_and_none_the_base(
    session: dict[str, Any],
) -> None:
    for found, expected in (
        (session["everything"], session["instruct"]),
        (session["swapped"]("nothing"), session["base"]),
    ):
        for name, parameter in expected.model.named_parameters():
            assert torch.equal(found.model.get_parameter(name), parameter), name


def test_hooks_are_gone_and_the_models_are_as_they_were(session: dict[str, Any]) -> None:
    for checkpoint in (session["base"], session["instruct"]):
        for module in checkpoint.model.modules():
            assert not module._forward_hooks
        assert not checkpoint.model.training
