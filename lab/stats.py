"""Proportions and means that know their n and their 95 % interval, and how several runs pool."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Z = 1.96  # the two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Share:
    """`hits` of `n`; `runs` are the shares of the runs that were pooled."""

    hits: int
    n: int
    runs: tuple[float | None, ...] = ()

    @staticmethod
    def of(flags: Iterable[bool]) -> Share:
        """The share of flags that are true."""
        flags = [bool(flag) for flag in flags]
        return Share(sum(flags), len(flags))

    @property
    def value(self) -> float | None:
        """The share; None of nothing."""
        return self.hits / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by the score method (Wilson 1927, JASA 22, p. 209); (0, 1) of nothing."""
        if not self.n:
            return 0.0, 1.0
        p, z2 = self.hits / self.n, Z * Z / self.n
        middle = (p + z2 / 2) / (1 + z2)
        half = math.sqrt(z2 * p * (1 - p) + z2 * z2 / 4) / (1 + z2)
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Mean:
    """The mean of `n` numbers and their standard deviation; `runs` as in Share."""

    mean: float
    sd: float
    n: int
    runs: tuple[float | None, ...] = ()

    @staticmethod
    def of(values: Iterable[float]) -> Mean:
        """The mean of some numbers."""
        values = list(values)
        if not values:
            return Mean(0.0, 0.0, 0)
        mean = math.fsum(values) / len(values)
        square = math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
        return Mean(mean, math.sqrt(square), len(values))

    @property
    def value(self) -> float | None:
        """The mean; None of nothing."""
        return self.mean if self.n else None

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """95 %, by the normal approximation; none of fewer than two numbers."""
        if self.n < 2:
            return None, None
        half = Z * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def pool(results: Sequence[T]) -> T:
    """One result of several runs: shares and means over all their n, numbers averaged."""
    first: Any = results[0]
    every: Any = results
    if len(results) == 1:
        return results[0]
    if isinstance(first, Share):
        pooled: Any = Share(
            sum(r.hits for r in every), sum(r.n for r in every), tuple(r.value for r in every)
        )
    elif isinstance(first, Mean):
        n = sum(r.n for r in every)
        mean = math.fsum(r.mean * r.n for r in every) / n if n else 0.0
        square = math.fsum((r.n - 1) * r.sd**2 + r.n * (r.mean - mean) ** 2 for r in every if r.n)
        sd = math.sqrt(square / max(1, n - 1))
        pooled = Mean(mean, sd, n, tuple(r.value for r in every))
    elif is_dataclass(first) and not isinstance(first, type):
        names = [f.name for f in fields(first)]
        pooled = type(first)(**{name: pool([getattr(r, name) for r in every]) for name in names})
    elif isinstance(first, dict):
        # What only some runs have (a role that never occurred) is pooled over those.
        keys = dict.fromkeys(key for r in every for key in r)
        pooled = {key: pool([r[key] for r in every if key in r]) for key in keys}
    elif isinstance(first, float):
        pooled = math.fsum(every) / len(every)
    else:
        pooled = first  # words and examples: the first run speaks for all
    return pooled


def to_json(result: Any) -> Any:
    """A result as JSON-ready values; a share or mean brings its interval."""
    if isinstance(result, Share | Mean):
        kind = "share" if isinstance(result, Share) else "mean"
        low, high = result.interval
        value = {kind: result.value, "n": result.n, "low": low, "high": high}
        return value | ({"runs": list(result.runs)} if result.runs else {})
    if is_dataclass(result) and not isinstance(result, type):
        return {f.name: to_json(getattr(result, f.name)) for f in fields(result)}
    if isinstance(result, dict):
        return {str(key): to_json(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [to_json(value) for value in result]
    return result


def lines(value: Any, name: str = "") -> list[str]:
    """A JSON-ready result as text, a figure a line; lists, which are for plots, are left out."""
    if isinstance(value, dict) and ("share" in value or "mean" in value):
        figure = value.get("share", value.get("mean"))
        if figure is None:
            return [f"{name:<44} -"]
        runs = "".join(f" {v:.3g}" for v in value.get("runs", []) if v is not None)
        low, high = value["low"], value["high"]
        interval = "" if low is None else f"  [{low:.3f}, {high:.3f}]"
        return [
            f"{name:<44} {figure:>8.3f}{interval}  n={value['n']}"
            + (f"  runs:{runs}" if runs else "")
        ]
    if isinstance(value, dict):
        dot = f"{name}." if name else ""
        return [line for key, part in value.items() for line in lines(part, f"{dot}{key}")]
    if isinstance(value, list):
        return []
    return [f"{name:<44} {value:>8.3f}" if isinstance(value, float) else f"{name:<44} {value}"]
