"""What a model thinks of given text, and what it writes by itself; many prompts at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from data.fitting import rows_at_once
from model.generate import Sampling, generate
from model.seen import KVCache
from training.checkpoint import Checkpoint

REPLY_ROOM = 4  # times the longest true reply


def ask(checkpoint: Checkpoint, prompts: Sequence[list[int]], max_new: int) -> list[list[int]]:
    """Greedy replies to prompts, in the prompts' order, each as if it were asked alone."""
    replies: list[list[int]] = [[] for _ in prompts]
    for chosen in batches(checkpoint, [len(p) for p in prompts]):
        stop = {checkpoint.tokenizer.end_of_turn}
        batch = [prompts[i] for i in chosen]
        for i, reply in zip(
            chosen, generate(checkpoint.model, batch, Sampling(max_new), stop), strict=True
        ):
            replies[i] = reply
    return replies


def reply_limit(checkpoint: Checkpoint, replies: Iterable[str]) -> int:
    """Tokens in which a reply must end: REPLY_ROOM times the longest, half the context at most.

    Who has not stopped by then, rambles.
    """
    longest = max(len(checkpoint.tokenizer.encode(reply)) for reply in replies)
    return min(REPLY_ROOM * (longest + 1), checkpoint.model.config.block_size // 2)


def batches(checkpoint: Checkpoint, lengths: list[int], size: int | None = None) -> list[list[int]]:
    """Indices of rows of like length, so many at a time, or what `rows_at_once` says."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    size = size or rows_at_once(checkpoint.model.config.block_size)
    return [order[i : i + size] for i in range(0, len(order), size)]


@torch.inference_mode()
def predictions(
    checkpoint: Checkpoint, prompts: Sequence[list[int]], continuations: Sequence[list[int]]
) -> Iterator[Tensor]:
    """Log-probabilities (len(continuation), vocab_size) of what each token of it might have been.

    Yields one continuation's at a time: of all at once they can be too many to hold.

    Raises:
        ValueError: a prompt and its continuation do not fit into the model's block_size.
    """
    model = checkpoint.model
    rows = [p + c for p, c in zip(prompts, continuations, strict=True)]
    width = max(map(len, rows)) - 1
    padded = [row[:-1] + [0] * (width + 1 - len(row)) for row in rows]
    x = model.hidden(torch.tensor(padded, device=model.wte.weight.device))
    for r, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        places = slice(len(prompt) - 1, len(prompt) - 1 + len(continuation))
        yield model.logits(x[r, places]).log_softmax(dim=-1)


@torch.inference_mode()
def score_choices(
    checkpoint: Checkpoint, prompt: list[int], choices: Sequence[list[int]]
) -> list[float]:
    """Log-likelihood of each of several continuations of a prompt, up to a shared constant.

    What the continuations share at their beginning is computed once, with the prompt.
    """
    model = checkpoint.model
    device = model.wte.weight.device
    shared = 0
    while len({c[shared] for c in choices}) == 1 and all(len(c) > shared + 1 for c in choices):
        shared += 1
    prompt, tails = prompt + choices[0][:shared], [c[shared:] for c in choices]
    width = max(map(len, tails)) - 1
    prompt = prompt[-(model.config.block_size - width) :]  # of a longer one, the newest tokens
    cache = model.new_cache(1, len(prompt) + width)
    x = model.hidden(torch.tensor([prompt], device=device), cache.add(len(prompt)))
    scores = model.logits(x[0, -1]).log_softmax(dim=-1)[[tail[0] for tail in tails]]
    if width:
        lengths = torch.tensor([len(tail) - 1 for tail in tails], device=device)
        padded = torch.tensor([tail + [0] * (width + 1 - len(tail)) for tail in tails])
        padded = padded.to(device)
        repeat_rows(cache, len(tails))
        x = model.hidden(padded[:, :-1], cache.add(width))
        logprobs = model.logits(x).log_softmax(dim=-1)
        later = logprobs.gather(2, padded[:, 1:, None]).squeeze(2)
        inside = torch.arange(width, device=device) < lengths[:, None]
        scores = scores + (later * inside).sum(dim=1)
    found: list[float] = scores.tolist()
    return found


def repeat_rows(cache: KVCache, n: int) -> None:
    """Makes n rows of a cache of one row."""
    cache.keys = [keys.repeat(n, 1, 1, 1) for keys in cache.keys]
    cache.values = [values.repeat(n, 1, 1, 1) for values in cache.values]
    cache.starts = cache.starts.repeat(n)


@torch.inference_mode()
def log_likelihoods(
    checkpoint: Checkpoint, prompts: Sequence[list[int]], continuations: Sequence[list[int]]
) -> list[list[float]]:
    """The log-probability in nats of each token of each continuation after its prompt."""
    found: list[list[float]] = [[] for _ in prompts]
    lengths = [len(p) + len(c) for p, c in zip(prompts, continuations, strict=True)]
    for chosen in batches(checkpoint, lengths):
        parts = [continuations[i] for i in chosen]
        logprobs = predictions(checkpoint, [prompts[i] for i in chosen], parts)
        picked = [of_tokens(p, part) for p, part in zip(logprobs, parts, strict=True)]
        values = torch.cat(picked).tolist()
        for i, part in zip(chosen, parts, strict=True):
            found[i] = values[: len(part)]
            del values[: len(part)]
    return found


def of_tokens(logprobs: Tensor, ids: list[int]) -> Tensor:
    """The log-probability (n,) of each of n ids, from those of all ids in its place (n, V)."""
    return logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None]).squeeze(1)
