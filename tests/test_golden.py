"""tests/golden.py: the given cases pass, other shapes would, altered numbers and code do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file
from staged import StagedConfig, staged_step
from test_staged import random_params

from nanoqstar import attention, objective, thoughts

TESTS = Path(__file__).parent
CASES = sorted((TESTS / "golden").glob("*.json"))
WHAT = {"total loss", "nll", "policy loss", "base losses", "mixed losses", "mixing weights",
        "rewards", "log-likelihoods", "gradients"}


def worst(path):
    errors = golden.check(path)
    assert errors.keys() == WHAT
    return max(errors.values(), key=lambda e: (e != e, e))  # NaN is the worst


def write_case(folder, n, n_talk, n_passes, batch, length, seed=0, **sizes):
    """A case of the official format, n the official n_ahead, but computed by the staged step."""
    gen = torch.Generator().manual_seed(seed)
    config = dict(vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=4, rope_theta=10000.0,
                  rms_norm_eps=1e-6, sliding_window=None, attention_bias=False,
                  tie_word_embeddings=False, rope_style="rotate_half") | sizes
    vocab, positions, rows = config["vocab_size"], length - 1, batch * n_passes
    start, end = vocab - 2, vocab - 1
    ids = torch.randint(vocab - 3, (batch, length), generator=gen)
    sampled = torch.randint(vocab - 2, (n - 3, rows, length), generator=gen)
    cfg = StagedConfig(**{k: config[k] for k in StagedConfig.__dataclass_fields__})
    params = random_params(cfg, seed=seed)
    other = torch.ones(batch, n_talk - 1, dtype=torch.long)
    docs = torch.cat([torch.zeros_like(ids), other], 1)

    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "thought_tokens": sampled}
    shift = {0: 1} | dict.fromkeys(range(1, n), 1) | {n - 1 + k: 1 + k for k in range(n_talk)}
    for suffix, weight in ("1", 1.0), ("1e6", 1e6):
        out = staged_step(
            params, cfg, torch.cat([ids, other], 1), docs, n_ahead=n - 1, n_ahead_talk=n_talk,
            thoughts=sampled.permute(1, 2, 0).unflatten(0, (batch, n_passes))[:, :, :positions],
            n_passes=n_passes, policy_weight=weight, banned_ids={start, end},
            policy_valid=(torch.arange(positions) < positions - n_talk).expand(batch, positions))
        grads = torch.autograd.grad(out["loss"], params.values())
        for (name, p), grad in zip(params.items(), grads, strict=True):
            name = name.replace("mixing_head.", "talk_head.0.")
            if name in ("start_embedding", "end_embedding"):  # stored / 100 in row 0, row 1 unused
                p, grad = torch.stack([p / 100, p / 3]), torch.stack([grad * 100, grad * 0])
            tensors |= {f"weights.{name}": p.detach(), f"grad_beta{suffix}.{name}": grad}
        tensors |= {f"loss_beta{suffix}": out["loss"], "nll_loss": out["nll_loss"],
                    "dqn_loss": out["policy_loss"]}
    flat = {k: v.detach().flatten(0, 1) for k, v in out.items() if v.dim()}
    for s, by in shift.items():
        stage = (flat["nll_base"] if s == 0 else flat["nll_partial"][..., s - 1] if s < n - 1
                 else flat["nll_mixed"][..., s - n + 1])
        tensors[f"loss_stage_{s}"] = stage[:, :length - by]
    for k in range(n_talk):
        # where the official code wraps around
        wrapped = torch.full((rows, length), 7.0, dtype=torch.float64)
        wrapped[:, :positions - k] = flat["mix"][:, :positions - k, k]
        tensors |= {f"w_{n - 1 + k}": wrapped[..., None],
                    f"base_shift_ce_{k}": flat["nll_base"][:, k:positions]}
    for m in range(n - 3):
        tensors[f"action_ll_{m}"] = flat["thought_lp"][..., m]
    tensors["policy_reward"] = flat["reward"][:, :positions - n_talk]

    case = dict(case="made", n_ahead=n, n_ahead_talk=n_talk, n_passes=n_passes, batch=batch,
                seq_len=length, dtype="float64", pad_token_id=vocab - 3, start_token_id=start,
                end_token_id=end, config=config, hyper=dict(
                    embedding_scale=100, reinforce_temperature=3, original_loss_weight=0.5,
                    base_loss_beta=1, policy_loss_betas=[1.0, 1000000.0], gumbel_temperature=1,
                    remove_negative_rewards=True))
    path = folder / "made.json"
    path.write_text(json.dumps(case))
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()},
              path.with_suffix(".safetensors"))
    return path


def alter(case, folder, name, change):
    """A copy of the case in which one tensor is changed."""
    tensors = load_file(case.with_suffix(".safetensors"))
    tensors[name] = change(tensors[name])
    path = folder / "altered.json"
    path.write_text(case.read_text())
    save_file(tensors, path.with_suffix(".safetensors"))
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_official_values(case):
    assert worst(case) < 1e-9


def test_there_are_official_values():
    assert {"a4_t2_p2", "a8_t4_p2"} <= {case.stem for case in CASES}


@pytest.mark.parametrize(("n", "n_talk", "n_passes", "batch", "length", "sizes"), [
    (4, 1, 1, 1, 3, {}),  # the smallest the official code takes: one position has a policy loss
    (4, 1, 2, 2, 19, {}),
    (5, 3, 1, 3, 8, dict(num_key_value_heads=1, num_hidden_layers=1)),
    (12, 4, 2, 2, 9, dict(vocab_size=29, hidden_size=20, head_dim=10, num_attention_heads=3,
                          num_key_value_heads=3)),
    (6, 2, 3, 2, 10, dict(attention_bias=True, rms_norm_eps=1e-5, rope_theta=1e6)),
    (7, 2, 2, 2, 7, dict(tie_word_embeddings=True)),
], ids=lambda x: "" if isinstance(x, dict) else str(x))
def test_other_shapes_in_the_same_format(tmp_path, n, n_talk, n_passes, batch, length, sizes):
    assert worst(write_case(tmp_path, n, n_talk, n_passes, batch, length, **sizes)) < 1e-9


def test_stand_in_cases_have_the_format_of_the_official_ones(tmp_path):
    """Every tensor that golden.py reads has the official name and shape."""
    official = load_file(TESTS / "golden" / "a8_t4_p2.safetensors")
    case = json.loads((TESTS / "golden" / "a8_t4_p2.json").read_text())
    path = write_case(tmp_path, 8, 4, 2, case["batch"], case["seq_len"], **case["config"])
    made = load_file(path.with_suffix(".safetensors"))
    assert {k: v.shape for k, v in made.items()} == {k: official[k].shape for k in made}


@pytest.mark.parametrize("name", [
    "loss_beta1", "loss_beta1e6", "nll_loss", "dqn_loss", "loss_stage_0", "loss_stage_4", "w_3",
    "policy_reward", "action_ll_0", "base_shift_ce_1", "grad_beta1e6.start_embedding",
    "grad_beta1.talk_head.0.0.bias", "weights.model.layers.1.self_attn.k_proj.weight"])
def test_every_altered_tensor_is_noticed(tmp_path, name):
    def nudge(x):
        x.view(-1)[0] += 1e-7 * x.abs().max()
        return x
    assert worst(alter(CASES[0], tmp_path, name, nudge)) > 1e-9


def test_nan_fails(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        golden.main([alter(CASES[0], tmp_path, "action_ll_0", lambda x: x * float("nan"))])
    assert exit_.value.code and "worse than" in capsys.readouterr().out


def run(*paths):
    env = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    return subprocess.run([sys.executable, "tests/golden.py", *map(str, paths)], cwd=TESTS.parent,
                          env=env, capture_output=True, text=True)


def test_the_command(tmp_path):
    """0 and every quantity's error when all is well; not 0 when one case is off in one tensor."""
    good = run(*CASES)
    assert good.returncode == 0, good.stderr
    assert "all within 1e-09" in good.stdout and all(what in good.stdout for what in WHAT)
    altered = alter(CASES[0], tmp_path, "grad_beta1.lm_head.weight", lambda x: x * (1 + 1e-8))
    bad = run(altered, CASES[1])
    assert bad.returncode == 1 and "worse than 1e-09" in bad.stdout


