"""Configs: frozen dataclasses, read from TOML and overridden as `--optim.lr=1e-3`."""

from __future__ import annotations

import json
import sys
import tomllib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, set_loader, set_parsing_settings

from data.files import one_line_errors
from training.processes import end, leave, world_size

T = TypeVar("T")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it does besides training.

    Raises:
        ValueError: intervals below 1.
    """

    dir: str
    """The run's folder. The same command given again goes on from its newest checkpoint."""
    seed: int = 1
    """Of the weights and of the order of the data."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu) or a device of torch such as cuda:1."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: auto uses it on CUDA where it works."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at a time: less memory for a large vocabulary, the same result, a
    little slower. None for all."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between evaluations; the last step is always evaluated."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases, besides metrics.jsonl."""
    wandb_project: str = "diptych"
    """Project name there."""
    wandb_artifact: bool = False
    """Upload the last checkpoint there."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"run.seed is {self.seed}; it must be 0 or more, and below 2**63")
        object.__setattr__(self, "dir", str(Path(self.dir).expanduser()))
        for name in ("loss_chunk", "log_every", "eval_every", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"run.{name} is {getattr(self, name)}; it must be 1 or more")


def _load(text: str) -> Any:
    """TOML, or the JSON of a run's config.json, so that a run can be repeated from it."""
    return json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)


def _check_file(file: Path) -> None:
    """Says which file is missing or broken; the parser would not."""
    try:
        _load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {file}: {error.strerror}") from None
    except ValueError as error:  # of TOML, of JSON or of UTF-8
        raise ValueError(f"--config {file}: {error}") from None


def parse_config(config_class: type[T], argv: list[str] | None = None, about: str = "") -> T:
    """A config from `--config FILE` and the options after it; later ones win.

    Raises:
        ValueError: a missing file, an unknown key, a wrong type or a value out of range, naming
            the key.
    """
    set_loader("toml", _load, (tomllib.TOMLDecodeError, json.JSONDecodeError))
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        parser_mode="toml", exit_on_error=False, description=about, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a .toml file, or a run's config.json")
    parser.add_class_arguments(config_class, None)
    args = sys.argv[1:] if argv is None else argv
    for option, following in zip(args, [*args, ""][1:], strict=True):
        if option == "--config" or option.startswith("--config="):
            _check_file(Path(following if option == "--config" else option.split("=", 1)[1]))
    try:
        values = vars(parser.instantiate(parser.parse_args(args)))
    except ArgumentError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{text} (--help lists every key)") from None
    values.pop("config")
    return config_class(**values)


def run_cli(config_class: type[T], main: Callable[[T], object], about: str) -> None:
    """Parses the command line and runs `main`; a user's mistake is one line and exit code 1."""
    try:
        with one_line_errors():
            main(parse_config(config_class, about=about))
    except BaseException as error:
        if world_size() > 1:
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            end(1)
        raise
    leave()
