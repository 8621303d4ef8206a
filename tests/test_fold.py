"""The embedded corpus: problems held out for good, answers found where they are."""

import hashlib
import re
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prepared import fold_text
from tokenizers import Tokenizer

from data import fold
from nanoqstar.dataset import TokenDataset
from nanoqstar.evaluate import table

MAKE = {"operands": 4, "operations": 1, "ordinary": 0.0, "worked": 0.1, "restated": 0.3}
OURS = {"seed": 0, "operands": 4, "operations": 1}


# ---- the text


def test_latin_square_and_steps_by_hand():
    squares = fold.latin_squares(0, operations=3)
    for square in squares.values():
        for line in [*square, *square.T]:
            assert sorted(line) == list(range(7))
    times, plus = squares["*"], squares["+"]
    a, b, c = (fold.LETTERS.index(x) for x in "cfb")
    for problem, steps in (("cfb", [a, times[a, b], times[times[a, b], c]]),
                           ("c+f*b", [a, plus[a, b], times[plus[a, b], c]])):
        assert fold.solve(problem, squares) == "".join(fold.LETTERS[s] for s in steps)
    assert not np.array_equal(times, plus)
    assert not np.array_equal(times, fold.latin_squares(1)["*"])


def test_no_training_line_of_any_style_holds_a_held_out_problem():
    text = fold_text(3, "train", 200_000)
    held_out = set(fold.problems(4)[1])
    lines = text.splitlines()
    assert 150 < len(held_out) < 350
    assert len(held_out) + len(fold.problems(4)[0]) == 7**4
    assert not held_out & {line[:4] for line in lines}
    restated = "".join(line for line in lines if line[5:10] == f"({line[:4]}")
    assert not held_out & set(re.findall(r"\(([a-g]{4})\)", restated))
    assert {line[:4] for line in fold_text(3, "val", 50_000).splitlines()} == held_out


def test_styles_come_in_their_shares_and_answers_are_right():
    squares, counts = fold.latin_squares(5), dict.fromkeys(fold.STYLES, 0)
    text = fold_text(5, "train", 100_000, worked=0.1, restated=0.3)
    for style, k, problem in fold.find_answers("\n" + text):
        steps = fold.solve(problem, squares)
        assert ("\n" + text)[k] == steps[-1]
        counts[style] += 1
    shares = {style: n / sum(counts.values()) for style, n in counts.items()}
    assert abs(shares["direct"] - 0.6) < 0.02
    assert abs(shares["restated"] - 0.3) < 0.02
    assert abs(shares["worked"] - 0.1) < 0.02
    assert text == fold_text(5, "train", 100_000, worked=0.1, restated=0.3)
    assert text != fold_text(6, "train", 100_000, worked=0.1, restated=0.3)


def lines_one_by_one(seed, split, n_lines, operands, worked, restated, operations, ordinary):
    """The lines as a plain loop draws them."""
    squares = fold.latin_squares(seed, operations)
    pool = fold.problems(operands, operations, seed)[split == "val"]
    prose = [line for line in fold.ordinary_lines() if fold.held_out(line) == (split == "val")]
    rng, lines = np.random.default_rng([seed, 2, split == "val"]), []
    while len(lines) < n_lines:
        styles = rng.choice(3, size=1000, p=(1 - restated - worked, restated, worked))
        for i, style in zip(rng.integers(len(pool), size=1000), styles):
            steps = fold.solve(pool[i], squares)
            aside = ("", f"({pool[i]})", f"({steps})")[style]
            lines.append(f"{pool[i]}={aside}{steps[-1]}\n")
        if ordinary:
            for k in (rng.random(1000) < ordinary).nonzero()[0]:
                lines[k - 1000] = prose[rng.integers(len(prose))]
    return "".join(lines)


@pytest.mark.parametrize("make", [MAKE, MAKE | {"operands": 3, "operations": 3, "ordinary": 0.3}])
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_text_is_what_a_plain_loop_draws(make, split):
    expected = lines_one_by_one(3, split, 3000, **make)
    assert fold_text(3, split, len(expected), **make) == expected
    assert expected.startswith(fold_text(3, split, 1, **make))


