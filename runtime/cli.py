"""The command line of the training scripts: a frozen dataclass, filled from files (TOML, or the
JSON of a run's config.json) and from options after them: `--optim.lr=1e-3`.
"""

import contextlib
import io
import json
import os
import re
import sys
import tomllib
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

T = TypeVar("T")
# What a terminal obeys instead of showing it: controls but \n and \t, and what turns the direction
# of writing; and half a surrogate pair, which cannot be written.
UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff\ud800-\udfff]"
)
LONGEST = 500  # characters of an error message


def visible(text: str) -> str:
    """Text from files or a model, its control characters escaped, to be shown on a terminal."""
    return UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)


def say(text: str = "", *, error: bool = False) -> None:
    """Prints a line, what a terminal would obey escaped; an `error` on standard error."""
    print(visible(text), file=sys.stderr if error else sys.stdout, flush=True)


def shortened(text: str, n: int) -> str:
    """A text of at most `n` characters: all of it, or its beginning and its end."""
    half = n // 2
    return text if len(text) <= n else f"{text[: n - half - 5]} ... {text[-half:]}"


def listed(items: Iterable[object], between: str = ", ") -> str:
    """The first ten of some keys, names or differences, 80 characters of each, for a message."""
    texts = [shortened(str(item), 80) for item in items]
    return between.join(texts[:10]) + (f" and {len(texts) - 10} more" if len(texts) > 10 else "")


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are as short and as visible as all others."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses empty values, which are the current folder to a path, and `--` as a value."""
        args = sys.argv[1:] if args is None else args
        for before, word in zip(["", *args], args, strict=False):
            if re.fullmatch(r"(-[^=]*=)?(--)?", word) and word != "--":
                self.error(f"{word or before or 'a value'}: nothing is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends with the message as one line, after the usage."""
        self.print_usage(sys.stderr)
        text = f"{self.prog}: error: {visible(' '.join(message.split()))}"
        self.exit(2, f"{shortened(text, LONGEST)}\n")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a user's mistake into one line and exit code 1; a bug keeps its traceback."""
    for name in ("stdout", "stderr"):  # which may be closed, or not write every file's name
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(141) from None
    except (ValueError, OSError, RecursionError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.strerror}: {error.filename or 'while writing a file'}"
        elif isinstance(error, RecursionError):
            text = "the input is nested too deeply"
        elif isinstance(error, RuntimeError | MemoryError):
            if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", text):
                raise
            text = f"out of memory: {text or 'an input is too large for this machine'}"
        say(shortened(f"error: {visible(text)}", LONGEST), error=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        say("interrupted", error=True)
        raise SystemExit(130) from None


def parse_config(config_class: type[T], argv: list[str] | None = None, about: str = "") -> T:
    """A config from `--config FILE` and the options after it; of two values the later one counts.
    The fields of a dataclass are options, those of a field that is a dataclass are `--name.field`.
    Their docstrings are the text of --help, after `about`. Raises ValueError: a file, key, type or
    value is wrong or missing, with its name. Raises SystemExit: after --help and --print_config.
    """
    import jsonargparse  # slow, so only where options are read

    parser: Any = _parser(config_class, about)  # type: ignore[arg-type]  # a class has a hash
    hints = get_type_hints(config_class)
    kinds: dict[str, Any] = {"--config": config_class}
    for name, kind in hints.items():
        keys = get_type_hints(kind) if is_dataclass(kind) else {}
        kinds |= {f"--{name}": kind, **{f"--{name}.{key}": of for key, of in keys.items()}}
    args = _read_files(sys.argv[1:] if argv is None else argv, kinds)
    try:
        values = vars(parser.instantiate(parser.parse_args(args)))
    except (jsonargparse.ArgumentError, ArithmeticError) as error:  # or a number beyond all floats
        raise ValueError(f"{' '.join(str(error).split())} (--help lists every key)") from None
    config: Any = config_class(**{name: values[name] for name in hints})
    if values["print_config"]:
        say(json.dumps(asdict(config), indent=2))  # not TOML, which has no null
        raise SystemExit(0)
    return config


@lru_cache
def _parser(config_class: type, about: str) -> Any:
    """The command line of a config."""
    import jsonargparse

    class KeepLines(jsonargparse.DefaultHelpFormatter, RawDescriptionHelpFormatter):
        """Leaves the lines of `about` as they are."""

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        parser_mode="json",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,  # its own leaves out what the config itself fills in
        formatter_class=KeepLines,
        description=about,
    )
    parser.add_argument("--config", action="config", help="a .toml file, or a run's config.json")
    parser.add_argument("--print_config", action="store_true", help="print what would run; exit")
    parser.add_class_arguments(config_class, None)
    for group in parser._action_groups:  # titles of --help, from docstrings
        group.title = (group.title or "").partition(" Raises ")[0].rstrip(".")
    return parser


def run_cli(config_class: type[T], main: Callable[[T], object], about: str) -> None:
    """Parses the command line and runs `main`; a user's mistake is one line and exit code 1."""
    from runtime.processes import exit_now, finish_processes, world_size

    try:
        with one_line_errors():
            main(parse_config(config_class, about=about))
    except BaseException as error:
        if world_size() > 1:
            if isinstance(error, SystemExit) and isinstance(error.code, int):
                exit_now(error.code)
            traceback.print_exc()
            exit_now(1)
        raise
    finish_processes()


def _read_files(argv: list[str], kinds: dict[str, Any]) -> list[str]:
    """The command line with files (`--config FILE`, `--section FILE`) replaced by what they hold:
    jsonargparse imports what a file names as `class_path`, so it is never given a file, only keys
    that exist and single values. A bare `--switch` becomes `--switch=true`.
    """
    args, rest = list[str](), list(argv)
    while rest:
        option = rest.pop(0)
        name, equals, value = option.partition("=")
        kind = kinds.get(name)
        if is_dataclass(kind):
            option = f"{name}={_load(name, value if equals or not rest else rest.pop(0), kind)}"
        elif kind in (bool, bool | None) and not equals and rest[:1] not in (["true"], ["false"]):
            option = f"{name}=true"
        args.append(option)
    return args


def _load(option: str, value: str, kind: Any) -> str:
    """What a file of TOML or JSON holds, checked, as JSON; a value that is JSON stands for one."""
    try:
        text = value if value.startswith("{") else read_text(Path(value))
        is_json = text.lstrip().startswith("{")
        data: Any = json.loads(text, object_pairs_hook=_once) if is_json else tomllib.loads(text)
        _check_keys(data, kind)
    except (OSError, ValueError) as error:  # no such file, not UTF-8, not TOML, a wrong key, ...
        raise ValueError(f"{option} {value}: {getattr(error, 'strerror', None) or error}") from None
    return json.dumps(data)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which a key stands once, as in TOML."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice among {listed(key for key, _ in pairs)}")
    return found


