"""The embedded corpus: problems held out for good, answers found where they are."""

import re
import tracemalloc
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
    assert data.meta["source"] == {"corpus": "fold", "seed": 3, "thoughts": 0, **make}
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
        "mix": 0.5})
    assert answers["restated"] == {"n": 1, "accuracy_base": 1.0, "accuracy_mixed": 1.0,
                                   "nll_base": 1.0, "nll_mixed": 0.125, "mix": 0.375}
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
            written = torch.stack([
                ids_of(line(t[-5:-1]).ljust(max_new_tokens, "="))[:max_new_tokens] for t in texts])
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
               "nll_mixed": 0.8, "mix": 0.64},
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
