"""The chat template. Nothing else in the project knows what a conversation looks like in tokens.

    <|endoftext|> <|user|> question <|end|> <|assistant|> answer <|end|> <|user|> ...

Control tokens are inserted by id and the text between them is encoded as plain text, so no
message can forge a turn. A reply is supervised together with the <|end|> that closes it.
"""

from __future__ import annotations

from typing import Any, TypedDict

from data.files import fingerprint
from data.tokenizer import Tokenizer, create_tokenizer

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation; `role` is one of ROLES."""

    role: str
    content: str


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


def template_fingerprint() -> str:
    """A digest of what `render` does, stored with prepared data and with checkpoints."""
    sample = [Message(role=role, content=role[::-1]) for role in ROLES]
    return fingerprint(render(sample, create_tokenizer("byte", [])))


def check_messages(messages: Any) -> list[Message]:
    """A conversation in our form: an optional system message, then user and assistant in turn.

    Raises:
        ValueError: the reason why it cannot be trained on.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation must be a non-empty list of messages")
    checked: list[Message] = []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is not an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {i} has role {role!r}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {i} ({role}) has no text")
        checked.append(Message(role=role, content=content))
    turns = [m["role"] for m in checked[checked[0]["role"] == "system" :]]
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise ValueError(
            "turns must alternate user, assistant and end with an assistant's reply, not "
            + ", ".join(m["role"] for m in checked)
        )
    return checked


# How other formats name the roles (ShareGPT's `from`).
_ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def parse_example(example: Any) -> list[Message]:
    """A conversation from one JSON object in any of the shapes that people have.

    `messages` (role, content), `conversations` (from, value), `question` / `answer`, or
    `instruction` / `output`; an `input` beside the last two is added to what the user says.

    Raises:
        ValueError: the reason why it cannot be used.
    """
    if not isinstance(example, dict):
        raise ValueError(f"expected a JSON object, not {type(example).__name__}")
    for key in ("messages", "conversations"):
        if key in example:
            messages = example[key]
            if isinstance(messages, list):
                messages = [_rename_turn(m) if isinstance(m, dict) else m for m in messages]
            return check_messages(messages)
    for prompt, answer in (("question", "answer"), ("instruction", "output")):
        if prompt in example:
            if answer not in example:
                raise ValueError(f"{prompt!r} without {answer!r}")
            user, extra = example[prompt], example.get("input") or ""
            if not isinstance(extra, str):
                raise ValueError("'input' is not text")
            if isinstance(user, str) and extra.strip():
                user = f"{user}\n\n{extra}"
            reply = {"role": "assistant", "content": example[answer]}
            return check_messages([{"role": "user", "content": user}, reply])
    raise ValueError(
        "no messages, conversations, question/answer or instruction/output; it has "
        + (", ".join(map(str, example)) or "no keys")
    )


def _rename_turn(turn: dict[str, Any]) -> dict[str, Any]:
    role = turn.get("role", turn.get("from"))
    name = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    return {"role": name, "content": turn.get("content", turn.get("value"))}
