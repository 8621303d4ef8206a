"""The embedded corpus: left folds over random Latin squares, a text in which thinking pays and nothing is labelled.

A problem abcd has the steps p1 = a, p2 = p1*b, p3 = p2*c, p4 = p3*d and the answer r = p4, where * is a random 7x7
Latin square.  Lines come in three styles, mixed at random:

    direct    abcd=r             restated  abcd=(abcd)r             worked  abcd=(p1p2p3p4)r

A small model cannot compute the fold in one forward pass, but can step by step; the text holds both useful asides after
`=(` and useless ones.  Problems whose hash is 0 mod 10 are held out: no training line of any style contains them.
With several operations each has its own square and its sign stands between the operands, as in a*b+c; lines of ordinary
text (the docstrings of Python's standard library) may be mixed in.
"""

import ast
import os
import re
import zlib
from itertools import product
from pathlib import Path

import numpy as np

LETTERS = "abcdefg"
SIGNS = "*+-/"
MAX_POOL = 100_000  # problems a text draws from, where there are more


def vocabulary(operations=1, ordinary=0.0):
    """The corpus's characters, LETTERS first."""
    signs = SIGNS[:operations] if operations > 1 else ""
    rest = "".join(map(chr, range(32, 127))) if ordinary else ""
    return "".join(dict.fromkeys(LETTERS + "=()\n" + signs + rest))


def latin_squares(seed, operations=1):
    """A random 7x7 Latin square for each sign: the cyclic one with rows, columns and symbols shuffled."""
    squares = {}
    for n, sign in enumerate(SIGNS[:operations]):
        rng = np.random.default_rng([seed, 1, n] if n else [seed, 1])
        rows, columns, symbols = (rng.permutation(len(LETTERS)) for _ in range(3))
        squares[sign] = symbols[(rows[:, None] + columns[None, :]) % len(LETTERS)]
    return squares


def solve(problem, squares):
    """The steps p1 .. pn of a problem, as letters; the last one is the answer."""
    operands = [c for c in problem if c in LETTERS]
    signs = [c for c in problem if c in SIGNS] or SIGNS[0] * len(problem)
    steps = [LETTERS.index(operands[0])]
    for letter, sign in zip(operands[1:], signs):
        steps.append(squares[sign][steps[-1], LETTERS.index(letter)])
    return "".join(LETTERS[s] for s in steps)


def held_out(problem):
    return zlib.crc32(problem.encode()) % 10 == 0


def problems(operands, operations=1, seed=0):
    """All problems, or MAX_POOL random ones of more: (for training, held out)."""
    signs = SIGNS[:operations] if operations > 1 else [""]
    slots = [LETTERS, *[signs, LETTERS] * (operands - 1)]
    if np.prod([len(s) for s in slots], dtype=float) <= MAX_POOL:
        everything = ["".join(p) for p in product(*slots)]
    else:
        rng = np.random.default_rng([seed, 3])
        columns = [np.array(list(s))[rng.integers(len(s), size=MAX_POOL)] for s in slots]
        everything = sorted(set(map("".join, zip(*columns))))
    return [p for p in everything if not held_out(p)], [p for p in everything if held_out(p)]


def ordinary_lines():
    """Lines of the standard library's docstrings, in printable ASCII: English prose that every Python has."""
    lines = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8", errors="replace"))) or ""
        lines += [line.strip() + "\n" for line in docstring.splitlines() if line.strip() and line.isascii()]
    return [line for line in lines if line.rstrip("\n").isprintable()]


