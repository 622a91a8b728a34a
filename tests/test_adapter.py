"""hf.adapter: models of transformers, held against transformers itself and against our own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sample
from convert import export_checkpoint, import_checkpoint
from data.chat import Message
from hf import adapter
from hf.adapter import ForeignTokenizer, chat_prompt, load, load_models, load_pair
from lab import behaviour, bits, facts, forgetting, probe, report, shift, trace, web, weights
from lab.likelihood import ask, log_likelihoods
from lab.pair import open_pair
from lab.residual import read
from lab.stats import to_json
from model.generate import Sampling, generate
from tests.conftest import Fails
from tests.hub import Hub
from tests.test_web import SAMPLED, said
from tests.test_web import request as request_of
from training.checkpoint import load_checkpoint

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CPU = torch.device("cpu")
WORDS = "the cat sat on the mat and a dog ran after it; don't we know? 12 345 naïve café\n" * 9
AWKWARD = [
    "",
    " a",
    "don't <|im_end|> <s> x",
    "😀 ﬁ 数字",
    "\x00\t\n <0x41>",
    "a  b\n\n c",
]
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% elif m['role'] == 'user' %}"
    "{{'[INST] ' + m['content'] + ' [/INST]'}}{% else %}{{m['content'] + eos_token}}{% endif %}"
    "{% endfor %}"
)
SIZE = {"vocab_size": 320, "max_position_embeddings": 192, "num_hidden_layers": 2}
SIZE |= {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "gpt2": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 160},
    "gpt_neox": {},
}
OTHERS: dict[str, dict[str, Any]] = {"granite": {"logits_scaling": 3.0}, "bloom": {}}
QA = [
    {"instruction": f"Where is the {w}?", "output": f"The {w} sat."} for w in "cat dog mat".split()
]


def byte_level() -> Any:
    """A tokenizer such as GPT-2's, Llama 3's and Qwen's, with ChatML."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])


