"""The LM head in chunks of rows: log-probs of given targets, and inverse-CDF sampling.

No [tokens, vocabulary] tensor exists, and none of the loss's logits is computed twice.
"""

from functools import lru_cache
from typing import Any

import torch

from nanoqstar.cpu import LOGITS, add_product, product
from nanoqstar.device import can_compile, compiled

# logits held at once: large products on a GPU
CHUNK_LOGITS = {"cuda": 2**29, "cpu": LOGITS}
BLOCK = 256  # ids of the vocabulary that are summed first when sampling


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What products of x run in: autocast's dtype where it is on, x's own elsewhere."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def fp32_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b, accumulated and returned in `dtype`, fp32 at least."""
    if a.dtype == dtype:
        return product(a, b)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


def fp32_logits(hidden: torch.Tensor, weight: torch.Tensor, banned: torch.Tensor | None = None,
                temperature: float = 1.0, rest: torch.Tensor | None = None) -> torch.Tensor:
    """(hidden + rest) @ weight.T / temperature, fp32 at least, banned ids at -inf.

    Under autocast the products run in its dtype. hidden, rest (N, D), weight (V, D), banned (V,)
    bool -> (N, V). rest: what rounding took from hidden (`weighted_log_probs`).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weight = weight.to(compute_dtype(weight)).T
    with torch.autocast(hidden.device.type, enabled=False):
        logits = fp32_product(hidden.to(weight.dtype), weight, dtype)
        if rest is not None:
            logits += fp32_product(rest, weight, dtype)
    if temperature != 1.0:
        logits /= temperature
    return logits if banned is None else logits.masked_fill_(banned, -torch.inf)


def row_chunks(n_rows: int, vocab: int, device: torch.device) -> list[slice]:
    size = max(1, CHUNK_LOGITS.get(device.type, 2**24) // vocab)
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def log_prob_chunk(hidden: torch.Tensor, rest: torch.Tensor | None, weight: torch.Tensor,
                   target: torch.Tensor, temperature: float, banned: torch.Tensor | None,
                   needs_grad: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs (N, 1) of target (N, 1), and softmax minus one-hot (N, V): their negative gradient
    in the logits / temperature.

    hidden and rest (N, D) and weight (V, D) of one dtype, which is that of the gradient.
    """
    logits = fp32_logits(hidden, weight, banned, temperature, rest)
    log_prob = logits.gather(-1, target) - logits.amax(-1, keepdim=True)
    probs = torch.softmax(logits, -1, out=logits)  # row by row: in place
    log_prob += probs.amax(-1, keepdim=True).log()  # 1 / sum(exp(logits - top))
    if not needs_grad:
        return log_prob, None
    # exact where the target's probability is almost 1
    return log_prob, probs.to(weight.dtype).scatter_(-1, target, log_prob.expm1().to(weight.dtype))


@lru_cache
def compiled_chunk() -> Any:
    """On a GPU: two passes over the logits, not eleven."""
    return compiled(log_prob_chunk)


