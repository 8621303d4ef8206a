"""python train.py [CONFIG] [--key value ..]: trains a language model to think before every token.

CONFIG is a preset (`python train.py configs` lists them; default tiny) or the path of a saved
config.json. Ctrl-C and SIGTERM end a run after the update at hand and save it (exit 130 and 143);
--resume goes on from there, or from the last state saved, bit for bit.
"""

import sys
from contextlib import suppress
from pathlib import Path

from configs import TrainConfig, changes, list_presets, load_config, restored, run_of
from nanoqstar import InputError, cli


def read(args: list[str]) -> tuple[str, TrainConfig]:
    """Command line -> (name of the run, its settings)."""
    if args[:1] == ["configs"]:
        raise cli.Answer(list_presets())
    named = [word for word in args[:1] if not word.startswith("-")]
    options, source = args[len(named):], named[0] if named else "tiny"
    with suppress(cli.Answer):  # of --help
        resume = cli.parse(TrainConfig, options).get("resume")
        if not named and resume not in (None, "auto"):
            source = str(run_of(resume) / "config.json")
    name, base = load_config(source)
    usage = f"{__doc__}\nDefaults are those of {name}, and only what applies to it is listed."
    return name, cli.settings(TrainConfig, options, usage, base=base)


def main(args: list[str]) -> int:
    """The exit code of a command line."""
    return cli.command(args, read, "train:run")


if __name__ == "__main__":  # --help and typos are answered before torch is imported, for seconds
    sys.exit(main(sys.argv[1:]))

import dataclasses
import math
from functools import partial

import torch
from tqdm import tqdm

from data import fold
from nanoqstar import flops, lora, parallel
from nanoqstar.dataset import TokenDataset, prefetched
from nanoqstar.objective import Objective, Valid
from nanoqstar.quietstar import QuietStar, uniforms
from nanoqstar.run import Run, check, planned, prepare
from nanoqstar.runlog import RunLog, Signals, run_folder, start_wandb, write
from nanoqstar.stages import load_given, stages
from nanoqstar.state import Progress, State, States
from nanoqstar.state import read as read_state

# ---- one update


def load_batches(data: TokenDataset, phase: str, step: int, cfg: TrainConfig, pin: bool = False):
    """This rank's micro-batches of an update, (text, docs[, uniforms of the thoughts[, given
    ones]]) each, and all ranks' counts: each has its share of the batch_size * grad_accum windows.

    pin: in page-locked memory, from where a GPU copies while it computes.
    """
    n_windows, window = cfg.batch_size * cfg.grad_accum, cfg.max_length + cfg.n_ahead_talk
    if phase == "warm":
        text, docs, given, counts = load_given(data, step, cfg)
    else:
        text, docs = data.batch(cfg.seed, phase, step, range(n_windows), window)
        counts = Valid.from_docs(docs, cfg.n_ahead_talk).counts()
    batches, own = [], parallel.share(n_windows)
    for first in own[::cfg.batch_size]:
        index = range(first, min(first + cfg.batch_size, own.stop))
        tensors = [text[index.start:index.stop], docs[index.start:index.stop]]
        if cfg.n_ahead:
            shape = (cfg.n_passes, cfg.max_length, cfg.n_ahead - 2)
            tensors.append(uniforms(cfg.seed, phase, step, index, shape))
        if phase == "warm":
            tensors.append(given[index.start:index.stop])
        batches.append([x.pin_memory() if pin else x for x in tensors])
    return batches, counts


def train_step(model, optimizer, batches, counts, objective, lr, cfg, rollout=None,
               largest=math.inf):
    """One optimizer update (the paper's Algorithm 1).

    batches, counts: of `load_batches`. rollout: of the thoughts; default the model's own.
    Returns this rank's share of the update's means (device tensors), its last thoughts, the norm of
    the gradient, and whether it was finite and `largest` at most: if not, nothing was changed.
    """
    device, totals, thoughts = model.lm.head_weight.device, {}, None
    counts = counts.to(device)
    for n, micro_batch in enumerate(batches, 1):
        parallel.reshard_after(model, n == len(batches))
        text, docs, *u = (x.to(device, non_blocking=True) for x in micro_batch)
        if cfg.n_ahead:
            thoughts, sampled_lp = (rollout or model.rollout)(text, docs, *u)  # think: (B, P, T, S)
            if len(u) == 1:
                loss, stats = model.loss(text, docs, thoughts, sampled_lp, counts, objective)
            else:  # of which some were given
                loss, stats = model.given_loss(text, docs, thoughts, u[1], counts, objective)
        else:
            loss, stats = model.text_loss(text, docs, counts, cfg.n_ahead_talk)
        loss.backward()  # shares of the update's means: micro-batches add up
        for key, value in stats.items():
            totals[key] = totals.get(key, 0.0) + value
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = parallel.whole(torch.nn.utils.clip_grad_norm_(learning, cfg.grad_clip))
    taken = bool(grad_norm.isfinite() & (grad_norm <= largest))  # waits for the device, once a step
    if taken:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return totals, thoughts, grad_norm, taken


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
        p.requires_grad_(not name.startswith(frozen) and lora.learns(name, cfg.lora_rank))
        if p.requires_grad:
            members[kind(name, p)].append(p)
    return torch.optim.AdamW(
        [{"params": members[name], "lr_factor": factor, "weight_decay": decay}
         for name, (factor, decay) in groups.items() if members[name]],
        lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)


