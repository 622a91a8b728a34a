"""What goes into a forward pass (`Batch`), and which tokens attend to which in it (`Seen`).

Shapes: B rows, T new tokens, S tokens to look at, H heads, D their dimension.
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
        idx, targets: token ids and those that follow, (B, T); shifted already.
        weights: factor of each position's cross-entropy, (B, T); None for all ones.
        documents: the number of the document that each token is in, (B, T). Tokens attend, and
            count positions, only within their document. None: each row is one document.
        kept: where the weights are not 0, as indices into the flattened rows, (n,). `to_device`
            fills this in on the CPU: finding them later would wait for the GPU.
        bounds: the `document_bounds`, by `to_device` too: a GPU kernel then skips other documents.
    """

    idx: Tensor
    targets: Tensor
    weights: Tensor | None = None
    documents: Tensor | None = None
    kept: Tensor | None = None
    bounds: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        """Applies f to every tensor that is not None."""
        return Batch(**{k: f(t) for k, t in self._asdict().items() if t is not None})


class Seen(NamedTuple):
    """Where some new tokens stand, and what each of them may look at.

    Attributes:
        positions: place of each token in its document, counted from 0, (T,) or (B, T).
        mask: true where a token may look, (B or 1, 1, T, S); None: `causal` decides.
        causal: without a mask: True for causal attention, False for attention to all S tokens.
        bounds: in place of a mask, see `document_bounds`.
        cache: keys and values of earlier tokens; those of the new ones are added to it.
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

    def update_cache(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new keys and values (B, H, T, D) to a cache; returns those of all S tokens."""
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
    """Attention and positions within each document only; arguments as in `Batch`."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    positions = place - (place * first_tokens(documents)).cummax(dim=1).values
    if bounds is not None:
        return Seen(positions, bounds=bounds)
    same_document = documents[:, :, None] == documents[:, None, :]
    return Seen(positions, same_document.tril().unsqueeze(1), causal=False)


def first_tokens(documents: Tensor) -> Tensor:
    """True at the first token of each document, (B, T)."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return first


def document_bounds(documents: Tensor) -> Tensor:
    """Where documents (B, T) begin in the flattened rows (cu_seqlens of attention kernels), int32.

    Padded with the end, B * T, to a multiple of 64, so that the shape rarely changes.
    """
    begins = first_tokens(documents).flatten().nonzero().squeeze(1)
    n = math.ceil((len(begins) + 1) / 64) * 64
    return F.pad(begins, (0, n - len(begins)), value=documents.numel()).to(torch.int32)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Causal attention within documents, (B, H, T, D); other documents cost nothing. GPU only."""
    from torch.nn.attention.varlen import varlen_attn  # takes a second to import

    B, _, T, _ = q.shape
    q, k, v = (t.to(v.dtype).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    y = varlen_attn(q, k, v, bounds, bounds, T, T, window_size=(-1, 0))
    return cast(Tensor, y).view(B, T, *v.shape[1:]).transpose(1, 2)


class KVCache:
    """Keys and values of the tokens so far, in buffers of a fixed size that are written in place.

    All rows end at the same column. A shorter row begins in a later column; what lies before its
    first token is padding, to which its own tokens never attend.

    Args:
        shape: of each layer's buffers, (B, H, room, D); `room` is its capacity in tokens.
        like: gives the buffers their type and device.
    """

    def __init__(self, n_layer: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.keys, self.values = (
            [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(n_layer)]
            for _ in range(2)
        )
        self.room, self.device = shape[2], like.device
        self.used, self.is_ragged = 0, False  # columns filled; whether rows have different starts
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
        # One new token attends to all columns. Several attend causally: they begin the cache.
        return Seen(columns, None, T > 1, None, self, columns, self.used)

    def see_at(self, columns: Tensor, width: int) -> Seen:
        """What new tokens in `columns` (T,) may look at, of the first `width` columns."""
        positions = (columns - self.starts[:, None]).clamp(min=0)
        past = torch.arange(width, device=self.device)
        visible = (past <= columns[:, None]) & (past >= self.starts[:, None, None])
        # Padding attends to itself: a softmax over no tokens gives NaN.
        mask = (visible | (past == columns[:, None])).unsqueeze(1)
        return Seen(positions, mask, False, None, self, columns, width)
