"""Interventions on a run's thoughts: by hand where they are scripted, plain text where they are
the model's own."""

import json

import pytest
import torch

import train
from data import fold
from nanoqstar import hf, interventions
from nanoqstar.dataset import TokenDataset
from nanoqstar.evaluate import score_text

LETTERS, K, S = len(fold.LETTERS), 6, 4


def ids_of(text):
    return fold.encode(text, fold.vocabulary()).tolist()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run."""
    folder = tmp_path_factory.mktemp("run") / "r"
    assert train.main(["tiny", "--out_dir", str(folder), "--fold_tokens", "20000", "--max_steps",
                       "1", "--pretrain_steps", "3", "--eval_windows", "6", "--batch_size", "2",
                       "--hidden_size", "24", "--intermediate_size", "32", "--threads", "1"]) == 0
    return folder


def test_one_token_at_a_time_becomes_another_letter():
    thoughts = torch.tensor([ids_of("abcd"), ids_of("gg)="), ids_of("aaaa")])
    others = list(interventions.corrupted(thoughts, LETTERS, seed=0))
    assert len(others) == S
    for k, other in enumerate(others):
        assert (other[:, k] != thoughts[:, k]).all() and (other[:, k] < LETTERS).all()
        kept = torch.arange(S) != k
        assert torch.equal(other[:, kept], thoughts[:, kept])
    many = torch.zeros(600, S, dtype=torch.long)
    for k, other in enumerate(interventions.corrupted(many, LETTERS, seed=1)):
        assert (other[:, k].bincount(minlength=LETTERS)[1:] > 60).all()  # of 100 on average


def test_replayed_thoughts_score_as_their_own(run):
    """Over batches that do not divide the windows."""
    model, *_ = hf.load_thinker(run)
    text, docs = TokenDataset(run / "data", "val").evenly(5, 64)
    own = score_text(model, text, docs, K, 2, seed=3, batch_size=2, choices=range(LETTERS))
    again = score_text(model, text, docs, K, 2, seed=9, batch_size=2, choices=range(LETTERS),
                       sampler=interventions.replay(own.thoughts))
    assert torch.equal(again.thoughts, own.thoughts)
    assert torch.equal(again.mixed_lp, own.mixed_lp)


def test_asides_are_plain_text(run):
    """What the model says after each is what one forward over the whole text says; and it writes
    them as often as its own probabilities say."""
    base, *_ = hf.load_thinker(run / "base")
    prompts = [ids_of("\nabcd="), ids_of("f\ngg="), ids_of("\naaaa=a\ngfed=")]
    marks, written = ids_of("()"), []
    generate = interventions.generate

    def spy(model, prompts, *args, **options):
        written.append(prompts)
        return generate(model, prompts, *args, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interventions, "generate", spy)
        after = interventions.write_out(base, prompts, *marks, S, LETTERS, 200, seed=0)
    assert after.shape == (200, len(prompts), LETTERS)
    firsts = torch.zeros(len(prompts), len(fold.vocabulary()))
    for vote, closed in enumerate(written[1::2]):
        for n, (prompt, whole) in enumerate(zip(prompts, closed, strict=True)):
            assert whole[:len(prompt) + 1] == [*prompt, marks[0]] and whole[-1] == marks[1]
            assert len(whole) == len(prompt) + S + 2
            firsts[n, whole[len(prompt) + 1]] += 1 / 200
            if vote < 5:
                text = torch.tensor([whole])
                hidden = base.text_states(text, torch.zeros_like(text))
                expected = (hidden[0, -1] @ base.lm.head_weight.T).softmax(-1)[:LETTERS]
                torch.testing.assert_close(after[vote, n], expected, rtol=1e-5, atol=1e-6)
    for n, prompt in enumerate(prompts):
        text = torch.tensor([[*prompt, marks[0]]])
        hidden = base.text_states(text, torch.zeros_like(text))
        expected = (hidden[0, -1] @ base.lm.head_weight.T).softmax(-1)
        assert (firsts[n] - expected).abs().max() < 0.15  # 4 standard errors of 200 draws
    assert firsts.max() < 0.9


def scripted(monkeypatch, choose, think=lambda steps: steps):
    """score_text's choices are choose(text, thought, i, choices) at every position i of a window
    with thoughts, and the base's are 0; own thoughts are think(the right steps)."""
    def score(model, text, docs, n_ahead, n_talk, *, seed, sampler, choices):
        n, t = len(text), text.shape[1] - n_talk
        thoughts = torch.full((n, t, S), 8)
        for w, ids in enumerate(text.tolist()):
            for style, answer, problem in fold.find_answers(fold.decode(ids, 1)):
                if answer <= t and style == "direct":
                    steps = fold.solve(problem, fold.latin_squares(0))
                    thoughts[w, answer - 1] = torch.tensor(ids_of(think(steps)))
        if sampler is not None:
            thoughts = sampler(text, docs, torch.zeros(n, 1, t, S))[0][:, 0]
        zero = torch.zeros(n, t, dtype=torch.long)
        mixed = torch.tensor([[choose(ids, thought, i, len(choices))
                               for i, thought in enumerate(row)]
                              for ids, row in zip(text.tolist(), thoughts.tolist())])
        return interventions.TextScores(text, *[zero] * 6, thoughts, zero, zero, mixed)
    monkeypatch.setattr(interventions, "score_text", score)


