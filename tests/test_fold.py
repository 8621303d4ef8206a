"""The embedded corpus: problems held out for good, answers found where they are."""

import re
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer

from data import fold


def test_latin_square_and_steps_by_hand():
    squares = fold.latin_squares(0, operations=3)
    for square in squares.values():
        for line in [*square, *square.T]:
            assert sorted(line) == list(range(7))
    times, plus = squares["*"], squares["+"]
    a, b, c = (fold.LETTERS.index(x) for x in "cfb")
    assert fold.solve("cfb", squares) == "".join(fold.LETTERS[s] for s in [a, times[a, b], times[times[a, b], c]])
    assert fold.solve("c+f*b", squares) == "".join(fold.LETTERS[s] for s in [a, plus[a, b], times[plus[a, b], c]])
    assert not np.array_equal(times, plus) and not np.array_equal(times, fold.latin_squares(1)["*"])


def test_no_training_line_of_any_style_holds_a_held_out_problem():
    text = fold.make_text(3, "train", 200_000)
    held_out = set(fold.problems(4)[1])
    lines = text.splitlines()
    assert 150 < len(held_out) < 350 and len(held_out) + len(fold.problems(4)[0]) == 7**4
    assert not held_out & {line[:4] for line in lines}
    restated = "".join(line for line in lines if line[5:10] == f"({line[:4]}")
    assert not held_out & set(re.findall(r"\(([a-g]{4})\)", restated))
    assert {line[:4] for line in fold.make_text(3, "val", 50_000).splitlines()} == held_out


def test_styles_come_in_their_shares_and_answers_are_right():
    squares, counts = fold.latin_squares(5), {"direct": 0, "restated": 0, "worked": 0}
    text = fold.make_text(5, "train", 100_000, worked=0.1, restated=0.3)
    for style, k, problem in fold.find_answers("\n" + text):
        steps = fold.solve(problem, squares)
        assert ("\n" + text)[k] == steps[-1]
        counts[style] += 1
    shares = {style: n / sum(counts.values()) for style, n in counts.items()}
    assert abs(shares["direct"] - 0.6) < 0.02 and abs(shares["restated"] - 0.3) < 0.02
    assert abs(shares["worked"] - 0.1) < 0.02
    assert text == fold.make_text(5, "train", 100_000, worked=0.1, restated=0.3)
    assert text != fold.make_text(6, "train", 100_000, worked=0.1, restated=0.3)


def test_only_problems_that_the_window_shows_whole_are_scored():
    found = fold.find_answers("cd=e\nabcd=e\nabcd=(abcd)f\nabcd=(aceg)g\nabcd=")
    assert [(style, problem) for style, _, problem in found] == [
        ("direct", "abcd"), ("restated", "abcd"), ("worked", "abcd")]
    assert [k for _, k, _ in found] == [10, 23, 36]


def test_tokenizer_and_encode_agree():
    for operations, ordinary in ((1, 0.0), (3, 0.3)):
        characters = fold.vocabulary(operations, ordinary)
        tokenizer = Tokenizer.from_str(fold.tokenizer_json(characters))
        text = fold.make_text(0, "val", 500, operations=operations, ordinary=ordinary)
        ids = tokenizer.encode(text).ids
        assert ids == fold.encode(text, characters).tolist() and tokenizer.decode(ids) == text
    assert len(fold.vocabulary()) == 11 and fold.vocabulary(3, 0.1).startswith(fold.vocabulary(3))


def test_larger_corpora_hold_out_as_well():
    options = dict(operands=6, operations=3, ordinary=0.2)
    train, val = (fold.make_text(1, split, 60_000, **options) for split in ("train", "val"))
    found = {split: {p for _, _, p in fold.find_answers("\n" + text)}
             for split, text in (("train", train), ("val", val))}
    assert len(found["train"]) > 1000 and len(found["val"]) > 1000
    assert not any(map(fold.held_out, found["train"])) and all(map(fold.held_out, found["val"]))
    assert all(sum(c in fold.LETTERS for c in p) == 6 and len(p) == 11 for p in found["val"])
    prose = [{line for line in text.splitlines() if "=" not in line} for text in (train, val)]
    assert len(prose[0]) > 50 and not prose[0] & prose[1]


def test_kinds_of_thoughts():
    kinds = [fold.kind_of_thought(t, "abcd", "aefg") for t in ("aefg", "bbbg", "abcd", "abce", "=)\ng")]
    assert kinds == ["worked", "useful", "restated", "other", "other"]


def test_measure_by_hand():
    characters = fold.vocabulary()
    steps = fold.solve("abcd", fold.latin_squares(0))
    answer = steps[-1]
    text = f"\nabcd={answer}\nabcd=(abcd){answer}\n"
    ids = torch.from_numpy(fold.encode(text, characters).astype(np.int64))[None]
    n = ids.shape[1] - 2
    right, wrong = characters.index(answer), (characters.index(answer) + 1) % 7
    thoughts = torch.from_numpy(fold.encode(steps, characters).astype(np.int64)).expand(1, n, 4)
    mix = torch.zeros(1, n)
    mix[0, 5] = 0.5
    scores = SimpleNamespace(text=ids, base_lp=torch.full((1, n), -2.0), mixed_lp=torch.full((1, n), -0.5), mix=mix,
                             thoughts=thoughts, base_choice=torch.full((1, n), wrong),
                             mixed_choice=torch.full((1, n), right))
    result, places = fold.measure(scores, 0, 4, 1, characters)
    assert result["direct"] == {"n": 1, "accuracy_base": 0.0, "accuracy_mixed": 1.0, "nll_base": 2.0, "nll_mixed": 0.5,
                                "mix": 0.5}
    assert result["restated"]["n"] == 1 and result["thoughts"]["worked"] == 1.0 and places == [(0, 5)]
    assert result["mix_elsewhere"] == 0.0
