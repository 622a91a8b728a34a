from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from model.cudagraph import StaticStep
from model.generate import Sampling, generate, next_logits, pick, stream
from model.gpt import GPT, RECIPES, ModelConfig

BLOCK, V = 16, 100
RECIPE = pytest.mark.parametrize("recipe", RECIPES)
PROMPTS = [[1, 2, 3], [4], list(range(10, 24)), list(range(30, 30 + BLOCK + 5)), [7] * BLOCK]


def random_model(recipe: str = "modern", vocab_size: int = V, dropout: float = 0.0) -> GPT:
    config = ModelConfig(
        recipe=recipe,  # type: ignore[arg-type]
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=BLOCK,
        dropout=dropout,
    )
    model = GPT(config, vocab_size).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.5 if name.startswith("blocks.") else 0.1  # blocks outweigh the embedding
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


@torch.no_grad()
def reply_without_cache(model: GPT, prompt: list[int], sampling: Sampling) -> list[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    row, reply = prompt[-BLOCK:], []
    for u in torch.rand(sampling.max_new_tokens, generator=generator):
        if len(row) > BLOCK:  # the window is full: the newer half is kept
            row = row[-(BLOCK // 2 + 1) :]
        reply.append(int(pick(model(torch.tensor([row]))[:, -1], u, sampling)))
        row = [*row, reply[-1]]
    return reply


@RECIPE
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_reply_with_a_cache_is_the_reply_without(
    recipe: str, temperature: float, prompt: list[int]
) -> None:
    model = random_model(recipe)
    sampling = Sampling(3 * BLOCK, temperature)  # the window fills and moves several times
    reply = generate(model, [prompt], sampling)[0]
    assert reply == reply_without_cache(model, prompt, sampling)
    assert temperature == 0 or len(set(reply)) > BLOCK


@RECIPE
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("lengths", [(3, 7), (5, 5)])
@torch.inference_mode()
def test_cached_logits_are_the_uncached_ones_in_rows_of_any_lengths(
    recipe: str, static: bool, lengths: tuple[int, int]
) -> None:
    model, width = random_model(recipe), max(lengths)
    rows = [list(range(4, 4 + n)) for n in lengths]
    cache = model.new_cache(2, BLOCK)
    cache.restart([width - n for n in lengths])
    idx = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    model.hidden(idx, cache.add(width))
    step = StaticStep(partial(next_logits, model), cache)  # here without a graph
    for new in range(20, 20 + BLOCK - width):
        rows = [[*row, new + r] for r, row in enumerate(rows)]
        ids = torch.tensor([row[-1] for row in rows])
        if static:
            cached = step(ids)
        else:
            cached = model.logits(model.hidden(ids[:, None], cache.add(1)))[:, 0]
        alone = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
        torch.testing.assert_close(cached, alone, atol=1e-4, rtol=1e-4)
    assert cache.used == BLOCK


@RECIPE
@torch.inference_mode()
def test_what_pads_a_shorter_row_changes_nothing(recipe: str) -> None:
    model, found = random_model(recipe), []
    for padding in (0, 99):
        cache = model.new_cache(2, 8)
        cache.restart([4, 0])
        idx = torch.tensor([[padding] * 4 + [7], [1, 2, 3, 4, 5]])
        found.append(model.hidden(idx, cache.add(5)))
        assert found[-1].isfinite().all()
    assert torch.equal(found[0][0, 4], found[1][0, 4])
    assert torch.equal(found[0][1], found[1][1])


@RECIPE
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_in_company_is_the_row_alone(recipe: str, temperature: float) -> None:
    model = random_model(recipe)
    sampling = Sampling(2 * BLOCK, temperature, top_k=50, top_p=0.95, seed=3)
    together = generate(model, PROMPTS, sampling)
    assert together == [generate(model, [prompt], sampling)[0] for prompt in PROMPTS]


@RECIPE
def test_a_row_with_a_seed_of_its_own_is_the_row_alone_with_that_seed(recipe: str) -> None:
    model, sampling = random_model(recipe), Sampling(2 * BLOCK, temperature=1.0, seed=9)
    prompts, seeds = [PROMPTS[0], PROMPTS[0], PROMPTS[2], PROMPTS[0]], (3, 4, 3, 3)
    together = generate(model, prompts, replace(sampling, seeds=seeds))
    alone = zip(prompts, (replace(sampling, seed=seed) for seed in seeds), strict=True)
    assert together == [generate(model, [prompt], own)[0] for prompt, own in alone]
    assert together[0] == together[3] != together[1]


def test_a_stop_id_ends_its_row_and_the_others_go_on() -> None:
    model, sampling = random_model(), Sampling(20, temperature=1.0)
    free = generate(model, PROMPTS, sampling)
    stop = free[0][2]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert {len(row) for row in expected} >= {3, 20}
    assert generate(model, PROMPTS, sampling, {stop}) == expected
    steps = list(stream(model, PROMPTS[:1], sampling, {stop}))
    assert steps == [[i] for i in expected[0]]  # and no step after the last row's end


@RECIPE
@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}])
def test_the_narrowest_sampling_is_greedy(recipe: str, limit: dict[str, Any]) -> None:
    model = random_model(recipe)
    narrow = generate(model, PROMPTS, Sampling(20, **{"temperature": 2.0} | limit))
    assert narrow == generate(model, PROMPTS, Sampling(20))


