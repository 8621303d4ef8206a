"""The embedded corpus: left folds over a random Latin square, a text in which thinking pays and nothing is labelled.

A problem abcd has the steps p1 = a, p2 = p1*b, p3 = p2*c, p4 = p3*d and the answer r = p4, where * is a random 7x7 Latin
square.  Lines come in three styles, mixed at random:

    direct    abcd=r             restated  abcd=(abcd)r             worked  abcd=(p1p2p3p4)r

A small model cannot compute the fold in one forward pass, but can step by step; the text holds both useful asides after
`=(` and useless ones.  Problems whose hash is 0 mod 10 are held out: no training line of any style contains them.
"""

import re
import zlib
from itertools import product

import numpy as np

LETTERS = "abcdefg"
VOCABULARY = LETTERS + "=()\n"


def latin_square(seed):
    """A random 7x7 Latin square: the cyclic one with rows, columns and symbols shuffled."""
    rng = np.random.default_rng([seed, 1])
    rows, columns, symbols = (rng.permutation(len(LETTERS)) for _ in range(3))
    return symbols[(rows[:, None] + columns[None, :]) % len(LETTERS)]


def solve(problem, square):
    """The steps p1 .. pn of a problem, as letters; the last one is the answer."""
    steps = [LETTERS.index(problem[0])]
    for letter in problem[1:]:
        steps.append(square[steps[-1], LETTERS.index(letter)])
    return "".join(LETTERS[s] for s in steps)


def held_out(problem):
    return zlib.crc32(problem.encode()) % 10 == 0


def problems(operands):
    """All problems of that many operands: (for training, held out)."""
    everything = ["".join(p) for p in product(LETTERS, repeat=operands)]
    return [p for p in everything if not held_out(p)], [p for p in everything if held_out(p)]


def make_text(seed, split, n_characters, operands=4, worked=0.1, restated=0.3):
    """Lines of the split's problems ('train' or 'val': held out), at least n_characters of them."""
    square, pool = latin_square(seed), problems(operands)[split == "val"]
    styles = {p: (f"{p}={s[-1]}\n", f"{p}=({p}){s[-1]}\n", f"{p}=({s}){s[-1]}\n")
              for p, s in ((p, solve(p, square)) for p in pool)}
    rng, lines, length = np.random.default_rng([seed, 2, split == "val"]), [], 0
    while length < n_characters:
        chosen = rng.choice(3, size=1000, p=(1 - restated - worked, restated, worked))
        new = [styles[pool[i]][style] for i, style in zip(rng.integers(len(pool), size=1000), chosen)]
        lines += new
        length += sum(map(len, new))
    return "".join(lines)


def tokenizer_json():
    """A tokenizer of single characters, in the format of the `tokenizers` library."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(VOCABULARY)}, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str()


def encode(text):
    """Ids of a text of VOCABULARY's characters, as a uint16 array."""
    table = np.zeros(128, dtype=np.uint16)
    table[[ord(c) for c in VOCABULARY]] = range(len(VOCABULARY))
    return table[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]


def find_answers(window):
    """Where a window's answers stand, for the problems it shows whole.

    window: its text.  Returns (style, index of the answer, problem) for every line that begins after the window's first
    newline; the answer at index k is predicted at k - 1.
    """
    found = []
    for line in re.finditer(r"(?<=\n)([a-g]+)=(?:\(([a-g]+)\))?([a-g])(?=\n|$)", window):
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


def measure(scores, seed, operands):
    """Held-out answers with and without thoughts, and what the thoughts before direct answers are.

    scores: `evaluate.TextScores` of windows of this corpus, chosen among LETTERS.  Returns {style: {n, accuracy_base,
    accuracy_mixed, nll_base, nll_mixed, mix}}, "thoughts": {kind: share}, "mix_elsewhere": mean mixing weight off the
    answers; and a few direct answers' places (window, position) to show.
    """
    square, n_positions = latin_square(seed), scores.base_lp.shape[1]
    rows, kinds, places = {}, {"worked": 0, "useful": 0, "restated": 0, "other": 0}, []
    elsewhere = np.ones(scores.mix.shape, dtype=bool)
    for n, ids in enumerate(scores.text.tolist()):
        for style, answer, problem in find_answers("".join(VOCABULARY[i] for i in ids)):
            i = answer - 1
            if i >= n_positions or len(problem) != operands:
                continue
            elsewhere[n, i] = False
            right = ids[answer]
            rows.setdefault(style, []).append((
                scores.base_choice[n, i].item() == right, scores.mixed_choice[n, i].item() == right,
                -scores.base_lp[n, i].item(), -scores.mixed_lp[n, i].item(), scores.mix[n, i].item()))
            if style == "direct" and scores.thoughts.shape[-1]:
                thought = "".join(VOCABULARY[t] for t in scores.thoughts[n, i].tolist())
                kinds[kind_of_thought(thought, problem, solve(problem, square))] += 1
                places.append((n, i))
    names = ("accuracy_base", "accuracy_mixed", "nll_base", "nll_mixed", "mix")
    result = {style: {"n": len(r), **dict(zip(names, np.mean(r, axis=0).tolist()))} for style, r in sorted(rows.items())}
    result["thoughts"] = {kind: count / max(1, sum(kinds.values())) for kind, count in kinds.items()}
    result["mix_elsewhere"] = scores.mix.numpy()[elsewhere].mean().item()
    return result, places[:4]
