"""The shape of the code base: floors, no copies, no dangerous calls."""

from __future__ import annotations

import ast
import re
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    p
    for p in ROOT.rglob("*.py")
    if not {".venv", "tests", "out", "build"} & set(p.relative_to(ROOT).parts)
)
OURS = (
    "model",
    "data",
    "training",
    "lab",
    "bench",
    "train_pretrain",
    "train_sft",
    "sample",
    "convert",
)
GROUND = ("model", "data.tokenizer", "data.chat", "data.files")
FLOORS = [
    # modules of this floor, and what of ours they may import
    (GROUND, GROUND),
    (("data",), ("data", "model")),
    (("training",), (*GROUND, "training")),
    (("train_pretrain", "train_sft", "sample", "convert"), ("model", "data", "training")),
    (("lab", "bench"), OURS),
]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def inside(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_only_point_down(path: Path) -> None:
    module = module_of(path)
    allowed = next(allowed for modules, allowed in FLOORS if inside(module, modules))
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    bad = {m for m in imported if inside(m, OURS) and not inside(m, allowed)}
    assert not bad
    if inside(module, ("data.tokenizer", "data.chat", "data.files")):
        assert not any(inside(m, ("torch",)) for m in imported)


def code_lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line and not re.match(r"(from|import) |#", line)]


def test_no_nine_lines_stand_twice() -> None:
    length = 9
    for a, b in combinations(SOURCES, 2):
        one, other = (
            {tuple(lines[i : i + length]) for i in range(len(lines) - length + 1)}
            for lines in (code_lines(a), code_lines(b))
        )
        assert not one & other, f"{a.name} and {b.name} share {next(iter(one & other))}"


def test_nothing_loads_pickles_or_runs_text_as_code() -> None:
    danger = re.compile(r"pickle\.load|weights_only\s*=\s*False|allow_pickle\s*=\s*True|\bexec\(")
    for path in SOURCES:
        text = path.read_text()
        assert not danger.search(text), path
        assert not re.search(r"(?<![.\w])eval\(", text), path
