"""Unsaid tokens: what becomes of a name with a token that no reply of tuning holds?

Each step of tuning pushes down the logits of all tokens but the next one of a reply. The head's row
of a token that is never the next one is pushed nowhere else, unless text that holds it is replayed,
and who copies such a name has to overcome that. So rows of the tokens in people's names are given
back, as the base has them: of those that are unsaid, or of the others. "Unsaid" is by the world's
own Q&A, all of it: by less of it (`data.examples`, a sweep's `[qa]`) more tokens are. The rows of a
tied head are also what the prompt is read with.

python -m lab.rows --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import random

import torch

from data.chat import render
from data.tokenizer import Tokenizer
from data.world import World
from lab.forms import Formed
from lab.knowledge import ask_all
from lab.pair import Pair, needs_world, run_instrument
from lab.questions import Grade, draw, openings
from lab.weights import graft, mixed, states


def rows(pair: Pair, questions: int) -> dict[str, dict[str, Formed]]:
    """Sentences that are asked for about held-out people, by which rows are given back ("none",
    "unsaid", "said"), and by whether the person's name holds an "unsaid" token or is all "said".

    Raises:
        ValueError: there is no world to ask about.
    """
    world, tokenizer = needs_world(pair), pair.instruct.tokenizer
    said = said_tokens(world, tokenizer)
    names = {i for person in world.people for i in tokenizer.encode(f" {person.name}")}
    given_back = {"none": set[int](), "unsaid": names - said, "said": names & said}
    rng = random.Random(f"rows {world.config.seed}")
    asked = openings(draw(world, "held_out", questions, rng), rng, ("sentence",))
    base, instruct = states(pair)
    head = "lm_head.weight" if "lm_head.weight" in base else "wte.weight"  # a tied one
    found = dict[str, dict[str, Formed]]()
    for rows_of, ids in given_back.items():
        chosen = torch.zeros(len(base[head]), dtype=torch.bool, device=base[head].device)
        chosen[sorted(ids)] = True
        model = mixed(pair.instruct, graft(instruct, base, {head: chosen}))
        groups: dict[str, list[Grade]] = {"unsaid": [], "said": []}
        for question, grade in ask_all(model, world, asked):
            name = tokenizer.encode(f" {question.turn.person.name}")
            groups["said" if said.issuperset(name) else "unsaid"].append(grade)
        found[rows_of] = {group: Formed.of(grades) for group, grades in groups.items()}
    return found


def said_tokens(world: World, tokenizer: Tokenizer) -> set[int]:
    """The ids that stand in a reply of a world's own Q&A, but for control tokens."""
    said = set[int]()
    for messages in world.conversations():
        ids, mask = render(messages, tokenizer)
        said |= {i for i, is_reply in zip(ids, mask, strict=True) if is_reply}
    return said - {tokenizer.end_of_turn}


if __name__ == "__main__":
    run_instrument(__doc__ or "", rows, questions=300, shots=False)
