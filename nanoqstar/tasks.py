"""GSM8K and CommonsenseQA, zero-shot, as the paper measures them, with thoughts beside without.

`answer_prob` is what the paper calls accuracy: the probability of the right answer, each token of
it renormalised over those that an answer may consist of. Exact match stands beside it.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer
from torch import Tensor

from nanoqstar import InputError, parallel
from nanoqstar.attention import dense
from nanoqstar.device import autocast
from nanoqstar.files import plain
from nanoqstar.head import compute_dtype, fp32_logits, sample_tokens
from nanoqstar.hub import fetch
from nanoqstar.quietstar import QuietStar, uniforms
from nanoqstar.qwen2 import KVCache
from nanoqstar.tokenizer import beginning_ids, encode

MAX_TOKENS = 256  # of a text; of a longer one the end, the official code takes any such window
RESAMPLES = 2000  # of a bootstrap

# ---- the questions


class Task(NamedTuple):
    """Where its questions are on the Hub, and what its answers consist of."""

    repo: str
    revision: str
    file: str
    sha256: str
    symbols: str  # that count in an answer, a token each; the newline that ends it does, too
    texts: Callable[[Any], tuple[str, str]]  # row -> the text up to `A:`, and what follows


def gsm8k_texts(row: Any) -> tuple[str, str]:
    _, answer = row["answer"].rsplit("####", 1)
    if type(row["question"]) is not str or not any(c in "0123456789" for c in answer):
        raise ValueError
    return f"Q: {row['question']}\nA:", f"{answer}\n"


def commonsense_qa_texts(row: Any) -> tuple[str, str]:
    choices, key = row["choices"], row["answerKey"]
    pairs = list(zip(choices["label"], choices["text"], strict=True))
    lines = [f"({label}) {text}\n" for label, text in pairs]
    if (not all(type(x) is str for x in (row["question"], *sum(pairs, ())))
            or not isinstance(choices["text"], list) or key not in choices["label"]
            or key not in [*"ABCDE"]):
        raise ValueError
    return f"Q: {row['question']}\n{''.join(lines)}A:", f" {key}\n"


TASKS = {
    "gsm8k": Task(
        "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866",
        "main/test-00000-of-00001.parquet",
        "ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59", "0123456789",
        gsm8k_texts),
    "commonsense_qa": Task(
        "tau/commonsense_qa", "94630fe30dad47192a8546eb75f094926d47e155",
        "data/validation-00000-of-00001.parquet",
        "bdbd9bf9cc4d2349b24901038b2ab2f58e10e4e507ad2fd425dca55cd3cb6660", "ABCDE",
        commonsense_qa_texts)}
SCHEMA = {"gsm8k": "question and answer (a text with #### and a number)",
          "commonsense_qa": "question, choices {label, text} and answerKey (A to E; the test split "
          "has none)"}


def read_rows(path: str | Path) -> list[Any]:
    """Rows of a .parquet, or of JSON lines; either may be gzipped. InputError: it has none."""
    name = str(path).lower()
    try:
        with open(plain(path), "rb") as raw, gzip.open(raw) if name.endswith(".gz") else raw as f:
            if not name.removesuffix(".gz").endswith(".parquet"):
                return [json.loads(line) for line in f if line.strip()]
            try:
                from pyarrow.parquet import ParquetFile
            except ImportError:
                raise InputError("reading .parquet needs pyarrow: pip install -e '.[data]'"
                                 ) from None
            return ParquetFile(f).read().to_pylist()
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as .parquet or JSON lines: {error}") from None


def read_texts(name: str, source: str | None = None) -> list[tuple[str, str]]:
    """(text up to `A:`, the answer after it) of every question of a task, from a file of the Hub's
    schema, else from the Hub: this revision, this sum. Raises InputError."""
    task, path = TASKS[name], source
    if path is None:
        try:
            path = fetch(hf_hub_download, task.repo, task.file, repo_type="dataset",
                         revision=task.revision)
        except InputError as error:
            raise InputError(f"{error}, or a copy of its {task.file} (--input FILE, in training "
                             f"--eval_tasks {name}=FILE)") from None
        if hashlib.sha256(Path(path).read_bytes()).hexdigest() != task.sha256:
            raise InputError(f"{path} is not the file that {task.repo} has published: delete it "
                             "and try again")
    texts = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            texts.append(task.texts(row))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}, row {number}: {name} needs {SCHEMA[name]}") from None
    if not texts:
        raise InputError(f"{path} holds no questions")
    return texts


@dataclass
class Item:
    """A question's tokens, and the tokens of its answer that count."""

    ids: list[int]
    start: int  # of the answer
    rows: list[int]  # positions before the tokens that count
    targets: list[int]  # those tokens' places among the allowed ones


