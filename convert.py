"""Weights in and out, in the folders that Hugging Face's transformers reads and writes.

python convert.py import gpt2 out/gpt2
python convert.py export out/quickstart/instruct out/quickstart/instruct-hf

What is imported can be gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name on the hub, or a folder.
An export loads with `AutoModelForCausalLM` and `AutoTokenizer`, as their `gpt2` or `nanochat`.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.chat import ROLES
from data.sources.download import download, hub_files
from data.tokenizer import (
    BYTE_PATTERN,
    CONTROL_TOKENS,
    END_OF_TEXT,
    END_OF_TURN,
    WORD_PATTERN,
    Tokenizer,
    create_tokenizer,
)
from model.gpt import GPT, ModelConfig
from runtime.cli import one_line_errors
from runtime.device import environment
from runtime.files import new_directory, read_json, sha256_file, write_json
from training.checkpoint import load_checkpoint, save_checkpoint, writing

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_VOCAB_SIZE = 50257
ORIGIN_FILE = "diptych.json"  # in an export: what its checkpoint's meta.json said
HUB_FILES = ("config.json", "model*.safetensors*", "tokenizer.json", "vocab.json", ORIGIN_FILE)
# The switches that an architecture of transformers has built in.
BUILT_IN: dict[str, dict[str, Any]] = {
    "gpt2": {
        "position": "learned",
        "norm": "layernorm",
        "norm_embedding": False,
        "qk_norm": False,
        "bias": True,
        "logit_softcap": 0.0,
    },
    "nanochat": {
        "position": "rope",
        "norm": "rmsnorm",
        "norm_embedding": True,
        "qk_norm": True,
        "bias": False,
    },
}
SIZES = ("n_layer", "n_head", "n_embd", "block_size")
# How transformers calls what is a number or a name with us.
KEYS = {
    "gpt2": {
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "block_size": "n_positions",
        "inner": "n_inner",
        "activation": "activation_function",
        "dropout": "resid_pdrop embd_pdrop attn_pdrop",
    },
    "nanochat": {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "block_size": "max_position_embeddings",
        "inner": "intermediate_size",
        "activation": "hidden_act",
        "dropout": "attention_dropout",
    },
}
ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu2": "relu2"}
# A noncharacter of Unicode, which no text may hold, in the names of the control tokens: so text
# that looks like a control token is text there too. Decoding leaves it out.
MARK = "\ufdd0"


# ---- weights -------------------------------------------------------------------------------


def names(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Our names, joined along the output, for each of theirs; and whether theirs is transposed."""
    gpt2, kinds = config.position == "learned", ("weight", "bias")[: 1 + bool(config.bias)]
    yield ("wte.weight",), "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight", False
    if not config.tie_embeddings:
        yield ("lm_head.weight",), "lm_head.weight", False
    if gpt2:
        yield ("wpe.weight",), "transformer.wpe.weight", False
        parts = {
            "attn.c_attn": ("attn.query", "attn.key", "attn.value"),
            "attn.c_proj": ("attn.proj",),
            "mlp.c_fc": ("mlp.fc",),
            "mlp.c_proj": ("mlp.proj",),
            "ln_1": ("norm1",),
            "ln_2": ("norm2",),
        }
        for kind in kinds:
            yield (f"norm.{kind}",), f"transformer.ln_f.{kind}", False
    else:
        letters = {"query": "q", "key": "k", "value": "v", "proj": "o"}
        parts = {f"self_attn.{i}_proj": (f"attn.{name}",) for name, i in letters.items()}
        parts |= {"mlp.fc1": ("mlp.fc",), "mlp.fc2": ("mlp.proj",)}
    stack = "transformer.h" if gpt2 else "model.layers"
    for layer in range(config.n_layer):
        for theirs, ours in parts.items():
            for kind in kinds:
                transposed = gpt2 and kind == "weight" and not theirs.startswith("ln")
                mine = tuple(f"blocks.{layer}.{name}.{kind}" for name in ours)
                yield mine, f"{stack}.{layer}.{theirs}.{kind}", transposed


def export_weights(model: GPT) -> dict[str, Tensor]:
    """The weights under the names of transformers, without the padding of the vocabulary."""
    ours, theirs = model.state_dict(), dict[str, Tensor]()
    for mine, name, transposed in names(model.config):
        joined = torch.cat([ours[n].float() for n in mine])
        if mine[0] in ("wte.weight", "lm_head.weight"):
            joined = joined[: model.vocab_size]
        theirs[name] = (joined.T if transposed else joined).contiguous()
    return theirs


