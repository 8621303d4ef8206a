"""What `python -m nanoqstar.evaluate` does: measures, and prints one table of it."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from nanoqstar import InputError, answers, hf, parallel, tasks
from nanoqstar.dataset import TokenDataset
from nanoqstar.device import pick_device, pick_threads
from nanoqstar.evaluate import TextScores, score_text, standard_error, summarize
from nanoqstar.files import plain, write_json
from nanoqstar.plot import chart
from nanoqstar.quietstar import QuietStar
from nanoqstar.tokenizer import beginning_ids, end_of_text_id, load_tokenizer

# ---- text


def read_windows(source: Path, tokenizer: Tokenizer, n: int, length: int
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """n windows (or as many as there are) of `length` tokens and their document ids: evenly over
    the val split of a prepared folder, or from the beginning of a text file. Raises InputError."""
    if source.is_dir():
        data = TokenDataset(source, "val")
        if load_tokenizer(source).to_str() != tokenizer.to_str():
            raise InputError(f"the tokenizer of {source} is not the model's: prepare the data with "
                             "--tokenizer of this model, or give a text file")
        return data.evenly(n, length)
    from configs import PrepareConfig
    from data.sources import Source, local_files

    files = local_files(source, source)
    ids: list[int] = []
    docs: list[int] = []
    end = end_of_text_id(tokenizer)
    for number, item in enumerate(Source(PrepareConfig(strict=True), files).items()):
        try:
            words = tokenizer.encode(item.text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"{source}: the tokenizer cannot encode it ({error}): use what it "
                             "knows") from None
        words = [*beginning_ids(tokenizer), *words, *([] if end is None else [end])]
        ids += words
        docs += [number] * len(words)
        if len(ids) >= n * length:
            break
    if len(ids) < length:
        raise InputError(f"a window of {length:,} tokens does not fit in the {len(ids):,} of "
                         f"{source}: give more text, or lower --max_length")
    n = min(n, len(ids) // length)
    return (torch.tensor(ids[:n * length]).view(n, length),
            torch.tensor(docs[:n * length]).view(n, length))


def gains(scores: TextScores) -> dict[str, Any]:
    """`summarize`, and what it leaves out: perplexities, the share of tokens helped, the gain over
    the lookahead by token, and for each decile of base NLL its mean and its gain. Each `_error` is
    half of a 95% interval, clustered by window; None for one window."""
    valid = scores.valid
    base, mixed = -scores.base_lp[valid].double(), -scores.mixed_lp[valid].double()
    gain, window = base - mixed, valid.nonzero()[:, 0]

    def half(values: torch.Tensor, cluster: torch.Tensor) -> float | None:
        error = standard_error(values, cluster)
        return None if error is None else 1.96 * error

    found = summarize(scores) | {
        "windows": len(valid), "tokens": len(base), "perplexity_base": base.mean().exp().item(),
        "perplexity_mixed": mixed.mean().exp().item(), "gain_error": half(gain, window),
        "helped": (gain > 0).double().mean().item(),
        "helped_error": half((gain > 0).double(), window)}
    if scores.thoughts.shape[-1]:
        found["gain_ahead"] = found["reward"] / (scores.text.shape[1] - valid.shape[1])
        found["deciles"] = [
            {"nll_base": base[part].mean().item(), "gain": gain[part].mean().item(),
             "gain_error": half(gain[part], window[part])}
            for part in base.argsort().tensor_split(10 if len(base) >= 10 else 1)]
    return found


def with_error(x: dict[str, Any]) -> str:
    return f"{x['gain']:+.4f}" + ("" if x["gain_error"] is None else f" +-{x['gain_error']:.4f}")


def gains_table(found: dict[str, dict[str, Any]]) -> str:
    """A line for each setting, then one for each decile of base NLL."""
    some = next(iter(found.values()))
    counts = f"{some['windows']:,} windows, {some['tokens']:,} tokens"
    if "deciles" not in some:
        return (f"{counts}\nNLL base {some['nll_base']:.4f}, perplexity "
                f"{some['perplexity_base']:.2f}")
    lines = [f"{counts}; gain in nats a token, with 95% intervals by window; gain ahead: over all "
             "n_ahead_talk tokens",
             f"{'':26}{'NLL base':>9}{'thoughts':>10}{'perplexity':>12}{'thoughts':>10}{'gain':>18}"
             f"{'tokens helped':>15}{'gain ahead':>12}"]
    lines += [f"{name:26}{x['nll_base']:9.4f}{x['nll_mixed']:10.4f}{x['perplexity_base']:12.2f}"
              f"{x['perplexity_mixed']:10.2f}{with_error(x):>18}{x['helped']:15.1%}"
              f"{x['gain_ahead']:+12.4f}" for name, x in found.items()]
    lines += ["", f"{'decile of base NLL':26}{'NLL base':>9}"
              + "".join(f"{f'gain, {name}':>33}" for name in found)]
    deciles = list(zip(*(x["deciles"] for x in found.values())))
    names = ["easiest", *map(str, range(2, len(deciles))), "hardest"][-len(deciles):]
    return "\n".join([*lines, *(f"{name:26}{row[0]['nll_base']:9.4f}"
                                + "".join(f"{with_error(x):>33}" for x in row)
                                for name, row in zip(names, deciles))])


def run_text(cfg: Any, model: QuietStar, settings: hf.Settings, tokenizer: Tokenizer, n_ahead: int
             ) -> tuple[dict[str, Any], str]:
    """Its figures by setting, and the table. cfg: configs.py's EvaluateConfig."""
    trained = {name: x for name in ("max_length", "n_ahead_talk")
               if type(x := settings.config.get(name)) is int and x > 0}  # it may say anything
    length = cfg.max_length or trained.get("max_length", 256)
    found = {}
    ways = [{"n_ahead": n_ahead, "n_ahead_talk": settings.thinking.n_ahead_talk
             or trained.get("n_ahead_talk", 1)} | way
            for way in cfg.swept]
    most = max(way["n_ahead_talk"] for way in ways)  # the same tokens for all
    hf.check_context(model.lm.config, length + most + max(way["n_ahead"] for way in ways))
    text, docs = read_windows(Path(cfg.input), tokenizer, cfg.windows, length + most)
    if len(text) < parallel.size():
        raise InputError(f"{parallel.size()} processes cannot share {len(text)} windows: start "
                         "fewer, or give more text")
    for way in ways:
        cut = length + way["n_ahead_talk"]
        scores = score_text(model, text[:, :cut], docs[:, :cut], **way, seed=cfg.seed,
                            batch_size=cfg.batch_size)
        found[", ".join(f"{k} {v}" for k, v in way.items())] = gains(scores)
    if cfg.plot and n_ahead and parallel.rank() == 0:
        lines = {name: [(d["gain"], d["gain_error"] or 0.0) for d in x["deciles"]]
                 for name, x in found.items()}
        points = len(next(iter(lines.values())))
        plain(cfg.plot).write_text(chart(
            "What thoughts gain, by how hard the token is",
            "decile of the base's NLL, easy to hard", "gain, nats a token",
            [str(n + 1) for n in range(points)], lines), encoding="utf-8")
    return found, gains_table(found)


