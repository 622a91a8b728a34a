"""What bench/launch.py calls in a fresh process: the machine, modules of ours, and of the peers."""

import importlib
import os
import platform
import re
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.cases import BENCHES, Case, Figures, sizes
from data.sft import SFTData, SFTDataConfig
from data.shards import load_examples, load_tokens
from data.tokenizer import Tokenizer
from model.generate import Sampling, stream
from model.gpt import GPT, ModelConfig
from model.seen import Batch
from runtime import device as devices
from training.optim import OptimConfig, build_optimizers
from training.step import train_step


def seconds_of(work: Callable[..., object], *args: Any) -> float:
    """Wall time of a call, until a GPU has done its part of it."""
    begin = time.perf_counter()
    work(*args)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def machine(device: str, quick: bool) -> dict[str, Any]:
    """Its names and limits, the best of six: FLOP/s as in training, bytes/s read and written."""
    where, info, flops = devices.pick_device(device), Path("/proc/cpuinfo"), 0.0
    named = re.search(r"model name\s*: *(.+)", info.read_text() if info.exists() else "")
    on_cuda = where.type == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    for n in (256,) if quick else (1024, 2048, 4096):
        a, b, out = torch.randn(3, n, n, device=where).to(dtype)
        multiply = partial(torch.mm, a, b, out=out)
        flops = max(flops, 2 * n**3 / min(seconds_of(multiply) for _ in range(6)))
    to, source = torch.ones(2, 1 << (20 if quick else 28 if on_cuda else 26), device=where)
    seconds = min(seconds_of(to.copy_, source) for _ in range(6))
    return devices.environment(where) | {
        "type": where.type,
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": devices.has_bf16(where),
        "peak_flops": devices.peak_flops(where),
        "matrix_flops": round(flops),
        "matrix_dtype": str(dtype).removeprefix("torch."),
        "copy_bytes_per_second": round(2 * source.nbytes / seconds),
    }


class PlainGPT(GPT):
    """One that takes the loss as is usual: logits of every position, targets that are ignored."""

    def forward(self, *batch: Any, **_: Any) -> Tensor:
        """The summed loss in nats; the arguments are those of `Batch`."""
        idx, targets, weights = batch[:3]
        wanted = targets.masked_fill(weights == 0, -100).flatten()
        return F.cross_entropy(super().forward(idx).flatten(0, 1), wanted, reduction="sum")


def plain_batches(folder: str, case: Case, to_context: bool) -> Iterator[list[Batch]]:
    """The forward passes of an epoch's steps: random rows, padded at the right."""
    rows = [torch.from_numpy(np.array(row, np.int64)) for row in load_examples(folder, "train")]
    order = np.random.default_rng(1).permutation(len(rows))
    for step in order.reshape(case["steps"], -1, case["micro_batch_size"]):
        batches = []
        for part in step:
            both = pad_sequence([rows[i].T for i in part], batch_first=True)  # (B, T + 1, 2)
            room = case["block_size"] + 1 - both.shape[1] if to_context else 0
            ids, mask = F.pad(both, (0, 0, 0, room)).unbind(2)
            idx, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            batches.append(Batch(idx, targets, mask[:, 1:].float()))
        yield batches


def tune(name: str, folder: str, case: Case, device: str) -> Figures:
    """An epoch of instruction tuning, after a warm-up."""
    where, steps, micro = devices.set_up(device, 1), case["steps"], case["micro_batch_size"]
    tokenizer, is_ours, computed = Tokenizer.load(folder), name.startswith("ours"), 0
    model = (GPT if is_ours else PlainGPT)(ModelConfig(**sizes(case)), tokenizer.n_vocab).to(where)
    config = OptimConfig(2 * steps, optimizer="adamw", lr=1e-3)
    optimizers = build_optimizers(model, config)
    devices.compile_model(model, "on" if case["compile"] else "off")
    of, packed = SFTDataConfig(folder, case["batch_size"]), name == "ours, packed"
    data = SFTData(Path(folder), of, tokenizer, case["block_size"], 1, packed=packed)

    def epoch(steps: int) -> None:
        nonlocal computed
        plain = plain_batches(folder, case, to_context=name == "padded to context")
        ours = (data.micro_batches(step, micro) for step in range(steps))
        for step, batches in enumerate(ours if is_ours else islice(plain, steps)):
            computed += sum(batch.idx.numel() for batch in batches)
            train_step(model, optimizers, batches, step, config)

    # On CUDA all of it once, so that the allocator has met every shape.
    epoch(steps if where.type == "cuda" else 1)
    computed = 0
    seconds = seconds_of(epoch, steps)
    useful = sum(len(ids) - 1 for ids, _ in load_examples(folder, "train"))
    return {"useful_tokens_per_second": useful / seconds, "useful_share": useful / computed}


def nanochat_model(tree: str, case: Case, n_vocab: int, device: str, compiled: bool) -> Any:
    """nanochat's GPT with full attention in every layer, made as its base_train.py makes it."""
    shape, on_cuda = sizes(case), device.startswith("cuda")
    shape |= {"sequence_len": shape.pop("block_size"), "n_kv_head": shape["n_head"]}
    os.environ |= {} if on_cuda else {"NANOCHAT_DTYPE": "float32"}  # its own switches
    os.environ |= {} if compiled else {"TORCHDYNAMO_DISABLE": "1"}
    torch.set_float32_matmul_precision("high" if on_cuda else "highest")
    sys.path.insert(0, tree)
    module = importlib.import_module("nanochat.gpt")
    with torch.device("meta"):
        model = module.GPT(module.GPTConfig(**shape, vocab_size=n_vocab, window_pattern="L"))
    model.to_empty(device=device)
    model.init_weights()
    return model


