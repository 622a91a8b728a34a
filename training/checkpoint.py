"""Checkpoints: a folder each, whole or absent, and enough by itself.

model.safetensors   weights in fp32, under the names of the uncompiled module
train_state.pt      optimizers and random generators, read with weights_only=True
tokenizer.tiktoken  the vocabulary
meta.json           kind, step, metrics, model config, run config, data, environment, checksums
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.tokenizer import RANKS_FILE, Tokenizer
from model.gpt import GPT, ModelConfig
from runtime.device import environment
from runtime.files import (
    checkpoints,
    fingerprint,
    new_directory,
    read_json,
    read_meta,
    resolve_checkpoint,
    sha256_file,
    verify_checksums,
    write_meta,
)
from runtime.processes import is_first

# What a resumed run may change: where things are (their contents are checked by fingerprint) and
# what alters the result by rounding at most.
MAY_CHANGE = {
    *("run.dir", "run.device", "run.compile", "run.loss_chunk", "run.wandb", "run.wandb_project"),
    "run.wandb_artifact",
    *("base", "init_from", "data.path", "data.replay_path"),
    *("data.micro_batch_size", "data.layout"),
}
PREPARED_QA = "prepared_qa"  # in an SFT run: what was made of a Q&A file
WEIGHTS_FILE, STATE_FILE = "model.safetensors", "train_state.pt"


@dataclass
class Checkpoint:
    """A loaded checkpoint. `meta["kind"]` is "base" or "instruct"."""

    model: GPT
    tokenizer: Tokenizer
    meta: dict[str, Any]
    path: Path


def describe(
    kind: str, config: Any, device: torch.device, prepared: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint's meta.json says of its run: config, machine, and how its data was made."""
    prepared = {k: v for k, v in prepared.items() if k != "files"}
    run = {"config": asdict(config), "environment": environment(device)}
    return {"kind": kind, **run, "prepared": prepared}


def save_checkpoint(
    run_dir: Path,
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    meta: dict[str, Any],
    step: int,
    metrics: dict[str, Any],
) -> Path:
    """Writes `run_dir/step_NNNNNN`, unless it is there already; returns it.

    With several processes the first one writes it.

    Raises:
        OSError: it cannot be written; nothing is left behind, older checkpoints are untouched.
    """
    path = run_dir / f"step_{step:06d}"
    if (path / "meta.json").exists() or not is_first():
        return path
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    weights = {k: v.float().contiguous() for k, v in model.state_dict().items() if k not in tied}
    on_cuda = model.wte.weight.is_cuda
    state = {
        "optimizers": [o.state_dict() for o in optimizers],
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if on_cuda else None,
    }
    with new_directory(path) as folder:
        with writing(path):
            save_file(weights, folder / WEIGHTS_FILE)
            torch.save(state, folder / STATE_FILE)
        described = {
            **meta,
            "step": step,
            "metrics": metrics,
            "model": asdict(model.config),
            "vocab_size": model.vocab_size,
            "tokenizer": tokenizer.save(folder),
            "files": {f.name: sha256_file(f) for f in sorted(folder.iterdir())},
        }
        write_meta(folder, described)
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an OSError of what safetensors and torch.save make of a full disk."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """The model in eval mode, its tokenizer and meta, from a checkpoint or a run (its newest).

    Raises:
        ValueError: not a checkpoint of this project, or one that is damaged.
    """
    folder = resolve_checkpoint(path)
    meta = read_meta(folder)
    if meta.get("kind") not in ("base", "instruct"):
        raise ValueError(f"{folder} is not a checkpoint (prepared data?)")
    try:
        verify_checksums(folder, {WEIGHTS_FILE: meta["files"][WEIGHTS_FILE]})
        tokenizer = Tokenizer.load(folder)
        model = GPT(ModelConfig(**meta["model"]), meta["vocab_size"])
        weights = load_file(folder / WEIGHTS_FILE)
        if model.config.tie_embeddings:
            weights["lm_head.weight"] = weights["wte.weight"]
        model.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} does not fit this version of the model: {error}") from None
    return Checkpoint(model.to(device).eval(), tokenizer, meta, folder)


def resume(path: Path, model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Puts model, optimizers and random generators back as `path` has them; returns its metrics.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    saved = load_checkpoint(path)
    model.load_state_dict(saved.model.state_dict())
    verify_checksums(path, {STATE_FILE: saved.meta["files"][STATE_FILE]})
    state = torch.load(path / STATE_FILE, weights_only=True, map_location="cpu")
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(state["rng"])
    if model.wte.weight.is_cuda and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"])
    metrics: dict[str, Any] = saved.meta["metrics"]
    return metrics


def identity(meta: dict[str, Any]) -> str:
    """A fingerprint of a checkpoint's weights and vocabulary, by which a run knows its base.

    It is the same after an export and an import.
    """
    return fingerprint({name: meta["files"][name] for name in (WEIGHTS_FILE, RANKS_FILE)})


def open_run(run_dir: Path, config: dict[str, Any]) -> Path | None:
    """The checkpoint from which a run goes on, or None if it is new. Writes nothing.

    Raises:
        ValueError: the folder holds something else, or a run with another config.
    """
    steps = checkpoints(run_dir)
    if steps:
        changed = differences(read_json(run_dir / "config.json"), config)
        changed = [d for d in changed if d.split(" ")[0] not in MAY_CHANGE]
        if changed:
            raise ValueError(
                f"{run_dir} holds a run with another config: {'; '.join(changed)}. "
                "Give the same config to go on with it, or another --run.dir"
            )
        return steps[-1]
    if run_dir.exists() and not (run_dir / "config.json").exists():
        # What a start that failed early leaves behind is ours: prepared Q&A, dotted names.
        ours = run_dir.is_dir() and all(
            p.name == PREPARED_QA or p.name.startswith(".") for p in run_dir.iterdir()
        )
        if not ours:
            raise ValueError(f"{run_dir} is not empty and holds no run; give another --run.dir")
    return None


def check_origin(checkpoint: Path, made_from: dict[str, Any]) -> None:
    """Refuses to go on from a checkpoint that was made from other data or another base.

    Raises:
        ValueError: what differs.
    """
    meta = read_meta(checkpoint)
    for name, value in made_from.items():
        if meta.get(name) != value:
            raise ValueError(
                f"{checkpoint} was made from another {name} than the config now names "
                f"({'; '.join(differences(meta.get(name), value))}); give another --run.dir"
            )


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Text such as "optim.lr 0.1 -> 0.2" for every leaf in which two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        prefix = f"{key}." if key else ""
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{prefix}{k}")]
    return [] if old == new else [f"{key} {old} -> {new}"]
