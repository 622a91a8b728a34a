"""lab.sweep: grids that are resumable, share what they can, and end in one table."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from data.prepare import prepare_text
from lab import curve, figures, sweep
from lab.stats import Share
from tests.conftest import TINY
from training.checkpoint import read_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"

SPEC = f"""
about = "a tiny sweep"
seeds = [1, 2]
questions = 12
[world]
people = 24
unseen = 12
bios = 2
[pretrain]
config = "{CONFIGS}/quickstart/pretrain.toml"
"optim.steps" = 3
"data.batch_size" = 2
"model.n_embd" = {TINY.n_embd}
"model.n_layer" = 1
"run.device" = "cpu"
[sft]
config = "{CONFIGS}/quickstart/sft.toml"
"optim.steps" = 2
"data.batch_size" = 2
"run.device" = "cpu"
"""
GRID = '[grid]\n"sft.data.examples" = [4, 8]\n'


class Counted:
    """A script's main that counts its optimizer steps and may be killed."""

    def __init__(self, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.kill_at = 0, -1
        train_step = script.train_step

        def counted(*args: Any) -> Any:
            self.steps += 1
            if self.steps == self.kill_at:
                raise KeyboardInterrupt
            return train_step(*args)

        monkeypatch.setattr(script, "train_step", counted)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> tuple[Counted, Counted]:
    import train_pretrain
    import train_sft

    return Counted(train_pretrain, monkeypatch), Counted(train_sft, monkeypatch)


def write(folder: Path, text: str, name: str = "tiny") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_a_killed_sweep_goes_on_and_a_finished_one_rests(
    tmp_path: Path, counts: tuple[Counted, Counted]
) -> None:
    base, tuned = counts
    spec, out = write(tmp_path, SPEC + GRID), tmp_path / "out"
    tuned.kill_at = 6  # in the third of four runs of two steps
    with pytest.raises(KeyboardInterrupt):
        sweep.run(spec, out, "cpu")
    assert not (out / "tiny").exists()
    tuned.kill_at = -1
    folder = sweep.run(spec, out, "cpu")
    # One base a seed, shared by both cells; the interrupted run began again or went on.
    assert base.steps == 2 * 3
    assert tuned.steps == 4 * 2 + 2
    table = json.loads((folder / "table.json").read_text())
    assert [(r["cell"]["sft.data.examples"], r["seed"]) for r in table["runs"]] == [
        (4, 1), (4, 2), (8, 1), (8, 2)
    ]  # fmt: skip
    for cell in table["cells"]:
        figure = cell["answers_held_out"]
        assert figure["n"] == 24
        own = [r["answers_held_out"] for r in table["runs"] if r["cell"] == cell["cell"]]
        assert figure["runs"] == [r["share"] for r in own]
        assert cell["replayed"] == "none"
        assert cell["from_the_first"]["right_sentence_held_out"]["n"] == 24
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert {row["replayed"] for row in rows} == {"none"}
    assert [row["seed"] for row in rows] == ["1", "2", "1", "2"]
    assert (folder / "picture.svg").read_text().startswith("<?xml")
    before = (folder / "table.json").read_text()
    sweep.run(spec, out, "cpu")
    assert (base.steps, tuned.steps) == (6, 10)
    assert (folder / "table.json").read_text() == before


def test_cells_are_compared_where_they_were_asked_the_same(tmp_path: Path) -> None:
    spec = sweep.read_sweep(write(tmp_path, SPEC + GRID))
    cells = sweep.cells_of(spec)
    keys = [*figures.SWEEP_LINES]

    def row(*hits: bool, kind: str = "hobby") -> dict[str, Share]:
        topics = [f"p{i // 2}/{kind if i % 2 else 'employer'}" for i in range(4)]
        return {**dict.fromkeys(keys, Share(1, 2)), "right": Share.of(hits, topics)}

    def compared(*found: dict[str, Share]) -> Any:
        runs = [
            sweep.Measured(cell, 1, None, text, row)
            for cell, text, row in zip(cells, ("none", "known"), found, strict=True)
        ]
        sweep.write_tables(tmp_path, sweep.table_of(spec, cells, runs))
        return json.loads((tmp_path / "table.json").read_text())["cells"]

    first, second = compared(row(True, False, False, False), row(True, True, True, False))
    assert (first["replayed"], second["replayed"]) == ("none", "known")
    assert first["from_the_first"]["right"]["difference"] == 0.0
    changed = second["from_the_first"]["right"]
    assert (changed["difference"], changed["n"], changed["clusters"]) == (0.5, 4, 2)
    assert set(second["from_the_first"]) == {"right"}  # of the others nobody knows what was asked
    # The same people, asked about something else: no pairs.
    _, second = compared(row(True, True, True, True), row(*[True] * 4, kind="birthplace"))
    assert not second["from_the_first"]


def test_ctrl_c_in_a_run_saves_it_and_stops_the_sweep(
    tmp_path: Path, counts: tuple[Counted, Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_pretrain

    script: Any = train_pretrain
    counted = script.train_step

    def interrupted(*args: Any) -> Any:
        if counts[0].steps == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return counted(*args)

    monkeypatch.setattr(script, "train_step", interrupted)
    spec = write(tmp_path, SPEC + GRID)
    with pytest.raises(SystemExit, match="130"):
        sweep.run(spec, tmp_path / "out", "cpu")
    assert (counts[0].steps, counts[1].steps) == (2, 0)
    assert len(list((tmp_path / "out").rglob("step_000002"))) == 1
    sweep.run(spec, tmp_path / "out", "cpu")
    assert counts[0].steps == 2 * 3  # not one step was taken twice


def test_stages_that_are_asked_for_are_run_and_shared(
    tmp_path: Path, counts: tuple[Counted, Counted]
) -> None:
    base, _ = counts
    cells = """
    [more]
    "optim.lr" = 1e-4
    [[cells]]
    "more.optim.steps" = 0
    [[cells]]
    "more.optim.steps" = 2
    [[cells]]
    "more.optim.steps" = 2
    "qa.strangers" = 0.5
    "qa.dont_know" = true
    [[cells]]
    "more.optim.steps" = 0
    "qa2.forms" = ["sentence"]
    "sft2.optim.steps" = 1
    """
    text = SPEC.replace("seeds = [1, 2]", "seeds = [1]") + "\n".join(
        line.strip() for line in cells.splitlines()
    )
    folder = sweep.run(write(tmp_path, text), tmp_path / "out", "cpu")
    assert base.steps == 3 + 2
    spec = sweep.read_sweep(tmp_path / "tiny.toml")
    plans = [
        sweep.make_plan(tmp_path / "out", sweep.settings_of(spec, cell), 1)
        for cell in sweep.cells_of(spec)
    ]
    tunings = [plan.tunings[-1][1] for plan in plans]
    assert len({plan.pretrain.run.dir for plan in plans}) == 1
    assert len({tuning.run.dir for tuning in tunings}) == 4
    assert plans[0].more is None
    assert tunings[0].base == plans[0].pretrain.run.dir
    assert plans[1].more is not None
    assert plans[1].more.init_from == plans[1].pretrain.run.dir
    assert tunings[1].base == plans[1].more.run.dir
    asked = Path(tunings[2].data.path).read_text()
    assert asked.count('" I do not know."') > asked.count("\n") / 4
    assert plans[3].tunings[0][1] == tunings[0]
    assert tunings[3].tune.init == tunings[0].run.dir
    assert (tunings[3].base, tunings[3].optim.lr) == (tunings[0].base, tunings[0].optim.lr)
    assert read_checkpoint(tunings[3].run.dir)[1]["step"] == 1
    cell = {"qa.asked": 0.5, "sft2.optim.lr": 0.01}  # the same questions again
    both = sweep.make_plan(tmp_path / "out", sweep.settings_of(spec, cell), 1).tunings
    assert [qa for qa, _ in both] == [{"asked": 0.5}] * 2
    assert len({c.data.path for _, c in both}) == 1 < len({c.run.dir for _, c in both})
    asked = Path(tunings[3].data.path).read_text()
    replies = [json.loads(line)["messages"][-1]["content"] for line in asked.splitlines()]
    assert min(len(reply.split()) for reply in replies) > 3  # sentences alone
    assert (folder / "picture.svg").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[grid]\n"data.examples" = [4]\n', "data.examples does not begin with a stage"),
        ('[gird]\n"sft.data.examples" = [4]\n', "unknown gird"),
        ('[grid]\n"sft.data.exampels" = [4]\n', "exampels"),
        ('[grid]\n"sft.data.examples" = [4, -1]\n', "data.examples is -1"),
        ('[grid]\n"world.poeple" = [4]\n', "poeple"),
        ('[grid]\n"qa.stangers" = [0.5]\n', "stangers"),
        ('[grid]\n"qa.strangers" = [1.5]\n', "strangers is 1.5"),
        ('[grid]\n"qa.asked" = [0.0]\n', "nobody to ask"),
        ('[grid]\n"world.people" = [24, 4]\n', "questions = 12, but world.people=4 has 5 facts"),
        ('[grid]\n"sft.data.examples" = 4\n', "the values on a grid are a list"),
        ('[grid]\n"sft.run.seed" = [1, 2]\n', "sft.run.seed is the sweep's own to set"),
        ('[grid]\n"more.init_from" = ["x"]\n', "more.init_from is the sweep's own to set"),
        ('[grid]\n"qa.asked" = [0.1]\n', "questions = 12, but qa.asked=0.1 has 10 facts"),
        ('[cells]\n"sft.data.examples" = 4\n', "[[cells]]"),
        (f'[grid]\n"sft.optim.lr" = {[*range(99)]}\n"sft.optim.beta2" = {[*range(99)]}', "9,801"),
        (GRID.replace("[grid]", "labels = 2\n[grid]"), "labels"),
        ("[grid\n", "tiny.toml"),
        ('[grid]\n"pretrain.optim.lr" = [2020-01-01]\n', "date"),
        ("about = 5\n" + GRID, "about"),
        ("[[tables]]\ncolumns = {a = 5}\n", "columns"),
        ("[[tables]]\nrows = 5\n", "rows"),
        ("[[tables]]\nof = 5\n", "of = 5"),
    ],
)
def test_a_mistake_is_one_line_before_anything_trains(
    text: str,
    message: str,
    tmp_path: Path,
    counts: tuple[Counted, Counted],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path, SPEC + text)
    monkeypatch.setattr(sys, "argv", ["sweep", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        sweep.main()
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert counts[0].steps == 0


def test_what_a_sweep_writes_follows_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "sweep_plot", lambda table: "<svg/>")
    monkeypatch.setattr(sweep, "instrument_plots", lambda cells: {})
    (tmp_path / "mine").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    names = ("table.json", "table.csv", "tables.md", "picture.svg")
    for name in names:
        (out / name).symlink_to(tmp_path / "mine")
    run = {"cell": {}, "seed": 1, "replayed": "none"}
    sweep.write_tables(out, {"cells": [], "spec": {}, "runs": [run]})
    assert (tmp_path / "mine").read_text() == "mine"
    assert not any((out / name).is_symlink() for name in names)


def test_a_device_that_is_not_there_is_told_before_anything_trains(
    tmp_path: Path, counts: tuple[Counted, Counted]
) -> None:
    with pytest.raises(ValueError, match="device 'fpga' is not available"):
        sweep.run(write(tmp_path, SPEC), tmp_path / "out", "fpga")
    assert counts[0].steps == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.toml")), ids=lambda p: p.stem)
def test_the_shipped_sweeps_are_whole(path: Path, tmp_path: Path) -> None:
    spec = sweep.read_sweep(path)
    cells = sweep.cells_of(spec)
    assert len(cells) > 1 or spec["instruments"]
    assert spec["tables"]
    assert not set(spec["seeds"]) & {1, 2}  # on which settings were chosen
    for cell in cells:
        sweep.make_plan(tmp_path, sweep.settings_of(spec, cell), 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seeds = []", "seeds"),
        ("seeds = 1", "seeds"),
        ("seeds = [1, 1]", "twice"),
        (f"seeds = {[*range(2000)]}", "at most 1000"),
        ("questions = 0", "questions = 0"),
    ],
)
def test_seeds_and_questions_must_be_usable(line: str, message: str, tmp_path: Path) -> None:
    key = line.split(" ")[0]
    text = "\n".join(line if old.startswith(f"{key} =") else old for old in SPEC.splitlines())
    with pytest.raises(ValueError, match=message):
        sweep.read_sweep(write(tmp_path, text))


def test_a_place_depends_on_what_a_config_says_and_not_on_its_name(tmp_path: Path) -> None:
    plans = []
    for name, old, new in (
        ("a", "", ""),
        ("b", "# nothing", "# changed"),
        ("c", "log_every = 50", "log_every = 5"),
    ):
        config = (CONFIGS / "quickstart" / "sft.toml").read_text() + "# nothing\n"
        (tmp_path / f"{name}.toml").write_text(config.replace(old, new) if old else config)
        text = SPEC.replace(f"{CONFIGS}/quickstart/sft.toml", str(tmp_path / f"{name}.toml"))
        spec = sweep.read_sweep(write(tmp_path, text, "spec"))
        plans.append(sweep.make_plan(tmp_path, sweep.settings_of(spec, {}), 1))
    assert plans[0] == plans[1]
    assert plans[0].pretrain == plans[2].pretrain
    assert plans[0].stages["sft"].run.dir != plans[2].stages["sft"].run.dir


# ---- on somebody's own text --------------------------------------------------------------------

OWN = f"""
seeds = [1, 2]
questions = 3
[pretrain]
config = "{CONFIGS}/quickstart/pretrain.toml"
"data.path" = "TEXT"
"optim.steps" = 3
"run.eval_every" = 2
"data.batch_size" = 2
"model.n_embd" = {TINY.n_embd}
"model.n_layer" = 1
"run.device" = "cpu"
[sft]
config = "{CONFIGS}/quickstart/sft.toml"
"data.path" = "QUESTIONS"
"optim.steps" = 2
"data.batch_size" = 2
"run.device" = "cpu"
"""
RATES = '[grid]\n"pretrain.optim.muon_lr" = [0.01, 0.02]\n'
ALONE = OWN.partition("[sft]")[0]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared text and a Q&A file."""
    folder = tmp_path_factory.mktemp("own")
    line = "The whale is a large animal of the sea, and no fish. It breathes air like a man.\n"
    (folder / "text.txt").write_text(line * 300)
    prepare_text([folder / "text.txt"], folder / "text", "byte", 0.1, "text", 1)
    rows = [{"question": f"What is whale {n}?", "answer": "An animal."} for n in range(40)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def on(own: Path, text: str) -> str:
    """A sweep's file on that text and Q&A."""
    return text.replace("TEXT", str(own / "text")).replace("QUESTIONS", str(own / "qa.jsonl"))


def metrics_of(folder: Path, stage: str, **keys: float) -> dict[str, Any]:
    """The last row of the one run of a stage that has these values in its config."""
    found = []
    for run in (folder / "runs").glob(f"{stage}-*"):
        config = json.loads((run / "config.json").read_text())
        if all(config["run" if key == "seed" else "optim"][key] == v for key, v in keys.items()):
            found.append(run)
    (run,) = found
    last: dict[str, Any] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return last


def test_a_sweep_on_own_text_tells_what_its_runs_logged(
    own: Path,
    tmp_path: Path,
    counts: tuple[Counted, Counted],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = write(tmp_path, on(own, OWN + RATES)), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["sweep", str(path), "--out", str(out), "--device", "cpu"])
    sweep.main()
    printed = capsys.readouterr().out
    assert (counts[0].steps, counts[1].steps) == (4 * 3, 4 * 2)
    assert not [*(out / "runs").glob("world-*")]
    table = json.loads((out / "tiny" / "table.json").read_text())
    for run in table["runs"]:
        rate = run["cell"]["pretrain.optim.muon_lr"]
        base = metrics_of(out, "pretrain", muon_lr=rate, seed=run["seed"])
        for key in ("val_loss", "val_bpb", "tokens"):
            assert run[f"pretrain_{key}"]["mean"] == base[key]
        assert run["stops"]["n"] == 3
    tuned = [
        json.loads((f / "metrics.jsonl").read_text().splitlines()[-1])
        for f in (out / "runs").glob("sft-*")
    ]
    for key in ("val_loss", "stop_rate"):
        told = sorted(run[f"sft_{key}"]["mean"] for run in table["runs"])
        assert told == sorted(row[key] for row in tuned)
    first = table["cells"][0]["sft_val_loss"]
    assert first["runs"] == [run["sft_val_loss"]["mean"] for run in table["runs"][:2]]
    markdown = (out / "tiny" / "tables.md").read_text()
    assert markdown.strip() in printed
    assert "sft_val_loss" in markdown
    rows = list(csv.DictReader((out / "tiny" / "table.csv").open()))
    assert float(rows[0]["sft_val_loss"]) == pytest.approx(first["runs"][0], abs=1e-4)
    assert (out / "tiny" / "picture.svg").read_text().startswith("<?xml")
    before = (out / "tiny" / "table.json").read_bytes()
    sweep.main()
    assert (counts[0].steps, counts[1].steps) == (12, 8)
    assert (out / "tiny" / "table.json").read_bytes() == before


def test_a_sweep_of_pretraining_alone_may_vary_the_text(
    own: Path, tmp_path: Path, counts: tuple[Counted, Counted]
) -> None:
    other = own / "other"
    prepare_text([own / "text.txt"], other, "bpe:300", 0.1, "text", 1)
    texts = f'[[cells]]\n"pretrain.data.path" = "{own / "text"}"\n[[cells]]\n'
    spec = on(own, ALONE.replace("[1, 2]", "[1]") + texts) + f'"pretrain.data.path" = "{other}"\n'
    folder = sweep.run(write(tmp_path, spec), tmp_path / "out", "cpu")
    assert (counts[0].steps, counts[1].steps) == (2 * 3, 0)
    cells = json.loads((folder / "table.json").read_text())["cells"]
    assert cells[0]["pretrain_val_bpb"] != cells[1]["pretrain_val_bpb"]
    assert "stops" not in cells[0]
    assert (folder / "picture.svg").exists()


def test_instruments_that_need_no_world_are_asked_on_own_text(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = OWN.replace("[1, 2]", "[1]") + "[instruments]\nbehaviour = 2\nfacts = 2\n"
    folder = sweep.run(write(tmp_path, on(own, text)), tmp_path / "out", "cpu")
    made = (folder / "tables.md").read_text()
    assert "| behaviour.base.stops |" in made
    assert "| facts.instruct.chat.first.right.all |" in made
    head, row = list(csv.reader((folder / "table.csv").open()))
    assert 0 <= float(row[head.index("behaviour.instruct.stops")]) <= 1
    tables = '[[tables]]\nonly = true\ncolumns = {echoes = "behaviour.instruct.echoes"}\n'
    folder = sweep.run(write(tmp_path, on(own, text + tables)), tmp_path / "out", "cpu")
    assert "| echoes |" in (folder / "tables.md").read_text()
    (base,) = (tmp_path / "out" / "runs").glob("pretrain-*")
    alone = ("facts", "--run", base, "--out", tmp_path / "curve", "--questions", 2)  # and no Q&A
    monkeypatch.setattr(sys, "argv", ["curve", *map(str, alone)])
    curve.main()
    assert "facts.base.cloze.first.right.all" in (tmp_path / "curve" / "curve.csv").read_text()


def test_public_facts_are_not_asked_of_an_invented_world(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="facts are public ones"):
        sweep.read_sweep(write(tmp_path, SPEC + "[instruments]\nfacts = 2\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN + "[world]\npeople = 24\n", "world.people: this sweep is on the text"),
        (OWN + '[grid]\n"qa.asked" = [0.5]\n', "qa.asked: this sweep is on the text"),
        (OWN + "[instruments]\nknowledge = 2\n", "knowledge asks about a world"),
        (ALONE + "[instruments]\nbehaviour = 2\n", "behaviour needs an instruct model"),
        (OWN.replace('"data.path" = "QUESTIONS"', ""), "sft.data.path is needed for every cell"),
        (OWN.replace('"data.path" = "TEXT"', ""), "sft.data.path is the sweep's own to set"),
        (ALONE + '[grid]\n"sft2.optim.steps" = [2]\n', "sft.data.path is needed for every cell"),
        (
            OWN.replace('"data.path" = "TEXT"', "")
            + '[[cells]]\n"pretrain.data.path" = "TEXT"\n[[cells]]\n"pretrain.optim.lr" = 0.1\n',
            "pretrain.data.path is needed for every cell",
        ),
        (OWN.replace("TEXT", "nowhere"), "nowhere"),
        (OWN.replace("QUESTIONS", "nowhere.jsonl"), "nowhere.jsonl not found"),
        (OWN + '[grid]\n"pretrain.base" = ["x"]\n', "pretrain.base is the sweep's own to set"),
    ],
)
def test_a_mistake_about_own_text_is_one_line(
    text: str, message: str, own: Path, tmp_path: Path, counts: tuple[Counted, Counted], fails: Any
) -> None:
    path = write(tmp_path, on(own, text))
    assert message in fails(sweep, path, "--out", tmp_path / "out")
    assert counts[0].steps == 0


def test_the_shipped_sweep_on_own_text_is_whole(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = sweep.read_sweep(CONFIGS / "books" / "sweeps" / "own_text.toml")
    assert sweep.on_own_text(spec)
    (tmp_path / "configs").symlink_to(CONFIGS)
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "data").symlink_to(own / "text")
    (tmp_path / "qa.jsonl").symlink_to(own / "qa.jsonl")
    monkeypatch.chdir(tmp_path)
    for cell in sweep.cells_of(spec):
        plan = sweep.make_plan(tmp_path, sweep.settings_of(spec, cell), 1)
        assert list(plan.stages) == ["pretrain", "sft"]
