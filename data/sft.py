"""Batches of conversations of similar length, in an order fixed by (seed, step)."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.chat import template_fingerprint
from data.fitting import computed_tokens, kept_length, pack, too_long
from data.pretrain import PretrainData
from data.shards import load_examples, open_prepared
from data.tokenizer import Tokenizer
from model.check import check_range
from model.seen import Batch
from runtime.files import at_home, fingerprint

POOL = 50  # batches per sorting pool: a larger one has less padding and less shuffling
Example = tuple[np.ndarray, np.ndarray]  # ids of a conversation, and which of them are supervised


@dataclass(frozen=True)
class SFTDataConfig:
    """Where the conversations are and how they are weighted. Raises ValueError if out of range."""

    path: str
    """Folder made by `python -m data.prepare qa`, `fetch` or `world`, or a Q&A file."""
    batch_size: int = 16
    """Conversations per optimizer step."""
    micro_batch_size: int | None = None
    """Rows per forward pass; None for the whole batch. Changes memory, not the result."""
    block_size: int | None = None
    """Most input tokens of a conversation; None for the base's block_size."""
    val_fraction: float = 0.1
    """Share of a file's conversations held back for validation (a folder has its own)."""
    examples: int | None = None
    """Train on only the first so many, in prepared order; None for all."""
    layout: Literal["auto", "padded", "packed"] = "auto"
    """How conversations are laid out: padded (one per row) or packed (several per row, none of
    which sees another). Changes speed, not the result. auto packs on one GPU that has bfloat16."""
    prompt_loss_weight: float = 0.0
    """Weight of unsupervised tokens (prompts), 0 to 1; supervised ones weigh 1."""
    replay: float = 0.0
    """Blocks of pretraining text in a step, as a share of its conversations and blocks, 0 to below
    1. All tokens of a block are supervised, so its share of the loss is larger."""
    replay_path: str | None = None
    """Prepared text to replay; None for what the base was trained on."""
    replay_people: Literal["all", "known"] = "all"
    """Of a world's text: biographies of everybody, or only of its known people."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", at_home(self.path))
        check_range("data.batch_size", self.batch_size, "1 or more")
        check_range("data.micro_batch_size", self.micro_batch_size, f"1 to {self.batch_size}")
        check_range("data.block_size", self.block_size, "2 or more")
        check_range("data.examples", self.examples, "1 or more")
        check_range("data.val_fraction", self.val_fraction, "above 0 and below 1")
        check_range("data.prompt_loss_weight", self.prompt_loss_weight, "0 to 1")
        check_range("data.replay", self.replay, "0 or more and below 1")


class SFTData:
    """Rendered conversations of a prepared folder. Every epoch visits each of them once.

    Args:
        block_size: the most input tokens of a conversation.
        replay: pretraining text to read beside the conversations, see `open_replay`.
        packed: several conversations share a row and do not see each other.
        verify: hash all files of the folder, not only those that look changed.

    Raises ValueError: the folder is unusable, belongs to another tokenizer or chat template, or no
    conversation fits into block_size.
    """

    def __init__(
        self,
        folder: Path,
        config: SFTDataConfig,
        tokenizer: Tokenizer,
        block_size: int,
        seed: int,
        replay: PretrainData | None = None,
        packed: bool = False,
        verify: bool = False,
    ) -> None:
        self.config, self.tokenizer, self.block_size = config, tokenizer, block_size
        self.seed, self.replay, self.packed = seed, replay, packed
        self.meta = open_prepared(folder, "qa", verify)
        self.fingerprint = fingerprint(self.meta["files"])
        theirs, ours = self.meta["tokenizer"], (tokenizer.fingerprint, tokenizer.n_vocab)
        if (theirs["fingerprint"], theirs["n_vocab"]) != ours:
            what = f"{folder} was prepared with another tokenizer than the base's"
            remedy = "`python -m data.prepare qa FILE --out DIR --tokenizer-of BASE`"
            raise ValueError(f"{what}; make it again with {remedy}")
        if self.meta["qa"]["template"] != template_fingerprint():
            raise ValueError(f"{folder} was prepared with another chat template; make it again")
        self._lengths = list[tuple[int, int]]()  # of each conversation, and what is kept of it
        self._train, self.val = (self._load(folder, part) for part in ("train", "val"))
        if not self._train or not self.val:
            what = f"no conversation of {folder} fits into {block_size} tokens"
            remedy = "raise data.block_size (the base's at most) or shorten them"
            raise ValueError(f"{what}; {remedy}:{too_long(self._lengths, block_size)}")
        self._train = self._train[: config.examples]
        self.steps_per_epoch = -(-len(self._train) // config.batch_size)
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _load(self, folder: Path, part: str) -> list[Example]:
        kept = list[Example]()
        for ids, mask in load_examples(folder, part):
            length = kept_length(mask, self.block_size)
            self._lengths.append((len(ids), length))
            if length:
                kept.append((ids[:length], mask[:length]))
        return kept

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, as indices of examples."""
        rng, size = np.random.default_rng([self.seed, epoch]), self.config.batch_size
        lengths = np.array([len(ids) for ids, _ in self._train])
        order, batches = rng.permutation(len(lengths)), []
        for pool in (order[i : i + size * POOL] for i in range(0, len(order), size * POOL)):
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches += [pool[j : j + size] for j in range(0, len(pool), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def micro_batches(self, step: int, rows: int) -> list[Batch]:
        """Conversations of optimizer step `step` (from 0), at most `rows` rows a micro-batch."""
        epoch, i = divmod(step, self.steps_per_epoch)
        conversations = [self._train[j] for j in self._order(epoch)[i]]
        return self._batches(conversations, self.config.prompt_loss_weight, rows)

    def replayed(self, step: int, rows: int) -> list[Batch]:
        """The text beside them, in micro-batches; none if none is replayed."""
        return self.replay.micro_batches(step, rows) if self.replay else []

    def val_batches(self, rows: int) -> list[Batch]:
        """All validation conversations; unsupervised tokens weigh 0."""
        ordered = sorted(self.val, key=lambda row: len(row[0]))
        size = self.config.batch_size
        groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        return [batch for group in groups for batch in self._batches(group, 0.0, rows)]

    def val_prompts(self, n: int) -> list[list[int]]:
        """The first `n` validation conversations up to where their first reply begins."""
        return [ids[: int(mask.argmax())].tolist() for ids, mask in self.val[:n]]

    def _batches(self, chosen: list[Example], prompt_weight: float, rows: int) -> list[Batch]:
        """Conversations as micro-batches of so many rows, padded at the right with weight 0."""
        layout = self._layout([len(ids) - 1 for ids, _ in chosen])
        made = [one_row([chosen[i] for i in row], prompt_weight) for row in layout]
        batches, end = [], self.tokenizer.end_of_text
        for i in range(0, len(made), rows):
            columns = zip(zip(*made[i : i + rows], strict=True), (end, end, 0, 0), strict=True)
            padded = (pad_sequence(list(c), batch_first=True, padding_value=v) for c, v in columns)
            batch = Batch(*padded)
            batches.append(batch if self.packed else batch._replace(documents=None))
        return batches

    def _layout(self, lengths: list[int]) -> list[list[int]]:
        """Which conversations share a row, as indices of their lengths."""
        return pack(lengths, self.block_size) if self.packed else [[i] for i in range(len(lengths))]

    def shares(self, rows: int) -> str:
        """A line of statistics about the data, and one of what is too long, if anything is."""
        lengths, computed = np.array([len(ids) - 1 for ids, _ in self._train]), 0
        for chosen in self._order(0):
            own = lengths[chosen].tolist()
            computed += computed_tokens(own, self._layout(own), rows)
        supervised = sum(int(mask.sum()) for _, mask in self._train) / lengths.sum()
        return (
            f"{len(lengths):,} train + {len(self.val):,} val conversations; "
            f"{supervised:.1%} of tokens supervised, "
            f"{1 - lengths.sum() / computed:.1%} of computed tokens padding"
            f"{too_long(self._lengths, self.block_size)}"
        )


def one_row(chosen: list[Example], prompt_weight: float) -> list[Tensor]:
    """Inputs, targets, weights and document numbers (from 1) of conversations end to end, (n,)."""
    parts = (
        ([ids[:-1] for ids, _ in chosen], np.int64),
        ([ids[1:] for ids, _ in chosen], np.int64),
        ([np.where(mask[1:], 1.0, prompt_weight) for _, mask in chosen], np.float32),
        ([np.full(len(ids) - 1, number) for number, (ids, _) in enumerate(chosen, 1)], np.int64),
    )
    return [torch.from_numpy(np.concatenate(part).astype(kind)) for part, kind in parts]
