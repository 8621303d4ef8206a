"""Decoding over a KV cache: a thought before every new token, K - 1 dependent forwards each, or none."""

from dataclasses import dataclass

import torch

from nanoqstar.attention import dense
from nanoqstar.objective import compute_dtype, fp32_logits
from nanoqstar.qwen2 import KVCache


@dataclass
class Step:
    """One new token of every prompt (B,), with the thought before it (B, S) and the mixing weight it got (B,)."""

    tokens: torch.Tensor
    thoughts: torch.Tensor
    mix: torch.Tensor
    logits: torch.Tensor  # (B, V) mixed, at least fp32, unknown ids at -inf


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Ids (B,) drawn from logits (B, V) after temperature, top-k and top-p, in this order; temperature 0: the likeliest.

    top_k keeps the k likeliest, top_p the fewest of the likeliest whose probabilities reach p (at least one).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1])).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    probs = logits.softmax(-1)
    if top_p is not None:
        ranked, order = probs.sort(descending=True, stable=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)  # what comes before already reaches p
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, n_ahead, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Yields a `Step` for each new token of all prompts.

    prompts: non-empty lists of ids, of any lengths (shorter ones are padded on the left, where nothing looks).
    n_ahead: K; 0 for no thoughts: the base model.  Thoughts are sampled at the model's thought temperature.
    generator: of the model's device, for both thoughts and text.
    """
    device, batch = model.lm.head_weight.device, len(prompts)
    longest = max(map(len, prompts))
    pads = torch.tensor([longest - len(p) for p in prompts], device=device)
    text = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    n_slots = n_ahead + longest + max_new_tokens  # a thought's slots come first, and the next thought overwrites them
    cache = KVCache(model.lm.config, batch, n_slots, device, compute_dtype(model.lm.head_weight))
    slot = torch.arange(n_slots, device=device)
    is_text = (slot >= n_ahead + pads[:, None])[:, None, None]  # (B, 1, 1, n_slots)

    def forward(x, slots, positions, last_text):
        """Hidden states of x at `slots`: text sees the text up to itself, a thought that up to `last_text` and itself."""
        cache.slots, query = slots, slots[:, None]
        mask = torch.where(query < n_ahead, is_text & (slot <= last_text) | (slot <= query), is_text & (slot <= query))
        mask = mask | (slot == query)  # padding sees itself
        used = int(last_text) + 1 if device.type == "cpu" else n_slots  # a GPU prefers one shape
        return model.lm(x, positions, lambda q, k, v: dense(mask[..., :used])(q, k[:, :, :used], v[:, :, :used]), cache)

    def place(first, count):
        """Slots and RoPE positions of `count` text tokens."""
        index = torch.arange(first, first + count, device=device)
        return index + n_ahead, (index - pads[:, None]).clamp(min=0)

    def think(hidden):
        logits = fp32_logits(hidden, model.lm.head_weight, model.banned, model.thought_temperature)
        return sample_token(logits, generator=generator)

    if longest > 1:
        slots, positions = place(0, longest - 1)
        forward(text[:, :-1], slots, positions, slots[-1:])
    newest = text[:, -1]
    for n in range(longest - 1, longest - 1 + max_new_tokens):
        slots, positions = place(n, 1)
        last_text, thought = slots, []
        x = model.lm.embed(newest)[:, None]
        if n_ahead:
            x = torch.cat((x, model.start_embedding.to(x.dtype).expand(batch, 1, -1)), dim=1)
            hidden = forward(x, torch.cat((slots, slot[:1])), torch.cat((positions, positions + 1), dim=1), last_text)
            base = hidden[:, 0]
            for k in range(1, n_ahead - 1):  # t_k from the token before it
                thought.append(think(hidden[:, -1]))
                x = model.lm.embed(thought[-1])[:, None]
                if k < n_ahead - 2:
                    hidden = forward(x, slot[k:k + 1], positions + 1 + k, last_text)
            x = torch.cat((x, model.end_embedding.to(x.dtype).expand(batch, 1, -1)), dim=1)
            offsets = torch.tensor([n_ahead - 2, n_ahead - 1], device=device)
            talk = forward(x, slot[n_ahead - 2:n_ahead], positions + 1 + offsets, last_text)[:, -1]
            mix = model.mixing_head(model.mixing_head.base_half(base), talk)
            hidden, mix = base + mix * (talk - base), mix[:, 0]
        else:
            hidden = forward(x, slots, positions, last_text)[:, -1]
            mix = hidden.new_zeros(batch)
        logits = fp32_logits(hidden, model.lm.head_weight, model.banned)
        newest = sample_token(logits, temperature, top_k, top_p, generator)
        thoughts = torch.stack(thought, dim=1) if thought else newest.new_zeros(batch, 0)
        yield Step(newest, thoughts, mix, logits)
