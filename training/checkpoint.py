"""Checkpoints: a folder each, whole or absent, and enough by itself.

model.safetensors   weights in fp32, under the names of the uncompiled module
train_state.pt      optimizers and random generators, read with weights_only=True
tokenizer.tiktoken  the vocabulary
meta.json           kind, step, metrics, model config, run config, data, environment, checksums
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data.files import (
    checkpoints,
    new_directory,
    read_json,
    read_meta,
    resolve_checkpoint,
    sha256_file,
    verify_checksums,
    write_json,
)
from data.tokenizer import RANKS_FILE, Tokenizer
from model.gpt import GPT, ModelConfig

WEIGHTS_FILE, STATE_FILE = "model.safetensors", "train_state.pt"


@dataclass
class Checkpoint:
    """A loaded checkpoint. `meta["kind"]` is "base" or "instruct"."""

    model: GPT
    tokenizer: Tokenizer
    meta: dict[str, Any]
    path: Path


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    meta: dict[str, Any],
) -> Path:
    """Writes `run_dir/step_NNNNNN`, unless it is there already; returns it.

    Raises:
        OSError: it cannot be written; nothing is left behind, older checkpoints are untouched.
    """
    path = run_dir / f"step_{step:06d}"
    if path.exists():
        return path
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    weights = {k: v.float().contiguous() for k, v in model.state_dict().items() if k not in tied}
    state = {
        "optimizers": [o.state_dict() for o in optimizers],
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with new_directory(path) as folder:
        save_file(weights, folder / WEIGHTS_FILE)
        torch.save(state, folder / STATE_FILE)
        architecture = {"model": asdict(model.config), "vocab_size": model.vocab_size}
        described = {**meta, "step": step, **architecture, "tokenizer": tokenizer.save(folder)}
        described["files"] = {f.name: sha256_file(f) for f in sorted(folder.iterdir())}
        write_json(folder / "meta.json", described)
    return path


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """The model in eval mode, its tokenizer and meta, from a checkpoint or a run (its newest).

    Raises:
        ValueError: not a checkpoint of this project, or one that is damaged.
    """
    folder = resolve_checkpoint(path)
    meta = read_meta(folder)
    if meta.get("kind") not in ("base", "instruct"):
        raise ValueError(f"{folder} is not a checkpoint (prepared data?)")
    verify_checksums(folder, {n: meta["files"][n] for n in (WEIGHTS_FILE, RANKS_FILE)})
    try:
        model = GPT(ModelConfig.from_dict(meta["model"]), meta["vocab_size"])
        weights = load_file(folder / WEIGHTS_FILE)
        if model.config.tie_embeddings:
            weights["lm_head.weight"] = weights["wte.weight"]
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} does not fit this version of the model: {error}") from None
    return Checkpoint(model.to(device).eval(), Tokenizer.load(folder), meta, folder)


def resume(
    path: Path, model: GPT, optimizers: list[torch.optim.Optimizer], provenance: dict[str, Any]
) -> dict[str, Any]:
    """Puts model, optimizers and random generators back as `path` has them; returns its metrics.

    Args:
        provenance: what the run is made from ("data", "base", ...); must be as at the first start.

    Raises:
        ValueError: the checkpoint is damaged, or was made from other data or another base.
    """
    saved = load_checkpoint(path)
    for name, value in provenance.items():
        if saved.meta.get(name) != value:
            raise ValueError(
                f"{path} was made from other {name} than the config now names "
                f"({'; '.join(differences(saved.meta.get(name), value))}); give another --run.dir"
            )
    model.load_state_dict(saved.model.state_dict())
    verify_checksums(path, {STATE_FILE: saved.meta["files"][STATE_FILE]})
    state = torch.load(path / STATE_FILE, weights_only=True, map_location="cpu")
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    metrics: dict[str, Any] = saved.meta["metrics"]
    return metrics


def open_run(run_dir: Path, config: dict[str, Any]) -> Path | None:
    """Prepares a run's folder; returns the checkpoint to go on from, or None for a new run.

    Raises:
        ValueError: the folder holds something else, or a run with another config.
    """
    recorded, steps = run_dir / "config.json", checkpoints(run_dir)
    if recorded.exists() and steps:
        changed = differences(read_json(recorded), config)
        changed = [d for d in changed if not d.startswith("run.dir ")]  # a run may be moved
        if changed:
            raise ValueError(
                f"{run_dir} holds a run with another config: {'; '.join(changed)}. "
                "Give the same config to go on with it, or another --run.dir"
            )
        return steps[-1]
    foreign = not run_dir.is_dir() or (any(run_dir.iterdir()) and not recorded.exists())
    if run_dir.exists() and foreign:
        raise ValueError(f"{run_dir} is not empty and holds no run; give another --run.dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(recorded, config)  # also over that of a start that failed before its first save
    return None


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Text such as "optim.lr 0.1 -> 0.2" for every leaf in which two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        prefix = f"{key}." if key else ""
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{prefix}{k}")]
    return [] if old == new else [f"{key} {old} -> {new}"]