class _WeightedLogProbs(torch.autograd.Function):
    """Computes the gradient along with the value, so that each chunk of logits exists once."""

    @staticmethod
    def forward(ctx, hidden, weight, targets,  # type: ignore
                row_weights, temperature, banned, exact):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight and not len(hidden) else None
        row_weights, compute = row_weights.to(dtype), weight.to(compute_dtype(weight))
        compiles = hidden.is_cuda and can_compile(hidden.device)
        chunk = compiled_chunk() if compiles else log_prob_chunk
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in row_chunks(len(hidden), len(weight), hidden.device):
                h, rest = hidden[rows].to(compute.dtype), None
                if exact and h.dtype != hidden.dtype:
                    rest = (hidden[rows] - h).to(h.dtype)
                log_prob, grad = chunk(h, rest, compute, targets[rows, None], temperature, banned,
                                       needs_hidden or needs_weight)
                log_probs[rows] = log_prob[:, 0]
                scale = -row_weights[rows, None] / temperature
                if needs_hidden:
                    torch.mul(product(grad, compute), scale, out=grad_hidden[rows])
                if needs_weight:
                    h = (h * scale).to(h.dtype)
                    if grad_weight is None:
                        grad_weight = fp32_product(grad.T, h, weight.dtype)
                    elif h.dtype == weight.dtype:
                        add_product(grad_weight, grad.T, h)
                    else:
                        grad_weight += fp32_product(grad.T, h, weight.dtype)
                del grad  # before the next chunk's logits: as large as they are
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(log_probs)
        # a target that cannot be has log-prob -inf, and no share in the sum where it has no weight
        return torch.where(row_weights == 0, 0, row_weights * log_probs).sum(), log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum, _):  # type: ignore
        if grad_sum.is_cpu and grad_sum == 1:  # a pass over the vocabulary saved
            return *ctx.saved_tensors, None, None, None, None, None
        grads = (None if g is None else g.mul_(grad_sum) for g in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def weighted_log_probs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                       row_weights: torch.Tensor, temperature: float = 1.0,
                       banned: torch.Tensor | None = None, exact: bool = False
                       ) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_n row_weights[n] * log softmax(hidden[n] @ weight.T / temperature)[targets[n]].

    hidden (N, D), weight (V, D), targets (N,) int64, row_weights (N,) constants, banned (V,) bool:
    ids left out of the softmax. Returns the sum, differentiable once, and the detached log-probs
    (N,), nats, fp32 at least. Never holds (N, V): chunks of rows.
    exact: where products run in fewer bits than hidden has, what rounding takes from hidden is
    multiplied as well. A reward is the difference of two log-probs whose hidden states differ by a
    small mixing weight: in bf16 alone it would be rounding noise.
    """
    assert hidden.dim() == 2 and targets.shape == row_weights.shape == hidden.shape[:1], (
        hidden.shape, targets.shape)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _WeightedLogProbs.apply(hidden, weight, targets, row_weights, temperature, banned, exact)


@torch.no_grad()
def sample_tokens(hidden: torch.Tensor, weight: torch.Tensor, uniforms: torch.Tensor,
                  temperature: float = 1.0, banned: torch.Tensor | None = None
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF samples of softmax(logits / temperature): an id for each uniform number.

    hidden (N, D), weight (V, D), uniforms (N, n) in [0, 1), low ones for low ids. Returns ids and
    their log-probs (N, n), nats. No rounding makes it return an id of zero probability.
    """
    ids = torch.empty(uniforms.shape, dtype=torch.long, device=hidden.device)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    log_probs = torch.empty(uniforms.shape, dtype=dtype, device=hidden.device)
    compute = weight.to(compute_dtype(weight))
    for rows in row_chunks(len(hidden), len(weight), hidden.device):
        logits = fp32_logits(hidden[rows], compute, banned, temperature)
        probs = torch.softmax(logits, -1, out=logits)
        ids[rows] = inverse_cdf(probs, uniforms[rows].to(dtype))
        log_probs[rows] = probs.gather(-1, ids[rows]).log()
    return ids, log_probs


def inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Ids (N, n) of probs (N, V), in whose share of the cumulative sum uniforms (N, n) fall.

    On two levels, by the sums of blocks and then within one: a pass less over the vocabulary.
    """
    n_blocks, vocab = probs.shape[1] // BLOCK, probs.shape[1]
    if n_blocks < 2:
        return first_beyond(probs, uniforms * probs.sum(-1, keepdim=True))[0]
    whole, rest = probs[:, :n_blocks * BLOCK], probs[:, n_blocks * BLOCK:]
    sums = torch.cat((whole.unflatten(1, (n_blocks, BLOCK)).sum(-1), rest.sum(-1, True)), dim=1)
    block, left = first_beyond(sums, uniforms * sums.sum(-1, keepdim=True))
    ids = block[..., None] * BLOCK + torch.arange(BLOCK, device=probs.device)
    inside = probs.gather(1, ids.flatten(1).clamp(max=vocab - 1)).view(ids.shape)
    within, _ = first_beyond(inside.masked_fill_(ids >= vocab, 0), left[..., None])
    return (block * BLOCK + within[..., 0]).clamp_(max=vocab - 1)  # NaN: any will do


def first_beyond(shares: torch.Tensor, below: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For below (.., n): the index in shares (.., M) whose cumulative sum first exceeds it, and by
    how much it exceeds the sum before. Never an index without a share, however sums are rounded.
    """
    cdf = shares.cumsum(-1)
    total = cdf[..., -1:]
    below = torch.minimum(below, torch.nextafter(total, torch.zeros_like(total))).contiguous()
    index = torch.searchsorted(cdf, below, right=True)
    index.clamp_(max=cdf.shape[-1] - 1)  # NaN: any will do
    return index, (below - (cdf - shares).gather(-1, index)).clamp_(min=0)
