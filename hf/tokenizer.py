"""Our tokenizers as files of Hugging Face's transformers, and theirs as ours."""

from pathlib import Path
from typing import Any

from data import tokenizer as ours
from data.tokenizer import CONTROL_TOKENS, END_OF_TEXT, END_OF_TURN, Tokenizer
from runtime.cli import listed, say
from runtime.files import read_json

GPT2_VOCAB_SIZE = 50257
# A noncharacter of Unicode, which no text may hold, in the names of the control tokens: so text
# that looks like a control token is text there too. Decoding leaves it out.
MARK = "\ufdd0"


def marked(token: str) -> str:
    """The name of a control token in a tokenizer.json, or the beginning of one for "<|"."""
    return token[0] + MARK + token[1:]


def byte_letters() -> list[str]:
    """The letter that stands for each byte in GPT-2's vocabulary files: itself, if visible."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in visible else next(others)) for b in range(256)]


def export_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of the tokenizers library."""
    ranks, letters = tokenizer.ranks, byte_letters()
    spelled = {token: "".join(letters[b] for b in token) for token in ranks}
    # tiktoken joins any two tokens that make a third, so all such pairs are merges.
    merges = [
        (spelled[token[:i]], spelled[token[i:]])
        for token in sorted(ranks, key=lambda t: ranks[t])
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split |= {"use_regex": tokenizer.kind != "byte"}  # GPT-2's, which is ours
    unmark = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
    names = ("special", "single_word", "lstrip", "rstrip", "normalized")
    flags = {name: name == "special" for name in names}
    added = [{"id": tokenizer.control(t), "content": marked(t), **flags} for t in CONTROL_TOKENS]
    unused = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": added,
        "pre_tokenizer": split,
        "decoder": {"type": "Sequence", "decoders": [unmark, split]},
        "model": {
            "type": "BPE",
            **dict.fromkeys(unused),
            **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
            "ignore_merges": True,  # as tiktoken: a word that is a token is that token
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def _read_vocabulary(file: Path) -> tuple[dict[str, int], dict[str, int], bool]:
    """The ids of plain tokens and of special ones, and whether text is split as by GPT-2.
    Raises ValueError: it splits or joins text otherwise than ours can.
    """
    theirs = read_json(file)
    if file.name == "vocab.json":
        return theirs, {END_OF_TEXT: theirs.pop(END_OF_TEXT)}, True
    model, split, added = theirs["model"], theirs["pre_tokenizer"] or {}, theirs["added_tokens"]
    special = {token["content"]: token["id"] for token in added}
    ranks = {token: rank for token, rank in model["vocab"].items() if token not in special}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    made = [model["vocab"][a + b] for a, b in pairs]  # in the order of their ids, and all of them
    whole = made == sorted(made) and {r for t, r in ranks.items() if len(t) != 1} <= {*made}
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    bytewise = split.get("type") == "ByteLevel" and not split.get("add_prefix_space")
    if not (whole and bytewise) or theirs.get("normalizer") or any(map(model.get, odd)):
        raise ValueError("its tokenizer.json splits or joins text otherwise than GPT-2's")
    if words := {t["content"] for t in added if not t.get("special")} - {END_OF_TEXT}:
        raise ValueError(f"its tokenizer.json adds words to GPT-2's, such as {min(words)!r}")
    return ranks, special, split.get("use_regex", True)


def import_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer, int]:
    """Our tokenizer of a tokenizer.json or a vocab.json, or GPT-2's where there is neither; and how
    many of its tokens are theirs: all, or all up to <|endoftext|>. Raises ValueError: it splits or
    joins text otherwise than ours can, or has other ids.
    """
    files = [folder / name for name in ("tokenizer.json", "vocab.json")]
    file = next((file for file in files if file.exists()), None)
    if file is None and vocab_size == GPT2_VOCAB_SIZE:
        return ours.create_tokenizer("gpt2", []), GPT2_VOCAB_SIZE
    if file is None:
        raise ValueError("it has no tokenizer.json and no vocab.json")
    vocab, special, words = _read_vocabulary(file)
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    ranks = {bytes(bytes_of[x] for x in token): rank for token, rank in vocab.items()}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ids of the tokens in its {file.name} do not count up from 0")
    known = [marked(t) for t in CONTROL_TOKENS] if marked(END_OF_TURN) in special else [END_OF_TEXT]
    for i, token in enumerate(known, len(ranks)):
        if special.get(token) != i:
            raise ValueError(f"the id of {token} in its {file.name} is not {i}, the first free one")
    if dropped := [token for token in special if token not in known]:
        say(f"note: left out, with what was learned of them: {listed(dropped)}")
    n_known = len(ranks) + len(known)
    if not words:
        return Tokenizer("byte", ours.BYTE_PATTERN, ranks), n_known
    kind = "gpt2" if len(ranks) + 1 == GPT2_VOCAB_SIZE else "bpe"
    return Tokenizer(kind, ours.WORD_PATTERN, ranks), n_known
