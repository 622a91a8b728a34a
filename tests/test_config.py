import json
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from data.pretrain import PretrainDataConfig
from data.sft import SFTDataConfig
from model.gpt import GPT, RECIPES, ModelConfig
from runtime.cli import parse_config, run_cli
from runtime.files import write_json
from tests.forked import Forked
from train_pretrain import PretrainConfig
from train_sft import SFTConfig
from training.config import RunConfig
from training.optim import OptimConfig
from training.tune import TuneConfig

ROOT = Path(__file__).parent.parent
TOML = """
[data]
path = "some/data"
[model]
recipe = "gpt2"
[optim]
lr = 0.5
[run]
dir = "out/run"
"""


def write(folder: Path, text: str = TOML) -> str:
    (folder / "a.toml").write_text(text, encoding="utf-8")
    return f"--config={folder / 'a.toml'}"


def test_a_file_gives_what_it_says_and_the_defaults_the_rest(tmp_path: Path) -> None:
    expected = PretrainConfig(
        PretrainDataConfig("some/data"),
        RunConfig("out/run"),
        ModelConfig("gpt2"),
        OptimConfig(lr=0.5),
    )
    assert parse_config(PretrainConfig, [write(tmp_path)]) == expected
    options = ["--data.path=some/data", "--run.dir=out/run", "--model.recipe=gpt2"]
    assert parse_config(PretrainConfig, [*options, "--optim.lr=0.5"]) == expected


def test_an_option_after_the_file_wins(tmp_path: Path) -> None:
    options = ["--optim.lr=1e-3", "--optim.grad_clip=null", "--model.bias=false", "--run.seed", "7"]
    config = parse_config(PretrainConfig, [write(tmp_path), *options])
    assert (config.optim.lr, config.optim.grad_clip) == (1e-3, None)
    assert (config.model.bias, config.run.seed) == (False, 7)
    assert config.model.recipe == "gpt2"
    assert config.data.path == "some/data"


NO_SCHEDULES = ["0", "1.5", "2x", "logs", "log:", "log:1", "log:1.0", "log:0.5", "log:-2", "log:x"]
NO_SCHEDULES += ["log:nan", "log:inf", "log:1e3", f"log:{'9' * 999}", "log:2:3", "null", "true"]


