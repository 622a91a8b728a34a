"""lab.report: what it writes, prints and refuses, and how the page looks in a real browser. What it
has measured makes the shipped sweeps' tables too.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from data.world import ATTRIBUTES, SPLITS
from lab import headline, report, sweep
from lab.curve import check_figures
from lab.exposures import exposures
from lab.facts import public_facts
from lab.figures import PLOTS, instrument_plots
from lab.pair import Pair, open_pair
from lab.qa import strangers_to
from lab.stats import difference, pool, to_json
from lab.tables import DEFAULTS, markdown, named_cells

SWEEPS = Path(__file__).parents[1] / "configs" / "sweeps"
Runs = tuple[Path, Path]
SECTIONS = (
    *("table", "replies", "behaviour", "shift", "weights", "bits", "trace", "forgetting"),
    *("limits", "settings"),
)
OF_A_WORLD = ("knowledge", "phrasings", "forms", "names", "rows", "positions")


@pytest.fixture
def pair(runs: Runs) -> Pair:
    return open_pair(str(runs[0]), str(runs[1]), "cpu", None)


def call(monkeypatch: pytest.MonkeyPatch, runs: Runs, *options: object) -> None:
    pair = ["--base", runs[0], "--instruct", runs[1], *options]
    monkeypatch.setattr(sys, "argv", ["report", *map(str, pair)])
    report.main()


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """What each instrument has found for the report that is `made`, by its name."""
    return {}


@pytest.fixture(scope="module")
def made(runs: Runs, measured: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report about both runs."""
    out = tmp_path_factory.mktemp("report")

    def kept(name: str, instrument: Any) -> Any:
        def measure(pair: Pair, questions: int) -> Any:
            measured[name] = instrument(pair, questions)
            return measured[name]

        return measure

    instruments = {name: (kept(name, f), part) for name, (f, part) in report.INSTRUMENTS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "INSTRUMENTS", instruments)
        patch.setattr("lab.forgetting.RETURN_STEPS", 4)
        patch.setattr("lab.forgetting.RETURN_EVERY", 2)
        call(patch, runs, "--out", out, "--questions", 20)
    return out