def read_text(file: Path) -> str:
    """A file that people write. Raises ValueError: not UTF-8, or of more than 16 MB."""
    with open(file, encoding="utf-8-sig") as f:
        text = f.read(1 << 24)
        if f.read(1):
            raise ValueError(f"{file} is larger than what people write")
    return text


def _check_keys(data: Any, kind: Any, section: str = "") -> None:
    """Raises ValueError where data is not keys of the dataclass, with a value or a table each."""
    kinds = get_type_hints(kind)
    for key, value in data.items():
        name, table = f"{section}{key}", is_dataclass(kinds.get(key))
        if key not in kinds:
            raise ValueError(f"{name} is not a key (--help lists every key)")
        if not isinstance(value, dict if table else str | int | float | None):
            what = "table" if table else "single value"
            raise ValueError(f"{name} is {value!r:.80}; it must be a {what}")
        if value is None and NoneType not in get_args(kinds[key]):
            raise ValueError(f"{name} is null; it has a value, or is left out")
        if table:
            _check_keys(value, kinds[key], f"{name}.")


def recipes_help(recipes: dict[str, dict[str, Any]]) -> str:
    """What each recipe sets, as a table for --help."""
    rows = [["--model.recipe sets", *recipes]]
    for switch in next(iter(recipes.values())):
        values = (json.dumps(recipe[switch]).strip('"') for recipe in recipes.values())
        rows.append([f"  --model.{switch}", *values])
    return "\n".join("".join(f"{cell:33}" for cell in row).rstrip() for row in rows)
