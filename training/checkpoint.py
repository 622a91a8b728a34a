"""Checkpoints: a folder each, whole or absent, and enough by itself.

model.safetensors   weights in fp32, under the names of the uncompiled module
train_state.pt      optimizers and random generators, read with weights_only=True
tokenizer.tiktoken  the vocabulary
meta.json           kind, step, metrics, model config, run config, data, environment, checksums
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.chat import template_fingerprint
from data.tokenizer import RANKS_FILE, Tokenizer
from model.gpt import GPT, ModelConfig
from runtime import files
from runtime.cli import listed
from runtime.device import check_size, has_bf16
from runtime.processes import is_first, share_of, whole
from training.config import differences

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
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    meta: dict[str, Any],
    step: int,
    metrics: dict[str, Any],
) -> Path:
    """Writes `run_dir/step_NNNNNN`, unless it is there already; returns it. With several processes
    the first one does. Raises OSError: it cannot be written. Raises ValueError: weights or momentum
    are not finite. Nothing of it is left behind, older checkpoints are untouched.
    """
    path = run_dir / f"step_{step:06d}"
    if (path / "meta.json").exists() or not (is_first() or model.is_sharded):
        return path
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    weights = {k: gathered(v) for k, v in model.state_dict().items() if k not in tied}
    weights = {k: v.float().contiguous() for k, v in weights.items()}
    state = {"optimizers": gathered([o.state_dict() for o in optimizers])}
    state |= {"rng": torch.get_rng_state()}
    if not is_first():
        return path
    if bad := not_finite(weights) or not_finite(state["optimizers"]):
        remedy = "start again in another --run.dir with a lower learning rate"
        raise ValueError(f"step {step}: {bad} is not finite, so it is not saved; {remedy}")
    cuda_rng = torch.cuda.get_rng_state() if model.wte.weight.is_cuda else None
    with files.new_directory(path) as folder:
        with writing(path):
            save_file(weights, folder / WEIGHTS_FILE)
            torch.save(state | {"cuda_rng": cuda_rng}, folder / STATE_FILE)
        meta = meta | {"step": step, "metrics": metrics, "model": asdict(model.config)}
        meta |= {"vocab_size": model.vocab_size, "tokenizer": tokenizer.save(folder)}
        meta["files"] = {f.name: files.sha256_file(f) for f in sorted(folder.iterdir())}
        files.write_meta(folder, meta)
    return path


def gathered(value: Any) -> Any:
    """Nested dicts and lists with tensors of which each process holds a share: whole ones, on the
    CPU, in the first.
    """
    if isinstance(value, Tensor):
        full = whole(value)
        return value if full is value else full.cpu() if is_first() else full[:0]
    if isinstance(value, dict):
        return {key: gathered(part) for key, part in value.items()}
    return [gathered(part) for part in value] if isinstance(value, list) else value


def load_weights(model: GPT, weights: dict[str, Tensor]) -> None:
    """Gives a model, whole or shared by processes, the weights of a whole one."""
    shares = {name: share_of(weights[name], p) for name, p in model.state_dict().items()}
    model.load_state_dict(shares)


def not_finite(value: Any, name: str = "") -> str:
    """The key of a tensor in nested dicts and lists that is not finite; empty if all are."""
    if isinstance(value, Tensor):
        return "" if bool(value.isfinite().all()) else name
    if not isinstance(value, dict | list):
        return ""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return next(filter(None, (not_finite(v, f"{name}.{k}".strip(".")) for k, v in items)), "")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an OSError of what safetensors and torch.save make of a full disk."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError: it is none, or holds no weights."""
    try:
        weights: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error!s:.100}") from None
    if bad := [name for name, tensor in weights.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{path}: {bad[0]!r:.80} is no weight: {weights[bad[0]].dtype}")
    return weights


def read_checkpoint(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a checkpoint, or of a run's newest, and what its meta.json says.
    Raises ValueError: not a checkpoint of this project, or one that is damaged.
    """
    folder = files.resolve_checkpoint(path)
    meta = files.read_meta(folder)
    if meta.get("kind") not in ("base", "instruct"):
        raise ValueError(f"{folder} is not a checkpoint (prepared data?)")
    check_meta(meta, f"{folder}/meta.json")
    return folder, meta


def check_meta(meta: dict[str, Any], where: str) -> None:
    """Raises ValueError: a key of a checkpoint's meta.json is missing, or of another type."""
    wanted: dict[str, Any] = {"step": int, "vocab_size": int, "environment": dict}
    wanted |= dict.fromkeys(("metrics", "model", "config", "prepared", "tokenizer", "files"), dict)
    wanted |= {"template": str, "base": dict} if meta["kind"] == "instruct" else {}
    wrong = [key for key, kind in wanted.items() if type(meta.get(key)) is not kind]
    if not wrong:
        data, world = meta["config"].get("data"), meta["prepared"].get("world", {})
        text = isinstance(data, dict) and isinstance(data.get("path"), str | None)
        counts = [meta["metrics"].get(key, 0) for key in ("step", "tokens", "seconds")]
        numbers = all(type(n) in (int, float) and 0 <= n < 1 << 63 for n in counts)
        right = {"config": text, "prepared": isinstance(world, dict), "metrics": numbers}
        right["step"] = 0 <= meta["step"] < 10**18
        wrong = [key for key, is_right in right.items() if not is_right]
    if wrong:
        raise ValueError(f"{where} is damaged: {wrong[0]} is missing, or not what it should be")


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", kind: str | None = None
) -> Checkpoint:
    """The model in eval mode, its tokenizer and meta, from a checkpoint or a run (its newest).
    Raises ValueError: not a checkpoint of this project, not of this kind, or one that is damaged.
    """
    folder, meta = read_checkpoint(path)
    if kind not in (None, meta["kind"]):
        raise ValueError(f"--{kind} {folder} is of the other kind: {meta['kind']}")
    with files.as_ours(folder):
        files.verify_checksums(folder, {WEIGHTS_FILE: meta["files"][WEIGHTS_FILE]})
        tokenizer = Tokenizer.load(folder)
        if meta["vocab_size"] != tokenizer.n_vocab:
            raise ValueError(f"{folder}: its model has another vocabulary than its tokenizer")
        config, weights = ModelConfig(**meta["model"]), read_weights(folder / WEIGHTS_FILE)
        check_size(config, tokenizer.n_vocab)
        if config.n_layer * config.n_embd**2 > sum(w.numel() for w in weights.values()):
            raise ValueError(f"{folder}: its model has more weights than its {WEIGHTS_FILE}")
        if bad := not_finite(weights):
            raise ValueError(f"{folder}: {bad} is not finite; take an older checkpoint")
        if config.tie_embeddings:
            weights["lm_head.weight"] = weights["wte.weight"]
    try:
        model = GPT(config, tokenizer.n_vocab)
    except TypeError as error:  # half a layer
        raise ValueError(f"{folder} is damaged: {error!s:.100}") from None
    with files.as_ours(folder):
        model.load_state_dict(weights)
    return Checkpoint(model.to(device).eval(), tokenizer, meta, folder)


def check_models(found: dict[str, Checkpoint], to_sample: bool) -> dict[str, Checkpoint]:
    """What it is given, of the kinds "base" and "instruct"; `to_sample` in bf16 where the device
    computes in it. Raises ValueError: none is given, they are not of these kinds, or do not share a
    tokenizer and this template.
    """
    if not found:
        raise ValueError("there is no model to ask; give --base, --instruct or both")
    template = template_fingerprint()
    for kind, checkpoint in found.items():
        if (other := checkpoint.meta["kind"]) != kind:
            raise ValueError(f"--{kind} {checkpoint.path} is of the other kind: {other}")
        if checkpoint.meta.get("template", template) != template:
            raise ValueError(f"{checkpoint.path} was trained with another chat template than ours")
        if to_sample and has_bf16(checkpoint.model.wte.weight.device):
            checkpoint.model.bfloat16()  # every token reads all weights: half the bytes and time
    if len({checkpoint.tokenizer.fingerprint for checkpoint in found.values()}) > 1:
        raise ValueError("the two checkpoints have different tokenizers; they cannot be compared")
    return found


def resume(path: Path, model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Puts model, optimizers and random generators back as `path` has them; returns its metrics."""
    saved = load_checkpoint(path)
    load_weights(model, saved.model.state_dict())
    files.verify_checksums(path, {STATE_FILE: saved.meta["files"].get(STATE_FILE, "")})
    try:
        with warnings.catch_warnings(action="ignore"):  # of how it is pickled
            state = torch.load(path / STATE_FILE, weights_only=True, map_location="cpu")
        if bad := not_finite(state["optimizers"]):
            raise ValueError(f"{bad} is not finite")
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in optimizer_state["state"].items():
                values |= {k: share_of(v, params[i]) for k, v in values.items()}
            optimizer.load_state_dict(optimizer_state)
        torch.set_rng_state(state["rng"])
        if model.wte.weight.is_cuda and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
    except Exception as error:  # what a foreign file makes of torch.load cannot be foreseen
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path / STATE_FILE} is not this project's: {what:.100}") from None
    return dict(saved.meta["metrics"])


def identity(meta: dict[str, Any]) -> str:
    """A fingerprint of weights and vocabulary, the same after an export and an import."""
    return files.fingerprint({name: meta["files"][name] for name in (WEIGHTS_FILE, RANKS_FILE)})


def take_weights(
    path: str | None, model: GPT, tokenizer: Tokenizer, base: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Gives a model a checkpoint's weights, if one is named; returns its `origin_of`. ValueError:
    another architecture or tokenizer, or not tuned from the base whose meta.json is given.
    """
    if path is None:
        return None
    start = load_checkpoint(path)
    if base and start.meta.get("base") != origin_of(base):
        raise ValueError(f"tune.init={path} is no instruct checkpoint of the same base; name one")
    theirs = replace(start.model.config, dropout=model.config.dropout)  # no weight depends on it
    if changed := differences(asdict(theirs), asdict(model.config), "model"):
        raise ValueError(f"init_from={path} has another architecture: {listed(changed, '; ')}")
    if start.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"init_from={path} has another tokenizer than the data")
    load_weights(model, start.model.state_dict())
    return origin_of(start.meta)


def origin_of(meta: dict[str, Any]) -> dict[str, Any]:
    """What a run notes of the checkpoint that it starts from."""
    return {"step": meta["step"], "fingerprint": identity(meta)}
