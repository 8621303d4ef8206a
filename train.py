"""python train.py [CONFIG] [--key value ..]: trains a language model to think before every token.

CONFIG is a preset (`python train.py configs` lists them; default tiny) or the path of a saved config.json.
"""

import dataclasses
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from configs import ConfigError, TrainConfig, help_text, list_presets, load_config, parse_options
from data import fold
from nanoqstar import InputError, hf
from data.writer import write_dataset
from nanoqstar.dataset import TokenDataset
from nanoqstar.evaluate import score_text, summarize
from nanoqstar.objective import Valid, language_model_loss, quiet_star_loss
from nanoqstar.quietstar import QuietStar, uniforms
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.device import autocast, pick_device, speed_up
from nanoqstar.tokenizer import load_tokenizer, unknown_ids

MAX_SKIPPED = 5  # non-finite steps in a row that stop a run


# ---- one update


def load_batches(data, step, cfg, pin=False):
    """An update's micro-batches, each (text, docs, uniform numbers of the thoughts), and the valid counts of all.

    pin: in page-locked memory, from where a GPU copies while it computes.
    """
    batches, counts = [], 0
    for first in range(0, cfg.batch_size * cfg.grad_accum, cfg.batch_size):
        index = range(first, first + cfg.batch_size)
        text, docs = data.batch(cfg.seed, step, index, cfg.max_length + cfg.n_ahead_talk)
        shape = (cfg.n_passes, cfg.max_length, cfg.n_ahead - 2)
        draws = [uniforms(cfg.seed, step, index, shape)] if cfg.n_ahead else []
        batches.append([x.pin_memory() if pin else x for x in (text, docs, *draws)])
        counts = counts + Valid.from_docs(docs, cfg.n_ahead_talk).counts()
    return batches, counts


