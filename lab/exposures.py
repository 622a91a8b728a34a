"""Salience: what is known and answered of people who were read about often, or hardly at all.

In a world with `fewest`, people have between that many biographies and `bios`, by Zipf's law
(Ghosal et al. 2024, arXiv 2406.14785: tuning on lesser-known facts costs 5 to 10 % of the answers).
All held-out people are asked about, by how often they were read about.

python -m lab.exposures --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data.world import World
from lab.knowledge import ask_all, complete, summarize
from lab.pair import Pair, of_both, run_instrument
from lab.questions import Fact, facts_of, openings
from lab.stats import Share
from training.checkpoint import Checkpoint

BOUNDS = (1, 2, 4, 8, 16)  # the fewest biographies of a group


@dataclass(frozen=True)
class Known:
    """Held-out people of one group.

    Attributes:
        cloze: a sentence of the text is completed with the right value.
        right: a bare value is asked for; the first sentence names the true one, stop or not.
        answers: right, bare, and stopped.
        by_chance: names another fact of the person, which nobody asked for.
    """

    cloze: Share
    right: Share
    answers: Share
    by_chance: Share


def exposures(pair: Pair, questions: int) -> dict[str, dict[str, Known]]:
    """By model, and by number of biographies; at most `questions` facts a group.

    Raises:
        ValueError: there is no world to ask about.
    """
    return of_both(pair, by_exposure, questions)


def by_exposure(checkpoint: Checkpoint, world: World, n: int) -> dict[str, Known]:
    """One model's replies, group by group."""
    found = dict[str, Known]()
    for low, high in zip(BOUNDS, (*BOUNDS[1:], None), strict=True):
        rng = random.Random(f"exposures {world.config.seed} {low}")
        facts = [f for f in facts_of(world, "held_out") if group_of(world, f) == low]
        if facts:
            chosen = rng.sample(facts, min(n, len(facts)))
            name = f"{low} or more" if high is None else f"{low} to {high - 1}"
            found[name if high != low + 1 else str(low)] = known(checkpoint, world, chosen, rng)
    return found


def group_of(world: World, fact: Fact) -> int:
    """The bound of the group that a fact's person is in."""
    return max(bound for bound in BOUNDS if bound <= world.exposures[fact[0].name])


def known(checkpoint: Checkpoint, world: World, facts: Sequence[Fact], rng: random.Random) -> Known:
    """What a model completes and answers of some facts."""
    cloze = complete(checkpoint, world, list(facts), rng)["all"]
    answers = summarize(ask_all(checkpoint, world, openings(facts, rng)))
    return Known(cloze, answers.right["all"], answers.answered["all"], answers.by_chance)


if __name__ == "__main__":
    run_instrument(__doc__ or "", exposures, questions=200)
