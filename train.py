"""python train.py [CONFIG] [--key value ..]: trains a language model to think before every token.

CONFIG is a preset (`python train.py configs` lists them; default tiny) or the path of a saved
config.json. Ctrl-C and SIGTERM end a run after the update at hand and save it (exit 130 and 143).
"""

import sys

from configs import TrainConfig, list_presets, load_config
from nanoqstar import cli


def read(args: list[str]) -> tuple[str, TrainConfig]:
    """Command line -> (name of the run, its settings)."""
    if args[:1] == ["configs"]:
        raise cli.Answer(list_presets())
    named = args[:1] and not args[0].startswith("-")
    name, base = load_config(args[0] if named else "tiny")
    usage = f"{__doc__}\nDefaults are those of {name}, and only what applies to it is listed."
    return name, cli.settings(TrainConfig, args[1 if named else 0:], usage, base=base)


def main(args: list[str]) -> int:
    """The exit code of a command line."""
    return cli.command(args, read, "train:run")


if __name__ == "__main__":  # --help and typos are answered before torch is imported, for seconds
    sys.exit(main(sys.argv[1:]))

import dataclasses
import math
import shlex
from functools import partial

import torch
from tqdm import tqdm

from data import fold
from nanoqstar import InputError, flops
from nanoqstar.dataset import TokenDataset, prefetched
from nanoqstar.objective import Objective, Valid
from nanoqstar.quietstar import QuietStar, uniforms
from nanoqstar.run import Run, check, prepare
from nanoqstar.runlog import RunLog, Signals, run_folder, start_wandb

MAX_SKIPPED = 5  # non-finite steps in a row that stop a run


# ---- one update


def load_batches(data: TokenDataset, phase: str, step: int, cfg: TrainConfig, pin: bool = False):
    """An update's micro-batches, (text, docs[, uniforms of the thoughts]) each, and its counts.

    pin: in page-locked memory, from where a GPU copies while it computes.
    """
    batches, counts = [], torch.zeros(cfg.n_ahead_talk + 2, dtype=torch.long)
    for first in range(0, cfg.batch_size * cfg.grad_accum, cfg.batch_size):
        index = range(first, first + cfg.batch_size)
        window = cfg.max_length + cfg.n_ahead_talk
        tensors = [*data.batch(cfg.seed, phase, step, index, window)]
        counts = counts + Valid.from_docs(tensors[1], cfg.n_ahead_talk).counts()
        if cfg.n_ahead:
            shape = (cfg.n_passes, cfg.max_length, cfg.n_ahead - 2)
            tensors.append(uniforms(cfg.seed, phase, step, index, shape))
        batches.append([x.pin_memory() if pin else x for x in tensors])
    return batches, counts


