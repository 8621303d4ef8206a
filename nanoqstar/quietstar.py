"""A language model that thinks before every token.

`rollout` samples the thoughts, `score` predicts with them in one packed forward, and `loss` is what
that prediction is worth.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nanoqstar.attention import dense, packed_attention, text_mask
from nanoqstar.dataset import stream
from nanoqstar.device import autocast
from nanoqstar.head import compute_dtype, sample_tokens, weighted_log_probs
from nanoqstar.objective import Objective, States, Valid, language_model_loss, quiet_star_loss
from nanoqstar.qwen2 import KVCache, Qwen2
from nanoqstar.thoughts import ThoughtLayout

Rollout = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def uniforms(seed: int, phase: str, step: int, indices: Iterable[int], shape: tuple[int, ...]
             ) -> torch.Tensor:
    """A number in [0, 1) for each sample, pass, position and thought step: (len(indices), *shape).

    A function of (seed, phase, step, global sample index) alone, so thoughts depend neither on the
    micro-batch size nor on the number of ranks.
    """
    draws = [stream("thoughts", phase, step, int(index), seed).random(shape, dtype=np.float32)
             for index in indices]
    return torch.from_numpy(np.stack(draws))


def draw_from(ids: Sequence[int]) -> Rollout:
    """A rollout for control experiments: thoughts drawn uniformly from these ids."""
    def rollout(text: torch.Tensor, docs: torch.Tensor, uniforms: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.tensor(ids, device=text.device)[(uniforms * len(ids)).long()]
        return drawn, torch.full_like(uniforms, -math.log(len(ids)))
    return rollout


class MixingHead(nn.Sequential):
    """The weight of the thought's prediction, any real number: Linear ReLU Linear ReLU Linear.

    Its input is [base; talk], (.., 2D) (paper 4.3). The first layer's halves are applied apart, so
    that the base's is computed once per text token instead of once per pass and lookahead.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(),
                         nn.Linear(dim, 1, bias=False))

    def base_half(self, base: torch.Tensor) -> torch.Tensor:
        """base (.., D) -> (.., D): its share of the first layer, in fp32 at least."""
        with torch.autocast(base.device.type, enabled=False):
            weight: Any = self[0].weight
            return F.linear(base.to(weight.dtype), weight[:, :base.shape[-1]])

    def forward(self, base_half: torch.Tensor,  # type: ignore[override]
                talk: torch.Tensor) -> torch.Tensor:
        """base_half and talk (.., D), broadcastable -> mixing weight (.., 1), in fp32 at least.

        Outside autocast: bf16 would leave the weight three digits, and the head costs under a
        hundredth of a step.
        """
        with torch.autocast(talk.device.type, enabled=False):
            first: Any = self[0]
            weight, bias = first.weight, first.bias
            x = base_half + F.linear(talk.to(weight.dtype), weight[:, talk.shape[-1]:], bias)
            for layer in list(self)[1:]:
                x = layer(x)
            return x


