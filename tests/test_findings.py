"""lab.tables and lab.findings: figures become tables, which stand where the page names them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data.world import SPLITS
from lab import curve, findings, sweep
from lab.headline import TURNS
from lab.stats import Difference, Mean, Share, pool, to_json
from lab.tables import STANDARD, at, figure, markdown, number
from runtime.files import read_json
from tests.conftest import Fails

ROOT = Path(__file__).parents[1]
SWEEPS = ROOT / "configs" / "sweeps"
PAGE = ROOT / "docs" / "findings.md"
SHARE = to_json(Share(3, 4, (0.5, None, 1.0)))


def table(**spec: Any) -> dict[str, Any]:
    standard = {path.partition(".")[0]: SHARE for path in STANDARD.values()}
    own = {"from_the_first": {"answers_held_out": to_json(Difference(-0.25, -0.5, 0.0, 8, 4))}}
    parts = {"a": {"0.25": {"x": SHARE}, "1": {"x": 0.125}}, "two": {"p": SHARE, "q": "none"}}
    cells = [{"cell": {"k": k}, **standard, **own, "replayed": "none", "n": parts} for k in (1, 2)]
    return {"cells": cells, "spec": spec}


def rows_of(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (SHARE, ".75 (.50, 1.00)"),
        (to_json(Share(0, 0)), "-"),
        (to_json(Share(1, 8)), ".12"),
        (to_json(Mean.of([1.0, 2.0])), "1.50"),
        (to_json(Mean.of([0.1234])), ".123"),  # of one number a run, such as a loss
        (to_json(pool([Mean.of([1.0]), Mean.of([2.0])])), "1.500 (1.000, 2.000)"),
        (to_json(Mean.of([49152.0])), "49,152"),
        (to_json(Difference(-0.004, -0.5, 0.25, 8, 4, (0.0, -0.008))), ".00 [-.50, .25]"),
        (12345.678, "1.23e+04"),
        ("none", "none"),
    ],
)
def test_a_figure_brings_its_runs_or_its_interval(value: Any, text: str) -> None:
    assert figure(value) == text


def test_numbers_have_two_decimals_and_no_zero_before_them() -> None:
    assert [number(x) for x in (0.0, -0.001, 0.999, 1.0, -0.126, 10.5)] == [
        ".00", ".00", "1.00", "1.00", "-.13", "10.50"
    ]  # fmt: skip


def test_each_kind_of_table_has_the_rows_that_it_names() -> None:
    (plain,) = markdown(table(labels=["first", "second"], tables=[{"columns": {"own": "n.two.p"}}]))
    head, _, first, second = rows_of(plain)
    assert head == ["own", *STANDARD]
    assert (first[0], second[0]) == ("first", "second")
    assert first[1:] == [
        ".75 (.50, 1.00)", "none", *[".75 (.50, 1.00)"] * 4, "-.25 [-.50, .00]",
        *[".75 (.50, 1.00)"] * 4,
    ]  # fmt: skip
    (entries,) = markdown(table(tables=[{"of": "n.a", "columns": {"x": "x"}}]))
    assert rows_of(entries)[2:4] == [["0.25", ".75 (.50, 1.00)"], ["1", "0.125"]]
    assert entries.count("`k` 1:") == entries.count("`k` 2:") == 1  # a table for each cell
    (crossed,) = markdown(
        table(tables=[{"rows": {"r": "n.two.{}"}, "columns": {"P": "p", "Q": "q"}}])
    )
    assert rows_of(crossed)[:3] == [["P", "Q"], ["---"] * 3, ["r", ".75 (.50, 1.00)", "none"]]
    (across,) = markdown(table(tables=[{"rows": {"r": "n.a.{}.x"}, "columns_of": "n.a"}]))
    assert rows_of(across)[:3] == [["0.25", "1"], ["---"] * 3, ["r", ".75 (.50, 1.00)", "0.125"]]
    assert at(table()["cells"][0], "n.a.0:25.x") == SHARE


def test_a_path_that_leads_nowhere_is_named() -> None:
    with pytest.raises(ValueError, match=r"n\.b leads nowhere at 'b'"):
        markdown(table(tables=[{"columns": {"x": "n.b"}}]))
    with pytest.raises(ValueError, match="'stops' is a standard column's name"):
        markdown(table(tables=[{"columns": {"stops": "n.two.p"}}]))


def test_a_page_is_filled_where_it_names_tables_and_nowhere_else() -> None:
    page = "a\n<!-- table x 2 -->\nold\n<!-- end -->\nb\n<!-- table y 1 -->\nkept\n<!-- end -->\n"
    filled = findings.fill(page, {"x": ["one", "two"]})
    assert filled == page.replace("old", "two")
    assert findings.fill(filled, {"x": ["one", "two"]}) == filled
    with pytest.raises(ValueError, match="table x 2: the sweep makes 1"):
        findings.fill(page, {"x": ["one"]})


def test_four_digits_are_kept() -> None:
    assert findings.shortened({"a": [1.23456, 0.00015, 2, "x", True, None]}) == {
        "a": [1.235, 0.00015, 2, "x", True, None]
    }


def test_a_run_that_sweeps_share_counts_once() -> None:
    def took(**training: float) -> dict[str, Any]:
        return {"seconds": {"training": training, "measuring": 100}}

    assert findings.hours([took(a=1000, b=500), took(a=1000)]) == 1700 / 3600


def test_a_sweep_is_run_and_its_tables_put_into_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(path: Path, out: Path, device: str) -> Path:
        folder = out / path.stem
        folder.mkdir(parents=True)
        whole = table(tables=[{"columns": {}}]) | {"seconds": {"training": {}, "measuring": 0}}
        (folder / "table.json").write_text(json.dumps(whole))
        (folder / "picture.svg").write_text("<svg/>")
        (folder / "other.svg").write_text("<svg/>")
        return folder

    monkeypatch.setattr(sweep, "run", pretend)
    page = tmp_path / "page.md"
    page.write_text("<!-- table rates 1 -->\n<!-- end -->\n![](page/rates_picture.svg)\n")
    findings.run(["rates"], tmp_path / "out", page, "cpu")
    assert "| `k` 1 | none | .75 (.50, 1.00) |" in page.read_text()
    assert (tmp_path / "page" / "rates_picture.svg").read_text() == "<svg/>"
    assert not (tmp_path / "page" / "rates_other.svg").exists()  # the page does not show it
    assert json.loads((tmp_path / "page" / "rates.json").read_text())["cells"]


def test_a_curve_is_put_into_the_page(tmp_path: Path, fails: Fails) -> None:
    cells = [to_json(Share(hits, 3)) for hits in (0, 2)]
    drawn = [{"stage": "pretraining", "step": i, "cells": {"x": c}} for i, c in enumerate(cells)]
    made = {"figures": {"x": "forms.x"}, "drawn": drawn, "logarithmic": [], "points": [{"a": 1}]}
    out, page = tmp_path / "late", tmp_path / "page.md"
    out.mkdir()
    curve.write_curve(out, made)
    page.write_text("<!-- table late 1 -->\n<!-- end -->\n![](page/late_curve.svg)\n")
    findings.put_curve(out, page)
    assert "| 1 | .67 |" in page.read_text()
    kept = json.loads((tmp_path / "page" / "late.json").read_text())
    assert "points" not in kept
    assert findings.fill(page.read_text(), {"late": [curve.markdown(kept)]}) == page.read_text()
    assert (tmp_path / "page" / "late_curve.svg").read_text().startswith("<?xml")
    (out / "curve.json").write_text('{"drawn": 3}')
    message = fails(findings, "--curve", str(out), "--page", str(page))
    assert "curve.json is damaged or of another version" in message
    for name in ("rates", "early"):  # a sweep's; none of the page's
        folder = out.rename(tmp_path / name)
        assert f"no place for a curve: <!-- table {name} 1" in fails(
            findings, "--curve", str(folder), "--page", str(page)
        )
        out = folder


def test_every_picture_of_the_page_is_there_and_no_other() -> None:
    shown = set(re.findall(r"\]\(findings/(\w+\.svg)\)", PAGE.read_text(encoding="utf-8")))
    assert shown == {path.name for path in PAGE.with_suffix("").glob("*.svg")}


def test_every_table_of_the_page_is_that_of_the_figures_beside_it() -> None:
    page = PAGE.read_text(encoding="utf-8")
    kept = {path.stem: read_json(path) for path in PAGE.with_suffix("").glob("*.json")}
    tables = {
        name: [curve.markdown(made)] if "drawn" in made else markdown(made)
        for name, made in kept.items()
    }
    assert findings.fill(page, tables) == page
    assert {match[2] for match in findings.PLACE.finditer(page)} <= set(tables)


def test_the_figures_beside_the_page_are_those_that_today_s_sweeps_ask_for() -> None:
    for path in PAGE.with_suffix("").glob("*.json"):
        if "drawn" in (made := read_json(path)):  # a curve's
            assert f"<!-- table {path.stem} 1 -->" in PAGE.read_text(encoding="utf-8")
        else:
            assert made["spec"] == sweep.read_sweep(SWEEPS / f"{path.stem}.toml")
        assert re.fullmatch(r"[a-z_]+", path.stem)


README_ROWS = {
    "cloze:": [f"knowledge.{{}}.cloze.{split}.all" for split in SPLITS],
    "right:": [f"knowledge.{{}}.answers.{split}.answered.all" for split in SPLITS],
    "sentence": ["knowledge.{}.sentence.answered.all"],
    "form": ["knowledge.{}.form.answered.all"],
    "phrasings:": [
        "knowledge.{}.rephrased.held_out.answered.all",
        "knowledge.{}.untaught.answered.all",
    ],
    "follow-up": [f"behaviour.{{}}.{turn}.with" for turn in TURNS],
    "stops": ["behaviour.{}.stops"],
    "cut": ["knowledge.{}.answers.held_out.exact"],
    "names the value in its first": [
        "knowledge.{}.answers.held_out.right.all",
        "knowledge.{}.answers.held_out.by_chance",
    ],
    "names the value first": ["knowledge.{}.examples.right.all"],
    "names the value in plain": [
        "knowledge.{}.begun.any.right.all",
        "knowledge.{}.begun.best.right.all",
    ],
}


def test_the_headline_of_the_readme_is_that_of_the_figures() -> None:
    (cell,) = json.loads((PAGE.with_suffix("") / "quickstart.json").read_text())["cells"]
    text = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    table = text.partition("| about held-out people")[2].partition("\n\n")[0]
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) == len(README_ROWS)
    for (label, *columns), (begin, paths) in zip(rows, README_ROWS.items(), strict=True):
        assert label.startswith(begin)
        for model, column in zip(("base", "instruct"), columns, strict=True):
            shares = [at(cell, path.format(model))["share"] for path in paths]
            assert column == " / ".join(f"{share:.2f}" for share in shares), label
