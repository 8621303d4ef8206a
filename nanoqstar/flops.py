"""The FLOPs of a step, before it is run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nanoqstar.qwen2 import Qwen2Config
from nanoqstar.thoughts import ThoughtLayout

# dense bf16 FLOP/s by the makers' sheets; the first name that is part of the card's
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
         "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def qwen(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int,
         tied: bool = True, bias: bool = True, theta: float = 1e6) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, vocab_size=vocab,
        tie_word_embeddings=tied, attention_bias=bias, head_dim=hidden // heads,
        max_position_embeddings=32768, rope_theta=theta)


MODELS = {  # the shapes behind the presets' names, Hub ids: nothing is downloaded to count
    "Qwen/Qwen2.5-0.5B": qwen(896, 24, 14, 2, 4864, 151936),
    "Qwen/Qwen2.5-3B": qwen(2048, 36, 16, 2, 11008, 151936),
    "Qwen/Qwen2.5-7B": qwen(3584, 28, 28, 4, 18944, 152064, tied=False),
    "mistralai/Mistral-7B-v0.1": qwen(4096, 32, 32, 8, 14336, 32000, tied=False, bias=False,
                                      theta=1e4),
}


def block_weights(model: Qwen2Config) -> int:
    """Weights of the products of all blocks."""
    width = model.num_attention_heads * model.head_dim
    kv_width = model.num_key_value_heads * model.head_dim
    return model.num_hidden_layers * model.hidden_size * (
        2 * width + 2 * kv_width + 3 * model.intermediate_size)


def n_parameters(model: Qwen2Config) -> int:
    """Of the language model, without norms and biases."""
    head = model.vocab_size * model.hidden_size
    return block_weights(model) + head * (1 if model.tie_word_embeddings else 2)


def forward_flops(model: Qwen2Config, n_tokens: int, n_rows: float, n_pairs: int) -> int:
    """Of n_tokens through the blocks and n_rows through the LM head; n_pairs: who sees whom."""
    pair = 4 * model.num_attention_heads * model.head_dim * model.num_hidden_layers
    head = model.vocab_size * model.hidden_size
    return round(2 * (block_weights(model) * n_tokens + head * n_rows)) + pair * n_pairs


def learning_flops(model: Qwen2Config, n_tokens: int, n_rows: float, n_pairs: int,
                   frozen: bool = False) -> int:
    """Of forward and backward, 3 x forward; frozen: weights that have no gradients (what adapters
    cost is left out)."""
    spared = forward_flops(model, n_tokens, n_rows, 0) if frozen else 0
    return 3 * forward_flops(model, n_tokens, n_rows, n_pairs) - spared


def thinking_flops(model: Qwen2Config, layout: ThoughtLayout, batch: int, live: float = 1.0,
                   frozen: bool = False) -> tuple[int, int]:
    """Useful FLOPs of (sampling, learning): products with weights and visible attention pairs.

    Nothing counts twice. Learning is forward and backward, whatever is recomputed;
    only rows whose logits are used count for the LM head: of the thoughts, the share `live` that
    has an advantage. Start is counted once for all passes, as it is computed.
    """
    t, p, s, a = layout.n_positions, layout.n_passes, layout.n_sampled, layout.n_ahead_talk
    text_pairs = layout.n_text * (layout.n_text + 1) // 2
    seen = t * (t + 1) // 2  # text pairs of one token per position

    def flops(count: Callable[..., int], branch: int, n_rows: float) -> int:
        n_tokens = layout.n_text + t * (1 + p * branch)
        own = t * (1 + p * (branch * (branch + 3) // 2))  # pairs within the groups
        return count(model, n_tokens, n_rows, text_pairs + seen * (1 + p * branch) + own)

    sampling = flops(forward_flops, s - 1, t * (1 + p * (s - 1)))
    learning = flops(partial(learning_flops, frozen=frozen), s + a,
                     layout.n_text + t * p * (s * live + a))
    return batch * sampling, batch * learning


def text_flops(model: Qwen2Config, n_positions: int, batch: int, frozen: bool = False) -> int:
    """Those of plain training on windows of n_positions tokens."""
    n_pairs = n_positions * (n_positions + 1) // 2
    return batch * learning_flops(model, n_positions, n_positions, n_pairs, frozen)


def of_update(model: Qwen2Config, n_windows: int, n_positions: int, n_ahead: int, n_ahead_talk: int,
              n_passes: int, live: float, frozen: bool = False) -> int:
    """Useful FLOPs of an update, with thoughts or (n_ahead 0) without."""
    if n_ahead == 0:
        return text_flops(model, n_positions, n_windows, frozen)
    layout = ThoughtLayout(n_ahead, n_ahead_talk, n_passes, n_positions)
    return sum(thinking_flops(model, layout, n_windows, live, frozen))


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a known GPU; None of anything else."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for card, rate in PEAKS.items() if card in name), None)


def matched_steps(cfg: Any) -> int:
    """Plain updates that cost the FLOPs of the thinking ones.

    Tokens x 6 to learn, x 2 to sample; parameters cancel.
    """
    if not cfg.n_ahead:
        return cfg.max_steps
    layout = ThoughtLayout(cfg.n_ahead, cfg.n_ahead_talk, cfg.n_passes, cfg.max_length)
    learned, sampled = layout.packing.n_packed, layout.rollout_packing.n_packed
    return round(cfg.max_steps * (6 * learned + 2 * sampled) / (6 * cfg.max_length))
