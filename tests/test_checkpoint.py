import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from data.prepare import prepare_text
from data.tokenizer import create_tokenizer
from model.gpt import GPT, RECIPES, ModelConfig
from model.seen import Batch
from runtime.files import (
    checkpoints,
    read_json,
    read_meta,
    resolve_checkpoint,
    write_json,
    write_meta,
)
from training.checkpoint import load_checkpoint, resume, save_checkpoint
from training.optim import OptimConfig, build_optimizers
from training.step import train_step

ROOT = Path(__file__).parent.parent
BYTE = create_tokenizer("byte", [])
META = {"kind": "base", "data": {"fingerprint": "a"}, "config": {"data": {}}}
META |= {"prepared": {}, "environment": {}}
METRICS = {"step": 1, "loss": 2.5}
CONFIG = {"optim": {"lr": 0.1, "steps": 9}, "run": {"dir": "out/x", "seed": 1}}
Optimizers = list[torch.optim.Optimizer]
Recipe = Literal["gpt2", "modern"]


def fresh(
    seed: int, recipe: Recipe = "gpt2", optimizer: Literal["adamw", "muon"] = "muon"
) -> tuple[GPT, Optimizers]:
    torch.manual_seed(seed)
    model = GPT(ModelConfig(recipe, 2, 2, 32, 16, dropout=0.2), BYTE.n_vocab)
    return model, build_optimizers(model, OptimConfig(optimizer=optimizer))


def train(model: GPT, optimizers: Optimizers, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        ids = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(step))
        batch = Batch(ids[:, :-1], ids[:, 1:])
        losses.append(train_step(model, optimizers, [batch], step, OptimConfig()).loss)
    return losses


