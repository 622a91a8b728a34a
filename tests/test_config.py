import re
import subprocess
import sys
import tomllib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from data.pretrain import PretrainDataConfig
from model.gpt import GPT, ModelConfig
from runtime.cli import parse_config, run_cli
from runtime.files import write_json
from train_pretrain import PretrainConfig
from train_sft import SFTConfig
from training.optim import OptimConfig
from training.run import RunConfig

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
        ("--config=missing.toml", "missing.toml"),
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


def test_every_config_file_parses_and_says_no_more_than_it_means() -> None:
    files = [f for f in sorted((ROOT / "configs").rglob("*.toml")) if f.parent.name != "sweeps"]
    assert files
    for file in files:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
        sft = "base" in given
        assert sft is file.name.startswith("sft"), file
        config: Any = parse_config(SFTConfig if sft else PretrainConfig, [f"--config={file}"])
        head = file.read_text(encoding="utf-8").partition("\n\n")[0]
        assert re.search(r"^# (Measured|Expected time and loss: not measured)", head, re.M), file
        if not sft:
            with torch.device("meta"):
                assert GPT(config.model, 50261).n_params() > 0
        values = asdict(config)
        for section, keys in given.items():
            for key, value in keys.items() if isinstance(keys, dict) else ():
                assert values[section][key] == value, f"{file}: {section}.{key}"


def test_help_lists_every_key_with_what_it_means() -> None:
    command = [sys.executable, "train_pretrain.py", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = " ".join(result.stdout.split())
    sections = {
        "data": PretrainDataConfig,
        "run": RunConfig,
        "model": ModelConfig,
        "optim": OptimConfig,
    }
    for section, config_class in sections.items():
        for field in fields(config_class):
            assert re.search(rf"--{section}\.{field.name} \S+ \S", text), field.name
    for doc in ("Peak learning rate of Muon.", "Transformer blocks.", "Sequences per forward pass"):
        assert doc in text


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
