"""What thoughts are worth on text: every token's log-prob without and with a thought, and what to read off them."""

from dataclasses import dataclass

import torch

from nanoqstar.head import fp32_logits, weighted_log_probs
from nanoqstar.objective import Valid
from nanoqstar.quietstar import uniforms

EVALUATION_STEP = 2**40  # of the uniform numbers: no training step draws the same


@dataclass
class TextScores:
    """Per thinking position of n windows, one sampled thought each; nats."""

    text: torch.Tensor  # (n, T+A) ids
    valid: torch.Tensor  # (n, T) bool: x_{i+1} is of x_i's document
    whole: torch.Tensor  # (n, T) bool: the whole lookahead is
    base_lp: torch.Tensor  # (n, T) of x_{i+1} without a thought
    mixed_lp: torch.Tensor  # (n, T) with the thought at i
    reward: torch.Tensor  # (n, T) gain summed over the lookahead
    mix: torch.Tensor  # (n, T) mixing weight for x_{i+1}
    thoughts: torch.Tensor  # (n, T, S) ids
    thought_lp: torch.Tensor  # (n, T, S) they were sampled with
    base_choice: torch.Tensor  # (n, T) likeliest of `choices` for x_{i+1}; zeros where none were asked for
    mixed_choice: torch.Tensor  # (n, T)


@torch.no_grad()
def score_text(model, text, docs, n_ahead, n_talk, *, seed=0, batch_size=16, sampler=None, choices=None):
    """Scores windows with one thought per position (`TextScores`, on the CPU); n_ahead 0: without thoughts.

    text, docs: (n, T+A) int64.  sampler(text, docs, uniforms) -> thoughts, log-probs; default the model's rollout.
    choices: ids among which base_choice and mixed_choice choose.
    """
    head, scores = model.lm.head_weight, []
    n_positions = text.shape[1] - n_talk
    for start in range(0, len(text), batch_size):
        x, d = (t[start:start + batch_size].to(head.device) for t in (text, docs))
        valid = Valid.from_docs(d, n_talk)
        if n_ahead:
            index = range(start, start + len(x))
            u = uniforms(seed, EVALUATION_STEP, index, (1, n_positions, n_ahead - 2)).to(head.device)
            thoughts, thought_lp = (sampler or model.rollout)(x, d, u)
            states = model.score(x, d, thoughts)
            base, mixed, mix = states.base, states.mixed[:, 0], states.mix[:, 0, :, 0]
        else:
            base = model.text_states(x[:, :-1], d)
            mixed = base.unfold(1, n_talk, 1).movedim(-1, 2)
            mix, thoughts = base.new_zeros(valid.base.shape), x.new_zeros(*valid.base.shape, 0)[:, None]
            thought_lp = mix.new_zeros(thoughts.shape)

        def log_probs(hidden, targets):
            rows = hidden.flatten(0, -2)
            no_weight = torch.zeros_like(rows[:, 0])
            return weighted_log_probs(rows, head, targets.flatten(), no_weight)[1].view(targets.shape)

        base_lp = log_probs(base, x[:, 1:])
        mixed_lp = log_probs(mixed, x[:, 1:].unfold(1, n_talk, 1))
        reward = (mixed_lp - base_lp.unfold(1, n_talk, 1)).sum(-1)
        if choices is None:
            choice = torch.zeros_like(valid.base, dtype=torch.long).expand(2, -1, -1)
        else:
            ids = torch.tensor(choices, device=head.device)
            with torch.autocast(head.device.type, enabled=False):  # bf16 would round near ties
                rows = torch.stack((base[:, :n_positions], mixed[:, :, 0])).flatten(0, 2)
                choice = ids[fp32_logits(rows, head[ids]).argmax(-1)].view(2, *valid.base.shape)
        batch = (x, valid.base, valid.policy, base_lp[:, :n_positions], mixed_lp[..., 0], reward, mix, thoughts[:, 0],
                 thought_lp[:, 0], *choice)
        scores.append([t.cpu() for t in batch])
    return TextScores(*(torch.cat(parts) for parts in zip(*scores, strict=True)))


def summarize(scores):
    """Means over valid positions as a flat dict of floats; NLL and gain in nats per token, gain = base - mixed NLL."""
    base, mixed = -scores.base_lp[scores.valid], -scores.mixed_lp[scores.valid]
    if not len(base):
        return {}
    order, gain = base.argsort(), base - mixed
    deciles = [part.mean().item() for part in gain[order].tensor_split(10)] if len(base) >= 10 else []
    summary = {"nll_base": base.mean().item(), "nll_mixed": mixed.mean().item(), "gain": gain.mean().item()}
    if scores.thoughts.shape[-1]:
        flat = scores.thoughts[scores.valid]
        summary |= {
            "gain_hardest": deciles[-1] if deciles else gain.max().item(), "gain_by_decile": deciles,
            "gain_stderr": (gain.std() / len(gain) ** 0.5).item(),
            "reward": scores.reward[scores.whole].mean().item(), "mix": scores.mix[scores.valid].mean().item(),
            "entropy": -scores.thought_lp[scores.valid].mean().item(),  # the entropy is a sample's mean surprise
            "distinct": len(flat.unique(dim=0)) / len(flat)}
    return summary