@dataclass
class Questions:
    """A task's questions under a tokenizer."""

    name: str
    items: list[Item]
    allowed: list[int]  # ids of the symbols and of the newline
    texts: list[tuple[str, str]]


def tokens_of(tokenizer: Tokenizer, question: str, answer: str, name: str) -> tuple[list[int], int]:
    """Ids of a text that begins with the question, and where those of the answer begin."""
    encode(tokenizer, question, name)  # for its sentence
    encoded, before = tokenizer.encode(question + answer, add_special_tokens=False), [
        *beginning_ids(tokenizer)]
    start = next((i for i, (_, end) in enumerate(encoded.offsets) if end > len(question)),
                 len(encoded))
    return before + encoded.ids, len(before) + start


def allowed_ids(tokenizer: Tokenizer, name: str) -> list[int]:
    """Ids of a task's symbols and of the newline, each one token as the answer to a question."""
    found = []
    for symbol in TASKS[name].symbols:
        ids, start = tokens_of(tokenizer, "Q: \nA:", f" {symbol}\n", name)
        pair = ids[max(start, len(ids) - 2):]
        if [tokenizer.decode([i]).strip(" ") for i in pair] != [symbol, "\n"]:
            raise InputError(f"{name} cannot be scored with this tokenizer: as an answer, {symbol} "
                             "and the newline after it must be a token each; evaluate text instead")
        found.append(pair)
    return [*(symbol for symbol, _ in found), found[0][1]]


def encode_item(tokenizer: Tokenizer, question: str, answer: str, allowed: Sequence[int],
                name: str) -> Item:
    """InputError where the answer's symbols are not a token each: digits that are merged, say."""
    ids, start = tokens_of(tokenizer, question, answer, name)
    cut = max(0, len(ids) - MAX_TOKENS)
    ids, start = ids[cut:], start - cut
    counted = [i for i in range(max(1, start), len(ids)) if ids[i] in allowed]
    symbols = [TASKS[name].symbols.find(c) for c in answer if c in TASKS[name].symbols]
    targets = [allowed.index(ids[i]) for i in counted]
    if not symbols or targets != [*symbols, len(allowed) - 1]:
        raise InputError(f"{name} cannot be scored with this tokenizer: it does not make the "
                         f"answer {answer.strip()!r:.60} one token for each of "
                         f"{TASKS[name].symbols} (it merges them?); evaluate text instead")
    return Item(ids, start, [i - 1 for i in counted], targets)


def read_questions(name: str, tokenizer: Tokenizer, source: str | None = None,
                   limit: int | None = None) -> Questions:
    """The first `limit` questions of a task. Raises InputError, sooner for the tokenizer."""
    allowed = allowed_ids(tokenizer, name)
    texts = read_texts(name, source)[:limit]
    items = [encode_item(tokenizer, *text, allowed, name) for text in texts]
    if len(items) < parallel.size():
        raise InputError(f"{parallel.size()} processes cannot share {len(items)} questions of "
                         f"{name}: start fewer")
    return Questions(name, items, allowed, texts)


# ---- the probability of an answer


