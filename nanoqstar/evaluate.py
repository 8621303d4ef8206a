"""python -m nanoqstar.evaluate TASK --model_path MODEL [--key value ..]

What thoughts are worth, with and without in one table from one run. TASK is one of

  gsm8k, commonsense_qa  the paper's probability of the right answer, and exact match
  gsm8k --cot            the paper's majority of sampled chains of thought
  text                   each token's log-prob on held-out text, by how hard the token is
"""

import sys

from nanoqstar import InputError, cli


def read(args: list[str]) -> tuple:
    """Command line -> (settings,)."""
    try:
        from configs import EvaluateConfig
    except ModuleNotFoundError:  # installed without its scripts
        raise InputError("configs.py is not here: run this from the root of a clone") from None
    return (cli.settings(EvaluateConfig, args, str(__doc__), "task"),)


def main(args: list[str]) -> int:
    """The exit code of a command line."""
    return cli.command(args, read, "nanoqstar.worth:run")


if __name__ == "__main__":  # --help and typos are answered before torch is imported, for seconds
    sys.exit(main(sys.argv[1:]))

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from nanoqstar import parallel
from nanoqstar.device import autocast
from nanoqstar.head import fp32_logits, weighted_log_probs
from nanoqstar.objective import Valid
from nanoqstar.quietstar import QuietStar, uniforms

Row = tuple[str, str, str]  # of the final table: what, without thoughts, with thoughts


@dataclass
class TextScores:
    """Per thinking position of n windows, one sampled thought each; nats."""

    text: torch.Tensor  # (n, T+A) ids
    valid: torch.Tensor  # (n, T) bool: x_{i+1} is of x_i's document
    whole: torch.Tensor  # (n, T) bool: the whole lookahead is
    base_lp: torch.Tensor  # (n, T) of x_{i+1} without a thought
    mixed_lp: torch.Tensor  # (n, T) with the thought at i
    reward: torch.Tensor  # (n, T) mixed - base log-prob, summed over the lookahead
    mix: torch.Tensor  # (n, T) mixing weight for x_{i+1}
    thoughts: torch.Tensor  # (n, T, S) ids
    sampled_lp: torch.Tensor  # (n, T, S) they were sampled with
    base_choice: torch.Tensor  # (n, T) likeliest of `choices` for x_{i+1}; zeros if none were given
    mixed_choice: torch.Tensor  # (n, T)


