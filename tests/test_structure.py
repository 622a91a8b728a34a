"""The shape of the code base: floors, no copies, no dangerous calls."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    p
    for p in ROOT.rglob("*.py")
    if not {".venv", "tests", "out", "build"} & set(p.relative_to(ROOT).parts)
)
# From the ground up: a module imports from its own floor and from those below.
FLOORS = (
    ("model",),
    ("runtime",),
    ("data",),
    ("training",),
    ("hf",),
    ("train_pretrain", "train_sft", "sample", "convert"),
    ("lab",),
    ("bench",),
)
SCRIPTS = FLOORS[5]
OF_DATA_FOR_TRAINING = ("data.chat", "data.tokenizer", "data.prepare", "data.sources.read")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def floor_of(module: str) -> int | None:
    """Its place in FLOORS; None for what is not ours."""
    room = module.split(".")[0]
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), None)


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, also inside of functions and for type checkers."""
    modules = {module_of(p) for p in SOURCES}
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= inside or {node.module}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_only_point_down(path: Path) -> None:
    mine = floor_of(module_of(path))
    assert mine is not None
    for module in imports_of(path):
        floor = floor_of(module)
        assert floor is None or floor <= mine, module
        if mine == floor_of(SCRIPTS[0]):
            assert floor != mine, f"{module}: scripts do not import each other"
        if module_of(path).startswith("training.") and module.startswith("data."):
            assert module in OF_DATA_FOR_TRAINING, module  # it knows of no batches but `Batch`
        if mine == 0 and floor is None:
            assert module.split(".")[0] in {"torch", *sys.stdlib_module_names}, module


def test_no_module_imports_itself_over_others() -> None:
    imports = {module_of(path): imports_of(path) for path in SOURCES}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in imports.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    done = set[str]()
    for module in imports:
        visit(module, ())


def n_lines(path: Path | str) -> int:
    return len((ROOT / path).read_text().splitlines())


# What a researcher reads to know all of the mechanics, in this order; README begins with it.
READING_PATH = (
    *("train_pretrain.py", "model/gpt.py", "model/seen.py", "training/step.py"),
    *("training/optim.py", "data/pretrain.py", "data/chat.py", "data/sft.py", "train_sft.py"),
    "model/generate.py",
)


def test_the_reading_path_stays_a_half_hour_long() -> None:
    assert sum(map(n_lines, READING_PATH)) <= 1550
    assert n_lines("train_pretrain.py") <= 100
    assert n_lines("train_sft.py") <= 125
    assert n_lines("model/gpt.py") <= 340


def test_each_room_keeps_its_size() -> None:
    sizes: dict[str, int] = {}
    for path in SOURCES:
        room = module_of(path).split(".")[0]
        sizes[room] = sizes.get(room, 0) + n_lines(path)
    assert sizes["bench"] <= 900
    # Of these some 600 hold against faults and hostile input: test_faults.py, test_fuzz.py.
    # 5,891 before pairs of transformers (400), tuning's switches (130) and shared weights (90).
    assert sum(size for room, size in sizes.items() if room not in ("lab", "bench")) <= 6453


def test_readme_opens_its_file_map_with_the_reading_path_and_its_true_lines() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^(\S+\.py) +(\d+) ", text.partition("## The files")[2], re.M)
    assert rows == [(path, str(n_lines(path))) for path in READING_PATH]
    total = sum(map(n_lines, READING_PATH))
    assert f"{total:,} lines" in text.partition("## The files")[2]


def test_preparing_data_and_mistakes_on_the_command_line_need_no_torch() -> None:
    code = "import sys, data.prepare, runtime.cli, runtime.files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


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