@torch.no_grad()
def think_at(model: QuietStar, text: Tensor, at: Tensor, u: Tensor) -> Tensor:
    """Hidden states that predict the tokens after positions `at` (B, R) of text (B, N), padded on
    the right: without a thought, and with each of P, drawn by u (B, P, R, S): (B, 1 + P, R, D).

    Every token is computed once, in S + 1 forwards over one cache: text and start, t_1 .. and t_S
    with end. Nobody thinks where nothing is asked.
    """
    (n_windows, n_text), (n_passes, n_rows, n_sampled) = text.shape, u.shape[1:]
    n_groups, lm = n_passes * n_rows, model.lm
    slot = torch.arange(n_text + n_groups * (n_sampled + 2), device=text.device)
    owner = torch.where(slot < n_text, -1, (slot - n_text) % max(1, n_groups))
    place = slot[:n_text].expand(n_windows, -1)
    seen = torch.cat((place, at.repeat(1, n_passes * (n_sampled + 2))), 1)  # the last text position
    step = torch.arange(1, n_sampled + 3, device=text.device).repeat_interleave(n_groups)
    if model.reread:  # neither start nor end takes a position of its own
        step = step - 1 - (step == n_sampled + 2).long()
    positions = torch.cat((place, seen[:, n_text:] + step), 1)
    x = lm.embed(text)
    cache = KVCache(lm.config, n_windows, len(slot), text.device, compute_dtype(x))
    asked = at.repeat(1, n_passes)[..., None].expand(-1, -1, x.shape[-1])
    start = model.delimiter(model.start_embedding, x.gather(1, asked))

    def forward(x: Tensor, first: int) -> Tensor:
        """Of x, which fills the slots from `first` on."""
        stop = first + x.shape[1]
        cache.slots, key = slot[first:stop], slot[:stop]
        own = (owner[:stop] == owner[first:stop, None]) & (key <= slot[first:stop, None])
        mask = torch.where(key < n_text, key <= seen[:, first:stop, None], own)[:, None]
        return lm(x, positions[:, first:stop],
                  lambda q, k, v: dense(mask)(q, k[:, :, :stop], v[:, :, :stop]), cache)

    with torch.compiler.set_stance("force_eager"):  # every batch has a shape of its own
        hidden = forward(torch.cat((x, start), 1), 0)
        base = hidden[:, :n_text].gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))[:, None]
        if not n_groups:
            return base
        for k in range(n_sampled):
            ids, _ = sample_tokens(hidden[:, -n_groups:].flatten(0, 1), lm.head_weight,
                                   u[..., k].reshape(-1, 1), model.thought_temperature,
                                   model.banned)
            x = lm.embed(ids.view(n_windows, n_groups))
            if k == n_sampled - 1:
                x = torch.cat((x, model.delimiter(model.end_embedding, x)), 1)
            hidden = forward(x, n_text + (k + 1) * n_groups)
    talk = hidden[:, -n_groups:].unflatten(1, (n_passes, n_rows))
    mix = model.mixing_head(model.mixing_head.base_half(base), talk)
    return torch.cat((base.to(mix.dtype), base + mix * (talk - base)), 1)


