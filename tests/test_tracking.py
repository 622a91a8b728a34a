"""What wandb is told, read back from the files of its offline runs."""

from __future__ import annotations

import importlib
import json
import shutil
import struct
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train_pretrain
import train_sft
from runtime import tracking
from tests.conftest import pretrain_config, sft_config
from tests.test_log import log_steps, make_log, result, rows_of
from tests.test_scripts import start
from training.log import read_metrics

BLOCK = 32768


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # a script has its own, not this process's
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def records(file: Path) -> Iterator[Any]:
    """The records of an offline run: protobuf messages in the blocks of a LevelDB log."""
    wandb_internal_pb2: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, at, parts = file.read_bytes(), 7, b""  # after the header ":W&B", its magic and version
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:  # what is left of a block has no room for a record's head
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def told(run: Path) -> list[dict[str, Any]]:
    """The history of all parts of a run, in order."""
    rows = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                )
    return rows


def config_of(run: Path) -> dict[str, Any]:
    config = {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                for item in record.run.config.update:
                    config[item.key] = json.loads(item.value_json)
    return config


def own(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.startswith("_") and not k.startswith("samples")}


@pytest.mark.parametrize("saved_at", [3, 5])
def test_every_step_is_told_once_across_a_kill_and_a_resume(saved_at: int, tmp_path: Path) -> None:
    saved = log_steps(make_log(tmp_path, wandb="offline"), 5)  # killed at 5
    if saved_at == 3:
        saved = rows_of(tmp_path)[2]
    first_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    last = log_steps(make_log(tmp_path, saved, wandb="offline"), 8)
    log_steps(make_log(tmp_path, last, wandb="offline"), 10)
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == first_id
    names = {f.stem for f in tmp_path.glob("wandb/offline-run-*/*.wandb")}
    assert names == {f"run-{first_id}"}
    history = [own(row) for row in told(tmp_path)]
    assert [row["step"] for row in history] == list(range(1, 11))
    assert [row["loss"] for row in history] == [row["loss"] for row in rows_of(tmp_path)]


@pytest.mark.parametrize("saved_at", [3, 5])
def test_a_table_of_samples_is_told_once_across_a_kill_and_a_resume(
    saved_at: int, tmp_path: Path
) -> None:
    def train(row: dict[str, Any], last: int) -> dict[str, Any]:
        with make_log(tmp_path, row, wandb="offline") as log:
            for step in range(log.first_step, last + 1):
                if step > log.first_step:
                    log.add(result(step))
                if step in (2, 5, 7):
                    log.samples("x", ["text"], [[f"of step {step}"]])
                log.write(step, {})
            return log.row

    saved = train({}, 6)
    with (tmp_path / "samples.jsonl").open("a") as f:
        f.write('{"step": 1}\n{"step": 1, "columns": ["a"], "rows": 5}\n')  # that somebody edited
    # Killed: what wandb was not told of its end is written anew.
    state = json.loads((tmp_path / "wandb.json").read_text())
    (offline,) = tmp_path.glob("wandb/offline-run-*")
    (tmp_path / "wandb.json").write_text(json.dumps(state | {"told": 0, "open": offline.name}))
    saved = next(row for row in rows_of(tmp_path) if row["step"] == saved_at)
    train(saved, 9)
    tables = [json.loads(f.read_text()) for f in tmp_path.rglob("*.table.json")]
    assert sorted(table["data"] for table in tables) == [[[f"of step {n}"]] for n in (2, 5, 7)]
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").open()]
    assert [row["step"] for row in kept if row["step"] > 1] == [2, 5, 7]


def test_what_was_not_told_is_made_up_for(tmp_path: Path) -> None:
    saved = log_steps(make_log(tmp_path), 3)  # wandb was off at first
    saved = log_steps(make_log(tmp_path, saved, wandb="offline"), 5)
    saved = log_steps(make_log(tmp_path, saved), 7)
    log_steps(make_log(tmp_path, saved, wandb="offline"), 9)
    assert [own(row) for row in told(tmp_path)] == rows_of(tmp_path)


def test_a_run_that_begins_anew_is_another_one_there(tmp_path: Path) -> None:
    log_steps(make_log(tmp_path, wandb="offline"), 2)
    log_steps(make_log(tmp_path, wandb="offline"), 2)
    assert len({f.stem for f in tmp_path.glob("wandb/offline-run-*/*.wandb")}) == 2


def test_its_axis_is_our_step(tmp_path: Path) -> None:
    log_steps(make_log(tmp_path, wandb="offline"), 2)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    metrics = [r.metric for r in records(file) if r.WhichOneof("record_type") == "metric"]
    assert {(m.name or m.glob_name, m.step_metric) for m in metrics} >= {("*", "step")}


def test_both_scripts_tell_config_commit_samples_and_checkpoint(
    world_dir: Path, tmp_path: Path
) -> None:
    wandb: dict[str, Any] = {"wandb": "offline", "wandb_artifact": True}
    config = pretrain_config(world_dir, tmp_path / "base", steps=6)
    train_pretrain.main(replace(config, run=replace(config.run, **wandb)))
    tuning = sft_config(world_dir, tmp_path / "base", tmp_path / "instruct", steps=6)
    train_sft.main(replace(tuning, run=replace(tuning.run, **wandb)))
    for name, expected in (("base", config), ("instruct", tuning)):
        run = tmp_path / name
        said = config_of(run)
        assert said["optim"]["steps"] == expected.optim.steps
        assert said["kind"] == name
        assert said["environment"]["commit"]
        assert len(said["data"]["fingerprint"]) == 16
        assert [own(row) for row in told(run)] == read_metrics(run / "metrics.jsonl")
        (folder,) = run.glob("wandb/offline-run-*")
        kinds = {r.WhichOneof("record_type") for r in records(next(folder.glob("*.wandb")))}
        text = next(folder.glob("*.wandb")).read_bytes()
        assert "request" in kinds or "artifact" in kinds
        assert b"model.safetensors" in text
        tables = [json.loads(f.read_text()) for f in folder.rglob("*.table.json")]
        assert len(tables) == 2  # an evaluation at step 5, and at the last
        columns = ["continuation"] if name == "base" else ["prompt", "base", "instruct"]
        assert all(table["columns"] == columns for table in tables)
    assert all(len(table["data"]) == 8 for table in tables)
    first, last = (sorted(row[1] for row in table["data"]) for table in tables)
    assert first == last  # the base is the same at every evaluation
    assert any(row[1] != row[2] for row in tables[0]["data"])


def test_a_killed_script_that_is_resumed_tells_every_step_once(
    world_dir: Path, tmp_path: Path
) -> None:
    config = pretrain_config(world_dir, tmp_path / "run", steps=2000)
    config = replace(config, run=replace(config.run, wandb="offline", eval_every=1000))
    process = start("train_pretrain", config, tmp_path)
    for line in process.stdout:
        if line.startswith("step 22/"):  # checkpoints are every 4 steps
            process.kill()
            break
    process.wait()
    reached = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    process = start("train_pretrain", config, tmp_path)
    for line in process.stdout:
        if line.startswith(f"step {reached + 8}/"):
            process.terminate()
            break
    process.stdout.read()
    assert process.wait(timeout=60) == 143
    steps = [row["step"] for row in told(tmp_path / "run")]
    assert steps == list(range(1, steps[-1] + 1))
    assert steps[-1] >= reached + 8


def test_a_run_that_failed_there_leaves_the_next_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no artifact")

    first, second = tmp_path / "lr=0.1 größe", tmp_path / "b"
    first.mkdir()
    (first / "step_000001").mkdir()
    (first / "step_000001" / "meta.json").touch()
    with monkeypatch.context() as patch:
        patch.setattr("wandb.sdk.wandb_run.Run.log_artifact", broken)
        log_steps(make_log(first, wandb="offline", wandb_artifact=True), 3)
    log_steps(make_log(second, wandb="offline"), 2)
    assert [row["step"] for row in told(first)] == [1, 2, 3]
    assert [row["step"] for row in told(second)] == [1, 2]
    again = log_steps(make_log(first, rows_of(first)[0], wandb="offline", wandb_artifact=True), 4)
    assert again["step"] == 4
    assert [row["step"] for row in told(first)] == [1, 2, 3, 4]
    (file,) = first.glob("wandb/offline-run-*/*.wandb")
    assert b"model-" in file.read_bytes()  # a name that wandb allows, whatever the folder's


@pytest.mark.parametrize("mark", ["", "{}", "[]", '{"id": 1, "told": null, "open": ".."}', "open"])
def test_a_damaged_mark_makes_a_new_run_there_and_deletes_nothing(
    mark: str, tmp_path: Path
) -> None:
    saved = log_steps(make_log(tmp_path, wandb="offline"), 3)
    file = tmp_path / "wandb.json"
    outside = json.loads(file.read_text()) | {"open": "offline-run-/../.."}
    file.write_text(json.dumps(outside) if mark == "open" else mark)
    before = len(list(tmp_path.glob("wandb/offline-run-*")))
    log_steps(make_log(tmp_path, saved, wandb="offline"), 5)
    assert (tmp_path / "metrics.jsonl").exists()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == before + 1
    steps = sorted(row["step"] for row in told(tmp_path))
    assert steps == ([1, 2, 3, 4, 5] if mark == "open" else [1, 1, 2, 2, 3, 3, 4, 5])


def test_online_then_killed_then_offline_is_a_new_run_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = log_steps(make_log(tmp_path, wandb="offline"), 4)
    mark = json.loads((tmp_path / "wandb.json").read_text())
    (tmp_path / "wandb.json").write_text(json.dumps(mark | {"open": "online"}))
    shutil.rmtree(tmp_path / "wandb")  # what was told went to the server
    log_steps(make_log(tmp_path, saved, wandb="offline"), 6)
    assert [row["step"] for row in told(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] != mark["id"]


@pytest.mark.parametrize(
    "broken", ["login", "init", "define_metric", "log", "log_artifact", "finish", "Table", "no key"]
)
def test_a_failing_wandb_never_ends_a_run(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = []

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no\nnetwork")

    def init(mode: str, **kwargs: Any) -> Any:
        modes.append(mode)
        if mode == "online" and broken == "init":
            fail()
        return run

    names = ("define_metric", "log", "finish", "log_artifact")
    run = types.SimpleNamespace(**{n: (lambda *a, **k: None) for n in names}, summary={}, dir="a/b")
    wandb = types.SimpleNamespace(
        init=init,
        login=lambda prompt: broken != "no key",
        teardown=lambda: None,
        Table=lambda *args: None,
    )
    if broken in ("login", "Table"):
        setattr(wandb, broken, fail)
    elif hasattr(run, broken):
        setattr(run, broken, fail)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "step_000001").mkdir()
    (tmp_path / "step_000001" / "meta.json").touch()
    log = make_log(tmp_path, wandb="online", wandb_artifact=True)
    with log:
        log.samples("b", ["a"], [["b"]])
    log_steps(log, 3)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    assert "wandb" in capsys.readouterr().out
    if broken in ("login", "init", "no key"):
        assert modes[-1] == "offline"  # nothing is lost


def test_a_network_that_is_gone_makes_it_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setitem(tracking.TIMEOUTS, "init_timeout", 2)
    monkeypatch.setattr("wandb.login", lambda prompt: True)  # it would wait for ten seconds
    log_steps(make_log(tmp_path, wandb="online"), 3)
    assert "wandb sync" in capsys.readouterr().out
    assert [row["step"] for row in told(tmp_path)] == [1, 2, 3]
