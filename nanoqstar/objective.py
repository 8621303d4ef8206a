"""The objective as pure functions: chunked log-probs, masks, reward, advantage, REINFORCE, total loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanoqstar.attention import can_compile

CHUNK_LOGITS = {"cuda": 2**29, "cpu": 6_000_000}  # held at once: large products on a GPU, about the cache on a CPU


def fp32_logits(hidden, weight, banned=None, temperature=1.0):
    """hidden @ weight.T / temperature with fp32 accumulation and at least fp32 results, banned ids at -inf.

    Under autocast the product runs in its dtype.  hidden (N, D), weight (V, D), banned (V,) bool -> (N, V).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden, weight = (x.to(compute_dtype(weight)) for x in (hidden, weight))
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda and hidden.dtype != dtype:
            logits = torch.mm(hidden, weight.T, out_dtype=dtype)
        else:
            logits = (hidden @ weight.T).to(dtype)
    if temperature != 1.0:
        logits /= temperature
    return logits if banned is None else logits.masked_fill_(banned, -torch.inf)


def compute_dtype(x):
    """What products of x run in: autocast's dtype where it is on, x's own elsewhere."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype == torch.float32 else x.dtype


def row_chunks(n_rows, vocab, device):
    size = max(1, CHUNK_LOGITS.get(device.type, 2**24) // vocab)
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def log_prob_chunk(hidden, weight, target, row_weight, temperature, banned, needs_grad):
    """Log-probs (N,) of target (N, 1), and the gradient of row_weight (N, 1) times them in the logits, (N, V) or None.

    hidden (N, D) and weight (V, D) of one dtype, which is the gradient's.
    """
    logits = fp32_logits(hidden, weight, banned, temperature)
    top, grad = logits.amax(-1, keepdim=True), None
    log_prob = logits.gather(-1, target) - top
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    log_prob -= total.log()
    if needs_grad:
        scale = row_weight / temperature
        grad = logits.mul_(-scale / total).to(weight.dtype)
        grad.scatter_(-1, target, (-scale * log_prob.expm1()).to(weight.dtype))  # 1 - p, exact where p is almost 1
    return log_prob[:, 0], grad


torch._dynamo.config.specialize_float = True  # a temperature is a setting: a graph for each, no scalars on the CPU
compiled_chunk = torch.compile(log_prob_chunk)  # on a GPU: two passes over the logits, not eleven


class _WeightedLogProbs(torch.autograd.Function):
    """Computes the gradient along with the value, so that each chunk of logits exists once and is never recomputed."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, row_weights, temperature, banned):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        row_weights, compute = row_weights.to(dtype), weight.to(compute_dtype(weight))
        chunk = compiled_chunk if hidden.is_cuda and can_compile(hidden.device) else log_prob_chunk
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in row_chunks(len(hidden), len(weight), hidden.device):
                h = hidden[rows].to(compute.dtype)
                log_probs[rows], grad = chunk(h, compute, targets[rows, None], row_weights[rows, None], temperature,
                                              banned, needs_hidden or needs_weight)
                if needs_hidden:
                    grad_hidden[rows] = (grad @ compute).to(hidden.dtype)
                if needs_weight and grad.dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad.T, h)
                elif needs_weight:
                    grad_weight += torch.mm(grad.T, h, **({"out_dtype": torch.float32} if h.is_cuda else {}))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(log_probs)
        return (row_weights * log_probs).sum(), log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return *(None if g is None else g.mul_(grad_sum) for g in (grad_hidden, grad_weight)), None, None, None, None


def weighted_log_probs(hidden, weight, targets, row_weights, temperature=1.0, banned=None):
    """sum_n row_weights[n] * log softmax(hidden[n] @ weight.T / temperature)[targets[n]], differentiable once.

    hidden (N, D), weight (V, D), targets (N,) int64, row_weights (N,) constants, banned (V,) bool: ids left out of the
    softmax.  Returns the sum and the detached log-probs (N,), nats, at least fp32.  Never holds (N, V): chunks of rows.
    """
    assert hidden.dim() == 2 and targets.shape == row_weights.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _WeightedLogProbs.apply(hidden, weight, targets, row_weights, temperature, banned)


@torch.no_grad()
def sample_tokens(hidden, weight, uniforms, temperature=1.0, banned=None):
    """Inverse-CDF samples of softmax(logits / temperature): one id for each uniform number, lowest ids first.

    hidden (N, D), weight (V, D), uniforms (N, n) in [0, 1).  Returns ids (N, n) and their log-probs (N, n), nats.
    An id of zero probability is never returned, whatever the rounding.
    """
    ids = torch.empty(uniforms.shape, dtype=torch.long, device=hidden.device)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    log_probs = torch.empty(uniforms.shape, dtype=dtype, device=hidden.device)
    compute = weight.to(compute_dtype(weight))
    for rows in row_chunks(len(hidden), len(weight), hidden.device):
        probs = fp32_logits(hidden[rows], compute, banned, temperature).softmax(-1)
        cdf = probs.cumsum(-1)
        total = cdf[:, -1:]
        below = torch.minimum(uniforms[rows].to(cdf.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
        # the first id whose cumulative probability exceeds it
        ids[rows] = torch.searchsorted(cdf, below.contiguous(), right=True)
        log_probs[rows] = probs.gather(-1, ids[rows]).log()
    return ids, log_probs


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
