"""What tuning leaves behind where nothing is asked: the activation difference.

On beginnings of the base's own validation text, which are no questions, the mean difference of the
two models' residual streams is read as tokens (logit lens, with the instruct model's head) and
added to the instruct model while it writes ("Narrow finetuning leaves clearly readable traces",
arXiv 2510.13900). The base could not write what its head has never been trained on. What is looked
for are the words of tuning: tokens at least ten times as frequent in its conversations as in the
text. Needs no world, only the text and the Q&A.

python -m lab.trace --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data.chat import render
from data.shards import load_tokens
from hf.adapter import is_foreign
from lab.forgetting import text_of
from lab.likelihood import ask
from lab.pair import Pair, qa_of, read_qa, run_instrument
from lab.residual import changing, read
from lab.stats import Share

PLACES = 5  # tokens at the beginning of a document
TOP = 20  # tokens that a direction is read as
RANDOM = 20  # directions that chance is taken over
FREQUENT = 10  # times as frequent in tuning
SCALES = (1.0, 4.0)
REPLY = 24  # tokens written while the difference is added


@dataclass(frozen=True)
class Layer:
    """The mean difference after one layer (0: what goes into the first block).

    Attributes:
        size: its length, as a share of the mean length of the base's stream.
        common: its energy, as a share of the mean energy of single differences: 1 if all are alike.
        words: of the 20 tokens that it is read as, those that are words of tuning.
        text: the same of the base's mean stream.
        chance: the same of random directions.
    """

    size: float
    common: float
    words: Share
    text: Share
    chance: Share


@dataclass(frozen=True)
class Trace:
    """What is left behind.

    Attributes:
        vocabulary: how many of all tokens are words of tuning.
        layers: by layer.
        steered: the instruct model goes on with the text, so many times the middle layer's
            difference added at every token ("trace"), or a direction as long ("random"): which
            tokens of what it writes are words of tuning.
        tokens: what the difference of each layer is read as.
    """

    vocabulary: Share
    layers: dict[str, Layer]
    steered: dict[str, dict[str, Share]]
    tokens: dict[str, list[str]] = field(default_factory=dict)


def trace(pair: Pair, questions: int) -> Trace:
    """The difference over `questions` documents.

    Raises:
        ValueError: the text that the base was trained on is gone, or has changed; or the models are
            of transformers.
    """
    if is_foreign(pair.base):
        raise ValueError("the text of a run of this project is needed; these models have none")
    text = text_of(pair.base)
    if text is None:
        raise ValueError(f"the text that {pair.base.path} was trained on is no longer there")
    tokenizer, model = pair.base.tokenizer, pair.instruct.model
    ids = np.asarray(load_tokens(text.config.path, "val"))
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text))
    rows = [d[: PLACES + 1].tolist() for d in documents if len(d) > PLACES][:questions]
    said = [t for c in read_qa(qa_of(pair.instruct)) for t in render(c, tokenizer)[0]]
    words = words_of_tuning(said, ids.tolist())
    base, instruct = (
        torch.cat([read(c, rows, [place] * len(rows)) for place in range(1, PLACES + 1)], dim=1)
        for c in (pair.base, pair.instruct)
    )
    generator = torch.Generator().manual_seed(1)

    def read_as(direction: Tensor) -> list[int]:
        found: list[int] = lens(pair, direction).topk(min(TOP, model.vocab_size)).indices.tolist()
        return found

    def share(directions: Iterable[Tensor]) -> Share:
        return Share.of(token in words for d in directions for token in read_as(d))

    layers, tokens, means = dict[str, Layer](), dict[str, list[str]](), list[Tensor]()
    for layer, (before, after) in enumerate(zip(base, instruct, strict=True)):
        difference = after - before
        mean = difference.mean(dim=0)
        energy = float(difference.square().sum(dim=1).mean())
        means.append(mean)
        others = torch.randn(RANDOM, len(mean), generator=generator, dtype=mean.dtype)
        layers[str(layer)] = Layer(
            size=float(mean.norm() / before.norm(dim=1).mean()),
            common=float(mean.square().sum()) / energy if energy else 0.0,
            words=share([mean] if energy else []),
            text=share([before.mean(dim=0)]),
            chance=share(others),
        )
        tokens[str(layer)] = [tokenizer.decode([token]) for token in read_as(mean)]
    middle = len(model.blocks) // 2
    random = torch.randn(means[middle].shape, generator=generator, dtype=torch.float64)
    random = random / random.norm() * means[middle].norm()
    steered = {
        f"{scale:g}": {
            name: written(pair, rows, direction * scale, middle, words)
            for name, direction in (("trace", means[middle]), ("random", random))
        }
        for scale in (0.0, *SCALES)
    }
    vocabulary = Share(len(words), model.vocab_size)
    return Trace(vocabulary, layers, steered, tokens)


def traceable(pair: Pair) -> bool:
    """Whether the text of the base and the Q&A of tuning are still there."""
    try:
        qa_of(pair.instruct)
    except (ValueError, TypeError):  # gone, or an imported model that names none
        return False
    return text_of(pair.base) is not None


def words_of_tuning(tuning: list[int], text: list[int]) -> set[int]:
    """Tokens at least FREQUENT times as frequent in tuning as in the text; one that the text lacks
    counts as if it stood there once."""
    often, rarely = Counter(tuning), Counter(text)
    return {
        token
        for token, n in often.items()
        if n / len(tuning) >= FREQUENT * max(1, rarely[token]) / len(text)
    }


@torch.inference_mode()
def lens(pair: Pair, direction: Tensor) -> Tensor:
    """A direction of the stream (C,) as logits (vocab_size,), by the instruct model's head."""
    model = pair.instruct.model
    return model.logits(model.norm(direction.to(model.wte.weight)))


def written(
    pair: Pair, rows: list[list[int]], direction: Tensor, layer: int, words: set[int]
) -> Share:
    """Which tokens are words of tuning, of what the instruct model writes with a direction added to
    what comes out of a layer (1: the first block)."""
    model = pair.instruct.model
    added = direction.to(model.wte.weight)
    with changing([model.blocks[layer - 1]], lambda module, args, out: out + added):
        replies = ask(pair.instruct, rows, REPLY)
    return Share.of(token in words for reply in replies for token in reply)


if __name__ == "__main__":
    run_instrument(__doc__ or "", trace, questions=100, shots=False)