def save(run: Path, step: int = 1, model: GPT | None = None, opt: Optimizers | None = None) -> Path:
    if model is None:
        model, opt = fresh(step)
    return save_checkpoint(run, model, opt or [], BYTE, META, step, METRICS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_comes_back_bit_for_bit_with_all_that_it_needs(
    recipe: Recipe, tmp_path: Path
) -> None:
    model, optimizers = fresh(1, recipe)
    train(model, optimizers, 0, 2)
    path = save(tmp_path, 2, model, optimizers)
    loaded = load_checkpoint(path)
    before, after = model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not loaded.model.training
    tied = loaded.model.lm_head.weight is loaded.model.wte.weight
    assert tied is (recipe == "gpt2")
    assert loaded.model.config == model.config
    assert loaded.tokenizer.fingerprint == BYTE.fingerprint
    assert loaded.meta["step"] == 2
    assert META.items() <= loaded.meta.items()


def test_a_compiled_model_is_saved_under_the_names_of_the_uncompiled(tmp_path: Path) -> None:
    model, _ = fresh(1)
    plain = set(dict(model.named_parameters()))
    model.compile()  # compiles nothing before the first call
    assert load_file(save(tmp_path, 1, model) / "model.safetensors").keys() == plain


@pytest.mark.parametrize("target", ["training.checkpoint.save_file", "torch.save"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_checkpoint_is_whole_or_absent(
    target: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(tmp_path)
    before = contents(tmp_path)

    def fail(value: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(target, fail)
    with pytest.raises(type(error)):
        save(tmp_path, 2)
    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == [older]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".step_000002.0123abcd.tmp"
    stale.mkdir()
    (stale / "junk").write_text("half")
    path = save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [path]
    assert not (path / "junk").exists()


def test_a_checkpoint_that_is_there_is_kept(tmp_path: Path) -> None:
    before = contents(save(tmp_path))
    save(tmp_path, 1, *fresh(7))
    assert contents(tmp_path / "step_000001") == before


def truncate_weights(folder: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def change_tokenizer(folder: Path) -> Path:
    file = folder / "tokenizer.tiktoken"
    file.write_bytes(file.read_bytes().replace(b" 65\n", b" 66\n"))
    return folder


def cut_meta(folder: Path) -> Path:
    file = folder / "meta.json"
    file.write_bytes(file.read_bytes()[:-20])
    return folder


def add_switch(folder: Path) -> Path:
    meta = read_meta(folder)
    write_meta(folder, meta | {"model": meta["model"] | {"n_expert": 8}})
    return folder


def edit_step(folder: Path) -> Path:
    meta = read_json(folder / "meta.json")
    write_json(folder / "meta.json", meta | {"step": 3})
    return folder


def remove_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def foreign_folder(folder: Path) -> Path:
    (folder / "meta.json").unlink()
    return folder


def foreign_meta(folder: Path) -> Path:
    write_json(folder / "meta.json", {"tokenizer": "gpt2"})
    return folder


def prepared_data(folder: Path) -> Path:
    (folder / "a.txt").write_text("to be or not to be " * 9)
    prepare_text([folder / "a.txt"], folder / "data", "byte", 0.2, "text", 1)
    return folder / "data"


def missing(folder: Path) -> Path:
    return folder / "nothing"


def of_transformers(path: Path) -> Path:
    folder = path.parent / "llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    return folder


def named_hf(path: Path) -> Path:
    return Path(f"hf:{path}")


def new_run(folder: Path) -> Path:
    (folder / "run").mkdir()
    write_json(folder / "run" / "config.json", CONFIG)
    return folder / "run"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_weights, r"model\.safetensors has changed"),
        (change_tokenizer, r"tokenizer\.tiktoken has changed"),
        (cut_meta, r"meta\.json is not a JSON file"),
        (add_switch, r"is damaged or of another version \(TypeError: .*n_expert"),
        (edit_step, r"meta\.json was changed"),
        (remove_weights, r"model\.safetensors is missing"),
        (foreign_folder, r"has no meta\.json"),
        (foreign_meta, r"was not written by this project"),
        (prepared_data, r"is not a checkpoint"),
        (missing, r"nothing not found"),
        (new_run, r"is a run without a checkpoint"),
        (of_transformers, r"is a model of transformers; say hf:"),
        (named_hf, r"can be compared, not trained"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused_in_one_line(
    damage: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    path = damage(save(tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_gives_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step)
    (tmp_path / "step_000011").mkdir()  # not ours: ours appear whole
    (tmp_path / ".step_000012.tmp").mkdir()
    assert load_checkpoint(tmp_path).meta["step"] == 10
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert [p.name for p in checkpoints(tmp_path)][-2:] == ["step_999999", "step_1000000"]


@pytest.mark.parametrize(("recipe", "optimizer"), [("gpt2", "muon"), ("modern", "adamw")])
def test_one_step_and_a_resume_and_two_steps_are_three_steps(
    recipe: Recipe, optimizer: Literal["adamw", "muon"], tmp_path: Path
) -> None:
    whole, whole_optimizers = fresh(1, recipe, optimizer)
    losses = train(whole, whole_optimizers, 0, 3)
    rng = torch.get_rng_state()

    model, optimizers = fresh(1, recipe, optimizer)
    assert train(model, optimizers, 0, 1) == losses[:1]
    path = save(tmp_path, 1, model, optimizers)

    model, optimizers = fresh(99, recipe, optimizer)
    assert resume(path, model, optimizers) == METRICS
    assert train(model, optimizers, 1, 3) == losses[1:]
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for ours, theirs in zip(optimizers, whole_optimizers, strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_resume_refuses_a_damaged_state(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *fresh(1))
    (path / "train_state.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"train_state\.pt has changed"):
        resume(path, *fresh(1))


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_checkpoint(f"~/{path.name}").path == path


@pytest.mark.parametrize("broken", ["save_file", "torch.save"])
def test_a_full_disk_is_one_clear_line_with_the_folder(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] \nand a long trace")

    monkeypatch.setattr(f"training.checkpoint.{broken}", full)
    with pytest.raises(OSError, match=r"step_000001 cannot be written: \[enforce") as error:
        save(tmp_path)
    assert "long trace" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_nothing_in_the_source_unpickles() -> None:
    all_files = (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py"))
    files = [p for p in all_files if "tests" not in p.parts]
    assert len(files) > 50
    unsafe = re.compile(
        r"\bpickle\.(?!dumps?\()|from pickle|Unpickler|weights_only=(?!True)|allow_pickle=(?!False)"
        r"|torch\.load\((?!.*weights_only=True)|np\.load\((?!.*allow_pickle=False)"
    )
    for file in files:
        text = re.sub(r"\(\s+", "(", file.read_text(encoding="utf-8"))
        found = unsafe.search(text)
        assert found is None, f"{file}: {found}"


def test_half_a_layer_is_one_line(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(resolve_checkpoint(runs[0]), tmp_path / "step_000012")
    meta = read_meta(folder)
    meta["model"]["n_layer"] = 1.5
    write_meta(folder, meta)
    with pytest.raises(ValueError, match="step_000012 is damaged: 'float' object"):
        load_checkpoint(folder)
