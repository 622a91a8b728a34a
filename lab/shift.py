"""Which tokens of the instruct model's replies would the base have written too?

The token distribution shift of Lin et al. 2023 (URIAL, arXiv 2312.01552): along the instruct
model's greedy replies, the rank that the base gives each token in the same context. Rank 1 is
"unshifted", 2 and 3 "marginal", more "shifted"; KL is KL(instruct || base) in nats. It measures
agreement along the instruct model's path only, and a few tokens can matter most.

python -m lab.shift --base out/quickstart/base --instruct out/quickstart/instruct
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.chat import Message, Prompt
from data.tokenizer import Tokenizer
from data.world import ATTRIBUTES, BARE
from hf.adapter import chat_prompt
from lab.likelihood import ask, predictions
from lab.pair import Pair, run_instrument
from lab.stats import Mean, Share

CLASSES = ("unshifted", "marginal", "shifted")
ROWS = 8  # replies compared at once: two models' whole distributions
POSITIONS = 16  # tokens of a reply that are looked at one by one
STRIPS = 12  # replies that are kept token by token, to be drawn


@dataclass(frozen=True)
class Token:
    """One token of a reply: its text, the base's rank of it, KL, and its role."""

    text: str
    rank: int
    kl: float
    role: str


@dataclass(frozen=True)
class Agreement:
    """How far the base agrees on a set of tokens; the shares of CLASSES add up to 1."""

    classes: dict[str, Share]
    kl: Mean


@dataclass(frozen=True)
class Shift:
    """The shift along the instruct model's replies, the base reading one context.

    Attributes:
        every: over all tokens.
        words: over all but the end of turn, which a base that never saw it cannot write.
        roles: by what the token is for: "fact" (the value), "style" (the name, repeated in a full
            sentence), "template" (the fixed words around them), "stop" (end of turn), and "other"
            (of a reply that has not the world's form; every word, where there is no world).
        facts: the fact tokens alone, by form: of "bare" values, which the text holds word for
            word, and in a "sentence", which it never does.
        positions: by place in the reply, "1" being its first token.
        kl: the mean KL of each class.
        strips: some replies, each with its question, token by token.
    """

    every: Agreement
    words: Agreement
    roles: dict[str, Agreement]
    facts: dict[str, Agreement]
    positions: dict[str, Agreement]
    kl: dict[str, Mean]
    strips: list[tuple[str, list[Token]]] = field(default_factory=list)


def shift(pair: Pair, questions: int) -> dict[str, Shift]:
    """The shift for the base in each of `pair.contexts`; the instruct model is in the template.

    Of a world also "alone": the base reads no question, only the reply itself, which in a sentence
    about somebody is a context that it knows.
    """
    conversations = pair.conversations[:questions]
    tokenizer = pair.instruct.tokenizer
    prompts = [chat_prompt(c[:-1], tokenizer) for c in conversations]
    replies = ask(pair.instruct, prompts, pair.limit)
    contexts = pair.contexts | ({"alone": no_prompt} if pair.world else {})
    return {
        context: measure(pair, conversations, replies, put) for context, put in contexts.items()
    }


def no_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """The beginning of a document, and nothing of the conversation."""
    return [tokenizer.end_of_text]


