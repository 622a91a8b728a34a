"""Folders of models, on this machine or on the Hugging Face hub."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.files import read_json, sha256_file

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
ORIGIN_FILE = "diptych.json"  # in an export: what its checkpoint's meta.json said
HUB_FILES = ("*.json", "*.jinja", "model*.safetensors")  # what is wanted of a repository: no code


def find_model(name: str, downloads: Path, check: Callable[[Path], object]) -> Path:
    """A folder, or what is downloaded of a name on the hub: GPT2_NAMES, or owner/name. `check`
    raises ValueError where the config.json in a folder is not what is wanted; it is asked before
    gigabytes of something else are brought. Raises ValueError: neither a folder nor such a name, or
    not to be had.
    """
    if Path(name).is_dir():
        return Path(name)
    from data.sources.download import download, hub_files  # takes a while to import

    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"{name} is neither a folder nor a name on the Hugging Face hub")
    if "/" not in name and name not in GPT2_NAMES:
        known = ", ".join(GPT2_NAMES)
        raise ValueError(f"{name} is neither a folder nor a GPT-2; it can be {known} or owner/name")
    repo = name if "/" in name else f"openai-community/{name}"
    try:
        found = [f for f in hub_files(repo, "models", HUB_FILES) if "/" not in f.name]
    except ValueError as error:
        raise ValueError(f"there is no folder {name}, and as a name on the hub: {error}") from None
    folder = downloads / repo
    download([file for file in found if file.name == "config.json"], folder)
    check(folder)
    download(found, folder)
    return folder


def unknown_training() -> dict[str, Any]:
    """What a meta.json says of a model of which nobody knows what it was trained on."""
    config, data = {"data": {"path": None}}, {"fingerprint": None}
    return {"step": 0, "metrics": {}, "prepared": {}, "config": config, "data": data}


def weight_files(folder: Path) -> dict[str, str]:
    """The sha256 of each file of weights."""
    return {f.name: sha256_file(f) for f in sorted(folder.glob("model*.safetensors"))}


def origin_of(folder: Path, weights: dict[str, str]) -> dict[str, Any] | None:
    """What the meta.json said of the checkpoint that a folder is an export of; None if it is of
    none, or its weights have changed since.
    """
    file = folder / ORIGIN_FILE
    origin = read_json(file) if file.exists() else {}
    return origin["meta"] if origin.get("weights") == weights else None
