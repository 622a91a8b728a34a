"""Batches of pretraining text. Their order is a pure function of (seed, step)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from data.shards import load_tokens, open_prepared
from data.tokenizer import Tokenizer
from model.check import check_range
from model.seen import Batch
from runtime.files import at_home, fingerprint


@dataclass(frozen=True)
class PretrainDataConfig:
    """Where the text is and how it is cut. Raises ValueError if a size is out of range."""

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
        object.__setattr__(self, "path", at_home(self.path))
        check_range("data.batch_size", self.batch_size, "1 or more")
        check_range("data.micro_batch_size", self.micro_batch_size, f"1 to {self.batch_size}")
        check_range("data.val_tokens", self.val_tokens, "1 or more")


class PretrainData:
    """Token windows of a prepared text folder.

    The training text is circular, and cut into blocks. Every epoch visits every block once, in a
    new order and with the cuts in new places, so that no document is always cut in the same place.

    Args:
        verify: hash all files of the folder, not only those that look changed.
        wanted: which documents of the training text are read, given their text; None for all.

    Raises ValueError if the folder is unusable, or shorter than one block.
    """

    def __init__(
        self,
        config: PretrainDataConfig,
        block_size: int,
        seed: int,
        verify: bool = False,
        wanted: Callable[[str], bool] | None = None,
    ) -> None:
        self.config, self.block_size, self.seed = config, block_size, seed
        self.meta = open_prepared(config.path, "text", verify)
        self.fingerprint = fingerprint(self.meta["files"])
        self.tokenizer = Tokenizer.load(config.path)
        self._train, self._val = (load_tokens(config.path, part) for part in ("train", "val"))
        if wanted is not None:
            begins = np.flatnonzero(self._train == self.tokenizer.end_of_text)
            documents = np.split(self._train, begins)
            kept = [d for d in documents if wanted(self.tokenizer.decode(d.tolist()))]
            self._train = np.concatenate([self._train[:0], *kept])
        self.n_tokens, self.n_blocks = len(self._train), len(self._train) // block_size
        if not self.n_blocks:
            what = f"{config.path} has {self.n_tokens} training tokens, fewer than one block"
            raise ValueError(f"{what} of {block_size}; use more text or a smaller model.block_size")
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[int, np.ndarray]:
        """An epoch's offset of the first block, and the order of its blocks."""
        rng = np.random.default_rng([self.seed, epoch])
        return int(rng.integers(self.block_size)), rng.permutation(self.n_blocks)

    def micro_batches(self, step: int, rows: int) -> list[Batch]:
        """Micro-batches of optimizer step `step` (from 0), at most `rows` rows each."""
        first, starts = step * self.config.batch_size, []
        for i in range(first, first + self.config.batch_size):
            shift, order = self._order(i // self.n_blocks)
            starts.append(shift + order[i % self.n_blocks] * self.block_size)
        return self._batches(self._train, starts, rows, self.block_size)

    def val_batches(self, rows: int) -> list[Batch]:
        """The same blocks at every call: all of the text, or about val_tokens of it."""
        T, n = self.block_size, len(self._val) - 1  # n predictions
        starts, rest = list(range(0, n - T + 1, T)), n % T
        if starts and self.config.val_tokens is not None and self.config.val_tokens < n:
            chosen = max(1, self.config.val_tokens // T)
            starts, rest = [starts[i * len(starts) // chosen] for i in range(chosen)], 0
        last = self._batches(self._val, [n - rest], rows, rest) if rest else []
        return self._batches(self._val, starts, rows, T) + last

    def _batches(
        self, tokens: np.ndarray, starts: list[int], rows: int, length: int
    ) -> list[Batch]:
        """Batches of at most `rows` windows of `length` tokens from `starts`."""
        batches = []
        for i in range(0, len(starts), rows):
            places = (np.array(starts[i : i + rows])[:, None] + np.arange(length + 1)) % len(tokens)
            ids = torch.from_numpy(tokens[places].astype(np.int64))
            idx, documents = ids[:, :-1].contiguous(), None
            if self.config.document_mask:  # an end-of-text token begins each document
                documents = (idx == self.tokenizer.end_of_text).cumsum(dim=1)
            batches.append(Batch(idx, ids[:, 1:].contiguous(), None, documents))
        return batches

    def bytes_of(self, batches: list[Batch]) -> int:
        """Bytes of text that the targets of some batches stand for."""
        lengths = self.tokenizer.byte_lengths
        return int(sum(lengths[batch.targets.numpy()].sum() for batch in batches))
