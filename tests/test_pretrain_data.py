from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from data.prepare import prepare_text
from data.pretrain import PretrainData, PretrainDataConfig
from model.seen import Batch

RING = [256, *range(33, 117)]  # 85 training tokens, no two alike, so that a token is a place
VAL = [*range(117, 127)]  # and 10 of validation
T = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text")
    (path / "text.txt").write_text("".join(map(chr, range(33, 127))))
    prepare_text([path / "text.txt"], path / "out", "byte", 10 / 94, "text", 1)
    return str(path / "out")


def make(
    folder: str, batch: int = 3, micro: int | None = None, seed: int = 1, **options: Any
) -> PretrainData:
    return PretrainData(PretrainDataConfig(folder, batch, micro, **options), T, seed)


def batches_of(data: PretrainData, step: int) -> list[Batch]:
    return data.micro_batches(step, data.config.micro_batch_size or data.config.batch_size)


def rows(data: PretrainData, n: int) -> list[list[int]]:
    """The first `n` rows of training."""
    steps = range(-(-n // data.config.batch_size))
    batches = [batch for step in steps for batch in batches_of(data, step)]
    found: list[list[int]] = torch.cat([idx for idx, *_ in batches]).tolist()
    return found[:n]


def test_every_epoch_visits_every_token_once_up_to_the_remainder(folder: str) -> None:
    data = make(folder)
    assert data.n_tokens == len(RING)
    assert data.n_blocks == len(RING) // T
    everything = rows(data, 12 * data.n_blocks)
    cuts = set()
    for first in range(0, len(everything), data.n_blocks):
        epoch = everything[first : first + data.n_blocks]
        tokens = [token for row in epoch for token in row]
        assert len(tokens) == len(set(tokens)) == data.n_blocks * T
        assert set(tokens) <= set(RING)
        cuts.add(frozenset(row[0] for row in epoch))
    assert len(cuts) > 3
    assert {token for row in everything for token in row} == set(RING)


def test_order_differs_between_epochs_and_seeds(folder: str) -> None:
    first = rows(make(folder), 30)
    orders = [first[:10], first[10:20], first[20:], rows(make(folder, seed=2), 10)]
    places = [tuple((RING.index(row[0]) // T) for row in order) for order in orders]
    assert len(set(places)) == 4
    assert all(list(order) != sorted(order) for order in places)


def test_batches_are_a_pure_function_of_seed_and_step(folder: str) -> None:
    data, again = make(folder), make(folder)
    forward = {step: batches_of(data, step)[0][0] for step in range(12)}
    for step in (11, 3, 7, 0, 3):
        assert torch.equal(batches_of(again, step)[0][0], forward[step])


def test_targets_are_the_next_tokens_of_the_ring(folder: str) -> None:
    following = dict(zip(RING, RING[1:] + RING[:1], strict=True))
    data = make(folder)
    for step in range(20):
        for idx, targets, weights, *_ in batches_of(data, step):
            assert idx.shape == targets.shape == (3, T)
            assert idx.dtype == targets.dtype == torch.int64
            assert [[following[i] for i in row] for row in idx.tolist()] == targets.tolist()
            assert torch.equal(idx[:, 1:], targets[:, :-1])
            assert weights is None


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_micro_batches_hold_the_same_rows(micro: int, folder: str) -> None:
    for step in range(3):
        [(idx, targets, *_)] = batches_of(make(folder, 8), step)
        parts = batches_of(make(folder, 8, micro), step)
        assert all(len(part) <= micro for part, *_ in parts)
        assert torch.equal(torch.cat([part for part, *_ in parts]), idx)
        assert torch.equal(torch.cat([part for _, part, *_ in parts]), targets)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 9, 10, 64])
def test_validation_covers_every_prediction_once(block_size: int, folder: str) -> None:
    data = PretrainData(PretrainDataConfig(folder, 2), block_size, seed=1)
    batches = data.val_batches(2)
    pairs = [
        pair
        for idx, targets, *_ in batches
        for pair in zip(idx.flatten().tolist(), targets.flatten().tolist(), strict=True)
    ]
    assert pairs == list(pairwise(VAL))
    assert data.bytes_of(batches) == len(VAL) - 1
    assert data.bytes_of([Batch(torch.tensor([[0]]), torch.tensor([[256]]))]) == 0
    other = PretrainData(PretrainDataConfig(folder, 2), block_size, seed=2).val_batches(2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, other, strict=True))


@pytest.mark.parametrize("block_size", [2, 4, 5, 64])
@pytest.mark.parametrize("val_tokens", [1, 4, 6, 8, 9, 100])
def test_val_tokens_caps_an_evaluation(block_size: int, val_tokens: int, folder: str) -> None:
    config = PretrainDataConfig(folder, 2, val_tokens=val_tokens)
    data = PretrainData(config, block_size, seed=1)
    targets = [t for _, batch, *_ in data.val_batches(2) for t in batch.flatten().tolist()]
    assert len(targets) == len(set(targets)) <= max(val_tokens, min(block_size, len(VAL) - 1))
    assert len(targets) > min(val_tokens, len(VAL) - 1) - block_size
    if val_tokens >= len(VAL) - 1:
        assert targets == VAL[1:]
    if (block_size, val_tokens) == (2, 4):
        assert targets == VAL[1:3] + VAL[5:7]  # evenly spread


def test_a_corpus_shorter_than_a_block_is_refused(folder: str) -> None:
    assert PretrainData(PretrainDataConfig(folder), len(RING), seed=1).n_blocks == 1
    with pytest.raises(ValueError, match="85 training tokens, fewer than one block of 86"):
        PretrainData(PretrainDataConfig(folder), len(RING) + 1, seed=1)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"micro_batch_size": 0}, "data.micro_batch_size is 0"),
        ({"batch_size": 4, "micro_batch_size": 5}, "data.micro_batch_size is 5"),
        ({"val_tokens": 0}, "data.val_tokens is 0"),
    ],
)
def test_sizes_out_of_range_are_refused_by_key(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        PretrainDataConfig("somewhere", **options)


def test_a_document_mask_numbers_the_documents_of_each_window(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "{i}{i}{i}"}}\n' for i in range(10)))
    prepare_text([tmp_path / "t.jsonl"], tmp_path / "data", "byte", 0.2, "text", 1)
    data = PretrainData(PretrainDataConfig(str(tmp_path / "data"), 2, document_mask=True), 8, 1)
    for batch in (batches_of(data, 0)[0], batches_of(data, 3)[0], data.val_batches(2)[0]):
        assert batch.documents is not None
        for ids, numbers in zip(batch.idx.tolist(), batch.documents.tolist(), strict=True):
            for place in range(1, len(ids)):
                new = ids[place] == data.tokenizer.end_of_text
                assert numbers[place] == numbers[place - 1] + new
    plain = PretrainData(PretrainDataConfig(str(tmp_path / "data"), 2), 8, 1)
    assert batches_of(plain, 0)[0].documents is None
    assert torch.equal(batches_of(plain, 3)[0].idx, batches_of(data, 3)[0].idx)
