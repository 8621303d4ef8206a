"""The embedded corpus: left folds over random Latin squares; thinking pays, nothing is labelled.

A problem abcd has the steps p1 = a, p2 = p1*b, p3 = p2*c, p4 = p3*d and the answer r = p4, where *
is a random 7x7 Latin square.  Lines come in three styles, mixed at random:

    direct    abcd=r             restated  abcd=(abcd)r             worked  abcd=(p1p2p3p4)r

A small model cannot compute the fold in one forward pass, but can step by step; the text holds
both useful asides after `=(` and useless ones.  Problems whose hash is 0 mod 10 are held out: no
training line of any style contains them.  With several operations each has its own square and its
sign stands between the operands, as in a*b+c; lines of ordinary text (the docstrings of Python's
standard library) may be mixed in.  With problems of several lengths, each comes equally often, and
the shorter ones are filled up with `=`, so that an operand stands as far before its step in all.

Other families of text have the same lines, and other problems and steps:

    chase    a list of where each letter leads, in one circle, and a letter; steps: where it leads,
             where that leads ..; the last one is the answer
    sum      two numbers of digits a, b, c (0, 1, 2), the lowest digit first; steps: the total of
             each column and what is carried into it, a to f; half of all columns pass a carry on
    table    a problem as in a fold, whose answer stands in a table for its first and last letter;
             steps: the other letters in reverse, and the answer, to which they do not help

First the text, then its answers and what they add to the lines that a run prints.
"""

import ast
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import cycle, islice, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from data.writer import write_dataset
from nanoqstar.evaluate import Report, Row, TextScores, standard_error
from nanoqstar.quietstar import QuietStar
from nanoqstar.sampling import generate

LETTERS = "abcdefg"
CHOICES = range(len(LETTERS))  # their ids, among which an answer is chosen
SIGNS = "*+-/"
FAMILIES = ("fold", "chase", "sum", "table")
STYLES = ("direct", "restated", "worked")
MAX_POOL = 100_000  # problems a text draws from, where there are more
MAX_DOCUMENT = 2**25  # characters of a document: what is held in memory at once


# ---- the text


def vocabulary(operations: int = 1, ordinary: float = 0.0) -> str:
    """The corpus's characters, LETTERS first; with ordinary text, the others of ASCII come last."""
    signs = SIGNS[:operations] if operations > 1 else ""
    rest = "".join(map(chr, range(32, 127))) if ordinary else ""
    return "".join(dict.fromkeys(LETTERS + "=()\n" + signs + rest))


def latin_squares(seed: int, operations: int = 1) -> dict[str, np.ndarray]:
    """A random 7x7 Latin square a sign: the cyclic one, rows, columns and symbols shuffled."""
    squares = {}
    for n, sign in enumerate(SIGNS[:operations]):
        rng = np.random.default_rng([seed, 1, n] if n else [seed, 1])
        rows, columns, symbols = (rng.permutation(len(LETTERS)) for _ in range(3))
        squares[sign] = symbols[(rows[:, None] + columns[None, :]) % len(LETTERS)]
    return squares


def solve(problem: str, squares: dict[str, np.ndarray]) -> str:
    """The steps p1 .. pn of a problem, as letters; the last one is the answer."""
    operands = [c for c in problem if c in LETTERS]
    signs = [c for c in problem if c in SIGNS] or SIGNS[0] * len(problem)
    steps = [LETTERS.index(operands[0])]
    for letter, sign in zip(operands[1:], signs):
        steps.append(squares[sign][steps[-1], LETTERS.index(letter)])
    return "".join(LETTERS[s] for s in steps)


