"""The heat map: held-out text, each token in the colour of what the thoughts before it gained, and
those thoughts, as HTML that needs no script (its colours are in report.css)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from nanoqstar import InputError, hf
from nanoqstar.charts import clean, signed
from nanoqstar.dataset import TokenDataset
from nanoqstar.device import autocast, pick_threads
from nanoqstar.evaluate import TextScores, score_text
from nanoqstar.head import fp32_logits, row_chunks
from nanoqstar.objective import Objective, Valid, quiet_star_loss
from nanoqstar.quietstar import QuietStar, Rollout, draw_from, uniforms
from nanoqstar.tokenizer import encode, load_tokenizer

N_LIKELIEST = 4  # tokens shown of a prediction
HALF = "\ufffd"  # what decoders put for bytes that are no character

# ---- what its model does


@dataclass
class Window:
    """The start of a val window, thought about as in training; T positions, P passes; nats."""

    ids: list[int]  # T + 1
    valid: list[bool]  # (T,): x_{i+1} is of x_i's document
    thoughts: list[list[list[int]]]  # (P, T, S)
    base_lp: torch.Tensor  # (T,) of x_{i+1}
    mixed_lp: torch.Tensor  # (P, T)
    reward: torch.Tensor  # (P, T) summed over the lookahead
    mix: torch.Tensor  # (P, T)
    without: list[list[tuple[int, float]]]  # (T, N_LIKELIEST): likeliest ids, probabilities
    having: list[list[tuple[int, float]]]  # the same of the mixed prediction, mean over passes


@dataclass
class Seen:
    """What was looked at."""

    step: int
    tokenizer: Tokenizer
    scores: TextScores  # of the windows that the run evaluates on, a thought a position
    windows: list[Window]


def likeliest(hidden: torch.Tensor, head: torch.Tensor) -> list[list[tuple[int, float]]]:
    """hidden: (P, T, D). N_LIKELIEST (id, mean probability over P) for each position."""
    found = []
    for rows in row_chunks(hidden.shape[1], len(head) * len(hidden), hidden.device):
        logits = fp32_logits(hidden[:, rows].flatten(0, 1), head)
        probs = logits.softmax(-1).unflatten(0, (len(hidden), -1)).mean(0)
        top = probs.topk(min(N_LIKELIEST, len(head)))
        found += [list(zip(i, p)) for i, p in zip(top.indices.tolist(), top.values.tolist())]
    return found


@torch.no_grad()
def think(model: QuietStar, text: torch.Tensor, docs: torch.Tensor, u: torch.Tensor,
          sampler: Rollout) -> Window:
    """text, docs: (1, T+A). u: (1, P, T, S), what the thoughts are drawn with."""
    head, valid = model.lm.head_weight, Valid.from_docs(docs, text.shape[1] - u.shape[2])
    with autocast(head.device):
        thoughts, _ = sampler(text, docs, u)
        states = model.score(text, docs, thoughts)
        none = Objective(policy_weight=0.0)  # the outcome alone is wanted
        outcome = quiet_star_loss(states, head, text, thoughts, valid, valid.counts(), none)[2]
        without = likeliest(states.base[:, :u.shape[2]], head)
        having = likeliest(states.mixed[0, :, :, 0], head)
    return Window(text[0, :u.shape[2] + 1].tolist(), valid.base[0].tolist(), thoughts[0].tolist(),
                  outcome.base_lp[0, :u.shape[2]].cpu(), outcome.mixed_lp[0, ..., 0].cpu(),
                  outcome.reward[0].cpu(), states.mix[0, ..., 0].cpu(), without, having)


def look(folder: Path, made: Any, n_tokens: int, seed: int, device: torch.device) -> Seen:
    """Has a run's model think about its val split. made: the run's settings, of TrainConfig.
    InputError: what is missing."""
    model, tokenizer, settings = hf.load_thinker(folder, device)
    thinking = settings.thinking
    if not thinking.n_ahead:
        raise InputError("the model saved last was not taught to think yet")
    pick_threads(None, model.lm.config.hidden_size)
    val = TokenDataset(folder / "data" if made.data == "fold" else made.data, "val")
    if load_tokenizer(val.tokenizer_path.parent).to_str() != tokenizer.to_str():
        raise InputError(f"the data in {val.tokenizer_path.parent} are not those of the run")
    n_talk = thinking.n_ahead_talk
    hf.check_context(model.lm.config, made.max_length + n_talk + thinking.n_ahead)
    sampler = model.rollout if made.thoughts_from is None else draw_from(
        encode(tokenizer, made.thoughts_from, "thoughts_from"))
    text, docs = val.evenly(made.eval_windows, made.max_length + n_talk)
    scores = score_text(model, text, docs, thinking.n_ahead, n_talk, seed=seed,
                        batch_size=made.batch_size, sampler=sampler)
    length = min(made.max_length, n_tokens)
    n, windows = max(1, min(len(text), n_tokens // length)), []
    for i in (k * len(text) // n for k in range(n)):
        u = uniforms(seed, "eval", 0, [i], (made.n_passes, length, thinking.n_ahead - 2))
        x, d = (part[i:i + 1, :length + n_talk].to(device) for part in (text, docs))
        windows.append(think(model, x, d, u.to(device), sampler))
    return Seen(settings.step, tokenizer, scores, windows)


# ---- tokens as text


def visible(text: str) -> str:
    """As HTML in which spaces and ends of lines are seen."""
    marks = {" ": "<i>·</i>", "\n": "<i>↵</i>", "\t": "<i>→</i>"}
    return "".join(marks.get(c) or clean(c) for c in text)


def following(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ids after those `before`: decoders take spaces off what begins a text."""
    whole, first, alone = (tokenizer.decode(list(x), skip_special_tokens=False)
                           for x in ((*before, *ids), before, ids))
    return (whole.startswith(first) and whole[len(first):]) or alone