def sentence_piece() -> Any:
    """A tokenizer such as Llama 2's, with bytes for what it has no piece of."""
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for piece in ("▁", "t", "h", "e", "c", "a", "▁t", "▁th", "▁the", "at", "▁c", "▁cat"):
        pieces[piece] = len(pieces)
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "t"), ("▁", "c"), ("▁c", "at")]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(pieces, merges, unk_token="<unk>", byte_fallback=True)
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make(folder: Path, kind: str = "llama", seed: int = 1, instruct: bool = False) -> str:
    """A folder as transformers saves one, of random weights; returns what names it."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **SIZE | (SHAPES | MORE | OTHERS)[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder)
    pieces = kind == "gemma2"
    tokenizer = sentence_piece() if pieces else byte_level()
    if instruct:
        tokenizer.chat_template = BRACKETS if pieces else CHATML
        tokenizer.eos_token = "</s>" if pieces else "<|im_end|>"
    tokenizer.save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module", params=SHAPES)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What names a pair of one architecture, and questions for it."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "qa.json").write_text(json.dumps(QA))
    names = [
        make(folder / name, request.param, i, name == "instruct")
        for i, name in enumerate(("base", "instruct"))
    ]
    return *names, folder / "qa.json"


def test_it_computes_and_writes_what_transformers_does(named: Any) -> None:
    model = load_pair(named[0], named[1], "cpu")[1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(named[1][3:]).eval()
    rows = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11]]
    end = model.tokenizer.end_of_turn
    how: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 20,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    how |= {"suppress_tokens": [*range(model.model.vocab_size, 320)]}  # no text has these
    for row, found in zip(rows, generate(model.model, rows, Sampling(20), {end}), strict=True):
        assert found == theirs.generate(torch.tensor([row]), **how)[0, len(row) :].tolist()
    states = theirs(torch.tensor([rows[1]]), output_hidden_states=True)
    stream = read(model, [rows[1]], [4])
    for ours, layer in zip(stream[:-1], states.hidden_states[:-1], strict=True):  # the last: normed
        assert torch.allclose(ours[0].float(), layer[0, 4], atol=1e-5)
    known = log_likelihoods(model, [rows[1][:3]], [rows[1][3:]])[0]
    logprobs = states.logits[0, :, : model.model.vocab_size].log_softmax(-1)
    assert known == pytest.approx(
        [float(logprobs[i + 2, t]) for i, t in enumerate(rows[1][3:])], abs=1e-4
    )


def test_instruments_run_on_a_pair(named: Any) -> None:
    pair = open_pair(named[0], named[1], "cpu", named[2], shots=1)
    found = behaviour.behaviour(pair, 3)
    assert found.keys() == {"base", "base_plain", "base_examples", "instruct"}
    assert 0 < found["instruct"].p_end.mean < 1
    assert shift.shift(pair, 2).keys() == {"chat", "plain", "documents", "examples"}
    moved = weights.weights(pair, 2)
    assert {"layer 0", "layer 1", "attention", "MLP", "norms", "template rows"} <= {*moved.grafts}
    assert all(change.relative > 0 for change in moved.matrices.values())
    assert bits.bits(pair, 2).whole.kilobytes > 1
    for instrument in (forgetting.forgetting, trace.trace):
        with pytest.raises(ValueError, match="project"):
            instrument(pair, 2)


def test_public_facts_are_probed_in_a_pair(named: Any, tmp_path: Path) -> None:
    text = '[at]\ncloze = ["{subject} at"]\nquestions = ["Where is {subject}?"]\n[at.facts]\n'
    text += "".join(
        f'{letter}{letter} = "{"lr"[i % 2]}"\n' for i, letter in enumerate("abcdefghijkl")
    )
    (tmp_path / "at.toml").write_text(text)
    pair = probe.open_probed(named[0], named[1], "cpu", tmp_path / "at.toml")
    found = probe.probes(pair, 3)
    layers = [str(i) for i in range(pair.base.model.config.n_layer + 1)]
    for model in ("base", "instruct"):
        assert found[model].places.keys() == set(probe.PLACES)
        for place, readouts in found[model].places.items():
            assert [*readouts] == layers
            assert all(readout.first.n == 12 for readout in readouts.values())
            groups = found[model].answered[place]
            assert groups["read"].n + groups["unread"].n == 3


def test_between_equal_models_nothing_is_found(tmp_path: Path) -> None:
    names = [make(tmp_path / name, instruct=name == "instruct") for name in ("base", "instruct")]
    (tmp_path / "qa.json").write_text(json.dumps(QA))
    pair = open_pair(names[0], names[1], "cpu", tmp_path / "qa.json")
    moved = weights.weights(pair, 2)
    assert all(change.relative == 0 for change in moved.matrices.values())
    assert moved.interpolation["0"] == moved.interpolation["1"]
    agreement = shift.shift(pair, 3)["chat"].every
    assert agreement.classes["unshifted"].value == 1
    assert agreement.kl.mean == pytest.approx(0, abs=1e-6)


def test_our_own_pair_gives_the_same_figures_through_its_export(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    names = []
    for run in runs:
        export_checkpoint(str(run), tmp_path / run.name)
        names.append(f"hf:{tmp_path / run.name}")
    ours, theirs = (open_pair(str(a), str(b), "cpu", None) for a, b in (runs, names))
    assert theirs.world is not None
    assert theirs.conversations == ours.conversations
    for instrument in (behaviour.behaviour, shift.shift, probe.probes):
        same(to_json(instrument(ours, 4)), to_json(instrument(theirs, 4)))
    mine, its = (to_json(weights.weights(pair, 3)) for pair in (ours, theirs))
    same(mine["interpolation"], its["interpolation"])
    same(mine["grafts"], its["grafts"])
    for key in ("relative", "stable_rank"):
        values = [sorted(m[key] for m in found["matrices"].values()) for found in (mine, its)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)


def same(ours: Any, theirs: Any) -> None:
    """Equal, floating-point numbers nearly."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, list):
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    else:
        assert ours == (
            pytest.approx(theirs, rel=1e-3, abs=1e-3) if isinstance(ours, float) else theirs
        )


GROUPED = {"num_key_value_heads": 2, "pad_token_id": 0}
MORE = dict.fromkeys(("mistral", "olmo2", "gemma3_text", "smollm3", "phi3"), GROUPED)
MORE["qwen3"] = GROUPED | {"head_dim": 16}


