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
    """Keys and values of the tokens so far, in buffers of a fixed size that are written in place.

    All rows end at the same column. A shorter row begins later: what lies before its first token
    is padding, which no token of its own sees.

    Args:
        model: whose keys and values.
        n_rows: sequences at once.
        room: columns; no more tokens than that can be added.

    Attributes:
        used: columns that are filled.
        positions: of the tokens now being added, a slice or (B, T).
        mask: which columns each of them sees, (B or 1, 1, T, columns). None where all are added at
            once, causally, and where a single one sees every column.
    """

    positions: slice | Tensor
    mask: Tensor | None

    def __init__(self, model: GPT, n_rows: int, room: int) -> None:
        c, weight = model.config, model.wte.weight
        shape = (n_rows, c.n_head, room, c.n_embd // c.n_head)
        self.keys = [weight.new_zeros(shape) for _ in range(c.n_layer)]
        self.values = [weight.new_zeros(shape) for _ in range(c.n_layer)]
        self.room, self.used, self.device = room, 0, weight.device
        self.starts = torch.zeros(n_rows, dtype=torch.long, device=self.device)
        self.ragged = False

    def restart(self, starts: list[int]) -> None:
        """Empties the cache; row b will have its first token in column starts[b]."""
        self.used, self.ragged = 0, any(starts)
        self.starts.copy_(torch.tensor(starts))  # in place: a CUDA graph reads it there

    def repeat(self, n: int) -> None:
        """Makes n rows of a cache of one row."""
        self.keys = [keys.repeat(n, 1, 1, 1) for keys in self.keys]
        self.values = [values.repeat(n, 1, 1, 1) for values in self.values]
        self.starts = self.starts.repeat(n)

    def begin(self, T: int) -> None:
        """Announces T new tokens of every row."""
        first, self.used = self.used, self.used + T
        columns = torch.arange(first, self.used, device=self.device)
        if self.ragged or (first and T > 1):
            self.begin_at(columns, self.used)
        else:
            self.columns, self.seen = columns, self.used
            self.positions, self.mask = slice(first, self.used), None

    def begin_at(self, columns: Tensor, seen: int) -> None:
        """Announces new tokens in `columns` (T,), which see some of the first `seen` columns."""
        self.columns, self.seen = columns, seen
        self.positions = (columns - self.starts[:, None]).clamp(min=0)
        past = torch.arange(seen, device=self.device)
        visible = (past <= columns[:, None]) & (past >= self.starts[:, None, None])
        # Padding sees itself, because a softmax over nothing is not a number.
        self.mask = (visible | (past == columns[:, None])).unsqueeze(1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values (B, H, T, D); returns those of all columns to look at."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.columns, k)
        values.index_copy_(2, self.columns, v)
        return keys[:, :, : self.seen], values[:, :, : self.seen]


class StaticStep:
    """The logits of one more token a row, computed in buffers of a fixed place and size.

    Everything that changes from step to step is in those buffers, so on CUDA the step is captured
    once as a graph and replayed: one launch, not several hundred. Elsewhere it runs as it is.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.ids = torch.zeros_like(cache.starts)
        self.column = torch.full((1,), cache.used, device=cache.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if cache.device.type == "cuda":
            with torch.cuda.device(cache.device):
                self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # warm up; the column that this writes is written again
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()

    def _run(self) -> None:
        self.cache.begin_at(self.column, self.cache.room)
        self.logits = _last_logits(self.model, self.ids[:, None], self.cache)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (B, vocab_size) after one more id a row (B,); overwritten by the next call."""
        self.ids.copy_(ids)
        self.column.fill_(self.cache.used)
        self.cache.used += 1
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        return self.logits


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
        beyond = probs.cumsum(dim=-1) - probs >= sampling.top_p
        beyond[:, 0] = False  # the first stays, however small p is
        probs[beyond] = 0.0
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
    room = min(block, max(map(len, rows)) + sampling.max_new_tokens)
    cache = KVCache(model, len(rows), room)
    ids, static_step = torch.empty(0), None
    for u in uniform:
        longest = max(map(len, rows))
        if not cache.used or longest > block:
            rows = [row[-(block // 2 + 1) :] if len(row) > block else row for row in rows]
            width = max(map(len, rows))
            idx = torch.tensor([[0] * (width - len(row)) + row for row in rows]).to(device)
            cache.restart([width - len(row) for row in rows])
            cache.begin(width)
            logits = _last_logits(model, idx, cache)
        elif device.type == "cuda":
            static_step = static_step or StaticStep(model, cache)
            logits = static_step(ids)
        else:
            cache.begin(1)
            logits = _last_logits(model, ids[:, None], cache)
        ids = pick(logits, u, sampling)
        new = ids.tolist()
        yield [None if done else i for i, done in zip(new, finished, strict=True)]
        for r, i in enumerate(new):
            rows[r].append(i)
            finished[r] = finished[r] or i in stop
        if all(finished):
            break


def _last_logits(model: GPT, idx: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, vocab_size) after the last of some new tokens (B, T), announced to the cache."""
    training = model.training
    if training:
        model.eval()  # no dropout, also when a run samples between its steps
    x = model.hidden(idx, cache)
    if training:
        model.train()
    return model.logits(x[:, -1])


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