def solver(seed: int, operands: int, operations: int = 1, family: str = "fold",
           ) -> Callable[[str], str]:
    """What gives the steps of a problem of this family, as letters; the last one is the answer."""
    index, squares = LETTERS.index, latin_squares(seed, operations)
    answers = np.random.default_rng([seed, 4]).integers(len(LETTERS), size=(len(LETTERS),) * 2)

    def chase(problem: str) -> str:
        steps = problem[-1]
        while len(steps) <= operands:
            steps += problem[index(steps[-1])]
        return steps[1:]

    def add(problem: str) -> str:
        steps, total = "", 0
        for a, b in zip(problem[:operands], problem[operands:]):
            total = index(a) + index(b) + (total >= 3)
            steps += LETTERS[total]
        return steps

    def look_up(problem: str) -> str:
        return problem[:0:-1] + LETTERS[answers[index(problem[0]), index(problem[-1])]]

    return {"fold": lambda problem: solve(problem, squares), "chase": chase, "sum": add,
            "table": look_up}[family]


def held_out(problem: str) -> bool:
    return zlib.crc32(problem.encode()) % 10 == 0


def problems(operands: int, operations: int = 1, seed: int = 0, family: str = "fold",
             at_most: int = MAX_POOL) -> tuple[list[str], list[str]]:
    """All problems, or at_most random ones of more: (for training, held out)."""
    signs = SIGNS[:operations] if operations > 1 else [""]
    slots: list[Any] = [LETTERS, *[signs, LETTERS] * (operands - 1)]
    if family == "chase":  # the circle a -> x -> .. -> a as a list: where a leads, where b leads ..
        circles = [dict(zip("a" + "".join(p), (*p, "a"))) for p in permutations(LETTERS[1:])]
        slots = [["".join(c[x] for x in LETTERS) for c in circles], LETTERS]
    elif family == "sum":  # columns; those that pass a carry on stand twice
        columns = ["".join(c) for c in product("abc", repeat=2)]
        slots = [[*columns, "ac", "bb", "ca"]] * operands
    if np.prod([len(s) for s in slots], dtype=float) <= at_most:
        everything = ["".join(p) for p in product(*slots)]
    else:
        rng = np.random.default_rng([seed, 3])
        drawn = [np.array(list(s))[rng.integers(len(s), size=at_most)] for s in slots]
        everything = sorted(set(map("".join, zip(*drawn))))
    if family == "sum":
        everything = [p[::2] + p[1::2] for p in everything]
    return [p for p in everything if not held_out(p)], [p for p in everything if held_out(p)]


@cache
def ordinary_lines() -> list[str]:
    """Lines of the standard library's docstrings, printable ASCII: prose that every Python has."""
    lines: list[str] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        lines += (line.strip() + "\n" for line in (ast.get_docstring(tree) or "").splitlines()
                  if line.strip() and line.isascii())
    return [line for line in lines if line.rstrip("\n").isprintable()]


