"""Batches of conversations, rows of like length together, in an order fixed by (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.chat import template_fingerprint
from data.pretrain import PretrainData, PretrainDataConfig, check_batch_sizes
from data.shards import load_examples, open_prepared
from data.tokenizer import Tokenizer
from model.gpt import Batch

POOL = 50  # batches whose rows are sorted by length together: little padding, much shuffling


@dataclass(frozen=True)
class SFTDataConfig:
    """Where the conversations are and how they are weighted.

    Raises:
        ValueError: sizes or shares out of range.
    """

    path: str
    """Folder made by `python -m data.prepare qa`, `fetch` or `world`, or a Q&A file."""
    batch_size: int = 16
    """Conversations per optimizer step."""
    micro_batch_size: int | None = None
    """Rows per forward pass; None for the whole batch. Changes memory, not the result."""
    block_size: int | None = None
    """Longest conversation, in tokens; None for the base's block_size."""
    val_fraction: float = 0.1
    """Share of a file's conversations held back for validation (a folder has its own)."""
    examples: int | None = None
    """Train on so many conversations only, the first of the prepared order; None for all."""
    layout: Literal["auto", "padded", "packed"] = "auto"
    """How a step's conversations lie in rows: padded, a row each among others of like length, or
    packed, several in a row that do not see each other. Changes speed, not the result. auto packs
    on one GPU that has bfloat16."""
    prompt_loss_weight: float = 0.0
    """Weight of the tokens that are not the assistant's, 0 to 1."""
    replay: float = 0.0
    """Share of a step's rows that are windows of pretraining text, block_size long, 0 to below 1.

    Every token of them weighs 1, so their share of the loss is larger."""
    replay_path: str | None = None
    """Prepared text to replay; None for what the base was trained on."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(Path(self.path).expanduser()))
        check_batch_sizes(self.batch_size, self.micro_batch_size)
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"data.block_size is {self.block_size}; it must be 2 or more")
        if self.examples is not None and self.examples < 1:
            raise ValueError(f"data.examples is {self.examples}; it must be 1 or more")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction is {self.val_fraction}; it must be 0 to 1")
        if not 0 <= self.prompt_loss_weight <= 1:
            raise ValueError(
                f"data.prompt_loss_weight is {self.prompt_loss_weight}; it must be 0 to 1"
            )
        if not 0 <= self.replay < 1:
            raise ValueError(f"data.replay is {self.replay}; it must be 0 to below 1")


def fit(ids: np.ndarray, mask: np.ndarray, limit: int) -> int:
    """Tokens of a conversation to keep so that at most `limit` are fed: whole replies or nothing.

    A conversation that is too long is cut after its last whole reply that fits, so that a reply
    never loses its end-of-turn token; 0 says that not even the first one fits.
    """
    # limit + 1 tokens make limit (input, target) pairs.
    if len(ids) <= limit + 1:
        return len(ids) if mask.any() else 0
    reply_ends = np.flatnonzero(np.diff(mask.astype(np.int8)) == -1) + 1
    fitting = reply_ends[reply_ends <= limit + 1]
    return int(fitting[-1]) if len(fitting) else 0


class SFTData:
    """Rendered conversations of a prepared folder, and on request windows of pretraining text.

    Every epoch visits every conversation once. `document_mask` is that of the replayed windows.

    Raises:
        ValueError: the folder is unusable, belongs to another tokenizer or chat template, or no
            conversation fits into block_size.
    """

    def __init__(
        self,
        folder: Path,
        config: SFTDataConfig,
        tokenizer: Tokenizer,
        block_size: int,
        seed: int,
        replay_path: str | None = None,
        document_mask: bool = False,
        packed: bool = False,
    ) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.block_size, self.packed = block_size, packed
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        self.meta = open_prepared(str(folder), "qa")
        if self.meta["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            raise ValueError(
                f"{folder} was prepared with another tokenizer than the base's; make it again with "
                "`python -m data.prepare qa FILE --out DIR --tokenizer-of BASE`"
            )
        if self.meta["qa"]["template"] != template_fingerprint():
            raise ValueError(f"{folder} was prepared with another chat template; make it again")
        self.truncated = self.dropped = 0
        self._train, self.val = (self._load(folder, p, block_size) for p in ("train", "val"))
        if not self._train or not self.val:
            raise ValueError(
                f"no conversation of {folder} fits into {block_size} tokens; use a larger "
                "data.block_size (the base's at most) or shorter conversations"
            )
        self._train = self._train[: config.examples]
        n_rows = config.batch_size
        self._replay, self.replay_files = None, None
        if config.replay:
            assert replay_path is not None
            rows = max(1, round(n_rows * config.replay / (1 - config.replay)))
            forward_rows = min(rows, config.micro_batch_size or rows)
            settings = PretrainDataConfig(replay_path, rows, forward_rows, document_mask)
            self._replay = PretrainData(settings, block_size, seed)
            if self._replay.tokenizer.fingerprint != tokenizer.fingerprint:
                raise ValueError(
                    f"{replay_path}, to be replayed, has another tokenizer than the base"
                )
            self.replay_files = self._replay.meta["files"]
        self.steps_per_epoch = -(-len(self._train) // n_rows)
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _load(
        self, folder: Path, part: str, block_size: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        kept = []
        for ids, mask in load_examples(folder, part):
            length = fit(ids, mask, block_size)
            self.truncated += 0 < length < len(ids)
            self.dropped += length == 0
            if length:
                kept.append((ids[:length], mask[:length]))
        return kept

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, as indices of examples."""
        rng = np.random.default_rng([self.seed, epoch])
        lengths = np.array([len(ids) for ids, _ in self._train])
        order, size = rng.permutation(len(lengths)), self.config.batch_size
        batches = []
        for i in range(0, len(order), size * POOL):
            pool = order[i : i + size * POOL]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches += [pool[j : j + size] for j in range(0, len(pool), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def micro_batches(self, step: int) -> list[Batch]:
        """What optimizer step `step` (from 0) trains on, in forward passes."""
        epoch, i = divmod(step, self.steps_per_epoch)
        conversations = [self._train[j] for j in self._order(epoch)[i]]
        batches = self._batches(conversations, self.config.prompt_loss_weight)
        if self._replay is None:
            return batches
        self._replay.micro_batch_size = min(self._replay.micro_batch_size, self.micro_batch_size)
        return batches + self._replay.micro_batches(step)

    def val_batches(self) -> list[Batch]:
        """All validation conversations, only what is supervised weighted."""
        rows = sorted(self.val, key=lambda row: len(row[0]))
        size = self.config.batch_size
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [batch for group in groups for batch in self._batches(group, 0.0)]

    def val_prompts(self, n: int) -> list[list[int]]:
        """The first `n` validation conversations up to where their first reply begins."""
        return [ids[: int(mask.argmax())].tolist() for ids, mask in self.val[:n]]

    def _rows(self, lengths: list[int]) -> list[list[int]]:
        """Conversations of some lengths, as their indices, laid out in rows."""
        if not self.packed:
            return [[i] for i in range(len(lengths))]
        # Longest first into the first row that has room, which leaves little of it empty.
        rows, room = list[list[int]](), list[int]()
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            r = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
            if r == len(rows):
                rows.append([])
                room.append(self.block_size)
            rows[r].append(i)
            room[r] -= lengths[i]
        return rows

    def _batches(
        self, conversations: list[tuple[np.ndarray, np.ndarray]], prompt_weight: float
    ) -> list[Batch]:
        """Conversations as micro-batches, padded at the right; the weight of padding is 0."""
        rows = self._rows([len(ids) - 1 for ids, _ in conversations])
        size, batches = self.micro_batch_size, list[Batch]()
        for i in range(0, len(rows), size):
            part = rows[i : i + size]
            T = max(sum(len(conversations[c][0]) - 1 for c in row) for row in part)
            idx, targets = (
                np.full((len(part), T), self.tokenizer.end_of_text, np.int64) for _ in range(2)
            )
            weights = np.zeros((len(part), T), np.float32)
            documents = np.zeros((len(part), T), np.int64)  # 0 is padding
            for r, row in enumerate(part):
                at = 0
                for number, (ids, mask) in enumerate((conversations[c] for c in row), 1):
                    idx[r, at : at + len(ids)] = ids[: T - at]
                    place = slice(at, at := at + len(ids) - 1)
                    targets[r, place], documents[r, place] = ids[1:], number
                    weights[r, place] = np.where(mask[1:], 1.0, prompt_weight)
            batch = Batch(*map(torch.from_numpy, (idx, targets, weights, documents)))
            batches.append(batch if self.packed else batch._replace(documents=None))
        return batches

    def shares(self) -> str:
        """One line: what of the data is used, and how."""
        lengths = [len(ids) - 1 for ids, _ in self._train]
        supervised = sum(int(mask.sum()) for _, mask in self._train)
        computed = 0
        for chosen in self._order(0):
            own = [lengths[i] for i in chosen]
            filled = [sum(own[c] for c in row) for row in self._rows(own)]
            for i in range(0, len(filled), self.micro_batch_size):
                part = filled[i : i + self.micro_batch_size]
                computed += len(part) * max(part)
        return (
            f"{len(self._train):,} train + {len(self.val):,} val conversations; "
            f"{supervised / sum(lengths):.1%} of tokens supervised, "
            f"{1 - sum(lengths) / computed:.1%} of computed tokens padding, "
            f"{self.truncated} truncated, {self.dropped} dropped"
        )
