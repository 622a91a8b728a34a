"""A causal language model of transformers with the interface of our own.

`hf:FOLDER`, or `hf:owner/name` on the hub, stands for such a model where a checkpoint is asked for.
What comes of it is a `Checkpoint` whose model computes with transformers, and whose tokenizer and
chat template are its own. It is read from safetensors and JSON: no pickle is, and no code.
"""

import contextlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from data.chat import Message, render_prompt
from data.tokenizer import RANKS_FILE, Tokenizer
from hf.hub import find_model, origin_of, unknown_training, weight_files
from hf.tokenizer import byte_letters
from model.gpt import GPT
from model.seen import KVCache, Seen
from runtime.device import environment, set_up
from runtime.files import fingerprint, read_json
from training import checkpoint
from training.checkpoint import WEIGHTS_FILE, Checkpoint, check_models, not_finite

PREFIX = "hf:"
LONGEST = 4096  # tokens of a context, however long the model's own is: whole batches must fit
SAID = [Message(role="user", content="Ada?"), Message(role="assistant", content="Babbage.")]


class ForeignTokenizer(Tokenizer):
    """A tokenizer.json of transformers, and its chat template. Text stays text, as in ours.

    Attributes:
        end_of_text: the id that begins a document: its bos, or its eos where it has none.
        end_of_turn: what its chat template puts after a reply; without one, its eos.
        vocabulary: ids by spelling.
    """

    def __init__(self, inner: Any) -> None:
        self.inner, self.vocabulary = inner, inner.get_vocab()
        self.has_template = bool(inner.chat_template)
        self.n_vocab = max(self.vocabulary.values()) + 1
        ends = (inner.bos_token_id, inner.eos_token_id, inner.pad_token_id)
        self.end_of_text = next(i for i in ends if i is not None)
        self.added = {i: str(token) for i, token in inner.added_tokens_decoder.items()}
        spec = json.loads(inner.backend_tokenizer.to_str())
        bytewise = "ByteLevel" in json.dumps([spec["decoder"], spec["pre_tokenizer"]])
        self._bytes_of = {x: i for i, x in enumerate(byte_letters())} if bytewise else None
        after = self._render(SAID, False).rpartition("Babbage.")[2] if self.has_template else ""
        own_end = self.end_of_text if inner.eos_token_id is None else inner.eos_token_id
        self.end_of_turn = next(iter(inner.encode(after, add_special_tokens=False)), own_end)
        if self.decode(self.encode("A b, 12é")).strip() != "A b, 12é":
            raise ValueError("its tokens are not pieces of text that can be read one by one")

    def _render(self, messages: list[Message], opens_reply: bool) -> str:
        if not self.has_template:
            raise ValueError(f"{self.inner.name_or_path} has no chat template")
        for text in (message["content"] for message in messages):
            if forged := next((token for token in self.added.values() if token in text), None):
                raise ValueError(f"a message holds {forged!r}, a control token of the model")
        apply = self.inner.apply_chat_template
        try:
            return str(apply(messages, add_generation_prompt=opens_reply, tokenize=False))
        except Exception as error:  # the template's own, or of the language that it is written in
            raise ValueError(f"the chat template refuses a conversation: {error!s:.100}") from None

    def chat_prompt(self, messages: list[Message]) -> list[int]:
        """As `render_prompt`. Raises ValueError: there is no template, or it refuses these."""
        return self.inner.encode(self._render(messages, True), add_special_tokens=False)

    @cached_property
    def template_ids(self) -> list[int]:
        """As of ours."""
        ids = {*self.chat_prompt(SAID)}
        with contextlib.suppress(ValueError):  # some templates have no place for it
            ids |= {*self.chat_prompt([Message(role="system", content="Be brief."), *SAID])}
        return sorted((ids & self.added.keys()) - {self.end_of_text})

    @cached_property
    def fingerprint(self) -> str:
        """As of ours, of the chat template too."""
        return fingerprint([self.inner.backend_tokenizer.to_str(), self.inner.chat_template])

    def encode(self, text: str) -> list[int]:
        """As of ours."""
        return self.inner.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Any) -> str:
        """As of ours."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, i: int) -> bytes:
        """As of ours."""
        spelled = self.added.get(i) or self.inner.convert_ids_to_tokens(i) or ""
        if self._bytes_of is not None and i not in self.added:
            return bytes(self._bytes_of[letter] for letter in spelled)
        if len(spelled) == 6 and spelled.startswith("<0x"):
            return bytes.fromhex(spelled[3:5])
        return str(spelled).replace("\u2581", " ").encode()  # of SentencePiece


class Bridge:
    """Our key-value cache where transformers expects one of its own."""

    is_compileable = False

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Adds new keys and values; returns all."""
        return self.seen.update_cache(layer, k, v)


