"""Batches of pretraining text. Their order is a pure function of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data.shards import open_prepared
from data.tokenizer import Tokenizer
from model.gpt import Batch


@dataclass(frozen=True)
class PretrainDataConfig:
    """Where the text is and how it is cut.

    Raises:
        ValueError: sizes out of range.
    """

    path: str
    """Folder made by `python -m data.prepare text` or `world`."""
    batch_size: int = 16
    """Sequences per optimizer step, each of model.block_size tokens."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; None for the whole batch. Changes memory, not the result."""
    document_mask: bool = False
    """Attention only within a document, not across the documents that share a window, and
    positions that count from its beginning."""
    val_tokens: int | None = None
    """Tokens per evaluation, evenly spread over the validation text; None for all of it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(Path(self.path).expanduser()))
        check_batch_sizes(self.batch_size, self.micro_batch_size)
        if self.val_tokens is not None and self.val_tokens < 1:
            raise ValueError(f"data.val_tokens is {self.val_tokens}; it must be 1 or more")


def check_batch_sizes(batch_size: int, micro_batch_size: int | None) -> None:
    """Raises ValueError where sequences per step or per forward pass are out of range."""
    if batch_size < 1:
        raise ValueError(f"data.batch_size is {batch_size}; it must be 1 or more")
    if micro_batch_size is not None and not 1 <= micro_batch_size <= batch_size:
        raise ValueError(
            f"data.micro_batch_size is {micro_batch_size}; it must be 1 to data.batch_size "
            f"({batch_size})"
        )


class PretrainData:
    """Token windows of a prepared text folder.

    The training text is a ring of tokens, cut into blocks. Every epoch visits every block once,
    in a new order and with the cuts in new places, so that no document is always cut alike.

    Raises:
        ValueError: the folder is unusable, or shorter than one block.
    """

    def __init__(self, config: PretrainDataConfig, block_size: int, seed: int) -> None:
        self.config, self.block_size, self.seed = config, block_size, seed
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        self.meta = open_prepared(config.path, "text")
        self.tokenizer = Tokenizer.load(config.path)
        dtype = np.dtype(self.meta["text"]["dtype"])
        self._train = np.memmap(Path(config.path) / "train.bin", dtype, mode="r")
        self._val = np.memmap(Path(config.path) / "val.bin", dtype, mode="r")
        self.n_blocks = len(self._train) // block_size
        if not self.n_blocks:
            raise ValueError(
                f"{config.path} has {len(self._train)} training tokens, fewer than one block of "
                f"{block_size}; use more text or a smaller model.block_size"
            )
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        """Training tokens."""
        return len(self._train)

    def _shuffle(self, epoch: int) -> tuple[int, np.ndarray]:
        """Where an epoch begins to cut, and the order of its blocks."""
        rng = np.random.default_rng([self.seed, epoch])
        return int(rng.integers(self.block_size)), rng.permutation(self.n_blocks)

    def micro_batches(self, step: int) -> list[Batch]:
        """What optimizer step `step` (from 0) trains on, in forward passes."""
        first = step * self.config.batch_size
        starts = []
        for i in range(first, first + self.config.batch_size):
            shift, order = self._order(i // self.n_blocks)
            starts.append(shift + order[i % self.n_blocks] * self.block_size)
        size = self.micro_batch_size
        return [
            self._windows(self._train, starts[i : i + size], self.block_size)
            for i in range(0, len(starts), size)
        ]

    def val_batches(self) -> list[Batch]:
        """The same windows at every call; together all of the text, unless val_tokens says less."""
        T, n = self.block_size, len(self._val) - 1  # n predictions
        starts = list(range(0, n - T + 1, T))
        rest = n % T
        if self.config.val_tokens is not None and self.config.val_tokens < n:
            chosen = max(1, self.config.val_tokens // T)
            if chosen <= len(starts):
                starts = [starts[i * len(starts) // chosen] for i in range(chosen)]
                rest = 0
        size = self.micro_batch_size
        batches = [
            self._windows(self._val, starts[i : i + size], T) for i in range(0, len(starts), size)
        ]
        return batches + ([self._windows(self._val, [n - rest], rest)] if rest else [])

    def _windows(self, tokens: np.ndarray, starts: list[int], length: int) -> Batch:
        places = (np.array(starts)[:, None] + np.arange(length + 1)) % len(tokens)
        ids = torch.from_numpy(tokens[places].astype(np.int64))
        idx, documents = ids[:, :-1].contiguous(), None
        if self.config.document_mask:  # an end-of-text token begins each document
            documents = (idx == self.tokenizer.end_of_text).cumsum(dim=1)
        return Batch(idx, ids[:, 1:].contiguous(), None, documents)

    def bytes_of(self, batches: list[Batch]) -> int:
        """Bytes of text that the targets of some batches stand for."""
        lengths = self.tokenizer.byte_lengths
        return int(sum(lengths[batch.targets.numpy()].sum() for batch in batches))
