"""Names whole and cut: is somebody whose name is in more tokens than words treated as others are?

A vocabulary is made of a text, so it has more of the names in it whole than of any others: how a
name is cut tells whether it was read, before anything is known of the person.

python -m lab.names --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from data.tokenizer import Tokenizer
from data.world import SPLITS, World
from lab.knowledge import ask_all
from lab.pair import Pair, of_both, run_instrument
from lab.questions import draw, openings
from lab.stats import Share
from training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Asked:
    """Replies to questions for the bare value, about people whose names are cut alike.

    Attributes:
        answers: right, bare, and stopped.
        abstains: says that it does not know.
    """

    answers: Share
    abstains: Share


def names(pair: Pair, questions: int) -> dict[str, dict[str, dict[str, Asked]]]:
    """By model, split, and whether a name is "whole" or "cut"; `questions` a split.

    Raises:
        ValueError: there is no world to ask about.
    """
    return of_both(replace(pair, examples=[]), by_cut, questions)


def by_cut(checkpoint: Checkpoint, world: World, n: int) -> dict[str, dict[str, Asked]]:
    """One model's replies."""
    found: dict[str, dict[str, Asked]] = {}
    for split in SPLITS:
        rng = random.Random(f"names {world.config.seed} {split}")
        graded = ask_all(checkpoint, world, openings(draw(world, split, n, rng), rng))
        for group, cut in (("whole", False), ("cut", True)):
            grades = [
                g for q, g in graded if is_cut(q.turn.person.name, checkpoint.tokenizer) == cut
            ]
            found.setdefault(split, {})[group] = Asked(
                Share.of(g.answered for g in grades), Share.of(g.abstains for g in grades)
            )
    return found


def is_cut(name: str, tokenizer: Tokenizer) -> bool:
    """Whether a name has more tokens than words, inside of a sentence."""
    return len(tokenizer.encode(f" {name}")) > len(name.split())


if __name__ == "__main__":
    run_instrument(__doc__ or "", names, questions=200, shots=False)