class ForeignModel(GPT):
    """A model of transformers with what instruments and sampling use of ours.

    Attributes:
        inner: the `AutoModelForCausalLM`.
        config: block_size, n_layer, n_head and n_embd, and no more.
        blocks: its layers.
    """

    def __init__(self, inner: Any, vocab_size: int) -> None:
        nn.Module.__init__(self)
        self.inner, self.vocab_size, its = inner, vocab_size, inner.config
        self.wte, n = inner.get_input_embeddings(), its.num_hidden_layers
        self.config: Any = SimpleNamespace(n_layer=n, n_embd=its.hidden_size, has_varlen=False)
        self.config.n_head, window = its.num_attention_heads, getattr(its, "sliding_window", None)
        self.config.block_size = min(its.max_position_embeddings, window or LONGEST, LONGEST)
        modules = inner.base_model.named_modules()
        lists = [(k, m) for k, m in modules if isinstance(m, nn.ModuleList) and len(m) == n]
        self._layers, self.blocks = lists[0]

    def hidden(self, idx: Tensor, seen: Seen | None = None) -> Tensor:
        """As `GPT.hidden`."""
        if (T := idx.shape[1]) > self.config.block_size:
            raise ValueError(f"{T} tokens exceed the model's context of {self.config.block_size}")
        given: dict[str, Any] = {"use_cache": False}
        if seen is not None:
            mask = seen.mask
            if seen.cache is not None:
                given = {"use_cache": True, "past_key_values": Bridge(seen)}
            if mask is None and seen.columns is not None:  # all rows see alike
                past = torch.arange(seen.width, device=idx.device)
                mask = (past <= seen.columns[:, None])[None, None]
            if mask is not None:  # what is added to attention's logits
                mask = self.wte.weight.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
            given |= {"attention_mask": mask, "position_ids": seen.positions.expand(idx.shape)}
        return self.inner.base_model(input_ids=idx, **given).last_hidden_state

    def padded_logits(self, x: Tensor) -> Tensor:
        """As of ours."""
        logits = self.inner.get_output_embeddings()(x).float()
        cap = getattr(self.inner.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def new_cache(self, n_rows: int, room: int) -> KVCache:
        """As `GPT.new_cache`."""
        c, its = self.config, self.inner.config
        n_head = getattr(its, "num_key_value_heads", None) or c.n_head
        size = getattr(its, "head_dim", None) or c.n_embd // c.n_head
        return KVCache(c.n_layer, (n_rows, n_head, room, size), self.wte.weight)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        """Its parameters under such names as ours have; embedding and head without padding."""
        tables = {id(self.inner.get_output_embeddings().weight): "lm_head.weight"}
        tables[id(self.wte.weight)] = "wte.weight"  # tied ones are given once
        for name, p in self.inner.named_parameters():
            if id(p) in tables:
                yield tables[id(p)], p.detach()[: self.vocab_size]
            else:
                yield self._our_name(name), p

    def _our_name(self, name: str) -> str:
        """blocks.0.attn.q_proj.weight of model.layers.0.self_attn.q_proj.weight."""
        name = name.removeprefix(f"{self.inner.base_model_prefix}.")
        layer, inside = "", name.removeprefix(f"{self._layers}.")
        if is_inside := inside != name:
            layer, _, inside = inside.partition(".")
        module, _, rest = inside.partition(".")
        if "norm" in module or module.startswith("ln_"):
            return f"blocks.{layer}.norm.{inside}" if is_inside else f"norm.{inside}"
        kind = "attn" if "attn" in module or "attention" in module else "mlp"
        return f"blocks.{layer}.{kind}.{rest}" if is_inside else inside

    @torch.inference_mode()
    def check(self) -> None:
        """Raises ValueError if this class does not compute what transformers does: all at once, and
        token by token in rows of two lengths.
        """
        ids = torch.arange(1, 7, device=self.wte.weight.device)[None] % self.vocab_size
        expected = self.inner(input_ids=ids, use_cache=False).logits[0, :, : self.vocab_size]
        rows, cache = torch.cat((ids, ids.roll(2))), self.new_cache(2, 6)
        cache.restart([0, 2])  # the second row begins two columns later
        parts = rows.tensor_split((4, 5), 1)
        x = torch.cat([self.hidden(part, cache.add(part.shape[1])) for part in parts], 1)
        found, plain = self.logits(x), self.logits(self.hidden(ids))[0]
        both = (found[0] - expected, found[1, 2:] - expected[:4], plain - expected)
        if not max(float(x.abs().max()) for x in both) < 1e-3 * float(expected.std()):
            raise ValueError(f"a {self.inner.config.model_type} computes as no model known here")


def chat_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """`render_prompt`, but for a tokenizer that has a way of its own, as those from elsewhere."""
    own = getattr(tokenizer, "chat_prompt", None)
    return own(messages) if own else render_prompt(messages, tokenizer)


def is_foreign(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a model of transformers."""
    return isinstance(checkpoint.model, ForeignModel)


def load(path: str, kind: str, device: torch.device) -> Checkpoint:
    """A model that `hf:...` names, in fp32 and eval mode. Raises ValueError: it cannot be had, or
    cannot be used here.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError(f"{path} needs `pip install -r requirements-hf.txt`") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = find_model(path.removeprefix(PREFIX), Path("out/downloads"), check_config)
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    of_weights = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    try:
        check_config(folder)
        model_class = transformers.AutoModelForCausalLM
        inner, notes = model_class.from_pretrained(folder, **given, **of_weights)
        if bad := not_finite(inner.state_dict()) or next(iter(notes["missing_keys"]), ""):
            raise ValueError(f"{bad} is missing or not finite")
        tokenizer = ForeignTokenizer(transformers.AutoTokenizer.from_pretrained(folder, **given))
        model = ForeignModel(inner.to(device), tokenizer.n_vocab).eval()
        if (rows := len(model.wte.weight)) < tokenizer.n_vocab:
            raise ValueError(f"{rows} embeddings are too few for {tokenizer.n_vocab} tokens")
        model.check()
        meta = meta_of(folder, kind, model, tokenizer.fingerprint)
        return Checkpoint(model, tokenizer, meta, folder)
    except Exception as error:  # what foreign files make of a library cannot be foreseen
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder} cannot be used: {reason:.200}") from None


def load_checkpoint(path: str, device: torch.device, kind: str) -> Checkpoint:
    """`training.checkpoint.load_checkpoint`, or a model that `hf:...` names as of a kind."""
    if path.startswith(PREFIX):
        return load(path, kind, device)
    return checkpoint.load_checkpoint(path, device)


def check_config(folder: Path) -> None:
    """Raises ValueError: a config.json of no such model, or of more weights than there are."""
    its = read_json(folder / "config.json")
    names = (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd"))
    sizes: Any = [isinstance(its, dict) and its.get(a, its.get(b)) for a, b in names]
    if not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(f"{folder}/config.json is not that of a causal language model")
    held = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    if 0 < held < sizes[0] * sizes[1] ** 2:  # any such model has more weights than that
        raise ValueError("its config.json asks for more weights than its files hold")


def meta_of(folder: Path, kind: str, model: ForeignModel, tokenizer: str) -> dict[str, Any]:
    """What our meta.json says, or said of the checkpoint that the folder is an export of."""
    weights = weight_files(folder)
    files = {WEIGHTS_FILE: fingerprint(weights), RANKS_FILE: tokenizer}
    shape = vars(model.config) | {"model_type": model.inner.config.model_type}
    meta = unknown_training() | {"kind": kind, "base": {}, "files": files, "model": shape}
    meta |= {"vocab_size": model.vocab_size, "environment": environment(model.wte.weight.device)}
    return origin_of(folder, weights) or meta


def load_models(
    paths: dict[str, str | None], device: str, to_sample: bool = False
) -> dict[str, Checkpoint]:
    """Those that are given of the models "base" and "instruct", see `check_models`; of two that
    `hf:...` names, both have the tokenizer and chat template of the instruct model. Raises
    ValueError: they are no pair.
    """
    given = {kind: path for kind, path in paths.items() if path}
    if len({path.startswith(PREFIX) for path in given.values()}) > 1:
        raise ValueError(f"either both --base and --instruct begin with {PREFIX}, or none")
    where = set_up(device)
    found = {kind: load_checkpoint(path, where, kind) for kind, path in given.items()}
    if "instruct" in found:
        chat_prompt(SAID, found["instruct"].tokenizer)  # there must be a template
    if len(found) == 2:
        share_tokenizer(found["base"], found["instruct"])
    return check_models(found, to_sample)


def share_tokenizer(base: Checkpoint, instruct: Checkpoint) -> None:
    """Gives a base of transformers the tokenizer of its instruct model; ours have the same already.
    Raises ValueError: it is another one.
    """
    old, new = base.tokenizer, instruct.tokenizer
    if not isinstance(old, ForeignTokenizer) or not isinstance(new, ForeignTokenizer):
        return
    # Only tokens that were added to a vocabulary may be the base's alone.
    added = {token: i for token, i in old.vocabulary.items() if i in old.added}
    if any(new.vocabulary.get(t, added.get(t)) != i for t, i in old.vocabulary.items()):
        raise ValueError("the two checkpoints have different tokenizers; they cannot be compared")
    if (rows := len(base.model.wte.weight)) < new.n_vocab:
        raise ValueError(f"{base.path} has {rows} embeddings, {instruct.path} {new.n_vocab} tokens")
    new.end_of_text, base.tokenizer = old.end_of_text, new
    for found in (base, instruct):
        found.model.vocab_size = found.meta["vocab_size"] = new.n_vocab


def load_pair(
    base: str, instruct: str, device: str, to_sample: bool = False
) -> tuple[Checkpoint, Checkpoint]:
    """A base and an instruct checkpoint, see `load_models`."""
    found = load_models({"base": base, "instruct": instruct}, device, to_sample)
    return found["base"], found["instruct"]