# ---- the loop


def train(this: Run, cfg: TrainConfig, phase: str, first: int = 0) -> Progress:
    """cfg.max_steps updates with evaluations, logging and saves on the way.

    phase: 'pretrain', 'warm', 'think' or 'text', of which the last two evaluate. first: updates
    before these. However it ends, what was learned is saved, unless other ranks know nothing of the
    end.
    """
    model, log, last = this.model, this.log, first + cfg.max_steps
    optimizer = make_optimizer(model, cfg)
    rollout = model.rollout if phase == "warm" else this.rollout
    parallel.follow(model)
    at = parallel.together(this.begin, phase, first, last, optimizer)
    begun, torn = at.update, []  # torn: between the first parameter's update and the last's
    optimizer.register_step_pre_hook(lambda *_: torn.append(True))
    objective = Objective(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(Objective)})
    reading = partial(load_batches, this.splits["train"], phase, cfg=cfg,
                      pin=model.lm.head_weight.is_cuda)
    steps = tqdm(range(begun, last), desc=phase, unit="step", dynamic_ncols=True,
                 initial=begun - first, total=cfg.max_steps, disable=parallel.rank() > 0 or None)
    n_windows, evaluates = cfg.batch_size * cfg.grad_accum, phase in ("think", "text")
    log.start_clock(begun)
    try:
        for step, (batches, counts) in zip(steps, prefetched(reading, range(begun, last))):
            due = step > begun and step % cfg.save_every == 0
            if evaluates and at.score is None and (step - first) % cfg.eval_every == 0:
                this.evaluate(at)
                due = due or (step > first and this.is_best(at))
                log.start_clock(step)
            if due:
                this.save(at, optimizer, background=True)
            this.signals.check()
            lr = learning_rate(step - first, cfg)
            largest = at.spike() if cfg.skip_spikes else math.inf
            stats, thoughts, grad_norm, taken = train_step(
                model, optimizer, batches, counts, objective, lr, cfg, rollout, largest)
            parallel.together(at.note, float(grad_norm), taken)
            torn.clear()
            done = at.update
            if done % cfg.log_every == 0 or done == last:
                stats = parallel.summed(stats)
                work = flops.of_update(model.lm.config, n_windows, cfg.max_length, cfg.n_ahead,
                                       cfg.n_ahead_talk, cfg.n_passes, float(stats.get("live", 1)),
                                       cfg.lora_rank > 0)
                log.update(phase, done, last, n_windows * cfg.max_length, work, thoughts, stats | {
                    "grad_norm": grad_norm, "learning_rate": lr, "skipped": at.skipped,
                    **({"spikes": at.spikes} if cfg.skip_spikes else {})})
            else:
                log.sign_of_life(phase, done, last)
    except BaseException as error:
        if at.update > begun and (parallel.size() == 1 or isinstance(error, parallel.Agreed)
                                  or this.signals.agreed):
            this.save(at, None if torn else optimizer)
        raise
    this.save(at, optimizer)
    return at


# ---- all of a run


def find_state(cfg: TrainConfig, states: States) -> State | None:
    """The state to go on from, if any; what is set otherwise than before is shown, or refused."""
    if not states.folders():
        return None
    if Path(str(cfg.resume)).parent == states.folder:
        state = read_state(Path(str(cfg.resume)))
    else:
        state = states.newest(lambda line: write(line, sys.stderr))
    harmless, serious = changes(restored(state[1]["config"], state[0] / "state.json"), cfg)
    if serious and not cfg.force:
        raise InputError(f"the run had other settings: {', '.join(serious)}: leave these as they "
                         "were, or give --force")
    for change in (*harmless, *serious):
        write(f"otherwise than before: {change}", sys.stdout)
    return state


def run(name: str, cfg: TrainConfig) -> None:
    """Everything a configuration asks for."""
    if cfg.plan:
        raise cli.Answer(planned(cfg, fold.Corpus.of(cfg)))
    with parallel.joined(cfg.device):
        run_on_all(name, cfg)


def run_on_all(name: str, cfg: TrainConfig) -> None:
    """The same, on each rank; the first one alone writes, but for states."""
    device, splits, loaded = parallel.together(check, cfg)
    config = dataclasses.asdict(dataclasses.replace(cfg, resume=None, force=False))
    resume = str(run_of(cfg.resume)) if cfg.resume not in (None, "auto") else cfg.resume
    with (Signals().caught() as signals,
          parallel.firsts(run_folder(cfg.out_dir, name, resume)) as folder):
        with signals.at_once():
            state = parallel.together(find_state, cfg, States(folder / "state", cfg.keep))
            wandb = parallel.together(
                lambda: start_wandb(name, config) if cfg.wandb and not parallel.rank() else None)
            log = RunLog(folder, config, wandb, flops.peak_flops(device), cfg.keep)
            this = prepare(cfg, fold.Corpus.of(cfg), log, signals, device, splits, loaded, state)
        with log.saying_what_is_kept():
            for stage in stages(this):
                at = train(this, *stage)
            this.finish(at)
