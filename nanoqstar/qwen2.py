"""Qwen2 by hand: RMSNorm, RoPE, grouped-query attention, SwiGLU; Mistral is it without QKV bias.

Parameter names are Hugging Face's, so loading and saving need no renaming. The model knows nothing
of thoughts: who attends to whom is a callable it is given (`attention.py`), and where keys are kept
a `KVCache`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanoqstar.cpu import linear, rms_norm, rotate

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin
LayerCache = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # keys, values, slots


@dataclass(frozen=True, kw_only=True)
class Qwen2Config:
    """The keys of Hugging Face's config.json that the computation depends on; sizes in elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    attention_bias: bool = True  # Q, K and V have biases in Qwen2 and none in Mistral
    tie_word_embeddings: bool = True
    sliding_window: int | None = None  # Mistral's; ours has none: contexts must not be longer

    @property
    def max_context(self) -> int:
        """RoPE positions that are computed right: as trained, within the sliding window."""
        trained = self.max_position_embeddings
        return min(trained, self.sliding_window or trained)


class KVCache:
    """Keys and values of every layer, each (B, G, n_slots, head_dim), allocated once.

    `slots` (N,) says where the next forward writes its N tokens, over what was there.
    """

    def __init__(self, config: Qwen2Config, batch: int, n_slots: int,
                 device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        shape = (batch, config.num_key_value_heads, n_slots, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype)
                                   for _ in range(config.num_hidden_layers)] for _ in "kv")
        self.slots: Any = None

    def of_layer(self, layer: int) -> LayerCache:
        """What a block needs: its keys, its values, and where to write."""
        return self.keys[layer], self.values[layer], self.slots


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # statistics in fp32 at least
        return rms_norm(x, self.weight, self.eps)


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """cos and sin for rotate-half RoPE: positions (..., N) -> two (..., 1, N, head_dim).

    sin is that of -angle in the first half, so that `rotate` negates nothing.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = positions[..., None, :, None].to(dtype) * theta**-exponent
    angles = torch.cat((-angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.head_dim, d = config.head_dim, config.hidden_size
        q, kv = (n * config.head_dim
                 for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(d, q, bias=config.attention_bias)
        self.k_proj = Linear(d, kv, bias=config.attention_bias)
        self.v_proj = Linear(d, kv, bias=config.attention_bias)
        self.o_proj = Linear(q, d, bias=False)

    def forward(self, x: torch.Tensor, rope: Rope, attend: Callable, cache: LayerCache | None
                ) -> torch.Tensor:
        # (B, heads, N, head_dim)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            keys, values, slots = cache
            k = keys.index_copy_(2, slots, k.to(keys.dtype))
            v = values.index_copy_(2, slots, v.to(values.dtype))
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, inner, bias=False)
        self.up_proj = Linear(d, inner, bias=False)
        self.down_proj = Linear(inner, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, rope: Rope, attend: Callable,
                cache: LayerCache | None = None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """The language model up to its final norm; `head_weight` (V, D) makes logits of its states."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.model: Any = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self, std: float = 0.02, embedding_std: float = 0.02, seed: int = 0) -> None:
        """Fills a model that starts from nothing: normal matrices, zero biases, unit norms."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                scale = embedding_std if "embed_tokens" in name else std
                p.copy_(torch.randn(p.shape, generator=generator) * scale)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.head_weight)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, attend: Callable,
                cache: KVCache | None = None) -> torch.Tensor:
        """Hidden states after the final norm.

        x: token ids (B, N) int64, or embeddings (B, N, D). positions: RoPE's, (N,) or (B, N).
        attend: callable (q (B, H, N, d), k, v (B, G, M, d)) -> (B, H, N, d), one of `attention.py`.
        cache: where keys and values are written and the earlier ones read (M slots; else M = N).
        """
        if not x.is_floating_point():
            x = self.embed(x)
        assert x.shape[-1] == self.config.hidden_size and x.shape[1] == positions.shape[-1], (
            x.shape, positions.shape)
        dtype = torch.promote_types(x.dtype, torch.float32)
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta, dtype)
        # blocks know no number: all share one compiled graph
        for layer, block in enumerate(self.model.layers):
            x = block(x, rope, attend, None if cache is None else cache.of_layer(layer))
        return self.model.norm(x)
