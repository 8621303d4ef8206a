"""The objective (paper 4.4): masks, reward, advantage, REINFORCE, total loss."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from nanoqstar.head import weighted_log_probs


@dataclass(frozen=True)
class Objective:
    """What the loss weighs and how (paper 4.4); the defaults are the official values."""

    base_weight: float = 0.5  # of the NLL without thoughts
    mixed_weight: float = 0.5  # of the NLL with thoughts
    policy_weight: float = 1e6  # of the REINFORCE term; negative: turned round, a control
    clamp_advantage: bool = True  # drop negative advantages
    normalize_advantage: bool = False  # divide them by their root mean square
    reinforce_temperature: float = 3.0  # of the log-probs in the policy term
    shuffle_advantage: bool = False  # a control: each thought has that of another
    seed: int = 0  # of the shuffle


@dataclass
class States:
    """Hidden states that a window's loss is made of, after the final norm."""

    base: torch.Tensor  # (B, T+A-1, D): text alone; entry i predicts x_{i+1}
    thought: torch.Tensor  # (B, P, T, S, D): start, t_1 .. t_{S-1}; predict t_1 .. t_S
    mixed: torch.Tensor  # (B, P, T, A, D): end, lookahead, mixed with base; x_{i+1} .. x_{i+A}
    mix: torch.Tensor  # (B, P, T, A): weight of the thought


@dataclass
class Outcome:
    """What the thoughts of a forward came to, detached; nats."""

    base_lp: torch.Tensor  # (B, T+A-1) of x_{i+1}, text alone
    mixed_lp: torch.Tensor  # (B, P, T, A) of x_{i+1} .. x_{i+A}, with the thought at i
    reward: torch.Tensor  # (B, P, T) what the thought gained, summed over the lookahead
    advantage: torch.Tensor  # (B, P, T)


@dataclass
class Valid:
    """Which positions count (B, ..), by document ids alone: none predicts past a document's end."""

    base: torch.Tensor  # (B, T): x_{i+1} is of x_i's document
    talk: torch.Tensor  # (B, T, A): x_{i+1+j} is
    policy: torch.Tensor  # (B, T): all of them are

    @classmethod
    def from_docs(cls, docs: torch.Tensor, n_ahead_talk: int) -> "Valid":
        """docs: (B, T+A)."""
        talk = docs.unfold(1, n_ahead_talk + 1, 1)[..., 1:] == docs[:, :-n_ahead_talk, None]
        return cls(talk[..., 0], talk, talk.all(-1))

    def without_given(self, given: torch.Tensor) -> "Valid":
        """Of these, what is in windows that have no given thoughts."""
        none = (given < 0).flatten(1).all(1)[:, None]
        return Valid(self.base & none, self.talk & none[..., None], self.policy & none)

    def after_given(self, given: torch.Tensor) -> torch.Tensor:
        """Of talk, what follows whole given thoughts, (B, P, T, A); given: (B, P, T, S) ids, -1
        where there are none."""
        return self.talk[:, None] & (given[..., -1:] >= 0)

    def counts(self) -> torch.Tensor:
        """Counts of one pass (1 + A + 1,), to be summed over an update: base, talk's A, policy."""
        return torch.cat((self.base.sum()[None], self.talk.sum((0, 1)), self.policy.sum()[None]))


def advantage(reward: torch.Tensor, valid: torch.Tensor, clamp: bool, normalize: bool = False
              ) -> torch.Tensor:
    """Reward above the mean of the same position's passes, itself included; negatives dropped if
    `clamp` (paper 4.4.3).

    reward: (B, P, T) nats per thought. valid: (B, T) bool. Returns (B, P, T), zero where invalid.
    P == 1 has no baseline, as in the official code; the clamp applies all the same.
    normalize: divide by the root mean square over the valid entries of this forward.
    """
    if reward.shape[1] > 1:
        reward = reward - reward.mean(1, keepdim=True)
    reward = reward * valid[:, None]
    if normalize:
        mean_square = reward.square().sum() / (valid.sum() * reward.shape[1]).clamp(min=1)
        reward = reward / mean_square.sqrt().clamp(min=1e-6)
    return reward.clamp(min=0) if clamp else reward


@lru_cache
@torch.inference_mode(False)
def shuffle(n: int, seed: int, device: torch.device) -> torch.Tensor:
    """Where each of n takes another's place, (n,) int64: one random ring, so that none keeps its
    own (for n > 1)."""
    ring = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return ring.roll(1)[ring.argsort()].to(device)


