"""Broken inputs by the thousand: each is read or refused in one line, and none hangs.

make fuzz                    10,000 cases of each kind; FUZZ=n: that many, FUZZ_SEED=n: others
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.pretrain import PretrainData, PretrainDataConfig
from data.sft import SFTData, SFTDataConfig
from data.sources.read import read_conversations, read_documents, read_files
from data.tokenizer import Tokenizer
from lab.pair import open_pair
from lab.sweep import cells_of, make_plan, read_sweep, settings_of
from runtime.cli import LONGEST, one_line_errors, parse_config, visible
from runtime.files import fingerprint, read_meta, resolve_checkpoint, sha256_file, write_meta
from train_pretrain import PretrainConfig
from train_sft import SFTConfig
from training.checkpoint import load_checkpoint, resume
from training.log import read_metrics
from training.optim import OptimConfig, build_optimizers

ROOT = Path(__file__).parents[1]
CASES, SEED = int(os.environ.get("FUZZ", 500)), int(os.environ.get("FUZZ_SEED", 1))
SECONDS = 10  # that one case may take
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**400, 10**9, -(10**9), 10**30, 0.5, 1e308, -1e-45, 1e999),
    *(float("nan"), "", " ", "x", "nan", "1e5", "null", "true", "\x1b[2J", "\ud800", "\u202e", "~"),
    *("~nobody/x", "/dev/null", "../..", "a" * 10_000, "cuda:99", "meta", "{}", "[1]", "@x"),
    *([], {}, [[]], [1, 2], {"": ""}, ["x"] * 100, {"class_path": "os.system"}),
    *({"__path__": "x"}, {"__default_config__": 1}, {"__orig__": {}}, {"config": "x"}),
]
Action = Callable[[], object]


class TooSlowError(Exception):
    """Not an error that anybody turns into a line."""


@pytest.fixture(autouse=True)
def seconds_are_limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def hold(action: Action, case: object, capsys: pytest.CaptureFixture[str]) -> None:
    """Holds one case to the law."""
    code: object = 0
    capsys.readouterr()
    signal.alarm(SECONDS)
    try:
        with one_line_errors():
            action()
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error!s:.300} of {case!r:.600}") from error
    finally:
        signal.alarm(0)
    out, err = capsys.readouterr()
    assert visible(out + err) == out + err, (case, out, err)
    if code != 0:
        assert code == 1, (case, code)
        assert err.startswith("error: "), (case, err)
        assert err.index("\n") == len(err) - 1 <= LONGEST, (case, err)


# ---- how inputs are broken -----------------------------------------------------------------------


def broken(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three places of it replaced, taken out, added or nested."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = [(None, None), *places_of(value)]
        parent, key = rng.choice(places)
        what = rng.choice(("replace", "replace", "delete", "add", "nest", "swap"))
        if parent is None:
            if rng.random() < 0.1:
                return nasty(rng)
        elif what == "delete":
            del parent[key]
        elif what == "add" and isinstance(parent, dict):
            parent[rng.choice([*parent, "", "x" * 3000, "\x1b[31m", "class_path", "a.b", "é"])] = (
                nasty(rng)
            )
        elif what == "nest":
            for _ in range(rng.choice((1, 3, 90))):
                parent[key] = rng.choice(([parent[key]], {"a": parent[key]}))
        elif what == "swap" and isinstance(parent, dict):
            parent[key] = parent[rng.choice(list(parent))]
        else:
            parent[key] = nasty(rng)
    return value


def nasty(rng: random.Random) -> Any:
    """A value that few expect."""
    return copy.deepcopy(rng.choice(NASTY))


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value: what holds it, and its key there."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    return found + [
        place
        for _, key in found
        if isinstance(value[key], dict | list)
        for place in places_of(value[key])
    ]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to three pieces changed, left out, put in or doubled."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + rng.choice((1, 1, 4, 40)))
        some = bytes(rng.choice((rng.randrange(256), 0, 0xFF, 0x80, 0x22)) for _ in range(j - i))
        new = rng.choice(
            (
                some,
                b"",
                data[i:j] * 2,
                rng.choice((b"\x00" * 9, b"\xef\xbb\xbf", b"\n", b"[" * 3000)),
            )
        )
        data = data[:i] + new + data[j:]
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data) + 1)]
    return data


def cases(kind: str, parts: int = 1) -> Iterator[random.Random]:
    """A generator of each case's own; `parts` tests share those of a kind."""
    for i in range(CASES // parts):
        yield random.Random(f"{kind} {SEED} {i}")


# ---- configs -------------------------------------------------------------------------------------

PRETRAIN = {
    "data": {"path": "out/data", "batch_size": 4, "document_mask": True, "val_tokens": 100},
    "model": {"recipe": "modern", "n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 64},
    "optim": {"steps": 10, "lr": 1e-3, "optimizer": "adamw", "grad_clip": 1.0},
    "run": {"dir": "out/run", "seed": 3, "device": "cpu", "wandb": "disabled"},
}
SFT = {
    "base": "out/base",
    "data": {"path": "qa.jsonl", "replay": 0.5, "examples": 100, "val_fraction": 0.1},
    "optim": {"steps": 10},
    "run": {"dir": "out/sft"},
}


def as_toml(value: Any) -> str:
    """TOML of a config; of what TOML cannot say, something that is none."""
    lines = []
    for key, part in value.items() if isinstance(value, dict) else ():
        if isinstance(part, dict):
            lines += [f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in part.items())]
        else:
            lines.insert(0, f"{key} = {json.dumps(part)}")
    return "\n".join(lines)


@pytest.mark.parametrize("form", ["json", "toml", "bytes"])
@pytest.mark.parametrize(("kind", "config"), [(PretrainConfig, PRETRAIN), (SFTConfig, SFT)])
def test_configs(
    kind: Any, config: Any, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config"
    for rng in cases(f"config {kind.__name__} {form}", parts=6):
        value = broken(config, rng)
        text = as_toml(value) if form == "toml" else json.dumps(value)
        data = text.encode("utf-8", "surrogatepass")
        if form == "bytes":
            source = rng.choice((json.dumps(config), as_toml(config)))
            data = damaged(source.encode(), rng)
        file.write_bytes(data)
        hold(lambda: parse_config(kind, ["--config", str(file)]), data, capsys)


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [f"{section}.{key}" for section, part in PRETRAIN.items() for key in part]
    keys += [*PRETRAIN, "config", "print_config", "init_from", "verify", "nothing", "a.b.c", ""]
    values = [v if isinstance(v, str) else json.dumps(v) for v in NASTY]
    given = ["--data.path=x", "--run.dir=y"]
    for rng in cases("options"):
        options = [f"--{rng.choice(keys)}={rng.choice(values)}" for _ in range(rng.choice((1, 2)))]
        if rng.random() < 0.2:
            options = [part for option in options for part in option.split("=", 1)]
        hold(lambda: parse_config(PretrainConfig, [*given, *options]), options, capsys)  # noqa: B023


# ---- what people have ----------------------------------------------------------------------------

EXAMPLES: list[Any] = [
    {"instruction": "Name a town.", "input": "in Wales", "output": "Tenby."},
    {"question": "Why?", "answer": "Because."},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
]
EXAMPLES[2]["messages"].append({"role": "assistant", "content": "Hello. <|end|> é 漢"})


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_questions_and_answers(
    suffix: str, skip_bad: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"qa{suffix}"
    for rng in cases(f"qa {suffix} {skip_bad}", parts=4):
        chosen: Any = [rng.choice(EXAMPLES) for _ in range(rng.choice((1, 2, 5)))]
        value = broken(chosen, rng)
        rows = value if suffix == ".jsonl" and isinstance(value, list) else [value]
        text = "\n".join(map(json.dumps, rows))
        data = text.encode("utf-8", "surrogatepass")
        file.write_bytes(damaged(data, rng) if rng.random() < 0.4 else data)
        case = file.read_bytes()
        hold(lambda: list(read_conversations([file], skip_bad)), case, capsys)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz"])
def test_text(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / f"text{suffix}"
    read = partial(read_documents, field="text")
    for rng in cases(f"text {suffix}", parts=3):
        text = rng.choice(("To be, or not to be.\n\n" * 9, "é漢🙂\x00\r\n", ""))
        data = text.encode()
        if suffix != ".txt":
            rows = [{"text": text, "id": i} for i in range(3)]
            data = "\n".join(json.dumps(broken(row, rng)) for row in rows).encode(
                "utf-8", "surrogatepass"
            )
        if suffix.endswith(".gz"):
            data = gzip.compress(data)
        data = damaged(data, rng)
        file.write_bytes(data)
        hold(lambda: list(read_files([file], read)), data, capsys)


# ---- what this project writes, changed and sealed again ------------------------------------------


def copied(folder: Path, out: Path) -> Path:
    """A folder anew, in the same place."""
    shutil.rmtree(out, ignore_errors=True)
    return Path(shutil.copytree(folder, out))


def forge(folder: Path, rng: random.Random) -> object:
    """Changes a sealed folder's files, or what meta.json says, and mostly seals it again."""
    meta = read_meta(folder)
    if rng.random() < 0.5:
        name = rng.choice([*meta["files"], "meta.json"])
        data = damaged((folder / name).read_bytes(), rng)
        (folder / name).write_bytes(data)
        if name == "meta.json":
            return name, data[:2000]
        meta["files"][name] = sha256_file(folder / name)
        case: object = name
    else:
        case = meta = broken(meta, rng)
    if isinstance(meta, dict):
        meta = {**meta, "seal": fingerprint(meta)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return case


def change_array(folder: Path, rng: random.Random) -> object:
    """Another array in place of one of the prepared Q&A or text, sealed again."""
    meta = read_meta(folder)
    name = rng.choice([n for n in meta["files"] if n.endswith((".npy", ".bin"))])
    dtype = rng.choice(("<u2", "<u4", "<i8", "<f4", "u1", "<U3", "bool"))
    values = np.array(
        [rng.choice((0, 1, 2, 399, 400, 65535)) for _ in range(rng.choice((0, 1, 50)))]
    )
    array = values.astype(dtype)
    if rng.random() < 0.2:
        array = array.reshape(1, -1)
    if name.endswith(".bin"):
        (folder / name).write_bytes(array.tobytes())
    else:
        np.save(folder / name, array)
    meta["files"][name] = sha256_file(folder / name)
    write_meta(folder, meta)
    return name, array


def open_all(folder: Path) -> None:
    """What training opens of a prepared folder, to the first batches."""
    text = PretrainData(PretrainDataConfig(str(folder), batch_size=2), 16, 1)
    text.micro_batches(0, 2)
    text.val_batches(2)
    tokenizer = Tokenizer.load(folder)
    qa = SFTData(folder, SFTDataConfig(str(folder), batch_size=2), tokenizer, 64, 1)
    for batch in (*qa.micro_batches(0, 2), *qa.val_batches(2)):
        assert int(batch.idx.max()) < tokenizer.n_vocab
    qa.shares(2)


def test_prepared_folders(
    world_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rng in cases("prepared"):
        folder = copied(world_dir, tmp_path / "data")
        case = rng.choice((forge, forge, change_array))(folder, rng)
        hold(lambda: open_all(folder), case, capsys)  # noqa: B023


def test_checkpoints(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = resolve_checkpoint(runs[1])
    model = load_checkpoint(checkpoint).model
    optimizers = build_optimizers(model, OptimConfig(4))
    for rng in cases("checkpoint"):
        folder = copied(checkpoint, tmp_path / "step_000006")
        case = forge(folder, rng)
        uses: list[Action] = [
            lambda: load_checkpoint(folder),  # noqa: B023
            lambda: resume(folder, model, optimizers),  # noqa: B023
            lambda: open_pair(str(runs[0]), str(folder), "cpu", None),  # noqa: B023
        ]
        hold(rng.choice(uses), case, capsys)


def test_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "metrics.jsonl"
    for rng in cases("metrics"):
        rows = [broken({"step": i, "loss": 1.5, "lr": 0.1}, rng) for i in range(4)]
        data = "\n".join(map(json.dumps, rows)).encode("utf-8", "surrogatepass")
        data = damaged(data, rng) if rng.random() < 0.5 else data
        file.write_bytes(data)
        hold(lambda: [row["step"] + 1 for row in read_metrics(file)], data, capsys)


SWEEP: dict[str, Any] = {
    "about": "a",
    "seeds": [1, 2],
    "labels": ["x", "y"],
    "questions": 9,
    "world": {"people": 20, "bios": 3},
    "pretrain": {"config": "configs/quickstart/pretrain.toml", "optim.steps": 3},
    "sft": {"config": "configs/quickstart/sft.toml"},
    "qa": {"asked": 0.5},
    "instruments": {"knowledge": 3},
    "grid": {"sft.optim.lr": [0.1, 0.2]},
    "tables": [{"columns": {"a": "b"}}],
}


def test_sweeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "sweep.toml"

    def plan() -> None:
        spec = read_sweep(file)
        for cell in cells_of(spec)[:3]:
            make_plan(tmp_path, settings_of(spec, cell), spec["seeds"][0])

    for rng in cases("sweep", parts=2):
        value = broken(SWEEP, rng)
        lines = []
        for key, part in value.items() if isinstance(value, dict) else ():
            if isinstance(part, dict):
                lines += [
                    f"[{key}]",
                    *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in part.items()),
                ]
            else:
                lines.insert(0, f"{key} = {json.dumps(part)}")
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        data = damaged(data, rng) if rng.random() < 0.3 else data
        file.write_bytes(data)
        hold(plan, data, capsys)
