"""Other Q&A about a world than its own: about fewer people, about strangers, in other forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from data.chat import Message
from data.world import ATTRIBUTES, FORMS, Person, World
from model.check import check_range

ORDERS = ("given", "best", "least")  # of the known people: the world's, or by how much was read


def asked_about(world: World, asked: float = 1.0, who: str = "given", **_: object) -> list[Person]:
    """A share of the known people, the first of them in one of ORDERS."""
    known = world.by_split["known"]
    if who != "given":
        known = sorted(known, key=lambda p: world.exposures[p.name], reverse=who == "best")
    return known[: round(asked * len(known))]


def conversations(
    world: World,
    asked: float = 1.0,
    who: str = "given",
    strangers: float = 0.0,
    dont_know: bool = False,
    forms: Sequence[str] = FORMS,
    bare_only: Sequence[str] = (),
) -> Iterator[list[Message]]:
    """A world's conversations, but about other people or in other forms.

    Args:
        asked: share of the known people who are asked about.
        who: which of them, in one of ORDERS.
        strangers: as many people as this share of the known ones are asked about besides, of
            whom pretraining said nothing; they are not the unseen (Gekhman et al. 2024).
        dont_know: whether questions about strangers are answered with DONT_KNOW.
        forms: forms of reply that are asked for, of FORMS.
        bare_only: kinds of fact that are asked for as bare values only.

    Raises:
        ValueError: a share that is not 0 to 1, nobody left to ask about, an unknown word.
    """
    check_range("asked", asked, "0 to 1")
    check_range("strangers", strangers, "0 to 1")
    kinds = [a.name for a in ATTRIBUTES]
    for name, given, known in (
        ("who", [who], ORDERS),
        ("forms", forms, FORMS),
        ("bare_only", bare_only, kinds),
    ):
        if not set(given) <= set(known) or (name == "forms" and not forms):
            raise ValueError(f"{name} are {given}; they must be some of {', '.join(known)}")
    others = strangers_to(world, round(strangers * len(world.by_split["known"])))
    if dont_know:
        others = [replace(p, facts={}) for p in others]
    people = [*asked_about(world, asked, who), *others]
    if not people:
        raise ValueError("asked and strangers leave nobody to ask about")
    yield from world.conversations(people, forms, bare_only)


def strangers_taught(
    world: World, strangers: float = 0.0, dont_know: bool = False, **_: object
) -> list[Person]:
    """The strangers whose facts are in the Q&A; none if they are answered with DONT_KNOW."""
    return strangers_to(world, round(0 if dont_know else strangers * len(world.by_split["known"])))


def strangers_to(world: World, n: int) -> list[Person]:
    """n people beside those of a world."""
    config = replace(world.config, seed=world.config.seed + 1_000_000, unseen=0, fewest=None)
    taken = {p.name for p in world.people}
    others = (p for p in World(config).people if p.name not in taken)
    return [replace(p, split="stranger") for p in islice(others, n)]