@torch.no_grad()
def import_weights(model: GPT, theirs: dict[str, Tensor], n_known: int) -> None:
    """Fills a model with weights under the names of transformers.

    Of their embeddings the first `n_known` are taken. Those of further tokens, which GPT-2 does
    not have, become the mean with a little noise; padding becomes zero.

    Raises:
        ValueError: a tensor is missing or has another shape; with its name.
    """
    ours, head = model.state_dict(), theirs.get("lm_head.weight")
    if model.config.tie_embeddings and head is not None:
        name = next(names(model.config))[1]
        if not torch.equal(head, theirs.get(name, theirs.get("wte.weight", head))):
            raise ValueError("its config.json ties the head to the embedding, its weights do not")
    for mine, name, transposed in names(model.config):
        short = name.removeprefix("transformer.")  # GPT-2's own files leave that out
        if (tensor := theirs.get(name, theirs.get(short))) is None:
            raise ValueError(f"its weights lack {name}")
        tensor = (tensor.T if transposed and tensor.dim() == 2 else tensor).float()
        if mine[0] in ("wte.weight", "lm_head.weight") and tensor.dim() == 2:
            if len(tensor) < n_known:
                raise ValueError(f"its {name} has {len(tensor)} rows, too few for {n_known} tokens")
            tensor = fit_rows(tensor[:n_known], model.vocab_size, len(ours[mine[0]]))
        expected = torch.Size([sum(len(ours[n]) for n in mine), *ours[mine[0]].shape[1:]])
        if tensor.shape != expected:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected)}"
            raise ValueError(f"its {name} is of shape {shapes}, which its config.json asks for")
        for n, part in zip(mine, tensor.chunk(len(mine)), strict=True):
            ours[n].copy_(part)


def fit_rows(tensor: Tensor, vocab_size: int, padded: int) -> Tensor:
    """An embedding with rows for `vocab_size` ids, then zeros up to `padded`."""
    rows, width = tensor.shape
    noise = torch.randn(vocab_size - rows, width, generator=torch.Generator().manual_seed(0))
    new = tensor.mean(dim=0) + 0.1 * tensor.std(dim=0) * noise
    return torch.cat((tensor, new, tensor.new_zeros(padded - vocab_size, width)))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names.

    Raises:
        ValueError: there is none, or a file is missing, cut or something else.
    """
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.exists() and not files[0].exists():
        files = [
            folder / Path(n).name for n in sorted(set(read_json(index)["weight_map"].values()))
        ]
    weights: dict[str, Tensor] = {}
    for file in files:
        if not file.exists():
            pickled = any(folder.glob("*.bin"))
            why = "; pickles (.bin) are never loaded, save it as safetensors" if pickled else ""
            raise ValueError(f"{file} is missing{why}")
        try:
            with safe_open(file, framework="pt") as opened:
                weights |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is cut or not a safetensors file ({error})") from None
    return weights


# ---- configs -------------------------------------------------------------------------------


def their_config(c: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """What a config.json of transformers says of a model, all that the logits depend on."""
    kind = "gpt2" if c.position == "learned" else "nanochat"
    keys = KEYS[kind]
    theirs: dict[str, Any] = {keys[name]: getattr(c, name) for name in SIZES}
    theirs |= {
        "model_type": kind,
        "vocab_size": vocab_size,
        "tie_word_embeddings": c.tie_embeddings,
        keys["activation"]: ACTIVATIONS[str(c.activation)],
        keys["inner"]: 4 * c.n_embd,
    }
    if kind == "gpt2":
        return theirs | {
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        }
    return theirs | {
        "num_key_value_heads": c.n_head,
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "final_logit_softcapping": c.logit_softcap or None,
    }


def export_config(model: GPT) -> dict[str, Any]:
    """The config.json of transformers.

    Raises:
        ValueError: a switch is set as no architecture there has it; with its name.
    """
    c = model.config
    missing = {
        kind: [f"model.{k}={getattr(c, k)}" for k, v in built_in.items() if getattr(c, k) != v]
        for kind, built_in in BUILT_IN.items()
    }
    kind = min(missing, key=lambda kind: len(missing[kind]))
    if missing[kind]:
        wanted = ", ".join(f"{k}={v}" for k, v in BUILT_IN[kind].items())
        raise ValueError(
            f"{', '.join(missing[kind])} cannot be exported: the nearest architecture of "
            f"transformers, {kind}, has it built in otherwise ({wanted})"
        )
    name = {"gpt2": "GPT2LMHeadModel", "nanochat": "NanoChatForCausalLM"}[kind]
    dropouts = dict.fromkeys(KEYS[kind]["dropout"].split(), c.dropout)
    more = {"architectures": [name], "dtype": "float32", **dropouts}
    return their_config(c, model.vocab_size) | more


def import_config(theirs: dict[str, Any]) -> ModelConfig:
    """Our config of a config.json of transformers.

    Raises:
        ValueError: not a GPT-2 or nanochat, or one with something that our model does not have.
    """
    kind = theirs.get("model_type")
    if kind not in KEYS:
        raise ValueError(f"it is a {kind!r}, not a GPT-2 (or an export of this project)")
    keys, gpt2 = KEYS[kind], kind == "gpt2"
    given = theirs.get(keys["activation"], "gelu_new" if gpt2 else "relu2")
    ours = {v: k for k, v in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu"}
    if given not in ours:
        raise ValueError(f"its {keys['activation']} is {given!r}; ours are {', '.join(ours)}")
    values: dict[str, Any] = {name: _integer(theirs, keys[name]) for name in SIZES}
    values["dropout"] = theirs.get(keys["dropout"].split()[0], 0.0)
    values["activation"] = ours[given]
    values["tie_embeddings"] = theirs.get("tie_word_embeddings", gpt2)
    if type(values["tie_embeddings"]) is not bool:
        raise ValueError("its tie_word_embeddings is neither true nor false")
    if not gpt2:
        values["logit_softcap"] = theirs.get("final_logit_softcapping", 15.0) or 0.0
    config = ModelConfig("gpt2" if gpt2 else "modern", **values)
    expected = their_config(config, _integer(theirs, "vocab_size")) | {keys["activation"]: given}
    odd = {k: theirs[k] for k, v in expected.items() if theirs.get(k) not in (None, v)}
    if odd:
        text = ", ".join(f"{k}={v}" for k, v in odd.items())
        raise ValueError(
            f"its config.json asks for what this project's model does not have: {text}"
        )
    return config


def _integer(config: dict[str, Any], key: str) -> int:
    if type(config.get(key)) is not int:
        raise ValueError(f"its config.json has no whole number under {key}")
    return int(config[key])


# ---- tokenizers ----------------------------------------------------------------------------


def byte_letters() -> list[str]:
    """The letter that stands for each byte in GPT-2's vocabulary files: itself, if visible."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in visible else next(others)) for b in range(256)]


