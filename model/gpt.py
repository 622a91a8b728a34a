"""A compact GPT. Two recipes, `gpt2` and `modern`, preset the same few switches.

`gpt2` is GPT-2 (Radford et al. 2019; Hugging Face `gpt2`). `modern` is the Hugging Face `nanochat`
architecture: RoPE, parameter-free RMSNorm also after the embedding, QK-norm, ReLU^2, an untied
head, zero-initialised output projections and a logit soft-cap.

Shapes in comments: B rows, T tokens, C = n_embd, H = n_head, D = C / H.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.check import check_range
from model.seen import KVCache, Seen, packed_attention, see_documents, see_row

Rope = tuple[Tensor, Tensor] | None  # cosines and sines, broadcast to (B, H, T, D)
# fmt: off
SWITCHES: dict[str, tuple[Any, Any]] = {
    # switch                 gpt2         modern
    "position":              ("learned",   "rope"),
    "norm":                  ("layernorm", "rmsnorm"),
    "norm_embedding":        (False,       True),
    "qk_norm":               (False,       True),
    "activation":            ("gelu",      "relu2"),
    "bias":                  (True,        False),
    "tie_embeddings":        (True,        False),
    "zero_init_projections": (False,       True),
    "logit_softcap":         (0.0,         15.0),
}
# fmt: on
RECIPES = {
    name: {k: v[i] for k, v in SWITCHES.items()} for i, name in enumerate(("gpt2", "modern"))
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture. A switch that is left out takes its recipe's value. Raises ValueError if
    the combination cannot be built.
    """

    recipe: Literal["gpt2", "modern"] = "modern"
    """Sets the defaults of the switches below, and the scale of the initial weights."""
    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads; must divide n_embd."""
    n_embd: int = 128
    """Width of the residual stream."""
    block_size: int = 256
    """Longest context, in tokens."""
    dropout: float = 0.0
    """Share of activations dropped in training, 0 to 1."""
    position: Literal["learned", "rope"] | None = None
    """Positions: a learned table, or rotary (Su et al. 2021, arXiv 2104.09864)."""
    norm: Literal["layernorm", "rmsnorm"] | None = None
    """LayerNorm with parameters, or RMSNorm without."""
    norm_embedding: bool | None = None
    """Normalise the embedding before the first block."""
    qk_norm: bool | None = None
    """RMS-normalise queries and keys per head (Henry et al. 2020, arXiv 2010.04245)."""
    activation: Literal["gelu", "gelu_exact", "relu2"] | None = None
    """Of the MLP: GELU (GPT-2's tanh form, or the exact one, faster on a CPU) or squared ReLU
    (So et al. 2021, arXiv 2109.08668)."""
    bias: bool | None = None
    """Biases in linear layers and LayerNorm."""
    tie_embeddings: bool | None = None
    """One matrix for the embedding and the output head."""
    zero_init_projections: bool | None = None
    """Initialise output projections to zero, so that every block begins as the identity."""
    logit_softcap: float | None = None
    """Logits are c * tanh(logits / c); 0 leaves them as they are."""

    def __post_init__(self) -> None:
        for switch, value in RECIPES[self.recipe].items():
            if getattr(self, switch) is None:
                object.__setattr__(self, switch, value)
        check_range("model.n_layer", self.n_layer, "1 to 4096", "each takes a while to build")
        for size in ("n_head", "n_embd", "block_size"):
            check_range(f"model.{size}", getattr(self, size), "1 or more")
        check_range("model.dropout", self.dropout, "0 or more and below 1")
        check_range("model.logit_softcap", self.logit_softcap, "0 or more", "0 turns it off")
        C, H = self.n_embd, self.n_head
        if C % H:
            raise ValueError(f"model.n_head={H} does not divide model.n_embd={C}")
        if self.position == "rope" and C // H % 2:
            raise ValueError(f"model.n_embd / model.n_head = {C // H} is odd; RoPE rotates pairs")

    @property
    def head_size(self) -> int:
        """Dimension of a head, D."""
        return self.n_embd // self.n_head

    @property
    def has_varlen(self) -> bool:
        """Whether the GPU's variable-length attention takes this head size and dropout."""
        return self.head_size % 8 == 0 and self.head_size <= 256 and not self.dropout


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation over C."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, eps=1e-5, bias=bool(config.bias))
    return nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (x1, x2), the halves of x (B, H, T, D), into (x1 c + x2 s, x2 c - x1 s).

    `cos` holds (c, c) and `sin` (s, -s), each (..., T, D).
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        C, bias = config.n_embd, bool(config.bias)
        # Three matrices, not one: Muon orthogonalises each, and lab/ inspects each.
        self.query = nn.Linear(C, C, bias=bias)
        self.key = nn.Linear(C, C, bias=bias)
        self.value = nn.Linear(C, C, bias=bias)
        self.proj = nn.Linear(C, C, bias=bias)

    def heads(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, D) of x (B, T, C), with RoPE and QK-norm."""
        shape = (*x.shape[:2], self.config.n_head, -1)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        if rope is not None:  # before the QK-norm, as in nanochat
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if self.config.qk_norm:
            q, k = (F.rms_norm(t, t.shape[-1:], eps=1e-6) for t in (q, k))
        return q, k, v

    def forward(self, x: Tensor, rope: Rope, seen: Seen) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q, k, v = self.heads(x, rope)
        k, v = seen.update_cache(self.layer, k, v)
        dropout = self.config.dropout if self.training else 0.0
        if seen.bounds is not None:
            y = packed_attention(q, k, v, seen.bounds)
        else:
            y = F.scaled_dot_product_attention(q, k, v, seen.mask, dropout, seen.causal)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """Position-wise feed-forward network, four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=bool(config.bias))
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=bool(config.bias))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.fc(x)
        if self.config.activation == "relu2":
            x = F.relu(x)
            x = x * x  # its backward pass is faster than that of square()
        else:
            x = F.gelu(x, approximate="tanh" if self.config.activation == "gelu" else "none")
        return self.proj(x)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention, then x + MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm1, self.attn = make_norm(config), Attention(config, layer)
        self.norm2, self.mlp = make_norm(config), MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, rope: Rope, seen: Seen) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.drop(self.attn(self.norm1(x), rope, seen))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of what is added to the residual stream."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class GPT(nn.Module):
    """A decoder-only transformer language model.

    Args:
        config: the architecture.
        vocab_size: number of the tokenizer's ids. The matrices are padded to a multiple of 64;
            logits leave the model without the padding, so a padded id can never be sampled.
    """

    loss_chunk: int | None = None  # run.loss_chunk: positions per chunk of the loss; None: all
    activation_checkpointing = False  # run.activation_checkpointing: blocks are computed twice
    is_sharded = False  # run.shard: each process holds a share of the weights
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        padded = math.ceil(vocab_size / 64) * 64
        self.wte = nn.Embedding(padded, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        if config.norm_embedding:
            self.norm_embedding = make_norm(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, padded, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        if config.position == "rope":
            D = config.head_size
            frequency = 10_000.0 ** -(torch.arange(0, D, 2) / D)
            angles = torch.outer(torch.arange(config.block_size), frequency)
            cos, sin = angles.cos().repeat(1, 2), torch.cat((angles.sin(), -angles.sin()), dim=1)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every parameter, from torch's global generator. No other place draws any.

        `gpt2`: N(0, 0.02), output projections scaled by 1 / sqrt(2 n_layer) (GPT-2, section 2.3).
        `modern`: variance 1 / C, as an orthogonal C x C matrix has (Muon's update before its lr).
        Both: an untied head is small, so that the first loss is about ln V.
        """
        c, spread = self.config, {"wte.weight": 0.02, "wpe.weight": 0.02, "lm_head.weight": 0.001}
        matrix_std = 0.02 if c.recipe == "gpt2" else c.n_embd**-0.5
        for name, p in self.named_parameters():  # a tied head is listed once, as wte
            if p.dim() < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif not name.endswith("proj.weight"):
                nn.init.normal_(p, std=spread.get(name, matrix_std))
            elif c.zero_init_projections:
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=matrix_std / math.sqrt(2 * c.n_layer))
        for table in (self.wte, self.lm_head):
            table.weight[self.vocab_size :] = 0.0  # padding; its gradient is always zero

    def hidden(self, idx: Tensor, seen: Seen | None = None) -> Tensor:
        """Final hidden states (B, T, C) of ids (B, T); without `seen`, rows are plain causal.
        Raises ValueError if there are more tokens than block_size.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens exceed the model's block_size {self.config.block_size}")
        seen = see_row(idx) if seen is None else seen
        x = self.wte(idx)
        if self.config.position == "learned":
            x = x + self.wpe.weight[seen.positions]
        if self.config.norm_embedding:
            x = self.norm_embedding(x)
        x = F.dropout(x, self.config.dropout, self.training)
        rope = None
        if self.config.position == "rope":
            cos, sin = (F.embedding(seen.positions, t) for t in (self.rope_cos, self.rope_sin))
            rope = cos.unsqueeze(-3).to(x.dtype), sin.unsqueeze(-3).to(x.dtype)  # for all heads
        twice = self.activation_checkpointing and self.training  # so that only each x is kept
        for block in self.blocks:
            args = x, rope, seen
            x = checkpoint(block, *args, use_reentrant=False) if twice else block(*args)
        return self.norm(x)

    def new_cache(self, n_rows: int, room: int) -> KVCache:
        """An empty cache of keys and values for rows of up to `room` tokens."""
        c = self.config
        return KVCache(c.n_layer, (n_rows, c.n_head, room, c.head_size), self.wte.weight)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., C), without the padding."""
        return self.padded_logits(x)[..., : self.vocab_size]

    def padded_logits(self, x: Tensor) -> Tensor:
        """Logits of all rows of the head."""
        # In fp32 from here on, also under autocast: bf16 is too coarse for soft-cap and softmax.
        logits = self.lm_head(x).float()
        cap = self.config.logit_softcap
        # c * tanh(x / c), written with sigmoid, which is faster on CPUs
        return 2 * cap * torch.sigmoid(logits * (2 / cap)) - cap if cap else logits

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        documents: Tensor | None = None,
        kept: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab_size), or (n, vocab_size) at `kept`; with targets the summed loss in
        nats, a scalar. The arguments are the fields of `Batch`, in their order. The head runs only
        where weights are not zero, on `loss_chunk` positions at a time if that is set.
        """
        bounds = bounds if self.config.has_varlen else None
        x = self.hidden(idx, None if documents is None else see_documents(documents, bounds))
        if targets is None:
            return self.logits(x if kept is None else x.flatten(0, 1).index_select(0, kept))
        x, targets = x.flatten(0, 1), targets.flatten()
        if weights is not None:
            kept = weights.flatten().nonzero().squeeze(1) if kept is None else kept
            x, targets, weights = (t.index_select(0, kept) for t in (x, targets, weights.flatten()))
        if self.loss_chunk is None:
            return self.loss(x, targets, weights)
        return self.chunked_loss(x, targets, weights, self.loss_chunk)

    def loss(self, x: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """The summed loss in nats of hidden states (n, C) against targets (n,)."""
        logits = self.padded_logits(x)
        logits.detach()[:, self.vocab_size :] = -torch.inf  # a slice would copy all gradients
        if weights is None:
            return F.cross_entropy(logits, targets, reduction="sum")
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()

    def chunked_loss(self, x: Tensor, targets: Tensor, weights: Tensor | None, size: int) -> Tensor:
        """`loss` in chunks of `size` positions; the backward pass computes logits again."""
        again = partial(checkpoint, self.loss, use_reentrant=False, preserve_rng_state=False)
        w = repeat(None) if weights is None else torch.split(weights, size)
        parts = zip(torch.split(x, size), torch.split(targets, size), w, strict=False)
        return torch.stack([again(*part) for part in parts]).sum()

    def n_params(self) -> int:
        """Number of trained parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())