def blocks(seed: int, split: str, operands: int = 4, worked: float = 0.1, restated: float = 0.3,
           operations: int = 1, ordinary: float = 0.0, shortest: int | None = None,
           family: str = "fold") -> Iterator[np.ndarray]:
    """The text without end, a thousand lines at a time, each block a uint8 array of ASCII.

    Lines of the split's problems ('train' or 'val': held out); a share `ordinary` of ordinary text
    among them, a tenth of whose lines appears in 'val' alone.
    """
    steps, counts = solver(seed, operands, operations, family), range(shortest or operands,
                                                                       operands + 1)
    pools = [problems(n, operations, seed, family, MAX_POOL // len(counts))[split == "val"]
             for n in counts]
    pool = [p for some in pools for p in islice(cycle(some), max(map(len, pools)))]
    longest = max(map(len, pool))
    solved = ((p, steps(p)) for p in pool)
    lines = [f"{p:=<{longest}}={aside}{s[-1]}\n" for p, s in solved
             for aside in ("", f"({p})", f"({s})")]
    if ordinary:
        lines += [line for line in ordinary_lines() if held_out(line) == (split == "val")]
    stored = np.frombuffer("".join(lines).encode(), dtype=np.uint8)
    lengths = np.array([len(line) for line in lines])
    starts, rng = lengths.cumsum() - lengths, np.random.default_rng([seed, 2, split == "val"])
    n_styles, direct = len(STYLES), max(0.0, 1 - restated - worked)  # 1 - 0.9 - 0.1 is below 0
    while True:
        style = rng.choice(n_styles, size=1000, p=(direct, restated, worked))
        chosen = n_styles * rng.integers(len(pool), size=1000) + style
        if ordinary:
            prose = (rng.random(1000) < ordinary).nonzero()[0]
            chosen[prose] = rng.integers(n_styles * len(pool), len(lines), size=len(prose))
        n = lengths[chosen]
        yield stored[np.repeat(starts[chosen] - (n.cumsum() - n), n) + np.arange(n.sum())]


def texts(seed: int, split: str, n_characters: int, **make: Any) -> Iterator[str]:
    """At least n_characters of lines, in texts of about MAX_DOCUMENT; make: of `blocks`."""
    held, length = [], 0
    for block in blocks(seed, split, **make):
        held.append(block)
        length += len(block)
        if length >= min(n_characters, MAX_DOCUMENT):
            yield np.concatenate(held).tobytes().decode()
            n_characters -= length
            held, length = [], 0
        if n_characters <= 0:
            return


def tokenizer_json(characters: str) -> str:
    """A tokenizer of single characters, in the format of the `tokenizers` library."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {c: i for i, c in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str()


def encode(text: str, characters: str) -> np.ndarray:
    """Ids of a text of these characters, as a uint16 array."""
    table = np.zeros(128, dtype=np.uint16)
    table[[ord(c) for c in characters]] = range(len(characters))
    return table[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]


def given_thoughts(text: str, n: int, steps: Callable[[str], str]) -> list[tuple[int, str]]:
    """(index of the last `=`, steps) of the first n problems of a text."""
    lines = islice(re.finditer(rf"^([{LETTERS}{re.escape(SIGNS)}]+)=+", text, re.M), n)
    return [(line.end() - 1, steps(line[1])) for line in lines]


def prepare(folder: str | Path, *, seed: int, n_train: int, n_val: int, thoughts: int = 0,
            **make: Any) -> None:
    """The corpus as a prepared folder, a document a split (MAX_DOCUMENT allowing).

    n_train, n_val: characters, at least.  thoughts: given ones, of the first document.  make: the
    arguments of `blocks`.
    """
    characters = vocabulary(make["operations"], make["ordinary"])
    splits = {split: (encode(text, characters) for text in texts(seed, split, n, **make))
              for split, n in (("train", n_train), ("val", n_val))}
    given, source = [], {"corpus": "fold", "seed": seed, **make}
    if thoughts:
        steps = solver(seed, make["operands"], make["operations"], make.get("family", "fold"))
        first, source["thoughts"] = next(texts(seed, "train", n_train, **make)), thoughts
        given = [(i, encode(x, characters)) for i, x in given_thoughts(first, thoughts, steps)]
    write_dataset(folder, tokenizer_json(characters), len(characters), None, splits, source, given)


# ---- its answers


def find_answers(window: str) -> list[tuple[str, int, str]]:
    """Where a window's answers stand, for the problems it shows whole.

    window: its text.  Returns (style, index of the answer, problem) for every line that begins
    after the window's first newline; the answer at index k is predicted at k - 1.
    """
    found = []
    for line in re.finditer(r"(?<=\n)([a-g*+/-]+)=+(?:\(([a-g*+/-]+)\))?([a-g])(?=\n|$)", window):
        problem, aside, _ = line.groups()
        style = "direct" if aside is None else "restated" if aside == problem else "worked"
        found.append((style, line.start(3), problem))
    return found


def decode(ids: list[int], operations: int) -> str:
    """The text of ids of this corpus, with ordinary text or without: its characters come last."""
    characters = vocabulary(operations, ordinary=1.0)
    return "".join(characters[i] for i in ids)


def n_operands(problem: str) -> int:
    return sum(map(LETTERS.count, problem))


def sizes(operands: int, shortest: int | None = None, family: str = "fold") -> range:
    """How many letters problems have."""
    longest = {"chase": len(LETTERS) + 1, "sum": 2 * operands}.get(family, operands)
    return range(shortest or longest, longest + 1)


def kind_of_thought(thought: str, problem: str, steps: str) -> str:
    """worked (all the steps), useful (it ends in the answer all the same), restated, or other.

    One with room for more than the steps may open an aside and go on after it: the aside counts.
    One that opens an aside and ends a letter before it does leaves the last step to the answer.
    """
    if len(thought) > len(problem):
        thought = thought.removeprefix("(").partition(")")[0]
    elif thought.startswith("(") and len(thought) == len(steps):
        if thought[1:] == steps[:-1]:
            return "worked"
        return "restated" if thought[1:] == problem[:-1] else "other"
    if thought == steps:
        return "worked"
    if thought.endswith(steps[-1]) and set(thought) <= set(LETTERS):
        return "useful"
    return "restated" if thought == problem else "other"


def measure(scores: TextScores, *, seed: int, operands: int, operations: int,
            shortest: int | None = None, family: str = "fold",
            ) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Held-out answers with and without thoughts, and what the thoughts before direct answers are.

    scores: of windows of this corpus, choices among LETTERS.  Returns {style: {n, accuracy_base,
    accuracy_mixed, nll_base, nll_mixed, mix, problems, stderr}}, "thoughts": {kind: share},
    "mix_elsewhere": mean mixing weight off the answers; with problems of several lengths
    "by_operands": {operands: {style: {n, accuracy_base, accuracy_mixed}}}; and (window, position)
    of a few direct answers to show.  problems: different ones among the n; stderr: of
    accuracy_mixed, clustered by problem, None for one.
    """
    steps, n_positions = solver(seed, operands, operations, family), scores.base_lp.shape[1]
    known = sizes(operands, shortest, family)
    rows: dict[str, list[tuple[float, ...]]] = {}
    asked: dict[str, list[int]] = {}  # each answer's problem
    by_operands: dict[str, dict[str, list[tuple[bool, bool]]]] = {str(n): {} for n in known}
    kinds, shown = {"worked": 0, "useful": 0, "restated": 0, "other": 0}, []
    elsewhere = torch.ones_like(scores.mix, dtype=torch.bool)
    for n, ids in enumerate(scores.text.tolist()):
        for style, answer, problem in find_answers(decode(ids, operations)):
            i = answer - 1
            if i >= n_positions or n_operands(problem) not in known:
                continue
            elsewhere[n, i] = False
            asked.setdefault(style, []).append(zlib.crc32(problem.encode()))
            right = (scores.base_choice[n, i].item() == ids[answer],
                     scores.mixed_choice[n, i].item() == ids[answer])
            by_operands[str(n_operands(problem))].setdefault(style, []).append(right)
            rows.setdefault(style, []).append((
                *right, -scores.base_lp[n, i].item(), -scores.mixed_lp[n, i].item(),
                scores.mix[n, i].item()))
            if style == "direct" and scores.thoughts.shape[-1]:
                thought = decode(scores.thoughts[n, i].tolist(), operations)
                kinds[kind_of_thought(thought, problem, steps(problem))] += 1
                shown.append((n, i))
    names = ("accuracy_base", "accuracy_mixed", "nll_base", "nll_mixed", "mix")
    answers: dict[str, Any] = {
        style: {"n": len(r), **dict(zip(names, np.mean(r, axis=0).tolist()))}
        for style, r in sorted(rows.items())}
    for style, r in rows.items():
        hits, which = torch.tensor(r)[:, 1].double(), torch.tensor(asked[style])
        answers[style] |= {"problems": len(which.unique()), "stderr": standard_error(hits, which)}
    answers["thoughts"] = {kind: n / max(1, sum(kinds.values())) for kind, n in kinds.items()}
    if shortest is not None:
        answers["by_operands"] = {
            n: {style: {"n": len(r), **dict(zip(names, np.mean(r, axis=0).tolist()))}
                for style, r in sorted(of.items())} for n, of in by_operands.items()}
    answers["mix_elsewhere"] = scores.mix[elsewhere].mean().item()
    return answers, shown[:4]


@torch.no_grad()
def greedy_answers(model: QuietStar, text: torch.Tensor, n_ahead: int, *, seed: int, operands: int,
                   operations: int, shortest: int | None = None, family: str = "fold",
                   max_problems: int = 100) -> dict[str, Any]:
    """What greedy decoding from the whole vocabulary answers to different held-out problems.

    text: (n, T+A) ids of val windows.  A prompt is a window up to the `=` of a problem new to it,
    with the lines before; it is continued to the end of the line, whose last letter is the answer.
    Returns {"n": problems, "base": shares, "thoughts": shares}, the last where n_ahead > 0, shares
    of {right, direct, restated, worked, other}: how it answers, other being no line of this text.
    Empty where no window holds a problem and room for its answer.
    """
    known = sizes(operands, shortest, family)
    room = known[-1] + (operands - 1) * (operations > 1) + len("()r\n")
    found: dict[str, list[int]] = {}  # the longest prompt: as in training, lines come before it
    for ids in text.tolist():
        window = decode(ids, operations)
        for match in re.finditer(r"(?<=\n)([a-g*+/-]+)=+", window):
            problem, end = match[1], match.end()
            if (n_operands(problem) in known and end + room <= len(window)
                    and window.count(f"{problem}=", 0, end) == 1):
                found[problem] = max(found.get(problem, []), ids[:end], key=len)
    prompts = dict(sorted(found.items(), key=lambda x: -len(x[1]))[:max_problems])
    if not prompts:
        return {}
    steps_of, device = solver(seed, operands, operations, family), model.lm.head_weight.device

    def shares(n_ahead):
        steps = generate(model, list(prompts.values()), room, n_ahead, temperature=0,
                         generator=torch.Generator(device).manual_seed(seed))
        written = torch.stack([step.tokens for step in steps], dim=1)
        counts = dict.fromkeys(("right", *STYLES, "other"), 0)
        for problem, ids in zip(prompts, written.tolist()):
            line, newline, _ = decode(ids, operations).partition("\n")
            answer = find_answers(f"\n{problem}={line}") if newline else []
            counts[answer[0][0] if answer else "other"] += 1
            counts["right"] += bool(answer) and line[-1] == steps_of(problem)[-1]
        return {name: count / len(prompts) for name, count in counts.items()}

    thoughts = {"thoughts": shares(n_ahead)} if n_ahead else {}
    return {"n": len(prompts), "base": shares(0), **thoughts}


# ---- its part of what a run prints


def percentages(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def eval_line(answers: dict[str, Any]) -> str:
    """What an evaluation with thoughts adds to its line; answers: `measure`'s."""
    if "direct" not in answers:
        return ""
    direct = answers["direct"]
    return (f", direct answers right {direct['accuracy_base']:.0%} -> "
            f"{direct['accuracy_mixed']:.0%}; thoughts: {percentages(answers['thoughts'])}")


def table_rows(answers: dict[str, Any], greedy: dict[str, Any]) -> list[Row]:
    """Of the final table (`evaluate.table`); greedy: `greedy_answers`'."""
    rows = []
    for style in (style for style in STYLES if style in answers):
        a = answers[style]
        rows += [(f"{style} answers right, of the {len(LETTERS)} letters (held out, n={a['n']})",
                  f"{a['accuracy_base']:.1%}", f"{a['accuracy_mixed']:.1%}"),
                 (f"{style} answers, NLL", f"{a['nll_base']:.3f}", f"{a['nll_mixed']:.3f}")]
    if greedy:
        thoughts = f"{greedy['thoughts']['right']:.1%}" if "thoughts" in greedy else ""
        rows.insert(2, (f"right, greedily of all characters (held out, n={greedy['n']})",
                        f"{greedy['base']['right']:.1%}", thoughts))
    return rows


def remarks(answers: dict[str, Any], greedy: dict[str, Any]) -> list[str]:
    """Lines below the final table of a run with thoughts."""
    lines = []
    if "direct" in answers:
        error = answers["direct"]["stderr"]
        spread = "" if error is None else f" +- {2 * error:.1%} (2 standard errors, by problem)"
        lines += [f"direct answers with thoughts: {answers['direct']['accuracy_mixed']:.1%} right"
                  f"{spread}, {answers['direct']['problems']} different problems",
                  f"mixing weight: {answers['direct']['mix']:.2f} on direct answers, "
                  f"{answers['mix_elsewhere']:.2f} off the answers",
                  f"thoughts before direct answers: {percentages(answers['thoughts'])}"]
    for name, how in (("base", "without"), ("thoughts", "with")):
        if name in greedy:
            styles = {style: share for style, share in greedy[name].items() if style != "right"}
            lines.append(f"greedy answers {how} thoughts: {percentages(styles)}")
    return lines


def add_answers(report: Report, scores: TextScores, model: QuietStar, final: bool,
                **text: Any) -> None:
    """Adds all of this corpus's own to an evaluation; what is decoded, only at the end.

    text: seed, operands, operations, shortest, family.
    """
    answers, report.examples = measure(scores, **text)
    n_sampled, greedy = scores.thoughts.shape[-1], {}
    report.summary["answers"] = answers
    if final:
        greedy = greedy_answers(model, scores.text, n_sampled and n_sampled + 2, **text)
        report.summary["greedy"] = greedy
    report.said = eval_line(answers) if n_sampled else ""
    report.rows, report.remarks = table_rows(answers, greedy), remarks(answers, greedy)


def example_prompt(operands: int, operations: int, seed: int, family: str = "fold") -> str:
    """A held-out problem to try the model on, of as many different letters as there are."""
    return max(problems(operands, operations, seed, family)[1], key=lambda p: len(set(p))) + "="


def example(operands: int, operations: int, seed: int, family: str = "fold") -> tuple[str, str]:
    """Options of sample.py that have a problem answered, and the right answer."""
    prompt = example_prompt(operands, operations, seed, family)
    answer = solver(seed, operands, operations, family)(prompt[:-1])[-1]
    return f" --prompt '{prompt}' --temperature 0 --max_new_tokens {len(prompt) + 3}", answer


# ---- all of it, for a run


@dataclass(frozen=True)
class Corpus:
    """The corpus of these settings (`blocks`'), with all that it adds to a run."""

    seed: int
    operands: int
    operations: int
    ordinary: float
    worked: float
    restated: float
    shortest: int | None = None
    family: str = "fold"
    thoughts: int = 0
    choices = CHOICES

    @classmethod
    def of(cls, cfg: Any) -> "Corpus | None":
        """Of train.py's settings; None where they name prepared data."""
        return cls(cfg.seed, cfg.fold_operands, cfg.fold_operations, cfg.fold_ordinary_frac,
                   cfg.fold_worked_frac, cfg.fold_restated_frac, cfg.fold_shortest,
                   cfg.fold_family, cfg.fold_thoughts) if cfg.data == "fold" else None

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(tokenizer_json(vocabulary(self.operations, self.ordinary)))

    def prepare(self, folder: Path, n_train: int, n_val: int) -> None:
        prepare(folder, n_train=n_train, n_val=n_val, **self.source())

    def source(self) -> dict[str, Any]:
        """What a prepared folder says of its text; what came later, only where it is used."""
        return {name: value for name, value in asdict(self).items()
                if (name, value) not in (("shortest", None), ("family", "fold"), ("thoughts", 0))}

    def add_answers(self, report: Report, scores: TextScores, model: QuietStar, final: bool
                    ) -> None:
        add_answers(report, scores, model, final, seed=self.seed, operands=self.operands,
                    operations=self.operations, shortest=self.shortest, family=self.family)

    def example(self) -> tuple[str, str]:
        return example(self.operands, self.operations, self.seed, self.family)
