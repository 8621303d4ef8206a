"""python tests/golden.py CASE.json [...]: our modules in float64 against official values.

A case is NAME.json beside NAME.safetensors (weights under official Mistral names, inputs, the
thoughts that were sampled, losses, rewards, log-likelihoods, every gradient). Prints the worst
relative error of each kind of tensor, max|a-b| / max|b| (absolute where the reference is all zero),
and exits 1 if any exceeds 1e-9.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from nanoqstar.head import weighted_log_probs
from nanoqstar.objective import Objective, Valid, quiet_star_loss
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.weights import from_official

BOUND = 1e-9


def relative_error(ours, reference):
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    error = (ours - reference).abs().max().item() / (reference.abs().max().item() or 1.0)
    return error if error == error else float("inf")  # NaN is no agreement


def check(path, wrap=lambda model: None):
    """{what: worst relative error} of one case; both policy weights. wrap: done to the model."""
    case = json.loads(Path(path).read_text())
    t = load_file(Path(path).with_suffix(".safetensors"))
    n, n_talk, n_passes, hyper = (case[k] for k in ("n_ahead", "n_ahead_talk", "n_passes", "hyper"))
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps",
            "attention_bias", "tie_word_embeddings")
    config = Qwen2Config(**{k: case["config"][k] for k in keys}, max_position_embeddings=4096)
    banned = torch.zeros(config.vocab_size, dtype=torch.bool)
    banned[[case["start_token_id"], case["end_token_id"]]] = True
    model = QuietStar(Qwen2(config), banned=banned).double()
    weights = {name[len("weights."):]: x for name, x in t.items() if name.startswith("weights.")}
    lm, added = from_official(weights, scale=hyper["embedding_scale"])
    model.lm.load_state_dict(lm)
    model.load_state_dict(added, strict=False)
    ours = dict(model.named_parameters())
    wrap(model)

    # texts are unpadded: T = L-1 positions think; A-1 tokens of another document fill up the window
    ids = t["input_ids"].long()
    batch, length = ids.shape
    text = torch.cat((ids, ids[:, :n_talk - 1]), dim=1)
    docs = (torch.arange(text.shape[1]) >= length).long().expand(batch, -1)
    thoughts = t["thought_tokens"].long().unflatten(1, (batch, n_passes)).movedim(0, -1)
    thoughts = thoughts[:, :, :length - 1]
    valid = Valid.from_docs(docs, n_talk)
    # drops one more: SEMANTICS E21
    valid.policy = (torch.arange(length - 1) < length - 1 - n_talk).expand(batch, -1)

    errors = {}

    def compare(what, ours, reference):
        errors[what] = max(errors.get(what, 0.0), relative_error(ours, reference))

    for weight, suffix in zip(hyper["policy_loss_betas"], ("1", "1e6"), strict=True):
        model.zero_grad()
        states = model.score(text, docs, thoughts)
        objective = Objective(
            policy_weight=weight, clamp_advantage=hyper["remove_negative_rewards"],
            reinforce_temperature=hyper["reinforce_temperature"])
        loss, stats, outcome = quiet_star_loss(states, model.lm.head_weight, text, thoughts, valid,
                                               valid.counts(), objective, banned)
        loss.backward()
        compare("total loss", loss.detach(), t[f"loss_beta{suffix}"])
        compare("nll", 0.5 * (stats["nll_base"] + stats["nll_talk"]), t["nll_loss"])
        compare("policy loss", stats["policy"], t["dqn_loss"])
        base = -outcome.base_lp[:, None, :length - 1].expand(-1, n_passes, -1).flatten(0, 1)
        compare("base losses", base, t["loss_stage_0"])
        for k in range(n_talk):
            rows = slice(0, length - 1 - k)
            compare("mixed losses", -outcome.mixed_lp[:, :, rows, k].flatten(0, 1),
                    t[f"loss_stage_{n - 1 + k}"])
            compare("mixing weights", states.mix[:, :, rows, k].detach().flatten(0, 1),
                    t[f"w_{n - 1 + k}"][:, rows, 0])
            compare("base losses", base[:, k:], t[f"base_shift_ce_{k}"])
        compare("rewards", outcome.reward[:, :, :length - 1 - n_talk].flatten(0, 1),
                t["policy_reward"])
        rows = states.thought.detach().flatten(0, 3)
        _, log_probs = weighted_log_probs(rows, model.lm.head_weight.detach(), thoughts.flatten(),
                                          rows[:, 0] * 0, hyper["reinforce_temperature"], banned)
        log_probs = log_probs.view(thoughts.shape).flatten(0, 1)
        for m in range(n - 3):
            compare("log-likelihoods", log_probs[..., m], t[f"action_ll_{m}"])
        official = {k.split(".", 1)[1]: x for k, x in t.items()
                    if k.startswith(f"grad_beta{suffix}.")}
        gradients, added = from_official(official, scale=1 / hyper["embedding_scale"])
        reference = {**{f"lm.{k}": x for k, x in gradients.items()}, **added}
        assert ours.keys() == reference.keys(), ours.keys() ^ reference.keys()
        for name, x in reference.items():
            compare("gradients", ours[name].grad, x)
    return errors


def main(paths):
    if not paths or str(paths[0]).startswith("-"):
        sys.exit("usage: python tests/golden.py CASE.json [...]")
    failed = False
    for path in paths:
        errors = check(path)
        failed |= any(e > BOUND for e in errors.values())
        lines = (f"  {what:16} {error:.1e}" for what, error in errors.items())
        print(Path(path).stem, *lines, sep="\n")
    print(f"worse than {BOUND}" if failed else f"all within {BOUND}")
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
