"""How a model behaves when it is asked: does it answer, stop, repeat itself, keep the context?

Response ranking is that of Hewitt et al. 2024 (arXiv 2409.14254): without any generation, is the
right reply to a question more likely than the reply to another question?

python -m lab.behaviour --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from data.chat import CONTEXTS, Message
from data.world import ATTRIBUTES, World, exchange
from lab.knowledge import answer, complete, draw
from lab.likelihood import ask, log_likelihoods
from lab.pair import Pair, run_instrument
from lab.stats import Mean, Share
from training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Behaviour:
    """What a model's greedy replies to a set of conversations are like.

    Attributes:
        stops: ends with the end-of-turn token within four times the longest true reply.
        p_end: probability of that token where the true reply ends.
        brief: stops, asks nothing, and is at most twice as long as the true reply, right or wrong.
        tokens: length of the reply, up to the limit.
        distinct: for n = 1, 2, 3 the share of n-grams that are different ones, of as many first
            tokens of a reply as the true one has.
        echoes: the reply repeats the question word for word.
        asks_on: it goes on with a question of its own.
        ranking: the true reply is more likely than that of another conversation; chance is half.
        follow_up: world only: a second question that does not name the person, right answers
            "with" the turns before it and "without" them.
    """

    stops: Share
    p_end: Mean
    brief: Share
    tokens: Mean
    distinct: dict[str, Mean]
    echoes: Share
    asks_on: Share
    ranking: Share
    follow_up: dict[str, Share]


def behaviour(pair: Pair, questions: int) -> dict[str, Behaviour]:
    """Base and instruct in the chat template, and the base asked in plain text."""
    chosen, limit = pair.conversations[:questions], pair.limit
    return {
        "base": behave(pair.base, chosen, "chat", limit, pair.world),
        "base_plain": behave(pair.base, chosen, "plain", limit, pair.world),
        "instruct": behave(pair.instruct, chosen, "chat", limit, pair.world),
    }


def behave(
    checkpoint: Checkpoint,
    conversations: list[list[Message]],
    context: str,
    limit: int,
    world: World | None,
) -> Behaviour:
    """One model's behaviour in one context of `CONTEXTS`."""
    tokenizer, end = checkpoint.tokenizer, checkpoint.tokenizer.end_of_turn
    prompts = [CONTEXTS[context](c[:-1], tokenizer) for c in conversations]
    true = [[*tokenizer.encode(c[-1]["content"]), end] for c in conversations]
    replies = ask(checkpoint, prompts, limit)
    texts = [tokenizer.decode([i for i in ids if i != end]) for ids in replies]
    asks = ["?" in text or "Question:" in text for text in texts]
    stops = [ids[-1] == end for ids in replies]
    starts = [ids[: len(expected)] for ids, expected in zip(replies, true, strict=True)]
    questions = [c[-2]["content"] for c in conversations]
    others = [*true[1:], true[0]]
    own, other = (log_likelihoods(checkpoint, prompts, part) for part in (true, others))
    return Behaviour(
        stops=Share.of(stops),
        p_end=Mean.of(math.exp(tokens[-1]) for tokens in own),
        brief=Share.of(
            stop and not asked and len(ids) <= 2 * len(expected)
            for stop, asked, ids, expected in zip(stops, asks, replies, true, strict=True)
        ),
        tokens=Mean.of(map(len, replies)),
        distinct={str(n): distinct(starts, n) for n in (1, 2, 3)},
        echoes=Share.of(q.lower() in t.lower() for q, t in zip(questions, texts, strict=True)),
        asks_on=Share.of(asks),
        # Where the two replies are the same text there is nothing to rank.
        ranking=Share.of(
            sum(a[:-1]) > sum(b[:-1])
            for a, b, mine, another in zip(own, other, true, others, strict=True)
            if mine != another
        ),
        follow_up={} if world is None else follow_up(checkpoint, world, context, len(prompts)),
    )


def distinct(replies: list[list[int]], n: int) -> Mean:
    """Over replies of at least n tokens: different n-grams as a share of all (Li et al. 2016)."""
    grams = [[tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] for ids in replies]
    return Mean.of(len(set(g)) / len(g) for g in grams if g)


def follow_up(checkpoint: Checkpoint, world: World, context: str, n: int) -> dict[str, Share]:
    """Second questions about held-out people, after the first one answered rightly, and alone."""
    rng = random.Random(f"follow-ups {world.config.seed}")
    facts = draw(world, "held_out", n, rng)
    alone, after = [], []
    for person, attribute in facts:
        first = rng.choice([a for a in ATTRIBUTES if a is not attribute])
        opening = exchange(person, first, rng.choice(first.questions))
        alone.append(exchange(person, attribute, rng.choice(attribute.follow_ups))[:1])
        after.append(opening + alone[-1])
    prompt = CONTEXTS[context]
    return {
        "with": answer(checkpoint, world, facts, after, prompt).right["all"],
        "without": answer(checkpoint, world, facts, alone, prompt).right["all"],
    }


@dataclass(frozen=True)
class Point:
    """What a model does, in three figures: enough to follow it through training or mixing.

    Attributes:
        stops: replies that end by themselves.
        answers: right answers about held-out people; of nothing where there is no world.
        cloze: completed biographies of held-out people; of nothing where there is no world.
    """

    stops: Share
    answers: Share
    cloze: Share


def probe(pair: Pair, checkpoint: Checkpoint, n: int) -> Point:
    """Asks a model n questions, and to complete n biographies, always the same ones."""
    if pair.world is None:
        tokenizer = checkpoint.tokenizer
        prompts = [CONTEXTS["chat"](c[:-1], tokenizer) for c in pair.conversations[:n]]
        replies = ask(checkpoint, prompts, pair.limit)
        nothing = Share(0, 0)
        return Point(Share.of(r[-1] == tokenizer.end_of_turn for r in replies), nothing, nothing)
    rng = random.Random(f"probe {pair.world.config.seed}")
    facts = draw(pair.world, "held_out", n, rng)
    questions = [exchange(p, a, rng.choice(a.questions))[:1] for p, a in facts]
    answers = answer(checkpoint, pair.world, facts, questions)
    cloze = complete(checkpoint, pair.world, facts, rng)
    return Point(answers.stops, answers.right["all"], cloze["all"])


if __name__ == "__main__":
    run_instrument(__doc__ or "", behaviour, questions=100)
