import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lab.likelihood import repeat_rows
from model.gpt import GPT, RECIPES, ModelConfig
from model.seen import Batch, document_bounds, see_row
from runtime.device import flops_per_token
from training.optim import OptimConfig, build_optimizers
from training.step import mean_loss, train_step

C, T, L, V = 32, 16, 2, 100
PADDED = 128
SIZE: dict[str, Any] = {"n_layer": L, "n_head": 2, "n_embd": C, "block_size": T}
RECIPE = pytest.mark.parametrize("recipe", RECIPES)


def make_model(recipe: str, vocab_size: int = V, **switches: Any) -> GPT:
    torch.manual_seed(1)
    return GPT(ModelConfig(**SIZE | {"recipe": recipe} | switches), vocab_size).eval()


def random_model(recipe: str, vocab_size: int = V, **switches: Any) -> GPT:
    model = make_model(recipe, vocab_size, **switches)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def random_ids(rows: int, tokens: int = T, seed: int = 3) -> torch.Tensor:
    return torch.randint(V, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@RECIPE
def test_a_token_changes_its_own_and_later_logits_and_none_before(recipe: str) -> None:
    model, idx = random_model(recipe), random_ids(1)
    before = model(idx)
    for t in (0, 5, T - 1):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % V
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert ((after[:, t:] - before[:, t:]).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("switch", RECIPES["gpt2"])
@RECIPE
def test_every_switch_alone_changes_the_model_and_learns(recipe: str, switch: str) -> None:
    other = RECIPES["modern" if recipe == "gpt2" else "gpt2"][switch]
    plain, flipped = random_model(recipe), random_model(recipe, **{switch: other})
    same_names = plain.state_dict().keys() == flipped.state_dict().keys()
    if same_names and switch != "zero_init_projections":  # that one has a test of its own
        assert not torch.allclose(plain(random_ids(1)), flipped(random_ids(1)), atol=1e-3)
    model = make_model(recipe, dropout=0.1, **{switch: other})
    config = OptimConfig(steps=10, lr=3e-3)
    batches = [Batch(random_ids(4), random_ids(4, seed=4))]
    before = mean_loss(model, batches)
    optimizers = build_optimizers(model, config)
    for step in range(2):
        train_step(model, optimizers, batches, step, config)
    assert mean_loss(model, batches) < before


def test_numbers_of_parameters_follow_the_formulas() -> None:
    gpt2 = PADDED * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    modern = 2 * PADDED * C + L * 12 * C * C
    assert make_model("gpt2").n_params() == gpt2
    assert make_model("modern").n_params() == modern
    with torch.device("meta"):
        small = GPT(ModelConfig("gpt2", 12, 12, 768, 1024), 50257)
    assert small.n_params() == 124_439_808 + (50304 - 50257) * 768  # as published, and padding


@RECIPE
def test_flops_per_token_are_those_that_torch_counts(recipe: str) -> None:
    # Attention by explicit products, forward and backward, its masked half included: the
    # convention of flops_per_token. Fused kernels recompute in the backward, or are not counted.
    model, idx = make_model(recipe), random_ids(3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx).backward()
    assert counter.get_total_flops() == flops_per_token(model) * idx.numel()
    matrices = L * 12 * C * C + PADDED * C
    assert flops_per_token(model) == 6 * matrices + 12 * L * C * T


@RECIPE
def test_logits_leave_the_model_without_the_padding_of_the_matrices(recipe: str) -> None:
    model = make_model(recipe)
    assert model.lm_head.weight.shape == model.wte.weight.shape == (PADDED, C)
    assert model(random_ids(2, 5)).shape == (2, 5, V)


@RECIPE
def test_the_loss_is_the_weighted_sum_of_cross_entropies(recipe: str) -> None:
    model, idx, targets = random_model(recipe, PADDED), random_ids(2), random_ids(2, seed=4)
    weights = torch.rand(2, T, generator=torch.Generator().manual_seed(5))
    weights[0, :7] = 0
    losses = F.cross_entropy(model(idx).transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(model(idx, targets, weights), (losses * weights).sum())
    torch.testing.assert_close(model(idx, targets), losses.sum())
    torch.testing.assert_close(model(idx, targets, torch.ones(2, T)), model(idx, targets))


def test_the_head_runs_only_where_the_weight_is_not_zero() -> None:
    model, idx = make_model("modern"), random_ids(2)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda head, x, y: rows.append(x[0][..., 0].numel()))
    weights = torch.zeros(2, T)
    weights[0, 3], weights[1, 4:6] = 0.5, 1.0
    model(idx, idx, weights)
    assert rows == [3]


def test_the_first_loss_of_modern_is_that_of_guessing() -> None:
    model, idx = make_model("modern", PADDED), random_ids(8)
    first = model(idx, random_ids(8, seed=4)).item() / idx.numel()
    assert first == pytest.approx(math.log(PADDED), abs=0.01)


@RECIPE
def test_blocks_begin_as_the_identity_exactly_with_zero_init_projections(recipe: str) -> None:
    x = torch.randn(1, T, C)
    rope = (torch.ones(T, C // 2), torch.zeros(T, C // 2)) if recipe == "modern" else None
    for block in make_model(recipe, zero_init_projections=True).blocks:
        assert torch.equal(block(x, rope, see_row(random_ids(1))), x)
    for block in make_model(recipe, zero_init_projections=False).blocks:
        assert not torch.allclose(block(x, rope, see_row(random_ids(1))), x, atol=1e-3)


@RECIPE
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding_itself(recipe: str, tied: bool) -> None:
    model = make_model(recipe, tie_embeddings=tied)
    assert (model.lm_head.weight.data_ptr() == model.wte.weight.data_ptr()) is tied


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model.n_layer", {"n_layer": 0}),
        ("model.n_head", {"n_head": 0}),
        ("model.n_embd", {"n_embd": -32}),
        ("model.block_size", {"block_size": 0}),
        ("model.n_head=3", {"n_head": 3}),
        ("model.n_embd / model.n_head", {"n_head": 32}),
        ("model.dropout", {"dropout": 1.0}),
        ("model.dropout", {"dropout": -0.1}),
        ("model.logit_softcap", {"logit_softcap": -1.0}),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(key: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=key):
        ModelConfig(**SIZE | values)


def test_a_config_comes_back_from_its_dict() -> None:
    config = ModelConfig("gpt2", logit_softcap=30.0)
    assert ModelConfig(**asdict(config)) == config


@RECIPE
def test_more_tokens_than_block_size_are_refused(recipe: str) -> None:
    with pytest.raises(ValueError, match=f"{T + 1} tokens exceed .* block_size {T}"):
        make_model(recipe)(random_ids(1, T + 1))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_document_does_not_depend_on_its_neighbours(recipe: str) -> None:
    model = random_model(recipe)
    idx = random_ids(2)
    documents = torch.tensor([[0] * 5 + [1] * (T - 5), [3] * 9 + [4] * (T - 9)])
    changed = idx.clone()
    changed[:, :5] = (changed[:, :5] + 1) % 7
    one, other = (model(i, documents=documents) for i in (idx, changed))
    assert torch.equal(one[0, 5:], other[0, 5:])
    assert torch.equal(one[1, 9:], other[1, 9:])
    assert not torch.allclose(one[1, 5:9], other[1, 5:9])  # of the same document as what changed
    alone = model(idx[:1, 5:])[0]  # its positions count from its own first token
    torch.testing.assert_close(one[0, 5:], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(idx, documents=torch.zeros_like(idx)), model(idx))


@RECIPE
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_documents_train_with_dropout_and_on_every_kernel(recipe: str, dropout: float) -> None:
    model, idx = random_model(recipe, dropout=dropout), random_ids(2)
    documents = torch.tensor([[0] * 5 + [1] * (T - 5)] * 2)
    expected = model(idx, documents=documents)
    with sdpa_kernel(SDPBackend.MATH):
        found = model(idx, documents=documents)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    model.train()(idx, idx, documents=documents).backward()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_repeated_cache_continues_like_rows_of_their_own(recipe: str) -> None:
    model, idx = random_model(recipe), random_ids(1)
    prompt, tails = idx[:, :6], random_ids(3, seed=9)[:, :4]
    cache = model.new_cache(1, 10)
    model.hidden(prompt, cache.add(6))
    repeat_rows(cache, 3)
    found = model.logits(model.hidden(tails, cache.add(4)))
    whole = model(torch.cat([prompt.expand(3, -1), tails], dim=1))[:, 6:]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


def test_document_bounds_are_where_documents_begin_in_the_flattened_rows() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 0, 0], [0, 0, 0, 0, 0]])
    bounds = document_bounds(documents)
    assert bounds.tolist() == [0, 2, 5, 8, 10] + [15] * 59  # a row begins a document
    assert bounds.dtype == torch.int32
    assert document_bounds(torch.arange(64)[None]).shape == (128,)  # 64 beginnings and the end


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_chunked_loss_is_the_loss(recipe: str, weighted: bool, chunk: int) -> None:
    found = []
    for loss_chunk in (None, chunk):
        model, idx = random_model(recipe), random_ids(3)
        model.loss_chunk = loss_chunk
        weights = (torch.arange(idx.numel()).view_as(idx) % 4).float() if weighted else None
        loss = model(idx, idx.flip(1), weights)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_batch_without_any_weight_has_no_loss_and_no_gradient(chunk: int | None) -> None:
    model, idx = random_model("modern"), random_ids(2)
    model.loss_chunk = chunk
    loss = model(idx, idx, torch.zeros(idx.shape))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("n_vocab", [65, 300, 1000])
@pytest.mark.parametrize("recipe", RECIPES)
def test_masking_the_padding_of_the_head_is_leaving_it_out(recipe: str, n_vocab: int) -> None:
    model = random_model(recipe, vocab_size=n_vocab)
    idx, targets = torch.randint(n_vocab, (2, 4, 16), generator=torch.Generator().manual_seed(2))
    outcomes = []
    for is_ours in (True, False):
        ours = model(idx, targets)
        logits = model(idx).flatten(0, 1)
        loss = ours if is_ours else F.cross_entropy(logits, targets.flatten(), reduction="sum")
        model.zero_grad()
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.parameters())])
    rounding = 1e-6 if recipe == "modern" else 0.0  # its sigmoid rounds by the place in memory
    torch.testing.assert_close(*outcomes, atol=rounding, rtol=rounding)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_blocks_computed_again_give_the_same_gradients_to_the_last_bit_in_less_memory(
    recipe: str, dropout: float
) -> None:
    model, idx = random_model(recipe, dropout=dropout).train(), random_ids(4)
    documents, outcomes, kept = (torch.arange(16) // 5).expand(4, 16), [], []
    for model.activation_checkpointing in (False, True):
        sizes = list[int]()

        def note(t: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(t.numel())
            return t

        torch.manual_seed(1)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model(idx, idx, None, documents)
        kept.append(sum(sizes))
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*outcomes, atol=0, rtol=0)
    assert kept[1] < 0.5 * kept[0]
