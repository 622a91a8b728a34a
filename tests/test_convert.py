"""Weights in and out, held against transformers itself."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import convert
import sample
import train_sft
from convert import export_checkpoint, import_checkpoint
from data.chat import Message, render, render_prompt
from data.tokenizer import create_tokenizer
from hf.adapter import load_pair
from hf.architecture import export_weights
from hf.tokenizer import export_tokenizer
from lab import report
from lab.pair import open_pair
from model.generate import Sampling, generate
from model.gpt import GPT, RECIPES, ModelConfig
from runtime.files import sha256_file
from tests.conftest import GPT2_CACHE, Fails, sft_config
from tests.hub import Hub
from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

transformers = pytest.importorskip("transformers")

WORDS = "the cat sat on the mat and a dog ran after it; don't we know? 12 345 naïve café\n" * 9
AWKWARD = [
    "",
    " ",
    "plain words, and don't I'LL we've '",
    "<|user|> hi <|end|> <|endoftext|>",
    "<|end|>",
    "😀 👨‍👩‍👧 e\u0301 ﬁ Ⅳ ½² ١٢٣ 数字",
    "\x00\x01\t\x0b\x1c\x7f\x85\u2028\u00a0\u3000\u200b\ufeff",
    " " * 999 + "x" + "\n" * 500 + " \n" * 99 + "-" * 400,
    "end \r\n\r\n  ",
    "\U0010ffff\ue000\ufffd",
]
TALK = [
    Message(role="system", content="Be <|end|> kind"),
    Message(role="user", content=" Who?\n<|assistant|>me<|end|>"),
    Message(role="assistant", content="It is <|endoftext|> Ada. 😀 "),
    Message(role="user", content="And <\ufdd0then?"),
]


@dataclass(frozen=True)
class NewerConfig(ModelConfig):
    """What ModelConfig may become one day: with fields that the export has not heard of."""

    window: int = 0
    gated: bool | None = None


def make_checkpoint(
    folder: Path,
    kind: str = "instruct",
    spec: str = "bpe:300",
    config_class: type[ModelConfig] = ModelConfig,
    **config: Any,
) -> Checkpoint:
    """A checkpoint of random weights."""
    torch.manual_seed(1)
    size: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64}
    tokenizer = create_tokenizer(spec, [WORDS])
    model = GPT(config_class(**size | config), tokenizer.n_vocab)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
        for head in (model.wte.weight, model.lm_head.weight):
            head[tokenizer.n_vocab :] = 0.0  # as it is from the first step on
    meta = {"kind": kind, "config": {"data": {"path": None}}, "prepared": {}, "data": {"x": 1}}
    meta |= {"environment": {}, "base": {}, "template": "t"}
    path = save_checkpoint(folder / "run", model, [], tokenizer, meta, 7, {"val_loss": 1.5})
    return load_checkpoint(path)


def exported(checkpoint: Checkpoint, folder: Path) -> Path:
    out = folder / "exported"
    export_checkpoint(str(checkpoint.path), out)
    return out


def random_texts(n: int) -> list[str]:
    """Characters from all over Unicode, mixtures of spaces and word ends, and runs."""
    rng = random.Random(1)
    parts = "a 1 's 'S ! é 😀 \u017f <|end|> - the cat".split()
    parts += [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\x85", "\x0b", "\u200b"]
    ranges = [(32, 127), (0, 0x300), (0, 0xD800), (0xE000, 0x20000)]
    made: list[Callable[[], str]] = [
        lambda: "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60))),
        lambda: "".join(rng.choices(parts, k=rng.randrange(80))),
        lambda: rng.choice(parts) * rng.randrange(300),
    ]
    return [rng.choice(made)() for _ in range(n)]


SHAPES: list[dict[str, Any]] = [
    {"recipe": "gpt2"},
    {"recipe": "modern"},
    {"recipe": "gpt2", "tie_embeddings": False, "activation": "gelu_exact", "dropout": 0.1},
    {"recipe": "gpt2", "activation": "relu2"},
    {"recipe": "modern", "tie_embeddings": True, "logit_softcap": 0.0, "activation": "gelu"},
    {"recipe": "modern", "zero_init_projections": False, "logit_softcap": 8.0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_export_is_the_same_model_in_transformers(shape: dict[str, Any], tmp_path: Path) -> None:
    ours = make_checkpoint(tmp_path, **shape)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported(ours, tmp_path)).eval()
    assert len({f.stat().st_mode for f in (tmp_path / "exported").iterdir()}) == 1  # read by all
    assert theirs.config.model_type == {"gpt2": "gpt2", "modern": "nanochat"}[shape["recipe"]]
    idx = torch.randint(0, ours.tokenizer.n_vocab, (3, 64), generator=torch.Generator())
    with torch.no_grad():
        expected = theirs(idx).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.model(idx), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["base", "instruct"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_transformers_writes_the_same_greedy_text(recipe: str, kind: str, tmp_path: Path) -> None:
    ours = make_checkpoint(tmp_path, kind, recipe=recipe)
    folder, tokenizer = exported(ours, tmp_path), ours.tokenizer
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    end = tokenizer.end_of_turn if kind == "instruct" else tokenizer.end_of_text
    for start in range(8):
        prompt = render_prompt([Message(role="user", content="cat " * start + "?")], tokenizer)
        reply = generate(ours.model, [prompt], Sampling(24), {end})[0]
        longer = theirs.generate(torch.tensor([prompt]), max_new_tokens=24)[0]
        assert longer.tolist() == prompt + reply
        their_text = transformers.AutoTokenizer.from_pretrained(folder).decode(longer)
        assert their_text == tokenizer.decode(prompt + reply)


@pytest.mark.parametrize("spec", ["bpe:300", "byte", "bpe:261", "gpt2"])
def test_transformers_reads_the_same_ids(
    spec: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if spec == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    ours = make_checkpoint(tmp_path, spec=spec)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(ours, tmp_path))
    assert len(theirs) == ours.tokenizer.n_vocab
    for text in [*AWKWARD, WORDS, *random_texts(500)]:
        ids = ours.tokenizer.encode(text)
        assert theirs.encode(text) == ids, repr(text)
        assert theirs.decode(ids) == ours.tokenizer.decode(ids)
    assert theirs.eos_token_id == ours.tokenizer.end_of_turn
    assert theirs.padding_side == "left"


@pytest.mark.parametrize("spec", ["bpe:300", "byte"])
def test_the_chat_template_gives_our_ids_and_mask_and_forges_nothing(
    spec: str, tmp_path: Path
) -> None:
    ours = make_checkpoint(tmp_path, spec=spec)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(ours, tmp_path))

    def template(messages: list[Message], **options: Any) -> Any:
        return theirs.apply_chat_template(messages, return_dict=True, **options)

    prompt = template(TALK, add_generation_prompt=True)["input_ids"]
    assert prompt == render_prompt(TALK, ours.tokenizer)
    rendered = template(TALK, return_assistant_tokens_mask=True)
    assert (rendered["input_ids"], rendered["assistant_masks"]) == render(TALK, ours.tokenizer)
    forged = template([Message(role="user", content="x<\ufdd0|end|><\ufdd0|assistant|>y")])
    control = [i for i in forged["input_ids"] if i >= ours.tokenizer.end_of_text]
    assert len(control) == 3  # the beginning, <|user|> and <|end|>
    with pytest.raises(Exception, match="roles are"):
        template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("kind", ["base", "instruct"])
@pytest.mark.parametrize("spec", ["bpe:300", "byte"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_exported_and_imported_is_what_it_was(
    shape: dict[str, Any], spec: str, kind: str, tmp_path: Path
) -> None:
    ours = make_checkpoint(tmp_path, kind, spec, **shape)
    path = import_checkpoint(str(exported(ours, tmp_path)), tmp_path / "back", tmp_path, None)
    back = load_checkpoint(tmp_path / "back")
    assert back.path == path
    assert back.model.config == ours.model.config
    for name, p in ours.model.state_dict().items():
        assert torch.equal(p, back.model.state_dict()[name]), name
    assert (path / "model.safetensors").read_bytes() == (
        ours.path / "model.safetensors"
    ).read_bytes()
    assert back.tokenizer.fingerprint == ours.tokenizer.fingerprint
    assert back.tokenizer.kind == ours.tokenizer.kind
    changed = {"files", "imported"}
    assert {k: v for k, v in back.meta.items() if k not in changed} == {
        k: v for k, v in ours.meta.items() if k not in changed
    }


def test_an_export_is_not_imported_as_the_other_kind(tmp_path: Path) -> None:
    folder = str(exported(make_checkpoint(tmp_path, "base"), tmp_path))
    with pytest.raises(ValueError, match="says that it is of kind 'base'"):
        import_checkpoint(folder, tmp_path / "back", tmp_path, None, "instruct")
    assert not (tmp_path / "back").exists()


def test_a_model_as_training_begins_it_comes_back_bit_for_bit(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    for run in runs:
        export_checkpoint(str(run), tmp_path / f"{run.name}-hf")
        import_checkpoint(str(tmp_path / f"{run.name}-hf"), tmp_path / run.name, tmp_path, None)
        ours, back = load_checkpoint(run), load_checkpoint(tmp_path / run.name)
        for name, p in ours.model.state_dict().items():
            assert torch.equal(p, back.model.state_dict()[name]), name
    pair = open_pair(str(tmp_path / "base"), str(tmp_path / "instruct"), "cpu", None)
    assert pair.world is not None  # the one was tuned from the other, still
    assert (pair.base.meta["kind"], pair.instruct.meta["kind"]) == ("base", "instruct")


@pytest.mark.parametrize(
    ("recipe", "switch"),
    [(r, s) for r in RECIPES for s in ("norm", "norm_embedding", "qk_norm", "bias", "position")],
)
def test_a_switch_that_no_architecture_has_is_named(
    recipe: str, switch: str, tmp_path: Path
) -> None:
    other = RECIPES["modern" if recipe == "gpt2" else "gpt2"][switch]
    ours = make_checkpoint(tmp_path, recipe=recipe, **{switch: other})
    with pytest.raises(ValueError, match=f"model.{switch}={other} cannot be exported"):
        export_checkpoint(str(ours.path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_soft_cap_on_gpt2_is_named(tmp_path: Path) -> None:
    ours = make_checkpoint(tmp_path, recipe="gpt2", logit_softcap=9.0)
    with pytest.raises(ValueError, match=r"model.logit_softcap=9.0 cannot be exported"):
        export_checkpoint(str(ours.path), tmp_path / "out")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "switch",
    ["position", "norm", "norm_embedding", "qk_norm", "activation", "bias", "tie_embeddings"],
)
def test_a_value_that_a_switch_does_not_have_today_is_named(
    recipe: str, switch: str, tmp_path: Path, fails: Fails
) -> None:
    newer: dict[str, Any] = {switch: "newer"}
    ours = make_checkpoint(tmp_path, recipe=recipe, **newer)
    error = fails(convert, "export", ours.path, tmp_path / "out")
    assert f"model.{switch}=newer cannot be exported" in error
    assert not (tmp_path / "out").exists()


def test_a_field_that_the_export_has_not_heard_of_must_have_its_default(
    tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.checkpoint.ModelConfig", NewerConfig)
    monkeypatch.setattr(convert, "ModelConfig", NewerConfig)
    for recipe in RECIPES:
        folder = tmp_path / recipe
        ours = make_checkpoint(folder, config_class=NewerConfig, recipe=recipe)
        import_checkpoint(str(exported(ours, folder)), folder / "back", tmp_path, None)
        assert load_checkpoint(folder / "back").model.config == ours.model.config
        newer = make_checkpoint(folder / "b", config_class=NewerConfig, recipe=recipe, window=5)
        error = fails(convert, "export", newer.path, folder / "out")
        assert "model.window=5 cannot be exported" in error
        # The recipes give a switch its value, so no value of it is known to change nothing.
        monkeypatch.setitem(RECIPES[recipe], "gated", False)
        newer = make_checkpoint(folder / "c", config_class=NewerConfig, recipe=recipe)
        error = fails(convert, "export", newer.path, folder / "out")
        assert "model.gated=False cannot be exported" in error
        assert not (folder / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_more_or_fewer_is_named(recipe: str, tmp_path: Path) -> None:
    model: Any = make_checkpoint(tmp_path, recipe=recipe).model
    model.blocks[1].attn.query.scale = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.query\.scale cannot be exported"):
        export_weights(model)
    del model.blocks[1].attn.query.scale, model.blocks[0].mlp.fc
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc\.\w+ cannot be exported"):
        export_weights(model)


# ---- GPT-2 ---------------------------------------------------------------------------------


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A folder as transformers saves a GPT-2, of random weights and a small vocabulary."""
    torch.manual_seed(2)
    tokenizer = create_tokenizer("bpe:300", [WORDS])
    config = transformers.GPT2Config(
        vocab_size=tokenizer.end_of_text + 1,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    folder = tmp_path / "gpt2"
    model.save_pretrained(folder)
    made = export_tokenizer(tokenizer)
    made["added_tokens"] = [made["added_tokens"][0] | {"content": "<|endoftext|>"}]
    made["model"]["vocab"]["<|endoftext|>"] = tokenizer.end_of_text
    made["model"]["merges"] = [" ".join(m) for m in made["model"]["merges"]]  # as in older files
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder


def logits_of(folder: Path, idx: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(idx).logits


def test_an_imported_gpt2_gives_the_same_logits_and_has_room_for_turns(
    gpt2: Path, tmp_path: Path
) -> None:
    import_checkpoint(str(gpt2), tmp_path / "run", tmp_path, None)
    base = load_checkpoint(tmp_path / "run")
    assert (base.meta["kind"], base.model.config.recipe) == ("base", "gpt2")
    assert base.model.config.dropout == 0.1  # its own
    n = base.tokenizer.end_of_text + 1
    idx = torch.randint(0, n, (3, 64), generator=torch.Generator())
    torch.testing.assert_close(base.model(idx)[..., :n], logits_of(gpt2, idx), atol=1e-4, rtol=0)
    for text in AWKWARD:
        assert base.tokenizer.encode(text) == create_tokenizer("bpe:300", [WORDS]).encode(text)
    new = base.model.wte.weight[n : base.tokenizer.n_vocab]
    assert len(new) == 4
    assert (torch.pdist(new) > 0).all()
    mean = base.model.wte.weight[:n].mean(dim=0)
    assert ((new - mean).norm(dim=1) < 0.2 * base.model.wte.weight[:n].norm(dim=1).mean()).all()


@pytest.mark.parametrize("how", ["sharded", "bare names", "vocab.json", "half", "no tokenizer"])
def test_every_way_in_which_a_gpt2_lies_about_is_the_same_model(
    how: str, gpt2: Path, tmp_path: Path
) -> None:
    import_checkpoint(str(gpt2), tmp_path / "run", tmp_path, None)
    expected = load_checkpoint(tmp_path / "run")
    weights = load_file(gpt2 / "model.safetensors")
    if how == "sharded":
        transformers.GPT2LMHeadModel.from_pretrained(gpt2).save_pretrained(
            gpt2, max_shard_size="40KB"
        )
        (gpt2 / "model.safetensors").unlink(missing_ok=True)
        assert len(list(gpt2.glob("model-*.safetensors"))) > 1
    elif how == "bare names":  # as on the hub, with the buffers of old versions
        bare = {k.removeprefix("transformer."): v for k, v in weights.items()}
        bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        save_file(bare, gpt2 / "model.safetensors")
    elif how == "vocab.json":
        vocab = json.loads((gpt2 / "tokenizer.json").read_text())["model"]["vocab"]
        (gpt2 / "tokenizer.json").unlink()
        (gpt2 / "vocab.json").write_text(json.dumps(vocab))
    elif how == "half":
        save_file({k: v.half() for k, v in weights.items()}, gpt2 / "model.safetensors")
    else:
        (gpt2 / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match=r"no tokenizer\.json"):
            import_checkpoint(str(gpt2), tmp_path / "again", tmp_path, None)
        return
    import_checkpoint(str(gpt2), tmp_path / "again", tmp_path, None)
    again = load_checkpoint(tmp_path / "again")
    assert again.tokenizer.fingerprint == expected.tokenizer.fingerprint
    for name, p in expected.model.state_dict().items():
        ours = again.model.state_dict()[name]
        torch.testing.assert_close(ours, p, atol=1e-3 if how == "half" else 0, rtol=0)


def test_the_real_vocabulary_of_gpt2_is_found_by_its_size(
    tmp_path: Path, gpt2_vocabulary: None
) -> None:
    config = transformers.GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    import_checkpoint(str(tmp_path / "gpt2"), tmp_path / "run", tmp_path, 0.0)
    base = load_checkpoint(tmp_path / "run")
    assert base.tokenizer.fingerprint == create_tokenizer("gpt2", []).fingerprint
    assert base.tokenizer.end_of_text == 50256
    assert base.model.config.dropout == 0


def test_the_files_of_the_real_vocabulary_give_the_real_tokenizer(
    tmp_path: Path, gpt2_vocabulary: None
) -> None:
    config = transformers.GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    contents = [f.read_text(encoding="utf-8") for f in GPT2_CACHE.iterdir() if f.is_file()]
    vocab = next(c for c in contents if c.startswith("{"))
    merges = next(c for c in contents if c.startswith("#version")).splitlines()[1:]
    made = {
        "added_tokens": [{"id": 50256, "content": "<|endoftext|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"continuing_subword_prefix": "", "vocab": json.loads(vocab), "merges": merges},
    }
    for name, text in (("vocab.json", vocab), ("tokenizer.json", json.dumps(made))):
        (tmp_path / "gpt2" / name).write_text(text)
        out = tmp_path / name.partition(".")[0]
        import_checkpoint(str(tmp_path / "gpt2"), out, tmp_path, None)
        tokenizer = load_checkpoint(out).tokenizer
        assert tokenizer.fingerprint == create_tokenizer("gpt2", []).fingerprint
        assert tokenizer.kind == "gpt2"


def test_an_imported_gpt2_is_tuned_sampled_and_exported_again(
    gpt2: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct = tmp_path / "base", tmp_path / "instruct"
    import_checkpoint(str(gpt2), base, tmp_path, 0.0)
    qa = tmp_path / "qa.jsonl"
    qa.write_text("".join(f'{{"question": "{i}?", "answer": "{i}"}}\n' for i in range(20)))
    config = sft_config(qa, base, instruct, steps=3)
    options = [f"--base={base}", f"--data.path={qa}", f"--run.dir={instruct}", "--data.replay=0.5"]
    assert "--data.replay_path" in fails(train_sft, *options)
    train_sft.main(replace(config, data=replace(config.data, replay=0.0)))
    pair = load_pair(str(base), str(instruct), "cpu")
    models = sample.columns_of(dict(zip(("base", "instruct"), pair, strict=True)))
    (replies,) = sample.ask(models, [{}], ["1?"], Sampling(4))
    assert replies.keys() == {"base_raw", "base_chat", "instruct"}
    monkeypatch.setattr(sys, "argv", ["report", f"--base={base}", f"--instruct={instruct}"])
    sys.argv += ["--questions=2", f"--out={tmp_path}/report", "--device=cpu"]
    report.main()
    shutil.rmtree(base)  # imported again, it is the same base
    import_checkpoint(str(gpt2), base, tmp_path, 0.0)
    longer = replace(config, optim=replace(config.optim, steps=3))
    train_sft.main(replace(longer, data=replace(config.data, replay=0.0)))
    export_checkpoint(str(instruct), tmp_path / "out")
    idx = torch.randint(0, pair[1].tokenizer.n_vocab, (2, 64), generator=torch.Generator())
    expected = logits_of(tmp_path / "out", idx)
    torch.testing.assert_close(pair[1].model(idx), expected, atol=1e-4, rtol=0)


def test_an_export_that_was_trained_elsewhere_is_a_base_with_its_own_turns(tmp_path: Path) -> None:
    ours = make_checkpoint(tmp_path, recipe="gpt2")
    folder = exported(ours, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.wte.weight += 1
    model.save_pretrained(folder)
    import_checkpoint(str(folder), tmp_path / "back", tmp_path, None)
    back = load_checkpoint(tmp_path / "back")
    assert back.meta["kind"] == "base"
    n = ours.tokenizer.n_vocab
    torch.testing.assert_close(back.model.wte.weight[:n], ours.model.wte.weight[:n] + 1)


# ---- what is refused -----------------------------------------------------------------------


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def wrong_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(32, 100)
    save_file(weights, folder / "model.safetensors")


def lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors")


def configured(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def described(**values: Any) -> Callable[[Path], None]:
    """Says of an export what its checkpoint's meta.json said."""

    def change(folder: Path) -> None:
        weights = {"model.safetensors": sha256_file(folder / "model.safetensors")}
        sizes = asdict(ModelConfig("gpt2", n_layer=2, n_head=2, n_embd=32, block_size=64))
        meta = {"kind": "base", "step": 1, "vocab_size": 9, "model": sizes, "metrics": {}}
        meta |= {"config": {"data": {}}, "prepared": {}, "tokenizer": {}, "files": {}}
        meta |= {"environment": {}, **values}
        (folder / "diptych.json").write_text(json.dumps({"weights": weights, "meta": meta}))

    return change


def tokenizer_with(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        made = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(made | values))

    return change


def few_rows(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"] = torch.zeros(100, 32)
    save_file(weights, folder / "model.safetensors")


def untied(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1
    save_file(weights, folder / "model.safetensors")


def tokenizer_change(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        made = json.loads((folder / "tokenizer.json").read_text())
        change(made)
        (folder / "tokenizer.json").write_text(json.dumps(made))

    return apply


def add_word(made: dict[str, Any]) -> None:
    made["added_tokens"].append({"id": 999, "content": "cat sat", "special": False})


def swap_end(made: dict[str, Any]) -> None:
    """Another special token first, as some put their padding there."""
    n = made["added_tokens"][0]["id"]
    made["added_tokens"][0]["id"] = made["model"]["vocab"]["<|endoftext|>"] = n + 1
    pad = made["added_tokens"][0] | {"content": "<pad>", "id": n}
    made["added_tokens"].append(pad)


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "cut or not a safetensors file"),
        (pickled, "pickles"),
        (wrong_shape, r"h\.1\.mlp\.c_fc\.weight is of shape"),
        (lacking, "lack transformer.h.1.mlp.c_fc.weight"),
        (configured(model_type="bert"), "'bert', not a GPT-2"),
        (configured(n_layer=3), "lack transformer.h.2"),
        (configured(n_layer="2"), "no whole number under n_layer"),
        (configured(n_head=5), "n_head=5 does not divide"),
        (configured(vocab_size="100"), "no whole number under vocab_size"),
        (configured(activation_function="silu"), "activation_function is 'silu'"),
        (configured(resid_pdrop="a little"), "cannot be imported"),
        (configured(layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06"),
        (configured(n_inner=77), "n_inner=77"),
        (configured(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (tokenizer_with(model={"type": "Unigram"}), r"not as in a GPT-2's \(KeyError"),
        (tokenizer_with(normalizer={"type": "NFC"}), "otherwise than GPT-2"),
        (tokenizer_with(pre_tokenizer={"type": "Metaspace"}), "otherwise than GPT-2"),
        (few_rows, "wte.weight has 100 rows, too few"),
        (untied, "ties the head"),
        (tokenizer_change(lambda made: made["model"]["merges"].pop()), "otherwise than GPT-2"),
        (tokenizer_change(lambda made: made["model"].update(dropout=0.1)), "otherwise than GPT-2"),
        (tokenizer_change(add_word), "adds words"),
        (tokenizer_change(swap_end), r"id of <\|endoftext\|>"),
        (tokenizer_change(lambda made: made.update(pre_tokenizer="x")), "AttributeError"),
        (configured(resid_pdrop=None), "TypeError"),
        (configured(activation_function=["gelu"]), "TypeError"),
        (configured(tie_word_embeddings="0.1"), "neither true nor false"),
        (configured(n_positions=10**15), "this machine has"),
        (configured(n_positions=10**30), "this machine has"),
        (configured(n_layer=4096), "more weights than its files hold"),
        (configured(resid_pdrop=10**400), "OverflowError"),
        (described(step="x"), "step is missing"),
        (described(metrics=5), "metrics is missing"),
        (described(config=None), "config is missing"),
        (lambda folder: (folder / "diptych.json").write_text("[]"), "AttributeError"),
        (no_json, "not a JSON file"),
        (a_list, "not the config of a model"),
        (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    ],
)
def test_a_folder_that_is_no_gpt2_is_refused_in_one_line(
    damage: Callable[[Path], None], message: str, gpt2: Path, tmp_path: Path, fails: Fails
) -> None:
    damage(gpt2)
    assert re.search(message, fails(convert, "import", str(gpt2), str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_name_on_the_hub_is_downloaded_once(
    name: str, gpt2: Path, hub: Hub, tmp_path: Path
) -> None:
    hub.files["openai-community/gpt2"] = {f.name: f.read_bytes() for f in gpt2.iterdir()}
    unwanted = {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"", "onnx/quantized.json": b""}
    hub.files["openai-community/gpt2"] |= unwanted
    hub.cuts["model.safetensors"] = [5000, 900]  # the connection breaks twice
    import_checkpoint(name, tmp_path / "run", tmp_path / "downloads", None)
    import_checkpoint(str(gpt2), tmp_path / "same", tmp_path, None)
    got, same = load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "same")
    assert got.meta["files"]["model.safetensors"] == same.meta["files"]["model.safetensors"]
    asked = {path.rpartition("/")[2] for path, _ in hub.log if "/cdn/" in path}
    assert asked == {f.name for f in gpt2.iterdir()}
    hub.log.clear()
    import_checkpoint(name, tmp_path / "again", tmp_path / "downloads", None)
    assert not hub.requests("/cdn/")


def test_what_the_hub_has_and_what_it_sends_must_be_a_gpt2(
    gpt2: Path, hub: Hub, tmp_path: Path, fails: Fails
) -> None:
    files = {f.name: f.read_bytes() for f in gpt2.iterdir()}
    bert = json.dumps({"model_type": "bert"}).encode()
    hub.files["some/bert"] = {"config.json": bert, "model.safetensors": b"x"}
    hub.files["some/images"] = {"README.md": b"x"}
    hub.files["some/broken"] = files
    hub.listed["model.safetensors"] = {"lfs": {"oid": "0" * 64}}
    options = [str(tmp_path / "run"), f"--downloads={tmp_path}/downloads"]
    assert "some/nothing" in fails(convert, "import", "some/nothing", *options)
    assert "no file matches" in fails(convert, "import", "some/images", *options)
    assert "damaged" in fails(convert, "import", "some/broken", *options)
    hub.listed.clear()
    hub.log.clear()
    assert "'bert', not a GPT-2" in fails(convert, "import", "some/bert", *options)
    assert not hub.requests("model.safetensors")  # said before anything large is downloaded
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "downloads" / "some/broken").glob("*model.safetensors*"))


def test_other_mistakes_are_one_line(
    gpt2: Path,
    runs: tuple[Path, Path],
    tmp_path: Path,
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = str(tmp_path / "run")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("data.sources.download.BACKOFF", 0)
    assert "gpt2-xl" in fails(convert, "import", "gpt3", out)
    assert "neither a folder nor" in fails(convert, "import", "/no/such/folder", out)
    hub = fails(convert, "import", "gpt2", out, f"--downloads={tmp_path}/downloads")
    assert "127.0.0.1" in hub
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert "not empty" in fails(convert, "import", str(gpt2), str(tmp_path / "full"))
    assert "already exists" in fails(convert, "export", str(runs[0]), str(tmp_path / "full"))
    assert "dropout" in fails(convert, "import", str(gpt2), out, "--dropout=2")
    assert "not found" in fails(convert, "export", str(tmp_path / "nothing"), out)
    assert not Path(out).exists()


def test_an_export_that_cannot_be_written_leaves_nothing(
    runs: tuple[Path, Path], tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    assert "No space left" in fails(convert, "export", str(runs[0]), str(tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))
