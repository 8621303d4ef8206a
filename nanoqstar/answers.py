"""Answers that are written token by token: exact match on GSM8K, and the paper's majority of votes.

cot-maj@k: k chains of thought are sampled for a question, each ends in a number, the number that
most of them end in is the answer (paper, section 5.3; its script `zero-shotcot-eval.py`).
"""

import hashlib
import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from nanoqstar import InputError, hf, parallel
from nanoqstar.device import autocast
from nanoqstar.files import alone, plain
from nanoqstar.quietstar import QuietStar
from nanoqstar.sampling import generate
from nanoqstar.tasks import MAX_TOKENS, Questions, answer_scores, compare
from nanoqstar.tokenizer import beginning_ids, encode

ANSWER_TOKENS = 12  # that may follow `A:` in a greedy answer, or FINAL in a vote
CHAIN_TOKENS = 384  # of a chain of thought, at most
TEMPERATURE = 0.9  # it is sampled at
PROMPT = " Let's think step by step."  # after `A:`
FINAL = "\nTherefore, the answer (arabic numerals) is"
STOPS = ("Q:", "\n\n\n")  # end a chain where one occurs a second time, the question's own counted
OFFICIAL_ITEMS, TEST_ITEMS = 128, 1319

Key = tuple[int, int, bool]  # question, vote, with thoughts?

# ---- decoding many prompts


class Job(NamedTuple):
    key: Any
    ids: list[int]  # of the prompt
    n_new: int  # tokens to write at most


@torch.no_grad()
def write_on(model: QuietStar, waiting: deque[Job], n_ahead: int,
             has_ended: Callable[[Job, list[int]], bool], *, temperature: float, batch_size: int,
             generator: torch.Generator) -> Iterator[tuple[Job, list[int]]]:
    """Yields each job with the ids it has written, when it has ended, until none is `waiting`; jobs
    may be added meanwhile.

    Where half of a batch has ended, others take their places: to read a batch again costs one
    forward, to decode beside what has ended one for every token.
    """
    active: list[tuple[Job, list[int]]] = []
    while waiting or active:
        while waiting and len(active) < batch_size:
            active.append((waiting.popleft(), []))
        ended, left = [False] * len(active), max(job.n_new - len(new) for job, new in active)
        with autocast(model.lm.head_weight.device), torch.compiler.set_stance("force_eager"):
            for step in generate(model, [job.ids + new for job, new in active], left, n_ahead,
                                 temperature, generator=generator):
                for n, token in enumerate(step.tokens.tolist()):
                    if not ended[n]:
                        job, new = active[n]
                        new.append(token)
                        ended[n] = len(new) == job.n_new or has_ended(job, new)
                if 2 * sum(ended) >= len(active):
                    break
        done = [pair for pair, is_over in zip(active, ended) if is_over]
        active = [pair for pair, is_over in zip(active, ended) if not is_over]
        yield from done


def first_number(text: str) -> int | None:
    """The first run of digits once commas are gone: no sign, as in the official code."""
    found = re.search(r"\d{1,1000}", text.replace(",", ""))
    return int(found[0]) if found else None


def greedy_right(model: QuietStar, tokenizer: Tokenizer, questions: Questions, n_ahead: int,
                 n_samples: int, seed: int, batch_size: int, end_ids: Sequence[int]) -> Tensor:
    """(n, 1 + samples) float64: whether the first number of the likeliest text after `A:`, token by
    token, is the answer; without thoughts, then with them, sampled n_samples times."""
    device, own = model.lm.head_weight.device, parallel.share(len(questions.items))
    ways = [(0, 0), *((n_ahead, n) for n in range(n_samples * (n_ahead > 0)))]
    right = torch.zeros(len(own), len(ways), dtype=torch.float64)

    def has_ended(job: Job, new: list[int]) -> bool:
        return new[-1] in end_ids or bool(re.search(r"\d[\d,]*[^\d,]", tokenizer.decode(new)))

    for column, (thought, sample) in enumerate(ways):
        jobs = [Job(i, item.ids[:item.start], ANSWER_TOKENS)
                for i, item in enumerate(questions.items) if i in own]
        waiting = deque(sorted(jobs, key=lambda job: len(job.ids)))
        generator = torch.Generator(device).manual_seed(seed + sample)
        for job, new in write_on(model, waiting, thought, has_ended, temperature=0,
                                 batch_size=batch_size, generator=generator):
            right[job.key - own.start, column] = (
                first_number(tokenizer.decode(new)) == first_number(questions.texts[job.key][1]))
    return parallel.collect(right, len(questions.items))


