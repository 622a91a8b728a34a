"""The chat template. Nothing else in the project knows what a conversation looks like in tokens.

    <|endoftext|> <|user|> question <|end|> <|assistant|> answer <|end|> <|user|> ...

Control tokens are inserted by id and the text between them is encoded as plain text, so no
message can forge a turn. A reply is supervised together with the <|end|> that closes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from data.tokenizer import Tokenizer, create_tokenizer
from runtime.files import fingerprint

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation; `role` is one of ROLES."""

    role: str
    content: str


# How a conversation is put to a model: the token ids after which its reply is sampled.
Prompt = Callable[[list[Message], Tokenizer], list[int]]


def render(messages: list[Message], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and a mask of the same length: 1 where training supervises.

    Supervised are the tokens of each assistant message and its closing end-of-turn token.
    """
    ids, mask = [tokenizer.end_of_text], [0]
    for message in messages:
        content = tokenizer.encode(message["content"])
        supervised = int(message["role"] == "assistant")
        ids += [tokenizer.control(f"<|{message['role']}|>"), *content, tokenizer.end_of_turn]
        mask += [0] + [supervised] * (len(content) + 1)
    return ids, mask


def render_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids after which the assistant's next reply is sampled."""
    return [*render(messages, tokenizer)[0], tokenizer.control("<|assistant|>")]


def parse(ids: list[int], tokenizer: Tokenizer) -> list[Message]:
    """The messages of a rendered conversation: what `render` was given."""
    roles = {tokenizer.control(f"<|{role}|>"): role for role in ROLES}
    messages, start = [], 0
    for i, token in enumerate(ids):
        if token in roles:
            start = i
        elif token == tokenizer.end_of_turn:
            content = tokenizer.decode(ids[start + 1 : i])
            messages.append(Message(role=roles[ids[start]], content=content))
    return messages


def template_fingerprint() -> str:
    """A digest of what `render` does, stored with prepared data and with checkpoints."""
    sample = [Message(role=role, content=role[::-1]) for role in ROLES]
    return fingerprint(render(sample, create_tokenizer("byte", [])))
