from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from data.chat import render
from data.fitting import kept_length
from data.prepare import prepare_qa, prepare_text
from data.replay import open_replay
from data.sft import POOL, SFTData, SFTDataConfig
from data.sources.read import parse_example
from data.tokenizer import Tokenizer, create_tokenizer
from data.world import World, WorldConfig
from lab.pair import replayed
from model.gpt import GPT, ModelConfig
from model.seen import Batch
from runtime.files import fingerprint, read_meta, write_meta

BYTE = create_tokenizer("byte", [])
END, EOT = BYTE.end_of_turn, BYTE.end_of_text
N = 23  # training conversations, no two alike, of many lengths
Row = tuple[tuple[int, ...], tuple[float, ...]]


def conversation(i: int) -> dict[str, Any]:
    turns = [("user", f"question {i}" + "?" * (i % 7)), ("assistant", "ha" * (1 + i % 5))]
    return {"messages": [{"role": r, "content": c} for r, c in turns * (1 + i % 3)]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders text (byte), qa (byte), and other (bpe, text and Q&A)."""
    path = tmp_path_factory.mktemp("sft")
    (path / "a.txt").write_text("the cat sat on the mat " * 50)
    (path / "a.jsonl").write_text("\n".join(json.dumps(conversation(i)) for i in range(N + 5)))
    prepare_text([path / "a.txt"], path / "text", "byte", 0.1, "text", 1)
    prepare_text([path / "a.txt"], path / "other", "bpe:270", 0.1, "text", 1)
    prepare_qa([path / "a.jsonl"], path / "qa", path / "text", 5 / (N + 5), 1)
    prepare_qa([path / "a.jsonl"], path / "other_qa", path / "other", 5 / (N + 5), 1)
    return path


def make(
    folders: Path, batch: int = 8, micro: int | None = None, seed: int = 1, **options: Any
) -> SFTData:
    config = SFTDataConfig("unused", batch, micro, **options)
    replay = open_replay(config, base_of(folders / "text"), 1000, seed, False)
    return SFTData(folders / "qa", config, BYTE, 1000, seed, replay)


def base_of(text: Path, document_mask: bool = False) -> dict[str, Any]:
    """The meta.json of a base that was trained on a prepared text."""
    meta = read_meta(text)
    return {
        "config": {"data": {"path": str(text), "document_mask": document_mask}},
        "data": {"fingerprint": fingerprint(meta["files"])},
        "tokenizer": meta["tokenizer"],
    }


def batches_of(data: SFTData, step: int) -> list[Batch]:
    return data.micro_batches(step, data.config.micro_batch_size or data.config.batch_size)


def val_batches_of(data: SFTData) -> list[Batch]:
    return data.val_batches(data.config.micro_batch_size or data.config.batch_size)


def unpad(batches: list[Batch]) -> list[Row]:
    """(ids, weights of the targets) of each row up to its last end of turn; padding is checked."""
    rows = []
    for idx, targets, weights, *_ in batches:
        assert weights is not None
        assert idx.shape == targets.shape == weights.shape
        for row, row_targets, w in zip(idx, targets, weights, strict=True):
            ids = [int(row[0]), *row_targets.tolist()]
            length = len(ids) - ids[::-1].index(END)
            assert torch.equal(row[1 : length - 1], row_targets[: length - 2])
            assert row[length - 1 :].tolist() == [EOT] * (len(row) - length + 1)
            assert ids[length:] == [EOT] * (len(ids) - length)
            assert not w[length - 1 :].any()
            rows.append((tuple(ids[:length]), tuple(w[: length - 1].tolist())))
    return rows


RENDERED = [render(parse_example(conversation(i)), BYTE) for i in range(N + 5)]


def expected(prompt_weight: float) -> set[Row]:
    return {
        (tuple(ids), tuple(1.0 if m else prompt_weight for m in mask[1:])) for ids, mask in RENDERED
    }


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25, 1.0])
def test_every_epoch_visits_every_conversation_once_weighted_as_asked(
    prompt_weight: float, folders: Path
) -> None:
    data = make(folders, prompt_loss_weight=prompt_weight)
    assert data.steps_per_epoch == 3
    for epoch in range(3):
        steps = range(3 * epoch, 3 * epoch + 3)
        rows = [row for step in steps for row in unpad(batches_of(data, step))]
        assert len(rows) == len(set(rows)) == N
        assert set(rows) < expected(prompt_weight)
    val = unpad(val_batches_of(data))
    assert {ids for ids, _ in val} == {ids for ids, _ in expected(0.0)} - {ids for ids, _ in rows}
    assert set(val) < expected(0.0)  # whatever the prompts weigh in training
    assert unpad(val_batches_of(data)) == val


def test_order_differs_between_epochs_and_seeds(folders: Path) -> None:
    data, other = make(folders, batch=1), make(folders, batch=1, seed=2)
    runs = [(data, 0), (data, 1), (data, 2), (other, 0)]
    orders = [[unpad(batches_of(d, e * N + i))[0][0] for i in range(N)] for d, e in runs]
    assert len(set(map(tuple, orders))) == 4
    lengths = [[len(ids) for ids in order] for order in orders]
    assert all(ordered != sorted(ordered) for ordered in lengths)


def test_batches_are_a_pure_function_of_seed_and_step(folders: Path) -> None:
    data, again = make(folders, replay=0.3), make(folders, replay=0.3)
    forward = {step: batches_of(data, step) for step in range(9)}
    for step in (8, 2, 5, 0, 2):
        for a, b in zip(batches_of(again, step), forward[step], strict=True):
            assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_micro_batches_hold_the_same_rows(micro: int, folders: Path) -> None:
    for step in range(6):
        parts = batches_of(make(folders, 8, micro), step)
        assert all(len(idx) <= micro for idx, *_ in parts)
        assert unpad(parts) == unpad(batches_of(make(folders, 8), step))


def test_rows_of_like_length_are_batched_together(folders: Path) -> None:
    assert N < POOL * 4
    data = make(folders, batch=4)
    for epoch in range(2):
        steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
        lengths = [[len(ids) for ids, _ in unpad(batches_of(data, step))] for step in steps]
        ranges = sorted((min(batch), max(batch)) for batch in lengths)
        assert all(a[1] <= b[0] for a, b in pairwise(ranges))


def test_padding_is_masked_by_position_and_never_by_id(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.array([EOT, 258, EOT, 65, END, 259, EOT, 66, EOT, END])
    mask = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1], np.uint8)
    rows = [(ids, mask), (np.append(ids[:-1], [67, 67, END]), np.append(mask, [1, 1]))]
    monkeypatch.setattr("data.sft.load_examples", lambda folder, part: rows)
    [(_, targets, weights, *_)] = batches_of(make(folders, prompt_loss_weight=0.5), 0)
    assert weights is not None
    assert (targets == EOT).sum() == 3 + 3 + 2  # in the text, and as padding
    assert sorted(weights.tolist()) == [
        [0.5] * 5 + [1.0] * 4 + [0.0] * 2,
        [0.5] * 5 + [1.0] * 6,
    ]


@pytest.mark.parametrize("prompt_weight", [0.0, 0.5])
@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_packed_rows_train_as_padded_ones_do(
    folders: Path, recipe: Literal["gpt2", "modern"], prompt_weight: float
) -> None:
    config = ModelConfig(recipe=recipe, n_layer=2, n_head=2, n_embd=32, block_size=300)
    options = {"prompt_loss_weight": prompt_weight}
    settings = SFTDataConfig("unused", 8, **options)  # type: ignore[arg-type]
    padded, packed = (
        SFTData(folders / "qa", settings, BYTE, 300, 1, packed=packed) for packed in (False, True)
    )
    found = []
    for data in (padded, packed):
        torch.manual_seed(1)
        model = GPT(config, BYTE.n_vocab)
        torch.nn.init.normal_(model.lm_head.weight)
        for step in range(2):
            for batch in batches_of(data, step):
                model(*batch).backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    rows = [len(b.idx) for step in range(2) for b in batches_of(packed, step)]
    assert max(rows) < 8  # there is more than one in a row
    for batch in batches_of(packed, 0):
        assert batch.weights is not None
        assert batch.documents is not None
        assert not batch.weights[batch.documents == 0].any()  # padding
    assert float(packed.shares(8).split("supervised, ")[1].split("%")[0]) < 30


def test_a_long_conversation_is_cut_after_its_last_whole_reply() -> None:
    messages = parse_example(conversation(2))
    ids, mask = map(np.array, render(messages, BYTE))
    wholes = [0, *(len(render(messages[:n], BYTE)[0]) for n in (2, 4, 6))]
    for limit in range(1, len(ids) + 5):
        length = kept_length(mask.astype(np.uint8), limit)
        assert length == max(whole for whole in wholes if whole <= limit + 1 or whole == 0)
        if length:
            assert (ids[length - 1], mask[length - 1]) == (END, 1)
    assert kept_length(np.zeros(len(ids), np.uint8), 1000) == 0


def test_what_does_not_fit_is_cut_or_dropped_and_counted(folders: Path) -> None:
    limit = 25
    lengths = [kept_length(np.array(mask, np.uint8), limit) for ids, mask in RENDERED]
    kept = {tuple(ids[:n]) for (ids, _), n in zip(RENDERED, lengths, strict=True) if n}
    cut = sum(0 < n < len(ids) for (ids, _), n in zip(RENDERED, lengths, strict=True))
    data = SFTData(folders / "qa", SFTDataConfig("unused", 30), BYTE, limit, 1)
    rows = unpad(batches_of(data, 0) + val_batches_of(data))
    assert {ids for ids, _ in rows} == kept
    assert all(len(ids) <= limit + 1 and ids[-1] == END and w[-1] == 1 for ids, w in rows)
    out, lost = lengths.count(0), sum(len(ids) for ids, _ in RENDERED) - sum(lengths)
    assert min(out, cut, lost) > 0
    _, line = data.shares(30).splitlines()
    said = f"longer than 25: {out} conversations left out, the ends of {cut} cut off: {lost:,}"
    assert line.startswith(said)
    needed = int(line.split("; ")[1].removesuffix(" tokens hold 95 % of all whole"))
    fit = [sum(len(ids) <= n + 1 for ids, _ in RENDERED) for n in (needed - 1, needed)]
    assert fit[0] < 0.95 * len(RENDERED) <= fit[1]
    wide = SFTData(folders / "qa", SFTDataConfig("unused", 30), BYTE, 10**5, 1)
    assert "\n" not in wide.shares(30)


def test_no_conversation_that_fits_is_an_error(folders: Path) -> None:
    with pytest.raises(ValueError, match=r"no conversation of .* fits into 5 tokens") as error:
        SFTData(folders / "qa", SFTDataConfig("unused"), BYTE, 5, seed=1)
    some = SFTData(folders / "qa", SFTDataConfig("unused"), BYTE, 25, seed=1).shares(30)
    needed = some.split("; ")[-1]
    assert f": {len(RENDERED)} conversations left out" in str(error.value)
    assert str(error.value).endswith(needed)


@pytest.mark.parametrize(("replay", "rows"), [(0.5, 6), (0.4, 4), (0.25, 2), (0.01, 1)])
@pytest.mark.parametrize("micro", [None, 2])
def test_replay_is_its_share_of_the_rows_of_a_step(
    replay: float, rows: int, micro: int | None, folders: Path
) -> None:
    data, plain = make(folders, 6, micro, replay=replay), make(folders, 6, micro)
    for step in range(5):
        chats = batches_of(plain, step)
        replayed = data.replayed(step, micro or rows)
        assert unpad(batches_of(data, step)) == unpad(chats)
        assert sum(len(idx) for idx, *_ in replayed) == rows
        assert all(weights is None and idx.shape[1] == 1000 for idx, _, weights, *_ in replayed)
        assert all(len(idx) <= (micro or rows) for idx, *_ in replayed)
    assert len(val_batches_of(data)) == len(val_batches_of(plain))


def test_only_known_people_are_replayed_if_that_is_asked_for(
    world_dir: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(WorldConfig(**read_meta(world_dir)["world"]))
    held_out = [p.name for p in world.by_split["held_out"]]
    known = [p.name for p in world.by_split["known"]]
    base = base_of(world_dir)
    for people, told in (("all", "all"), ("known", "known")):
        options: Any = {"replay_people": people}
        config = SFTDataConfig("unused", 8, replay=0.5, **options)
        data = open_replay(config, base, 64, 1, False)
        assert data is not None
        windows = [b.idx for step in range(40) for b in data.micro_batches(step, 8)]
        text = data.tokenizer.decode(torch.cat([w.flatten() for w in windows]).tolist())
        assert any(name in text for name in known)
        assert any(name in text for name in held_out) == (people == "all")
        assert replayed({"config": {"data": asdict(config)}}) == told
    assert replayed({"config": {"data": {"replay": 0.0, "replay_people": "known"}}}) == "none"
    assert replayed({"config": {"data": {"replay": 0.1}}}) == "all"  # before it could be chosen
    with monkeypatch.context() as patch:
        patch.setattr("data.world.DONT_KNOW", " No idea.")
        with pytest.raises(ValueError, match=r"known, but .* was made by other words"):
            open_replay(config, base, 64, 1, False)
    with pytest.raises(ValueError, match=r"replay_people=known, but .* is no world"):
        open_replay(config, base_of(folders / "text"), 64, 1, False)


def test_another_tokenizer_is_refused(folders: Path) -> None:
    other = Tokenizer.load(folders / "other")
    config = SFTDataConfig("unused", replay=0.5)
    with pytest.raises(ValueError, match=r"qa was prepared with another tokenizer.*--tokenizer-of"):
        SFTData(folders / "qa", SFTDataConfig("unused"), other, 100, seed=1)
    base = base_of(folders / "text") | {"tokenizer": {"fingerprint": other.fingerprint}}
    with pytest.raises(ValueError, match="text, to be replayed, has another tokenizer"):
        open_replay(config, base, 100, 1, False)


def test_another_chat_template_is_refused(folders: Path, tmp_path: Path) -> None:
    prepare_qa([folders / "a.jsonl"], tmp_path / "qa", folders / "text", 0.2, 1)
    meta = read_meta(tmp_path / "qa")
    write_meta(tmp_path / "qa", {**meta, "qa": {**meta["qa"], "template": "old"}})
    with pytest.raises(ValueError, match="another chat template"):
        SFTData(tmp_path / "qa", SFTDataConfig("unused"), BYTE, 100, seed=1)


def test_validation_prompts_end_where_the_reply_begins(folders: Path) -> None:
    data = make(folders)
    prompts = data.val_prompts(3)
    assert len(prompts) == 3
    for prompt, (ids, mask) in zip(prompts, data.val, strict=False):
        assert prompt == ids[: len(prompt)].tolist()
        assert prompt[-1] == BYTE.control("<|assistant|>")
        assert not mask[: len(prompt)].any()
        assert mask[len(prompt)]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 0),
        ("micro_batch_size", 17),
        ("block_size", 1),
        ("val_fraction", 1.0),
        ("prompt_loss_weight", 1.1),
        ("prompt_loss_weight", -0.1),
        ("replay", 1.0),
        ("replay", -0.1),
    ],
)
def test_settings_out_of_range_are_refused_by_key(option: str, value: float) -> None:
    options: Any = {option: value}
    with pytest.raises(ValueError, match=f"data.{option} is {value}"):
        SFTDataConfig("somewhere", **options)


def test_examples_keeps_the_first_conversations_and_all_of_validation(folders: Path) -> None:
    data, whole = make(folders, batch=4, examples=6), make(folders, batch=4)
    assert data.steps_per_epoch == 2
    seen = [row for step in range(2) for row in unpad(batches_of(data, step))]
    first = [tuple(ids.tolist()) for ids, _ in whole._train[:6]]
    assert sorted(ids for ids, _ in seen) == sorted(first)
    assert len(data.val) == len(whole.val)
    with pytest.raises(ValueError, match=r"data.examples is 0"):
        make(folders, examples=0)


def test_replayed_windows_are_masked_as_the_base_was(folders: Path) -> None:
    config = SFTDataConfig("unused", 4, replay=0.5)
    for masked in (False, True):
        replay = open_replay(config, base_of(folders / "text", masked), 1000, 1, False)
        data = SFTData(folders / "qa", config, BYTE, 1000, 1, replay)
        (chat,), (replayed,) = batches_of(data, 0), data.replayed(0, 4)
        assert chat.documents is None
        assert (replayed.documents is not None) is masked
