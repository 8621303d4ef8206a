"""The staged oracle equals the official code (golden cases) and costs what that costs (FLOPs)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from staged import StagedConfig, staged_step
from torch.utils.flop_counter import FlopCounterMode

GOLDEN = Path(__file__).parent / "golden"
SHAPE = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=6)


def random_params(cfg, dtype=torch.float64, seed=0):
    D, inner, V = cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,),
              "start_embedding": (D,), "end_embedding": (D,), "mixing_head.0.weight": (D, 2 * D),
              "mixing_head.0.bias": (D,), "mixing_head.2.weight": (D, D),
              "mixing_head.2.bias": (D,), "mixing_head.4.weight": (1, D)}
    if not cfg.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(cfg.num_hidden_layers):
        at = f"model.layers.{i}."
        for name, shape in dict(q=(q, D), k=(kv, D), v=(kv, D), o=(D, q)).items():
            shapes[f"{at}self_attn.{name}_proj.weight"] = shape
            if cfg.attention_bias and name != "o":
                shapes[f"{at}self_attn.{name}_proj.bias"] = shape[:1]
        for name, shape in dict(gate=(inner, D), up=(inner, D), down=(D, inner)).items():
            shapes[f"{at}mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = (D,)
    gen = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=gen, dtype=torch.float64)
             for name, shape in shapes.items()}
    return {name: (1 + 0.1 * x if "norm" in name else 0.3 * x).to(dtype).requires_grad_()
            for name, x in noise.items()}


def relative(ours, reference):
    scale = reference.abs().max()
    assert ours.shape == reference.shape
    return ((ours - reference).abs().max() / (scale if scale > 0 else 1)).item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("weight", ["1", "1e6"])
@pytest.mark.parametrize("case", ["a4_t2_p2", "a8_t4_p2"])
def test_golden(case, weight, attention):
    meta = json.loads((GOLDEN / f"{case}.json").read_text())
    ref = load_file(GOLDEN / f"{case}.safetensors")
    n, A, P, B, L = (meta[k] for k in ("n_ahead", "n_ahead_talk", "n_passes", "batch", "seq_len"))
    T = L - 1
    cfg = StagedConfig(**{k: v for k, v in meta["config"].items()
                          if k in StagedConfig.__dataclass_fields__})
    params = {k.removeprefix("weights.").replace("talk_head.0.", "mixing_head."): v
              for k, v in ref.items() if k.startswith("weights.")}
    params |= {name: 100 * params[name][0] for name in ("start_embedding", "end_embedding")}
    params = {k: v.clone().requires_grad_() for k, v in params.items()}
    ids, other = ref["input_ids"], torch.ones(B, A - 1, dtype=torch.long)  # of another document
    out = staged_step(
        params, cfg, torch.cat([ids, other], 1), torch.cat([torch.zeros_like(ids), other], 1),
        n_ahead=n - 1, n_ahead_talk=A, n_passes=P, policy_weight=float(weight), attention=attention,
        thoughts=ref["thought_tokens"].permute(1, 2, 0).unflatten(0, (B, P))[:, :, :T],
        banned_ids={meta["start_token_id"], meta["end_token_id"]},
        policy_valid=(torch.arange(T) < L - 1 - A).expand(B, T))
    out["loss"].backward()
    rows = {k: v.flatten(0, 1) for k, v in out.items() if v.dim()}

    errors = {"base": relative(rows["nll_base"][:, :T], ref["loss_stage_0"]),
              "reward": relative(rows["reward"][:, :L - 1 - A], ref["policy_reward"]),
              "policy_loss": relative(out["policy_loss"], ref["dqn_loss"]),
              "nll_loss": relative(out["nll_loss"], ref["nll_loss"]),
              "loss": relative(out["loss"], ref[f"loss_beta{weight}"])}
    for s in range(1, n - 1):
        errors[f"partial {s}"] = relative(rows["nll_partial"][..., s - 1], ref[f"loss_stage_{s}"])
    for k in range(A):
        errors[f"mixed {k}"] = relative(rows["nll_mixed"][:, :L - 1 - k, k],
                                        ref[f"loss_stage_{n - 1 + k}"])
        errors[f"mix {k}"] = relative(rows["mix"][:, :L - 1 - k, k],
                                      ref[f"w_{n - 1 + k}"][:, :L - 1 - k, 0])
    for m in range(n - 3):
        errors[f"thought_lp {m}"] = relative(rows["thought_lp"][..., m], ref[f"action_ll_{m}"])
    for name, p in params.items():
        want = ref[f"grad_beta{weight}." + name.replace("mixing_head.", "talk_head.0.")]
        stored = name in ("start_embedding", "end_embedding")
        ours, want = (100 * p.grad, want[0]) if stored else (p.grad, want)
        errors["grad " + name] = relative(ours, want)
    bad = {k: e for k, e in errors.items() if not e < 1e-9}
    assert not bad


def official_flops(cfg, B, L, n, A, P, first=None):
    """Forward FLOPs of SEMANTICS: n+A-1 calls of B*P rows on L positions (the first on `first`)."""
    first, rows, calls = first or L, B * P, n + A - 1
    D, V, heads = cfg.hidden_size, cfg.vocab_size, cfg.num_attention_heads * cfg.head_dim
    tokens = rows * (first + (calls - 1) * L)
    layer = D * (2 * heads + 2 * cfg.num_key_value_heads * cfg.head_dim + 3 * cfg.intermediate_size)
    # pairs of query and key, per row
    keys = first * first + sum(L * (first + s * L) for s in range(1, calls))
    return 2 * (tokens * layer * cfg.num_hidden_layers  # projections and MLP
                + tokens * 2 * V * D  # two LM heads per call
                + rows * L * (n - 3 + A) * V * D  # one-hots: sampled, teacher-forced
                + rows * L * (calls - 1) * (3 * D * D + D)  # mixing head
                + rows * keys * 2 * heads * cfg.num_hidden_layers)  # q @ k, weights @ v


def test_flops_are_the_official_ones():
    cfg = StagedConfig(**SHAPE, tie_word_embeddings=False)
    params, B, T, K, A, P = random_params(cfg), 2, 20, 7, 4, 2
    text = torch.randint(61, (B, T + A), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        staged_step(params, cfg, text, torch.zeros_like(text), n_ahead=K, n_ahead_talk=A,
                    n_passes=P, attention="eager")
    counted = counter.get_total_flops()
    assert counted == official_flops(cfg, B, T, K + 1, A, P, first=T + A - 1)
    assert abs(counted / official_flops(cfg, B, T, K + 1, A, P) - 1) < 0.1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("K", "A", "P"), [(4, 2, 2), (3, 1, 1)])
def test_documents_do_not_mix(K, A, P, attention):
    """Biases, tied head: another document's tokens reach no valid loss; sampled equals forced."""
    cfg, B, T = StagedConfig(**SHAPE), 2, 11
    params, gen = random_params(cfg), torch.Generator().manual_seed(2)
    text = torch.randint(61, (B, T + A), generator=gen)
    docs = (torch.arange(T + A) >= torch.tensor([[5], [8]])).long()
    uniforms = torch.rand(B, P, T, K - 2, generator=gen, dtype=torch.float64)
    args = dict(n_ahead=K, n_ahead_talk=A, n_passes=P, banned_ids={7, 60}, attention=attention)
    out = staged_step(params, cfg, text, docs, uniforms=uniforms, **args)
    assert not torch.isin(out["thoughts"], torch.tensor([7, 60])).any()
    forced = staged_step(params, cfg, text, docs, thoughts=out["thoughts"], **args)
    assert torch.equal(out["loss"], forced["loss"])

    changed = torch.where(docs == 0, (text + 1) % 61, text)
    again = staged_step(params, cfg, changed, docs, thoughts=out["thoughts"], **args)
    second = docs[:, None, :T].expand(B, P, T) == 1
    for name in ("nll_mixed", "thought_lp", "reward"):
        assert torch.allclose(out[name][second], again[name][second], rtol=0, atol=1e-12)
        assert not torch.allclose(out[name][~second], again[name][~second])


def test_inverse_cdf_samples_the_distribution():
    """Equally spaced uniforms hit every id as often as its probability says, banned ids never."""
    cfg, T, P = StagedConfig(**SHAPE), 1, 4000
    params = random_params(cfg)
    text, docs = torch.tensor([[3, 5]]), torch.zeros(1, 2, dtype=torch.long)
    uniforms = (torch.arange(P, dtype=torch.float64) / P).view(1, P, T, 1)
    args = dict(n_ahead=3, n_ahead_talk=1, banned_ids={7, 60}, thought_temperature=2.0,
                reinforce_temperature=2.0)
    with torch.no_grad():
        out = staged_step(params, cfg, text, docs, n_passes=P, uniforms=uniforms, **args)
    share = torch.bincount(out["thoughts"].flatten(), minlength=61) / P
    probability = torch.zeros(61, dtype=torch.float64)
    probability[out["thoughts"].flatten()] = out["thought_lp"].flatten().exp()
    assert share[[7, 60]].sum() == 0 and (share - probability).abs().max() < 2 / P
