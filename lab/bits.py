"""Behaviour in bits: how small may the change be that instruction tuning made to the weights?

The change of every matrix is cut down in one of three ways and put into the base, and the model is
asked again: by rank (the largest singular directions), by magnitude (the largest entries), by
quantisation (BitDelta, Liu et al. 2024, arXiv 2402.10193: signs and one scale a row; or more
levels). Vectors stay whole, and so do the rows of the template's tokens, which the base has never
trained: they are few. What counts is what must be stored: a number is 16 bits, the place of a kept
entry log2 of the number of ways to choose them all.

python -m lab.bits --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lab.behaviour import Point, measure_point
from lab.pair import Pair, run_instrument
from lab.weights import TABLES, State, mixed, states, template_rows

RANKS = (1, 2, 4, 8, 16, 32)
KEPT = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)  # shares of the entries
LEVELS = (1, 2, 3, 4)  # bits an entry
NUMBER = 16  # bits of a number that is stored
KEEPS = 0.9  # of the answers


@dataclass(frozen=True)
class Cut:
    """One change that was cut down: its size, and what the model with it does."""

    kilobytes: float
    point: Point


@dataclass(frozen=True)
class Bits:
    """What is left of a change.

    Attributes:
        whole: all of it, at 16 bits a number.
        rank, magnitude, quantised: by rank, share of entries kept, and bits an entry.
        smallest: of each way, kilobytes of the smallest cut with 90 % of the answers of the whole
            (of stops where there is no world); the whole change where no cut has them.
    """

    whole: Cut
    rank: dict[str, Cut]
    magnitude: dict[str, Cut]
    quantised: dict[str, Cut]
    smallest: dict[str, float]


Cutter = Callable[[Tensor], tuple[Tensor, float]]  # a change (m, n) cut down, and its bits


def bits(pair: Pair, questions: int) -> Bits:
    """All cuts; `questions` per point."""
    base, instruct = states(pair)

    template = template_rows(pair)

    def cut(cutter: Cutter) -> Cut:
        state, size = State(), 0.0
        for name, start in base.items():
            change = instruct[name] - start
            kept, n = cutter(change) if change.dim() == 2 else whole(change)
            if name in TABLES:
                rest, n = cutter(change[~template])
                kept = change.clone()  # whole
                kept[~template] = rest
                n += whole(change[template])[1]
            state[name], size = start + kept, size + n
        point = measure_point(pair, mixed(pair.instruct, state), questions)
        return Cut(size / 8 / 1024, point)

    everything = cut(whole)
    ways = {
        "rank": {f"{r}": cut(partial(low_rank, rank=r)) for r in RANKS},
        "magnitude": {f"{p:g}": cut(partial(largest, share=p)) for p in KEPT},
        "quantised": {f"{b}": cut(partial(quantised, bits_each=b)) for b in LEVELS},
    }
    smallest = {
        way: min(
            (c.kilobytes for c in cuts.values() if kept_share(c, everything) >= KEEPS),
            default=everything.kilobytes,
        )
        for way, cuts in ways.items()
    }
    return Bits(everything, **ways, smallest=smallest)


def kept_share(cut: Cut, everything: Cut) -> float:
    """How much of the answers of the whole change a cut has; of the stops, without a world."""
    key = "answers" if everything.point.answers.n else "stops"
    own, whole = (getattr(c.point, key).value for c in (cut, everything))
    return own / whole if whole else 1.0


def whole(change: Tensor) -> tuple[Tensor, float]:
    """All of a change."""
    return change, float(NUMBER * change.numel())


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, float]:
    """The nearest matrix of a rank (Eckart & Young 1936), stored as two factors."""
    rank = min(rank, *change.shape)
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    kept = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return kept, float(NUMBER * rank * sum(change.shape))


def largest(change: Tensor, share: float) -> tuple[Tensor, float]:
    """The largest entries of a change, by magnitude; all others are 0."""
    n, k = change.numel(), max(1, round(share * change.numel()))
    places = change.abs().flatten().topk(k).indices
    kept = torch.zeros_like(change).flatten()
    kept[places] = change.flatten()[places]
    ways = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    return kept.view_as(change), NUMBER * k + ways


def quantised(change: Tensor, bits_each: int) -> tuple[Tensor, float]:
    """Every entry at one of 2^bits levels, evenly spaced around 0, and a scale for each row.

    Of one bit: the sign times the row's mean magnitude. Of more: the outermost levels are the
    row's largest magnitude.
    """
    n = 2**bits_each
    if n == 2:
        kept = change.sign() * change.abs().mean(dim=1, keepdim=True)
    else:
        scale = change.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) * 2 / (n - 1)
        kept = ((change / scale - 0.5).round().clamp(-n / 2, n / 2 - 1) + 0.5) * scale
        kept = torch.where(change.abs().amax(dim=1, keepdim=True) > 0, kept, 0.0)
    return kept, float(bits_each * change.numel() + NUMBER * len(change))


if __name__ == "__main__":
    run_instrument(__doc__ or "", bits, questions=100, shots=False)