def drawn(logits: torch.Tensor, sampling: Sampling, n: int = 10_000) -> torch.Tensor:
    """Shares of each id, where u takes evenly spaced values."""
    u = (torch.arange(n)[:, None] + 0.5) / n
    ids = pick(logits.repeat(n, 1), u, sampling)
    return torch.bincount(ids, minlength=logits.numel()) / n


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {3, 1}),
        ({"top_k": 9}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {3}),
        ({"top_p": 1e-300}, {3}),  # 0 in float32
        ({"top_p": 0.41}, {3, 1}),
        ({"top_p": 0.75}, {3, 1, 0}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.75}, {3, 1}),  # p counts among the k: 0.4 + 0.3 of 0.9
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_ids_are_drawn_by_their_softmax_among_the_allowed(
    limit: dict[str, Any], allowed: set[int], temperature: float
) -> None:
    probs = torch.tensor([0.199, 0.3, 0.07, 0.4, 0.031])
    logits = probs.log() * temperature + 5
    shares = drawn(logits, Sampling(1, temperature, **limit))
    kept = torch.tensor([i in allowed for i in range(5)])
    torch.testing.assert_close(shares, probs * kept / probs[kept].sum(), atol=2e-4, rtol=0)


def test_random_draws_follow_the_softmax() -> None:
    logits, n = torch.randn(20, generator=torch.Generator().manual_seed(4)), 20_000
    u = torch.rand(n, 1, generator=torch.Generator().manual_seed(5))
    counts = torch.bincount(pick(logits.repeat(n, 1), u, Sampling(1, 0.8)), minlength=20)
    expected = n * (logits / 0.8).softmax(0)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 43.8  # one in a thousand at 19 degrees of freedom


def test_padded_ids_are_never_sampled() -> None:
    model = random_model(vocab_size=65)  # in matrices of 128
    replies = generate(model, [[i] for i in range(40)], Sampling(40, temperature=100.0))
    assert max(map(max, replies)) == 64


def test_a_seed_gives_one_reply_and_another_seed_another() -> None:
    model = random_model()
    one, again, other = (
        generate(model, [[1, 2]], Sampling(20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == again != other


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_each_seed_must_be_in_range() -> None:
    with pytest.raises(ValueError, match=f"seed is {2**63}"):
        Sampling(seeds=[1, 2**63])


def test_an_empty_prompt_is_refused_and_a_model_in_training_stays_in_it() -> None:
    model = random_model().train()
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], Sampling(2))
    assert model.training


def test_generating_leaves_mode_weights_and_global_generator_as_they_were() -> None:
    model = random_model().train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    generate(model, PROMPTS, Sampling(5, temperature=1.0))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.is_inference() or not p.requires_grad for p in model.parameters())


def test_dropout_is_off_while_generating_in_the_midst_of_training() -> None:
    model = random_model(dropout=0.5)
    expected = generate(model, PROMPTS, Sampling(10))
    state = torch.get_rng_state()
    assert generate(model.train(), PROMPTS, Sampling(10)) == expected
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