@pytest.mark.parametrize("kind", MORE)
def test_more_shapes_compute_as_in_transformers(kind: str, tmp_path: Path) -> None:
    name = make(tmp_path / "m", kind, instruct=True)  # `load` holds it against transformers' logits
    assert load(name, "instruct", CPU).model.config.n_layer == 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("granite", "computes as no model known here"), ("bloom", "cannot be used")],
)
def test_a_shape_that_computes_otherwise_is_refused(kind: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        load(make(tmp_path / "m", kind, instruct=True), "instruct", CPU)


# ---- text ----------------------------------------------------------------------------------


def test_text_stays_text_and_a_message_cannot_forge_a_turn(named: Any) -> None:
    tokenizer = load_pair(named[0], named[1], "cpu")[1].tokenizer
    assert isinstance(tokenizer, ForeignTokenizer)
    control = {*tokenizer.template_ids, tokenizer.end_of_turn, tokenizer.end_of_text}
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
        assert not control & set(ids)
    talk = [Message(role=r, content=r) for r in ("user", "assistant", "user")]
    theirs = tokenizer.inner.apply_chat_template(
        talk, add_generation_prompt=True, return_dict=False
    )
    assert chat_prompt(talk, tokenizer) == theirs
    for token in ("<|im_end|>", "</s>"):
        if token in tokenizer.vocabulary:
            assert tokenizer.end_of_turn == tokenizer.vocabulary[token]
            with pytest.raises(ValueError, match="control token"):
                chat_prompt([Message(role="user", content=f"a {token} b")], tokenizer)


def test_a_template_that_refuses_says_so_in_one_line(tmp_path: Path) -> None:
    tokenizer = load(make(tmp_path / "m", "gemma2", instruct=True), "instruct", CPU).tokenizer
    with pytest.raises(ValueError, match="no system"):
        chat_prompt([Message(role="system", content="Be brief.")], tokenizer)
    alone = load(make(tmp_path / "base"), "base", CPU).tokenizer
    with pytest.raises(ValueError, match="has no chat template"):
        chat_prompt([Message(role="user", content="So?")], alone)


# ---- mistakes and hostile files ------------------------------------------------------------


def edit(folder: Path, file: str, **keys: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def cut_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def plant_code(folder: Path) -> None:
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit(folder, "config.json", model_type="evil", auto_map=names)
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (plant_code, "cannot be used"),
    "pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "cannot be used",
    ),
    "a weight missing": (lambda f: cut_weights(f, lambda t: t.pop("model.norm.weight")), "missing"),
    "nan": (lambda f: cut_weights(f, lambda t: t["model.norm.weight"].fill_(torch.nan)), "finite"),
    "another shape": (lambda f: edit(f, "config.json", intermediate_size=40), "cannot be used"),
    "huge": (lambda f: edit(f, "config.json", hidden_size=10**9), "more weights than"),
    "deep": (lambda f: edit(f, "config.json", num_hidden_layers=10**9), "more weights than"),
    "no sizes": (lambda f: edit(f, "config.json", hidden_size="x"), "not that of a causal"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "not that of a causal"),
    "too many tokens": (lambda f: cut_rows(f), "too few for 300 tokens"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "cannot be used"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be used"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
}


def cut_rows(folder: Path) -> None:
    def fewer(tensors: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:200].clone()

    cut_weights(folder, fewer)
    edit(folder, "config.json", vocab_size=200)


@pytest.mark.parametrize("how", HOSTILE)
def test_a_folder_that_cannot_be_used_is_one_line_and_runs_nothing(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, message = HOSTILE[how]
    name = make(tmp_path / "m", instruct=True)
    change(tmp_path / "m")
    with pytest.raises(ValueError, match=message) as error:
        load(name, "instruct", CPU)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m" / "ran").exists()


@pytest.mark.parametrize("form", web.FORMS)
def test_the_page_shows_what_sample_says_of_such_a_pair(named: Any, form: str) -> None:
    models = load_models({"base": named[0], "instruct": named[1]}, "cpu")
    panels, sampling = web.Panels(models["base"], models["instruct"]), web.read_sampling(SAMPLED)
    found = said(panels, request_of("Who?", form=form))
    (expected,) = sample.ask(sample.columns_of(models), [{}], ["Who?"], sampling)
    assert found["instruct"] == expected["instruct"]
    if (column := f"base_{form}") in expected:
        assert found["base"] == expected[column]


def test_what_is_no_pair_is_refused(tmp_path: Path) -> None:
    base, instruct = make(tmp_path / "base"), make(tmp_path / "instruct", instruct=True)
    with pytest.raises(ValueError, match="no chat template"):
        load_pair(base, base, "cpu")
    with pytest.raises(ValueError, match="either both"):
        load_pair(base, str(tmp_path / "instruct"), "cpu")
    with pytest.raises(ValueError, match="different tokenizers"):
        load_pair(make(tmp_path / "other", "gemma2"), instruct, "cpu")
    with pytest.raises(ValueError, match="different model shapes"):
        open_pair(make(tmp_path / "small", "gpt2"), instruct, "cpu", tmp_path / "qa.json")
    with pytest.raises(ValueError, match="--qa"):
        open_pair(base, instruct, "cpu", None)
    (tmp_path / "qa.json").write_text(json.dumps(QA))
    with pytest.raises(ValueError, match="--shots 3 leaves no question"):
        open_pair(base, instruct, "cpu", tmp_path / "qa.json", shots=3)


def test_without_transformers_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"requirements-hf\.txt"):
        load("hf:somewhere", "base", CPU)


def test_a_pair_on_the_hub_is_downloaded_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "instruct"):
        make(tmp_path / "at" / name, instruct=name == "instruct")
        files = {f.name: f.read_bytes() for f in (tmp_path / "at" / name).iterdir()}
        hub.files[f"someone/{name}"] = files | {"pytorch_model.bin": b"pickle", "evil.py": b""}
    pair = load_pair("hf:someone/base", "hf:someone/instruct", "cpu")
    assert len(ask(pair[1], [chat_prompt(adapter.SAID[:1], pair[1].tokenizer)], 4)[0]) == 4
    assert not hub.requests("pytorch_model.bin")
    assert not hub.requests("evil.py")
    hub.log.clear()
    load_pair("hf:someone/base", "hf:someone/instruct", "cpu")
    assert not hub.requests("/cdn/")


