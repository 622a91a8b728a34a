"""Form against fact: is each kind of fact answered in each form that is asked for?

Where tuning asked for some kinds of fact as bare values only (`bare_only` of `lab.qa`), a sentence
about them shows that following an instruction carries over from one kind of fact to another.

python -m lab.forms --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data.world import ATTRIBUTES, FORMS, World
from lab.knowledge import ask_all
from lab.pair import Pair, of_both, run_instrument
from lab.questions import Grade, draw, openings
from lab.stats import Share
from training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Formed:
    """Replies about held-out people.

    Attributes:
        right: the first sentence names the true value and no other of its kind, stop or not.
        in_form: the reply has the form that was asked for, right or wrong.
        answers: right, in the form, and stopped.
    """

    right: Share
    in_form: Share
    answers: Share

    @classmethod
    def of(cls, grades: Sequence[Grade]) -> Formed:
        """Of some replies."""
        return cls(
            right=Share.of(g.right for g in grades),
            in_form=Share.of(g.in_form for g in grades),
            answers=Share.of(g.answered for g in grades),
        )


def forms(pair: Pair, questions: int) -> dict[str, dict[str, dict[str, Formed]]]:
    """By model, form asked for and kind of fact; `questions` a form.

    Raises:
        ValueError: there is no world to ask about.
    """
    return of_both(pair, formed, questions)


def formed(checkpoint: Checkpoint, world: World, n: int) -> dict[str, dict[str, Formed]]:
    """One model's replies."""
    found: dict[str, dict[str, Formed]] = {}
    for form in FORMS:
        rng = random.Random(f"forms {world.config.seed}")  # the same facts in each form
        asked = openings(draw(world, "held_out", n, rng), rng, (form,))
        graded = ask_all(checkpoint, world, asked)
        found[form] = {}
        for attribute in ATTRIBUTES:
            grades = [g for q, g in graded if q.turn.attribute is attribute]
            found[form][attribute.name] = Formed.of(grades)
    return found


if __name__ == "__main__":
    run_instrument(__doc__ or "", forms, questions=300)