def language_model_loss(hidden: torch.Tensor, head: torch.Tensor, text: torch.Tensor,
                        docs: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mean NLL of continued pre-training without thoughts.

    hidden: (B, T, D). text, docs: (B, > T). count: valid positions of the whole update.
    """
    n = hidden.shape[1]
    valid = docs[:, 1:n + 1] == docs[:, :n]
    weights = valid.flatten() / count.clamp(min=1).to(hidden.dtype)
    return weighted_log_probs(hidden.flatten(0, 1), head, text[:, 1:n + 1].flatten(), -weights)[0]


def quiet_star_loss(states: States, head: torch.Tensor, text: torch.Tensor, thoughts: torch.Tensor,
                    valid: Valid, counts: torch.Tensor, objective: Objective,
                    banned: torch.Tensor | None = None
                    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Outcome]:
    """base_weight * base NLL + mixed_weight * mixed NLL + policy_weight * REINFORCE, means over the
    whole update.

    head: (V, D). text: (B, T+A). thoughts: (B, P, T, S). banned: (V,) bool, no thought holds them.
    counts: `Valid.counts()` summed over the update's micro-batches and ranks: gradients add up.
    Returns the loss; this forward's shares of the update's means, detached: nll_base, nll_talk
    (mixed, over the whole lookahead), policy, reward, positive and live (shares of advantages above
    and other than zero), mix; and the `Outcome`.
    """
    (_, n_passes, _, n_talk), n_sampled = states.mixed.shape[:4], thoughts.shape[-1]
    dtype = torch.promote_types(states.base.dtype, torch.float32)
    counts = counts.clamp(min=1).to(dtype)  # an empty mean is 0
    base_count, talk_counts, policy_count = counts.split((1, n_talk, 1))
    # (B, T+A-1): the last A-1 serve the reward only
    after_base = F.pad(valid.base, (0, n_talk - 1)) / base_count
    after_talk = (valid.talk / (n_talk * n_passes * talk_counts))[:, None].expand(states.mix.shape)
    talk_targets = text[:, 1:].unfold(1, n_talk, 1)[:, None].expand(states.mix.shape)

    nll, log_probs = weighted_log_probs(
        torch.cat((states.base.flatten(0, 1), states.mixed.flatten(0, 3))), head,
        torch.cat((text[:, 1:].flatten(), talk_targets.flatten())),
        torch.cat((-objective.base_weight * after_base.flatten(),
                   -objective.mixed_weight * after_talk.flatten())), exact=True)
    base_lp, mixed_lp = log_probs.split((after_base.numel(), after_talk.numel()))
    base_lp, mixed_lp = base_lp.view(after_base.shape), mixed_lp.view(after_talk.shape)

    base_ahead = base_lp.unfold(1, n_talk, 1)[:, None]  # (B, 1, T, A): the same targets
    # without a weight the mixed prediction is the base's, however the products were rounded
    mixed_lp = torch.where(states.mix.detach() == 0, base_ahead, mixed_lp)
    reward = (mixed_lp - base_ahead).sum(-1)
    adv = advantage(reward, valid.policy, objective.clamp_advantage, objective.normalize_advantage)
    if objective.shuffle_advantage:  # over passes and positions of each window, always alike
        others = shuffle(adv[0].numel(), objective.seed, adv.device)
        adv = adv.flatten(1)[:, others].view_as(adv) * valid.policy[:, None]
    # the other thoughts have no gradient
    live = (adv.flatten() * bool(objective.policy_weight)).nonzero()[:, 0]
    share = 1 / (n_passes * policy_count)
    credit = (adv.flatten()[live] * share / n_sampled)[:, None].expand(-1, n_sampled).flatten()
    policy, _ = weighted_log_probs(
        states.thought.flatten(0, 2)[live].flatten(0, 1), head,
        thoughts.flatten(0, 2)[live].flatten(), -objective.policy_weight * credit,
        objective.reinforce_temperature, banned)
    stats = {"nll_base": -(after_base * base_lp).sum(), "nll_talk": -(after_talk * mixed_lp).sum(),
             "policy": policy.detach() / (objective.policy_weight or 1.0),
             "reward": (reward * valid.policy[:, None]).sum() * share[0],
             "positive": (adv > 0).sum() * share[0], "live": len(live) * share[0],
             "mix": (after_talk * states.mix.detach()).sum()}
    return nll + policy, stats, Outcome(base_lp, mixed_lp, reward, adv)
