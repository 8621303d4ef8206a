"""A Quiet-STaR training step the official way, forward by forward: an oracle and a baseline.

Written from `shared/golden/SEMANTICS.md` (facts A-F) and independent of `nanoqstar`, so that the
packed implementation can be checked against it and timed against it. It deliberately KEEPS what the
official code does:
- rows are texts repeated once per pass (`repeat_interleave`), so the base pass is computed n_passes
  times;
- n_ahead + n_ahead_talk forwards in a row over one growing KV cache (`torch.cat`, heads repeated),
  all graphs alive;
- a dense additive mask, grown by an identity block per call;
- two LM heads per call over the whole vocabulary (mixed logits and sampling logits), used or not:
  the mixed losses after partial thoughts and the sampling logits of base, end and lookahead tokens
  are computed and thrown away;
- every sampled and teacher-forced token enters as one-hot @ embedding, including the last one,
  which no call reads (start and end tokens are vectors and skip that product);
- the base losses of the reward are a cross-entropy of their own at every lookahead stage.
It does NOT keep accidents that change results (SEMANTICS G), unused clones of logits, or the log's
hold on graphs.

What differs from the official shapes: there every call runs on the L text positions; here the first
one runs on the T + A - 1 base tokens and the others on the T that think, so that all T have A
labels (and no slice of the logits has to be copied). With T = L that is A - 1 more tokens in one
call of many. The official n_ahead counts the base pass: it is n_ahead + 1 of ours.
Shapes: B batch, P passes, R = B*P rows, T thinking positions, A = n_ahead_talk, S = n_ahead - 2
sampled tokens, D, V.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MASKED = -1e30  # finite, and representable in bf16


@dataclass
class StagedConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    attention_bias: bool = True
    tie_word_embeddings: bool = True


def _wide(x):
    """At least float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rms_norm(x, weight, eps):
    wide = _wide(x)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rope(x, positions, cfg):
    """Rotate-half. x: (R, heads, n, head_dim), positions: (n,)."""
    exponent = torch.arange(0, cfg.head_dim, 2, device=x.device, dtype=torch.float64) / cfg.head_dim
    angles = torch.outer(positions.double(), cfg.rope_theta ** -exponent).repeat(1, 2)
    wide = _wide(x)
    left, right = wide.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return (wide * angles.cos().to(wide.dtype) + turned * angles.sin().to(wide.dtype)).to(x.dtype)


