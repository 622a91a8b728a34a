"""Text to token ids and back. Every tokenizer here encodes with a tiktoken Encoding."""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import tiktoken.load

from runtime.files import as_ours, read_meta, resolve_checkpoint, verify_checksums

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
# Reserved in every tokenizer before pretraining, so that base and instruct share one vocabulary.
CONTROL_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN)
RANKS_FILE = "tokenizer.tiktoken"

# GPT-2's split into words, numbers, punctuation and spaces; a BPE merge never crosses a split.
# The possessive quantifiers keep a million spaces from overflowing the stack of the regex engine.
WORD_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
BYTE_PATTERN = r"[\s\S]{1,16}"


class Tokenizer:
    """A vocabulary of byte strings, with the control tokens after the last of them.

    Attributes:
        kind: "gpt2", "bpe" or "byte".
        n_vocab: ids are 0 .. n_vocab - 1, control tokens included.
        ranks: the ids of the byte strings.
        end_of_text, end_of_turn: ids that stand before each document, and that end a chat turn.
        has_template: whether there is a chat template, as only models from elsewhere may lack.
    """

    has_template = True

    def __init__(self, kind: str, pattern: str, ranks: dict[bytes, int]) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):  # tiktoken would not say so
            raise ValueError("the ids of a vocabulary are not 0, 1, 2, and so on")
        if missing := [i for i in range(256) if bytes([i]) not in ranks]:
            raise ValueError(f"a vocabulary lacks the byte {missing[0]}, so it misses some text")
        self.kind, self._pattern, self.ranks = kind, pattern, ranks
        self._control = {token: i for i, token in enumerate(CONTROL_TOKENS, len(ranks))}
        self._encoding = tiktoken.Encoding(
            kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self._control
        )
        self.n_vocab = len(ranks) + len(self._control)
        self.end_of_text = self._control[END_OF_TEXT]
        self.end_of_turn = self._control[END_OF_TURN]

    def control(self, token: str) -> int:
        """The id of a control token such as "<|user|>"."""
        return self._control[token]

    @property
    def template_ids(self) -> list[int]:
        """The control tokens but end-of-text: those that a base has never been trained on."""
        return [i for i in self._control.values() if i != self.end_of_text]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Text that looks like a control token is encoded as plain text."""
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as uint32, (n,); no Python integer is made, so that threads run at once."""
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, control tokens their names.
        Raises ValueError: an id outside the vocabulary.
        """
        if bad := [i for i in ids if not 0 <= i < self.n_vocab]:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary of {self.n_vocab}")
        return self._encoding.decode(list(ids), errors="replace")

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one id, a control token's being its name: not always whole characters."""
        return self._encoding.decode_single_token_bytes(i)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, (n_vocab,); a control token stands for none."""
        lengths = np.zeros(self.n_vocab, dtype=np.int64)
        lengths[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return lengths

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly if they map every text to the same ids."""
        digest = hashlib.sha256(self._pattern.encode())
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(b"%d:%b;" % (rank, base64.b64encode(token)))
        digest.update(repr(self._control).encode())
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the ranks in tiktoken's format; returns what `load` needs from meta.json."""
        lines = (b"%b %d\n" % (base64.b64encode(t), r) for t, r in self.ranks.items())
        (folder / RANKS_FILE).write_bytes(b"".join(lines))
        about = {"kind": self.kind, "pattern": self._pattern, "n_vocab": self.n_vocab}
        return {**about, "fingerprint": self.fingerprint}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """That of prepared data, a checkpoint or a run. Raises ValueError: none, or damaged."""
        folder = resolve_checkpoint(path)
        meta = read_meta(folder)
        with as_ours(folder):
            verify_checksums(folder, {RANKS_FILE: meta["files"].get(RANKS_FILE, "")})
            entries = map(bytes.split, (folder / RANKS_FILE).read_bytes().splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in entries}
            if (pattern := meta["tokenizer"]["pattern"]) not in (WORD_PATTERN, BYTE_PATTERN):
                raise ValueError(f"{folder}: its pattern is not ours")  # some make tiktoken panic
            made = cls(meta["tokenizer"]["kind"], pattern, ranks)
            if made.n_vocab != meta["tokenizer"]["n_vocab"]:
                raise ValueError(f"{folder}: its vocabulary is not of the size that it notes")
            return made


def create_tokenizer(spec: str, documents: Iterable[str]) -> Tokenizer:
    """Makes the tokenizer that `spec` names: gpt2, byte, or bpe:N trained on the documents.

    N counts every entry: 256 bytes, the merges and the control tokens. A corpus too small for
    N entries gives fewer. Raises ValueError: an unknown spec, or no GPT-2 vocabulary here.
    """
    if spec == "byte":
        return Tokenizer("byte", BYTE_PATTERN, {bytes([i]): i for i in range(256)})
    if spec == "gpt2":
        from data.sources.download import read_url  # takes a while to import

        try:
            tiktoken.load.read_file = lambda blobpath: read_url(blobpath)  # its own waits for ever
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests, ssl, socket: whatever a missing network raises
            raise ValueError(
                "GPT-2's vocabulary is neither cached nor reachable "
                f"({type(error).__name__}). Set HTTPS_PROXY to a working proxy, TIKTOKEN_CACHE_DIR "
                "to a folder that holds it, or use --tokenizer bpe:4096, which needs no download"
            ) from None
        return Tokenizer("gpt2", WORD_PATTERN, gpt2._mergeable_ranks)
    if not re.fullmatch(r"bpe:([0-9]{1,6}|1000000)", spec):
        raise ValueError(f"unknown tokenizer {spec!r}; use gpt2, byte, or bpe:N such as bpe:4096")
    n_ranks = int(spec.removeprefix("bpe:")) - len(CONTROL_TOKENS)
    if n_ranks < 256:
        raise ValueError(f"{spec!r} is too small: {256 + len(CONTROL_TOKENS)} entries or more")
    import rustbpe  # only needed to train; a checkpoint's tokenizer loads without it

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(documents), vocab_size=n_ranks, pattern=WORD_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return Tokenizer("bpe", WORD_PATTERN, ranks)