@torch.no_grad()
def answer_scores(model: QuietStar, questions: Questions, n_ahead: int, n_samples: int, seed: int,
                  batch_size: int) -> Tensor:
    """(n, 1 + samples, 2) float64: the probability of each answer, and whether its first symbol is
    the likeliest; without thoughts, then with one thought each, n_samples times.

    The product, over the tokens after the last `A:` that are allowed, of their probability among
    the allowed ones; others (a space, a comma, a minus) are skipped, the newline at the end counts
    (official `compute_metrics`). Each rank scores its share of the questions. A question's thoughts
    do not depend on the others.
    """
    device, n_passes = model.lm.head_weight.device, n_samples * (n_ahead > 0)
    own = parallel.share(len(questions.items))
    scores = torch.zeros(len(own), 1 + n_passes, 2, dtype=torch.float64)
    order = sorted(own, key=lambda i: [len(x) for x in (questions.items[i].rows,
                                                        questions.items[i].ids)])  # little padding
    for first in range(0, len(order), batch_size):
        index = order[first:first + batch_size]
        items = [questions.items[i] for i in index]
        n_text, n_rows = (max(map(len, x)) for x in zip(*((i.ids, i.rows) for i in items)))
        text = torch.zeros(len(items), n_text - 1, dtype=torch.long)  # the newline predicts nothing
        at, target = torch.zeros(2, len(items), n_rows, dtype=torch.long)
        counts = torch.arange(n_rows) < torch.tensor([len(item.rows) for item in items])[:, None]
        u = torch.zeros(len(items), n_passes, n_rows, max(0, n_ahead - 2))
        for n, (i, item) in enumerate(zip(index, items)):
            text[n, :len(item.ids) - 1] = torch.tensor(item.ids[:-1])
            at[n, counts[n]], target[n, counts[n]] = (
                torch.tensor(x) for x in (item.rows, item.targets))
            if n_passes:
                shape = (n_passes, len(item.rows), n_ahead - 2)
                u[n, :, :shape[1]] = uniforms(seed, "eval", 0, [i], shape)[0]
        with autocast(device):
            hidden = think_at(model, text.to(device), at.to(device), u.to(device))
            logits = fp32_logits(hidden.flatten(0, 2), model.lm.head_weight[questions.allowed])
        lp = logits.cpu().double().view(*hidden.shape[:3], -1).log_softmax(-1)
        chosen = lp.gather(-1, target[:, None, :, None].expand(-1, lp.shape[1], -1, -1))[..., 0]
        place = [i - own.start for i in index]
        scores[place, :, 0] = torch.where(counts[:, None], chosen, 0).sum(-1).exp()
        scores[place, :, 1] = (lp[:, :, 0, :-1].argmax(-1) == target[:, None, 0]).double()
    return parallel.collect(scores, len(questions.items))


# ---- what a difference is worth


def interval(values: np.ndarray) -> list[float]:
    """The bootstrap's 95% interval of the mean of values (n,), one of each question."""
    rng, n = np.random.default_rng(0), len(values)
    means = [values[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    return np.percentile(means, (2.5, 97.5)).tolist()


def compare(scores: Tensor) -> dict[str, Any]:
    """scores (n, 1 + P), of each question without thoughts and with P samples of them -> means,
    the paired difference, each with its 95% interval over questions, and `spread`: the standard
    deviation of the samples' means (None for one).
    """
    base, *samples = scores.double().numpy().T
    found = {"base": base.mean().item(), "base_interval": interval(base)}
    if samples:
        thoughts = np.mean(samples, axis=0)
        found |= {"thoughts": thoughts.mean().item(), "thoughts_interval": interval(thoughts),
                  "difference": (thoughts - base).mean().item(),
                  "difference_interval": interval(thoughts - base),
                  "spread": (np.std([x.mean() for x in samples], ddof=1).item()
                             if len(samples) > 1 else None)}
    return found


def line(name: str, found: dict[str, Any]) -> str:
    """What an evaluation during training adds to its line; found: `answers.measure`'s."""
    figures = (f"{what.replace('_', ' ')} {x['base']:.1%}"
               + (f" -> {x['thoughts']:.1%}" if "thoughts" in x else "")
               for what, x in found.items() if what != "n")
    return f"; {name} (n={found['n']}): {', '.join(figures)}"


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """What `compare` has found, by name, in per cent."""
    some = next(iter(rows.values()))
    head = f"{'':12}{'base':>9}"
    if "thoughts" in some:
        head += f"{'thoughts':>10}{'difference':>12}   95% interval"
        head += "        spread" * (some["spread"] is not None)
    lines = [title, head]
    for name, found in rows.items():
        line = f"{name:12}{found['base']:9.2%}"
        if "thoughts" in found:
            low, high = found["difference_interval"]
            line += (f"{found['thoughts']:10.2%}{found['difference']:+12.2%}   "
                     f"{f'{low:+.2%} .. {high:+.2%}':20}")
            line += "" if found["spread"] is None else f"{found['spread']:.2%}"
        lines.append(line.rstrip())
    return "\n".join(lines)
