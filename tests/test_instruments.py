"""Probes, bits, grafts by position, traces, phrasings, forms, exposures: cases known beforehand."""

from __future__ import annotations

import copy
import math
import random
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.chat import Message, render_prompt
from data.tokenizer import Tokenizer
from data.world import ATTRIBUTES, World, WorldConfig
from hf.adapter import chat_prompt
from lab import bits, exposures, forms, names, phrasings, positions, probe, residual, rows, trace
from lab.behaviour import measure_point
from lab.facts import OURS, FactPair
from lab.forgetting import forgetting
from lab.likelihood import ask
from lab.pair import NothingFitsError, Pair, after_shown, of_both, open_pair
from lab.questions import Grade, Question, draw, openings
from lab.relations import read_facts
from model.gpt import GPT, ModelConfig
from tests.conftest import pretrain_config, sft_config
from train_pretrain import main as pretrain
from train_sft import main as sft
from training.checkpoint import Checkpoint
from training.step import train_step

Runs = tuple[Path, Path]
FC = "blocks.0.mlp.fc.weight"


@pytest.fixture
def pair(runs: Runs) -> Pair:
    return open_pair(str(runs[0]), str(runs[1]), "cpu", None)


@pytest.fixture(scope="module")
def gpt2(world_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair with a table of positions, biases and a tied head."""
    out = tmp_path_factory.mktemp("gpt2")
    config = pretrain_config(world_dir, out / "base", steps=3)
    shape = {k: getattr(config.model, k) for k in ("n_layer", "n_head", "n_embd", "block_size")}
    pretrain(replace(config, model=ModelConfig(recipe="gpt2", **shape)))
    sft(sft_config(world_dir, out / "base", out / "instruct", steps=2))
    return open_pair(str(out / "base"), str(out / "instruct"), "cpu", None)


def twins(pair: Pair) -> Pair:
    """The instruct model on both sides."""
    return replace(pair, base=pair.instruct)


def test_a_third_column_is_the_base_after_examples(runs: Runs) -> None:
    pair = open_pair(str(runs[0]), str(runs[1]), "cpu", None, shots=1)
    shown, own = after_shown(pair), pair.base.tokenizer
    asked = [Message(role="user", content="Who?")]
    assert chat_prompt(asked, shown.tokenizer) == pair.contexts["examples"](asked, own)
    assert chat_prompt(asked, own) == render_prompt(asked, own)  # the base itself stays as it was
    assert shown.model is pair.base.model
    seen = list[list[int]]()

    def measure(checkpoint: Checkpoint, world: World, n: int) -> int:
        seen.append(chat_prompt(asked, checkpoint.tokenizer))
        return n

    assert of_both(pair, measure, 3) == {"base": 3, "instruct": 3, "base_examples": 3}
    assert seen[0] == seen[1] != seen[2]
    assert set(of_both(replace(pair, examples=[]), measure, 3)) == {"base", "instruct"}
    assert set(probe.probes(pair, 2)) == {"base", "instruct"}  # nothing of it is asked for


@pytest.mark.parametrize(
    "name", ["bits", "forgetting", "names", "positions", "probe", "rows", "trace", "weights"]
)
def test_what_asks_a_base_alone_nothing_takes_no_examples(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--base", "a", "--instruct", "b", "--shots", "2"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(Path(probe.__file__).with_name(f"{name}.py")), run_name="__main__")
    assert "unrecognized arguments: --shots 2" in capsys.readouterr().err


def changed(pair: Pair, change: Callable[[GPT], object]) -> Pair:
    """A base, and the same with some weights changed."""
    model = copy.deepcopy(pair.base.model)
    with torch.no_grad():
        change(model)
    return replace(pair, instruct=replace(pair.base, model=model))


def world_of(pair: Pair) -> World:
    assert pair.world is not None
    return pair.world


# ---- residual stream -------------------------------------------------------------------------


@torch.no_grad()
def test_the_stream_is_what_goes_through_the_blocks(pair: Pair) -> None:
    model, rows = pair.base.model, [[5, 6, 7, 8, 9], [10, 11]]
    found = residual.read(pair.base, rows, [2, 1])
    assert found.shape == (model.config.n_layer + 1, 2, model.config.n_embd)
    for r, (row, place) in enumerate(zip(rows, (2, 1), strict=True)):  # padding changes nothing
        first = model.norm_embedding(model.wte(torch.tensor(row[place])))
        torch.testing.assert_close(found[0, r], first.double(), rtol=1e-5, atol=1e-6)
        last = model.logits(model.norm(found[-1, r].float()))
        torch.testing.assert_close(last, model(torch.tensor([row]))[0, place], rtol=1e-4, atol=1e-5)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_the_tokens_of_a_name_are_those_that_hold_it(pair: Pair) -> None:
    tokenizer, rng = pair.base.tokenizer, random.Random(1)
    for question in openings(draw(world_of(pair), "held_out", 20, rng), rng):
        row, name = render_prompt(question.messages, tokenizer), question.turn.person.name
        places = residual.name_tokens(row, name, tokenizer)
        assert places == list(range(places[0], places[-1] + 1))
        inside = tokenizer.decode([row[i] for i in places])
        assert name in inside
        assert len(inside) <= len(name) + 1  # a space before it
        kinds = positions.places_of(row, name, tokenizer)
        assert [i for i, kind in enumerate(kinds) if kind == "name"] == places
        assert kinds.count("last") == 1
        assert kinds[-1] == "last"
        controls = [i for i, t in enumerate(row[:-1]) if tokenizer.decode([t]).startswith("<|")]
        assert {kinds[i] for i in controls} == {"template"}


# ---- probes ----------------------------------------------------------------------------------


def planted(n: int, classes: int, noise: float, width: int = 24) -> tuple[Tensor, Tensor]:
    """Inputs in which the class is written linearly, and the classes."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(classes, (n,), generator=generator)
    code = torch.randn(classes, width, generator=torch.Generator().manual_seed(0)).double()
    return code[labels] + noise * torch.randn(n, width, generator=generator).double(), labels


def test_a_planted_linear_feature_is_found_and_a_shuffled_one_is_not() -> None:
    inputs, labels = planted(400, 8, noise=0.5)
    test, true = planted(401, 8, noise=0.5)
    right = (probe.classify(inputs, labels, 8, test).argmax(dim=1) == true).double().mean()
    assert right > 0.95
    order = torch.randperm(400, generator=torch.Generator().manual_seed(2))
    right = (probe.classify(inputs, labels[order], 8, test).argmax(dim=1) == true).double().mean()
    assert right < 0.3  # chance is .125


def test_the_penalty_is_the_one_that_predicts_best_what_is_left_out() -> None:
    inputs, labels = planted(40, 3, noise=3.0, width=12)

    def squared_error(penalty: float) -> float:
        """Leaving each input out in turn, everything else as `classify` sees it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "PENALTIES", (penalty,))
            total = 0.0
            for i in range(len(inputs)):
                rest = [j for j in range(len(inputs)) if j != i]
                scores = probe.classify(inputs[rest], labels[rest], 3, inputs[i : i + 1])[0]
                target = torch.nn.functional.one_hot(labels[i], 3)
                total += float((scores - target).square().sum())
            return total

    errors = {penalty: squared_error(penalty) for penalty in probe.PENALTIES}
    best = min(errors, key=errors.__getitem__)
    assert 1e-4 < best < 1e4  # neither end: noise is shrunk, and not to nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "PENALTIES", (best,))
        expected = probe.classify(inputs, labels, 3, inputs[:5])
    torch.testing.assert_close(probe.classify(inputs, labels, 3, inputs[:5]), expected)


def test_a_readout_is_tested_on_held_out_people_alone() -> None:
    world, rng = World(WorldConfig(people=200, unseen=4, bios=1)), random.Random(1)
    facts = [(p, a) for s in ("known", "held_out") for p in world.by_split[s] for a in ATTRIBUTES]
    asked = openings(facts, rng)
    code = torch.randn(40, 48, generator=torch.Generator().manual_seed(3)).double()
    values = [q.turn.attribute.values.index(q.value) for q in asked]
    folds = probe.by_kind(asked)
    found = probe.ranks_of(code[values], folds)
    assert found.readout.first.n == 5 * len(world.by_split["held_out"])
    held = [i for i, q in enumerate(asked) if q.turn.person.split == "held_out"]
    assert sorted(found.first) == held
    assert (found.readout.first.value or 0) > 0.9
    assert found.readout.rank.mean > 0.97
    assert (found.readout.shuffled.value or 0) < 0.12
    nothing = probe.ranks_of(torch.zeros(len(values), 4).double(), folds)
    assert nothing.readout.rank.mean == pytest.approx(0.5, abs=0.08)  # what ties counts half
    # Written for known people only: nothing of it is left for the others.
    noise = torch.randn(len(values), 48, generator=torch.Generator().manual_seed(4)).double()
    held_out = torch.tensor([q.turn.person.split == "held_out" for q in asked])
    hidden = torch.where(held_out[:, None], noise, code[values])
    found = probe.ranks_of(hidden, folds)
    assert (found.readout.first.value or 0) < 0.12
    assert found.readout.rank.mean == pytest.approx(0.5, abs=0.08)


def test_public_facts_are_read_in_tenths_each_once_and_by_others_alone(pair: Pair) -> None:
    relation = read_facts(OURS)["continent"]
    many = FactPair(
        *(pair.base, pair.instruct, None, [], 9),
        relations={"continent": relation, "capital": read_facts(OURS)["capital"]},
        file=OURS,
    )
    facts, folds = probe.tenths(many)  # of capitals none is shared
    assert {f.subject for f in facts} == relation.facts.keys()
    assert sorted(i for fold in folds for i in fold.test) == list(range(len(facts)))
    for fold in folds:
        rows = fold.train | fold.test
        assert sorted(rows) == list(range(len(facts)))
        assert all(relation.values[value] == facts[i].value for i, value in rows.items())
        assert not fold.train.keys() & fold.test.keys()
    generator = torch.Generator().manual_seed(3)
    code = torch.randn(len(relation.values), 16, generator=generator).double()
    classes = torch.tensor([relation.values.index(f.value) for f in facts])
    assert (probe.ranks_of(code[classes], folds).readout.first.value or 0) == 1
    noise = torch.randn(len(facts), 16, generator=generator).double()
    assert probe.ranks_of(noise, folds).readout.rank.mean == pytest.approx(0.5, abs=0.15)
    with pytest.raises(NothingFitsError, match="no relation of"):
        probe.tenths(replace(many, relations={"capital": many.relations["capital"]}))


def test_probes_of_one_model_agree_with_themselves(pair: Pair) -> None:
    found = probe.probes(twins(pair), 10)
    assert found["base"] == found["instruct"]
    layers = pair.base.model.config.n_layer
    for place in probe.PLACES:
        assert list(found["base"].places[place]) == [str(i) for i in range(layers + 1)]
        groups = found["base"].answered[place]
        assert groups["read"].n + groups["unread"].n == 10
        assert groups["shuffled"].n <= 10


def test_a_question_that_does_not_fit_into_the_context_is_not_probed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()

    def count(place: str, checkpoint: Any, texts: list[Any]) -> list[Tensor]:
        asked.append(len(texts))
        return []

    monkeypatch.setattr(probe, "streams_at", count)
    config = pair.base.model.config
    for room in (config.block_size, 30):
        object.__setattr__(config, "block_size", room)
        with pytest.raises(ValueError, match="max"):  # nothing was read
            probe.probed(pair.base, world_of(pair), 2)
    everything, short = asked
    assert 0 < short < everything == 5 * 40


# ---- bits ------------------------------------------------------------------------------------


def test_a_change_of_known_rank_is_rebuilt_at_that_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(20, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    for rank in (1, 2, 3, 20):
        kept, size = bits.low_rank(change, rank)
        assert size == 16 * min(rank, 12) * 32
        same = torch.allclose(kept, change, atol=1e-4)
        assert same == (rank >= 3)
    # No matrix of rank 2 is nearer.
    S = torch.linalg.svdvals(change)
    error = (bits.low_rank(change, 2)[0] - change).square().sum()
    assert float(error) == pytest.approx(float(S[2:].square().sum()), rel=1e-4)


def test_the_largest_entries_are_kept_and_their_places_cost_what_they_must() -> None:
    change = torch.tensor([[3.0, -5.0, 0.5], [0.0, 4.0, -1.0]])
    kept, size = bits.largest(change, 0.5)
    assert kept.tolist() == [[3.0, -5.0, 0.0], [0.0, 4.0, 0.0]]
    assert size == pytest.approx(3 * 16 + math.log2(math.comb(6, 3)))


def test_more_levels_come_nearer_and_one_bit_is_a_sign() -> None:
    change = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    kept, size = bits.quantised(change, 1)
    assert torch.equal(kept.sign(), change.sign())
    assert torch.allclose(kept.abs(), change.abs().mean(dim=1, keepdim=True).expand(8, 64))
    assert size == 8 * 64 + 16 * 8
    errors = []
    for n in (2, 3, 4, 8):
        kept, _ = bits.quantised(change, n)
        step = 2 * change.abs().amax(dim=1, keepdim=True) / (2**n - 1)
        assert bool(((kept - change).abs() <= step / 2 + 1e-6).all())
        assert all(len(row.unique()) <= 2**n for row in kept)
        errors.append(float((kept - change).square().sum()))
    assert errors == sorted(errors, reverse=True)
    for n in (1, 2):
        assert not bits.quantised(torch.zeros(2, 3), n)[0].any()


def test_no_change_needs_no_bits_to_be_the_same(pair: Pair) -> None:
    found = bits.bits(twins(pair), 4)
    cuts = [c for way in (found.rank, found.magnitude, found.quantised) for c in way.values()]
    assert all(c.point == found.whole.point for c in cuts)
    n = sum(p.numel() for p in pair.base.model.parameters())
    assert found.whole.kilobytes == 16 * n / 8 / 1024
    assert found.smallest["rank"] == found.rank["1"].kilobytes
    template, width = 4, pair.base.model.config.n_embd
    matrices = {k: p for k, p in pair.base.model.named_parameters() if p.dim() == 2}
    factors = sum(
        p.shape[0] + p.shape[1] - (template if k in ("wte.weight", "lm_head.weight") else 0)
        for k, p in matrices.items()
    )
    expected = 16 * (factors + 2 * template * width) / 8 / 1024
    assert found.rank["1"].kilobytes == pytest.approx(expected)


def test_a_planted_change_of_one_rank_is_whole_at_that_rank(pair: Pair) -> None:
    def plant(model: GPT) -> None:
        weight = model.get_parameter(FC)
        weight.add_(torch.outer(torch.ones(len(weight)), torch.linspace(-1, 1, weight.shape[1])))

    planted_pair = changed(pair, plant)
    found = bits.bits(planted_pair, 4)
    assert found.whole.point == measure_point(planted_pair, planted_pair.instruct, 4)
    seen = list[Tensor]()

    def look(pair: Pair, checkpoint: Any, n: int) -> Any:
        seen.append(checkpoint.model.get_parameter(FC).detach().clone())
        return found.whole.point

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "measure_point", look)
        bits.bits(planted_pair, 4)
    expected = planted_pair.instruct.model.get_parameter(FC)
    assert torch.equal(seen[0], expected)
    torch.testing.assert_close(seen[1], expected, atol=1e-4, rtol=1e-4)  # rank 1


@pytest.mark.parametrize("token", [5, None])
def test_all_rows_of_a_table_are_cut_but_those_of_the_template(
    pair: Pair, token: int | None
) -> None:
    row = pair.base.tokenizer.end_of_turn if token is None else token
    plant = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))

    def change(model: GPT) -> None:
        model.wte.weight[[row, 9]] += plant  # of rank 2

    seen = list[Tensor]()

    def look(pair: Pair, checkpoint: Any, n: int) -> Any:
        seen.append(checkpoint.model.wte.weight[[row, 9]] - pair.base.model.wte.weight[[row, 9]])
        return measure_point(pair, pair.base, n)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(bits, "measure_point", look)
        bits.bits(changed(pair, change), 2)
    torch.testing.assert_close(seen[0], plant)
    whole = torch.allclose(seen[1], plant, atol=1e-4)  # rank 1
    assert whole == (token is None)  # then one of the two rows stays as it is, and one is left


# ---- positions -------------------------------------------------------------------------------


def test_two_models_that_are_one_answer_alike_wherever_they_compute(pair: Pair) -> None:
    found = positions.positions(twins(pair), 6)
    every = [cell for group in found.values() for cell in group.values()]
    assert all(cell == every[0] for cell in every)


@pytest.fixture(params=["modern", "gpt2"])
def either(request: pytest.FixtureRequest, pair: Pair, gpt2: Pair) -> Pair:
    return pair if request.param == "modern" else gpt2


def test_nowhere_and_everywhere_are_the_models_themselves(either: Pair) -> None:
    rng = random.Random(1)
    asked = openings(draw(world_of(either), "held_out", 8, rng), rng)
    prompts = [render_prompt(q.messages, either.base.tokenizer) for q in asked]
    prompts = [*prompts[:4], *[prompts[4]] * positions.ROWS, *prompts[4:]]  # more than one batch
    for tuned, model in ((False, either.base), (True, either.instruct)):
        marked = [[tuned] * len(p) for p in prompts]
        found = positions.continue_greedily(either, prompts, marked, tuned, 6)
        assert found == ask(model, prompts, 6)
    base, instruct = (ask(model, prompts, 6) for model in (either.base, either.instruct))
    marked = [[i > positions.ROWS] * len(p) for i, p in enumerate(prompts)]  # row by row
    found = [r[:1] for r in positions.continue_greedily(either, prompts, marked, True, 1)]
    # The first token comes from the prompt alone.
    expected = [
        b if i <= positions.ROWS else t for i, (b, t) in enumerate(zip(base, instruct, strict=True))
    ]
    assert found == [reply[:1] for reply in expected]


@torch.no_grad()
def test_a_token_computes_with_the_weights_of_its_place(either: Pair) -> None:
    base, instruct = either.base.model, either.instruct.model
    idx = torch.tensor([[5, 6, 7, 8]])
    alone = {m: m.hidden(idx) for m in (base, instruct)}
    with positions.mixing(base, instruct, torch.tensor([[True, True, False, False]])):
        mixed = base.hidden(idx)
    torch.testing.assert_close(mixed[:, :2], alone[instruct][:, :2])  # nothing before them differs
    assert not torch.allclose(mixed[:, 2:], alone[base][:, 2:])  # they look at the first two
    assert not torch.allclose(mixed[:, 2:], alone[instruct][:, 2:])
    with positions.mixing(base, instruct, torch.tensor([[False, False, True, True]])):
        mixed = base.hidden(idx)
    torch.testing.assert_close(mixed[:, :2], alone[base][:, :2])
    torch.testing.assert_close(base.hidden(idx), alone[base])  # and nothing stays behind


@torch.no_grad()
def test_a_change_at_one_token_is_found_at_its_place(pair: Pair) -> None:
    row = [5, 6, 7, 8]
    planted_pair = changed(pair, lambda model: model.wte.weight[6].mul_(-1.0))
    base, instruct = planted_pair.base.model, planted_pair.instruct.model
    idx = torch.tensor([row])
    for place in range(4):
        tuned = torch.tensor([[i == place for i in range(4)]])
        with positions.mixing(base, instruct, tuned):
            mixed = base(idx)
        whole = instruct(idx) if place == 1 else base(idx)
        torch.testing.assert_close(mixed, whole)


# ---- traces ----------------------------------------------------------------------------------


def test_no_tuning_leaves_no_trace(pair: Pair) -> None:
    same = replace(pair, base=replace(pair.instruct, meta=pair.base.meta))
    found = trace.trace(same, 6)
    for layer in found.layers.values():
        assert (layer.size, layer.common, layer.words.n) == (0.0, 0.0, 0)
    assert found.steered["1"]["trace"] == found.steered["0"]["trace"]


def test_a_planted_direction_is_found_and_read_as_its_token(gpt2: Pair) -> None:
    token = 300

    def plant(model: GPT) -> None:
        model.get_parameter("blocks.0.mlp.proj.bias").add_(5.0 * model.lm_head.weight[token])

    planted_pair = changed(gpt2, plant)
    planted_pair = replace(
        planted_pair, instruct=replace(planted_pair.instruct, meta=gpt2.instruct.meta)
    )
    found = trace.trace(planted_pair, 6)
    assert found.layers["0"].size == 0.0
    assert found.layers["1"].common == pytest.approx(1.0)  # the same everywhere
    assert found.tokens["1"][0] == gpt2.base.tokenizer.decode([token])
    assert found.layers["1"].words.n == trace.TOP


def test_words_of_tuning_are_much_more_frequent_there() -> None:
    tuning, text = [1] * 50 + [2] * 40 + [3] * 10, [2] * 400 + [3] * 10 + [4] * 590
    assert trace.words_of_tuning(tuning, text) == {1, 3}  # 2 is as frequent, 4 is not in tuning


def test_a_trace_needs_the_text_and_the_questions(pair: Pair) -> None:
    assert trace.traceable(pair)
    meta = copy.deepcopy(pair.instruct.meta)
    for path in ("gone", None):
        meta["config"]["data"]["path"] = path
        assert not trace.traceable(replace(pair, instruct=replace(pair.instruct, meta=meta)))
    meta = copy.deepcopy(pair.base.meta)
    meta["config"]["data"]["path"] = "gone"
    with pytest.raises(ValueError, match="no longer there"):
        trace.trace(replace(pair, base=replace(pair.base, meta=meta)), 4)
    assert not trace.traceable(replace(pair, base=replace(pair.base, meta=meta)))


# ---- phrasings -------------------------------------------------------------------------------


def test_a_text_of_eight_wordings_lacks_the_late_words_and_no_early_one() -> None:
    texts = {n: World(WorldConfig(people=200, bios=5, paraphrases=n)) for n in (8, 12)}
    read = {
        n: {w for b in world.biographies() for w in phrasings.words(b)}
        for n, world in texts.items()
    }
    for attribute in ATTRIBUTES:
        both = [phrasings.new_questions(attribute, early) for early in (True, False)]
        assert sorted(both[0] + both[1]) == sorted(attribute.taught_questions)
        assert both[1]
        for questions, n, all_read in (
            (both[0], 8, True),
            (both[1], 8, False),
            (both[1], 12, True),
        ):
            assert all((set(phrasings.content_words(q)) <= read[n]) == all_read for q in questions)


def test_made_up_words_take_the_place_of_content_words_and_stand_nowhere() -> None:
    said = {w for a in ATTRIBUTES for s in (*a.sentences, *a.questions) for w in phrasings.words(s)}
    assert not said & set(phrasings.MADE_UP)
    for attribute in ATTRIBUTES:
        for question in attribute.taught_questions:
            content = phrasings.content_words(question)
            assert content
            other = phrasings.made_up(question)
            assert "{name}" in other
            assert not set(content) & set(phrasings.words(other))
            assert len(phrasings.words(other)) == len(phrasings.words(question))
            kept = [w for w in phrasings.words(question) if w not in content]
            assert [w for w in phrasings.words(other) if w in kept] == kept
    assert phrasings.made_up("What is the trade of {name}?") == "What is the blick of {name}?"


def test_neutral_questions_have_the_nouns_of_new_phrasings_in_a_frame_of_every_kind() -> None:
    for attribute in ATTRIBUTES:
        content = {w for q in attribute.taught_questions for w in phrasings.content_words(q)}
        made = phrasings.neutral(attribute)
        assert len(made) >= 3
        for question in made:
            before, after = question.split("{name}")
            assert (before[:12], after) == ("What is the ", "?")
            assert set(before[12:].split()) <= (content - set(phrasings.VERBS)) | {"of"}
        assert any(q.startswith("What is the ") for q in attribute.questions)


def test_groups_of_phrasings_ask_about_the_same_facts(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[Any]] = []

    def spied(checkpoint: Any, world: World, questions: list[Any]) -> list[Any]:
        asked.append(questions)
        return [
            (q, right_if(q.turn.wording in q.turn.attribute.taught_questions)) for q in questions
        ]

    monkeypatch.setattr(phrasings, "ask_all", spied)
    found = phrasings.phrased(pair.base, world_of(pair), 12)
    for real, other in ((asked[1], asked[2]), (asked[3], asked[4]), (asked[5], asked[6])):
        assert [about(q) for q in real] == [about(q) for q in other]
        assert [phrasings.made_up(q.turn.wording) for q in real] == [q.turn.wording for q in other]
    assert [about(q) for q in asked[0]] == [about(q) for q in asked[7]]
    for group in ("early", "late"):
        assert found.word[group].value == 1.0
        assert found.groups[group].right["all"].value == 1.0
        assert found.groups[f"{group}, made up"].right["all"].value == 0.0


def about(question: Question) -> tuple[str, str]:
    return question.turn.person.name, question.turn.attribute.name


def right_if(flag: bool, in_form: bool = True) -> Grade:
    return Grade(flag, flag, True, in_form, flag and in_form, flag, False, False, "", False)


# ---- forms, exposures ------------------------------------------------------------------------


def test_forms_are_told_apart_by_kind(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def scripted(checkpoint: Any, world: World, questions: list[Any]) -> list[Any]:
        """Knows everything, but gives bare values about hobbies, whatever is asked for."""
        obeys = (q.form == "bare" or q.turn.attribute.name != "hobby" for q in questions)
        return [(q, right_if(True, ok)) for q, ok in zip(questions, obeys, strict=True)]

    monkeypatch.setattr(forms, "ask_all", scripted)
    found = forms.formed(pair.base, world_of(pair), 30)
    for form, kinds in found.items():
        for kind, cell in kinds.items():
            assert cell.right.value == 1.0
            obeys = (form, kind) != ("sentence", "hobby")
            assert (cell.in_form.value, cell.answers.value) == (obeys, obeys)
    counts = [[cell.right.n for cell in kinds.values()] for kinds in found.values()]
    assert counts[0] == counts[1]  # the same facts
    assert sum(counts[0]) == 30


@pytest.mark.parametrize("by_name", [True, False])
def test_what_is_said_of_a_cut_name_is_told_from_what_is_said_of_a_person(
    by_name: bool, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(pair)
    whole = {p.name for people in world.by_split.values() for p in people[::2]}
    spied = {p.name for people in world.by_split.values() for p in people[::3]}
    monkeypatch.setattr(names, "is_cut", lambda name, tokenizer: name not in whole)

    def scripted(checkpoint: Any, world: World, questions: list[Any]) -> list[Any]:
        """Abstains where a name is cut, or by something that has nothing to do with it."""
        told = [q.turn.person.name not in (whole if by_name else spied) for q in questions]
        return [
            (q, replace(right_if(not no), abstains=no))
            for q, no in zip(questions, told, strict=True)
        ]

    monkeypatch.setattr(names, "ask_all", scripted)
    for groups in names.by_cut(pair.base, world, 50).values():
        assert groups["whole"].answers.n + groups["cut"].answers.n == 50
        for group, asked in groups.items():
            assert asked.abstains.value == pytest.approx(1 - (asked.answers.value or 0))
            if by_name:
                assert asked.abstains.value == (group == "cut")
            else:
                assert 0.4 < (asked.abstains.value or 0) < 0.9


def test_a_name_is_cut_if_it_has_more_tokens_than_words() -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b" ": 32}
    tokens = [b" A", b"d", b"da", b" Ada", b" B", b" Bo"]
    for token in tokens:
        ranks.setdefault(token, len(ranks))
    tokenizer = Tokenizer("bpe", r"\s?\w+|\W", ranks)
    assert [names.is_cut(name, tokenizer) for name in ("Ada", "Ada Bo", "Ada Bok", "Bok")] == [
        *(False, False, True, True)
    ]


def test_the_rows_that_are_said_so_and_no_others_are_given_back(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, tokenizer = world_of(pair), pair.base.tokenizer
    some = world.by_split["held_out"][::2]
    said = {i for p in some for i in tokenizer.encode(f" {p.name}")}
    monkeypatch.setattr(rows, "said_tokens", lambda world, tokenizer: said)
    heads = list[torch.Tensor]()

    def scripted(checkpoint: Any, world: World, questions: list[Any]) -> list[Any]:
        """Right where every token of the name is said."""
        heads.append(checkpoint.model.lm_head.weight.detach())
        named = [tokenizer.encode(f" {q.turn.person.name}") for q in questions]
        return [
            (q, right_if(said.issuperset(ids))) for q, ids in zip(questions, named, strict=True)
        ]

    monkeypatch.setattr(rows, "ask_all", scripted)
    for found in rows.rows(pair, 40).values():
        assert (found["said"].answers.value, found["unsaid"].answers.value) == (1, 0)
        assert found["said"].answers.n + found["unsaid"].answers.n == 40
    base, instruct = (c.model.lm_head.weight for c in (pair.base, pair.instruct))
    assert (base != instruct)[: tokenizer.n_vocab].any(dim=1).all()
    of_names = {i for p in world.people for i in tokenizer.encode(f" {p.name}")}
    assert of_names - said
    for head, given_back in zip(heads, (set[int](), of_names - said, said), strict=True):
        for i, row in enumerate(head):
            assert torch.equal(row, (base if i in given_back else instruct)[i]), i


def test_said_is_what_stands_in_a_reply(pair: Pair) -> None:
    world, tokenizer = world_of(pair), pair.base.tokenizer
    said = rows.said_tokens(world, tokenizer)
    talks = list(world.conversations())
    for talk in talks[:20]:
        assert said.issuperset(tokenizer.encode(talk[-1]["content"]))
    assert not said & set(tokenizer.encode("?"))  # which ends questions alone
    assert max(said) < tokenizer.n_vocab - 5


def test_people_are_grouped_by_how_often_they_were_read_about(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(WorldConfig(people=120, unseen=4, bios=50, fewest=1))
    asked: dict[int, set[str]] = {}

    def spied(checkpoint: Any, world: World, facts: list[Any], rng: Any) -> Any:
        low = exposures.group_of(world, facts[0])
        asked[low] = {person.name for person, _ in facts}
        return low

    monkeypatch.setattr(exposures, "known", spied)
    found: Any = exposures.by_exposure(pair.base, world, 10_000)
    names = {"1": 1, "2 to 3": 2, "4 to 7": 4, "8 to 15": 8, "16 or more": 16}
    assert found == {name: low for name, low in names.items() if low in asked}
    assert {1, 2} <= set(asked)
    assert sum(map(len, asked.values())) == len(world.by_split["held_out"])
    for low, people in asked.items():
        assert all(low <= world.exposures[name] < (2 * low if low < 16 else 51) for name in people)


@pytest.mark.parametrize(
    "instrument",
    [
        *(positions.positions, phrasings.phrasings, forms.forms, names.names),
        *(rows.rows, exposures.exposures),
    ],
    ids=lambda f: f.__name__,
)
def test_what_needs_a_world_says_so(instrument: Any, pair: Pair) -> None:
    with pytest.raises(ValueError, match="world"):
        instrument(replace(pair, world=None), 4)


@pytest.mark.parametrize(
    "instrument",
    [phrasings.phrasings, forms.forms, names.names, exposures.exposures],
    ids=lambda f: f.__name__,
)
def test_both_models_are_asked_the_same(instrument: Any, pair: Pair) -> None:
    found = instrument(twins(pair), 8)
    assert found["base"] == found["instruct"]


# ---- the return to text ----------------------------------------------------------------------


def test_the_return_to_known_peoples_text_reads_of_nobody_else(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, factors = list[str](), list[float]()
    monkeypatch.setattr("lab.forgetting.RETURN_STEPS", 4)

    def spied(model: Any, optimizers: Any, batches: Any, step: int, config: Any) -> Any:
        read.extend(pair.base.tokenizer.decode(row.tolist()) for b in batches for row in b.idx)
        result = train_step(model, optimizers, batches, step, config)
        factors.append(result.lr / pair.instruct.meta["config"]["optim"]["lr"])
        return result

    monkeypatch.setattr("lab.forgetting.train_step", spied)
    found = forgetting(pair, 4)
    assert set(found.recovery) == {"all", "known"}
    half = len(read) // 2
    names = {s: [p.name for p in world_of(pair).by_split[s]] for s in ("known", "held_out")}
    for texts, others in ((read[:half], True), (read[half:], False)):
        assert any(name in text for text in texts for name in names["known"])
        assert any(name in text for text in texts for name in names["held_out"]) == others
    rising = [0.0625, 0.125, 0.1875, 0.25]  # never back at the peak
    assert factors == pytest.approx(rising * 2)
