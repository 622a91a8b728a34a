"""Sampling from a GPT: several prompts of any lengths at once, with a key-value cache."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.check import check_range
from model.cudagraph import StaticStep
from model.gpt import GPT
from model.seen import Seen


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the most likely id.

    top_k keeps the k most likely ids; top_p the fewest most likely ones whose probability reaches
    p (Holtzman et al. 2019, arXiv 1904.09751). Raises ValueError if a setting is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1
    seeds: Sequence[int] = ()  # one for each prompt, in place of `seed` for all

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, "1 to 1000000")
        check_range("temperature", self.temperature, "0 or more")
        for seed in (self.seed, *self.seeds):
            check_range("seed", seed, f"0 or more and below {2**63}")
        check_range("top_k", self.top_k, "1 or more")
        check_range("top_p", self.top_p, "above 0 and at most 1")


def pick(logits: Tensor, u: Tensor, sampling: Sampling) -> Tensor:
    """The next id of each row (B,) from logits (B, V) and a u of each (B, 1), or one for all,
    uniform in [0, 1). A row's id depends on its own logits and u alone, not on the rows beside it.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # The largest is 0 before the division, and 1e-30 is no zero: no temperature gives inf or nan.
    logits = (logits.float() - logits.amax(dim=-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        logits[:, sampling.top_k :] = -torch.inf
    probs = logits.softmax(dim=-1)
    if sampling.top_p is not None:
        beyond = probs.cumsum(dim=-1) - probs >= sampling.top_p
        beyond[:, 0] = False  # the most likely id stays, however small p is
        probs[beyond] = 0.0
    cumulative = probs.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    # Rounding may put u past the last kept id: clamp to it.
    drawn = drawn.minimum((probs > 0).sum(dim=-1, keepdim=True) - 1)
    return ids.gather(1, drawn).squeeze(1)


def next_logits(model: GPT, idx: Tensor, seen: Seen) -> Tensor:
    """Logits (B, vocab_size) after the last of some tokens (B, T)."""
    return model.logits(model.hidden(idx, seen)[:, -1])


@torch.inference_mode()
def stream(
    model: GPT, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Collection[int] = ()
) -> Iterator[list[int | None]]:
    """Yields one new id per prompt and step, None for prompts whose reply has ended.

    A reply ends with an id of `stop`, which is yielded, or after max_new_tokens. The same prompt
    and seed give the same reply, whatever the other prompts are. A prompt is cut to its newest
    block_size tokens, a row that grows beyond them to its newer half. The model is to be in eval
    mode. ValueError: a prompt is empty.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("there must be a prompt, and each must have at least one token")
    block, device, n = model.config.block_size, model.wte.weight.device, sampling.max_new_tokens
    rows = [list(p)[-block:] for p in prompts]  # of a longer prompt, the newest tokens
    generators = [torch.Generator().manual_seed(i) for i in sampling.seeds or [sampling.seed]]
    uniform = torch.stack([torch.rand(n, 1, generator=g) for g in generators], dim=1).to(device)
    room = min(block, max(map(len, rows)) + n)
    cache = model.new_cache(len(rows), room)
    finished, ids, static_step = [False] * len(rows), torch.empty(0), None
    for u in uniform:
        if not cache.used or max(map(len, rows)) > block:  # prefill (again), left-padded
            rows = [row[-(block // 2 + 1) :] if len(row) > block else row for row in rows]
            width = max(map(len, rows))
            idx = torch.tensor([[0] * (width - len(row)) + row for row in rows]).to(device)
            cache.restart([width - len(row) for row in rows])
            logits = next_logits(model, idx, cache.add(width))
        elif device.type == "cuda" and not model.is_sharded:
            static_step = static_step or StaticStep(partial(next_logits, model), cache)
            logits = static_step(ids)
        else:
            logits = next_logits(model, ids[:, None], cache.add(1))
        ids = pick(logits, u, sampling)
        new = ids.tolist()
        yield [None if done else i for i, done in zip(new, finished, strict=True)]
        for r, i in enumerate(new):
            rows[r].append(i)
            finished[r] = finished[r] or i in stop
        if all(finished) and not model.is_sharded:  # there all processes take as many steps
            break


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Collection[int] = ()
) -> list[list[int]]:
    """The replies to several prompts, each with its stop id if it ended by one; see `stream`. The
    model may be in the midst of training.
    """
    training = model.training
    try:
        replies = zip(*stream(model.eval(), prompts, sampling, stop), strict=True)
    finally:
        model.train(training)
    return [[i for i in reply if i is not None] for reply in replies]