def test_measured_by_hand(run, monkeypatch):
    """A model that says the last letter of its thought, but of all characters `(` where i is even;
    votes for `a` but where a problem begins with b."""
    scripted(monkeypatch, lambda ids, thought, i, n: 8 if n > LETTERS and i % 2 == 0
             else thought[-1])

    def write_out(base, prompts, opening, closing, n_sampled, n_letters, votes, seed):
        assert (opening, closing, n_sampled, n_letters, votes) == (*ids_of("()"), S, LETTERS, 16)
        problems = [fold.decode(p, 1)[-5:-1] for p in prompts]
        assert all(fold.decode(p, 1)[-1] == "=" for p in prompts)
        assert len(set(problems)) == len(problems)
        asked.extend(problems)
        votes = torch.zeros(16, len(prompts), LETTERS)
        for n, problem in enumerate(problems):
            right = ids_of(fold.solve(problem, squares)[-1])[0]
            votes[0, n, (right + 1) % 7] = 0.5  # alone it is wrong
            votes[3, n, right if problem[0] in "abc" else (right + 2) % 7] = 0.6
            votes[9, n, right] += 0.7
        return votes
    asked, squares = [], fold.latin_squares(0)
    monkeypatch.setattr(interventions, "write_out", write_out)
    found = interventions.measure(run)
    text, _ = TokenDataset(run / "data", "val").evenly(6, 63)
    direct = [(k - 1, problem) for ids in text.tolist()
              for style, k, problem in fold.find_answers(fold.decode(ids, 1))
              if style == "direct" and k <= 62]
    last = [ids_of(fold.solve(problem, squares)[-1])[0] for _, problem in direct]
    pairs = [(a == b, last[k] == last[k - 1]) for k, (_, a) in enumerate(direct)
             for b in [direct[k - 1][1]]]
    apart = [same for equal, same in pairs if not equal]
    n, abc = len(direct), sum(p[0] in "abc" for p in asked) / len(asked)
    assert n > 10 and 0 < abc < 1 and set(asked) == {p for _, p in direct}
    assert found == pytest.approx({
        "answers": n, "problems": len(set(asked)),
        "right of letters, without thoughts": last.count(0) / n, "right of letters": 1.0,
        "right of all characters, without thoughts": last.count(0) / n,
        "right of all characters": sum(i % 2 for i, _ in direct) / n,
        "another problem's thought: right": sum(apart) / len(apart),
        "another problem's thought: the letter it leads to": 1.0,
        **{f"another letter at token {k} of the thought: right": float(k < S)
           for k in range(1, S + 1)},
        "the untrained base, by a vote of 1 written asides: right": 0.0,
        "the untrained base, by a vote of 4 written asides: right": abc,
        "the untrained base, by a vote of 16 written asides: right": 1.0})


@pytest.mark.parametrize(("think", "leads_to"), [
    (lambda steps: "(" + steps[:3], lambda last, square, operand: square[last][operand]),
    (lambda steps: "(" + steps[2:] + ")", lambda last, square, operand: last),
    (lambda steps: steps[:3] + ")", lambda last, square, operand: last),
    (lambda steps: "=)(\n", lambda last, square, operand: 0)])
def test_where_a_thought_leads(run, monkeypatch, think, leads_to):
    """To its last letter, or, where it opens an aside and lacks a step, by that step: of the
    problem that is asked."""
    square = fold.latin_squares(0)["*"].tolist()

    def choose(ids, thought, i, n):
        last = next((x for x in reversed(thought) if x < LETTERS), 0)
        return leads_to(last, square, ids[i - 1] if ids[i - 1] < LETTERS else 0)
    scripted(monkeypatch, choose, think)
    monkeypatch.setattr(interventions, "write_out", lambda base, prompts, *args: torch.zeros(
        16, len(prompts), LETTERS))
    found = interventions.measure(run)
    assert found["another problem's thought: the letter it leads to"] == 1
    assert found["another problem's thought: right"] < 0.5


def test_votes_are_for_the_answers_of_the_run_s_own_family(tmp_path, monkeypatch):
    assert train.main(["tiny", "--out_dir", str(tmp_path / "r"), "--fold_family", "sum",
                       "--fold_operands", "2", "--fold_tokens", "20000", "--max_steps", "1",
                       "--pretrain_steps", "1", "--eval_windows", "6", "--batch_size", "2",
                       "--hidden_size", "24", "--intermediate_size", "32", "--threads", "1"]) == 0
    add = fold.solver(0, 2, family="sum")

    def write_out(base, prompts, *args):
        votes = torch.zeros(16, len(prompts), LETTERS)
        for n, prompt in enumerate(prompts):
            votes[:, n, ids_of(add(fold.decode(prompt, 1)[-5:-1])[-1])[0]] = 1
        return votes
    monkeypatch.setattr(interventions, "write_out", write_out)
    found = interventions.measure(tmp_path / "r")
    assert [found[f"the untrained base, by a vote of {n} written asides: right"]
            for n in interventions.VOTES] == [1, 1, 1]


def test_a_real_run_is_measured(run):
    """Its thoughts as evaluated: accuracy as in its own log."""
    found = interventions.measure(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    direct = [r for r in rows if r["kind"] == "eval"][-1]["answers"]["direct"]
    assert found["answers"] == direct["n"] and found["problems"] == direct["problems"]
    assert found["right of letters"] == pytest.approx(direct["accuracy_mixed"])
    assert found["right of letters, without thoughts"] == pytest.approx(direct["accuracy_base"])
    assert interventions.measure(run) == found
