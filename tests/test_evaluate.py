"""Scores of a text against one naive forward per position; means, errors and table by hand."""

import json
import math
import re

import pytest
import torch
from torch import nn

from nanoqstar import InputError
from nanoqstar.attention import dense
from nanoqstar.evaluate import (
    TextScores,
    example,
    line,
    score_text,
    shown,
    standard_error,
    summarize,
    table,
)
from nanoqstar.head import weighted_log_probs

A, T, K = 3, 14, 5
CHOICES = (3, 5, 11, 20, 41)


@pytest.fixture
def windows(make_text):
    """Five windows of 1 to 5 documents."""
    return make_text(5, T + A)


@pytest.fixture
def model(make_model):
    return make_model(thought_temperature=1.3)


# ---- scores


def naive(model, text, docs, thoughts):
    """The same fields, by a plain causal forward over each position's own sequence."""
    def hidden(vectors, first):
        n = len(vectors)
        causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        return model.lm(vectors[None], first + torch.arange(n), dense(causal))[0]

    def log_probs(states):
        return (states @ model.lm.head_weight.T).log_softmax(-1)

    fields = {name: torch.zeros(len(text), T, dtype=torch.float64)
              for name in ("base_lp", "mixed_lp", "reward", "mix")}
    fields |= {name: torch.zeros(len(text), T, dtype=torch.bool) for name in ("valid", "whole")}
    fields |= {name: torch.zeros(len(text), T, dtype=torch.long)
               for name in ("base_choice", "mixed_choice")}
    fields["sampled_lp"] = torch.zeros(thoughts.shape, dtype=torch.float64)
    choices = torch.tensor(CHOICES)
    for n, (x, doc) in enumerate(zip(text, docs)):
        firsts = [int((doc == doc[i]).nonzero()[0]) for i in range(T + A)]
        base = torch.stack([hidden(model.lm.embed(x[firsts[i]:i + 1]), firsts[i])[-1]
                            for i in range(T + A - 1)])
        for i in range(T):
            parts = (model.lm.embed(x[firsts[i]:i + 1]), model.start_embedding[None],
                     model.lm.embed(thoughts[n, i]), model.end_embedding[None],
                     model.lm.embed(x[i + 1:i + A]))
            own = hidden(torch.cat(parts), firsts[i])[-(K + A - 1):]
            talk, ahead = own[-A:], base[i:i + A]
            w = nn.Sequential(*model.mixing_head)(torch.cat((ahead, talk), -1))
            mixed, target = (1 - w) * ahead + w * talk, x[i + 1:i + 1 + A, None]
            base_lp, mixed_lp = (log_probs(h).gather(-1, target)[:, 0] for h in (ahead, mixed))
            policy = (own[:K - 2] @ model.lm.head_weight.T).masked_fill(model.banned, -torch.inf)
            fields["sampled_lp"][n, i] = (policy / 1.3).log_softmax(-1).gather(
                -1, thoughts[n, i, :, None])[:, 0]
            fields["base_lp"][n, i], fields["mixed_lp"][n, i] = base_lp[0], mixed_lp[0]
            fields["reward"][n, i], fields["mix"][n, i] = (mixed_lp - base_lp).sum(), w[0, 0]
            fields["valid"][n, i] = doc[i + 1] == doc[i]
            fields["whole"][n, i] = all(doc[i + 1 + j] == doc[i] for j in range(A))
            for name, h in (("base_choice", ahead), ("mixed_choice", mixed)):
                fields[name][n, i] = choices[log_probs(h[0])[choices].argmax()]
    return fields


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [2, 5])
def test_scores_are_those_of_a_naive_forward(model, windows, batch_size):
    text, docs = windows
    scores = score_text(model, text, docs, K, A, seed=3, batch_size=batch_size, choices=CHOICES)
    assert torch.equal(scores.text, text)
    assert scores.thoughts.shape == (5, T, K - 2)
    expected = naive(model, text, docs, scores.thoughts)
    assert {"text", "thoughts", *expected} == TextScores.__dataclass_fields__.keys()
    for name, x in expected.items():
        ours = getattr(scores, name)
        if x.dtype == torch.float64:
            torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9, msg=name)
        else:
            assert torch.equal(ours, x), name
    assert 0 < scores.whole.sum() < scores.valid.sum() < 5 * T
    assert (scores.base_choice != scores.mixed_choice).any()