def test_the_report_is_made_once_and_then_shown_again(
    made: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads((made / "report.json").read_text())
    page = (made / "report.html").read_text()
    for model in ("base", "instruct"):
        known = found["knowledge"][model]
        assert set(known["cloze"]) == set(known["answers"]) == set(SPLITS)
        assert known["cloze"]["held_out"]["all"]["n"] == 20
        assert {"stops", "follow_up"} <= set(found["behaviour"][model])
    head = found["headline"]
    keys = (
        "cloze_known cloze_held_out cloze_unseen right_known right_held_out right_unseen "
        "bare_held_out sentence_held_out form_held_out phrasings_taught phrasings_untaught "
        "follow_up other_person return_to_first stops"
    ).split()
    for model in ("base", "instruct"):
        assert set(head[model]) == set(keys)
        for key in keys:
            assert {"share", "n", "low", "high"} <= set(head[model][key])
            assert head[model][key]["n"] > 0
    assert (head["replayed"], head["chance"]) == ("all", 0.025)
    assert set(found["by_kind"]) == {a.name for a in ATTRIBUTES}
    assert {"share", "n"} <= set(found["by_kind"]["hobby"])
    assert found["knowledge"]["lint"]["replies"]["n"] > 0
    assert "cloze: instruct - base" in found["knowledge"]["differences"]
    assert "Text was replayed in tuning that leaves nobody out" in page
    assert set(found["seconds"]) == {"prepare", "pretrain", "sft", "compare"}
    assert found["runs"][0]["base"]["config"]["run"]["seed"] == 1
    assert {"commit", "torch", "device", "decoding", "questions"} <= set(found["settings"])
    monkeypatch.setattr(report, "make_report", None)  # would fail if it were called
    call(monkeypatch, runs, "--out", made, "--questions", 20)
    printed = capsys.readouterr().out
    assert "follow-up" in printed
    assert "Text was replayed in tuning that leaves nobody out" in " ".join(printed.split())
    assert str(made / "report.html") in printed
    assert (made / "report.html").read_text() == page


@pytest.fixture(scope="module")
def cell(runs: Runs, made: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """All that a sweep can measure, of the pair that the report is about."""
    pair = open_pair(str(runs[0]), str(runs[1]), "cpu", None)
    assert pair.world is not None
    row = sweep.measure_row(pair, 5, pair.world.by_split["known"], strangers_to(pair.world, 3))
    differences = {key: difference(share, share) for key, share in row.items() if share.flags}
    found = measured | {"exposures": exposures(pair, 5), "facts": public_facts(pair, 5)}
    assert set(found) == set(sweep.INSTRUMENTS) == set(report.INSTRUMENTS)
    return {
        "cell": {},
        "replayed": "none",
        **to_json({"from_the_first": differences} | row | found),
    }


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_table_can_be_made(path: Path, cell: dict[str, Any]) -> None:
    spec = sweep.read_sweep(path)
    asked = {*spec.get("instruments", {})}
    found = {key: value for key, value in cell.items() if key not in {*sweep.INSTRUMENTS} - asked}
    cells = [found | {"cell": of} for of in sweep.cells_of(spec)]
    made = markdown({"cells": cells, "spec": spec})
    assert len(made) == len(spec["tables"])
    assert all(text.count("\n| ") > 1 for text in made)
    two = dict(
        itertools.islice(named_cells({"cells": cells, "spec": spec}).items(), 2)
    )  # drawing is slow
    plots = instrument_plots(two)
    assert set(plots) >= asked & set(PLOTS)
    assert all(text.startswith("<?xml") for text in plots.values())


def test_every_default_figure_of_a_curve_is_there(cell: dict[str, Any]) -> None:
    assert set(DEFAULTS) == set(report.INSTRUMENTS)
    paths = [f"{name}.{path}" for name, paths in DEFAULTS.items() for path in paths]
    check_figures(cell, {path: path for path in paths})


def test_a_sweep_that_asks_for_no_table_shows_what_its_instruments_found(
    cell: dict[str, Any],
) -> None:
    spec = {"instruments": {"behaviour": 4}, "labels": ["one", "two"]}
    (made,) = markdown({"cells": [cell, cell], "spec": spec})
    head, _, *rows = made.splitlines()
    assert set(DEFAULTS["behaviour"]) == {
        name.strip().removeprefix("behaviour.") for name in head.split("|") if "behaviour." in name
    }
    assert [row.split("|")[1].strip() for row in rows] == ["one", "two"]


def test_a_run_of_a_sweep_has_its_own_part_of_what_its_cell_pooled(cell: dict[str, Any]) -> None:
    one = {"share": 0.5, "n": 4, "low": 0.1, "high": 0.9}
    cells = [{"cell": {"a": i}, "x": one | {"runs": [0.25, 0.75]}, "y": one} for i in (1, 2)]
    table = {"cells": cells, "spec": {"seeds": [7, 9]}}
    assert sweep.of_run(table, {"cell": {"a": 2}, "seed": 9}, "x") == 0.75
    assert sweep.of_run(table | {"spec": {"seeds": [7]}}, {"cell": {"a": 1}, "seed": 7}, "y") == 0.5


def test_each_row_of_the_headline_is_the_figure_that_it_names(pair: Pair) -> None:
    numbers = itertools.count()

    def figures(shape: Any) -> Any:
        """The same with a figure of its own at every leaf."""
        if isinstance(shape, dict):
            return {key: figures(part) for key, part in shape.items()}
        return next(numbers)

    cell = dict.fromkeys(("all", *(a.name for a in ATTRIBUTES)), 0)
    answers = {"answered": cell, "right": cell, "exact": 0, "by_chance": 0}
    ways = ("sentence", "form", "untaught", "named", "examples")
    known = {"cloze": dict.fromkeys(SPLITS, cell), "answers": dict.fromkeys(SPLITS, answers)}
    known |= {"rephrased": dict.fromkeys(SPLITS, answers), **dict.fromkeys(ways, answers)}
    known["begun"] = dict.fromkeys(("any", "best"), answers)
    acts = {"stops": 0, **{kind: {"with": 0, "without": 0} for kind in headline.TURNS}}
    models = ("base", "instruct")
    report = figures(
        {"knowledge": dict.fromkeys(models, known), "behaviour": dict.fromkeys(models, acts)}
    ) | {"chance": 0.025}
    found = headline.headline(report, [pair])
    for model in models:
        k, b = report["knowledge"][model], report["behaviour"][model]
        expected = {f"cloze_{split}": k["cloze"][split]["all"] for split in SPLITS}
        expected |= {f"right_{s}": k["answers"][s]["answered"]["all"] for s in SPLITS}
        expected |= {
            "bare_held_out": k["answers"]["held_out"]["answered"]["all"],
            "sentence_held_out": k["sentence"]["answered"]["all"],
            "form_held_out": k["form"]["answered"]["all"],
            "phrasings_taught": k["rephrased"]["held_out"]["answered"]["all"],
            "phrasings_untaught": k["untaught"]["answered"]["all"],
            "follow_up": b["follow_up"]["with"],
            "other_person": b["other_person"]["with"],
            "return_to_first": b["return_to_first"]["with"],
            "stops": b["stops"],
        }
        assert found[model] == expected
        assert found["more"][model] == {
            "exact": k["answers"]["held_out"]["exact"],
            "forced_stop": k["answers"]["held_out"]["right"]["all"],
            "by_chance": k["answers"]["held_out"]["by_chance"],
            "examples": k["examples"]["right"]["all"],
            "begun": k["begun"]["any"]["right"]["all"],
            "begun_best": k["begun"]["best"]["right"]["all"],
        }
    asked = report["knowledge"]["instruct"]["rephrased"]["held_out"]["answered"]
    assert headline.by_kind(report) == {a.name: asked[a.name] for a in ATTRIBUTES}


def test_pairs_that_replayed_different_text_are_refused_before_anything_is_measured(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "INSTRUMENTS", None)  # would fail if it were looked at
    meta = copy.deepcopy(pair.instruct.meta)
    meta["config"]["data"]["replay"] = 0.0
    other = replace(pair, instruct=replace(pair.instruct, meta=meta))
    with pytest.raises(ValueError, match=r"replayed different text \(all, none\)"):
        report.make_report([pair, other], 12)


def test_seeds_are_pooled(
    runs: Runs,
    made: Path,
    measured: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, run in zip(("base", "instruct"), runs, strict=True):
        for seed in "12":
            (tmp_path / seed).mkdir(exist_ok=True)
            (tmp_path / seed / name).symlink_to(run)

    both = (tmp_path / "{seed}/base", tmp_path / "{seed}/instruct")
    pairs = [open_pair(str(runs[0]), str(runs[1]), "cpu", None)] * 2

    def again(name: str) -> Any:  # two seeds that are the same pair, and measured already
        return lambda pair, questions: measured[name]

    instruments = {name: (again(name), part) for name, (_, part) in report.INSTRUMENTS.items()}
    monkeypatch.setattr(report, "INSTRUMENTS", instruments)
    pooled = report.make_report(pairs, 20)
    figure = pooled["knowledge"]["instruct"]["cloze"]["known"]["all"]
    assert figure["n"] == 40
    assert figure["runs"] == [figure["share"]] * 2
    report.write_page(pooled, tmp_path / "page.html")
    assert "2 seeds" in (tmp_path / "page.html").read_text()
    with pytest.raises(SystemExit):
        call(monkeypatch, both, "--out", tmp_path / "out")


@pytest.mark.parametrize("questions", [0, 100_000])
def test_a_number_of_questions_that_cannot_be_is_refused(
    questions: int,
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, runs, "--out", tmp_path, "--questions", questions)
    (error,) = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("note:")]
    assert "--questions" in error
    assert not (tmp_path / "report.json").exists()


def test_salience_is_reported_where_people_were_read_about_unequally_often(
    made: Path, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pair.world is not None
    assert not report.fits("exposures", [pair])
    uneven = copy.copy(pair.world)
    uneven.config = replace(uneven.config, fewest=1)
    assert report.fits("exposures", [replace(pair, world=uneven)])
    found = json.loads((made / "report.json").read_text())
    assert found["exposures"] is None
    assert 'id="exposures"' not in (made / "report.html").read_text()
    path = tmp_path / "report.html"
    found["exposures"] = to_json(pool([exposures(pair, 10)]))
    monkeypatch.setattr("lab.figures.svg", lambda figure: "<svg/>")  # drawn for the page `made`
    report.write_page(found, path)
    assert 'id="exposures"' in path.read_text()


# ---- in a browser ----------------------------------------------------------------------------


class Browser:
    """Opens a page and collects whatever it complains about or asks the network for."""

    def __init__(self, page: Page) -> None:
        self.page, self.complaints = page, list[str]()
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._request)

    def _request(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.complaints.append(f"asks for {request.url}")

    def check(self, path: Path, width: int) -> None:
        """Opens a file and holds it to what any page must keep."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.goto(path.as_uri())
        assert not self.complaints
        overflowing = self.page.evaluate(
            """() => [...document.body.querySelectorAll("*")]
              .filter(e => e.getBoundingClientRect().right > innerWidth + 1
                || e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline")
              .map(e => e.tagName + " " + e.className + " " + e.textContent.slice(0, 40))"""
        )
        assert not overflowing
        broken = self.page.evaluate(
            """() => [...document.querySelectorAll("th")].flatMap(th => {
              const words = document.createTreeWalker(th, NodeFilter.SHOW_TEXT), found = [];
              for (let text; text = words.nextNode();)
                for (const {0: word, index} of text.data.matchAll(/[\\w]+/g)) {
                  const range = document.createRange();
                  range.setStart(text, index); range.setEnd(text, index + word.length);
                  if (range.getClientRects().length > 1) found.push(word);
                }
              return found;
            })"""
        )
        assert not broken
        pictures = self.page.evaluate("[...document.images].map(i => [i.alt, i.naturalWidth])")
        assert all(alt and size > 100 for alt, size in pictures)
        text = self.page.inner_text("body")
        assert not any(word in text for word in ("None", "nan", "undefined", "{{", "%}"))


@pytest.mark.parametrize("width", [1280, 768, 360])
def test_the_page_is_whole_at_any_width(made: Path, browser: Any, width: int) -> None:
    opened = Browser(browser.new_page())
    opened.check(made / "report.html", width)
    for section in (*SECTIONS, *OF_A_WORLD):
        assert opened.page.locator(f"h2#{section}").is_visible()
    shown = opened.page.evaluate("[...document.querySelectorAll('figure img')].map(i => i.src)")
    assert len(shown) == len(set(shown)) == 10
    assert opened.page.locator(".strip").count() == 6
    assert opened.page.locator(".replies").count() == 8
    for details in opened.page.locator("details").all():
        details.click()
    assert '"n_embd"' in opened.page.inner_text("body")
    opened.page.close()


def test_a_page_about_any_two_checkpoints_shows_their_text_as_text(
    runs: Runs, tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = "<script>x()</script>"  # would be an error on the console
    qa = [{"question": f"{attack}{i}", "answer": f"<i>{i}"} for i in range(6)]
    (tmp_path / "qa.json").write_text(json.dumps(qa))
    monkeypatch.setattr("lab.forgetting.text_of", lambda base: None)
    call(monkeypatch, runs, "--out", tmp_path, "--questions", 6, "--qa", tmp_path / "qa.json")
    opened = Browser(browser.new_page())
    opened.check(tmp_path / "report.html", 1280)
    assert attack in opened.page.inner_text(".replies >> nth=0")
    for section in SECTIONS:
        assert opened.page.locator(f"h2#{section}").is_visible()
    for section in OF_A_WORLD:
        assert opened.page.locator(f"h2#{section}").count() == 0
    assert opened.page.locator("h2#curves").is_visible()
    text = opened.page.inner_text("body").lower()
    foreign = ("held-out people", "unseen people", "replayed in", "rows above", "phrasings")
    assert not [w for w in foreign if w in text]
