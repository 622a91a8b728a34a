import itertools
import math
from typing import Any, Literal

import pytest
import torch
from torch import nn

from model.gpt import GPT, RECIPES, ModelConfig
from training.optim import (
    Muon,
    OptimConfig,
    build_optimizers,
    lr_factor,
    orthogonalize,
    set_lr,
)

SHAPES = pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])


def small_model(recipe: Literal["gpt2", "modern"]) -> GPT:
    return GPT(ModelConfig(recipe, n_layer=2, n_head=2, n_embd=32, block_size=16), 100)


def matrices(n: int, shape: tuple[int, int], seed: int = 1) -> torch.Tensor:
    """Random matrices with singular values from 0.05 to 1."""
    generator = torch.Generator().manual_seed(seed)
    U, _, V = torch.linalg.svd(torch.randn(n, *shape, generator=generator), full_matrices=False)
    return U @ torch.linspace(1, 0.05, min(shape)).diag() @ V


def with_gradients(gradients: torch.Tensor) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones_like(g)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    return params


@pytest.mark.parametrize(
    ("schedule", "final", "expected"),
    [
        ("cosine", 0.0, [0.5, 1, 1, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806]),
        ("cosine", 0.1, [0.5, 1, 1, 0.96575, 0.86820, 0.72221, 0.55, 0.37779, 0.23180, 0.13425]),
        ("wsd", 0.0, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ("wsd", 0.2, [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
    ],
)
def test_lr_factor_golden_values(
    schedule: Literal["cosine", "wsd"], final: float, expected: list[float]
) -> None:
    config = OptimConfig(
        steps=10, schedule=schedule, warmup_steps=2, decay_fraction=0.4, final_lr_fraction=final
    )
    assert [lr_factor(s, config) for s in range(10)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_lr_factor_rises_then_falls_within_its_bounds(schedule: Literal["cosine", "wsd"]) -> None:
    for steps, warmup, decay, final in itertools.product(
        (1, 7, 40), (0, 1, 7), (0.0, 0.5, 1.0), (0.0, 0.3, 1.0)
    ):
        if warmup > steps:
            continue
        config = OptimConfig(
            steps=steps,
            schedule=schedule,
            warmup_steps=warmup,
            decay_fraction=decay,
            final_lr_fraction=final,
        )
        factors = [lr_factor(s, config) for s in range(steps)]
        up, down = factors[:warmup], factors[warmup:]
        assert up == pytest.approx([(s + 1) / warmup for s in range(warmup)])
        assert all(a >= b for a, b in itertools.pairwise(down))
        assert all(0 < f <= 1 and f >= final for f in down)
        if schedule == "wsd":
            plateau = math.floor(steps * (1 - decay)) - warmup
            assert down[: max(0, plateau)] == [1.0] * max(0, plateau)
        assert lr_factor(steps, config) == pytest.approx(final) or warmup == steps


def test_set_lr_is_a_share_of_each_peak() -> None:
    optimizers = build_optimizers(small_model("gpt2"), OptimConfig(lr=0.4, muon_lr=0.2))
    for factor in (0.5, 0.25):  # not of the rate before
        set_lr(optimizers, factor)
        rates = [{g["lr"] for g in o.param_groups} for o in optimizers]
        assert rates == [{0.4 * factor}, {0.2 * factor}]


@SHAPES
def test_orthogonalize_keeps_singular_vectors_and_levels_their_values(
    shape: tuple[int, int],
) -> None:
    G = matrices(3, shape)
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    turned = U.mT @ orthogonalize(G) @ V.mT  # diagonal exactly if the singular vectors are G's
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (turned - values.diag_embed()).abs().max() < 1e-4
    torch.testing.assert_close(orthogonalize(1000 * G), orthogonalize(G), atol=1e-3, rtol=0)


def test_orthogonalize_is_five_steps_of_its_quintic_in_any_shape() -> None:
    for shape in ((24, 24), (48, 16), (16, 48)):
        G = matrices(2, shape)
        X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            A = X @ X.mT
            X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
        torch.testing.assert_close(orthogonalize(G), X, atol=1e-4, rtol=0)


def test_muon_moves_matrices_of_many_shapes_as_it_moves_each_alone() -> None:
    gradients = [g for s in ((24, 24), (48, 16), (24, 24), (16, 48)) for g in matrices(2, s)]
    together, alone = (with_gradients_of(gradients) for _ in range(2))
    optimizers = [Muon(together, 0.1, 0.9, 0.1), *(Muon([p], 0.1, 0.9, 0.1) for p in alone)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
        for p in together + alone:
            assert p.grad is not None
            p.grad = p.grad + 0.1
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def with_gradients_of(gradients: list[torch.Tensor]) -> list[nn.Parameter]:
    return [p for g in gradients for p in with_gradients(g[None])]


@SHAPES
def test_muon_updates_have_the_documented_spectral_norm(shape: tuple[int, int]) -> None:
    (p,) = with_gradients(matrices(1, shape))
    before = p.detach().clone()
    Muon([p], lr=0.1, momentum=0.95, weight_decay=0.0).step()
    norm = torch.linalg.matrix_norm(p.detach() - before, 2) / 0.1
    assert 0.6 < norm / math.sqrt(max(1, shape[0] / shape[1])) < 1.3


def test_muon_takes_the_orthogonalized_nesterov_momentum_and_decays() -> None:
    first, second = matrices(1, (48, 16)), matrices(1, (48, 16), seed=2)
    (p,) = with_gradients(first)
    optimizer = Muon([p], lr=0.1, momentum=0.8, weight_decay=0.5)
    optimizer.step()
    after_one = p.detach().clone()
    p.grad = second[0].clone()
    optimizer.step()
    momentum = 0.8 * (0.2 * first) + 0.2 * second
    update = orthogonalize(0.2 * second + 0.8 * momentum)[0]
    expected = after_one * (1 - 0.1 * 0.5) - 0.1 * math.sqrt(3) * update
    torch.testing.assert_close(p.detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_shrinks_matrices_and_leaves_vectors(optimizer: Literal["adamw", "muon"]) -> None:
    model = small_model("gpt2")
    config = OptimConfig(optimizer=optimizer, lr=0.1, muon_lr=0.2, weight_decay=0.5)
    before = {name: p.detach().clone() + 1 for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
            p.grad = torch.zeros_like(p)
    for o in build_optimizers(model, config):
        o.step()
    for name, p in model.named_parameters():
        lr = 0.2 if optimizer == "muon" and name.startswith("blocks.") else 0.1
        kept = 1 - lr * 0.5 if p.dim() == 2 else 1
        torch.testing.assert_close(p.detach(), before[name] * kept)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_optimizer_and_only_blocks_matrices_in_muon(
    recipe: Literal["gpt2", "modern"], optimizer: Literal["adamw", "muon"]
) -> None:
    model = small_model(recipe)
    optimizers = build_optimizers(model, OptimConfig(optimizer=optimizer))
    held = [[id(p) for g in o.param_groups for p in g["params"]] for o in optimizers]
    assert sorted(itertools.chain(*held)) == sorted(id(p) for p in model.parameters())
    assert isinstance(optimizers[0], torch.optim.AdamW)
    if optimizer == "muon":
        assert isinstance(optimizers[1], Muon)
        assert set(held[1]) == {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    assert len(held) == (2 if optimizer == "muon" else 1)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("optim.steps", {"steps": -1}),
        ("optim.warmup_steps", {"steps": 5, "warmup_steps": 6}),
        ("optim.warmup_steps", {"warmup_steps": -1}),
        ("optim.lr", {"lr": 0.0}),
        ("optim.lr", {"lr": float("nan")}),
        ("optim.muon_lr", {"muon_lr": float("inf")}),
        ("optim.grad_clip", {"grad_clip": 0.0}),
        ("optim.grad_clip", {"grad_clip": float("nan")}),
        ("optim.weight_decay", {"weight_decay": -0.1}),
        ("optim.weight_decay", {"weight_decay": float("nan")}),
        ("optim.decay_fraction", {"decay_fraction": 1.1}),
        ("optim.final_lr_fraction", {"final_lr_fraction": -0.1}),
        ("optim.beta1", {"beta1": 1.0}),
        ("optim.beta2", {"beta2": -0.1}),
        ("optim.momentum", {"momentum": 1.0}),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(key: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=key):
        OptimConfig(**values)
