"""The peers: their checkouts, their scripts, their modules. Their code is only ever run from there.

`python -m bench.peers JSON` is the worker that trains nanochat's GPT with its optimizer.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.launch import peak_memory

if TYPE_CHECKING:
    from bench.rounds import Output

# name: what only its checkout has, and the name of its option
PEERS = {
    "nanoGPT": (("train.py", "model.py", "configurator.py"), "nanogpt"),
    "nanochat": (("nanochat/gpt.py", "nanochat/engine.py"), "nanochat"),
}
WARM_UP = 10  # steps that no tokens/s counts
FIRST_STEP = "the first step is done"


def copy_tree(name: str, checkout: Path, to: Path) -> Path:
    """Copies a checkout without its data and outputs: its scripts write beside themselves.

    Raises:
        ValueError: it is no checkout of that project.
    """
    files, option = PEERS[name]
    missing = [file for file in files if not (checkout / file).is_file()]
    if missing:
        raise ValueError(f"--{option} {checkout} is no checkout of {name}: no {missing[0]} there")
    kinds = (".git", ".venv", "__pycache__", "out*", "wandb", "*.bin", "*.pkl", "*.pt", "input.txt")
    shutil.copytree(checkout, to, ignore=shutil.ignore_patterns(*kinds))
    return to


def commit(checkout: Path) -> str:
    """A checkout's commit, with "-dirty" where it was changed."""
    git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- nanoGPT -------------------------------------------------------------------------------


def nanogpt_data(tree: Path, prepared: Path) -> str:
    """Gives nanoGPT our prepared tokens as a data set; returns its name.

    Raises:
        ValueError: the ids need more than its 16 bits.
    """
    meta = json.loads((prepared / "meta.json").read_text())
    if meta["text"]["dtype"] != "<u2":
        raise ValueError("nanoGPT reads 16-bit ids; use a smaller vocabulary")
    folder = tree / "data" / prepared.name
    folder.mkdir()
    for part in ("train.bin", "val.bin"):
        (folder / part).symlink_to(prepared / part)
    padded = -(-meta["tokenizer"]["n_vocab"] // 64) * 64
    with open(folder / "meta.pkl", "wb") as f:
        pickle.dump({"vocab_size": padded}, f)
    return prepared.name


def nanogpt_module(tree: str) -> Any:
    """Its model.py, under another name than that of our package."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(tree) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def iterations(output: Output) -> dict[int, float]:
    """Seconds of each of nanoGPT's iterations, as it prints them; evaluations fall into some."""
    pattern = re.compile(r"iter (\d+): loss \S+, time ([\d.]+)ms")
    found = [match for _, line in output.lines if (match := pattern.match(line))]
    return {int(match[1]): float(match[2]) / 1000 for match in found}


def val_losses(output: Output) -> dict[int, float]:
    """Validation loss in nats by step, as nanoGPT prints them."""
    pattern = re.compile(r"step (\d+): train loss \S+, val loss ([\d.]+)")
    found = [match for _, line in output.lines if (match := pattern.match(line))]
    return {int(match[1]): float(match[2]) for match in found}


# ---- nanochat ------------------------------------------------------------------------------


def nanochat_environment(device: str, compiled: bool) -> dict[str, str]:
    """Its own switches: fp32 on a CPU, and no compilation where none is asked for."""
    precision = {} if device.startswith("cuda") else {"NANOCHAT_DTYPE": "float32"}
    return precision | ({} if compiled else {"TORCHDYNAMO_DISABLE": "1"})


def nanochat_model(tree: str, sizes: dict[str, int], device: str) -> Any:
    """Its GPT with full attention in every layer, made as its base_train.py makes it.

    Args:
        sizes: n_layer, n_head, n_embd, block_size, vocab_size.
    """
    import torch

    sys.path.insert(0, tree)
    module = importlib.import_module("nanochat.gpt")
    shape = {k: v for k, v in sizes.items() if k != "block_size"}
    config = module.GPTConfig(
        sequence_len=sizes["block_size"],
        n_kv_head=sizes["n_head"],
        window_pattern="L",
        **shape,
    )
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    with torch.device("meta"):
        model = module.GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    return model


def train_nanochat(
    tree: str,
    sizes: dict[str, int],
    device: str,
    tokens: str,
    batch_size: int,
    micro_batch_size: int,
    steps: int,
    compiled: bool,
) -> dict[str, float]:
    """Trains it on random windows of a file of 16-bit ids.

    After the warm-up it stops early, three steps later at the earliest, once 100 seconds are over.
    """
    import torch

    model = nanochat_model(tree, sizes, device)
    optimizer = model.setup_optimizer()
    forward = torch.compile(model, dynamic=False) if compiled else model
    ids, T = np.memmap(tokens, "<u2", mode="r"), sizes["block_size"]
    rng = np.random.default_rng(1)
    parts, seconds = batch_size // micro_batch_size, []
    for step in range(steps):
        begin = time.perf_counter()
        for _ in range(parts):
            places = rng.integers(len(ids) - T, size=(micro_batch_size, 1)) + np.arange(T + 1)
            windows = torch.from_numpy(ids[places].astype(np.int64)).to(device)
            loss = forward(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()) / parts
            loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        float(loss)  # waits for the device, as the others do
        seconds.append(time.perf_counter() - begin)
        if step == 0:
            print(FIRST_STEP, flush=True)
        if step >= WARM_UP + 3 and sum(seconds) > 100:
            break
    flash = importlib.import_module("nanochat.flash_attention")
    timed = seconds[WARM_UP:]
    return {
        "tokens_per_second": len(timed) * batch_size * T / sum(timed),
        "peak_memory": peak_memory(),
        "flash_attention_3": float(flash.USE_FA3),
    }


if __name__ == "__main__":
    print(json.dumps(train_nanochat(**json.loads(sys.argv[1]))))
