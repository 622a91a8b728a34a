"""Configs: frozen dataclasses, read from TOML and overridden as `--optim.lr=1e-3`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a user's mistake into one line and exit code 1; a bug keeps its traceback."""
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(141) from None
    except RecursionError:
        print("error: the input is nested too deeply", file=sys.stderr)
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.strerror}: {error.filename or 'while writing a file'}"
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


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
    from jsonargparse import ArgumentError, ArgumentParser, set_loader, set_parsing_settings

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
    from runtime.processes import exit_now, finish_processes, world_size

    try:
        with one_line_errors():
            main(parse_config(config_class, about=about))
    except BaseException as error:
        if world_size() > 1:
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            exit_now(1)
        raise
    finish_processes()
