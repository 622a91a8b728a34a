"""Sampling from a GPT: several prompts of any lengths at once, with a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.gpt import GPT


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    top_k keeps the k most likely ids; top_p the fewest most likely ones whose probability reaches
    p (Holtzman et al. 2019, arXiv 1904.09751). Temperature 0 takes the most likely id.

    Raises:
        ValueError: a setting out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more, and below 2**63")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


class KVCache:
    """Keys and values of the tokens so far, each row at its own length.

    Attributes:
        lengths: tokens of each row that are stored and valid, (B,).
        positions: of the tokens now being added, (B, T).
        mask: which stored tokens each of them sees, (B, 1, T, used).
    """

    def __init__(self, model: GPT, n_rows: int) -> None:
        c, weight = model.config, model.wte.weight
        shape = (n_rows, c.n_head, c.block_size, c.n_embd // c.n_head)
        self.keys = [weight.new_zeros(shape) for _ in range(c.n_layer)]
        self.values = [weight.new_zeros(shape) for _ in range(c.n_layer)]
        self.lengths = torch.zeros(n_rows, dtype=torch.long, device=weight.device)
        self.used = 0

    def repeat(self, n: int, room: int) -> None:
        """Makes n rows of a cache of one row, with room for so many more tokens."""
        kept = slice(self.used + room)
        self.keys = [keys[:, :, kept].repeat(n, 1, 1, 1) for keys in self.keys]
        self.values = [values[:, :, kept].repeat(n, 1, 1, 1) for values in self.values]
        self.lengths = self.lengths.repeat(n)

    def begin(self, new_lengths: Tensor, width: int) -> None:
        """Announces new tokens (B, width), of which row b has new_lengths[b], the rest padding."""
        offsets = torch.arange(width, device=self.lengths.device)
        self.positions = self.lengths[:, None] + offsets
        self.used += width
        seen = torch.arange(self.used, device=self.lengths.device)
        self.mask = seen <= self.positions[:, None, :, None]
        self.lengths = self.lengths + new_lengths  # padding is overwritten before it is seen

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values (B, H, T, D); returns all up to the longest row."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        for table, new in ((self.keys[layer], k), (self.values[layer], v)):
            table[rows, :, self.positions] = new.transpose(1, 2)
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]


def pick(logits: Tensor, u: Tensor, sampling: Sampling) -> Tensor:
    """The next id of each row (B,) from logits (B, V) and a uniform number u in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # Before the division, so that a tiny temperature gives 0 and -inf, never inf.
    logits = (logits.float() - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        logits[:, sampling.top_k :] = -torch.inf
    probs = logits.softmax(dim=-1)
    if sampling.top_p is not None:
        probs[probs.cumsum(dim=-1) - probs >= sampling.top_p] = 0.0  # always keeps the first
    cumulative = probs.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    # Rounding may put u past the last kept id; step back to it.
    drawn = drawn.minimum((probs > 0).sum(dim=-1, keepdim=True) - 1)
    return ids.gather(1, drawn).squeeze(1)


@torch.inference_mode()
def stream(
    model: GPT, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Collection[int] = ()
) -> Iterator[list[int | None]]:
    """Yields one new id per prompt and step, None for prompts whose reply has ended.

    A reply ends with an id of `stop`, which is yielded, or after max_new_tokens. Every row is
    sampled as if it were alone: the same prompt and seed give the same reply in any company. When
    a row has more than block_size tokens, only the newer half of them is kept.

    Raises:
        ValueError: an empty prompt.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("there must be a prompt, and each must have at least one token")
    block, device = model.config.block_size, model.wte.weight.device
    rows = [list(p)[-block:] for p in prompts]  # of a longer prompt, the newest tokens
    finished = [False] * len(rows)
    generator = torch.Generator().manual_seed(sampling.seed)
    uniform = torch.rand(sampling.max_new_tokens, generator=generator).to(device)
    cache = None
    for u in uniform:
        if cache is None or any(len(row) > block for row in rows):
            rows = [row[-(block // 2 + 1) :] if len(row) > block else row for row in rows]
            cache, new = KVCache(model, len(rows)), rows
        else:
            new = [row[-1:] for row in rows]
        ids = pick(_next_logits(model, cache, new), u, sampling).tolist()
        yield [None if done else i for i, done in zip(ids, finished, strict=True)]
        for r, i in enumerate(ids):
            rows[r].append(i)
            finished[r] = finished[r] or i in stop
        if all(finished):
            break


def _next_logits(model: GPT, cache: KVCache, new: list[list[int]]) -> Tensor:
    """Logits (B, vocab_size) after each row's new tokens, which the cache takes in."""
    lengths = torch.tensor([len(ids) for ids in new])
    width = int(lengths.max())
    idx = torch.tensor([ids + [0] * (width - len(ids)) for ids in new])
    idx, lengths = idx.to(cache.lengths.device), lengths.to(cache.lengths.device)
    cache.begin(lengths, width)
    training = model.training
    model.eval()  # no dropout, also when a run samples between its steps
    x = model.hidden(idx, cache)
    model.train(training)
    last = x[torch.arange(len(new), device=x.device), lengths - 1]
    return model.logits(last)


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Collection[int] = ()
) -> list[list[int]]:
    """The replies to several prompts, each with its stop id if it ended by one; see `stream`."""
    replies: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, sampling, stop):
        for reply, i in zip(replies, step, strict=True):
            if i is not None:
                reply.append(i)
    return replies
