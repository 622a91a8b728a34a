"""How conversations are made to fit: what of a long one is kept, and which share a row."""

from bisect import bisect_left

import numpy as np

from data.chat import Message, Prompt, raw_prompt
from data.tokenizer import Tokenizer


def kept_length(mask: np.ndarray, limit: int) -> int:
    """Tokens of a conversation to keep so that at most `limit` are fed: of a long one those to the
    end of the last reply that fits whole, with its end-of-turn token; 0 if none does.
    """
    # limit + 1 tokens make limit (input, target) pairs.
    if len(mask) <= limit + 1:
        return len(mask) if mask.any() else 0
    reply_ends = np.flatnonzero(np.diff(mask.astype(np.int8)) == -1) + 1
    fitting = reply_ends[reply_ends <= limit + 1]
    return int(fitting[-1]) if len(fitting) else 0


def too_long(lengths: list[tuple[int, int]], limit: int) -> str:
    """What is lost of conversations, each as (tokens, of them kept): a line, empty if nothing."""
    whole, kept = np.array(lengths, np.int64).reshape(-1, 2).T
    if not (lost := int((whole - kept).sum())):
        return ""
    out, cut, share = (kept == 0).sum(), ((0 < kept) & (kept < whole)).sum(), lost / whole.sum()
    needed = int(np.quantile(whole, 0.95, method="higher")) - 1
    what = f"{out:,} conversations left out, the ends of {cut:,} cut off: {lost:,} tokens"
    return f"\nlonger than {limit}: {what} ({share:.1%}); {needed:,} tokens hold 95 % of all whole"


def recent_turns(
    prompt: Prompt, messages: list[Message], tokenizer: Tokenizer, limit: int
) -> list[Message]:
    """The newest whole turns of a conversation that fit into `limit` tokens, the last at least: no
    question is cut in half. Raw text has no turns, and is returned as it is.
    """
    if prompt is raw_prompt:
        return messages

    def fits(turn: int) -> bool:
        return len(prompt(messages[2 * turn :], tokenizer)) <= limit

    n_earlier = (len(messages) - 1) // 2
    return messages[2 * bisect_left(range(n_earlier), True, key=fits) :]


def after_examples(prompt: Prompt, examples: list[Message]) -> Prompt:
    """A format that puts answered questions before a conversation (URIAL, Lin et al. 2023, arXiv
    2312.01552): what a base makes of it owes nothing to tuning.
    """
    return lambda messages, tokenizer: prompt([*examples, *messages], tokenizer)


def pack(lengths: list[int], room: int) -> list[list[int]]:
    """Lays out items of some lengths in rows of at most `room`, as indices of the lengths."""
    rows, left = list[list[int]](), list[int]()
    # Longest first into the first row that has room, which leaves little of it empty.
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        r = next((r for r, free in enumerate(left) if free >= lengths[i]), len(rows))
        if r == len(rows):
            rows.append([])
            left.append(room)
        rows[r].append(i)
        left[r] -= lengths[i]
    return rows


def rows_at_once(tokens: int) -> int:
    """How many rows of so many tokens are computed at once, so that memory stays small."""
    return max(1, min(100, (1 << 14) // tokens))


def computed_tokens(lengths: list[int], layout: list[list[int]], rows: int) -> int:
    """Tokens that a layout makes the model compute, so many rows at a time, padding included."""
    filled = [sum(lengths[i] for i in row) for row in layout]
    parts = [filled[i : i + rows] for i in range(0, len(filled), rows)]
    return sum(len(part) * max(part) for part in parts)
