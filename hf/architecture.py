"""The architectures of Hugging Face's transformers that our model can be: config and weights. Only
a model whose logits transformers computes too is exported; what it lacks is refused by name.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.gpt import GPT, ModelConfig
from runtime.cli import listed
from runtime.files import read_json

KINDS = ("gpt2", "nanochat")
SIZES = ("n_layer", "n_head", "n_embd", "block_size")
ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu2": "relu2"}  # ours: theirs
EMBEDDINGS = ("wte", "wpe", "lm_head")  # ours without a bias
VOCABULARY = ("wte.weight", "embed_tokens.weight", "lm_head.weight")  # theirs with a row per token
# Fields of ModelConfig that may have any value: a config.json tells it, or no logit depends on it.
# A field that is named neither here nor in SWITCHES is a new one, and must have its default.
FREE = {*SIZES, "dropout", "logit_softcap", "recipe", "zero_init_projections"}
# fmt: off
SWITCHES = {  #       gpt2            nanochat: the values that these can follow
    "position":       (["learned"],   ["rope"]),
    "norm":           (["layernorm"], ["rmsnorm"]),
    "norm_embedding": ([False],       [True]),
    "qk_norm":        ([False],       [True]),
    "bias":           ([True],        [False]),
    "logit_softcap":  ([0.0],         None),
    "activation":     (ACTIVATIONS,   ACTIVATIONS),
    "tie_embeddings": ([True, False], [True, False]),
}
KEYS = {  #        gpt2                                 nanochat: of a config.json
    "n_layer":    ("n_layer",                           "num_hidden_layers"),
    "n_head":     ("n_head",                            "num_attention_heads"),
    "n_embd":     ("n_embd",                            "hidden_size"),
    "block_size": ("n_positions",                       "max_position_embeddings"),
    "inner":      ("n_inner",                           "intermediate_size"),
    "activation": ("activation_function",               "hidden_act"),
    "dropout":    ("resid_pdrop embd_pdrop attn_pdrop", "attention_dropout"),
}
CONSTANTS: dict[str, dict[str, Any]] = {  # of a config.json too
    "gpt2": {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
             "architectures": ["GPT2LMHeadModel"], "dtype": "float32"},
    "nanochat": {"attention_bias": False, "rms_norm_eps": 1e-6,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                 "architectures": ["NanoChatForCausalLM"], "dtype": "float32"},
}
MODULES = {  #               gpt2                            nanochat
    "wte":                  ("transformer.wte",              "model.embed_tokens"),
    "wpe":                  ("transformer.wpe",              None),
    "lm_head":              ("lm_head",                      "lm_head"),
    "norm":                 ("transformer.ln_f",             None),
    "blocks.{}.attn.query": ("transformer.h.{}.attn.c_attn", "model.layers.{}.self_attn.q_proj"),
    "blocks.{}.attn.key":   ("transformer.h.{}.attn.c_attn", "model.layers.{}.self_attn.k_proj"),
    "blocks.{}.attn.value": ("transformer.h.{}.attn.c_attn", "model.layers.{}.self_attn.v_proj"),
    "blocks.{}.attn.proj":  ("transformer.h.{}.attn.c_proj", "model.layers.{}.self_attn.o_proj"),
    "blocks.{}.mlp.fc":     ("transformer.h.{}.mlp.c_fc",    "model.layers.{}.mlp.fc1"),
    "blocks.{}.mlp.proj":   ("transformer.h.{}.mlp.c_proj",  "model.layers.{}.mlp.fc2"),
    "blocks.{}.norm1":      ("transformer.h.{}.ln_1",        None),
    "blocks.{}.norm2":      ("transformer.h.{}.ln_2",        None),
}
# fmt: on


def _column(table: dict[str, Any], kind: str) -> dict[str, Any]:
    return {k: v for k, cells in table.items() if (v := cells[KINDS.index(kind)]) is not None}


def find_architecture(config: ModelConfig) -> str:
    """The architecture that computes what such a model does. Raises ValueError, naming fields."""
    new = {f.name: [f.default] for f in fields(config) if f.name not in {*FREE, *SWITCHES}}

    def differences(kind: str) -> list[str]:
        values = _column(SWITCHES, kind) | new
        return [f"model.{k}={v}" for k in values if (v := getattr(config, k)) not in values[k]]

    kind = min(KINDS, key=lambda kind: len(differences(kind)))
    if found := ", ".join(differences(kind)):
        wanted = [f"{k}={' or '.join(map(str, v))}" for k, v in _column(SWITCHES, kind).items()]
        raise ValueError(
            f"{found} cannot be exported: the nearest architecture of transformers, {kind}, has it "
            f"built in otherwise ({', '.join(wanted)}), or hf/architecture.py does not know it"
        )
    return kind


def export_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The config.json of transformers; refuses what `find_architecture` refuses."""
    kind = find_architecture(config)
    keys = _column(KEYS, kind)
    theirs = {keys[size]: getattr(config, size) for size in SIZES} | {
        "model_type": kind,
        "vocab_size": vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        keys["activation"]: ACTIVATIONS[str(config.activation)],
        keys["inner"]: 4 * config.n_embd,
    }
    theirs |= CONSTANTS[kind] | dict.fromkeys(keys["dropout"].split(), config.dropout)
    if kind == "nanochat":
        theirs["num_key_value_heads"] = config.n_head
        theirs["final_logit_softcapping"] = config.logit_softcap or None
    return theirs


