"""Which tokens thoughts should begin and end with, or how long they should be where delimiters
re-read: choices ranked by what the mixing head makes of their untrained thoughts.

A choice is worth starting from where its thoughts already help, which the gain of a head trained
for it shows, and where they help unequally, which REINFORCE lives on: the spread of the advantages.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from nanoqstar.dataset import TokenDataset
from nanoqstar.device import autocast
from nanoqstar.evaluate import standard_error
from nanoqstar.head import weighted_log_probs
from nanoqstar.objective import Valid, advantage
from nanoqstar.quietstar import QuietStar, uniforms

Windows = tuple[torch.Tensor, torch.Tensor]  # text and document ids, (n, T + 1) each
UPDATES, ROWS, LEARNING_RATE = 100, 512, 1e-3  # of the mixing head: more, and it learns by heart


@dataclass(frozen=True)
class Outcome:
    """Of a choice, on windows its head has not seen; nats."""

    choice: tuple[int, ...]  # ids of start and end; or n_ahead
    gain: float  # a token
    stderr: float | None  # of it, clustered by window
    spread: float  # root mean square of the advantages


def frequent_marks(data: TokenDataset, tokenizer: Tokenizer, n: int) -> list[int]:
    """The n tokens without letters and digits that the data's first million has most of."""
    text, _ = data.windows([0], min(data.n_tokens, 2**20))
    ids = (i for i, _ in Counter(text[0].tolist()).most_common()
           if not any(c.isalnum() or c == "\ufffd" for c in tokenizer.decode([i])))
    return [i for i, _ in zip(ids, range(n))]


@torch.no_grad()
def sample(model: QuietStar, windows: Windows, n_ahead: int, n_passes: int, seed: int,
           batch_size: int) -> torch.Tensor:
    """Thoughts (n, P, T, S) at the model's start embedding."""
    text, docs = windows
    device, shape = model.lm.head_weight.device, (n_passes, text.shape[1] - 1, n_ahead - 2)
    thoughts = []
    for first in range(0, len(text), batch_size):
        x, d = (t[first:first + batch_size].to(device) for t in (text, docs))
        u = uniforms(seed, "eval", 0, range(first, first + len(x)), shape).to(device)
        thoughts.append(model.rollout(x, d, u)[0])
    return torch.cat(thoughts)


@torch.no_grad()
def states(model: QuietStar, windows: Windows, thoughts: torch.Tensor, batch_size: int
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of text alone (n, 1, T, D) and after the thoughts (n, P, T, D)."""
    (text, docs), apart = windows, []
    for first in range(0, len(text), batch_size):
        rows = slice(first, first + batch_size)
        x, d = (t[rows].to(thoughts.device) for t in (text, docs))
        with autocast(x.device):
            base, _, talk = model.hidden_states(x, d, thoughts[rows])
        apart.append((base[:, None], talk[:, :, :, 0]))
    base, talk = (torch.cat(x) for x in zip(*apart, strict=True))
    return base, talk


def fit(model: QuietStar, base: torch.Tensor, talk: torch.Tensor, targets: torch.Tensor, seed: int
        ) -> None:
    """Trains the mixing head alone to predict targets (n,) from base and talk (n, D)."""
    head, generator = model.mixing_head, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    weight = model.lm.head_weight.detach()
    for _ in range(UPDATES):
        rows = torch.randint(len(targets), (min(ROWS, len(targets)),), generator=generator)
        h, g, y = (x[rows.to(x.device)] for x in (base, talk, targets))
        mixed = h + head(head.base_half(h), g) * (g - h)
        optimizer.zero_grad()
        weighted_log_probs(mixed, weight, y, torch.full_like(mixed[:, 0], -1 / len(y)),
                           exact=True)[0].backward()
        optimizer.step()


@torch.no_grad()
def assess(model: QuietStar, windows: Windows, base: torch.Tensor, talk: torch.Tensor
           ) -> tuple[float, float | None, float]:
    """Gain, its standard error and the spread of the advantages; base, talk: of `states`."""
    (text, docs), head, weight = windows, model.mixing_head, model.lm.head_weight
    mixed = base + head(head.base_half(base), talk) * (talk - base)
    targets = text[:, None, 1:].to(talk.device)

    def log_probs(hidden):
        ids = targets.expand(hidden.shape[:-1]).flatten()
        rows = hidden.flatten(0, -2)
        return weighted_log_probs(rows, weight, ids, torch.zeros_like(rows[:, 0]), exact=True
                                  )[1].view(hidden.shape[:-1])

    gain = (log_probs(mixed) - log_probs(base)).double().cpu()  # (n, P, T)
    valid = Valid.from_docs(docs, 1).base
    spread = advantage(gain, valid, clamp=False).square().sum() / (valid.sum() * gain.shape[1])
    gain = gain.mean(1)[valid]
    return gain.mean().item(), standard_error(gain, valid.nonzero()[:, 0]), math.sqrt(spread)


def judge(model: QuietStar, train: Windows, val: Windows, thoughts: Sequence[torch.Tensor],
          seed: int, batch_size: int) -> tuple[float, float | None, float]:
    """Trains the model's fresh mixing head on the thoughts of train, and assesses it on val's."""
    valid = Valid.from_docs(train[1], 1).base.to(model.lm.head_weight.device)[:, None]
    base, talk = states(model, train, thoughts[0], batch_size)
    chosen = valid.expand(talk.shape[:-1])
    targets = train[0][:, None, 1:].to(talk.device).expand(talk.shape[:-1])
    fit(model, base.expand_as(talk)[chosen], talk[chosen], targets[chosen], seed)
    return assess(model, val, *states(model, val, thoughts[1], batch_size))


def search(model: QuietStar, train: Windows, val: Windows, candidates: Sequence[int], n_ahead: int,
           n_passes: int, seed: int, batch_size: int) -> Iterator[Outcome]:
    """Every pair of candidates, as start and end; the model's own delimiters and head are lost."""
    model.requires_grad_(False).mixing_head.requires_grad_(True)
    model.reread = False
    for start in candidates:
        model.init_thoughts([start], [start])
        thoughts = [sample(model, windows, n_ahead, n_passes, seed + i, batch_size)
                    for i, windows in enumerate((train, val))]
        for end in candidates:
            model.init_thoughts([start], [end], seed)
            yield Outcome((start, end), *judge(model, train, val, thoughts, seed, batch_size))


def lengths(model: QuietStar, train: Windows, val: Windows, longest: int, n_passes: int, seed: int,
            batch_size: int) -> Iterator[Outcome]:
    """Every n_ahead up to `longest` with delimiters that re-read; its own are lost, too."""
    model.requires_grad_(False).mixing_head.requires_grad_(True)
    model.reread = True
    for n_ahead in range(3, longest + 1):
        model.init_thoughts([], [], seed)
        thoughts = [sample(model, windows, n_ahead, n_passes, seed + i, batch_size)
                    for i, windows in enumerate((train, val))]
        yield Outcome((n_ahead,), *judge(model, train, val, thoughts, seed, batch_size))
