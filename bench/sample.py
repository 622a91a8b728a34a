"""Sampling speed: time to the first token, and new tokens/s, greedy and forced to full length.

One prompt, 32 different ones of one length, and 32 of different lengths (ours alone takes those at
once). nanoGPT is its model's `generate`, which has no cache. nanochat is its Engine, which takes
one prompt: several are done one after another, and a few of the 32 stand for all. Prompts are
random ids and weights are random. On CUDA the weights are bf16, but for nanochat's, which its
layers cast themselves.

python -m bench.sample --nanogpt DIR --nanochat DIR
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from bench import peers
from bench.launch import peak_memory
from bench.rounds import Figures, arguments, interleave, opened, parse, sizes, worker
from model.generate import Sampling, stream
from model.gpt import GPT, ModelConfig
from runtime.cli import one_line_errors
from runtime.device import pick_device, set_up

DRIVEN = {
    "nanoGPT": "GPT.generate with top_k=1, prompts of one length at once",
    "nanochat": "Engine.generate at temperature 0, one prompt after another",
}
Prompts = list[list[int]]
# Continues all prompts by so many new tokens, and returns once they are known on the host.
Decoder = Callable[[Prompts, int], None]


@dataclass(frozen=True)
class Case:
    """A model, and what it is asked: prompts at once, their tokens, and new tokens."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    prompts: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 256
    one_by_one: int = 4
    """Prompts that stand for all where a project takes one at a time."""


CASES = {
    "4x128": Case(4, 4, 128, 512, 65),
    "124M": Case(12, 12, 768, 1024, 50257),
    "quick": Case(2, 2, 32, 64, 65, prompts=3, prompt_tokens=8, new_tokens=8, one_by_one=2),
}
OURS: dict[str, dict[str, Any]] = {
    "ours, gpt2": {"recipe": "gpt2", "bias": False, "activation": "gelu_exact"},
    "ours, modern": {"recipe": "modern"},
}


def draw_prompts(case: Case, n: int, ragged: bool) -> Prompts:
    """Random ids; ragged ones have half to one and a half times the tokens."""
    rng, T = np.random.default_rng(1), case.prompt_tokens
    lengths = rng.integers(T // 2, T + T // 2 + 1, size=n) if ragged else [T] * n
    return [rng.integers(case.vocab_size, size=length).tolist() for length in lengths]


def ours(name: str, shape: dict[str, int], device: torch.device) -> Decoder:
    """Our `stream`."""
    fields: dict[str, Any] = {k: v for k, v in shape.items() if k != "vocab_size"}
    model = GPT(ModelConfig(**fields, **OURS[name]), shape["vocab_size"])
    model.to(device, dtype_on(device)).eval()

    def decode(prompts: Prompts, n: int) -> None:
        for _ in stream(model, prompts, Sampling(n)):
            pass

    return decode


def nanogpt(tree: str, shape: dict[str, int], device: torch.device) -> Decoder:
    """nanoGPT's `generate`, greedy by top_k=1."""
    module = peers.nanogpt_module(tree)
    if shape["vocab_size"] == 50257:
        shape = shape | {"vocab_size": 50304}  # as its train.py pads it
    model = module.GPT(module.GPTConfig(**shape, bias=False)).to(device, dtype_on(device)).eval()

    def decode(prompts: Prompts, n: int) -> None:
        model.generate(torch.tensor(prompts, device=device), n, top_k=1).tolist()

    return decode


class NoTokenizer:
    """What nanochat's Engine asks of a tokenizer: ids that end a reply, here none that exists."""

    def encode_special(self, text: str) -> int:
        """An id that no model gives."""
        return -1

    def get_bos_token_id(self) -> int:
        """An id that no model gives."""
        return -1


def nanochat(tree: str, shape: dict[str, int], device: torch.device) -> Decoder:
    """nanochat's `Engine.generate`, one prompt after another."""
    os.environ |= peers.nanochat_environment(device.type, compiled=False)
    model = peers.nanochat_model(tree, shape, str(device)).eval()
    engine = importlib.import_module("nanochat.engine").Engine(model, NoTokenizer())

    def decode(prompts: Prompts, n: int) -> None:
        for prompt in prompts:
            for _ in engine.generate(prompt, max_tokens=n, temperature=0.0):
                pass

    return decode


def dtype_on(device: torch.device) -> torch.dtype:
    """Of the weights."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def measure(name: str, tree: str | None, case: dict[str, int], device: str) -> Figures:
    """What one worker measures, in a fresh process."""
    c, where = Case(**case), pick_device(device)
    torch.manual_seed(1)
    shape = {**sizes(c), "vocab_size": c.vocab_size}
    if tree is None:
        decode = ours(name, shape, set_up(device))  # the others as they come
    else:
        decode = (nanogpt if name == "nanoGPT" else nanochat)(tree, shape, where)
    alone = name == "nanochat"
    many = c.one_by_one if alone else c.prompts
    settings = {"one": (1, False), "many": (many, False), "ragged": (many, True)}
    if name == "nanoGPT":
        del settings["ragged"]  # its prompts have one length
    figures: Figures = {}
    for setting, (n, ragged) in settings.items():
        prompts = draw_prompts(c, n, ragged)
        decode(prompts[:1] if alone else prompts, 4)  # warm-up
        if n == 1 or not alone:
            figures[f"first_token_seconds_{setting}"] = seconds_of(decode, prompts, 1)
        seconds = seconds_of(decode, prompts, c.new_tokens)
        figures[f"tokens_per_second_{setting}"] = n * c.new_tokens / seconds
    return figures | {"peak_memory": peak_memory()}


def seconds_of(decode: Decoder, prompts: Prompts, n: int) -> float:
    """Wall time of n new tokens for each prompt."""
    begin = time.perf_counter()
    decode(prompts, n)
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    a = parse(arguments(__doc__ or "", [*CASES]), argv)
    with one_line_errors():
        if a.one:
            print(json.dumps(measure(**json.loads(a.one))))
            return
        with opened("sample", a) as bench:
            at = "quick" if a.quick else a.case or ("124M" if bench.on_cuda else "4x128")
            trees = dict.fromkeys(OURS) | {name: str(t) for name, t in bench.peers.items()}
            fixed = {"case": asdict(CASES[at]), "device": bench.device}
            workers = {
                name: worker("bench.sample", name=name, tree=tree, **fixed)
                for name, tree in trees.items()
            }
            settings = {**asdict(CASES[at]), "decoding": "greedy", "text": "random ids", **DRIVEN}
            bench.write(at, settings, interleave(workers, bench.passes))


if __name__ == "__main__":
    main()