def pieces(tokenizer: Tokenizer, ids: Sequence[int], most: int = 8) -> list[tuple[int, str]]:
    """(number of tokens, their text): one each, but where only several make whole characters."""
    found: list[tuple[int, str]] = []
    start, before = 0, list(ids[:1])
    while start < len(ids):
        for n in range(1, min(most, len(ids) - start) + 1):
            if HALF not in tokenizer.decode(list(ids[start:start + n]), skip_special_tokens=False):
                break
        else:
            n = 1  # bytes that are no character, as a window may begin with
        unit = list(ids[start:start + n])
        found.append((n, following(tokenizer, before, unit)))
        start, before = start + n, unit
    return found


def named(tokenizer: Tokenizer, before: int, token: int) -> str:
    """A token as HTML; one that is part of a character, or none at all, by its id."""
    text = following(tokenizer, [before], [token])
    return visible(text) if text and HALF not in text else f"{HALF}{token}"


# ---- the heat map


def percent(p: float) -> str:
    return f"{p:.0%}" if p >= 0.1 or p == 0 else f"{p:.1%}" if p >= 0.001 else "&lt;0.1%"


def candidates(tokenizer: Tokenizer, title: str, before: int,
               found: Sequence[tuple[int, float]]) -> str:
    return f'<span class="c"><span class="q">{title}</span>' + "".join(
        f'<span class="p" style="--p:{p:.0%}"><b>{named(tokenizer, before, token)}</b>'
        f"<span>{percent(p)}</span></span>" for token, p in found) + "</span>"


def details(seen: Seen, window: Window, i: int, context: str, first: bool) -> str:
    """What the thoughts at position i did to the token after it; less of it, where that is not the
    first token of a character."""
    base, mixed = window.base_lp[i].item(), window.mixed_lp[:, i]
    before, words = window.ids[i], seen.tokenizer
    rows = "".join(
        f"<b>{visible(following(words, [before], thought[i]))}</b><span>{signed(g)}</span>"
        f"<span>{signed(r)}</span><span>{signed(w, 2)}</span>"
        for thought, g, r, w in zip(window.thoughts, (mixed - base).tolist(),
                                    window.reward[:, i].tolist(), window.mix[:, i].tolist()))
    head = "".join(f'<span class="q">{name}</span>' for name in (
        "thought", "gain", "reward", "weight"))
    likely = (candidates(words, "without", before, window.without[i])
              + candidates(words, "with thoughts", before, window.having[i]))
    return (f'<span class="w"><span>{f"<i>{visible(context[-24:])}</i> " * first}'
            f"<b>{named(words, before, window.ids[i + 1])}</b></span> "
            f"<span>{percent(math.exp(base))} → {percent(mixed.exp().mean().item())}</span></span>"
            f'<span class="r">{head * first}{rows}</span>'
            + f'<span class="l">{likely}</span>' * first)


def shade(gain: float, low: float, high: float) -> float:
    """The paper's opacity: 0 up to the median |gain|, 1 from the 95th percentile on."""
    return min(max((abs(gain) - low) / max(high - low, 1e-12), 0.0), 1.0)


def heat_map(seen: Seen) -> tuple[str, float, float]:
    """(HTML, median and 95th percentile of |gain|): each unit of text in the colour of its gain,
    that of its tokens together, mean over passes."""
    units = []  # (window, first token, tokens, text, gain)
    for w in seen.windows:
        gains, start = (w.mixed_lp.mean(0) - w.base_lp).tolist(), 0
        for n, text in pieces(seen.tokenizer, w.ids):
            known = [i for i in range(start - 1, start + n - 1) if i >= 0 and w.valid[i]]
            units.append((w, known, text, sum(gains[i] for i in known)))
            start += n
    sizes = torch.tensor([abs(gain) for _, known, _, gain in units if known], dtype=torch.double)
    low, high = (sizes.quantile(q).item() if len(sizes) else 0.0 for q in (0.5, 0.95))
    body, context, last = [], "", None
    for k, (w, known, text, gain) in enumerate(units):
        if w is not last:
            body.append("</div>\n" * bool(last) + '<div class="win" dir="auto">')
            context, last = "", w
        body.append("<wbr>" if text[:1].isspace() else "")
        written = visible(text).replace("↵</i>", "↵</i><br>")
        if known:
            depth = shade(gain, low, high)
            colour = f' style="--a:{depth:.2f}"' if depth >= 0.005 else ""
            tips = "".join(details(seen, w, i, context, i == known[0]) for i in known)
            body.append(f'<span class="t {"g" if gain > 0 else "y"}"{colour} id="t{k}" '
                        f'tabindex="0" aria-describedby="d{k}">{written}<span class="d" '
                        f'id="d{k}" role="tooltip">{tips}</span></span>')
        else:
            body.append(f'<span class="n">{written}</span>')
        context += text
    return "".join(body) + "</div>", low, high