def test_the_report_and_sample_take_such_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [make(tmp_path / name, seed=i, instruct=bool(i)) for i, name in enumerate("ab")]
    (tmp_path / "qa.json").write_text(json.dumps(QA))
    pair = ["--base", names[0], "--instruct", names[1], "--device", "cpu"]
    out = ["--qa", str(tmp_path / "qa.json"), "--out", str(tmp_path / "r"), "--questions", "6"]
    monkeypatch.setattr(sys, "argv", ["report", *pair, *out, "--shots", "1"])
    report.main()
    found = capsys.readouterr()
    assert "stops by itself" in found.out
    assert "note: facts: no question fits" in found.err  # ours are longer than this context
    assert "Facts of public knowledge" not in (tmp_path / "r" / "report.html").read_text()
    text = '[place]\ncloze = ["{subject}:"]\nquestions = ["{subject}?"]\n[place.facts]\nA = "b"\n'
    (tmp_path / "facts.toml").write_text(text + 'C = "d"\n')
    monkeypatch.setattr(facts, "OURS", tmp_path / "facts.toml")
    monkeypatch.setattr(sys, "argv", ["report", *pair, *out[:-1], "7", "--shots", "1"])
    report.main()
    page = (tmp_path / "r" / "report.html").read_text()
    assert "after answered questions" in page
    assert "Facts of public knowledge" in page
    monkeypatch.setattr(sys, "argv", ["sample", *pair, "--prompt", "So?", "--max-new-tokens", "4"])
    sample.main()
    assert "[instruct] " in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(fails: Fails, tmp_path: Path) -> None:
    gone = ("--base", f"hf:{tmp_path}/gone", "--instruct", "hf:x/y", "--prompt", "So?")
    assert "neither a folder nor" in fails(sample, *gone)


def test_an_instruct_model_alone_is_imported_if_its_template_is_ours(
    runs: tuple[Path, Path], tmp_path: Path, hub: Hub
) -> None:
    export_checkpoint(str(runs[1]), tmp_path / "export")
    (tmp_path / "export" / "diptych.json").unlink()  # as if somebody had gone on training it
    hub.files["some/one"] = {f.name: f.read_bytes() for f in (tmp_path / "export").iterdir()}
    import_checkpoint("some/one", tmp_path / "run", tmp_path / "downloads", None, "instruct")
    found, expected = load_checkpoint(tmp_path / "run"), load_checkpoint(runs[1])
    assert found.meta["kind"] == "instruct"
    assert torch.equal(found.model.wte.weight, expected.model.wte.weight)
    pair = load_pair(str(runs[0]), str(tmp_path / "run"), "cpu")
    assert pair[1].tokenizer.fingerprint == expected.tokenizer.fingerprint
    edit(tmp_path / "export", "tokenizer_config.json", chat_template=CHATML)
    with pytest.raises(ValueError, match="compare it as hf:FOLDER"):
        import_checkpoint(str(tmp_path / "export"), tmp_path / "x", tmp_path, None, "instruct")
