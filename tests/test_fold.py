"""The embedded corpus: problems held out for good, answers found where they are."""

import re
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer

from data import fold


def test_latin_square_and_steps_by_hand():
    square = fold.latin_square(0)
    for line in [*square, *square.T]:
        assert sorted(line) == list(range(7))
    a, b, c = (fold.LETTERS.index(x) for x in "cfb")
    steps = [a, square[a, b], square[square[a, b], c]]
    assert fold.solve("cfb", square) == "".join(fold.LETTERS[s] for s in steps)
    assert not np.array_equal(square, fold.latin_square(1))


def test_no_training_line_of_any_style_holds_a_held_out_problem():
    text = fold.make_text(3, "train", 200_000)
    held_out = set(fold.problems(4)[1])
    lines = text.splitlines()
    assert 150 < len(held_out) < 350 and len(held_out) + len(fold.problems(4)[0]) == 7**4
    assert not held_out & {line[:4] for line in lines}
    assert not held_out & set(re.findall(r"\(([a-g]{4})\)", "".join(line for line in lines if line[5:10] == f"({line[:4]}")))
    assert {line[:4] for line in fold.make_text(3, "val", 50_000).splitlines()} == held_out


def test_styles_come_in_their_shares_and_answers_are_right():
    square, counts = fold.latin_square(5), {"direct": 0, "restated": 0, "worked": 0}
    text = fold.make_text(5, "train", 100_000, worked=0.1, restated=0.3)
    for style, k, problem in fold.find_answers("\n" + text):
        steps = fold.solve(problem, square)
        assert ("\n" + text)[k] == steps[-1]
        counts[style] += 1
    shares = {style: n / sum(counts.values()) for style, n in counts.items()}
    assert abs(shares["direct"] - 0.6) < 0.02 and abs(shares["restated"] - 0.3) < 0.02 and abs(shares["worked"] - 0.1) < 0.02
    assert text == fold.make_text(5, "train", 100_000, worked=0.1, restated=0.3)
    assert text != fold.make_text(6, "train", 100_000, worked=0.1, restated=0.3)


def test_only_problems_that_the_window_shows_whole_are_scored():
    found = fold.find_answers("cd=e\nabcd=e\nabcd=(abcd)f\nabcd=(aceg)g\nabcd=")
    assert [(style, problem) for style, _, problem in found] == [("direct", "abcd"), ("restated", "abcd"), ("worked", "abcd")]
    assert [k for _, k, _ in found] == [10, 23, 36]


def test_tokenizer_and_encode_agree():
    tokenizer = Tokenizer.from_str(fold.tokenizer_json())
    text = fold.make_text(0, "val", 500)
    ids = tokenizer.encode(text).ids
    assert ids == fold.encode(text).tolist() and tokenizer.decode(ids) == text


def test_kinds_of_thoughts():
    kinds = [fold.kind_of_thought(t, "abcd", "aefg") for t in ("aefg", "bbbg", "abcd", "abce", "=)\ng")]
    assert kinds == ["worked", "useful", "restated", "other", "other"]


def test_measure_by_hand():
    square = fold.latin_square(0)
    steps = fold.solve("abcd", square)
    answer = steps[-1]
    text = f"\nabcd={answer}\nabcd=(abcd){answer}\n"
    ids = torch.from_numpy(fold.encode(text).astype(np.int64))[None]
    n = ids.shape[1] - 2
    right, wrong = fold.VOCABULARY.index(answer), (fold.VOCABULARY.index(answer) + 1) % 7
    thoughts = torch.from_numpy(fold.encode(steps).astype(np.int64)).expand(1, n, 4)
    mix = torch.zeros(1, n)
    mix[0, 5] = 0.5
    scores = SimpleNamespace(text=ids, base_lp=torch.full((1, n), -2.0), mixed_lp=torch.full((1, n), -0.5), mix=mix,
                             thoughts=thoughts, base_choice=torch.full((1, n), wrong), mixed_choice=torch.full((1, n), right))
    result, places = fold.measure(scores, seed=0, operands=4)
    assert result["direct"] == {"n": 1, "accuracy_base": 0.0, "accuracy_mixed": 1.0, "nll_base": 2.0, "nll_mixed": 0.5,
                                "mix": 0.5}
    assert result["restated"]["n"] == 1 and result["thoughts"]["worked"] == 1.0 and places == [(0, 5)]
    assert result["mix_elsewhere"] == 0.0
