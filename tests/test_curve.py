"""lab.curve: an instrument's figures over checkpoints, each measured once."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train_sft
from lab import curve
from lab.forms import forms
from lab.pair import Pair, open_pair
from lab.report import INSTRUMENTS
from lab.stats import Share, to_json
from runtime.files import read_meta
from tests.conftest import Fails, pretrain_config
from train_pretrain import main as pretrain
from training.checkpoint import origin_of

Runs = tuple[Path, Path]
FIGURE = "forms.base.bare.hobby.right"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a command line on two questions a figure; returns its curve.json."""

    def run(*arguments: object) -> dict[str, Any]:
        words = [*map(str, arguments), "--questions", "2", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["curve", *words, "--out", str(tmp_path / "out")])
        curve.main()
        made: dict[str, Any] = json.loads((tmp_path / "out" / "curve.json").read_text())
        return made

    return run


class Counted:
    """An instrument that says which steps it was given, counts its calls and may be killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.kill_at = 0, -1
        monkeypatch.setitem(INSTRUMENTS, "forms", (self, 1))

    def __call__(self, pair: Pair, n: int) -> Any:
        self.calls += 1
        if self.calls == self.kill_at:
            raise KeyboardInterrupt
        models = {"base": pair.base, "instruct": pair.instruct}
        return {name: {"step": Share(c.meta["step"], 100)} for name, c in models.items()}


def alone(base: str, instruct: str | None) -> Any:
    """What the instrument finds at one checkpoint."""
    return to_json(forms(open_pair(base, instruct, "cpu", None), 2))


def test_a_curve_is_the_instrument_on_each_checkpoint(
    runs: Runs,
    call: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = call("forms", "--run", *runs)
    steps = [(point["stage"], point["step"]) for point in made["points"]]
    assert steps == [*(("pretraining", s) for s in (4, 8, 12)), ("tuning", 4), ("tuning", 6)]
    for point in made["points"]:
        ((base, *instruct),) = point["checkpoints"]
        expected = alone(base, instruct[0] if instruct else None)
        if point["stage"] == "pretraining":
            assert point["forms"] == {"base": expected["base"]}
        else:
            assert Path(base) == runs[0] / "step_000012"
            assert point["forms"] == expected
    assert made["logarithmic"] == []
    rows = list(csv.DictReader((tmp_path / "out" / "curve.csv").open()))
    drawn = [row["value"] for row in rows if row["figure"] == FIGURE]
    shares = [p["forms"]["base"]["bare"]["hobby"]["right"]["share"] for p in made["points"]]
    assert drawn == [f"{share:.4f}" for share in shares]
    assert (tmp_path / "out" / "curve.svg").read_text().startswith("<?xml")
    assert "| pretraining 4 |" in capsys.readouterr().out


def test_a_killed_curve_measures_only_what_is_missing(
    runs: Runs,
    call: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instrument, out = Counted(monkeypatch), tmp_path / "out"
    command = ("forms", "--run", runs[0], "--figures", "forms.base.step")
    instrument.kill_at = 3
    with pytest.raises(SystemExit, match="130"):
        call(*command)
    assert sorted(path.name for path in out.iterdir()) == ["rows"]
    instrument.kill_at = -1
    made = call(*command)
    assert instrument.calls == 3 + 1  # the killed one again
    before = (out / "curve.json").read_bytes()
    assert call(*command) == made
    assert instrument.calls == 4
    assert (out / "curve.json").read_bytes() == before
    other = call(*command[:3], "--figures", "again=forms.base.step")
    assert instrument.calls == 4
    assert other["points"] == made["points"]
    some = call(*command, "--steps", 12, 4)
    assert some["points"] == made["points"][::2]
    assert instrument.calls == 4
    # A pair is something else than its base alone; what both commands measure is measured once.
    call("forms", "--run", *runs, "--figures", "forms.base.step")
    assert instrument.calls == 4 + 2


def test_each_base_is_tuned_once_and_measured_with_what_became_of_it(
    world_dir: Path,
    call: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = pretrain_config(world_dir, tmp_path / "base", steps=3)
    pretrain(replace(config, run=replace(config.run, save_every="log")))
    text = f'[data]\npath = "{world_dir}"\nbatch_size = 2\n[optim]\nsteps = 2\n'
    (tmp_path / "sft.toml").write_text(f'base = "b"\n{text}[run]\ndir = "d"\ndevice = "cpu"\n')
    script: Any = train_sft
    train_step, steps, kill_at = script.train_step, [0], 4  # in the second of three

    def counted(*args: Any) -> Any:
        steps[0] += 1
        if steps[0] == kill_at:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(script, "train_step", counted)
    monkeypatch.setattr(script, "STOP_WITHIN", 2)
    instrument = Counted(monkeypatch)
    command = ["forms", "--figures", "forms.base.step", "--run", tmp_path / "base"]
    command += ["--tune", tmp_path / "sft.toml"]
    with pytest.raises(SystemExit, match="130"):
        call(*command, "run.seed=3")
    kill_at = -1
    made = call(*command, "run.seed=3")
    assert steps[0] == 4 + 2 + 2  # none of the one that was there, both of each other one
    assert [point["step"] for point in made["points"]] == [1, 2, 3]
    assert made["logarithmic"] == ["pretraining"]
    for point in made["points"]:
        ((base, instruct),) = point["checkpoints"]
        assert Path(base) == tmp_path / "base" / f"step_{point['step']:06d}"
        tuned = read_meta(Path(instruct))
        assert tuned["base"] == origin_of(read_meta(Path(base)))
        assert tuned["config"]["run"]["seed"] == 3
        steps_of = {name: cell["step"]["share"] for name, cell in point["forms"].items()}
        assert steps_of == {"base": point["step"] / 100, "instruct": 0.02}
    assert instrument.calls == 3
    call(*command, "run.seed=3")
    assert steps[0] == 8
    call(*command, "run.seed=4")  # another tuning, in folders of its own
    assert steps[0] == 8 + 6


def test_seeds_are_pooled_where_all_have_a_step(
    runs: Runs,
    call: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed, steps in (("1", (4, 8, 12)), ("2", (4, 12))):
        (tmp_path / seed).mkdir()
        for step in steps:
            name = f"step_{step:06d}"
            (tmp_path / seed / name).symlink_to(runs[0] / name)
    made = call("forms", "--run", tmp_path / "{seed}", "--seeds", 1, 2)
    assert [point["step"] for point in made["points"]] == [4, 12]
    assert "left out: pretraining 8" in capsys.readouterr().out
    one = alone(str(runs[0] / "step_000004"), None)["base"]["bare"]["hobby"]["right"]
    both = made["points"][0]["forms"]["base"]["bare"]["hobby"]["right"]
    assert (both["n"], both["runs"]) == (2 * one["n"], [one["share"]] * 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nothing --run BASE", "no instrument is called nothing; there are knowledge"),
        ("forms --run BASE --figures x.base", "--figures x.base begins with none of forms"),
        ("forms --run BASE --figures forms.instruct", "is not of a base alone"),
        ("forms --run BASE --figures forms.base.bare.hoby", "leads nowhere at 'hoby': there are"),
        ("forms --run BASE --figures forms.base.bare", "has parts: birth_year"),
        ("weights --run BASE", "weights says what tuning changed"),
        ("weights --run BASE INSTRUCT", "weights says what tuning changed"),
        ("forms --run BASE --qa nothing", "forms asks about a world"),
        ("forms --run BASE BASE", "two runs of one kind"),
        ("forms --run .", "is no run with checkpoints"),
        ("forms --run BASE{seed}", "{seed}"),
        ("forms --run BASE --tune no.toml", "no.toml"),
        ("forms --run BASE --tune SFT data.pth=x", "data.pth"),
        ("forms --run BASE --tune SFT base=x", "--tune base=x"),
        ("forms --run BASE --tune SFT data.path=OTHER", "about another world"),
        ("forms --run INSTRUCT --tune SFT", "--tune is for the run of a base"),
        ("forms --run BASE --questions 0", "--questions is 0"),
        ("forms --run BASE --steps 8 7 9", "--steps 7: "),
    ],
)
def test_a_mistake_is_one_line(
    words: str, message: str, runs: Runs, tmp_path: Path, fails: Fails
) -> None:
    (tmp_path / "sft.toml").write_text('base = "b"\n[data]\npath = "d"\n[run]\ndir = "d"\n')
    if "OTHER" in words:
        from data.prepare import prepare_world
        from data.world import WorldConfig

        prepare_world(WorldConfig(people=16, unseen=12, bios=1), tmp_path / "other", "byte", 0.1)
    names = {"BASE": runs[0], "INSTRUCT": runs[1]}
    names |= {"SFT": tmp_path / "sft.toml", "OTHER": tmp_path / "other"}
    for name, path in names.items():
        words = words.replace(name, str(path))
    given = words.split() if "--questions" in words else [*words.split(), "--questions", "1"]
    assert message in fails(curve, *given, "--out", tmp_path / "out", "--device", "cpu")