def make_text(seed, split, n_characters, operands=4, worked=0.1, restated=0.3, operations=1, ordinary=0.0):
    """Lines of the split's problems ('train' or 'val': held out), at least n_characters of them.

    ordinary: share of lines of ordinary text among them; a tenth of those lines appears in 'val' alone.
    """
    squares, pool = latin_squares(seed, operations), problems(operands, operations, seed)[split == "val"]
    styles = {p: (f"{p}={s[-1]}\n", f"{p}=({p}){s[-1]}\n", f"{p}=({s}){s[-1]}\n")
              for p, s in ((p, solve(p, squares)) for p in pool)}
    prose = [line for line in ordinary_lines() if held_out(line) == (split == "val")] if ordinary else []
    rng, lines, length = np.random.default_rng([seed, 2, split == "val"]), [], 0
    while length < n_characters:
        chosen = rng.choice(3, size=1000, p=(1 - restated - worked, restated, worked))
        new = [styles[pool[i]][style] for i, style in zip(rng.integers(len(pool), size=1000), chosen)]
        if ordinary:
            for k in (rng.random(1000) < ordinary).nonzero()[0]:
                new[k] = prose[rng.integers(len(prose))]
        lines += new
        length += sum(map(len, new))
    return "".join(lines)


def tokenizer_json(characters):
    """A tokenizer of single characters, in the format of the `tokenizers` library."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str()


def encode(text, characters):
    """Ids of a text of these characters, as a uint16 array."""
    table = np.zeros(128, dtype=np.uint16)
    table[[ord(c) for c in characters]] = range(len(characters))
    return table[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]


def find_answers(window):
    """Where a window's answers stand, for the problems it shows whole.

    window: its text.  Returns (style, index of the answer, problem) for every line that begins after the window's first
    newline; the answer at index k is predicted at k - 1.
    """
    found = []
    for line in re.finditer(r"(?<=\n)([a-g*+/-]+)=(?:\(([a-g*+/-]+)\))?([a-g])(?=\n|$)", window):
        problem, aside, _ = line.groups()
        style = "direct" if aside is None else "restated" if aside == problem else "worked"
        found.append((style, line.start(3), problem))
    return found


def kind_of_thought(thought, problem, steps):
    """worked (the steps, in full), useful (it ends in the answer all the same), restated, or other."""
    if thought == steps:
        return "worked"
    if thought.endswith(steps[-1]) and set(thought) <= set(LETTERS):
        return "useful"
    return "restated" if thought == problem else "other"


def measure(scores, seed, operands, operations, characters):
    """Held-out answers with and without thoughts, and what the thoughts before direct answers are.

    scores: `evaluate.TextScores` of windows of this corpus, choices among LETTERS.  Returns {style: {n, accuracy_base,
    accuracy_mixed, nll_base, nll_mixed, mix}}, "thoughts": {kind: share}, "mix_elsewhere": mean mixing weight off the
    answers; and a few direct answers' places (window, position) to show.
    """
    squares, n_positions = latin_squares(seed, operations), scores.base_lp.shape[1]
    rows, kinds, places = {}, {"worked": 0, "useful": 0, "restated": 0, "other": 0}, []
    elsewhere = np.ones(scores.mix.shape, dtype=bool)
    for n, ids in enumerate(scores.text.tolist()):
        for style, answer, problem in find_answers("".join(characters[i] for i in ids)):
            i = answer - 1
            if i >= n_positions or sum(c in LETTERS for c in problem) != operands:
                continue
            elsewhere[n, i] = False
            right = ids[answer]
            rows.setdefault(style, []).append((
                scores.base_choice[n, i].item() == right, scores.mixed_choice[n, i].item() == right,
                -scores.base_lp[n, i].item(), -scores.mixed_lp[n, i].item(), scores.mix[n, i].item()))
            if style == "direct" and scores.thoughts.shape[-1]:
                thought = "".join(characters[t] for t in scores.thoughts[n, i].tolist())
                kinds[kind_of_thought(thought, problem, solve(problem, squares))] += 1
                places.append((n, i))
    names = ("accuracy_base", "accuracy_mixed", "nll_base", "nll_mixed", "mix")
    result = {style: {"n": len(r), **dict(zip(names, np.mean(r, axis=0).tolist()))}
              for style, r in sorted(rows.items())}
    result["thoughts"] = {kind: count / max(1, sum(kinds.values())) for kind, count in kinds.items()}
    result["mix_elsewhere"] = scores.mix.numpy()[elsewhere].mean().item()
    return result, places[:4]
