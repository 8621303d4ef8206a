"""The LM head in chunks: log-probs of given targets, and inverse-CDF sampling, without a [tokens, vocabulary] tensor."""

from functools import lru_cache

import torch

from nanoqstar.device import can_compile, compiled

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


@lru_cache
def compiled_chunk():
    """On a GPU: two passes over the logits, not eleven."""
    return compiled(log_prob_chunk)


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
        chunk = compiled_chunk() if hidden.is_cuda and can_compile(hidden.device) else log_prob_chunk
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