def marked(token: str) -> str:
    """The name of a control token in a tokenizer.json."""
    return token[0] + MARK + token[1:]


def export_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of the tokenizers library."""
    letters = byte_letters()
    ranks = tokenizer.ranks

    def spell(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    # tiktoken joins any two tokens that make a third, so all such pairs are merges.
    merges = [
        (spell(token[:i]), spell(token[i:]))
        for token in sorted(ranks, key=lambda t: ranks[t])
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {**byte_level, "use_regex": tokenizer.kind != "byte"}  # GPT-2's, which is ours
    unmark = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokenizer.control(t), "content": marked(t), "special": True, **flags}
            for t in CONTROL_TOKENS
        ],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [unmark, split]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as tiktoken: a word that is a token is that token
            "vocab": {spell(token): rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def chat_template() -> str:
    """The template of data/chat.py in Jinja; `generation` marks what training supervises."""
    # A message that holds a control token's name as it is here loses the mark: no forged turns.
    content = f"message['content'] | replace('<{MARK}|', '<|') + '{marked(END_OF_TURN)}'"
    parts = [
        f"{{{{ '{marked(END_OF_TEXT)}' }}}}",
        "{% for message in messages %}",
        f"{{% if message['role'] not in {list(ROLES)} %}}",
        f"{{{{ raise_exception('roles are {', '.join(ROLES)}') }}}}{{% endif %}}",
        f"{{{{ '<{MARK}|' + message['role'] + '|>' }}}}",
        "{% if message['role'] == 'assistant' %}",
        f"{{% generation %}}{{{{ {content} }}}}{{% endgeneration %}}",
        f"{{% else %}}{{{{ {content} }}}}{{% endif %}}",
        "{% endfor %}",
        f"{{% if add_generation_prompt %}}{{{{ '{marked('<|assistant|>')}' }}}}{{% endif %}}",
    ]
    return "".join(parts)


def import_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer, bool]:
    """Our tokenizer of a tokenizer.json or a vocab.json, or GPT-2's where there is neither.

    Also returns whether theirs has our control tokens beyond <|endoftext|>.

    Raises:
        ValueError: it splits or joins text otherwise than ours can.
    """
    special: dict[str, int]
    if (file := folder / "tokenizer.json").exists():
        theirs = read_json(file)
        model, split = theirs["model"], theirs["pre_tokenizer"] or {}
        vocab, added = model["vocab"], theirs["added_tokens"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        made = [vocab[a + b] for a, b in merges]  # in the order of their ids, and all of them
        special, words = {t["content"]: t["id"] for t in added}, split.get("use_regex", True)
        letters = [token for token in vocab if len(token) == 1]
        whole = made == sorted(made) and {*made, *(vocab[x] for x in letters)} >= {
            i for token, i in vocab.items() if token not in special
        }
        odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        bytewise = split.get("type") == "ByteLevel" and not split.get("add_prefix_space")
        if not (whole and bytewise) or theirs.get("normalizer") or any(map(model.get, odd)):
            raise ValueError("its tokenizer.json splits or joins text otherwise than GPT-2's")
        plain = [t["content"] for t in added if not t.get("special")]
        if set(plain) - {END_OF_TEXT}:
            raise ValueError(f"its tokenizer.json adds words to GPT-2's, such as {plain[0]!r}")
    elif (file := folder / "vocab.json").exists():
        vocab, words = read_json(file), True
        special = {END_OF_TEXT: vocab[END_OF_TEXT]}
    elif vocab_size == GPT2_VOCAB_SIZE:
        return create_tokenizer("gpt2", []), False
    else:
        raise ValueError("it has no tokenizer.json and no vocab.json")
    numbers = {letter: byte for byte, letter in enumerate(byte_letters())}
    ranks = {
        bytes(numbers[letter] for letter in token): rank
        for token, rank in vocab.items()
        if token not in special
    }
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ids of the tokens in its {file.name} do not count up from 0")
    has_control = marked(END_OF_TURN) in special
    known = [marked(t) for t in CONTROL_TOKENS] if has_control else [END_OF_TEXT]
    for i, token in enumerate(known, len(ranks)):
        if special.get(token) != i:
            raise ValueError(f"the id of {token} in its {file.name} is not {i}, the first free one")
    if dropped := [token for token in special if token not in known]:
        print(f"note: left out, with what was learned of them: {', '.join(dropped)}")
    if not words:
        return Tokenizer("byte", BYTE_PATTERN, ranks), has_control
    kind = "gpt2" if len(ranks) + 1 == GPT2_VOCAB_SIZE else "bpe"
    return Tokenizer(kind, WORD_PATTERN, ranks), has_control


# ---- the two commands ----------------------------------------------------------------------


def import_checkpoint(source: str, out: Path, downloads: Path, dropout: float | None) -> Path:
    """Makes a run's folder with one checkpoint of a folder, or a name on the hub; returns it.

    What is no export of this project becomes a base. An export, unchanged since, becomes what it
    was, bit for bit.

    Args:
        dropout: of training from here on; None for what its config.json says.

    Raises:
        ValueError: not a GPT-2, damaged, not to be had, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another folder, or delete it")
    folder = Path(source) if Path(source).is_dir() else from_hub(source, downloads)
    with importing(folder):
        config, n_rows = read_config(folder)
        tokenizer, has_control = import_tokenizer(folder, n_rows)
        weights = read_weights(folder)
        files = {f.name: sha256_file(f) for f in sorted(folder.glob("model*.safetensors"))}
        meta: dict[str, Any] = {
            "kind": "base",
            "config": {"data": {"path": None}},
            "environment": environment(torch.device("cpu")),
            "prepared": {},
            "data": {"fingerprint": None},
        }
        origin = read_json(folder / ORIGIN_FILE) if (folder / ORIGIN_FILE).exists() else {}
        if origin.get("weights") == files:
            meta, config = origin["meta"], ModelConfig(**origin["meta"]["model"])
            if meta["kind"] not in ("base", "instruct"):
                raise ValueError(f"its {ORIGIN_FILE} names an unknown kind")
        if dropout is not None:
            config = replace(config, dropout=dropout)
        model = GPT(config, tokenizer.n_vocab)
        import_weights(
            model, weights, tokenizer.n_vocab if has_control else len(tokenizer.ranks) + 1
        )
    meta = meta | {"imported": {"from": source, "files": files}}
    step, metrics = meta.get("step", 0), meta.get("metrics", {})
    path = save_checkpoint(out, model, [], tokenizer, meta, step, metrics)
    print(f"{meta['kind']} checkpoint of {model.n_params():,} parameters: {path}")
    return path


