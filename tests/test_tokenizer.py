from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data.tokenizer import CONTROL_TOKENS, RANKS_FILE, Tokenizer, create_tokenizer
from runtime.files import sha256_file, write_meta

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ["the cat sat on the mat and the cat ate", "a hat, a bat; 12 34 the the that then"] * 3
AWKWARD = [
    "",
    " ",
    "plain words, 123 and isn't it?",
    "👩‍👩‍👧‍👦 🇳🇴 café e\u0301 漢字 العربية",
    "\x00\x01\x1b[31m\x7f\u200b\ufeff\u2028",
    "a" + " " * 5000 + "b\n\n\n\t\t \r\n ",
    "x" * 5000,
    " ".join(CONTROL_TOKENS),
    "".join(CONTROL_TOKENS) + "<|end|",
    "\U0010ffff\ud7ff\ue000",
]


@pytest.fixture(params=["byte", "bpe:300", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    return create_tokenizer(request.param, CORPUS)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    meta = tokenizer.save(folder)
    files = {RANKS_FILE: sha256_file(folder / RANKS_FILE)}
    write_meta(folder, {"tokenizer": meta, "files": files})


def test_text_comes_back_and_never_gives_a_control_id(tokenizer: Tokenizer) -> None:
    control = {tokenizer.control(token) for token in CONTROL_TOKENS}
    assert len(control) == 5
    assert max(control) == tokenizer.n_vocab - 1
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not control & set(ids)
        assert tokenizer.encode_array(text).tolist() == ids
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert len(tokenizer.byte_lengths) == tokenizer.n_vocab
    assert not tokenizer.byte_lengths[list(control)].any()


@pytest.mark.parametrize("character", [" ", "\n", "a", "!"])
def test_a_million_like_characters_come_back(tokenizer: Tokenizer, character: str) -> None:
    ids = tokenizer.encode(character * 2**20)
    assert tokenizer.decode(ids) == character * 2**20
    assert tokenizer.encode_array(character * 2**20).tolist() == ids


def test_a_saved_tokenizer_loads_as_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(tokenizer, tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.kind, loaded.n_vocab) == (tokenizer.kind, tokenizer.n_vocab)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert all(loaded.encode(text) == tokenizer.encode(text) for text in AWKWARD)


@pytest.mark.parametrize("change", [lambda b: b[:-7], lambda b: b + b"AA== 400\n", lambda b: b""])
def test_a_changed_vocabulary_file_is_refused(
    change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    save(create_tokenizer("byte", []), tmp_path)
    file = tmp_path / RANKS_FILE
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=RANKS_FILE):
        Tokenizer.load(tmp_path)


def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    for bad in (-1, tokenizer.n_vocab, 10**6):
        with pytest.raises(ValueError, match=f"id {bad} is outside"):
            tokenizer.decode([65, bad])


def test_control_tokens_decode_to_their_names() -> None:
    tokenizer = create_tokenizer("byte", [])
    ids = [tokenizer.control(token) for token in CONTROL_TOKENS]
    assert ids == [256, 257, 258, 259, 260]
    assert (ids[0], ids[-1]) == (tokenizer.end_of_text, tokenizer.end_of_turn)
    assert tokenizer.decode([ids[0], 72, 105, ids[-1]]) == "<|endoftext|>Hi<|end|>"
    assert tokenizer.decode([0xC3]) == "\ufffd"


@pytest.mark.parametrize("size", [261, 262, 270])
def test_bpe_n_counts_every_entry(size: int) -> None:
    tokenizer = create_tokenizer(f"bpe:{size}", CORPUS)
    assert tokenizer.n_vocab == size
    assert tokenizer.control("<|end|>") == size - 1
    assert create_tokenizer(f"bpe:{size}", ["ab"]).n_vocab == min(size, 256 + 1 + 5)


@pytest.mark.parametrize(
    "spec",
    [
        *("", "gpt3", "bpe", "bpe:", "bpe:x", "bpe:-5", "bpe:1.5", "bpe:260", "byte:300"),
        "bpe:1000001",
        pytest.param("bpe:" + "1" * 5000, id="5000 digits"),  # Python makes no number of so many
    ],
)
def test_an_unknown_spec_is_refused_by_name(spec: str) -> None:
    with pytest.raises(ValueError, match=f"'{spec}'"):
        create_tokenizer(spec, CORPUS)


def test_bpe_training_is_deterministic_in_any_process() -> None:
    # All pairs are equally frequent, so only a fixed order of ties gives the same merges.
    tied = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    digests = {create_tokenizer("bpe:300", tied).fingerprint for _ in range(5)}
    code = (
        "from data.tokenizer import create_tokenizer as c\n"
        f"print(c('bpe:300', {tied!r}).fingerprint)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert digests == {other.stdout.strip()}


def test_fingerprints_differ_where_the_ids_do() -> None:
    specs = ["byte", "bpe:261", "bpe:270", "bpe:280"]
    assert len({create_tokenizer(spec, CORPUS).fingerprint for spec in specs}) == 4
    other = create_tokenizer("bpe:270", ["quick brown foxes jump over lazy dogs"] * 3)
    assert other.fingerprint != create_tokenizer("bpe:270", CORPUS).fingerprint