def measure(model: QuietStar, tokenizer: Tokenizer, questions: Questions, n_ahead: int, *,
            end_ids: Sequence[int], n_samples: int = 1, seed: int = 0, batch_size: int = 16
            ) -> dict[str, Any]:
    """{"n": questions, "answer_prob": .., "exact_match": ..}, each as of `tasks.compare`.

    end_ids: that end a text. n_samples: evaluations with thoughts, each drawn anew. Raises
    InputError.
    """
    hf.check_context(model.lm.config, MAX_TOKENS + ANSWER_TOKENS + n_ahead)
    scores = answer_scores(model, questions, n_ahead, n_samples, seed, batch_size)
    right = scores[..., 1]  # the likeliest of five letters
    if questions.name == "gsm8k":
        right = greedy_right(model, tokenizer, questions, n_ahead, n_samples, seed, batch_size,
                             end_ids)
    return {"n": len(scores), "answer_prob": compare(scores[..., 0]), "exact_match": compare(right)}


# ---- votes


def official_items(n: int) -> list[int]:
    """The questions of the paper's figure, in its order; n: of the file."""
    if n != TEST_ITEMS:
        raise InputError(f"the official items are of the {TEST_ITEMS:,} questions of GSM8K's test "
                         f"set, and the file has {n:,}: leave --official_items out")
    return np.random.default_rng(42).permutation(n)[:OFFICIAL_ITEMS].tolist()