def train_nanochat(tree: str, case: Case, device: str, folder: str, micro: int) -> Figures:
    """Trains nanochat's GPT with its optimizer on random windows; prints every tenth `step N`."""
    n_vocab, parts = Tokenizer.load(folder).n_vocab, case["batch_size"] // micro
    model = nanochat_model(tree, case, n_vocab, device, case["compile"])
    optimizer = model.setup_optimizer()
    forward = torch.compile(model, dynamic=False) if case["compile"] else model
    ids, T, rng = load_tokens(folder, "train"), case["block_size"], np.random.default_rng(1)
    for step in range(1, case["steps"] + 1):
        for _ in range(parts):
            places = rng.integers(len(ids) - T, size=(micro, 1)) + np.arange(T + 1)
            windows = torch.from_numpy(ids[places].astype(np.int64)).to(device)
            loss = forward(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()) / parts
            loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        if step % 10 == 0:
            float(loss)  # waits for the device, as the others do
            print(f"step {step}", flush=True)
    return {"flash_attention_3": float(importlib.import_module("nanochat.flash_attention").USE_FA3)}


def decoder(name: str, tree: str, case: Case, device: str) -> Callable[..., object]:
    """Makes a function of prompts and n: their first n new tokens, in buffers with room for all."""
    where, n_vocab, new = devices.pick_device(device), case["vocab_size"], case["new_tokens"]
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    if name == "nanoGPT":
        module, ids = runpy.run_path(f"{tree}/model.py"), partial(torch.tensor, device=where)
        shape = {"vocab_size": {50257: 50304}.get(n_vocab, n_vocab)}  # as its train.py pads it
        theirs = module["GPT"](module["GPTConfig"](**sizes(case), **shape, bias=False))
        theirs.to(where, dtype).eval()
        return lambda prompts, n: theirs.generate(ids(prompts), n, top_k=1).tolist()
    if name == "nanochat":
        theirs = nanochat_model(tree, case, n_vocab, device, compiled=False).eval()
        # Of a tokenizer its engine asks for the ids that end a reply: here one that no model gives.
        nothing = SimpleNamespace(encode_special=lambda text: -1, get_bos_token_id=lambda: -1)
        engine = importlib.import_module("nanochat.engine").Engine(theirs, nothing)
        reply = partial(engine.generate, max_tokens=new, temperature=0.0)
        return lambda prompts, n: [list(islice(reply(prompt), n)) for prompt in prompts]
    devices.set_up(device)
    config = ModelConfig(**sizes(case), **BENCHES["sample"]["ours"][name])
    ours = GPT(config, n_vocab).to(where, dtype).eval()
    return lambda prompts, n: list(islice(stream(ours, prompts, Sampling(new)), n))


def sample(name: str, tree: str, case: Case, device: str) -> Figures:
    """Seconds to the first tokens, and tokens/s of all, for one prompt and for several."""
    torch.manual_seed(1)
    decode, new, figures = decoder(name, tree, case, device), case["new_tokens"], Figures()
    alone, T = name == "nanochat", case["prompt_tokens"]
    many = case["one_by_one"] if alone else case["prompts"]
    ragged = {} if name == "nanoGPT" else {"ragged": many}  # its prompts have one length
    for setting, n in {"one": 1, "many": many, **ragged}.items():
        rng, lengths = np.random.default_rng(1), [T] * n
        if setting == "ragged":
            lengths = rng.integers(T // 2, T + T // 2 + 1, size=n).tolist()
        prompts = [rng.integers(case["vocab_size"], size=length).tolist() for length in lengths]
        decode(prompts, 4)  # warm-up
        if n == 1 or not alone:
            figures[f"first_token_seconds_{setting}"] = seconds_of(decode, prompts, 1)
        figures[f"tokens_per_second_{setting}"] = n * new / seconds_of(decode, prompts, new)
    return figures


def profile(case: Case, device: str) -> Figures:
    """What steps of training, or with `prompt_tokens` of drawing tokens, spend their time on."""
    where, steps, T = devices.set_up(device, 1), case["steps"], case.get("prompt_tokens")
    model = GPT(ModelConfig(recipe=case["recipe"], **sizes(case)), case["vocab_size"]).to(where)
    config = OptimConfig(optimizer="adamw" if case["recipe"] == "gpt2" else "muon")
    optimizers = build_optimizers(model, config)
    devices.compile_model(model, "on" if case["compile"] else "off")
    idx = torch.randint(case["vocab_size"], (case["batch_size"], case["block_size"] + 1))
    batch = Batch(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    step = partial(train_step, model, optimizers, [batch], 0, config)

    def run(n: int) -> None:
        list(stream(model, idx[:, :T].tolist(), Sampling(n)) if T else (step() for _ in range(n)))

    run(5)
    speed = (len(idx) if T else batch.idx.numel()) * steps / seconds_of(run, steps)
    with torch.profiler.profile() as profiler:
        seconds_of(run, steps)
    spent = "self_device_time_total" if where.type == "cuda" else "self_cpu_time_total"
    costs = [(getattr(e, spent), e.count, e.key) for e in profiler.key_averages()]
    total = sum(cost for cost, _, _ in costs)
    operators = [
        (key, {"calls": n / steps, "milliseconds": cost / 1e3 / steps, "share": cost / total})
        for cost, n, key in sorted(costs, reverse=True)[: case["rows"]]
    ]
    flops = None if T else devices.flops_per_token(model) * speed  # the context grows
    return {"tokens_per_second": speed, "flops_per_second": flops, "operators": operators}