@torch.no_grad()
def score_text(model: QuietStar, text: torch.Tensor, docs: torch.Tensor, n_ahead: int,
               n_ahead_talk: int, *, seed: int = 0, batch_size: int = 16,
               sampler: Callable | None = None, choices: Iterable[int] | None = None) -> TextScores:
    """Scores windows with one thought per position (on the CPU); n_ahead 0: without thoughts. Each
    rank scores its share of them, and all get all.

    text, docs: (n, T+A) int64.  sampler(text, docs, uniforms) -> thoughts, log-probs; default the
    model's rollout.  choices: ids among which base_choice and mixed_choice choose.
    """
    head, n_positions = model.lm.head_weight, text.shape[1] - n_ahead_talk
    ids = None if choices is None else torch.tensor(list(choices), device=head.device)

    def log_probs(hidden, targets):
        rows = hidden.flatten(0, -2)
        no_weight = torch.zeros_like(rows[:, 0])
        lp = weighted_log_probs(rows, head, targets.flatten(), no_weight, exact=True)[1]
        return lp.view(targets.shape)

    def likeliest(hidden):
        if ids is None:
            return torch.zeros(hidden.shape[:-1], dtype=torch.long)
        with torch.autocast(head.device.type, enabled=False):  # bf16 would round near ties
            logits = fp32_logits(hidden.flatten(0, 1), head[ids])
        return ids[logits.argmax(-1)].view(hidden.shape[:-1])

    batches, own = [], parallel.share(len(text))
    for start in own[::batch_size]:
        x, d = (t[start:min(start + batch_size, own.stop)].to(head.device) for t in (text, docs))
        valid, shape = Valid.from_docs(d, n_ahead_talk), (1, n_positions, max(0, n_ahead - 2))
        with autocast(head.device):
            if n_ahead:
                u = uniforms(seed, "eval", 0, range(start, start + len(x)), shape).to(head.device)
                thoughts, sampled_lp = (sampler or model.rollout)(x, d, u)
                states = model.score(x, d, thoughts)
                base, mixed, mix = states.base, states.mixed[:, 0], states.mix[:, 0]
            else:
                base = model.text_states(x[:, :-1], d)
                mixed = base.unfold(1, n_ahead_talk, 1).movedim(-1, 2)
                mix = base.new_zeros(mixed.shape[:-1])
                thoughts, sampled_lp = x.new_zeros(len(x), *shape), base.new_zeros(len(x), *shape)
            base_lp = log_probs(base, x[:, 1:])
            base_ahead = base_lp.unfold(1, n_ahead_talk, 1)  # (B, T, A): the same targets as mixed
            mixed_lp = log_probs(mixed, x[:, 1:].unfold(1, n_ahead_talk, 1))
            mixed_lp = torch.where(mix == 0, base_ahead, mixed_lp)  # as in the loss
        batch = {"text": x, "valid": valid.base, "whole": valid.policy,
                 "base_lp": base_ahead[..., 0], "mixed_lp": mixed_lp[..., 0],
                 "reward": (mixed_lp - base_ahead).sum(-1), "mix": mix[..., 0],
                 "thoughts": thoughts[:, 0], "sampled_lp": sampled_lp[:, 0],
                 "base_choice": likeliest(base[:, :n_positions]),
                 "mixed_choice": likeliest(mixed[:, :, 0])}
        batches.append({name: y.cpu() for name, y in batch.items()})
    return TextScores(**{name: parallel.collect(torch.cat([b[name] for b in batches]), len(text))
                         for name in batches[0]})


def standard_error(values: torch.Tensor, cluster: torch.Tensor) -> float | None:
    """Of the mean of values (n,), those of one cluster (n,) being dependent; None for one cluster.

    The ratio estimator's: sqrt(W / (W-1) * sum over the W clusters of (sum of deviations)^2) / n.
    """
    _, index = cluster.unique(return_inverse=True)
    sums = values.new_zeros(int(index.max()) + 1).index_add(0, index, values - values.mean())
    n = len(sums)
    return (sums.square().sum() * n / (n - 1)).sqrt().item() / len(values) if n > 1 else None


def summarize(scores: TextScores) -> dict[str, Any]:
    """Means over valid positions: NLL and gain (base - mixed NLL) in nats per token x_{i+1}.

    reward: nats per lookahead.  gain_by_decile: of base NLL, easy to hard; one part where there are
    under ten tokens.  gain_stderr: clustered by window, None for one.  Raises InputError where no
    position is valid.
    """
    valid, whole = scores.valid, scores.whole
    base, mixed = -scores.base_lp[valid].double(), -scores.mixed_lp[valid].double()
    if not len(base):
        raise InputError("the val windows hold no two tokens of one document in a row, so there is "
                         "nothing to score: prepare text of longer documents")
    gain, thoughts = base - mixed, scores.thoughts[valid]
    summary: dict[str, Any] = {"nll_base": base.mean().item(), "nll_mixed": mixed.mean().item(),
                               "gain": gain.mean().item()}
    if thoughts.shape[-1]:
        parts = gain[base.argsort()].tensor_split(10) if len(gain) >= 10 else [gain]
        deciles = [part.mean().item() for part in parts]
        summary |= {
            "gain_hardest": deciles[-1], "gain_by_decile": deciles,
            "gain_stderr": standard_error(gain, valid.nonzero()[:, 0]),
            "reward": scores.reward[whole].sum().item() / max(1, int(whole.sum())),
            "mix": scores.mix[valid].mean().item(),
            "entropy": -scores.sampled_lp[valid].mean().item(),  # is a sample's mean surprise
            "distinct": len(thoughts.unique(dim=0)) / len(thoughts)}
    return summary


