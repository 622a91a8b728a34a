"""Where the weights moved, and where the behaviour lives.

Each matrix is looked at by itself; then the change is put into the base in part: all of it, scaled
(interpolation), or only that of one layer or one kind of module (grafting). The behaviour of each
mixture is measured again.

python -m lab.weights --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lab.behaviour import Point, measure_point
from lab.pair import Pair, run_instrument
from training.checkpoint import Checkpoint

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
ENERGY = 0.9  # of a change: the sum of its squared singular values
TOP = 8  # singular directions that are compared
TABLES = ("wte.weight", "lm_head.weight")  # a row a token


@dataclass(frozen=True)
class Change:
    """How one matrix W became W + D.

    Attributes:
        relative: ||D|| / ||W||, Frobenius norms; 0 where W is all zeros, as it may begin.
        stable_rank: ||D||^2 / s1^2, s1 being the largest singular value of D.
        energy_rank: singular directions of D that hold 90 % of its energy.
        full_rank: the most that could be.
        overlap: how far the top 8 directions of D lie among the top 8 of W, from 0 to 1:
            ||U_W' U_D||^2 / 8, the mean of the left and the right side.
        chance: the overlap that random directions would have.
    """

    relative: float
    stable_rank: float
    energy_rank: float
    full_rank: float
    overlap: float
    chance: float


@dataclass(frozen=True)
class Weights:
    """The change and its parts.

    Attributes:
        matrices: by name.
        rows: relative change of rows of the embedding and of the head: those of the chat
            template's tokens, and all others.
        interpolation: base + scale * change, by scale.
        grafts: by group of parameters: "only" that group's change, and all "without" it. The
            rows of the template's tokens, in embedding and head, are a group of their own: the
            base has never trained them, and next to nothing stops without them.
    """

    matrices: dict[str, Change]
    rows: dict[str, dict[str, float]]
    interpolation: dict[str, Point]
    grafts: dict[str, dict[str, Point]]


State = dict[str, Tensor]


def weights(pair: Pair, questions: int) -> Weights:
    """All of it; `questions` per point."""
    base, instruct = states(pair)

    def point(state: State) -> Point:
        return measure_point(pair, mixed(pair.instruct, state), questions)

    matrices = [name for name in base if base[name].dim() == 2]
    tables = [name for name in matrices if name in TABLES]
    groups = groups_of(base, template_rows(pair))
    return Weights(
        matrices={name: change(base[name], instruct[name]) for name in matrices},
        rows={name: rows(pair, base[name], instruct[name]) for name in tables},
        interpolation={
            f"{a:g}": point({n: interpolate(base[n], instruct[n], a) for n in base}) for a in SCALES
        },
        grafts={
            group: {
                "only": point(graft(base, instruct, part)),
                "without": point(graft(instruct, base, part)),
            }
            for group, part in groups.items()
        },
    )


def states(pair: Pair) -> tuple[State, State]:
    """The parameters of the base and of the instruct model, by name; a tied head counts as wte."""
    base, instruct = (
        {name: p.detach() for name, p in c.model.named_parameters()}
        for c in (pair.base, pair.instruct)
    )
    return base, instruct


def interpolate(base: Tensor, instruct: Tensor, scale: float) -> Tensor:
    """base + scale * (instruct - base), bit for bit the base at 0 and the instruct model at 1."""
    return torch.lerp(base, instruct, scale)


Part = dict[str, Tensor | None]  # parameters, and which of their rows; None for all


def graft(into: State, source: State, part: Part) -> State:
    """`into` with one part of it from `source`."""
    mixed = dict(into)
    for name, rows in part.items():
        whole = source[name]
        mixed[name] = whole if rows is None else torch.where(rows[:, None], whole, into[name])
    return mixed


def template_rows(pair: Pair) -> Tensor:
    """Which rows of the embedding and of the head belong to the template's tokens, (rows,)."""
    tokenizer = pair.base.tokenizer
    table = dict(pair.base.model.named_parameters())["wte.weight"]
    found = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    found[tokenizer.template_ids] = True
    return found


def groups_of(parameters: State, template: Tensor) -> dict[str, Part]:
    """Parameters by layer and by kind of module, and the template's rows apart from both tables.

    Where the head is the embedding (tied weights), one group is both.
    """
    tied = "lm_head.weight" not in parameters
    kinds: dict[str, Callable[[str], bool]] = {
        "attention": lambda n: ".attn." in n,
        "MLP": lambda n: ".mlp." in n,
        "embeddings = head (tied)" if tied else "embeddings": lambda n: n.startswith(
            ("wte.", "wpe.")
        ),
        "head": lambda n: n.startswith("lm_head."),
        "norms": lambda n: "norm" in n,
    }
    layers = dict.fromkeys(n.split(".")[1] for n in parameters if n.startswith("blocks."))
    named = {f"layer {i}": [n for n in parameters if n.startswith(f"blocks.{i}.")] for i in layers}
    named |= {kind: [n for n in parameters if belongs(n)] for kind, belongs in kinds.items()}
    tables = [n for n in TABLES if n in parameters]
    groups: dict[str, Part] = {
        group: {n: ~template if n in tables else None for n in names}
        for group, names in named.items()
        if names
    }
    return groups | {"template rows": dict.fromkeys(tables, template)}


def change(base: Tensor, instruct: Tensor) -> Change:
    """The change of one matrix; all zeros if there is none."""
    base, delta = base.cpu().double(), (instruct.cpu() - base.cpu()).double()
    full = float(min(delta.shape))
    if not delta.any():
        return Change(0.0, 0.0, 0.0, full, 0.0, 0.0)
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    energy = S.square().cumsum(0) / S.square().sum()
    U_base, _, Vh_base = torch.linalg.svd(base, full_matrices=False)
    k = min(TOP, min(delta.shape))
    left = (U_base[:, :k].T @ U[:, :k]).square().sum() / k
    right = (Vh_base[:k] @ Vh[:k].T).square().sum() / k
    return Change(
        relative=float(delta.norm() / base.norm()) if base.any() else 0.0,
        stable_rank=float(S.square().sum() / S[0].square()),
        energy_rank=float((energy < ENERGY).sum() + 1),
        full_rank=full,
        overlap=float(left + right) / 2,
        chance=sum(k / size for size in delta.shape) / 2,
    )


def rows(pair: Pair, base: Tensor, instruct: Tensor) -> dict[str, float]:
    """||D|| / ||W|| over the rows of the template's tokens, and over all other rows."""
    n = pair.base.tokenizer.n_vocab  # not the padding
    base, instruct, template = base[:n], instruct[:n], template_rows(pair)[:n]
    delta = instruct - base
    return {
        name: math.sqrt(float(delta[chosen].square().sum() / base[chosen].square().sum()))
        for name, chosen in (("template tokens", template), ("all others", ~template))
    }


def mixed(instruct: Checkpoint, state: State) -> Checkpoint:
    """A checkpoint in memory with other weights."""
    model = copy.deepcopy(instruct.model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state[name])
    return replace(instruct, model=model)


if __name__ == "__main__":
    run_instrument(__doc__ or "", weights, questions=100, shots=False)
