from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from data.pretrain import PretrainDataConfig
from data.tokenizer import create_tokenizer
from model.gpt import GPT, Block, ModelConfig
from model.seen import Batch
from runtime.device import EARNS_COMPILING, compile_model
from train_pretrain import PretrainConfig
from training.config import RunConfig
from training.optim import OptimConfig, build_optimizers
from training.run import Run
from training.step import StepResult, mean_loss, total_weight, train_step

V, T = 128, 16
OPTIMIZER = pytest.mark.parametrize("optimizer", ["adamw", "muon"])
Optimizers = list[torch.optim.Optimizer]


def random_model(dropout: float = 0.0) -> GPT:
    model = GPT(ModelConfig("gpt2", 2, 2, 32, T, dropout=dropout), V)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.double()  # so that rounding hides nothing


def random_batch(rows: int = 8, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    idx, targets = torch.randint(V, (2, rows, T), generator=generator)
    weights = torch.rand(rows, T, generator=generator, dtype=torch.float64)
    weights[:, :5] = 0.0
    weights[0] = 0.0  # a micro-batch of this row alone has no weight at all
    return idx, targets, weights


def cut(batch: tuple[torch.Tensor, ...], rows: int) -> list[Batch]:
    idx, targets, weights = (torch.split(t, rows) for t in batch)
    return [Batch(*parts) for parts in zip(idx, targets, weights, strict=True)]


def state_of(model: GPT, optimizers: Optimizers) -> list[torch.Tensor]:
    states = [s for o in optimizers for s in o.state_dict()["state"].values()]
    tensors = [*model.state_dict().values(), *(v for s in states for v in s.values())]
    rates = [g["lr"] for o in optimizers for g in o.param_groups]
    return [t.detach().clone() for t in (*tensors, torch.tensor(rates))]


def manual_loss(model: GPT, batch: tuple[torch.Tensor, ...]) -> float:
    idx, targets, weights = batch
    losses = F.cross_entropy(model(idx).transpose(1, 2), targets, reduction="none")
    return ((losses * weights).sum() / weights.sum()).item()


def test_replayed_text_takes_part_in_the_step_and_its_loss_is_told_apart() -> None:
    config = OptimConfig(steps=4)
    chat, text = random_batch(seed=1), random_batch(seed=2)
    outcomes = []
    for replayed in (False, True):
        model = random_model()
        own = [mean_loss(model, [Batch(*batch)]) for batch in (chat, text)]
        optimizers = build_optimizers(model, config)
        parts = (cut(chat, 4), cut(text, 4)) if replayed else ([*cut(chat, 4), *cut(text, 4)], [])
        result = train_step(model, optimizers, parts[0], 0, config, parts[1])
        outcomes.append((result, state_of(model, optimizers)))
    (together, one), (apart, other) = outcomes
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    loss, norm = together.loss, together.grad_norm
    assert together.replay_loss is None
    mine, same_norm, replay_loss = apart[3:]
    assert replay_loss is not None
    assert (mine, replay_loss) == pytest.approx(own, rel=1e-5)
    assert same_norm == pytest.approx(norm, rel=1e-6)
    weights = [total_weight(Batch(*batch)) for batch in (chat, text)]
    mean = (mine * weights[0] + replay_loss * weights[1]) / sum(weights)
    assert loss == pytest.approx(mean, rel=1e-5)
    assert apart.tokens == together.tokens


@OPTIMIZER
def test_how_a_step_is_cut_into_micro_batches_does_not_matter(
    optimizer: Literal["adamw", "muon"],
) -> None:
    config, outcomes = OptimConfig(steps=4, optimizer=optimizer, grad_clip=0.5), []
    for rows in (8, 4, 1):
        model = random_model()
        optimizers = build_optimizers(model, config)
        results = [
            train_step(model, optimizers, cut(random_batch(seed=5 + s), rows), s, config)
            for s in range(2)
        ]
        outcomes.append((results, state_of(model, optimizers)))
    whole, whole_state = outcomes[0]
    for results, state in outcomes[1:]:
        for a, b in zip(results, whole, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=1e-6)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)
            assert a.tokens == b.tokens == 8 * T
        torch.testing.assert_close(state, whole_state, atol=1e-6, rtol=0)


