"""A language model that thinks before every token: `rollout` samples the thoughts, `score` predicts with them."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanoqstar.attention import dense, packed_attention, text_mask
from nanoqstar.head import compute_dtype, sample_tokens
from nanoqstar.qwen2 import KVCache
from nanoqstar.thoughts import ThoughtLayout


THOUGHTS = 1  # sets the stream of thoughts apart from that of window positions (`data.TokenDataset.batch`)


def uniforms(seed, step, indices, shape):
    """One number in [0, 1) per (seed, step, global sample index, pass, position, thought step): (len(indices), *shape).

    A function of its arguments alone, so thoughts depend neither on the micro-batch size nor on the number of ranks.
    """
    draws = [np.random.default_rng([seed, step, int(index), THOUGHTS]).random(shape, dtype=np.float32)
             for index in indices]
    return torch.from_numpy(np.stack(draws))


class MixingHead(nn.Sequential):
    """The weight of the thought's prediction, any real number: Linear ReLU Linear ReLU Linear (paper 4.3).

    Its input is [base; talk], (.., 2D).  The first layer's halves are applied apart, so that the base's is computed
    once per text token instead of once per pass and lookahead.
    """

    def __init__(self, dim):
        super().__init__(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(),
                         nn.Linear(dim, 1, bias=False))

    def base_half(self, base):
        """base (.., D) -> (.., D): its share of the first layer, in fp32 at least."""
        return self.apply_in_full(lambda x: F.linear(x, self[0].weight[:, :x.shape[-1]]), base)

    def forward(self, base_half, talk):
        """base_half and talk (.., D), broadcastable -> mixing weight (.., 1), in fp32 at least."""
        def rest(talk):
            x = base_half + F.linear(talk, self[0].weight[:, talk.shape[-1]:], self[0].bias)
            for layer in list(self)[1:]:
                x = layer(x)
            return x
        return self.apply_in_full(rest, talk)

    def apply_in_full(self, function, x):
        """Outside autocast: bf16 would leave the weight three digits; the head costs under a hundredth of a step."""
        with torch.autocast(x.device.type, enabled=False):
            return function(x.to(self[0].weight.dtype))


@dataclass
class States:
    """Hidden states that a window's loss is made of, after the final norm."""

    base: torch.Tensor  # (B, T+A-1, D): text alone; entry i predicts x_{i+1}
    thought: torch.Tensor  # (B, P, T, S, D): start, t_1 .. t_{S-1}; predict t_1 .. t_S
    mixed: torch.Tensor  # (B, P, T, A, D): end, lookahead, mixed with base; predict x_{i+1} .. x_{i+A}
    mix: torch.Tensor  # (B, P, T, A): weight of the thought


class QuietStar(nn.Module):
    """Qwen2 plus what thinking adds: start and end embedding, mixing head (paper 4.2 to 4.4).

    banned: (V,) bool, ids that no thought may hold (those the tokenizer does not have), or None.
    How many thoughts there are and how long they and the lookahead are is read off the shapes of the arguments.
    """

    def __init__(self, lm, thought_temperature=1.0, banned=None):
        super().__init__()
        self.lm, self.thought_temperature = lm, thought_temperature
        self.start_embedding = nn.Parameter(torch.empty(lm.config.hidden_size))
        self.end_embedding = nn.Parameter(torch.empty(lm.config.hidden_size))
        self.mixing_head = MixingHead(lm.config.hidden_size)
        self.register_buffer("banned", banned, persistent=False)

    @torch.no_grad()
    def init_thoughts(self, start_ids, end_ids, seed=0):
        """Start and end from the mean embedding of the given ids (officially both `---`).

        The mixing head's last layer is zero: training starts exactly at the base model.
        """
        for vector, ids in ((self.start_embedding, start_ids), (self.end_embedding, end_ids)):
            vector.copy_(self.lm.embed(torch.as_tensor(ids, device=vector.device)).mean(0))
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.mixing_head[0], self.mixing_head[2]):
            for p in (layer.weight, layer.bias):
                p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * layer.in_features**-0.5)  # as torch does
        self.mixing_head[4].weight.zero_()

    def text_states(self, text, docs):
        """Hidden states (B, N, D) of text (B, N) alone; docs (B, >= N)."""
        positions = torch.arange(text.shape[1], device=text.device)
        return self.lm(text, positions, dense(text_mask(docs[:, :text.shape[1]])))

    @torch.no_grad()
    def rollout(self, text, docs, uniforms):
        """Samples P thoughts at every position over one KV cache of the text.

        text, docs: (B, T+A) token and document ids.  uniforms: (B, P, T, S) in [0, 1).
        Returns thoughts (B, P, T, S) and the log-probs they were sampled with.
        """
        layout = ThoughtLayout.of(text, uniforms)
        packing, batch = layout.rollout_packing, len(text)
        rope = packing.rope_positions(text.device)
        start = self.start_embedding.expand(batch, layout.n_positions, -1)
        x = torch.cat((self.lm.embed(text[:, :layout.n_text]), start), dim=1)
        thoughts = torch.empty_like(uniforms, dtype=torch.long)
        log_probs = torch.empty_like(uniforms, dtype=torch.promote_types(x.dtype, torch.float32))
        cache = KVCache(self.lm.config, batch, packing.n_packed, text.device, compute_dtype(x))
        for step in range(layout.n_sampled):
            cache.slots = packing.rows(step, text.device)
            hidden = self.lm(x, rope[cache.slots], packed_attention(packing, docs, step), cache)
            rows = hidden[:, -layout.n_positions:] if step == 0 else hidden  # of start, for all passes; of t, one each
            draws = uniforms[..., step].transpose(1, 2).reshape(rows.shape[0] * rows.shape[1], -1)
            sampled = sample_tokens(rows.flatten(0, 1), self.lm.head_weight, draws, self.thought_temperature,
                                    self.banned)
            for out, new in zip((thoughts, log_probs), sampled, strict=True):
                out[..., step] = new.view(batch, layout.n_positions, layout.n_passes).transpose(1, 2)
            x = thoughts[..., step].transpose(1, 2).flatten(1)
        return thoughts, log_probs

    def score(self, text, docs, thoughts):
        """One packed forward over text, thoughts and teacher-forced lookahead.

        text, docs: (B, T+A).  thoughts: (B, P, T, S).  Returns `States`; gradients flow through all of it.
        """
        layout = ThoughtLayout.of(text, thoughts)
        packing, n_talk = layout.packing, layout.n_ahead_talk
        ids, is_start, is_end = layout.pack(text, thoughts)
        x = self.lm.embed(ids)
        x = torch.where(is_start[:, None], self.start_embedding.to(x.dtype), x)
        x = torch.where(is_end[:, None], self.end_embedding.to(x.dtype), x)
        hidden = self.lm(x, packing.rope_positions(text.device), packed_attention(packing, docs))
        base, start, branches = packing.split(hidden)
        thought, talk = branches.split((layout.n_sampled, n_talk), dim=3)  # t_1 .. t_S; end, lookahead
        start = start[:, None, :, None].expand(-1, layout.n_passes, -1, -1, -1)
        base_ahead, base_half = (x.unfold(1, n_talk, 1).movedim(-1, 2)[:, None]  # (B, 1, T, A, D): same targets as talk
                                 for x in (base, self.mixing_head.base_half(base)))
        mix = self.mixing_head(base_half, talk)
        return States(base=base, thought=torch.cat((start, thought[..., :-1, :]), dim=3),
                      mixed=base_ahead + mix * (talk - base_ahead), mix=mix[..., 0])