def rope_one_too_far(monkeypatch):
    right = thoughts.Packing.rope_positions
    monkeypatch.setattr(
        thoughts.Packing, "rope_positions",
        lambda self, device=None: right(self, device) + (self.describe(device)[2] >= 0))


def other_passes_seen(monkeypatch):
    right = thoughts.visible
    monkeypatch.setattr(attention, "visible", lambda q, k: right((q[0], k[1], *q[2:]), k))


def own_token_last_seen(monkeypatch):
    right = thoughts.visible
    monkeypatch.setattr(attention, "visible",
                        lambda q, k: right(q, k) & ~((k[2] > 0) & (k[2] == q[2] - 1)))


def leave_one_out(monkeypatch):
    right = objective.advantage
    monkeypatch.setattr(objective, "advantage", lambda reward, *args: right(reward, *args) * 2)


def lookahead_one_too_far(monkeypatch):
    right = thoughts.ThoughtLayout.pack

    def pack(self, text, sampled):
        ids, is_start, is_end = right(self, text, sampled)
        # a view: x_{i+2} where x_{i+1} belongs
        self.packing.split(ids)[2][..., -1] = text[:, None, 2:]
        return ids, is_start, is_end
    monkeypatch.setattr(thoughts.ThoughtLayout, "pack", pack)


@pytest.mark.parametrize("mistake", [
    rope_one_too_far, other_passes_seen, own_token_last_seen, leave_one_out,
    lookahead_one_too_far], ids=lambda f: f.__name__)
def test_a_mistake_in_the_code_is_noticed(monkeypatch, mistake):
    mistake(monkeypatch)
    assert worst(CASES[0]) > 1e-6
