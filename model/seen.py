"""What goes into a forward pass (`Batch`), and who sees whom in it (`Seen`).

Shapes: B rows, T new tokens, S tokens to look at, H heads, D numbers a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class Batch(NamedTuple):
    """What `GPT.forward` takes.

    Attributes:
        idx, targets: token ids and those that follow, (B, T). The model never shifts them.
        weights: factor of each position's cross-entropy, (B, T); None for all ones.
        documents: a number per token, (B, T). Neighbours of one number are a document, to which
            attention and positions are confined. None: each row is one.
        kept: where the weights are not 0, as places in the flattened rows, (n,). Given, a GPU need
            not be waited for to find them.
        bounds: the `document_bounds`. Given, a GPU kernel skips other documents; else a mask does.
    """

    idx: Tensor
    targets: Tensor
    weights: Tensor | None = None
    documents: Tensor | None = None
    kept: Tensor | None = None
    bounds: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        """A batch of f of every tensor that is there."""
        return Batch(**{k: f(t) for k, t in self._asdict().items() if t is not None})


class Seen(NamedTuple):
    """Where some new tokens stand, and what each of them may look at.

    Attributes:
        positions: place of each token in its document, counted from 0, (T,) or (B, T).
        mask: true where a token may look, (B or 1, 1, T, S); None where `causal` says it all.
        causal: without a mask: a token looks at itself and at those before it. False: at all.
        bounds: in place of a mask, see `document_bounds`.
        cache: holds the tokens before the new ones, and takes these in.
        columns: the cache's columns that the new tokens go to, (T,).
        width: the new tokens look at the first `width` columns of the cache.
    """

    positions: Tensor
    mask: Tensor | None = None
    causal: bool = True
    bounds: Tensor | None = None
    cache: KVCache | None = None
    columns: Tensor | None = None
    width: int = 0

    def with_past(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all S tokens to look at, from those of the new ones (B, H, T, D)."""
        if self.cache is None or self.columns is None:
            return k, v
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.index_copy_(2, self.columns, k)
        values.index_copy_(2, self.columns, v)
        return keys[:, :, : self.width], values[:, :, : self.width]


def see_row(idx: Tensor) -> Seen:
    """In each row of idx (B, T) a token sees itself and those before it."""
    return Seen(torch.arange(idx.shape[1], device=idx.device))


def see_documents(documents: Tensor, bounds: Tensor | None = None) -> Seen:
    """Each document of a row is as if it stood alone; the arguments are those of `Batch`."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    positions = place - (place * first_tokens(documents)).cummax(dim=1).values
    if bounds is not None:
        return Seen(positions, bounds=bounds)
    same_document = documents[:, :, None] == documents[:, None, :]
    return Seen(positions, mask=same_document.tril().unsqueeze(1))


def first_tokens(documents: Tensor) -> Tensor:
    """True at the first token of each document, (B, T)."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return first


def document_bounds(documents: Tensor) -> Tensor:
    """Where documents (B, T) begin in the flattened rows, then B * T, int32 (n,).

    The end is repeated up to a multiple of 64, so that the shape is nearly always the same.
    """
    begins = first_tokens(documents).flatten().nonzero().squeeze(1)
    n = math.ceil((len(begins) + 1) / 64) * 64
    return F.pad(begins, (0, n - len(begins)), value=documents.numel()).to(torch.int32)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Causal attention within documents, (B, H, T, D); other documents cost nothing. GPU only."""
    from torch.nn.attention.varlen import varlen_attn  # a second to import, only for GPUs

    B, _, T, _ = q.shape
    q, k, v = (t.to(v.dtype).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    y = varlen_attn(q, k, v, bounds, bounds, T, T, window_size=(-1, 0))
    return cast(Tensor, y).view(B, T, *v.shape[1:]).transpose(1, 2)


class KVCache:
    """Keys and values of the tokens so far, in buffers of a fixed size that are written in place.

    All rows end at the same column. A shorter row begins in a later column; what lies before its
    first token is padding, which no token of its own sees.

    Args:
        shape: of each layer's buffers, (B, H, room, D); `room` tokens can be added.
        like: gives the buffers their type and device.
    """

    def __init__(self, n_layer: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.keys = [like.new_zeros(shape) for _ in range(n_layer)]
        self.values = [like.new_zeros(shape) for _ in range(n_layer)]
        self.room, self.device = shape[2], like.device
        self.used, self.is_ragged = 0, False  # columns that are filled; whether rows begin apart
        self.starts = torch.zeros(shape[0], dtype=torch.long, device=self.device)

    def restart(self, starts: list[int]) -> None:
        """Empties the cache; row b will have its first token in column starts[b]."""
        self.used, self.is_ragged = 0, any(starts)
        self.starts.copy_(torch.tensor(starts))  # in place: a CUDA graph reads it there

    def add(self, T: int) -> Seen:
        """Takes the next T columns for new tokens of every row; returns what these may look at."""
        first, self.used = self.used, self.used + T
        columns = torch.arange(first, self.used, device=self.device)
        if self.is_ragged or (first and T > 1):
            return self.see_at(columns, self.used)
        # One token sees every column; the first ones of all see each other causally.
        return Seen(columns, None, T > 1, None, self, columns, self.used)

    def see_at(self, columns: Tensor, width: int) -> Seen:
        """What new tokens in `columns` (T,) may look at, of the first `width` columns."""
        positions = (columns - self.starts[:, None]).clamp(min=0)
        past = torch.arange(width, device=self.device)
        visible = (past <= columns[:, None]) & (past >= self.starts[:, None, None])
        # Padding sees itself, because a softmax over nothing is not a number.
        mask = (visible | (past == columns[:, None])).unsqueeze(1)
        return Seen(positions, mask, False, None, self, columns, width)