@OPTIMIZER
def test_the_loss_is_the_weighted_mean_and_a_step_lowers_it(
    optimizer: Literal["adamw", "muon"],
) -> None:
    config = OptimConfig(steps=4, optimizer=optimizer, lr=1e-3, muon_lr=1e-3, warmup_steps=2)
    model, batch = random_model(), random_batch()
    before = manual_loss(model, batch)
    result = train_step(model, build_optimizers(model, config), cut(batch, 3), 0, config)
    assert result.loss == pytest.approx(before, rel=1e-6)
    assert manual_loss(model, batch) < before
    assert (result.lr, result.tokens) == (5e-4, 8 * T)


def test_without_weights_the_loss_is_the_plain_mean() -> None:
    config, (idx, targets, _) = OptimConfig(steps=4), random_batch()
    losses = []
    for weights in (None, torch.ones_like(idx, dtype=torch.float64)):
        model = random_model()
        batches = [Batch(idx, targets, weights)]
        optimizers = build_optimizers(model, config)
        losses.append(train_step(model, optimizers, batches, 0, config).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(
        manual_loss(random_model(), (idx, targets, torch.ones_like(idx))), rel=1e-6
    )


def test_a_step_without_any_weight_is_refused() -> None:
    config, model, (idx, targets, weights) = OptimConfig(steps=9), random_model(), random_batch()
    optimizers = build_optimizers(model, config)
    before = state_of(model, optimizers)
    with pytest.raises(ValueError, match="step 8: no token"):
        train_step(model, optimizers, [Batch(idx, targets, 0 * weights)] * 2, 7, config)
    assert all(map(torch.equal, state_of(model, optimizers), before))


@OPTIMIZER
@pytest.mark.parametrize("poison", ["weight", "parameter", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(
    optimizer: Literal["adamw", "muon"], poison: str, value: float
) -> None:
    config = OptimConfig(steps=9, optimizer=optimizer)
    model, (idx, targets, weights) = random_model(), random_batch()
    optimizers, bias = build_optimizers(model, config), model.get_parameter("norm.bias")
    batches = [Batch(idx, targets, weights)]
    train_step(model, optimizers, batches, 0, config)  # so that there is a state
    if poison == "weight":
        weights[3, 9] = value
    elif poison == "parameter":
        bias.data[0] = value
    else:
        bias.register_hook(lambda g: g * value)  # type: ignore[no-untyped-call]
    before = state_of(model, optimizers)
    with pytest.raises(ValueError, match=r"step 2: loss .* weights were not changed"):
        train_step(model, optimizers, [Batch(idx, targets, weights)], 1, config)
    torch.testing.assert_close(state_of(model, optimizers), before, atol=0, rtol=0, equal_nan=True)
    assert all(p.grad is None for p in model.parameters())


class Memory:
    """Lets only so many rows through the model at a time; counts what is asked for."""

    def __init__(self, fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, forward = 0, GPT.forward

        def limited(model: GPT, idx: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls % 2 == 0 and len(idx) > fits:  # after others have gone through
                raise torch.OutOfMemoryError
            return forward(model, idx, *args)

        monkeypatch.setattr(GPT, "forward", limited)


def test_out_of_memory_halves_the_rows_at_a_time_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = []
    for fits in (8, 2, 0):
        data = PretrainDataConfig("unused", batch_size=8)
        config = PretrainConfig(data, RunConfig(str(tmp_path), device="cpu"), ModelConfig())
        run, model, byte = Run("base", config), random_model(), create_tokenizer("byte", [])
        optimizers = build_optimizers(model, config.optim)
        run.made_from({})
        network = run.resume(model, optimizers, byte)

        def train(step: int, rows: int) -> StepResult:
            batches = cut(random_batch(), rows) * 2  # the step's batch, twice
            return train_step(network, optimizers, batches, step, config.optim)  # noqa: B023

        Memory(fits, monkeypatch)
        if not fits:
            with pytest.raises(
                ValueError, match=r"out of memory at data\.micro_batch_size=1; lower it"
            ):
                run.within_memory(train, 0)
            break
        results = [run.within_memory(train, step) for step in range(2)]
        outcomes.append((results, state_of(model, optimizers)))
        assert run.rows == fits  # found once, and kept
        monkeypatch.undo()
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=1e-6, rtol=1e-6)
    assert [line[-33:] for line in capsys.readouterr().out.splitlines()] == [
        f"micro-batches of {rows} rows, same step size"[-33:] for rows in (4, 2, 4, 2, 1)
    ]


def one_sgd_step(grad_clip: float | None) -> tuple[StepResult, float]:
    """A step of plain gradient descent at rate 1: its result and how far the weights moved."""
    model = random_model()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["peak_lr"] = 1.0
    config = OptimConfig(steps=4, grad_clip=grad_clip)
    result = train_step(model, [optimizer], cut(random_batch(), 4), 0, config)
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    return result, (after - before).norm().item()


def test_the_gradient_is_clipped_and_its_norm_before_clipping_is_told() -> None:
    free, distance = one_sgd_step(None)
    assert distance == pytest.approx(free.grad_norm, rel=1e-5)
    clipped, distance = one_sgd_step(0.25 * free.grad_norm)
    assert clipped.grad_norm == pytest.approx(free.grad_norm, rel=1e-6)
    assert distance == pytest.approx(0.25 * free.grad_norm, rel=1e-4)
    _, distance = one_sgd_step(4 * free.grad_norm)
    assert distance == pytest.approx(free.grad_norm, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_mean_loss_weighs_every_token_alike_without_dropout(training: bool) -> None:
    model, batch = random_model(dropout=0.5), random_batch()
    expected = manual_loss(model.eval(), batch)
    model.train(training)
    parts = [Batch(*part) for part in zip(*(torch.split(t, [1, 5, 2]) for t in batch), strict=True)]
    assert mean_loss(model, parts) == pytest.approx(expected, rel=1e-6)
    assert model.training is training
    with pytest.raises(ValueError, match="nothing to evaluate"):
        mean_loss(model, [])
    assert model.training is training


@pytest.mark.parametrize(("dynamic", "loss_chunk"), [(False, None), (True, 8)])
def test_a_compiled_model_takes_the_same_steps_and_few_graphs_for_all_shapes(
    dynamic: bool, loss_chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounterWithBackend("eager")
    torch.manual_seed(1)
    plain = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=64), V)
    compiled = GPT(plain.config, V)
    compiled.load_state_dict(plain.state_dict())
    plain.loss_chunk = compiled.loss_chunk = loss_chunk
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    compile_model(compiled, "on", dynamic=dynamic)
    counter.frame_count = 0  # without the trial
    config, graphs = OptimConfig(steps=12), []
    both = [(model, build_optimizers(model, config)) for model in (plain, compiled)]
    for step in range(12):
        rows, T = 3 + step % 3, 20 + 3 * step
        idx = torch.randint(V, (rows, T))
        weights = (torch.rand(rows, T) > 0.5).float()
        documents = (torch.arange(T) // 9).expand(rows, T) if step % 2 else None
        batch = [Batch(idx, idx, weights, documents)]
        losses = [train_step(model, o, batch, step, config).loss for model, o in both]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        graphs.append(counter.frame_count)
        assert mean_loss(compiled, batch) == pytest.approx(mean_loss(plain, batch), rel=1e-6)
    # One at first, then one of any shape, or that at once; with documents too. None to evaluate.
    assert graphs[-1] == graphs[5] <= (2 if dynamic else 4)


def test_auto_says_what_it_decides_and_compiles_no_short_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu: Any = SimpleNamespace(wte=SimpleNamespace(weight=torch.zeros(1, device="meta")))
    gpu.wte.weight = SimpleNamespace(device=torch.device("cuda"))
    compile_model(gpu, "auto", flops=EARNS_COMPILING / 2)
    assert "not compiled: a run this short" in capsys.readouterr().out
    compile_model(GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8), 64), "auto")  # on a CPU: never
    assert capsys.readouterr().out == ""


def test_cudnn_takes_part_in_attention_only_for_plain_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = list[bool](), Block.forward

    def watched(*args: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
        return forward(*args)

    monkeypatch.setattr(Block, "forward", watched)
    model, (idx, targets, weights) = random_model(), random_batch()
    optimizers, config = build_optimizers(model, OptimConfig()), OptimConfig()
    documents = torch.zeros_like(idx)
    for batch in (
        Batch(idx, targets),
        Batch(idx, targets, weights),
        Batch(idx, targets, None, documents),
    ):
        train_step(model, optimizers, [batch], 0, config)
    mean_loss(model, [Batch(idx, targets)])
    assert seen == [True, True, False, False, False, False, False, False]  # of two blocks
    seen.clear()
    model.activation_checkpointing = True
    train_step(model.train(), optimizers, [Batch(idx, targets)], 0, config)
    assert seen == [True] * 4  # also where they are computed again
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