def train_step(model, optimizer, batches, counts, objective, lr, cfg, rollout=None):
    """One optimizer update (the paper's Algorithm 1).

    batches, counts: of `load_batches`. rollout: of the thoughts; default the model's own.
    Returns the update's means (device tensors), the last thoughts, the gradient norm, and whether
    it was finite: if not, nothing was changed.
    """
    device, totals, thoughts = model.lm.head_weight.device, {}, None
    counts = counts.to(device)
    for micro_batch in batches:
        text, docs, *u = (x.to(device, non_blocking=True) for x in micro_batch)
        if cfg.n_ahead:
            thoughts, sampled_lp = (rollout or model.rollout)(text, docs, *u)  # think: (B, P, T, S)
            loss, stats = model.loss(text, docs, thoughts, sampled_lp, counts, objective)
        else:
            loss, stats = model.text_loss(text, docs, counts, cfg.n_ahead_talk)
        loss.backward()  # shares of the update's means: micro-batches add up
        for key, value in stats.items():
            totals[key] = totals.get(key, 0.0) + value
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(learning, cfg.grad_clip)
    finite = bool(grad_norm.isfinite())  # waits for the device, once a step
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return totals, thoughts, grad_norm, finite


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Linear warmup, then constant, or a cosine down to a tenth; step: updates of this phase."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    if cfg.schedule == "constant":
        return cfg.learning_rate * warm
    done = max(0, step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


def make_optimizer(model: QuietStar, cfg: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW: matrices decay, norms and biases do not, start and end have their own rate."""
    def kind(name: str, p: torch.Tensor) -> str:
        if name in ("start_embedding", "end_embedding"):
            return "delimiters"
        return "matrices" if p.dim() > 1 else "vectors"

    frozen = {"all": (), "thoughts": ("lm.",),
              "mixing_head": ("lm.", "start_", "end_")}[cfg.trainable]
    if cfg.n_ahead == 0:
        frozen = ("start_", "end_", "mixing_head.")
    groups = {"matrices": (1.0, cfg.weight_decay), "vectors": (1.0, 0.0),
              "delimiters": (cfg.embedding_lr_factor, cfg.weight_decay / cfg.embedding_lr_factor)}
    members: dict[str, list[torch.Tensor]] = {name: [] for name in groups}
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen) if frozen else True)
        if p.requires_grad:
            members[kind(name, p)].append(p)
    return torch.optim.AdamW(
        [{"params": members[name], "lr_factor": factor, "weight_decay": decay}
         for name, (factor, decay) in groups.items() if members[name]],
        lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)


# ---- the loop


def train(this: Run, cfg: TrainConfig, phase: str, first: int = 0) -> None:
    """cfg.max_steps updates with evaluations, logging and checkpoints on the way.

    phase: 'pretrain', 'think' or 'text'. first: updates before these. However it ends, what was
    learned is saved.
    """
    model, log, last = this.model, this.log, first + cfg.max_steps
    optimizer, rollout = make_optimizer(model, cfg), this.rollout
    objective = Objective(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(Objective)})
    reading = partial(load_batches, this.splits["train"], phase, cfg=cfg,
                      pin=model.lm.head_weight.is_cuda)
    steps = tqdm(range(first, last), desc=phase, unit="step", disable=None, dynamic_ncols=True)
    n_windows, done, skipped, in_a_row = cfg.batch_size * cfg.grad_accum, first, 0, 0
    log.start_clock(first)
    try:
        for step, (batches, counts) in zip(steps, prefetched(reading, range(first, last))):
            if phase != "pretrain" and (step - first) % cfg.eval_every == 0:
                this.evaluate(step)
                log.start_clock(step)
            this.signals.check()
            lr = learning_rate(step - first, cfg)
            stats, thoughts, grad_norm, finite = train_step(
                model, optimizer, batches, counts, objective, lr, cfg, rollout)
            done, in_a_row = step + 1, 0 if finite else in_a_row + 1
            skipped += not finite
            if in_a_row == MAX_SKIPPED:
                raise InputError(
                    f"the gradient was not finite {MAX_SKIPPED} updates in a row (update {done}): "
                    f"lower {'pretrain_' * (phase == 'pretrain')}learning_rate or policy_weight; "
                    "these updates changed nothing")
            if done % cfg.log_every == 0 or done == last:
                work = flops.of_update(model.lm.config, n_windows, cfg.max_length, cfg.n_ahead,
                                       cfg.n_ahead_talk, cfg.n_passes, float(stats.get("live", 1)))
                log.update(phase, done, last, n_windows * cfg.max_length, work, thoughts, stats | {
                    "grad_norm": grad_norm, "learning_rate": lr, "skipped": skipped})
            else:
                log.sign_of_life(phase, done, last)
            if done % cfg.save_every == 0 and done < last:
                this.save(phase, done)
    except BaseException:
        if done > first:
            this.save(phase, done)
        raise
    this.save(phase, last)


# ---- the stages of a run


def pretrain(this: Run) -> None:
    """A new model learns to write first."""
    cfg = this.cfg
    if this.origin is not None or not cfg.pretrain_steps:
        return
    train(this, dataclasses.replace(
        cfg, n_ahead=0, trainable="all", max_steps=cfg.pretrain_steps,
        batch_size=cfg.pretrain_batch_size, grad_accum=1, learning_rate=cfg.pretrain_learning_rate,
        warmup_steps=30, schedule="cosine", beta2=0.99, weight_decay=0.01, save_every=1000),
        "pretrain")
    this.init_thoughts()  # from the embeddings as they are now
    this.log.pretrained = cfg.pretrain_steps


def finish(this: Run) -> None:
    """The final evaluation, and where everything is."""
    cfg, log, last = this.cfg, this.log, this.first + this.cfg.max_steps
    this.evaluate(last, final=True)
    log.write("end", last, seconds=log.seconds)
    words, answer = " --show_thoughts" * (cfg.n_ahead > 0), ""
    if this.corpus:
        options, letter = this.corpus.example()
        words, answer = words + options, f" (right is {letter})"
    log.say(f"{log.seconds:.0f} s in all. Try it{answer}:\n"
            f"python sample.py --model_path {shlex.quote(str(log.folder))}{words}")
    if log.saved != (log.folder / "checkpoint", last):
        raise InputError(f"update {last} could not be saved, for want of room or of rights in "
                         f"{log.folder}; {log.kept}")


def run(name: str, cfg: TrainConfig) -> None:
    """Everything a configuration asks for."""
    (device, splits, loaded), config = check(cfg), dataclasses.asdict(cfg)
    with Signals().caught() as signals, run_folder(cfg.out_dir, name) as folder:
        with signals.at_once():
            log = RunLog(folder, config, start_wandb(name, config) if cfg.wandb else None,
                         flops.peak_flops(device))
            this = prepare(cfg, fold.Corpus.of(cfg), log, signals, device, splits, loaded)
        with log.saying_what_is_kept():
            pretrain(this)
            train(this, cfg, "think" if cfg.n_ahead else "text", this.first)
            finish(this)