def test_batches_change_nothing_and_the_seed_changes_the_thoughts(model, windows):
    whole, cut = (score_text(model, *windows, K, A, batch_size=n) for n in (5, 2))
    for name in TextScores.__dataclass_fields__:
        torch.testing.assert_close(getattr(whole, name), getattr(cut, name), rtol=1e-9, atol=1e-9)
    assert not whole.base_choice.any()
    assert not whole.mixed_choice.any()
    assert not torch.equal(score_text(model, *windows, K, A, seed=1).thoughts, whole.thoughts)


def test_thoughts_come_from_the_sampler(model, windows, make_thoughts):
    thoughts = make_thoughts(5, 1, T, K - 2)
    scores = score_text(model, *windows, K, A, sampler=lambda *_: (thoughts, -thoughts / 7))
    assert torch.equal(scores.thoughts, thoughts[:, 0])
    assert torch.equal(scores.sampled_lp, -thoughts[:, 0] / 7)


def test_without_thoughts_both_columns_are_the_base(model, windows):
    scores = score_text(model, *windows, 0, A, batch_size=2, choices=CHOICES)
    with_thoughts = score_text(model, *windows, K, A, choices=CHOICES)
    torch.testing.assert_close(scores.base_lp, with_thoughts.base_lp, rtol=1e-9, atol=1e-9)
    assert torch.equal(scores.mixed_lp, scores.base_lp)
    assert not scores.reward.any()
    assert torch.equal(scores.base_choice, with_thoughts.base_choice)
    assert torch.equal(scores.mixed_choice, scores.base_choice)
    assert scores.thoughts.shape == (5, T, 0)
    assert summarize(scores).keys() == {
        "nll_base", "nll_mixed", "gain"}


def test_a_mixing_weight_of_zero_gains_exactly_nothing(model, windows, monkeypatch):
    """However products are rounded: here, otherwise in every row."""
    def rounded(hidden, weight, targets, *rest, **options):
        total, lp = weighted_log_probs(hidden, weight, targets, *rest, **options)
        return total, lp + torch.arange(len(lp)) * 1e-7

    monkeypatch.setattr("nanoqstar.evaluate.weighted_log_probs", rounded)
    with torch.no_grad():
        model.mixing_head[4].weight.zero_()
    scores = score_text(model, *windows, K, A)
    assert not scores.mix.any()
    assert not scores.reward.any()
    assert torch.equal(scores.base_lp, scores.mixed_lp)


def test_small_gains_survive_bf16(make_model, windows, make_thoughts):
    """At mixing weights of about 1e-4, where rounding a mixed state to bf16 would leave noise."""
    model, thoughts = make_model(), make_thoughts(5, 1, T, K - 2)
    sampler = lambda *_: (thoughts, -thoughts / 7)  # noqa: E731
    with torch.no_grad():
        model.mixing_head[4].weight.mul_(1e-4)
    exact = score_text(model, *windows, K, A, sampler=sampler)
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_text(model.float(), *windows, K, A, sampler=sampler)
    assert exact.mix.abs().mean() < 1e-3
    for name in ("reward", "base_lp"):
        both = torch.stack([getattr(s, name).double().flatten() for s in (exact, scores)])
        assert both.corrcoef()[0, 1] > 0.98, name


# ---- means


def scores_of(base_nll, gain, valid, mix=None, reward=None, whole=None):
    """TextScores with these (n, T) values and thoughts of which every second one is new."""
    n, t = gain.shape
    thoughts = torch.arange(n * t).div(2, rounding_mode="floor").view(n, t, 1).expand(n, t, 2)
    zeros = torch.zeros(n, t, dtype=torch.long)
    return TextScores(
        text=torch.zeros(n, t + A, dtype=torch.long), valid=valid,
        whole=valid if whole is None else whole, base_lp=-base_nll, mixed_lp=gain - base_nll,
        reward=gain if reward is None else reward, mix=gain if mix is None else mix,
        thoughts=thoughts, sampled_lp=-torch.arange(n * t).double().view(n, t, 1).expand(n, t, 2),
        base_choice=zeros, mixed_choice=zeros)


