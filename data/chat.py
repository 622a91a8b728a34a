"""The chat format: how a conversation becomes tokens (chat.jinja repeats it, for the export).

The chat template, in which the instruct model is trained and prompted:

    <|endoftext|> <|user|> question <|end|> <|assistant|> answer <|end|> <|user|> ...

Control tokens are inserted by id and the text between them is encoded as plain text, so no
message can forge a turn. A reply is supervised together with the <|end|> that closes it. Three
formats without its tokens, for a base that has never seen them, are below.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from data.tokenizer import Tokenizer, create_tokenizer
from runtime.files import fingerprint

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation; `role` is one of ROLES."""

    role: str
    content: str


# A prompt format: a function to the token ids after which a reply is sampled.
Prompt = Callable[[list[Message], Tokenizer], list[int]]


def render(messages: list[Message], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and a mask of the same length: 1 where training supervises, that
    is the tokens of each assistant message and the end-of-turn token that closes it.
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


def plain_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """The conversation as questions and answers in plain text."""
    names = {"user": "Question", "assistant": "Answer", "system": "Note"}
    text = [f"{names[m['role']]}:\n{m['content']}\n" for m in messages]
    return [tokenizer.end_of_text, *tokenizer.encode("".join(text) + "Answer:\n")]


def documents_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """Each message as a document of its own; the reply is the next document."""
    ids = [tokenizer.end_of_text]
    for message in messages:
        ids += [*tokenizer.encode(message["content"]), tokenizer.end_of_text]
    return ids


def raw_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """The messages as one running text: a space before each of the user's, replies as they are."""
    parts = [m["content"] if m["role"] == "assistant" else f" {m['content']}" for m in messages]
    return [tokenizer.end_of_text, *tokenizer.encode("".join(parts).removeprefix(" "))]


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


def jinja_template(beginning: str) -> str:
    """`render` and `render_prompt` in Jinja, as transformers runs it for an exported model.

    transformers encodes a conversation as one text, so in an export a control token is spelled with
    `beginning` in place of "<|". A message that holds `beginning` is given "<|" there instead.
    """
    lines = Path(__file__).with_suffix(".jinja").read_text("utf-8").splitlines()
    return "".join(lines).replace("<|", beginning).replace("FORGED", "'<|'")