class QuietStar(nn.Module):
    """Qwen2 plus what thinking adds: start and end embedding, mixing head (paper 4.2 to 4.4).

    banned: (V,) bool, ids that no thought may hold (those the tokenizer does not have), or None.
    reread: start is the embedding of x_i plus the start vector, end that of t_S plus the end
    vector, both where x_i and t_S stand; else, as in the paper, the vectors alone.
    How many thoughts there are and how long they and the lookahead are is read off the shapes of
    the arguments.
    """

    banned: torch.Tensor | None

    def __init__(self, lm: Qwen2, thought_temperature: float = 1.0,
                 banned: torch.Tensor | None = None, reread: bool = False) -> None:
        super().__init__()
        self.lm, self.thought_temperature, self.reread = lm, thought_temperature, reread
        self.start_embedding = nn.Parameter(torch.empty(lm.config.hidden_size))
        self.end_embedding = nn.Parameter(torch.empty(lm.config.hidden_size))
        self.mixing_head = MixingHead(lm.config.hidden_size)
        self.register_buffer("banned", banned, persistent=False)

    @torch.no_grad()
    def init_thoughts(self, start_ids: Sequence[int], end_ids: Sequence[int], seed: int = 0
                      ) -> None:
        """Start and end from the mean embedding of the given ids (officially both `---`), or zero
        where they re-read: an untrained thought is then how the model itself goes on.

        The mixing head's last layer is zero: training starts exactly at the base model.
        """
        for vector, ids in ((self.start_embedding, start_ids), (self.end_embedding, end_ids)):
            if self.reread:
                vector.zero_()
            else:
                vector.copy_(self.lm.embed(torch.as_tensor(ids, device=vector.device)).mean(0))
        generator = torch.Generator().manual_seed(seed)
        head: Any = self.mixing_head
        for layer in (head[0], head[2]):
            for p in (layer.weight, layer.bias):  # as torch does
                draws = torch.rand(p.shape, generator=generator) * 2 - 1
                p.copy_(draws * layer.in_features**-0.5)
        head[4].weight.zero_()

    def delimiter(self, vector: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Start or end: its vector (D,), where the embeddings that it may re-read are (B, N, D)."""
        vector = vector.to(read.dtype)
        return read + vector if self.reread else vector.expand_as(read)

    def text_states(self, text: torch.Tensor, docs: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, N, D) of text (B, N) alone; docs (B, >= N)."""
        positions = torch.arange(text.shape[1], device=text.device)
        return self.lm(text, positions, dense(text_mask(docs[:, :text.shape[1]])))

    @torch.no_grad()
    def rollout(self, text: torch.Tensor, docs: torch.Tensor, uniforms: torch.Tensor,
                given: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples P thoughts at every position over one KV cache of the text.

        text, docs: (B, T+A) token and document ids. uniforms: (B, P, T, S) in [0, 1). given: tokens
        that are not to be sampled (B, P, T, S), -1 where they are.
        Returns thoughts (B, P, T, S) and the log-probs they were sampled with.
        """
        with autocast(text.device):  # its own: no weight cast without a gradient is used in `loss`
            return self._rollout(text, docs, uniforms, given)

    def _rollout(self, text: torch.Tensor, docs: torch.Tensor, uniforms: torch.Tensor,
                 given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        layout = ThoughtLayout.of(text, uniforms, self.reread)
        packing, n_windows = layout.rollout_packing, len(text)
        rope, attend = packing.rope_positions(text.device), packed_attention(packing, docs)
        x = self.lm.embed(text[:, :layout.n_text])
        start = self.delimiter(self.start_embedding, x[:, :layout.n_positions])
        x = torch.cat((x, start), dim=1)
        thoughts = torch.empty_like(uniforms, dtype=torch.long)
        sampled_lp = torch.empty_like(uniforms, dtype=torch.promote_types(x.dtype, torch.float32))
        cache = KVCache(self.lm.config, n_windows, packing.n_packed, text.device, compute_dtype(x))
        for step in range(layout.n_sampled):
            cache.slots = packing.rows(step, text.device)
            hidden = self.lm(x, rope[cache.slots], attend.at(step), cache)
            # of start, for all passes; of t, one each
            rows = hidden[:, -layout.n_positions:] if step == 0 else hidden
            draws = uniforms[..., step].transpose(1, 2).reshape(rows.shape[0] * rows.shape[1], -1)
            sampled = sample_tokens(rows.flatten(0, 1), self.lm.head_weight, draws,
                                    self.thought_temperature, self.banned)
            for out, new in zip((thoughts, sampled_lp), sampled, strict=True):
                by_position = new.view(n_windows, layout.n_positions, layout.n_passes)
                out[..., step] = by_position.transpose(1, 2)
            if given is not None:
                own, known = thoughts[..., step], given[..., step]
                thoughts[..., step] = torch.where(known < 0, own, known)
            x = thoughts[..., step].transpose(1, 2).flatten(1)
        return thoughts, sampled_lp

    def hidden_states(self, text: torch.Tensor, docs: torch.Tensor, thoughts: torch.Tensor
                      ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One packed forward over text, thoughts and teacher-forced lookahead.

        text, docs: (B, T+A). thoughts: (B, P, T, S). Gradients flow through all of it. Returns the
        states of text (B, T+A-1, D), of start, t_1 .. t_(S-1) (B, P, T, S, D), and of end and
        lookahead (B, P, T, A, D).
        """
        layout = ThoughtLayout.of(text, thoughts, self.reread)
        packing = layout.packing
        ids, is_start, is_end = layout.pack(text, thoughts)
        x = self.lm.embed(ids)
        x = torch.where(is_start[:, None], self.delimiter(self.start_embedding, x), x)
        x = torch.where(is_end[:, None], self.delimiter(self.end_embedding, x), x)
        hidden = self.lm(x, packing.rope_positions(text.device), packed_attention(packing, docs))
        base, start, branches = packing.split(hidden)
        # t_1 .. t_S; end, lookahead
        thought, talk = branches.split((layout.n_sampled, layout.n_ahead_talk), dim=3)
        start = start[:, None, :, None].expand(-1, layout.n_passes, -1, -1, -1)
        return base, torch.cat((start, thought[..., :-1, :]), dim=3), talk

    def score(self, text: torch.Tensor, docs: torch.Tensor, thoughts: torch.Tensor) -> States:
        """`hidden_states`, and what the mixing head makes of text and lookahead (paper 4.3)."""
        return self.mixed(*self.hidden_states(text, docs, thoughts))

    def mixed(self, base: torch.Tensor, thought: torch.Tensor, talk: torch.Tensor) -> States:
        """Of `hidden_states`."""
        n_talk = talk.shape[3]
        base_ahead, base_half = (  # (B, 1, T, A, D): the same targets as talk
            x.unfold(1, n_talk, 1).movedim(-1, 2)[:, None]
            for x in (base, self.mixing_head.base_half(base)))
        mix = self.mixing_head(base_half, talk)
        return States(base=base, thought=thought,
                      mixed=base_ahead + mix * (talk - base_ahead), mix=mix[..., 0])

    def loss(self, text: torch.Tensor, docs: torch.Tensor, thoughts: torch.Tensor,
             sampled_lp: torch.Tensor, counts: torch.Tensor, objective: Objective
             ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A micro-batch's share of the update's loss, to be summed, and of its statistics.

        text, docs: (B, T+A). thoughts, sampled_lp: (B, P, T, S) of `rollout`. counts:
        `Valid.counts` of the whole update. The statistics are those of `quiet_star_loss`, and:
        gain, the reward by token; entropy, the mean surprise of the sampled tokens, nats.
        """
        n_passes, n_talk = thoughts.shape[1], text.shape[1] - thoughts.shape[2]
        valid = Valid.from_docs(docs, n_talk)
        with autocast(text.device):
            states = self.score(text, docs, thoughts)
            loss, stats, _ = quiet_star_loss(states, self.lm.head_weight, text, thoughts, valid,
                                             counts, objective, self.banned)
        surprise = -(sampled_lp.mean(-1) * valid.policy[:, None]).sum()
        return loss, stats | {"gain": stats["reward"] / n_talk,
                              "entropy": surprise / (n_passes * counts[-1].clamp(min=1))}

    def given_loss(self, text: torch.Tensor, docs: torch.Tensor, thoughts: torch.Tensor,
                   given: torch.Tensor, counts: torch.Tensor, objective: Objective
                   ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same where the text was given thoughts: in place of the policy term the mean of
        -log p over their tokens, and over the true ones after whole thoughts, not mixed. The other
        terms are of the windows without any: few thoughts stand in few texts, soon known by heart.

        thoughts: (B, P, T, S) of `rollout`. given: those of its tokens that were not sampled, else
        -1. counts: of `Valid.without_given` in the whole update, and the tokens of that mean.
        """
        valid = Valid.from_docs(docs, text.shape[1] - given.shape[2])
        shown, follows = given >= 0, valid.after_given(given)
        targets = text[:, 1:].unfold(1, follows.shape[-1], 1)[:, None].expand(follows.shape)
        with autocast(text.device):
            base, thought, talk = self.hidden_states(text, docs, thoughts)
            nll, stats, _ = quiet_star_loss(
                self.mixed(base, thought, talk), self.lm.head_weight, text, thoughts,
                valid.without_given(given), counts[:-1], replace(objective, policy_weight=0.0),
                self.banned)
            weight = -1 / counts[-1].clamp(min=1).to(nll.dtype)
            taught = torch.zeros_like(nll)
            for rows, ids, kept, banned in ((thought, given, shown, self.banned),
                                            (talk, targets, follows, None)):
                taught = taught + weighted_log_probs(
                    rows[kept], self.lm.head_weight, ids[kept],
                    weight.expand(int(kept.sum())), banned=banned)[0]
        names = ("nll_base", "nll_talk", "reward", "mix")
        return nll + taught, {"nll_given": taught.detach(), **{k: stats[k] for k in names}}

    def text_loss(self, text: torch.Tensor, docs: torch.Tensor, counts: torch.Tensor, n_talk: int
                  ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same without thoughts: plain pre-training on the positions that would think."""
        with autocast(text.device):
            hidden = self.text_states(text[:, :-n_talk], docs)
            loss = language_model_loss(hidden, self.lm.head_weight, text, docs, counts[0])
        return loss, {"nll_base": loss.detach()}