@pytest.fixture
def made_up():
    """Six windows with 0 to 9 valid positions of 12; what is not valid is absurd."""
    generator = torch.Generator().manual_seed(0)
    base, gain, mix, reward = torch.rand(4, 6, 12, generator=generator, dtype=torch.float64)
    gain += 0.3 * torch.arange(6)[:, None]  # windows differ
    valid = torch.zeros(6, 12, dtype=torch.bool)
    for n, count in enumerate((9, 0, 3, 7, 1, 6)):
        valid[n, torch.randperm(12, generator=generator)[:count]] = True
    whole = valid & (torch.rand(6, 12, generator=generator) < 0.7)
    for x, good in ((base, valid), (gain, valid), (mix, valid), (reward, whole)):
        x[~good] = 1e6
    return scores_of(base, gain, valid, mix, reward, whole)


def listed(scores):
    """[(window, base NLL, mixed NLL, mix, surprise)] of the valid positions, as numbers."""
    return [(n, -scores.base_lp[n, i].item(), -scores.mixed_lp[n, i].item(),
             scores.mix[n, i].item(), -scores.sampled_lp[n, i, 0].item())
            for n, i in scores.valid.nonzero().tolist()]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_means_are_over_valid_positions(made_up):
    summary, rows = summarize(made_up), listed(made_up)
    assert len(rows) == 26
    assert summary["nll_base"] == pytest.approx(mean(r[1] for r in rows))
    assert summary["nll_mixed"] == pytest.approx(mean(r[2] for r in rows))
    assert summary["gain"] == pytest.approx(mean(r[1] - r[2] for r in rows))
    assert summary["mix"] == pytest.approx(mean(r[3] for r in rows))
    assert summary["entropy"] == pytest.approx(mean(r[4] for r in rows))
    assert summary["reward"] == pytest.approx(made_up.reward[made_up.whole].mean().item())
    places = [12 * n + i for n, i in made_up.valid.nonzero().tolist()]
    assert summary["distinct"] == len({p // 2 for p in places}) / 26


def test_deciles_go_from_easy_to_hard(made_up):
    rows = sorted(listed(made_up), key=lambda r: r[1])
    sizes = [3] * 6 + [2] * 4  # of 26
    expected = []
    for size in sizes:
        expected.append(mean(r[1] - r[2] for r in rows[:size]))
        rows = rows[size:]
    summary = summarize(made_up)
    assert summary["gain_by_decile"] == pytest.approx(expected)
    assert summary["gain_hardest"] == pytest.approx(expected[-1])
    assert abs(expected[0] - expected[-1]) > 0.05


def test_the_standard_error_is_clustered_by_window(made_up):
    """sqrt(W/(W-1) * sum_w (sum_i (g_i - mean))^2) / N, over windows with a valid position."""
    rows = listed(made_up)
    centre = mean(r[1] - r[2] for r in rows)
    sums = [sum(r[1] - r[2] - centre for r in rows if r[0] == n) for n in {r[0] for r in rows}]
    assert len(sums) == 5
    expected = (5 / 4 * sum(s * s for s in sums)) ** 0.5 / 26
    assert summarize(made_up)["gain_stderr"] == pytest.approx(expected, rel=1e-9)


def test_tokens_that_agree_within_a_window_count_once():
    """Equal gains in a window: the error is that of the windows' values, not of 4,000 tokens."""
    values = torch.randn(20, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    valid = torch.ones(20, 200, dtype=torch.bool)
    scores = scores_of(torch.ones(20, 200).double(), values.expand(20, 200), valid)
    error = summarize(scores)["gain_stderr"]
    assert error == pytest.approx(values.std().item() / 20**0.5, rel=1e-9)
    assert error > 10 * values.expand(20, 200).std().item() / 4000**0.5
    one_each = standard_error(values[:, 0], torch.arange(20))  # a token a window: the textbook's
    assert one_each == pytest.approx(values.std().item() / 20**0.5, rel=1e-9)


def test_one_window_has_no_standard_error():
    scores = scores_of(torch.ones(1, 30), torch.rand(1, 30), torch.ones(1, 30, dtype=torch.bool))
    summary = summarize(scores)
    assert summary["gain_stderr"] is None
    assert json.loads(json.dumps(summary)) == summary
    assert "+-" not in table(summary, True)
    assert "mean gain +" in table(summary, True)


def test_few_tokens_and_no_whole_lookahead():
    valid = torch.tensor([[True, True, False], [True, False, False]])
    gain = torch.tensor([[1.0, 2.0, 50.0], [6.0, 50.0, 50.0]])
    summary = summarize(scores_of(torch.ones(2, 3), gain, valid, whole=torch.zeros_like(valid)))
    assert summary["gain_by_decile"] == [3.0]
    assert summary["gain_hardest"] == 3.0
    assert summary["reward"] == 0.0  # an empty mean


def test_nothing_to_score_is_an_input_error():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(InputError, match="no two tokens of one document"):
        summarize(scores_of(torch.ones(2, 3), torch.ones(2, 3), nothing))


# ---- what is said


SUMMARY = {"nll_base": 1.25, "nll_mixed": 1.0625, "gain": 0.1875, "gain_stderr": 0.0125,
           "gain_by_decile": [k / 100 for k in range(-2, 8)]}


def cells(line):
    return re.split(r"\s{2,}", line.strip())


def test_table_by_hand():
    lines = table(SUMMARY, True, [("answers right", "8.0%", "99.0%")], ["a remark"]).splitlines()
    assert lines[0] == ""
    assert lines[1].split() == ["base", "thoughts"]
    assert cells(lines[2]) == ["answers right", "8.0%", "99.0%"]
    assert cells(lines[3]) == ["all tokens, NLL", "1.2500", "1.0625"]
    assert len({len(line) for line in lines[1:4]}) == 1  # columns stand below one another
    assert lines[4:] == [
        "a remark",
        "gain by decile of base NLL (easy to hard): "
        "-0.020 -0.010 +0.000 +0.010 +0.020 +0.030 +0.040 +0.050 +0.060 +0.070",
        "mean gain +0.1875 +- 0.0250 (2 standard errors, by window) nats a token"]


def test_table_without_thoughts_has_one_column():
    plain = {k: SUMMARY[k] for k in ("nll_base", "nll_mixed", "gain")}
    lines = table(plain, False, [("answers right", "8.0%", "8.0%")], ["a remark"]).splitlines()
    assert [cells(line) for line in lines[1:]] == [
        ["base"], ["answers right", "8.0%"], ["all tokens, NLL", "1.2500"]]


def test_a_long_label_widens_the_table():
    lines = table(SUMMARY, True, [("x" * 60, "1.0%", "2.0%")]).splitlines()
    assert lines[2] == "x" * 60 + "       1.0%      2.0%"
    assert lines[3].endswith("    1.2500    1.0625")
    assert len(lines[3]) == len(lines[2])


def test_an_evaluation_in_a_line():
    summary = SUMMARY | {"gain_hardest": 0.07}
    assert line(40, summary, True) == (
        "eval at 40: nll 1.250 -> 1.062 with thoughts, gain +0.1875 (hardest tenth +0.070)")
    assert line(40, {"nll_base": 1.25, "nll_mixed": 1.25}, False) == "eval at 40: nll 1.250"


def test_a_thought_is_shown_with_what_it_did():
    """Position 20 of the second window: 16 characters up to it, its thought, the token after."""
    class Letters:
        def decode(self, ids, skip_special_tokens):
            return "".join(chr(97 + i) for i in ids)

    half = torch.full((2, 24), 0.5).log()
    scores = scores_of(-half, torch.zeros(2, 24), half < 0)
    scores.text = torch.stack((torch.zeros(26, dtype=torch.long), torch.arange(26)))
    scores.base_lp, scores.mixed_lp = half.clone(), half.clone()
    scores.base_lp[1, 20], scores.mixed_lp[1, 20] = math.log(0.25), math.log(0.75)
    scores.thoughts = torch.zeros(2, 24, 2, dtype=torch.long)
    scores.thoughts[1, 20] = torch.tensor([3, 4])
    assert shown(scores, Letters(), 1, 20).strip() == (
        "'fghijklmnopqrstu' thinks 'de', then 'v': p 0.25 -> 0.75")
    assert example(scores, Letters(), 1, 20) == {
        "context": "fghijklmnopqrstu", "thought": "de", "target": "v",
        "p_base": pytest.approx(0.25), "p_mixed": pytest.approx(0.75)}