def fingerprint(model: QuietStar) -> str:
    """Of all weights: a few numbers of each, as bf16 holds them, so that any device says the same.
    """
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        some = p.detach().flatten()[::max(1, p.numel() // 64)].bfloat16().float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def identity(model: QuietStar, texts: Sequence[tuple[str, str]], n_ahead: int, seed: int
             ) -> dict[str, Any]:
    """All that votes depend on, which one file of answers has in common."""
    data = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
    return {"model": fingerprint(model), "questions": data, "n_ahead": n_ahead,
            "thought_temperature": model.thought_temperature, "reread": model.reread, "seed": seed,
            "temperature": TEMPERATURE, "tokens": [CHAIN_TOKENS, ANSWER_TOKENS]}


def begin_answers(path: Path, about: dict[str, Any]) -> None:
    """Makes the file of answers, or cuts off the half of a line that a kill has left. InputError
    where it is of other votes, or no such file: then it stays as it is."""
    data = plain(path).read_bytes() if os.path.lexists(path) else b""
    header = json.dumps(about).encode() + b"\n"
    if header.startswith(data):  # it was not there, or no more than begun
        path.write_bytes(header)
        return
    known = parsed(data.split(b"\n")[0], path)
    differs = [f"{name} {known.get(name)} there, {value} here" for name, value in about.items()
               if known.get(name) != value]
    if differs:
        raise InputError(f"{path} holds answers of another model or other settings "
                         f"({', '.join(differs)}): name another file with --answers")
    os.truncate(path, data.rfind(b"\n") + 1)


def parsed(line: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {line!r:.60}, which is no answer of ours: delete the file, "
                         "or name another with --answers")
    return value


def read_answers(path: Path) -> dict[Key, int | None]:
    """The number that each vote has ended in; None: in none."""
    answers = {}
    for line in path.read_bytes().split(b"\n")[1:-1]:
        row = parsed(line, path)
        item, vote, thoughts, answer = (row.get(x) for x in ("item", "vote", "thoughts", "answer"))
        if not (type(item) is type(vote) is int and type(thoughts) is bool
                and (answer is None or type(answer) is int)):
            raise InputError(f"{path} holds a line that is no answer ({line!r:.60}): delete it")
        answers[item, vote, thoughts] = answer
    return answers


def stop_in(text: str, prompt: str) -> str | None:
    """The stop that occurs a second time, or more often than in the prompt."""
    return next((s for s in STOPS if text.count(s) > max(1, prompt.count(s))), None)


def cast_votes(model: QuietStar, tokenizer: Tokenizer, prompts: dict[int, str], n_ahead: int,
               n_votes: int, path: Path, *, end_ids: Sequence[int], seed: int, batch_size: int
               ) -> None:
    """Appends to the answers at `path` what it lacks of n_votes votes for each question, with
    thoughts of n_ahead tokens (0: none). prompts: {question: text}. Each rank casts its share.

    Unlike the official code, which loses the first `Q:` of a chain that a second one ends, the text
    up to the second is kept as it is.
    """
    device = model.lm.head_weight.device
    # read by one rank: another that reads later finds answers of the first, and shares out less
    known = {tuple(key) for key in parallel.first(lambda: list(read_answers(path)))}
    missing = [key for i in prompts for v in range(n_votes)
               if (key := (i, v, n_ahead > 0)) not in known]
    missing = [missing[i] for i in parallel.share(len(missing))]
    begun = np.random.SeedSequence([seed, len(known), parallel.rank()]).generate_state(1)
    generator = torch.Generator(device).manual_seed(int(begun[0]))

    def job(key: Any, text: str, n_new: int) -> Job:
        ids = beginning_ids(tokenizer) + encode(tokenizer, text, f"question {key[0]}")
        hf.check_context(model.lm.config, len(ids) + n_new + n_ahead)
        return Job(key, ids, n_new)

    def written(job: Job, new: list[int]) -> str:
        return tokenizer.decode(job.ids + new)  # the newest alone would lose its space

    def has_ended(job: Job, new: list[int]) -> bool:
        tail = tokenizer.decode(new[-4:])  # the whole is decoded only where it may matter
        return new[-1] in end_ids or (any(stop in tail for stop in STOPS) and stop_in(
            written(job, new), written(job, [])) is not None)

    waiting = deque(job((*key, 0), prompts[key[0]], CHAIN_TOKENS) for key in missing)
    bar = tqdm(total=len(missing), desc=f"votes {'with' if n_ahead else 'without'} thoughts",
               unit="vote", disable=parallel.rank() > 0 or None)
    with path.open("ab", buffering=0) as file, bar:  # a line is written at once, or half of it
        for done, new in write_on(model, waiting, n_ahead, has_ended, temperature=TEMPERATURE,
                                  batch_size=batch_size, generator=generator):
            *key, stage = done.key
            text, prompt = written(done, new), written(done, [])
            if stop := stop_in(text, prompt):
                text = text[:text.rindex(stop)]
            if stage == 0:
                waiting.appendleft(job((*key, 1), text.rstrip() + FINAL, ANSWER_TOKENS))
                continue
            row = dict(zip(("item", "vote", "thoughts"), key),
                       answer=first_number(text[len(prompt):]), text=text)
            file.write(json.dumps(row).encode() + b"\n")
            bar.update()


def majority(numbers: Sequence[int | None]) -> int | None:
    """What most votes say, the first of those that are said as often; no answer is one, too."""
    return Counter(numbers).most_common(1)[0][0]


def vote(model: QuietStar, tokenizer: Tokenizer, texts: Sequence[tuple[str, str]],
         chosen: Sequence[int], n_ahead: int, n_votes: int, path: Path, *, end_ids: Sequence[int],
         seed: int, batch_size: int) -> dict[str, Any]:
    """{"n": questions, "maj@1": .., .. "maj@k": ..}, each as of `tasks.compare`, of GSM8K's `texts`
    those `chosen`; k: the first k votes. Answers are kept at `path` as they come, and never
    computed again. Raises InputError.
    """
    ways = (0, n_ahead) if n_ahead else (0,)
    prompts = {i: texts[i][0] + PROMPT for i in chosen}
    parallel.first(os.makedirs, path.parent, 0o777, True)
    with parallel.firsts(alone(path)):
        parallel.first(begin_answers, path, identity(model, texts, n_ahead, seed))
        for k in ways:
            cast_votes(model, tokenizer, prompts, k, n_votes, path, end_ids=end_ids, seed=seed,
                       batch_size=batch_size)
            parallel.exchange(None)  # until all ranks have written theirs
    known, found = read_answers(path), dict[str, Any](n=len(chosen))
    for k in range(1, n_votes + 1):
        right = [[majority([known[i, v, way > 0] for v in range(k)]) == first_number(texts[i][1])
                  for way in ways] for i in chosen]
        found[f"maj@{k}"] = compare(torch.tensor(right))
    return found