# ---- questions


def run_votes(cfg: Any, model: QuietStar, settings: hf.Settings, tokenizer: Tokenizer, n_ahead: int
              ) -> tuple[dict[str, Any], str]:
    texts = tasks.read_texts("gsm8k", cfg.input)
    chosen = (answers.official_items(len(texts)) if cfg.official_items
              else list(range(len(texts))))[:cfg.limit]
    about = answers.identity(model, texts, n_ahead, cfg.seed)
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    path = Path(cfg.answers or f"out/answers/gsm8k-{digest}.jsonl")
    found = answers.vote(model, tokenizer, texts, chosen, n_ahead, cfg.votes, path, seed=cfg.seed,
                         end_ids=settings.end_ids, batch_size=cfg.batch_size)
    title = (f"gsm8k: {len(chosen):,} questions, the majority of k chains of thought"
             + f", n_ahead {n_ahead}" * (n_ahead > 0) + f"; answers in {path}")
    return found, tasks.table(title, {k: x for k, x in found.items() if k != "n"})


def run_questions(cfg: Any, model: QuietStar, settings: hf.Settings, tokenizer: Tokenizer,
                  n_ahead: int) -> tuple[dict[str, Any], str]:
    questions = tasks.read_questions(cfg.task, tokenizer, cfg.input, cfg.limit)
    found = answers.measure(model, tokenizer, questions, n_ahead, n_samples=cfg.samples,
                            seed=cfg.seed, batch_size=cfg.batch_size, end_ids=settings.end_ids)
    title = f"{cfg.task}: {found['n']:,} questions"
    if n_ahead:
        title += f", n_ahead {n_ahead}, mean of {cfg.samples} thoughts a position"
    return found, tasks.table(title, {k: x for k, x in found.items() if k != "n"})


def run(cfg: Any) -> None:
    """Everything a command line asks for; cfg: configs.py's EvaluateConfig."""
    with parallel.joined(cfg.device):
        parallel.together(run_on_all, cfg)


def run_on_all(cfg: Any) -> None:
    """The same, on each rank; the first one alone speaks."""
    for file in filter(None, (cfg.json, cfg.plot)):  # known before the work, not after it
        if not plain(file).parent.is_dir():
            raise InputError(f"there is no folder {plain(file).parent} for {file}: make it first")
    device = pick_device(cfg.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer, settings = hf.load_thinker(cfg.model_path, device, dtype, cfg.tokenizer)
    pick_threads(None, model.lm.config.hidden_size)
    taught = settings.thinking.n_ahead
    if not taught and (cfg.n_ahead or (cfg.sweep or "").startswith("n_ahead=")):
        raise InputError("this model was never taught to think: leave n_ahead out")
    if not taught and cfg.plot:
        raise InputError("this model was never taught to think, so it has no gains to draw: leave "
                         "--plot out")
    n_ahead, is_first = cfg.n_ahead or taught, parallel.rank() == 0
    if is_first and not taught:
        print("this model was never taught to think: without thoughts", file=sys.stderr)
    act = run_text if cfg.task == "text" else run_votes if cfg.cot else run_questions
    found, said = act(cfg, model, settings, tokenizer, n_ahead)
    if not is_first:
        return
    print(said)
    if cfg.json:
        write_json(cfg.json, {"task": cfg.task, "model_path": cfg.model_path, "n_ahead": n_ahead,
                              "step": settings.step, "seed": cfg.seed, "found": found})
