"""Proportions, means and paired differences with their 95 % intervals, and how several runs pool.

Of one run an interval is over questions. Of several it is over the runs: Student's t over their
means, since the questions of one run share its seed. A share's is never narrower than that of one
run with all the questions: three runs that agree by chance prove nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Z = 1.96  # the two-sided 95 % quantile of the normal distribution
# The same of Student's t, by degrees of freedom from 1; above the last of them Z is 4 % too small
# at most.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def student(n: int) -> float:
    """The quantile for the mean of n numbers, n being 2 or more."""
    return STUDENT[n - 2] if n - 2 < len(STUDENT) else Z


def over_runs(runs: Sequence[float | None]) -> float | None:
    """Half the width of the interval of the mean of several runs; None of fewer than two."""
    known = [v for v in runs if v is not None]
    if len(known) < 2:
        return None
    mean = math.fsum(known) / len(known)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1))
    return student(len(known)) * sd / math.sqrt(len(known))


@dataclass(frozen=True)
class Share:
    """`hits` of `n`.

    Attributes:
        runs: the shares of the runs that were pooled.
        flags: of one run, what each question was about, as "person/kind", and whether it was a
            hit, for `difference`.
    """

    hits: int
    n: int
    runs: tuple[float | None, ...] = ()
    flags: tuple[tuple[str, bool], ...] = ()

    @staticmethod
    def of(flags: Iterable[bool], topics: Sequence[str] = ()) -> Share:
        """The share of flags that are true; `topics` says what each was about."""
        flags = [bool(flag) for flag in flags]
        return Share(sum(flags), len(flags), (), tuple(zip(topics, flags, strict=bool(topics))))

    @property
    def value(self) -> float | None:
        """The share; None of nothing."""
        return self.hits / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by the score method (Wilson 1927, JASA 22, p. 209); of several runs the wider of
        that and of `over_runs`; (0, 1) of nothing."""
        if not self.n:
            return 0.0, 1.0
        p, z2 = self.hits / self.n, Z * Z / self.n
        middle = (p + z2 / 2) / (1 + z2)
        half = math.sqrt(z2 * p * (1 - p) + z2 * z2 / 4) / (1 + z2)
        across = over_runs(self.runs) or 0.0
        return max(0.0, min(middle - half, p - across)), min(1.0, max(middle + half, p + across))


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
        """95 %: of several runs see `over_runs`, of one by the normal approximation; none of fewer
        than two numbers."""
        half = over_runs(self.runs)
        if half is None:
            if self.n < 2:
                return None, None
            half = Z * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Tally:
    """How often each of several things came of `n`; what never came is not there."""

    counts: dict[str, int]
    n: int


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        value: of shares from -1 to 1; None of nothing.
        low, high: 95 %.
        n: questions that were asked on both sides.
        clusters: people they were about; questions about one person are not independent.
        runs: the differences of the runs that were pooled.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int
    runs: tuple[float | None, ...] = ()


def difference(a: Share, b: Share) -> Difference:
    """a - b on the same questions, clustered by the person that they are about.

    Raises:
        ValueError: the two are not about the same questions.
    """
    if [topic for topic, _ in a.flags] != [topic for topic, _ in b.flags]:
        raise ValueError("a paired difference is of the same questions in the same order")
    both = zip(a.flags, b.flags, strict=True)
    differences = [(topic.partition("/")[0], left - right) for (topic, left), (_, right) in both]
    return clustered(differences)


def paired(a: dict[str, float], b: dict[str, float]) -> Difference:
    """a - b of the scores of the same items, by item.

    Raises:
        ValueError: they are of other items.
    """
    if a.keys() != b.keys():
        raise ValueError("a paired difference is of the same items")
    return clustered([(item, a[item] - b[item]) for item in a])


def clustered(differences: Sequence[tuple[str, float]]) -> Difference:
    """The mean of some differences, each with the name of its cluster.

    The variance is that of the clusters' sums (Liang & Zeger 1986), times C / (C - 1).
    """
    n = len(differences)
    if not n:
        return Difference(None, None, None, 0, 0)
    mean, sums = math.fsum(d for _, d in differences) / n, dict[str, float]()
    for cluster, value in differences:
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    clusters = len(sums)
    if clusters < 2:
        return Difference(mean, None, None, n, clusters)
    square = math.fsum(s * s for s in sums.values()) * clusters / (clusters - 1)
    half = student(clusters) * math.sqrt(square) / n
    return Difference(mean, mean - half, mean + half, n, clusters)


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
    elif isinstance(first, Difference):
        values = tuple(r.value for r in every)
        known = [v for v in values if v is not None]
        value = math.fsum(known) / len(known) if known else None
        half, low, high = over_runs(values), None, None
        if value is not None and half is not None:
            low, high = value - half, value + half
        n, clusters = (sum(getattr(r, name) for r in every) for name in ("n", "clusters"))
        pooled = Difference(value, low, high, n, clusters, values)
    elif isinstance(first, Tally):
        things = dict.fromkeys(thing for r in every for thing in r.counts)
        counts = {thing: sum(r.counts.get(thing, 0) for r in every) for thing in things}
        pooled = Tally(counts, sum(r.n for r in every))
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
    if isinstance(result, Tally):
        often = sorted(result.counts.items(), key=lambda item: -item[1])
        return {"n": result.n, "shares": {thing: count / result.n for thing, count in often}}
    if isinstance(result, Difference):
        value = {"difference": result.value, "n": result.n, "clusters": result.clusters}
        value |= {"low": result.low, "high": result.high}
        return value | ({"runs": list(result.runs)} if result.runs else {})
    if is_dataclass(result) and not isinstance(result, type):
        return {f.name: to_json(getattr(result, f.name)) for f in fields(result)}
    if isinstance(result, dict):
        return {str(key): to_json(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [to_json(value) for value in result]
    return result


def kind_of(value: Any) -> str:
    """What a JSON-ready figure is: "share", "mean" or "difference"; "" of anything else."""
    kinds = (k for k in ("share", "mean", "difference") if isinstance(value, dict) and k in value)
    return next(kinds, "")


def lines(value: Any, name: str = "") -> list[str]:
    """A JSON-ready result as text, a figure a line; lists, which are for plots, are left out."""
    kind = kind_of(value)
    if kind:
        figure = value[kind]
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