def table(summary: dict[str, Any], thinks: bool, rows: Sequence[Row] = (),
          remarks: Sequence[str] = ()) -> str:
    """What a run ends with: base beside thoughts, where there are any; a corpus may add its own."""
    rows = [("", "base", "thoughts"), *rows,
            ("all tokens, NLL", f"{summary['nll_base']:.4f}", f"{summary['nll_mixed']:.4f}")]
    width = max(44, *(len(what) + 1 for what, _, _ in rows))
    lines = ["", *(f"{what:{width}}{base:>10}" + f"{thoughts:>10}" * thinks
                   for what, base, thoughts in rows)]
    if thinks:
        error = summary["gain_stderr"]
        deciles = " ".join(f"{gain:+.3f}" for gain in summary["gain_by_decile"])
        spread = "" if error is None else f" +- {2 * error:.4f} (2 standard errors, by window)"
        lines += [*remarks, f"gain by decile of base NLL (easy to hard): {deciles}",
                  f"mean gain {summary['gain']:+.4f}{spread} nats a token"]
    return "\n".join(lines)


def line(step: int, summary: dict[str, Any], thinks: bool) -> str:
    """What is said of an evaluation."""
    said = f"eval at {step}: nll {summary['nll_base']:.3f}"
    if thinks:
        said += (f" -> {summary['nll_mixed']:.3f} with thoughts, gain {summary['gain']:+.4f} "
                 f"(hardest tenth {summary['gain_hardest']:+.3f})")
    return said


def example(scores: TextScores, tokenizer: Tokenizer, n: int, i: int) -> dict[str, Any]:
    """The thought at position i of window n, the text before it (up to 16 tokens), the token after
    it, and that token's probability without the thought and with it."""
    context, thought, target = (
        tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        for ids in (scores.text[n, max(0, i - 15):i + 1], scores.thoughts[n, i],
                    scores.text[n, i + 1:i + 2]))
    return {"context": context, "thought": thought, "target": target,
            "p_base": scores.base_lp[n, i].exp().item(),
            "p_mixed": scores.mixed_lp[n, i].exp().item()}


def shown(scores: TextScores, tokenizer: Tokenizer, n: int, i: int) -> str:
    """The thought at position i of window n, and what it did to the next token's probability."""
    e = example(scores, tokenizer, n, i)
    return (f"  {e['context'][-24:]!r:>28} thinks {e['thought']!r}, then {e['target']!r}: p "
            f"{e['p_base']:.2f} -> {e['p_mixed']:.2f}")


@dataclass
class Report:
    """What is said of an evaluation; a corpus may add to it."""

    summary: dict[str, Any]  # `summarize`'s
    examples: list[tuple[int, int]]  # (window, position) of the thoughts to show
    said: str = ""  # at the end of the line
    rows: Sequence[Row] = ()  # of the table
    remarks: Sequence[str] = ()  # below it


def report(scores: TextScores) -> Report:
    n_positions = scores.base_lp.shape[1]
    return Report(summarize(scores), [(0, n_positions // 4), (0, n_positions // 2),
                                      (0, n_positions - 1)])


def lines(report: Report, scores: TextScores, tokenizer: Tokenizer, step: int, final: bool
          ) -> list[str]:
    """The evaluation in a line, a few thoughts, and at the end the table."""
    thinks = scores.thoughts.shape[-1] > 0
    examples = report.examples if thinks else []
    said = [line(step, report.summary, thinks) + report.said,
            *(shown(scores, tokenizer, n, i) for n, i in examples)]
    return said + [table(report.summary, thinks, report.rows, report.remarks)] * final
