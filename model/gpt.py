"""A compact GPT. Two recipes, `gpt2` and `modern`, are settings of the same few switches.

`gpt2` is GPT-2 (Radford et al. 2019; Hugging Face `gpt2`). `modern` is the Hugging Face `nanochat`
architecture: RoPE, parameter-free RMSNorm also after the embedding, QK-norm, ReLU^2, an untied
head, zero-initialised output projections and a logit soft-cap.

Shapes in comments: B rows, T tokens, C = n_embd, H = n_head, D = C / H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from model.generate import KVCache


class Batch(NamedTuple):
    """What `GPT.forward` takes, each (B, T).

    Attributes:
        idx: token ids.
        targets: the ids that follow; the data layer shifts, the model never does.
        weights: factor of each position's cross-entropy; None for all ones.
        documents: a number per token; attention stays among neighbours of the same number, and
            positions count from the first of them. None for the whole row.
        kept: where the weights are not 0, as places in the flattened rows, (n,). Follows from
            `weights`; given beforehand, the model need not wait for a GPU to know n.
        bounds: see `document_bounds`. Follows from `documents`; given beforehand, attention is
            computed by a kernel that skips other documents, in bfloat16 on a GPU.
    """

    idx: Tensor
    targets: Tensor
    weights: Tensor | None = None
    documents: Tensor | None = None
    kept: Tensor | None = None
    bounds: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        """A batch of f of every tensor that is there."""
        return Batch(**{k: f(t) for k, t in self._asdict().items() if t is not None})


def document_bounds(documents: Tensor) -> Tensor:
    """Where documents (B, T) begin in the flattened rows, and the end, int32 (n + 1,).

    Repeats the end up to a multiple of 64, so that its shape is nearly always the same.
    """
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    begins = first.flatten().nonzero().squeeze(1)
    n = math.ceil((len(begins) + 1) / 64) * 64
    return F.pad(begins, (0, n - len(begins)), value=documents.numel()).to(torch.int32)


RECIPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "position": "learned",
        "norm": "layernorm",
        "norm_embedding": False,
        "qk_norm": False,
        "activation": "gelu",
        "bias": True,
        "tie_embeddings": True,
        "zero_init_projections": False,
        "logit_softcap": 0.0,
    },
    "modern": {
        "position": "rope",
        "norm": "rmsnorm",
        "norm_embedding": True,
        "qk_norm": True,
        "activation": "relu2",
        "bias": False,
        "tie_embeddings": False,
        "zero_init_projections": True,
        "logit_softcap": 15.0,
    },
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture. A switch that is left out takes its recipe's value.

    Raises:
        ValueError: a combination that cannot be built.
    """

    recipe: Literal["gpt2", "modern"] = "modern"
    """Where the switches below that are not given come from, and the scale of the first weights."""
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
    """Start with every block's output at zero, so that a block begins as the identity."""
    logit_softcap: float | None = None
    """Logits are c * tanh(logits / c); 0 leaves them as they are."""

    def __post_init__(self) -> None:
        for switch, value in RECIPES[self.recipe].items():
            if getattr(self, switch) is None:
                object.__setattr__(self, switch, value)
        for field in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} is {getattr(self, field)}; it must be 1 or more")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"model.n_head={self.n_head} does not divide model.n_embd={self.n_embd}; "
                "choose a width that is a multiple of the number of heads"
            )
        if self.position == "rope" and (self.n_embd // self.n_head) % 2:
            raise ValueError(
                f"model.n_embd / model.n_head = {self.n_embd // self.n_head} is odd; rotary "
                "positions turn pairs, so it must be even"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.logit_softcap is not None and self.logit_softcap < 0:
            raise ValueError(f"model.logit_softcap is {self.logit_softcap}; 0 turns it off")


def skips_documents(config: ModelConfig) -> bool:
    """Whether the kernel that skips other documents takes this model's heads, and no dropout."""
    D = config.n_embd // config.n_head
    return D % 8 == 0 and D <= 256 and not config.dropout


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation over C."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, eps=1e-5, bias=bool(config.bias))
    return nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (x1, x2), the halves of x (B, H, T, D), clockwise: (x1 c + x2 s, x2 c - x1 s).

    `cos` holds (c, c) and `sin` (s, -s), each (..., T, D).
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        C, bias = config.n_embd, bool(config.bias)
        # Three matrices, not one: Muon orthogonalises each, and the lab looks at each.
        self.query = nn.Linear(C, C, bias=bias)
        self.key = nn.Linear(C, C, bias=bias)
        self.value = nn.Linear(C, C, bias=bias)
        self.proj = nn.Linear(C, C, bias=bias)

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, D) of x (B, T, C), as they meet each other."""
        shape = (*x.shape[:2], self.config.n_head, -1)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        if rope is not None:  # before the QK-norm, as in nanochat
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if self.config.qk_norm:
            q, k = (F.rms_norm(t, t.shape[-1:], eps=1e-6) for t in (q, k))
        return q, k, v

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); with a cache, x continues each of its rows.

        `mask`, (B, 1, T, tokens seen), is true where a token looks. Without one, several tokens
        look causally at each other, and a single one looks at all there are. Of one dimension, it
        holds the `document_bounds` of the rows, within which tokens look causally.
        """
        B, T, C = x.shape
        q, k, v = self.heads(x, rope)
        dropout = self.config.dropout if self.training else 0.0
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if mask is not None and mask.dim() == 1:
            from torch.nn.attention.varlen import varlen_attn  # a second to import, only for GPUs

            q, k, v = (t.to(v.dtype).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
            y = varlen_attn(q, k, v, mask, mask, T, T, window_size=(-1, 0))
            return self.proj(cast(Tensor, y).reshape(B, T, C))
        causal = mask is None and (cache is None or T > 1)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


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
            x = x * x  # square() has a slower backward pass
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

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.drop(self.attn(self.norm1(x), rope, mask, cache))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of what is added to the residual stream."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class GPT(nn.Module):
    """A decoder-only transformer language model.

    Args:
        config: the architecture.
        vocab_size: ids of the tokenizer. The matrices are padded to a multiple of 64 for speed;
            logits leave the model without the padding, so a padded id can never be sampled.

    Attributes:
        loss_chunk: positions whose logits exist at a time in the loss; None for all. Fewer need
            less memory and more time.
    """

    loss_chunk: int | None = None

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
            D = config.n_embd // config.n_head
            frequency = 10_000.0 ** -(torch.arange(0, D, 2) / D)
            angles = torch.outer(torch.arange(config.block_size), frequency)
            cos, sin = angles.cos().repeat(1, 2), torch.cat((angles.sin(), -angles.sin()), dim=1)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every parameter from torch's global generator: the only place that does.

        `gpt2`: N(0, 0.02), output projections scaled by 1 / sqrt(2 n_layer) (GPT-2, section 2.3).
        `modern`: matrices of variance 1 / C, the scale on which Muon's updates act, and, where it
        is untied, a small head, so that the first loss is ln V.
        """
        matrix_std = 0.02 if self.config.recipe == "gpt2" else self.config.n_embd**-0.5
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name == "lm_head.weight":  # only listed when untied
                nn.init.normal_(p, std=0.001)
                p[self.vocab_size :] = 0.0  # padding; it never gets a gradient
            elif name in ("wte.weight", "wpe.weight"):
                nn.init.normal_(p, std=0.02)
                if name == "wte.weight":
                    p[self.vocab_size :] = 0.0
            elif name.endswith("proj.weight") and self.config.zero_init_projections:
                nn.init.zeros_(p)
            else:
                depth = 2 * self.config.n_layer if name.endswith("proj.weight") else 1
                nn.init.normal_(p, std=matrix_std / math.sqrt(depth))

    def hidden(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, C) of ids (B, T); a cache holds what came before them.

        With `documents` and their `bounds` (see Batch) each is as if it stood alone in its row.

        Raises:
            ValueError: more tokens than block_size.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens exceed the model's block_size {self.config.block_size}")
        x = self.wte(idx)
        position = slice(0, T) if cache is None else cache.positions  # (T,) or (B, T)
        mask = None if cache is None else cache.mask
        if documents is not None:
            place = torch.arange(T, device=idx.device).expand_as(idx)
            first = torch.ones_like(documents, dtype=torch.bool)
            first[:, 1:] = documents[:, 1:] != documents[:, :-1]
            position = place - (place * first).cummax(dim=1).values
            if bounds is None or not skips_documents(self.config):
                mask = (documents[:, :, None] == documents[:, None, :]).tril().unsqueeze(1)
            else:
                mask = bounds
        if self.config.position == "learned":
            x = x + self.wpe.weight[position]
        if self.config.norm_embedding:
            x = self.norm_embedding(x)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        rope = None
        if self.config.position == "rope":
            cos, sin = self.rope_cos[position], self.rope_sin[position]
            if cos.dim() == 3:  # (B, T, D) -> (B, 1, T, D), the same for every head
                cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            rope = (cos.to(x.dtype), sin.to(x.dtype))
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., C), without the padding."""
        # In fp32 from here on, also under autocast: bf16 has no digits to spare for logits.
        logits = self.lm_head(x)[..., : self.vocab_size].float()
        cap = self.config.logit_softcap
        # c * tanh(x / c), by a function of which CPUs are faster
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
        """Logits (B, T, vocab_size), or with targets the summed loss in nats, a scalar.

        The arguments are those of `Batch`. The head runs only where the weights are not zero, and
        with `loss_chunk` on so many positions at a time.
        """
        x = self.hidden(idx, None, documents, bounds)
        if targets is None:
            return self.logits(x)
        x, targets = x.flatten(0, 1), targets.flatten()
        if weights is not None:
            kept = weights.flatten().nonzero().squeeze(1) if kept is None else kept
            x, targets, weights = (t.index_select(0, kept) for t in (x, targets, weights.flatten()))
        if self.loss_chunk is None:
            return self.loss(x, targets, weights)
        return self.chunked_loss(x, targets, weights, self.loss_chunk)

    def loss(self, x: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """The summed loss in nats of hidden states (n, C) against targets (n,)."""
        if weights is None:
            return F.cross_entropy(self.logits(x), targets, reduction="sum")
        return (F.cross_entropy(self.logits(x), targets, reduction="none") * weights).sum()

    def chunked_loss(self, x: Tensor, targets: Tensor, weights: Tensor | None, size: int) -> Tensor:
        """`loss`, by so many positions at a time; their logits are computed again backwards."""
        again = partial(checkpoint, self.loss, use_reentrant=False, preserve_rng_state=False)
        losses = []
        for i in range(0, max(1, len(x)), size):
            part = slice(i, i + size)
            w = None if weights is None else weights[part]
            losses.append(again(x[part], targets[part], w))
        return torch.stack(losses).sum()

    def n_params(self) -> int:
        """Trained numbers; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Forward and backward FLOPs per trained token at full context: 6 N + 12 L C T.

        N are the parameters that multiply (all matrices and the head, not the embedding look-ups);
        attention is counted without its causal half (Chowdhery et al. 2022, PaLM, appendix B).
        """
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        c = self.config
        attention = 12 * c.n_layer * c.n_embd * c.block_size
        return 6 * (matrices + self.lm_head.weight.numel()) + attention
