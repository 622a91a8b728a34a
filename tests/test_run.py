"""A run's folder: what it goes on from, what it refuses, and when it saves, evaluates and stops."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from dataclasses import asdict, field, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import train_sft
from data.pretrain import PretrainDataConfig
from data.sft import SFTDataConfig
from data.tokenizer import create_tokenizer
from model.gpt import GPT, ModelConfig
from runtime.cli import parse_config
from runtime.files import lock, read_meta, write_json
from train_pretrain import PretrainConfig
from train_sft import SFTConfig
from training.checkpoint import save_checkpoint
from training.config import RunConfig, changes, differences
from training.optim import OptimConfig, build_optimizers
from training.run import PREPARED_QA, Run, find_checkpoint
from training.step import StepResult

BYTE = create_tokenizer("byte", [])
ORIGIN = {"data": {"fingerprint": "a"}}
TINY = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8)


def make_config(folder: Path, steps: int = 9, **run: Any) -> PretrainConfig:
    run_config = RunConfig(str(folder), device="cpu", **run)
    return PretrainConfig(
        PretrainDataConfig("unused"), run_config, TINY, OptimConfig(steps, lr=0.1)
    )


def save(run: Path, step: int, config: Any = ()) -> Path:
    meta = {"kind": "base", "prepared": {}, "environment": {}, **ORIGIN}
    meta["config"] = asdict(make_config(run)) if config == () else config
    return save_checkpoint(run, GPT(TINY, BYTE.n_vocab), [], BYTE, meta, step, {"step": step})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make_run(folder: Path, **options: Any) -> Run:
    """A run that is ready to train."""
    config = make_config(folder, **options)
    run, model = Run("base", config), GPT(TINY, BYTE.n_vocab)
    run.made_from({}, **ORIGIN)
    run.resume(model, build_optimizers(model, config.optim), BYTE)
    return run


def result(step: int) -> StepResult:
    return StepResult(step, 0.1, 64, 2.0, 1.5)


def follow(run: Run, interrupted_at: int | None = None) -> list[str]:
    """What the loop of the scripts does at each step, training left out."""
    done = []
    ended = pytest.raises(SystemExit, match="143") if interrupted_at else contextlib.nullcontext()
    with ended, run:
        for step in run.steps():
            if run.must_save(step):
                run.save(step)
                done.append(f"save {step}")
            if run.must_evaluate(step):
                done.append(f"evaluate {step}")
            run.log.write(step, {})
            if run.must_stop(step):
                break
            run.log.add(result(step + 1))
            run._signals.number = signal.SIGTERM * (step + 1 == interrupted_at)
    return done


def test_a_run_saves_and_evaluates_at_its_intervals_and_at_the_end(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_every": 4, "eval_every": 3}
    assert follow(make_run(tmp_path / "a", steps=9, **options)) == [
        *("evaluate 3", "save 4", "evaluate 6", "save 8", "save 9", "evaluate 9"),
    ]
    assert follow(make_run(tmp_path / "b", steps=0, **options)) == ["save 0"]
    interrupted = follow(make_run(tmp_path / "c", steps=9, **options), interrupted_at=6)
    assert interrupted == ["evaluate 3", "save 4", "save 6"]  # saved at once, not evaluated first
    resumed = make_run(tmp_path / "c", steps=9, **options)
    assert resumed.first_step == 6
    assert follow(resumed) == ["evaluate 6", "save 8", "save 9", "evaluate 9"]


@pytest.mark.parametrize("interrupted_at", [*range(1, 11)])
def test_a_logarithmic_schedule_saves_its_steps_also_across_a_resume(
    interrupted_at: int, tmp_path: Path
) -> None:
    due = ["save 1", "save 2", "save 4", "save 8", "save 11"]
    options: dict[str, Any] = {"save_every": "log", "eval_every": 100, "steps": 11}
    first = follow(make_run(tmp_path, **options), interrupted_at)
    second = follow(make_run(tmp_path, **options))
    own = [f"save {interrupted_at}"]  # a signal saves where it stops
    assert first == [*(s for s in due if int(s[5:]) < interrupted_at), *own]
    assert [s for s in second if s[0] == "s"] == [s for s in due if int(s[5:]) > interrupted_at]


def test_a_run_is_complete_once_its_last_step_is_saved_evaluated_and_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, steps=4)
    assert not Run("base", config).is_complete()
    follow(make_run(tmp_path, steps=4))
    assert not Run("base", config).is_complete()
    with make_run(tmp_path, steps=4) as run:
        run.log.write(4, {"val_loss": 1.0})
    assert "nothing to do" not in capsys.readouterr().out
    assert Run("base", config).is_complete()
    assert "complete at step 4, nothing to do" in capsys.readouterr().out
    (tmp_path / "step_000004").rename(tmp_path / "copy")
    save(tmp_path, 3, asdict(config))
    assert not Run("base", config).is_complete()


def test_a_new_run_begins_anew_also_after_a_start_that_failed(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for run in (tmp_path, tmp_path / "a" / "b"):  # an empty folder, and none
        assert find_checkpoint(run, config) is None
    (tmp_path / ".config.json.tmp").write_text("{")
    (tmp_path / PREPARED_QA).mkdir()
    assert find_checkpoint(tmp_path, config) is None
    write_json(tmp_path / "config.json", {"optim": {"lr": 9}})
    assert find_checkpoint(tmp_path, config) is None  # killed before its first checkpoint


def test_the_same_config_goes_on_from_the_newest_checkpoint_wherever_the_run_is(
    tmp_path: Path,
) -> None:
    save(tmp_path / "old", 3)
    write_json(tmp_path / "old" / "config.json", asdict(make_config(tmp_path / "old")))
    save(tmp_path / "old", 12)
    moved = (tmp_path / "old").rename(tmp_path / "new")
    assert Run("base", make_config(moved)).newest == moved / "step_000012"


def test_a_changed_config_is_refused_with_all_that_differs_before_anything_is_built(
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path)
    write_json(tmp_path / "config.json", asdict(config))
    save(tmp_path, 1)
    before = contents(tmp_path)
    changed = replace(
        config,
        optim=replace(config.optim, lr=0.2, momentum=0.9),
        run=RunConfig(str(tmp_path), seed=2, device="auto"),
        data=PretrainDataConfig("elsewhere", micro_batch_size=2),
    )
    # Whoever edited config.json and gave that, too: the checkpoint knows what it was trained with.
    write_json(tmp_path / "config.json", asdict(changed))
    before["config.json"] = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="another config") as error:
        Run("base", changed)
    for text in ("optim.lr 0.1 -> 0.2", "optim.momentum 0.95 -> 0.9", "run.seed 1 -> 2"):
        assert text in str(error.value)
    for key in ("optim.steps", "run.dir", "run.device", "data.path", "data.micro_batch_size"):
        assert f"{key} " not in str(error.value)  # the same, or what cannot change the result
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "key",
    [
        *("run.dir", "run.device", "run.compile", "run.loss_chunk", "data.micro_batch_size"),
        *("run.wandb", "run.wandb_project", "run.wandb_artifact", "verify", "data.layout"),
        *("base", "init_from", "tune.init", "data.path", "data.replay_path"),
    ],
)
def test_what_alters_no_result_may_change_on_the_way(key: str, tmp_path: Path) -> None:
    data: Any = SFTDataConfig("d")
    configs: list[Any] = [make_config(tmp_path), SFTConfig("b", data, RunConfig(str(tmp_path)))]
    section, _, name = key.rpartition(".")
    found = 0
    for config in configs:
        part = getattr(config, section, None) if section else config
        if not hasattr(part, name):
            continue
        old = asdict(config)
        (old[section] if section else old)[name] = "something else"
        assert changes(old, config) == []
        found += 1
    assert found


def test_a_key_that_an_older_config_lacks_means_its_default(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    recorded = asdict(config)
    for section, key in (("optim", "beta2"), ("run", "log_every"), ("model", "qk_norm")):
        del recorded[section][key]
    del recorded["init_from"]
    assert changes(recorded, config) == []
    other = replace(config, optim=replace(config.optim, beta2=0.5), init_from="x")
    assert changes(recorded, other) == ["optim.beta2 0.95 -> 0.5"]  # init_from may change
    assert changes(
        recorded, replace(config, model=ModelConfig(**asdict(TINY) | {"qk_norm": False}))
    )


def test_adding_a_field_leaves_every_run_on_disk_usable(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", asdict(make_config(tmp_path)))
    save(tmp_path, 1)
    z_loss: list[Any] = [("z_loss", float, field(default=0.0))]
    newer = make_dataclass("NewerOptim", z_loss, bases=(OptimConfig,), frozen=True)
    moe = make_dataclass("Moe", [("experts", int, field(default=1))], frozen=True)
    mixing: list[Any] = [("mixing", list[str], field(default_factory=list))]
    mixing.append(("moe", moe, field(default_factory=moe)))  # a whole table
    newest = make_dataclass("NewestConfig", mixing, bases=(PretrainConfig,), frozen=True)
    old = make_config(tmp_path)

    def today(**options: Any) -> Any:
        return newest(old.data, old.run, old.model, newer(**asdict(old.optim) | options))

    assert find_checkpoint(tmp_path, today()) == tmp_path / "step_000001"
    with pytest.raises(ValueError, match=r"optim\.z_loss 0\.0 -> 0\.1"):
        find_checkpoint(tmp_path, today(z_loss=0.1))


def test_a_key_that_today_lacks_is_a_difference(tmp_path: Path) -> None:
    recorded = asdict(make_config(tmp_path))
    recorded["optim"]["gone"] = 3
    assert changes(recorded, make_config(tmp_path)) == ["optim.gone 3 -> None"]
    recorded["optim"] = {"steps": "many"}  # not even buildable
    assert changes(recorded, make_config(tmp_path))


@pytest.mark.parametrize("recorded", [[], None, 3, "text"])
def test_a_recorded_config_that_is_no_table_is_one_line(recorded: Any, tmp_path: Path) -> None:
    save(tmp_path, 1, recorded)
    with pytest.raises(ValueError, match="is damaged: config is missing"):
        Run("base", make_config(tmp_path))


def test_what_the_same_ctrl_c_has_ended_too_is_no_bug(tmp_path: Path) -> None:
    interrupted, whole = make_run(tmp_path / "r"), make_run(tmp_path / "s")
    interrupted._signals.number = signal.SIGINT
    with pytest.raises(SystemExit, match="130"), interrupted:
        raise RuntimeError("the compiler was interrupted")
    with pytest.raises(RuntimeError, match="a bug"), whole:
        raise RuntimeError("a bug")


def test_differences_name_every_leaf() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert differences(old, {"a": {"b": 1, "c": [1, 2]}, "d": None}) == []
    new = {"a": {"b": 2, "c": [1]}, "e": 5}
    assert differences(old, new) == ["a.b 1 -> 2", "a.c [1, 2] -> [1]", "e None -> 5"]


def test_other_data_than_the_checkpoint_was_made_from_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    write_json(tmp_path / "config.json", asdict(config))
    save(tmp_path, 1)
    run = Run("base", config)
    run.made_from({}, **ORIGIN)
    with pytest.raises(ValueError, match=r"another data .*fingerprint a -> b"):
        run.made_from({}, data={"fingerprint": "b"})
    with pytest.raises(ValueError, match="another base"):
        run.made_from({}, **ORIGIN, base={"step": 3})


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="holds no run"):
            Run("base", make_config(path))
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_prepared_questions_of_a_running_run_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "r" / PREPARED_QA).mkdir(parents=True)
    write_json(tmp_path / "r" / "config.json", {})
    run = Run("instruct", make_config(tmp_path / "r"))
    with lock(tmp_path / "r", "training in"), pytest.raises(ValueError, match="another process"):
        run.prepare_qa("qa.jsonl", tmp_path)
    assert (tmp_path / "r" / PREPARED_QA).is_dir()


def test_a_folder_is_one_runs_from_its_preparing_to_its_end(tmp_path: Path) -> None:
    folder, busy = tmp_path / "r", pytest.raises(ValueError, match="another process is here")
    late = Run("base", make_config(folder))
    with make_run(folder) as run:
        with busy, lock(folder, "here in"):
            pass
        run.save(4)
    with lock(folder, "here in"):
        pass
    model = GPT(TINY, BYTE.n_vocab)
    with pytest.raises(ValueError, match=r"was training in .*; the same command goes on"):
        late.resume(model, [], BYTE)  # it would begin anew what has got to step 4
    failed = make_run(folder)  # before it trains, in this process
    assert make_run(folder).newest == failed.newest


def test_other_questions_for_a_run_with_a_checkpoint_cost_it_nothing(
    runs: tuple[Path, Path], tmp_path: Path, fails: Any
) -> None:
    row = {"question": "Who is it?", "answer": "Somebody."}
    for name in ("a.jsonl", "b.jsonl"):
        lines = [json.dumps(row | {"question": f"{name} {i}?"}) for i in range(30)]
        (tmp_path / name).write_text("\n".join(lines))

    def tune(questions: str, steps: int = 4) -> list[str]:
        run = ["--run.save_every=4", "--run.device=cpu", f"--run.dir={tmp_path / 'run'}"]
        data = [f"--data.path={tmp_path / questions}", "--data.batch_size=4"]
        return [f"--base={runs[0]}", *data, *run, f"--optim.steps={steps}"]

    train_sft.main(parse_config(train_sft.SFTConfig, tune("a.jsonl")))
    made = (tmp_path / "run" / PREPARED_QA / "meta.json").read_bytes()
    assert "c.jsonl not found" in fails(train_sft, *tune("c.jsonl"))
    for gone in (False, True):
        if gone:
            shutil.rmtree(tmp_path / "run" / PREPARED_QA)
        error = fails(train_sft, *tune("b.jsonl"))
        assert "was made from another data" in error
        assert gone or made == (tmp_path / "run" / PREPARED_QA / "meta.json").read_bytes()
        train_sft.main(parse_config(train_sft.SFTConfig, tune("a.jsonl")))
    meta = read_meta(tmp_path / "run" / PREPARED_QA)
    assert meta["request"]["qa"][0]["file"] == "a.jsonl"


def test_a_run_of_another_beginning_is_refused_either_way(tmp_path: Path) -> None:
    began: dict[str, Any] = {"step": 3, "fingerprint": "f"}
    for folder, noted, named in (("a", began, None), ("b", None, began)):
        config = make_config(tmp_path / folder)
        meta = {"kind": "base", **ORIGIN, "init_from": noted, "config": asdict(config)}
        meta |= {"prepared": {}, "environment": {}}
        model = GPT(TINY, BYTE.n_vocab)
        save_checkpoint(tmp_path / folder, model, [], BYTE, meta, 6, {"step": 6})
        config = make_config(tmp_path / folder)
        write_json(tmp_path / folder / "config.json", asdict(config))
        run = Run("base", config)
        run.made_from({}, **ORIGIN, init_from=noted)
        with pytest.raises(ValueError, match=r"another init_from .*init_from .* -> "):
            run.made_from({}, **ORIGIN, init_from=named)
