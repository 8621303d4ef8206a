"""The search for delimiters: what it measures is what evaluation measures; its command."""

import hashlib
import json
import math
import shutil

import torch
from tokenizers import Tokenizer

from data import fold
from nanoqstar import delimiters, experiments
from nanoqstar.dataset import TokenDataset
from nanoqstar.evaluate import score_text, standard_error, summarize
from nanoqstar.objective import Valid
from nanoqstar.quietstar import uniforms

T, K = 9, 4


def test_gains_are_those_of_an_evaluation(make_model, make_text):
    """The last pair's, whose delimiters and head the model still has; with one pass and two."""
    model, train, val = make_model(), make_text(6, T + 1), make_text(5, T + 1, seed=3)
    *_, (outcome) = delimiters.search(model, train, val, [5, 9], K, 1, 0, batch_size=4)
    assert outcome.choice == (9, 9)
    assert torch.equal(model.end_embedding, model.lm.model.embed_tokens.weight[9])
    scores = score_text(model, *val, K, 1, seed=1)
    summary = summarize(scores)
    assert abs(outcome.gain - summary["gain"]) < 1e-9 and abs(outcome.gain) > 1e-4
    assert abs(outcome.stderr - summary["gain_stderr"]) < 1e-9

    *_, (outcome) = delimiters.search(model, train, val, [5, 9], K, 2, 0, batch_size=4)
    u = uniforms(1, "eval", 0, range(5), (2, T, K - 2))
    gains = torch.stack([  # a pass at a time
        (s.mixed_lp - s.base_lp) for p in range(2)
        for s in [score_text(model, *val, K, 1, sampler=lambda x, d, _, p=p: model.rollout(
            x, d, u[:, p:p + 1]))]])
    valid = Valid.from_docs(val[1], 1).base
    spread = (gains[0] - gains[1])[valid].square().mean().sqrt() / 2
    assert abs(outcome.spread - spread) < 1e-9 and spread > 1e-4
    mean = gains.mean(0)[valid]
    assert abs(outcome.gain - mean.mean()) < 1e-9
    assert abs(outcome.stderr - standard_error(mean, valid.nonzero()[:, 0])) < 1e-9


def test_a_head_is_fresh_for_every_pair_and_nothing_else_learns(make_model, make_text):
    model, train, val = make_model(), make_text(6, T + 1), make_text(5, T + 1, seed=3)
    before = {n: p.clone() for n, p in model.named_parameters() if n.startswith("lm.")}
    alone = list(delimiters.search(model, train, val, [9], K, 2, 0, batch_size=3))
    among = list(delimiters.search(model, train, val, [5, 9], K, 2, 0, batch_size=6))
    assert [x.choice for x in among] == [(5, 5), (5, 9), (9, 5), (9, 9)]
    for name in ("gain", "stderr", "spread"):
        assert math.isclose(getattr(alone[0], name), getattr(among[3], name), rel_tol=1e-9)
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in before.items())


def test_lengths_are_judged_as_pairs_are(make_model, make_text):
    """The last length's gain is an evaluation's; each length's does not depend on those before."""
    model, train, val = make_model(), make_text(6, T + 1), make_text(5, T + 1, seed=3)
    outcomes = list(delimiters.lengths(model, train, val, K, 1, 0, batch_size=4))
    assert [x.choice for x in outcomes] == [(3,), (4,)] and model.reread
    assert not model.start_embedding.any() and not model.end_embedding.any()
    gain = summarize(score_text(model, *val, K, 1, seed=1))["gain"]
    assert abs(outcomes[1].gain - gain) < 1e-9 and abs(gain) > 1e-4
    model = make_model()
    alone = [*delimiters.lengths(model, train, val, 3, 1, 0, batch_size=6)]
    assert math.isclose(alone[0].gain, outcomes[0].gain, rel_tol=1e-9)
    assert alone[0].gain != outcomes[1].gain


def test_heads_learn_to_trust_what_helps(make_model):
    """Talk states that name the target, beside base states that do not."""
    model, generator = make_model(), torch.Generator().manual_seed(0)
    model.init_thoughts([1], [2])
    targets = torch.randint(61, (900,), generator=generator)
    base = torch.randn(900, 24, generator=generator, dtype=torch.float64)
    talk = 9 * model.lm.head_weight[targets].detach()
    delimiters.fit(model, base, talk, targets, 0)
    with torch.no_grad():
        assert model.mixing_head(model.mixing_head.base_half(base), talk).mean() > 0.3


def test_the_most_frequent_marks():
    tokenizer = Tokenizer.from_str(fold.tokenizer_json(fold.vocabulary()))
    data = object.__new__(TokenDataset)
    text = torch.tensor([tokenizer.encode("ab=a\nfg=(fg)a\nef=b\n").ids])
    data.n_tokens, data.windows = text.shape[1], lambda starts, n: (text, None)
    for n, marks in ((2, "\n="), (9, "\n=()")):
        found = [tokenizer.decode([i]) for i in delimiters.frequent_marks(data, tokenizer, n)]
        assert set(found) == set(marks) and set(found[:2]) == set("\n=")


def test_command(tmp_path, capsys):
    """A table of all pairs, the best first; bad input in a sentence."""
    from test_train import start

    run = tmp_path / "run"
    assert start(run) == 0
    capsys.readouterr()
    args = ["delimiters", "--model_path", str(run), "--data", str(run / "data"), "--n_ahead", "4",
            "--windows", "4", "--max_length", "12"]
    assert experiments.main([*args, "--candidates", "(\\n("]) == 0
    head, _, *table = capsys.readouterr().out.splitlines()
    assert head.startswith("| start | end | gain") and len(table) == 4
    assert {tuple(row.split(" | ")[:2]) for row in table} == {
        (f"| `{a!r}`", f"`{b!r}`") for a in "(\n" for b in "(\n"}
    gains = [float(row.split(" | ")[2].split()[0]) for row in table]
    assert gains == sorted(gains, reverse=True)
    assert experiments.main([*args, "--candidates", "z"]) == 2
    assert "candidates: the tokenizer cannot encode 'z'" in capsys.readouterr().err
    assert experiments.main([*args, "--max_length", "2045"]) == 2
    assert "more than the model's context" in capsys.readouterr().err
    other = shutil.copytree(run / "data", tmp_path / "other")
    words = (other / "tokenizer.json").read_text().replace('"a"', '"z"')
    (other / "tokenizer.json").write_text(words)
    meta = json.loads((other / "meta.json").read_text())
    meta["tokenizer_sha256"] = hashlib.sha256(words.encode()).hexdigest()
    (other / "meta.json").write_text(json.dumps(meta))
    assert experiments.main([*args, "--data", str(other)]) == 2
    assert "is not the model's: prepare the data" in capsys.readouterr().err
    assert experiments.main(args) == 0  # = ( ) and newline
    assert len(capsys.readouterr().out.splitlines()) == 2 + 16
    assert experiments.main([*args, "--reread"]) == 0
    head, rule, *table = capsys.readouterr().out.splitlines()
    assert head.startswith("| n_ahead | gain") and head.count("|") == rule.count("|") == 4
    assert {row.split(" | ")[0] for row in table} == {"| 3", "| 4"}
    assert experiments.main([*args, "--reread", "--candidates", "z"]) == 2
    assert "candidates" in capsys.readouterr().err
    assert experiments.main(args[:3]) == 2
    assert "data must be given" in capsys.readouterr().err