def from_hub(name: str, downloads: Path) -> Path:
    """Downloads a model of the hub; returns the folder that holds it.

    Raises:
        ValueError: no such model, or the hub cannot be reached.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"{name} is neither a folder nor a name on the Hugging Face hub")
    if "/" not in name and name not in GPT2_NAMES:
        known = ", ".join(GPT2_NAMES)
        raise ValueError(f"{name} is neither a folder nor a GPT-2; it can be {known} or owner/name")
    repo = name if "/" in name else f"openai-community/{name}"
    try:
        folder, files = downloads / repo, hub_files(repo, "models", HUB_FILES)
    except ValueError as error:
        raise ValueError(f"there is no folder {name}, and as a name on the hub: {error}") from None
    download([file for file in files if file.name == "config.json"], folder)
    with importing(folder):
        read_config(folder)  # before gigabytes of something else
    download(files, folder)
    return folder


def read_config(folder: Path) -> tuple[ModelConfig, int]:
    """Our config of a folder's config.json, and how many tokens it has embeddings for.

    Raises:
        ValueError: not a GPT-2, or one that our model cannot be.
    """
    theirs = read_json(folder / "config.json")
    if not isinstance(theirs, dict):
        raise ValueError("its config.json is not the config of a model")
    return import_config(theirs), _integer(theirs, "vocab_size")


@contextlib.contextmanager
def importing(folder: Path) -> Iterator[None]:
    """Names the folder in whose files something is not what it should be."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, ValueError):
            reason = (
                f"something in its files is not as in a GPT-2's ({type(error).__name__}: {reason})"
            )
        raise ValueError(f"{folder} cannot be imported: {reason}") from None