def measure(
    pair: Pair, conversations: list[list[Message]], replies: list[list[int]], put: Prompt
) -> Shift:
    """Compares both models along given replies, the base reading them by `put`."""
    tokenizer = pair.instruct.tokenizer
    marked = [chat_prompt(c[:-1], tokenizer) for c in conversations]
    theirs = [put(c[:-1], tokenizer) for c in conversations]
    found: list[list[Token]] = []
    for i in range(0, len(replies), ROWS):
        rows = slice(i, i + ROWS)
        mine = predictions(pair.instruct, marked[rows], replies[rows])
        its = predictions(pair.base, theirs[rows], replies[rows])
        for reply, p, q in zip(replies[rows], mine, its, strict=True):
            kl = (p.exp() * (p - q)).sum(dim=1)
            texts = [tokenizer.decode([token]) for token in reply]
            roles = roles_of(reply, tokenizer) if pair.world else plain_roles(reply, tokenizer)
            parts = zip(texts, ranks_of(reply, q), kl.tolist(), roles, strict=True)
            found.append([Token(*part) for part in parts])
    every = [token for reply in found for token in reply]
    roles_found = dict.fromkeys(token.role for token in every)
    longest = min(POSITIONS, max(map(len, found)))
    return Shift(
        every=agreement(every),
        words=agreement(t for t in every if t.role != "stop"),
        roles={role: agreement(t for t in every if t.role == role) for role in roles_found},
        facts={
            form: agreement(t for reply in replies for t in reply if t.role == "fact")
            for form, replies in by_form(found).items()
        },
        positions={
            str(n + 1): agreement(reply[n] for reply in found if len(reply) > n)
            for n in range(longest)
        },
        kl={c: Mean.of(t.kl for t in every if class_of(t.rank) == c) for c in CLASSES},
        strips=[
            (c[-2]["content"], reply)
            for c, reply in zip(conversations[:STRIPS], found, strict=False)
        ],
    )


def by_form(replies: list[list[Token]]) -> dict[str, list[list[Token]]]:
    """Replies that hold a fact: bare values, and sentences, which name the person."""
    found: dict[str, list[list[Token]]] = {"bare": [], "sentence": []}
    for reply in replies:
        roles = {token.role for token in reply}
        if "fact" in roles:
            found["sentence" if "style" in roles else "bare"].append(reply)
    return found


def ranks_of(reply: list[int], logprobs: Tensor) -> list[int]:
    """The rank of each token of a reply among (len(reply), vocab_size) that it might have been."""
    own = logprobs.gather(1, torch.tensor(reply, device=logprobs.device)[:, None])
    ranks: list[int] = (1 + (logprobs > own).sum(dim=1)).tolist()
    return ranks


def class_of(rank: int) -> str:
    """One of CLASSES."""
    return CLASSES[(rank > 1) + (rank > 3)]


def agreement(tokens: Iterable[Token]) -> Agreement:
    """Classes and mean KL of some tokens."""
    tokens = list(tokens)
    classes = {c: Share.of(class_of(t.rank) == c for t in tokens) for c in CLASSES}
    return Agreement(classes, Mean.of(t.kl for t in tokens))


def plain_roles(reply: list[int], tokenizer: Tokenizer) -> list[str]:
    """Roles where nothing is known of the text: the end of turn, and everything else."""
    return ["stop" if token == tokenizer.end_of_turn else "other" for token in reply]


def roles_of(reply: list[int], tokenizer: Tokenizer) -> list[str]:
    """The role of each token of a reply that is put like one of the world's; else plain roles.

    A bare value is all fact. A token belongs to the part of the sentence in which it ends.
    """
    roles = plain_roles(reply, tokenizer)
    words = [token for token, role in zip(reply, roles, strict=True) if role != "stop"]
    text = tokenizer.decode(words)
    for attribute in ATTRIBUTES:
        values = "|".join(map(re.escape, attribute.values))
        for wording in (BARE, *attribute.replies):
            pattern = re.escape(wording).replace(r"\{V\}", f"(?P<fact>{values})")
            pattern = pattern.replace(r"\{name\}", r"(?P<style>\w+ \w+)")
            if match := re.fullmatch(pattern, text):
                spans = {role: match.span(role) for role in match.re.groupindex}
                for i in range(len(words)):
                    last = len(tokenizer.decode(words[: i + 1])) - 1
                    inside = [r for r, (start, stop) in spans.items() if start <= last < stop]
                    roles[i] = inside[0] if inside else "template"
                return roles
    return roles


if __name__ == "__main__":
    run_instrument(__doc__ or "", shift, questions=100)