def test_no_direct_lines_at_all():
    """0.9 + 0.1 + what is left: less than nothing, rounded."""
    text = fold_text(0, "train", 20_000, worked=0.1, restated=0.9)
    assert {style for style, _, _ in fold.find_answers(text)} == {"restated", "worked"}


def test_a_prepared_folder_holds_the_text(tmp_path):
    make = MAKE | {"operations": 2, "ordinary": 0.1}
    fold.prepare(tmp_path / "d", seed=3, n_train=20_000, n_val=500, **make)
    for split, n in (("train", 20_000), ("val", 500)):
        data, text = TokenDataset(tmp_path / "d", split), fold_text(3, split, n, **make)
        ids, docs = data.windows([0], data.n_tokens)
        assert fold.decode(ids[0].tolist(), 2) == text
        assert len(text) >= n
        assert not docs.any()
    assert data.meta["source"] == {"corpus": "fold", "seed": 3, **make}
    tokenizer = Tokenizer.from_file(str(data.tokenizer_path))
    assert tokenizer.decode(ids[0].tolist()) == text


def test_a_large_text_is_never_held_in_memory(tmp_path, monkeypatch):
    """The same text in several documents, at a peak far below its size."""
    monkeypatch.setattr(fold, "MAX_DOCUMENT", 100_000)
    fold.prepare(tmp_path / "warm", seed=0, n_train=1000, n_val=1000, **MAKE)
    tracemalloc.start()
    fold.prepare(tmp_path / "d", seed=0, n_train=4_000_000, n_val=1000, **MAKE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    data = TokenDataset(tmp_path / "d", "train")
    assert data.n_tokens >= 4_000_000
    assert peak < 2_500_000
    assert 35 < data.meta["train"]["documents"] <= 40
    assert data.meta["val"]["documents"] == 1
    ids, _ = data.windows([0], 500_000)
    assert fold.decode(ids[0].tolist(), 1) == fold_text(0, "train", 500_000)[:500_000]


@pytest.mark.parametrize("operands", [2, 8])
@pytest.mark.parametrize("operations", [1, 4])
def test_every_size_has_problems_of_both_kinds(operands, operations):
    train, val = fold.problems(operands, operations)
    assert len(val) > 2
    assert len(train) > 20
    assert len(train) + len(val) <= fold.MAX_POOL
    example = fold.example_prompt(operands, operations, seed=0)
    assert example[:-1] in val
    assert example[-1] == "="
    assert len(set(example) & set(fold.LETTERS)) >= min(operands, 7)


def test_tokenizer_and_encode_agree():
    for operations, ordinary in ((1, 0.0), (3, 0.3)):
        characters = fold.vocabulary(operations, ordinary)
        tokenizer = Tokenizer.from_str(fold.tokenizer_json(characters))
        text = fold_text(0, "val", 500, operations=operations, ordinary=ordinary)
        ids = tokenizer.encode(text).ids
        assert ids == fold.encode(text, characters).tolist()
        assert tokenizer.decode(ids) == text
    assert len(fold.vocabulary()) == 11
    for operations in (1, 2, 3, 4):  # as `decode` takes for granted
        assert fold.vocabulary(operations, 0.1).startswith(fold.vocabulary(operations))


def test_larger_corpora_hold_out_as_well():
    options = {"operands": 6, "operations": 3, "ordinary": 0.2}
    train, val = (fold_text(1, split, 60_000, **options) for split in ("train", "val"))
    found = {split: {p for _, _, p in fold.find_answers("\n" + text)}
             for split, text in (("train", train), ("val", val))}
    assert len(found["train"]) > 1000
    assert len(found["val"]) > 1000
    assert not any(map(fold.held_out, found["train"]))
    assert all(map(fold.held_out, found["val"]))
    assert all(sum(c in fold.LETTERS for c in p) == 6 and len(p) == 11 for p in found["val"])
    prose = [{line for line in text.splitlines() if "=" not in line} for text in (train, val)]
    assert len(prose[0]) > 50
    assert not prose[0] & prose[1]


# ---- its answers


def test_only_problems_that_the_window_shows_whole_are_scored():
    found = fold.find_answers("cd=e\nabcd=e\nabcd=(abcd)f\nabcd=(aceg)g\nabcd=")
    assert [(style, problem) for style, _, problem in found] == [
        ("direct", "abcd"), ("restated", "abcd"), ("worked", "abcd")]
    assert [k for _, k, _ in found] == [10, 23, 36]


def test_kinds_of_thoughts():
    kinds = [fold.kind_of_thought(t, "abcd", "aefg")
             for t in ("aefg", "bbbg", "abcd", "abce", "=)\ng")]
    assert kinds == ["worked", "useful", "restated", "other", "other"]
    kinds = [fold.kind_of_thought(t, "abcd", "aefg")  # with room for brackets and more
             for t in ("(aefg)", "aefg)g", "(bg)e\n", "(abcd)", "g\nabcd", "(aefge", "((aefg")]
    assert kinds == ["worked", "worked", "useful", "restated", "other", "other", "other"]
    kinds = [fold.kind_of_thought(t, "fedd", "fedc")  # with room for all but the last step
             for t in ("(fed", "(fee", "(fe)", "(fec", "=(fe")]
    assert kinds == ["worked", "other", "other", "other", "other"]
    assert fold.kind_of_thought("(abc", "abcd", "aefg") == "restated"


def answer_to(problem):
    return fold.solve(problem, fold.latin_squares(0))[-1]


def ids_of(text):
    return torch.from_numpy(fold.encode(text, fold.vocabulary()).astype(np.int64))


def test_measure_by_hand():
    """Two windows; every answer has its own numbers, and what stands between is absurd."""
    a, b = answer_to("abcd"), answer_to("gfed")
    lines = [f"c\nabcd={a}\nabcd=(abcd){a}\n", f"gfed={b}\ngfed={b}\nabcd={a}\n "]
    steps = fold.solve("abcd", fold.latin_squares(0)), fold.solve("gfed", fold.latin_squares(0))
    text = torch.stack([ids_of(x.strip(" ").ljust(max(map(len, lines)), "\n")) for x in lines])
    n = text.shape[1] - 2
    absurd = torch.full((2, n), 1e6)
    wrong = torch.full((2, n), 10)
    scores = SimpleNamespace(
        text=text, base_lp=absurd.clone(), mixed_lp=absurd.clone(), mix=torch.zeros(2, n),
        base_choice=wrong.clone(), mixed_choice=wrong.clone(),
        thoughts=torch.full((2, n, 4), 10))
    # (window, position before the answer): base NLL, mixed NLL, mix, base and mixed right, thought
    direct = {(0, 6): (2.0, 0.5, 0.25, False, True, steps[0]),
              (1, 11): (4.0, 1.5, 0.75, False, True, "gfed"),
              (1, 18): (3.0, 4.0, 0.5, True, False, "abc" + a)}
    for (w, i), (base, mixed, mix, base_right, mixed_right, thought) in (
            direct | {(0, 19): (1.0, 0.125, 0.375, True, True, "====")}).items():
        scores.base_lp[w, i], scores.mixed_lp[w, i], scores.mix[w, i] = -base, -mixed, mix
        right = text[w, i + 1]
        scores.base_choice[w, i] = right if base_right else (right + 1) % 7
        scores.mixed_choice[w, i] = right if mixed_right else (right + 1) % 7
        scores.thoughts[w, i] = ids_of(thought)
    answers, shown = fold.measure(scores, **OURS)
    assert answers["direct"] == pytest.approx({
        "n": 3, "accuracy_base": 1 / 3, "accuracy_mixed": 2 / 3, "nll_base": 3.0, "nll_mixed": 2.0,
        "mix": 0.5, "problems": 2,
        # of right, right, wrong: abcd's two and gfed's one are off the mean by -1/3 and 1/3
        "stderr": (2 / 1 * (1 / 9 + 1 / 9)) ** 0.5 / 3})
    assert answers["restated"] == {"n": 1, "accuracy_base": 1.0, "accuracy_mixed": 1.0,
                                   "nll_base": 1.0, "nll_mixed": 0.125, "mix": 0.375,
                                   "problems": 1, "stderr": None}
    assert "worked" not in answers
    assert shown == list(direct)
    assert answers["thoughts"] == pytest.approx(
        {"worked": 1 / 3, "useful": 1 / 3, "restated": 1 / 3, "other": 0.0})
    assert answers["mix_elsewhere"] == 0.0
    scores.mix += 0.5
    assert fold.measure(scores, **OURS)[0]["mix_elsewhere"] == 0.5


def test_measure_without_thoughts():
    text = ids_of(f"\nabcd={answer_to('abcd')}\n\n")[None]
    zeros = torch.zeros(1, 7)
    scores = SimpleNamespace(text=text, base_lp=zeros, mixed_lp=zeros, mix=zeros,
                             base_choice=zeros, mixed_choice=zeros, thoughts=torch.zeros(1, 7, 0))
    answers, shown = fold.measure(scores, **OURS)
    assert answers["direct"]["n"] == 1
    assert shown == []
    assert set(answers["thoughts"].values()) == {0.0}


@pytest.fixture
def scripted(monkeypatch):
    """(line(problem) with thoughts, without) -> the calls of a model that writes those lines."""
    def script(with_thoughts, without):
        calls = []

        def generate(model, prompts, max_new_tokens, n_ahead, temperature, generator):
            assert temperature == 0
            assert generator.initial_seed() == 0
            texts = [fold.decode(p, 1) for p in prompts]
            calls.append((n_ahead, texts, max_new_tokens))
            line = with_thoughts if n_ahead else without
            lines = [line(t[t.rindex("\n") + 1:].rstrip("=")) for t in texts]
            written = torch.stack([
                ids_of(x.ljust(max_new_tokens, "="))[:max_new_tokens] for x in lines])
            return (SimpleNamespace(tokens=column) for column in written.T)
        monkeypatch.setattr(fold, "generate", generate)
        return calls
    return script


MODEL = SimpleNamespace(lm=SimpleNamespace(head_weight=torch.zeros(1)))


def val_windows(n, length=64):
    text = fold_text(0, "val", n * length)
    return torch.stack([ids_of(text[k * length:(k + 1) * length]) for k in range(n)])


def test_greedy_answers_are_read_off_what_is_written(scripted):
    def wrong(problem):
        return "abcdefg"[("abcdefg".index(answer_to(problem)) + 1) % 7]

    def by_first_letter(problem):
        steps, a = fold.solve(problem, fold.latin_squares(0)), answer_to(problem)
        return {"a": f"{a}\n", "b": f"({problem}){a}\n", "c": f"({steps}){a}\n",
                "d": f"{wrong(problem)}\n", "e": f"({problem}a){a}", "f": f"({problem})\n",
                "g": f"({problem}){wrong(problem)}\n"}[problem[0]]

    calls = scripted(by_first_letter, lambda problem: f"{wrong(problem)}\n")
    result = fold.greedy_answers(MODEL, val_windows(60), 6, **OURS)
    (_, texts, room), (k, same, _) = sorted(calls, key=lambda c: c[0])
    problems = [t[-5:-1] for t in texts]
    assert k == 6
    assert texts == same
    assert room == 8
    assert len(set(problems)) == len(problems) == result["n"] == 100
    assert set(problems) <= set(fold.problems(4)[1])
    for t in texts:
        assert re.search(r"\n[a-g]{4}=$", t)
        assert t.count(f"{t[-5:-1]}=") == 1
        assert len(t) + room <= 64
    assert np.mean([len(t) for t in texts]) > 32  # lines come before, as in training
    firsts = [p[0] for p in problems]
    restates = [p for p in problems if p[0] in "bg" or (p[0] == "c" and p == fold.solve(
        p, fold.latin_squares(0)))]
    assert result["thoughts"] == pytest.approx({
        "right": sum(f in "abc" for f in firsts) / 100, "restated": len(restates) / 100,
        "direct": sum(f in "ad" for f in firsts) / 100,
        "worked": sum(f in "bcg" for f in firsts) / 100 - len(restates) / 100,
        "other": sum(f in "ef" for f in firsts) / 100})
    assert result["base"] == {"right": 0.0, "direct": 1.0, "restated": 0.0, "worked": 0.0,
                              "other": 0.0}


def test_greedy_answers_without_thoughts_or_without_problems(scripted):
    calls = scripted(None, lambda problem: f"{answer_to(problem)}\n")
    result = fold.greedy_answers(MODEL, val_windows(2), 0, **OURS)
    assert result.keys() == {"n", "base"}
    assert result["base"]["right"] == 1.0
    assert [c[0] for c in calls] == [0]
    assert fold.greedy_answers(MODEL, val_windows(4, length=12), 6, **OURS) == {}


def test_greedy_answers_of_a_real_model(make_model):
    """Thoughts change what it writes, and the same call writes the same."""
    model = make_model(banned=range(11, 61)).float()
    first, second = (fold.greedy_answers(model, val_windows(6), 5, **OURS) for _ in range(2))
    assert first == second
    assert first["n"] > 6
    assert all(sum(v for k, v in first[name].items() if k != "right") == pytest.approx(1)
               for name in ("base", "thoughts"))


# ---- its part of what a run prints


ANSWERS = {
    "direct": {"n": 7, "accuracy_base": 0.08, "accuracy_mixed": 0.99, "nll_base": 2.4,
               "nll_mixed": 0.8, "mix": 0.64, "problems": 3, "stderr": 0.011},
    "worked": {"n": 5, "accuracy_base": 1.0, "accuracy_mixed": 0.95, "nll_base": 0.06,
               "nll_mixed": 0.18, "mix": 0.1},
    "thoughts": {"worked": 0.97, "useful": 0.0, "restated": 0.01, "other": 0.02},
    "mix_elsewhere": -0.05}
GREEDY = {
    "n": 100,
    "base": {"right": 0.15, "direct": 0.5, "restated": 0.5, "worked": 0.0, "other": 0.0},
    "thoughts": {"right": 0.98, "direct": 0.6, "restated": 0.3, "worked": 0.09, "other": 0.01}}


def test_eval_line():
    assert fold.eval_line(ANSWERS) == (", direct answers right 8% -> 99%; thoughts: worked 97%, "
                                       "useful 0%, restated 1%, other 2%")
    assert fold.eval_line({"thoughts": {}, "mix_elsewhere": 0.0}) == ""


def test_its_part_of_the_table():
    rows = fold.table_rows(ANSWERS, GREEDY)
    assert [row[1:] for row in rows] == [("8.0%", "99.0%"), ("2.400", "0.800"), ("15.0%", "98.0%"),
                                         ("100.0%", "95.0%"), ("0.060", "0.180")]
    labels = [row[0] for row in rows]
    assert labels[0] == "direct answers right, of the 7 letters (held out, n=7)"
    assert labels[1] == "direct answers, NLL"
    assert "greedily" in labels[2]
    assert "n=100" in labels[2]
    assert labels[3].startswith("worked answers right")
    assert labels[4] == "worked answers, NLL"
    assert fold.remarks(ANSWERS, GREEDY) == [
        "direct answers with thoughts: 99.0% right +- 2.2% (2 standard errors, by problem), "
        "3 different problems",
        "mixing weight: 0.64 on direct answers, -0.05 off the answers",
        "thoughts before direct answers: worked 97%, useful 0%, restated 1%, other 2%",
        "greedy answers without thoughts: direct 50%, restated 50%, worked 0%, other 0%",
        "greedy answers with thoughts: direct 60%, restated 30%, worked 9%, other 1%"]


def test_the_table_where_there_is_less_to_show():
    base_only = {"n": 3, "base": GREEDY["base"]}
    few = {"thoughts": {}, "mix_elsewhere": 0.0}
    assert fold.table_rows(few, {}) == []
    assert fold.remarks(few, {}) == []
    rows = fold.table_rows(few, base_only)
    assert [row[1:] for row in rows] == [("15.0%", "")]
    assert len(fold.remarks(few, base_only)) == 1
    lines = table({"nll_base": 1.0, "nll_mixed": 1.0}, False, rows).splitlines()
    assert len(lines) == 4
    assert lines[2].endswith(" 15.0%")


# ---- problems of several lengths, and the other families


MIXED = MAKE | {"operands": 5, "shortest": 2}
DIGESTS = {("four", "train"): "7a061dc55911a668", ("four", "val"): "6fd4f9895cd28967",
           ("signs", "train"): "77b29f917489c0bf", ("signs", "val"): "b1263dbb6e6b7df0"}


def test_the_text_without_later_settings_is_what_it_always_was():
    """Digests from before there were any."""
    digests = {}
    for name, make in {"four": MAKE, "signs": MAKE | {"operands": 6, "operations": 3, "worked": 0.3,
                                                     "ordinary": 0.0}}.items():
        for split in ("train", "val"):
            text = fold_text(7, split, 50_000, **make)
            digests[name, split] = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert digests == DIGESTS


def test_every_length_comes_equally_often_and_answers_stand_in_one_column():
    text = fold_text(3, "train", 200_000, **MIXED)
    lines, counts = text.splitlines(), dict.fromkeys(range(2, 6), 0)
    steps = fold.solver(3, 5)
    for _, k, problem in fold.find_answers("\n" + text):
        counts[len(problem)] += 1
        assert ("\n" + text)[k] == steps(problem)[-1]
    assert sum(counts.values()) == len(lines) and all(line[5] == "=" for line in lines)
    assert all(abs(n / len(lines) - 1 / 4) < 0.02 for n in counts.values())
    held_out = {p for n in range(2, 6) for p in fold.problems(n)[1]}
    assert not held_out & {line[:5].rstrip("=") for line in lines}
    val = {line[:5].rstrip("=") for line in fold_text(3, "val", 100_000, **MIXED).splitlines()}
    assert val <= held_out and len(val) > 900


def test_all_lengths_together_have_no_more_problems_than_one(monkeypatch):
    monkeypatch.setattr(fold, "MAX_POOL", 3000)
    text = "".join(fold_text(0, split, 400_000, **MIXED | {"operands": 8}) for split in
                   ("train", "val"))
    counts = Counter(len(line[:8].rstrip("=")) for line in {x[:8] for x in text.splitlines()})
    assert sum(counts.values()) <= 3000 and all(counts[n] > 350 for n in range(4, 9))
    assert counts[2] == 7**2 and counts[3] == 7**3


def test_answers_by_number_of_operands_by_hand():
    """Right, wrong and of a length that the text does not have."""
    steps = fold.solver(0, 5)
    wrong = {p: "abcdefg"[("abcdefg".index(steps(p)[-1]) + 1) % 7] for p in ("ab", "abc", "abcde")}
    line = "\nab===={}\nabc==={}\nabcde={}\nab====(ab){}\nabcdef={}\nabc==={}\n".format(
        *(steps(p)[-1] for p in ("ab", "abc", "abcde", "ab", "abcdef", "abc")))
    text = ids_of(line)[None]
    n = text.shape[1] - 1
    base, mixed = text[:, 1:].clone(), text[:, 1:].clone()
    at = {(p, k) for _, k, p in fold.find_answers(line)}
    for problem, k in at:
        base[0, k - 1] = "abcdefg".index(wrong.get(problem, "a"))
    last = max(k for p, k in at if p == "abc")
    mixed[0, last - 1] = 10
    zeros = torch.zeros(1, n)
    scores = SimpleNamespace(text=text, base_lp=zeros, mixed_lp=zeros, mix=zeros, base_choice=base,
                             mixed_choice=mixed, thoughts=torch.zeros(1, n, 0, dtype=int))
    found = fold.measure(scores, seed=0, operands=5, operations=1, shortest=2)[0]["by_operands"]

    def row(n, right):
        return {"n": n, "accuracy_base": 0.0, "accuracy_mixed": right}
    assert found == {"2": {"direct": row(1, 1.0), "restated": row(1, 1.0)},
                     "3": {"direct": row(2, 0.5)}, "4": {}, "5": {"direct": row(1, 1.0)}}
    assert "by_operands" not in fold.measure(scores, seed=0, operands=5, operations=1)[0]


def test_sums_are_those_of_integers():
    """Each step is a digit of the sum and, from three on, the carry out of its column."""
    steps, carried = fold.solver(0, 4, family="sum"), 0
    everything = [p for split in fold.problems(4, family="sum") for p in split]
    assert len(set(everything)) == 3**8
    for problem in everything:
        a, b = (int("".join(str("abc".index(c)) for c in reversed(half)), 3)
                for half in (problem[:4], problem[4:]))
        totals = ["abcdef".index(s) for s in steps(problem)]
        digits = [t % 3 for t in totals] + [totals[-1] // 3]
        assert sum(d * 3**k for k, d in enumerate(digits)) == a + b
        carried += totals[-2] >= 3
    assert carried / len(everything) == 0.4375  # c = 1/4 + c/2, three times from 0


def test_pointers_are_followed_by_a_plain_walk():
    steps, lists = fold.solver(0, 4, family="chase"), set()
    for problem in fold.problems(4, family="chase")[1]:
        leads, at, path = dict(zip("abcdefg", problem)), problem[7:], ""
        for _ in range(4):
            at = leads[at]
            path += at
        assert steps(problem) == path
        assert len(set(path) | {problem[7]}) == 5  # one circle: never back where it was
        lists.add(problem[:7])
    assert len(lists) > 300


def test_the_table_answers_by_two_letters_and_its_steps_say_nothing():
    steps, answers = fold.solver(5, 4, family="table"), {}
    for problem in fold.problems(4, family="table")[0]:
        *others, answer = steps(problem)
        assert others == [*reversed(problem[1:])]
        assert answers.setdefault((problem[0], problem[3]), answer) == answer
    assert len(answers) == 49 and len(set(answers.values())) == 7
    other = fold.solver(6, 4, family="table")
    assert any(other(a + "aa" + b)[-1] != answer for (a, b), answer in answers.items())


@pytest.mark.parametrize("family", fold.FAMILIES)
def test_every_family_is_measured_and_decoded(family, scripted):
    """Its lines are found, held out, answered and shown, whatever it is."""
    make, ours = MAKE | {"family": family}, OURS | {"family": family}
    steps, known = fold.solver(0, 4, family=family), fold.sizes(4, family=family)
    train, val = (fold_text(0, split, 20_000, **make) for split in ("train", "val"))
    found = {split: {p for _, _, p in fold.find_answers("\n" + text)}
             for split, text in (("train", train), ("val", val))}
    assert len(fold.find_answers("\n" + val)) == val.count("\n")
    assert not found["train"] & found["val"] and all(map(fold.held_out, found["val"]))
    for _, k, problem in fold.find_answers("\n" + val):
        assert ("\n" + val)[k] == steps(problem)[-1] and len(problem) in known
    assert len(steps(problem)) == 4
    text = torch.stack([ids_of(val[k:k + 64]) for k in range(0, 64 * 40, 64)])
    scripted(lambda p: f"({steps(p)}){steps(p)[-1]}\n", lambda p: f"({p}){steps(p)[-1]}\n")
    result = fold.greedy_answers(MODEL, text, 6, **ours)
    assert result["n"] > 20 and result["thoughts"]["worked"] == result["thoughts"]["right"] == 1
    assert result["base"]["restated"] == result["base"]["right"] == 1
    zeros = torch.zeros(40, 62)
    scores = SimpleNamespace(text=text, base_lp=zeros, mixed_lp=zeros, mix=zeros,
                             base_choice=text[:, 1:63], mixed_choice=text[:, 1:63],
                             thoughts=torch.zeros(40, 62, 4, dtype=int))
    for n, ids in enumerate(text.tolist()):
        for _, k, problem in fold.find_answers(fold.decode(ids, 1)):
            scores.thoughts[n, min(k - 1, 61)] = ids_of(steps(problem))
    answers, _ = fold.measure(scores, **ours)
    assert answers["direct"]["accuracy_base"] == 1 and answers["direct"]["n"] > 20
    assert answers["thoughts"]["worked"] > 0.95  # restated problems' answers at the end aside
    prompt, answer = fold.example(4, 1, 0, family)
    problem = re.search(r"'([a-g]+)='", prompt)[1]
    assert fold.held_out(problem) and answer == steps(problem)[-1]


def test_given_thoughts_of_filled_lines():
    """They come after the last `=`, and are the steps of the problem, whatever its family."""
    text = "ab==aa\nabc=(abc)f\ncab=b\n"
    assert fold.given_thoughts(text, 2, lambda problem: problem[::-1]) == [(3, "ba"), (10, "cba")]