def export_checkpoint(path: str, out: Path) -> None:
    """Writes a folder that transformers loads.

    Raises:
        ValueError: no checkpoint, or one that transformers has no architecture for.
        OSError: `out` is there already, or cannot be written.
    """
    checkpoint = load_checkpoint(path)
    tokenizer = checkpoint.tokenizer
    end = END_OF_TURN if checkpoint.meta["kind"] == "instruct" else END_OF_TEXT
    # Padding by the end token: any other id, found in a prompt, would be taken for padding there.
    special = {"bos_token": END_OF_TEXT, "eos_token": end, "pad_token": end}
    ids = {f"{name}_id": tokenizer.control(token) for name, token in special.items()}
    config = export_config(checkpoint.model) | ids
    with new_directory(out) as folder:
        weights = folder / "model.safetensors"
        with writing(out):
            save_file(export_weights(checkpoint.model), weights, {"format": "pt"})
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": checkpoint.model.config.block_size,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",  # what is generated follows the prompt at once
            "chat_template": chat_template(),
            **{name: marked(token) for name, token in special.items()},
        }
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", ids)
        write_json(folder / "tokenizer.json", export_tokenizer(tokenizer))
        write_json(folder / "tokenizer_config.json", tokenizer_config)
        origin = {"weights": {weights.name: sha256_file(weights)}, "meta": checkpoint.meta}
        write_json(folder / ORIGIN_FILE, origin)
    kind = f"{checkpoint.meta['kind']} checkpoint"
    print(f"{out}: the {kind} of step {checkpoint.meta['step']} as a {config['model_type']}")


def main() -> None:
    """Runs one command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    i = commands.add_parser("import", help="from transformers: a base checkpoint for train_sft.py")
    i.add_argument("source", help=f"{', '.join(GPT2_NAMES)}, owner/name on the hub, or a folder")
    i.add_argument("out", type=Path, help="run folder to make")
    i.add_argument("--dropout", type=float, help="of training from here on (default: its own)")
    downloads = Path("out/downloads")
    i.add_argument("--downloads", type=Path, default=downloads, help=f"(default {downloads})")
    e = commands.add_parser("export", help="a folder for transformers")
    e.add_argument("checkpoint", help="checkpoint, or its run")
    e.add_argument("out", type=Path, help="folder to make")
    a = p.parse_args()
    with one_line_errors():
        if a.command == "import":
            import_checkpoint(a.source, a.out, a.downloads, a.dropout)
        else:
            export_checkpoint(a.checkpoint, a.out)


if __name__ == "__main__":
    main()