def _attend(q, k, v, mask, attention):
    """q: (R, H, n, head_dim), k, v: (R, G, n_keys, head_dim), mask: (R, 1, n, n_keys), additive."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if attention == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + mask
    return _wide(scores).softmax(-1).to(v.dtype) @ v


def _forward(params, cfg, x, positions, mask, cache, attention):
    """One call on embeddings x: (R, n, D). Extends the cache; returns (R, n, D), normed."""
    def linear(name, x):
        return F.linear(x, params[name + ".weight"], params.get(name + ".bias"))

    for i in range(cfg.num_hidden_layers):
        at = f"model.layers.{i}."
        h = _rms_norm(x, params[at + "input_layernorm.weight"], cfg.rms_norm_eps)
        q, k, v = (linear(f"{at}self_attn.{name}_proj", h) for name in "qkv")
        q, k, v = (y.unflatten(-1, (-1, cfg.head_dim)).transpose(1, 2) for y in (q, k, v))
        q, k = _rope(q, positions, cfg), _rope(k, positions, cfg)
        if cache[i] is not None:
            k, v = torch.cat([cache[i][0], k], dim=2), torch.cat([cache[i][1], v], dim=2)
        cache[i] = k, v
        out = _attend(q, k, v, mask, attention).transpose(1, 2).flatten(2)
        x = x + linear(at + "self_attn.o_proj", out)
        h = _rms_norm(x, params[at + "post_attention_layernorm.weight"], cfg.rms_norm_eps)
        x = x + linear(at + "mlp.down_proj",
                       F.silu(linear(at + "mlp.gate_proj", h)) * linear(at + "mlp.up_proj", h))
    return _rms_norm(x, params["model.norm.weight"], cfg.rms_norm_eps)


def _nll(logits, targets):
    """logits: (R, n, V), targets: (R, n) -> (R, n)"""
    nll = F.cross_entropy(_wide(logits).flatten(0, 1), targets.flatten(), reduction="none")
    return nll.view(targets.shape)


def _inverse_cdf(logits, uniform):
    """The first id whose cumulative probability exceeds uniform; never one of probability 0."""
    cdf = _wide(logits).softmax(-1).cumsum(-1)
    total = cdf[..., -1:].contiguous()
    ids = torch.searchsorted(cdf, uniform.unsqueeze(-1).to(cdf.dtype) * total, right=True)
    return torch.minimum(ids, torch.searchsorted(cdf, total)).squeeze(-1)


def _mean(x, mask):
    """Mean of x where mask (broadcast) is true; 0 if it nowhere is."""
    mask = mask.expand(x.shape)
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def staged_step(params, cfg, text, docs, *, n_ahead, n_ahead_talk, n_passes, thoughts=None,
                uniforms=None, banned_ids=(), thought_temperature=1.0, reinforce_temperature=3.0,
                policy_weight=1e6, clamp_advantage=True, base_valid=None, talk_valid=None,
                policy_valid=None, attention="sdpa",
                reread=False):
    """Forward of one training step; call `["loss"].backward()` for the gradients.

    params: Hugging Face names; start_embedding, end_embedding (D,);
    mixing_head.{0,2}.{weight,bias}, .4.weight. text, docs: (B, T+A) ids. thoughts: (B, P, T, S)
    forced ids; else uniforms: (B, P, T, S) in [0, 1), inverse CDF; else Gumbel noise, as in the
    official code. base_valid (B, T), talk_valid (B, T, A), policy_valid (B, T): from docs if None.
    attention: "sdpa" is what the official code picks by itself (its time and memory are the
    anchor); "eager" materialises the scores: slower, half as much memory again, and the only one
    whose FLOPs torch counts on a CPU. reread, ours: start is x_i's embedding plus start_embedding,
    at x_i's place, end t_S's plus end_embedding, at t_S's.

    Returns loss, nll_loss, policy_loss, nll_base (B, P, T+A-1), nll_mixed and mix (B, P, T, A),
    reward and advantage (B, P, T), thought_lp and thoughts (B, P, T, S), and nll_partial
    (B, P, T, K-1): x_{i+1} after start, t_1, .., which no loss uses.
    """
    K, A, P, B = n_ahead, n_ahead_talk, n_passes, text.shape[0]
    assert K >= 3 and A >= 1 and P >= 1
    T, N, R = text.shape[1] - A, text.shape[1] - 1, B * P
    embedding = params["model.embed_tokens.weight"]
    head = embedding if cfg.tie_word_embeddings else params["lm_head.weight"]
    banned = torch.as_tensor(sorted(banned_ids), dtype=torch.long, device=text.device)
    rows = text.repeat_interleave(P, dim=0)  # row b*P + p: (R, T+A)

    def mixing_weight(base, talk):
        x = torch.cat([base, talk], dim=-1)
        for i in (0, 2):
            weight, bias = params[f"mixing_head.{i}.weight"], params[f"mixing_head.{i}.bias"]
            x = F.linear(x, weight, bias).relu()
        return _wide(F.linear(x, params["mixing_head.4.weight"]))  # (R, T, 1), unbounded

    def sampling_logits(hidden):
        logits = F.linear(hidden, head)
        logits[..., banned] = MASKED
        return logits

    def choose(logits, k):
        """One-hot (R, T, V) of t_{k+1}, without gradient."""
        if thoughts is None and uniforms is None:  # softmax(logits), whatever tau is
            return F.gumbel_softmax(_wide(logits) / thought_temperature, hard=True).detach()
        if thoughts is None:
            uniform = uniforms[..., k].flatten(0, 1)
            ids = _inverse_cdf(logits.detach() / thought_temperature, uniform)
        else:
            ids = thoughts[..., k].flatten(0, 1)
        return F.one_hot(ids, cfg.vocab_size).to(embedding.dtype)

    # Call 0: the text, every pass its own copy.
    place = torch.arange(N, device=text.device)
    visible = (place[:, None] >= place) & (docs[:, :N, None] == docs[:, None, :N])  # (B, N, N)
    mask_dtype = torch.promote_types(embedding.dtype, torch.float32)
    mask = torch.zeros(visible.shape, dtype=mask_dtype, device=text.device)
    mask = mask.masked_fill(~visible, MASKED)
    mask = mask.repeat_interleave(P, dim=0).unsqueeze(1)  # (R, 1, N, N)
    cache = [None] * cfg.num_hidden_layers
    x = F.embedding(rows[:, :N], embedding)
    base = _forward(params, cfg, x, place, mask, cache, attention)  # (R, N, D)
    base_logits = F.linear(base, head)
    nll_base = _nll(base_logits, rows[:, 1:])
    sampling_logits(base)  # computed, never read

    # Calls 1 .. K+A-1: start, t_1 .. t_S, end, x_{i+1} .. x_{i+A-1}; one token at every position.
    mask = mask[:, :, :T]
    own = torch.full((T, T), MASKED, dtype=mask.dtype, device=text.device)
    own = own.fill_diagonal_(0).expand(R, 1, T, T)
    x = params["start_embedding"].expand(R, T, -1)
    if reread:
        x = x + F.embedding(rows[:, :T], embedding)
    sampled, thought_lp, partial, mixed, mix, reward = [], [], [], [], [], 0
    for call in range(1, K + A):
        ahead = max(0, call - K)  # k of the talk stage, 0 before
        mask = torch.cat([mask, own], dim=-1)
        at = place[:T] + call - reread * (1 + (call >= K))
        talk = _forward(params, cfg, x, at, mask, cache, attention)  # (R, T, D)
        base_ahead = base[:, ahead:ahead + T]
        w = mixing_weight(base_ahead, talk)
        hidden = ((1 - w) * base_ahead + w * talk).to(base.dtype)
        target = rows[:, 1 + ahead:1 + ahead + T]
        nll = _nll(F.linear(hidden, head), target)
        logits = sampling_logits(talk)
        if call <= K - 2:
            one_hot = choose(logits, call - 1)
            ids = one_hot.argmax(-1)
            sampled.append(ids)
            log_pi = (_wide(logits) / reinforce_temperature).log_softmax(-1)
            thought_lp.append(log_pi.gather(-1, ids.unsqueeze(-1)).squeeze(-1))
        elif call >= K:
            # of the last call: never read
            one_hot = F.one_hot(target, cfg.vocab_size).to(embedding.dtype)
        x = (params["end_embedding"].expand(R, T, -1) if call == K - 1 and not reread
             else (one_hot @ embedding).to(embedding.dtype))
        if call == K - 1 and reread:  # the one-hot is still t_S
            x = x + params["end_embedding"]
        if call < K:
            partial.append(nll)
        else:
            mixed.append(nll)
            mix.append(w.squeeze(-1))
            nll_ahead = _nll(base_logits.detach()[:, ahead:ahead + T], target)
            reward = reward + (nll_ahead - nll.detach())

    def per_pass(columns):
        return torch.stack(columns, dim=-1).unflatten(0, (B, P))  # (B, P, T, ...)

    same = torch.stack([docs[:, 1 + j:1 + j + T] == docs[:, :T] for j in range(A)], dim=-1)
    base_valid = same[..., 0] if base_valid is None else base_valid
    talk_valid = same if talk_valid is None else talk_valid
    policy_valid = talk_valid.all(-1) if policy_valid is None else policy_valid

    nll_base, reward = nll_base.unflatten(0, (B, P)), reward.unflatten(0, (B, P))
    nll_mixed, thought_lp = per_pass(mixed), per_pass(thought_lp)
    advantage = reward - reward.mean(dim=1, keepdim=True) if P > 1 else reward
    advantage = advantage.clamp(min=0) if clamp_advantage else advantage
    policy_loss = _mean(-advantage.unsqueeze(-1) * thought_lp, policy_valid[:, None, :, None])
    talk_loss = sum(_mean(nll_mixed[..., j], talk_valid[:, None, :, j]) for j in range(A)) / A
    nll_loss = 0.5 * _mean(nll_base[..., :T], base_valid[:, None]) + 0.5 * talk_loss
    return dict(loss=nll_loss + policy_weight * policy_loss, nll_loss=nll_loss,
                policy_loss=policy_loss, nll_base=nll_base, nll_partial=per_pass(partial),
                nll_mixed=nll_mixed, mix=per_pass(mix), reward=reward, advantage=advantage,
                thought_lp=thought_lp, thoughts=per_pass(sampled))
