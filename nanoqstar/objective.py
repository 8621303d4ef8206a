"""The objective (paper 4.4): masks, reward, advantage, REINFORCE, total loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanoqstar.head import weighted_log_probs


@dataclass
class Valid:
    """Which positions count (B, ..), from document ids alone: a prediction across a document's end counts nowhere."""

    base: torch.Tensor  # (B, T): x_{i+1} is of x_i's document
    talk: torch.Tensor  # (B, T, A): x_{i+1+j} is
    policy: torch.Tensor  # (B, T): all of them are

    @classmethod
    def from_docs(cls, docs, n_ahead_talk):
        talk = docs.unfold(1, n_ahead_talk + 1, 1)[..., 1:] == docs[:, :-n_ahead_talk, None]
        return cls(talk[..., 0], talk, talk.all(-1))

    def counts(self):
        """Counts of one pass as a tensor (1 + A + 1,): base, talk by lookahead, policy; to be summed over an update."""
        return torch.cat((self.base.sum()[None], self.talk.sum((0, 1)), self.policy.sum()[None]))


def advantage(reward, valid, clamp, normalize=False):
    """Reward above the mean of the same position's passes, itself included; negatives dropped if `clamp` (paper 4.4.3).

    reward: (B, P, T) nats per thought.  valid: (B, T) bool.  Returns (B, P, T), zero where invalid.
    P == 1 has no baseline, as in the official code; the clamp applies all the same.
    normalize: divide by the root mean square over the valid entries of this forward.
    """
    if reward.shape[1] > 1:
        reward = reward - reward.mean(1, keepdim=True)
    reward = reward * valid[:, None]
    if normalize:
        reward = reward / (reward.square().sum() / (valid.sum() * reward.shape[1]).clamp(min=1)).sqrt().clamp(min=1e-6)
    return reward.clamp(min=0) if clamp else reward


def language_model_loss(hidden, head, text, docs, count):
    """Mean NLL of continued pre-training without thoughts, and the same detached.

    hidden: (B, T, D).  text, docs: (B, > T).  count: valid positions of the whole update.
    """
    n = hidden.shape[1]
    weights = (docs[:, 1:n + 1] == docs[:, :n]).flatten() / count.clamp(min=1).to(hidden.dtype)
    loss, _ = weighted_log_probs(hidden.flatten(0, 1), head, text[:, 1:n + 1].flatten(), -weights)
    return loss, loss.detach()


def quiet_star_loss(states, head, text, thoughts, valid, counts, *, base_weight, mixed_weight, policy_weight,
                    clamp_advantage, reinforce_temperature, normalize_advantage=False, banned=None):
    """base_weight * base NLL + mixed_weight * mixed NLL + policy_weight * REINFORCE, means over the whole update.

    states: `quietstar.States`.  head: (V, D).  text: (B, T+A).  thoughts: (B, P, T, S).  valid: `Valid`.
    counts: `Valid.counts()` summed over the update's micro-batches and ranks, so that gradients simply add up.
    Returns the loss and detached parts: base_lp (B, T+A-1), mixed_lp (B, P, T, A), reward and advantage (B, P, T),
    nats; and this forward's shares of the update's means: nll_base, nll_mixed (over the whole lookahead), policy,
    mean_reward, positive (share of positive advantages), mean_mix.
    """
    (_, n_passes, _, n_talk), n_sampled = states.mixed.shape[:4], thoughts.shape[-1]
    counts = counts.clamp(min=1).to(torch.promote_types(states.base.dtype, torch.float32))  # an empty mean is 0
    base_count, talk_counts, policy_count = counts.split((1, n_talk, 1))
    after_base = F.pad(valid.base, (0, n_talk - 1)) / base_count  # (B, T+A-1): the last A-1 serve the reward only
    after_talk = (valid.talk / (n_talk * n_passes * talk_counts))[:, None].expand(states.mixed.shape[:4])
    talk_targets = text[:, 1:].unfold(1, n_talk, 1)[:, None].expand(states.mixed.shape[:4])

    nll, log_probs = weighted_log_probs(
        torch.cat((states.base.flatten(0, 1), states.mixed.flatten(0, 3))), head,
        torch.cat((text[:, 1:].flatten(), talk_targets.flatten())),
        torch.cat((-base_weight * after_base.flatten(), -mixed_weight * after_talk.flatten())))
    base_lp, mixed_lp = log_probs.split((after_base.numel(), after_talk.numel()))
    base_lp, mixed_lp = base_lp.view(after_base.shape), mixed_lp.view(after_talk.shape)

    reward = (mixed_lp - base_lp.unfold(1, n_talk, 1)[:, None]).sum(-1)  # (B, P, T)
    adv = advantage(reward, valid.policy, clamp_advantage, normalize_advantage)
    live = (adv.flatten() * bool(policy_weight)).nonzero()[:, 0]  # the other thoughts have no gradient
    share = 1 / (n_passes * policy_count)
    credit = (adv.flatten()[live] * share / n_sampled)[:, None].expand(-1, n_sampled)
    policy, _ = weighted_log_probs(states.thought.flatten(0, 2)[live].flatten(0, 1), head,
                                   thoughts.flatten(0, 2)[live].flatten(), -policy_weight * credit.flatten(),
                                   reinforce_temperature, banned)
    parts = {"base_lp": base_lp, "mixed_lp": mixed_lp, "reward": reward, "advantage": adv,
             "nll_base": -(after_base * base_lp).sum(), "nll_mixed": -(after_talk * mixed_lp).sum(),
             "policy": policy.detach() / (policy_weight or 1.0),
             "mean_reward": (reward * valid.policy[:, None]).sum() * share[0],
             "positive": (adv > 0).sum() * share[0], "mean_mix": (after_talk * states.mix.detach()).sum()}
    return nll + policy, parts
