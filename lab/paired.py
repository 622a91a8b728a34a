"""Did tuning help or hurt, on the same items of a task?

The tasks of lm-evaluation-harness are asked of a base, as plain text, and of the instruct model, in
its chat template with --chat; with --shots also of the base after answered questions (URIAL, Lin et
al. 2023, arXiv 2312.01552). Scores are compared item by item. A control asks each item with another
item's question: what a model still scores does not depend on the question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lab.stats import Difference, Mean, Share, paired

Scores = dict[str, float]  # by item


@dataclass(frozen=True)
class Compared:
    """One metric of one task.

    Attributes:
        scores: the mean over items, by column; of right and wrong ones a share.
        swapped: the same where each item had another item's question.
        differences: "instruct - base" and the like, and what each column loses with swapped
            questions ("instruct - swapped"), item by item.
        gained, lost: items on which the instruct model scores more than the base, or less.
    """

    scores: dict[str, Share | Mean]
    swapped: dict[str, Share | Mean]
    differences: dict[str, Difference]
    gained: list[str]
    lost: list[str]


def compared(asked: dict[str, Scores], swapped: dict[str, Scores]) -> Compared:
    """The scores of some columns, "base" and "instruct" among them, and of their controls."""
    instruct, base = asked["instruct"], asked["base"]
    pairs = {f"instruct - {name}": (instruct, asked[name]) for name in asked if name != "instruct"}
    pairs |= {f"{name} - swapped": (asked[name], scores) for name, scores in swapped.items()}
    every = (score for s in (*asked.values(), *swapped.values()) for score in s.values())
    binary = set(every) <= {0.0, 1.0}
    return Compared(
        scores={name: over_items(s, binary) for name, s in asked.items()},
        swapped={name: over_items(s, binary) for name, s in swapped.items()},
        differences={name: paired(a, b) for name, (a, b) in pairs.items()},
        gained=[item for item in base if instruct[item] > base[item]],
        lost=[item for item in base if instruct[item] < base[item]],
    )


def over_items(scores: Scores, binary: bool) -> Share | Mean:
    """The mean; where each item is right or wrong, the share, whose interval has a width even if
    all are right."""
    if binary:
        return Share.of(score == 1.0 for score in scores.values())
    return Mean.of(scores.values())


def scores_of(found: dict[str, Any]) -> dict[str, Scores]:
    """The score of each item by task and metric, such as "arc_easy acc": of metrics that are the
    mean over items, as accuracy is and perplexity is not.

    Args:
        found: what the harness returns of a run, its samples logged.
    """
    every: dict[tuple[str, str], Scores] = {}
    for task, rows in found["samples"].items():
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            for metric in row["metrics"]:
                score = as_score(row[metric])
                key = f"{metric},{row['filter']}"
                every.setdefault((task, key), {})[str(row["doc_id"])] = score
    return {
        f"{task} {key.removesuffix(',none')}": scores
        for (task, key), scores in every.items()
        if math.isclose(
            math.fsum(scores.values()) / len(scores),
            found["results"][task].get(key, math.nan),
            abs_tol=1e-9,
        )
    }


def as_score(value: Any) -> float:
    """A metric's value of one item as a number, of several their mean; NaN of anything else."""
    if isinstance(value, list):
        return math.fsum(map(as_score, value)) / len(value) if value else math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