def prefetched(data, cfg, pin):
    """Every update's `load_batches`, each read while the update before it computes."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(load_batches, data, 0, cfg, pin)
        for step in range(cfg.max_steps):
            now = upcoming.result()
            if step + 1 < cfg.max_steps:
                upcoming = reader.submit(load_batches, data, step + 1, cfg, pin)
            yield now


def train_step(model, optimizer, batches, counts, step, cfg, sampler):
    """One optimizer update; everything random is a function of (seed, step, global sample index).

    Returns the means of the update's losses and statistics (device tensors), the gradient norm and whether it was
    finite.
    """
    device, totals = model.lm.head_weight.device, {}
    counts = counts.to(device)
    for batch in batches:
        text, docs, *u = (x.to(device, non_blocking=True) for x in batch)
        if cfg.n_ahead:
            with autocast(device):  # apart from the scoring, so that no weight cast without a gradient is used again
                thoughts, thought_lp = sampler(text, docs, *u)  # (B, P, T, S)
        with autocast(device):
            if cfg.n_ahead == 0:
                hidden = model.text_states(text[:, :cfg.max_length], docs)
                loss, nll = language_model_loss(hidden, model.lm.head_weight, text, docs, counts[0])
                parts = {"nll_base": nll}
            else:
                valid = Valid.from_docs(docs, cfg.n_ahead_talk)
                states = model.score(text, docs, thoughts)  # one packed forward, with grad
                loss, parts = quiet_star_loss(
                    states, model.lm.head_weight, text, thoughts, valid, counts,
                    base_weight=cfg.base_weight, mixed_weight=cfg.mixed_weight, policy_weight=cfg.policy_weight,
                    clamp_advantage=cfg.clamp_advantage, normalize_advantage=cfg.normalize_advantage,
                    reinforce_temperature=cfg.reinforce_temperature, banned=model.banned)
                n_thoughts = cfg.n_passes * counts[-1].clamp(min=1)
                surprise = -(thought_lp.mean(-1) * valid.policy[:, None]).sum() / n_thoughts
                parts = {"nll_base": parts["nll_base"], "nll_talk": parts["nll_mixed"], "policy": parts["policy"],
                         "reward": parts["mean_reward"], "gain": parts["mean_reward"] / cfg.n_ahead_talk,
                         "positive": parts["positive"], "mix": parts["mean_mix"], "entropy": surprise}
        loss.backward()  # already divided by the update's counts
        for key, value in parts.items():
            totals[key] = totals.get(key, 0.0) + value
    if cfg.n_ahead:
        totals["thoughts"] = thoughts  # of the last micro-batch: what `distinct` is counted on, when it is logged
    grad_norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], cfg.grad_clip)
    finite = bool(grad_norm.isfinite())  # waits for the device, once a step
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg) * group["lr_factor"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return totals, grad_norm, finite


def learning_rate(step, cfg):
    """Linear warmup, then constant, or a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    if cfg.schedule == "constant":
        return cfg.learning_rate * warm
    done = max(0, step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


def make_optimizer(model, cfg):
    """Fused AdamW: matrices decay, norms and biases do not, start and end have their own rate (paper appendix)."""
    model.requires_grad_(True)
    if cfg.trainable != "all":
        model.lm.requires_grad_(False)
    if cfg.trainable == "mixing_head" or cfg.n_ahead == 0:
        model.start_embedding.requires_grad_(False)
        model.end_embedding.requires_grad_(False)
    if cfg.n_ahead == 0:
        model.mixing_head.requires_grad_(False)
    delimiters = {id(model.start_embedding), id(model.end_embedding)}
    learning = [p for p in model.parameters() if p.requires_grad]
    ordinary = [p for p in learning if id(p) not in delimiters]
    factor = cfg.embedding_lr_factor
    groups = [
        {"params": [p for p in ordinary if p.dim() > 1], "weight_decay": cfg.weight_decay, "lr_factor": 1.0},
        {"params": [p for p in ordinary if p.dim() == 1], "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": [p for p in learning if id(p) in delimiters], "weight_decay": cfg.weight_decay / factor,
         "lr_factor": factor}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.learning_rate, betas=(0.9, cfg.beta2),
                             fused=True)


def thought_sampler(model, cfg, tokenizer):
    """Where thoughts come from: the model, or in a control experiment the tokens of a text, uniformly."""
    if cfg.thoughts_from is None:
        return model.rollout
    ids = torch.tensor(encode(tokenizer, cfg.thoughts_from, "thoughts_from"))

    def draw(text, docs, u):
        return ids.to(u.device)[(u * len(ids)).long()], torch.full_like(u, -math.log(len(ids)))
    return draw


# ---- the loop


def train(model, splits, cfg, log, tokenizer, phase, thinks=True):
    """max_steps updates with evaluations, logging and checkpoints on the way; phase: 'pretrain', 'think' or 'text'."""
    optimizer, sampler = make_optimizer(model, cfg), thought_sampler(model, cfg, tokenizer)
    bar = tqdm(range(cfg.max_steps), desc=phase, unit="step", disable=None, dynamic_ncols=True)
    skipped = in_a_row = 0
    clock, clock_step = time.perf_counter(), 0
    for step, (batches, counts) in zip(bar, prefetched(splits["train"], cfg, model.lm.head_weight.is_cuda)):
        if phase != "pretrain" and step % cfg.eval_every == 0:
            evaluate(model, splits["val"], cfg, log, tokenizer, sampler, step)
            clock, clock_step = time.perf_counter(), step
        totals, grad_norm, finite = train_step(model, optimizer, batches, counts, step, cfg, sampler)
        in_a_row = 0 if finite else in_a_row + 1
        skipped += in_a_row > 0
        if in_a_row == MAX_SKIPPED:
            raise InputError(f"the gradient was not finite {MAX_SKIPPED} updates in a row (step {step}): lower "
                             "learning_rate or policy_weight; what was saved before is untouched")
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            seconds = (time.perf_counter() - clock) / (done - clock_step)
            clock, clock_step = time.perf_counter(), done
            thoughts = totals.pop("thoughts", None)
            record = {k: float(v) for k, v in totals.items()}
            if thoughts is not None:
                record["distinct"] = len(thoughts.flatten(0, 2).unique(dim=0)) / thoughts[..., 0].numel()
            tokens = cfg.batch_size * cfg.grad_accum * cfg.max_length
            log.write(phase, done, **record, grad_norm=float(grad_norm), learning_rate=learning_rate(step, cfg),
                      seconds=seconds, tokens_per_second=tokens / seconds, skipped=skipped)
            shown = "  ".join(f"{k[4:] if k.startswith('nll_') else k} {v:.3f}" for k, v in record.items())
            log.say(f"{phase} {done:5d}/{cfg.max_steps}  {shown}  gnorm {grad_norm:.2f}  "
                    f"lr {learning_rate(step, cfg):.1e}  {seconds * 1e3:.0f} ms  {tokens / seconds:.0f} tok/s"
                    + f"  skipped {skipped}" * (skipped > 0),
                    quiet=phase == "pretrain" and done % (cfg.log_every * 10))
        if phase != "pretrain" and done % cfg.save_every == 0 and done < cfg.max_steps:
            log.save(model, done, thinks)


def evaluate(model, val, cfg, log, tokenizer, sampler, step):
    """Scores the same val windows every time, logs the summary and shows a few positions with their thoughts."""
    text, docs = val.evenly(cfg.eval_windows, cfg.max_length + cfg.n_ahead_talk)
    is_fold = cfg.data == "fold"
    with autocast(model.lm.head_weight.device):
        scores = score_text(model, text, docs, cfg.n_ahead, cfg.n_ahead_talk, seed=cfg.seed, batch_size=cfg.batch_size,
                            sampler=sampler, choices=range(len(fold.LETTERS)) if is_fold else None)
    summary = summarize(scores)
    places = [(0, i) for i in (cfg.max_length // 4, cfg.max_length // 2, cfg.max_length - 1)]
    if is_fold:
        answers, places = fold.measure(scores, cfg.seed, cfg.fold_operands, cfg.fold_operations,
                                       fold.vocabulary(cfg.fold_operations, cfg.fold_ordinary_frac))
        summary |= {"answers": answers}
    log.write("eval", step, **summary)
    line = f"eval at {step}: nll {summary['nll_base']:.3f}"
    if cfg.n_ahead:
        line += (f" -> {summary['nll_mixed']:.3f} with thoughts, gain {summary['gain']:+.4f} (hardest tenth "
                 f"{summary['gain_hardest']:+.3f})")
    if is_fold and cfg.n_ahead and "direct" in summary["answers"]:
        direct, kinds = summary["answers"]["direct"], summary["answers"]["thoughts"]
        line += (f", direct answers right {direct['accuracy_base']:.0%} -> {direct['accuracy_mixed']:.0%}; thoughts: "
                 + ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items()))
    log.say(line)
    if cfg.n_ahead:
        for n, i in places:
            context, thought, target = (tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in (
                text[n, max(0, i - 15):i + 1], scores.thoughts[n, i], text[n, i + 1:i + 2]))
            log.say(f"  {context[-24:]!r:>28} thinks {thought!r}, then {target!r}: "
                    f"p {scores.base_lp[n, i].exp():.2f} -> {scores.mixed_lp[n, i].exp():.2f}")
    return summary


# ---- setting up


def prepare_fold(cfg, folder):
    """The embedded corpus as a prepared folder: one document a split."""
    make = dict(operands=cfg.fold_operands, worked=cfg.fold_worked_frac, restated=cfg.fold_restated_frac,
                operations=cfg.fold_operations, ordinary=cfg.fold_ordinary_frac)
    n_val = cfg.eval_windows * (cfg.max_length + cfg.n_ahead_talk)
    characters = fold.vocabulary(cfg.fold_operations, cfg.fold_ordinary_frac)
    splits = {split: [fold.encode(fold.make_text(cfg.seed, split, n, **make), characters)]
              for split, n in (("train", cfg.fold_tokens), ("val", n_val))}
    write_dataset(folder, fold.tokenizer_json(characters), len(characters), None, splits,
                  {"corpus": "fold", "seed": cfg.seed, **make})


def encode(tokenizer, text, name):
    """Ids of a setting's text; an InputError where there are none."""
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(f"{name}: the tokenizer cannot encode {text!r} ({error})") from None
    if not ids:
        raise InputError(f"{name}: {text!r} has no tokens under this tokenizer; choose another text")
    return ids


def build_model(cfg, tokenizer_path, device):
    """The model to start from, on its device in fp32, and whether it is new (to be pre-trained first)."""
    tokenizer, thoughts = Tokenizer.from_file(str(tokenizer_path)), None
    if cfg.model_path is None:
        lm = Qwen2(Qwen2Config(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=cfg.hidden_size, intermediate_size=cfg.intermediate_size,
            num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads,
            head_dim=cfg.hidden_size // cfg.n_heads, max_position_embeddings=max(2048, 2 * cfg.max_length),
            rope_theta=1e4))
        lm.init_weights(cfg.init_std, cfg.embedding_std, cfg.seed)
        lm = lm.to(device)
    else:
        lm, thoughts, folder = hf.load(cfg.model_path, device)
        if load_tokenizer(folder).to_str() != tokenizer.to_str():
            raise InputError(f"{tokenizer_path} is not the tokenizer of {cfg.model_path}: prepare the data again with "
                             f"--tokenizer {cfg.model_path}")
    if device.type == "cuda" and lm.config.head_dim < 16:
        raise InputError(f"heads of {lm.config.head_dim} numbers: attention on a GPU needs 16 or more; lower n_heads, "
                         "or raise hidden_size")
    hf.check_context(lm.config, cfg.max_length + cfg.n_ahead_talk + cfg.n_ahead)
    model = QuietStar(lm, cfg.thought_temperature, unknown_ids(tokenizer, lm.config.vocab_size)).to(device)
    return model, thoughts, tokenizer


def init_thoughts(model, thoughts, cfg, tokenizer):
    """Start, end and mixing head of an earlier run where there are any, else fresh ones."""
    start, end = (encode(tokenizer, getattr(cfg, name), name) for name in ("start_init_text", "end_init_text"))
    model.init_thoughts(start, end, cfg.seed)
    if thoughts is not None:  # what was trained is never initialised again, whatever start_init_text says
        model.load_state_dict(thoughts, strict=False)


class RunLog:
    """The run's folder: config.json, metrics.jsonl, checkpoint/; and what is said while it runs."""

    def __init__(self, out, cfg, tokenizer_json, wandb):
        self.out, self.cfg, self.tokenizer_json, self.wandb = out, cfg, tokenizer_json, wandb
        self.start = time.perf_counter()
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
        self.metrics = open(out / "metrics.jsonl", "w")

    def write(self, kind, step, **values):
        self.metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.metrics.flush()
        if self.wandb:
            self.wandb.log({f"{kind}/{k}": v for k, v in values.items()})

    def say(self, line, quiet=False):
        if not quiet:
            tqdm.write(line)

    def save(self, model, step, thinks):
        """thinks: whether start, end and mixing head were ever trained; else the language model alone is saved."""
        hf.save(self.out / "checkpoint", model if thinks else model.lm, self.tokenizer_json,
                {"step": step, "config": dataclasses.asdict(self.cfg)})


def start_wandb(cfg, name):
    try:
        import wandb
    except ImportError:
        raise InputError("wandb is not installed: pip install -e '.[wandb]', or leave --wandb out") from None
    return wandb.init(project="nanoqstar", name=name, config=dataclasses.asdict(cfg))


def new_folder(cfg, name):
    """The run's folder, made now; never one that holds anything already."""
    if cfg.out_dir is not None:
        out = Path(cfg.out_dir)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} already holds a run or other files: choose another --out_dir, or delete it")
    else:
        base = Path("out") / name
        out = next(p for n in count(1) if not (p := base if n == 1 else base.with_name(f"{base.name}-{n}")).exists())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {out} cannot be made ({error}): choose another --out_dir") from None
    return out


def run(name, cfg):
    """Everything a configuration asks for; returns the run's folder."""
    device = pick_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.data != "fold":
        TokenDataset(cfg.data, "train")  # bad input is refused before anything is made
    if cfg.model_path is not None:
        hf.resolve(cfg.model_path)
    wandb = start_wandb(cfg, name) if cfg.wandb else None
    out = new_folder(cfg, name)
    data = Path(cfg.data)
    if cfg.data == "fold":
        data = out / "data"
        prepare_fold(cfg, data)
    splits = {split: TokenDataset(data, split) for split in ("train", "val")}
    for split in splits.values():
        split.last_start(cfg.max_length + cfg.n_ahead_talk)  # a window that does not fit is refused before any work
    model, thoughts, tokenizer = build_model(cfg, splits["train"].tokenizer_path, device)
    init_thoughts(model, thoughts, cfg, tokenizer)
    speed_up(model, device, cfg.checkpointing, cfg.compile)
    log = RunLog(out, cfg, tokenizer.to_str(), wandb)
    log.say(f"{out}: {sum(p.numel() for p in model.lm.parameters()):,} parameters, "
            f"{splits['train'].n_tokens:,} training tokens, {device}, {torch.get_num_threads()} threads")
    if cfg.model_path is None and cfg.pretrain_steps:
        train(model, splits, dataclasses.replace(
            cfg, n_ahead=0, trainable="all", max_steps=cfg.pretrain_steps, batch_size=cfg.pretrain_batch_size,
            grad_accum=1, learning_rate=cfg.pretrain_learning_rate, warmup_steps=30, schedule="cosine", beta2=0.99,
            weight_decay=0.01,
        ), log, tokenizer, "pretrain")
        init_thoughts(model, thoughts, cfg, tokenizer)  # from the embeddings as they are now
        hf.save(out / "base", model.lm, tokenizer.to_str(), {"pretrain_steps": cfg.pretrain_steps})
    thinks = cfg.n_ahead > 0 or thoughts is not None
    train(model, splits, cfg, log, tokenizer, "think" if cfg.n_ahead else "text", thinks)
    summary = evaluate(model, splits["val"], cfg, log, tokenizer, thought_sampler(model, cfg, tokenizer), cfg.max_steps)
    log.save(model, cfg.max_steps, thinks)
    seconds = time.perf_counter() - log.start
    log.write("end", cfg.max_steps, seconds=seconds)
    print(table(summary, cfg.n_ahead > 0))
    print(f"{seconds:.0f} s in all. Try it: python sample.py --model_path {out}")
    return out


def table(summary, thinks):
    """What the run ends with: base beside thoughts, where there are any."""
    rows = [("", "base", "thoughts")]
    for style, a in summary.get("answers", {}).items():
        if style in ("direct", "restated", "worked"):
            rows.append((f"{style} answers right (held out, n={a['n']})", f"{a['accuracy_base']:.1%}",
                         f"{a['accuracy_mixed']:.1%}"))
            rows.append((f"{style} answers, NLL", f"{a['nll_base']:.3f}", f"{a['nll_mixed']:.3f}"))
    rows.append(("all tokens, NLL", f"{summary['nll_base']:.4f}", f"{summary['nll_mixed']:.4f}"))
    lines = ["", *(f"{what:44}{base:>10}" + f"{mixed:>10}" * thinks for what, base, mixed in rows)]
    if thinks and "direct" in summary.get("answers", {}):
        a = summary["answers"]
        lines += [f"mixing weight: {a['direct']['mix']:.2f} on direct answers, "
                  f"{a['mix_elsewhere']:.2f} off the answers",
                  "thoughts before direct answers: " + ", ".join(f"{k} {v:.0%}" for k, v in a["thoughts"].items())]
    if thinks:
        deciles = " ".join(f"{g:+.3f}" for g in summary["gain_by_decile"])
        lines += [f"gain by decile of base NLL (easy to hard): {deciles}",
                  f"mean gain {summary['gain']:+.4f} +- {2 * summary['gain_stderr']:.4f} (2 standard errors) "
                  "nats a token"]
    return "\n".join(lines)


def main(args):
    usage = __doc__.strip()
    if args[:1] == ["configs"]:
        print(list_presets())
        return
    try:
        name, cfg = load_config(args.pop(0) if args and not args[0].startswith("-") else "tiny")
        if "--help" in args or "-h" in args:
            print(help_text(TrainConfig, f"{usage}\n\nDefaults are those of {name}.", cfg))
            return
        cfg = dataclasses.replace(cfg, **parse_options(TrainConfig, args))
        run(name, cfg)
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what the run has saved so far is whole", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is used up: lower batch_size (raise grad_accum), n_passes or max_length, or set "
              "--checkpointing 1", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