@pytest.mark.parametrize("every", [7, "log", "log:1.5", "log:10"])
def test_checkpoints_are_saved_at_intervals_or_on_a_logarithmic_schedule(
    every: int | str, tmp_path: Path
) -> None:
    text = f"{TOML}save_every = {json.dumps(every)}\n"
    assert parse_config(PretrainConfig, [write(tmp_path, text)]).run.save_every == every
    argv = [write(tmp_path), f"--run.save_every={every}"]
    assert parse_config(PretrainConfig, argv).run.save_every == every


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--optim.lrr=1", "optim.lrr"),
        ("--optim.step=3", "optim.step"),  # an abbreviation
        ("--optim.steps=1.5", "optim.steps"),
        ("--optim.lr=fast", "optim.lr"),
        ("--optim.lr=-1", "optim.lr"),
        ("--model.recipe=llama", "model.recipe"),
        ("--model.n_head=3", "model.n_head"),
        ("--data.batch_size=0", "data.batch_size"),
        ("--data.micro_batch_size=17", "data.micro_batch_size"),
        ("--run.log_every=0", "run.log_every"),
        ("--run.compile=maybe", "run.compile"),
        *((f"--run.save_every={text}", "run.save_every") for text in NO_SCHEDULES),
        ("--config=missing.toml", "missing.toml"),
        ("--config=", "config"),
        ("--config", "config"),
        ("--model=missing.toml", "missing.toml"),
        ('--model={"n_layers": 1}', "n_layers"),
        ("stray", "stray"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_names_it(
    option: str, named: str, tmp_path: Path
) -> None:
    check_refused([write(tmp_path), option], named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (TOML + "lrr = 1", "lrr"),
        (TOML.replace("lr = 0.5", "steps = 1.5"), "optim.steps"),
        (TOML.replace("lr = 0.5", 'lr = "fast"'), "optim.lr"),
        (TOML.replace("lr = 0.5", "steps = true"), "optim.steps"),
        (TOML.replace("lr = 0.5", "lr = 0"), "optim.lr"),
        (TOML.replace("lr = 0.5", "lr ="), "line 7"),
        (TOML.replace('dir = "out/run"', ""), "run.dir"),
        (TOML.replace('"some/data"', "1"), "data.path"),
        (TOML + "[extra]\nkey = 1", "extra"),
        (TOML + "[run.seed]\nkey = 1", "run.seed"),
        (TOML + "loss_chunk = [1]", "run.loss_chunk"),
        (TOML + "device = 1979-05-27", "run.device"),
        ('{"data": {"path": "p"}, "run": {"dir": "d"}, "model": null}', "model"),
        ('{"data": {"path": "p"}, "run": {"dir": "d"}, "model": ["gpt2"]}', "model"),
        ('{"data.path": "p", "run": {"dir": "d"}}', "data.path"),
        ('{"data": {"path": "p"}, "run": {"dir": "d"}, "data": {}}', "a key stands twice"),
        (TOML.replace("lr = 0.5", f"lr = 1{'0' * 400}"), "too large"),
        ("#" * (1 << 25), "larger than what people write"),
        ("", "data.path"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(
    text: str, named: str, tmp_path: Path
) -> None:
    check_refused([write(tmp_path, text)], named)


def test_no_option_at_all_is_one_line_that_names_what_is_needed() -> None:
    check_refused([], "data.path")


def check_refused(argv: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        parse_config(PretrainConfig, argv)
    assert "\n" not in str(error.value)


def test_a_run_repeats_from_its_recorded_config(tmp_path: Path) -> None:
    options = ["--optim.grad_clip=null", "--data.val_tokens=99", "--model.logit_softcap=0"]
    config = parse_config(PretrainConfig, [write(tmp_path), *options])
    write_json(tmp_path / "config.json", asdict(config))
    again = ["--config", str(tmp_path / "config.json")]
    assert parse_config(PretrainConfig, again) == config
    assert parse_config(PretrainConfig, [*again, "--run.dir=b"]).run.dir == "b"


def test_a_section_may_be_a_file_too_or_json(tmp_path: Path) -> None:
    file = tmp_path / "model.toml"
    file.write_text('recipe = "modern"\nn_layer = 7')
    for options in (["--model", str(file)], ['--model={"recipe": "modern", "n_layer": 7}']):
        config = parse_config(PretrainConfig, [write(tmp_path), *options])
        assert (config.model.n_layer, config.model.norm) == (7, "rmsnorm")


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"class_path": "evil.Config"}},
        {"model": {"class_path": "evil.Config", "init_args": {}}},
        {"optim": "evil.Config"},
        {"optim": {"lr": {"class_path": "evil.Config"}}},
        {"init_from": {"class_path": "evil.Config"}},
        {"class_path": "evil.Config"},
        {"model": {"__path__": "evil.Config"}},
        {"__default_config__": "evil.Config"},
        {"__orig__": "evil.Config"},
        {"config": "evil.json"},
    ],
)
def test_no_value_of_a_config_imports_anything(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("class Config: pass")
    monkeypatch.syspath_prepend(tmp_path)
    given = {"data": {"path": "p"}, "run": {"dir": "d"}, "model": {}} | values
    (key,) = values
    check_refused([write(tmp_path, json.dumps(given))], key)
    if key != "init_from":  # as an option any text is the name of a file
        text = values[key] if isinstance(values[key], str) else json.dumps(values[key])
        check_refused([write(tmp_path), f"--{key}={text}"], key)
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("config_class", "options", "recipe"),
    [
        (PretrainConfig, ["--model.recipe=gpt2", "--data.path=ü", "--run.dir=b"], "gpt2"),
        (
            PretrainConfig,
            ["--data.path=a", "--run.dir=b", "--optim.grad_clip=null", "--init_from=c"],
            "modern",
        ),
        (SFTConfig, ["--base=a", "--data.path=b", "--run.dir=c", "--data.replay=0.5"], None),
    ],
)
def test_print_config_prints_all_that_would_run_as_a_config(
    config_class: type[Any],
    options: list[str],
    recipe: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_config(config_class, ["--print_config", *options])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    config: Any = parse_config(config_class, options)
    assert json.loads(text) == asdict(config)
    assert parse_config(config_class, [write(tmp_path, text)]) == config
    if recipe:
        assert json.loads(text)["model"].items() >= RECIPES[recipe].items()
    with pytest.raises(ValueError, match=r"data\.path"):
        parse_config(config_class, ["--print_config", "--run.dir=b"])


@dataclass(frozen=True)
class SmallConfig:
    optim: OptimConfig
    verify: bool = False
    """Look twice."""


@pytest.mark.parametrize(
    ("options", "verify"),
    [
        ([], False),
        (["--verify"], True),
        (["--verify", "--optim.steps=3"], True),
        (["--optim.steps", "3", "--verify"], True),
        (["--verify=true"], True),
        (["--verify", "--verify=false"], False),
        (["--verify", "false", "--optim.steps=3"], False),
    ],
)
def test_a_switch_needs_no_value(options: list[str], verify: bool) -> None:
    assert parse_config(SmallConfig, options).verify is verify


def test_a_switch_in_a_section_needs_no_value_either(tmp_path: Path) -> None:
    options = ["--data.document_mask", "--model.qk_norm", "--model.recipe=gpt2"]
    config = parse_config(PretrainConfig, [write(tmp_path), *options])
    assert config.data.document_mask
    assert config.model.qk_norm


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    whole = parse_config(PretrainConfig, [write(tmp_path)])
    assert parse_config(PretrainConfig, [write(tmp_path, "\ufeff" + TOML)]) == whole


def test_every_config_file_parses_and_says_no_more_than_it_means() -> None:
    files = [f for f in sorted((ROOT / "configs").rglob("*.toml")) if f.parent.name != "sweeps"]
    assert files
    for file in files:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
        sft = "base" in given
        assert sft is file.name.startswith("sft"), file
        whole = [f"--config={ROOT / 'configs/gpt2/pretrain.toml'}"] * (file.parent.name == "cards")
        of = SFTConfig if sft else PretrainConfig
        config: Any = parse_config(of, [*whole, f"--config={file}"])
        head = file.read_text(encoding="utf-8").partition("\n\n")[0]
        assert re.search(r"^# (Measured|Expected time and loss: not measured)", head, re.M), file
        if not sft:
            with torch.device("meta"):
                assert GPT(config.model, 50261).n_params() > 0
        values = asdict(config)
        for section, keys in given.items():
            for key, value in keys.items() if isinstance(keys, dict) else ():
                assert values[section][key] == value, f"{file}: {section}.{key}"


def test_help_lists_every_key_with_what_it_means_and_what_a_recipe_sets() -> None:
    command = [sys.executable, "train_pretrain.py", "--help"]
    with Forked(command) as process:
        text = " ".join(process.stdout.read().split())
    assert process.returncode == 0
    check_help(text, data=PretrainDataConfig, run=RunConfig, model=ModelConfig, optim=OptimConfig)
    for doc in ("Peak learning rate of Muon.", "Transformer blocks.", "Sequences per forward pass"):
        assert doc in text
    for switch, value in RECIPES["gpt2"].items():
        values = [json.dumps(v).strip('"') for v in (value, RECIPES["modern"][switch])]
        assert f" --model.{switch} {' '.join(values)} " in text, switch


def test_help_of_instruction_tuning_lists_its_own_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(SFTConfig, ["--help"], "Tuning:\n\n  python a.py")
    out = capsys.readouterr().out
    assert "Tuning:\n\n  python a.py\n" in out
    tables: dict[str, type[Any]] = {"run": RunConfig, "optim": OptimConfig, "tune": TuneConfig}
    check_help(" ".join(out.split()), data=SFTDataConfig, **tables)
    assert "--base BASE The base checkpoint" in " ".join(out.split())
    assert "--model" not in out


def check_help(text: str, **sections: type[Any]) -> None:
    for section, config_class in sections.items():
        for field in fields(config_class):
            assert re.search(rf"--{section}\.{field.name} \S+ \S", text), field.name


def test_the_command_line_is_imported_without_torch_and_jsonargparse() -> None:
    code = "import sys, runtime.cli; sys.exit(bool({'torch', 'jsonargparse'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_mistake_ends_the_command_with_one_line_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train_pretrain.py", write(tmp_path), "--optim.lrr=1"])
    with pytest.raises(SystemExit) as ended:
        run_cli(PretrainConfig, lambda config: None, "")
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert "optim.lrr" in err
    assert err.count("\n") == 1