def read_config(folder: Path) -> tuple[ModelConfig, int]:
    """Our config of a folder's config.json, and how many tokens it has embeddings for.
    Raises ValueError: not a GPT-2 or nanochat, or one with something that our model does not have.
    """
    theirs = read_json(folder / "config.json")
    if not isinstance(theirs, dict):
        raise ValueError("its config.json is not the config of a model")
    if (kind := theirs.get("model_type")) not in KINDS:
        raise ValueError(f"it is a {kind!r}, not a GPT-2 (or an export of this project)")
    gpt2, keys = kind == "gpt2", _column(KEYS, kind)
    for key in (*(keys[size] for size in SIZES), "vocab_size"):
        if type(theirs.get(key)) is not int:
            raise ValueError(f"its config.json has no whole number under {key}")
    given = theirs.get(keys["activation"], "gelu_new" if gpt2 else "relu2")
    ours: dict[Any, Any] = {v: k for k, v in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu"}
    if given not in ours:
        raise ValueError(f"its {keys['activation']} is {given!r}; ours are {', '.join(ours)}")
    if type(tied := theirs.get("tie_word_embeddings", gpt2)) is not bool:
        raise ValueError("its tie_word_embeddings is neither true nor false")
    config = ModelConfig(
        "gpt2" if gpt2 else "modern",
        **{size: theirs[keys[size]] for size in SIZES},
        dropout=float(theirs.get(keys["dropout"].split()[0], 0.0)),
        activation=ours[given],
        tie_embeddings=tied,
        logit_softcap=0.0 if gpt2 else float(theirs.get("final_logit_softcapping", 15.0) or 0.0),
    )
    unread = (keys["activation"], "architectures", "dtype", *keys["dropout"].split())
    expected = export_config(config, theirs["vocab_size"]) | {k: theirs.get(k) for k in unread}
    odd = [f"{k}={theirs[k]}" for k, v in expected.items() if theirs.get(k) not in (None, v)]
    if odd:
        raise ValueError(f"its config.json asks for what our model does not have: {listed(odd)}")
    return config, theirs["vocab_size"]


def _views(model: GPT) -> dict[str, list[Tensor]]:
    """The model's weights as transformers names, turns and joins them (by the last dimension)."""
    config, ours = model.config, model.state_dict()
    modules = _column(MODULES, find_architecture(config))
    if config.tie_embeddings:
        del modules["lm_head"], ours["lm_head.weight"]
    names = {
        f"{mine}.{what}".format(i): f"{theirs}.{what}".format(i)
        for i in range(config.n_layer)
        for mine, theirs in modules.items()
        for what in ("weight", "bias")[: 1 if mine in EMBEDDINGS else 1 + bool(config.bias)]
    }
    if odd := names.keys() ^ ours.keys():
        raise ValueError(f"{min(odd)} cannot be exported: transformers has other weights")
    views: dict[str, list[Tensor]] = {}
    for mine, name in names.items():
        view = ours[mine][: model.vocab_size] if name.endswith(VOCABULARY) else ours[mine]
        turned = ".h." in name and view.dim() == 2  # a GPT-2's: inputs first, then outputs
        views.setdefault(name, []).append(view.T if turned else view)
    return views


def export_weights(model: GPT) -> dict[str, Tensor]:
    """The weights under the names of transformers, without the padding of the vocabulary."""
    return {name: torch.cat(p, -1).float().contiguous() for name, p in _views(model).items()}


@torch.no_grad()
def import_weights(model: GPT, folder: Path, n_known: int) -> None:
    """Fills a new model with a folder's weights; tokens from `n_known` on, which GPT-2 does not
    have, get the mean embedding and a little noise. Raises ValueError: a file or a tensor is
    missing, damaged or of another shape; with its name.
    """
    theirs, tied = _read_weights(folder), model.config.tie_embeddings
    for name, parts in _views(model).items():
        short = name.removeprefix("transformer.")  # GPT-2's own files leave that out
        if (tensor := theirs.get(name, theirs.get(short))) is None:
            raise ValueError(f"its weights lack {name}")
        if name.endswith(VOCABULARY) and tensor.dim() == 2:
            if tied and not torch.equal(theirs.get("lm_head.weight", tensor), tensor):
                raise ValueError("its config.json ties the head to the embedding, not its weights")
            if len(tensor) < n_known:
                raise ValueError(f"its {name} has {len(tensor)} rows, too few for {n_known} tokens")
            known, random = tensor[:n_known].float(), torch.Generator().manual_seed(0)
            noise = torch.randn(model.vocab_size - n_known, known.shape[1], generator=random)
            tensor = torch.cat((known, known.mean(dim=0) + 0.1 * known.std(dim=0) * noise))
        shape, asked = tuple(tensor.shape), tuple(torch.cat(parts, -1).shape)
        if shape != asked:
            raise ValueError(f"its {name} is of shape {shape}, its config.json asks for {asked}")
        for part, values in zip(parts, tensor.chunk(len(parts), -1), strict=True):
            part.copy_(values)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.exists() and not (folder / "model.safetensors").exists():
        files = {Path(name).name for name in read_json(index)["weight_map"].values()}
    weights: dict[str, Tensor] = {}
    for file in sorted(folder / name for name in files):
        if not file.exists():
            raise ValueError(f"{file} is missing; only safetensors are read, no pickles (.bin)")
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is cut or not a safetensors file ({error})") from None
    return weights
