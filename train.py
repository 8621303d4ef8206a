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
import os
import shlex
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from data import fold
from nanoqstar import InputError, evaluate, flops, hf, lora
from nanoqstar.dataset import TokenDataset, prefetched
from nanoqstar.device import pick_device, pick_threads, speed_up
from nanoqstar.objective import Objective, Valid
from nanoqstar.quietstar import QuietStar, Rollout, draw_from, uniforms
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.runlog import RunLog, Signals, run_folder, start_wandb
from nanoqstar.thoughts import ThoughtLayout
from nanoqstar.tokenizer import beginning_ids, encode, load_tokenizer, unknown_ids

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
        p.requires_grad_(not name.startswith(frozen) and lora.learns(name, cfg.lora_rank))
        if p.requires_grad:
            members[kind(name, p)].append(p)
    return torch.optim.AdamW(
        [{"params": members[name], "lr_factor": factor, "weight_decay": decay}
         for name, (factor, decay) in groups.items() if members[name]],
        lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)


# ---- the loop


@dataclasses.dataclass
class Run:
    """What the stages of a run hand on."""

    cfg: TrainConfig
    log: RunLog
    signals: Signals
    splits: dict[str, TokenDataset]
    model: QuietStar
    tokenizer: Tokenizer
    origin: hf.Settings | None  # of the model it started from

    @property
    def first(self) -> int:
        """Updates that the model has had: a continued run goes on in the data, too."""
        return self.origin.step if self.origin else 0

    def save(self, phase: str, step: int) -> None:
        """The language model alone as long as it has never learned to think."""
        cfg, origin, thinking = self.cfg, self.origin, None
        if cfg.n_ahead and phase != "pretrain":
            thinking = hf.Thinking(cfg.n_ahead, cfg.n_ahead_talk, cfg.thought_temperature)
        elif origin and origin.thinking.n_ahead:
            thinking = origin.thinking
        self.log.save(phase, step, self.model, self.tokenizer, thinking,
                      origin.folder if origin else None)


def train(this: Run, cfg: TrainConfig, phase: str, first: int = 0) -> None:
    """cfg.max_steps updates with evaluations, logging and checkpoints on the way.

    phase: 'pretrain', 'think' or 'text'. first: updates before these. However it ends, what was
    learned is saved.
    """
    model, log, last = this.model, this.log, first + cfg.max_steps
    optimizer, rollout = make_optimizer(model, cfg), rollout_of(this)
    objective = Objective(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(Objective)})
    reading = partial(load_batches, this.splits["train"], phase, cfg=cfg,
                      pin=model.lm.head_weight.is_cuda)
    steps = tqdm(range(first, last), desc=phase, unit="step", disable=None, dynamic_ncols=True)
    n_windows, done, skipped, in_a_row = cfg.batch_size * cfg.grad_accum, first, 0, 0
    log.start_clock(first)
    try:
        for step, (batches, counts) in zip(steps, prefetched(reading, range(first, last))):
            if phase != "pretrain" and (step - first) % cfg.eval_every == 0:
                evaluate_now(this, step, rollout)
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
                                       cfg.n_ahead_talk, cfg.n_passes, float(stats.get("live", 1)),
                                       cfg.lora_rank > 0)
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


def rollout_of(this: Run) -> Rollout:
    """Where thoughts come from: the model, or in a control experiment the tokens of a text."""
    text = this.cfg.thoughts_from
    if text is None:
        return this.model.rollout
    return draw_from(encode(this.tokenizer, text, "thoughts_from"))


def evaluate_now(this: Run, step: int, rollout: Rollout, final: bool = False) -> None:
    """Scores the same val windows every time, logs the summary and shows a few thoughts; at the end
    the table as well."""
    cfg, is_fold = this.cfg, this.cfg.data == "fold"
    text, docs = this.splits["val"].evenly(cfg.eval_windows, cfg.max_length + cfg.n_ahead_talk)
    with this.signals.at_once():  # nothing changes here
        scores = evaluate.score_text(
            this.model, text, docs, cfg.n_ahead, cfg.n_ahead_talk, seed=cfg.seed,
            batch_size=cfg.batch_size, sampler=rollout, choices=fold.CHOICES if is_fold else None)
        report = evaluate.report(scores)
        if not math.isfinite(report.summary["nll_base"]):
            raise InputError(f"the predictions are not finite at update {step}: lower "
                             f"learning_rate, or pretrain_learning_rate; {this.log.kept}")
        if is_fold:
            fold.add_answers(report, scores, this.model, final, seed=cfg.seed,
                             operands=cfg.fold_operands, operations=cfg.fold_operations)
    this.log.write("eval", step, **report.summary)
    for line in evaluate.lines(report, scores, this.tokenizer, step, final):
        this.log.say(line)


# ---- the five stages of a run


def check(cfg: TrainConfig):
    """Refuses what cannot work before anything is made; returns the device, the splits of prepared
    data, and the model to start from, where there is one."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise InputError("torchrun would start as many whole runs as processes: one GPU only, for "
                         "now; run python train.py")
    device, splits, loaded = pick_device(cfg.device), None, None
    if cfg.data != "fold":
        splits = open_splits(cfg, Path(cfg.data))
    if cfg.model_path is None:
        check_memory(cfg, new_model_config(cfg, 1), device)
    else:
        hf.check_context(config := hf.read_config(hf.resolve(cfg.model_path)),
                         cfg.max_length + cfg.n_ahead_talk + cfg.n_ahead)
        check_memory(cfg, config, device)
        dtype = torch.bfloat16 if cfg.lora_rank and device.type == "cuda" else torch.float32
        loaded = hf.load_thinker(cfg.model_path, device, dtype, tokenizer=cfg.tokenizer)
        taught = loaded[2].config
        for name in ("seed", "fold_operations", "fold_ordinary_frac"):  # its table and alphabet
            ours, its = getattr(cfg, name), taught.get(name, getattr(cfg, name))
            if cfg.data == taught.get("data") == "fold" and ours != its:
                raise InputError(f"{cfg.model_path} learned the embedded corpus of --{name} {its}: "
                                 f"with {ours} its letters would mean something else")
    pick_threads(cfg.threads, loaded[0].lm.config.hidden_size if loaded else cfg.hidden_size)
    return device, splits, loaded


def check_memory(cfg: TrainConfig, model: Qwen2Config, device: torch.device) -> None:
    window = cfg.max_length + cfg.n_ahead_talk
    packed, drawn = cfg.max_length, 0
    if cfg.n_ahead:
        layout = ThoughtLayout(cfg.n_ahead, cfg.n_ahead_talk, cfg.n_passes, cfg.max_length)
        packed, drawn = layout.packing.n_packed, cfg.n_passes * cfg.max_length * layout.n_sampled
    n_tokens = cfg.batch_size * packed
    if cfg.model_path is None and cfg.pretrain_steps:
        n_tokens = max(n_tokens, cfg.pretrain_batch_size * cfg.max_length)
    windows = max(cfg.batch_size * cfg.grad_accum, cfg.eval_windows)
    learning = cfg.trainable == "all" or cfg.model_path is None
    adapters = lora.n_weights(model, cfg.lora_rank)
    flops.refuse_beyond_memory(model, device, n_tokens, cfg.checkpointing,
                               windows * (16 * window + 4 * drawn), learning,
                               adapters if cfg.model_path else 0)


def open_splits(cfg: TrainConfig, folder: Path) -> dict[str, TokenDataset]:
    splits = {split: TokenDataset(folder, split) for split in ("train", "val")}
    for split in splits.values():  # a window that does not fit is refused before any work
        split.last_start(cfg.max_length + cfg.n_ahead_talk)
    return splits


def new_model_config(cfg: TrainConfig, vocab_size: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads, head_dim=cfg.hidden_size // cfg.n_heads,
        max_position_embeddings=max(2048, 2 * cfg.max_length), rope_theta=1e4)


def prepare(cfg: TrainConfig, log: RunLog, signals: Signals, device: torch.device,
            splits: dict[str, TokenDataset] | None, loaded) -> Run:
    """Model and data, ready to train."""
    if splits is None:
        alphabet = fold.vocabulary(cfg.fold_operations, cfg.fold_ordinary_frac)
        tokenizer, origin = Tokenizer.from_str(fold.tokenizer_json(alphabet)), None
    else:
        tokenizer, origin = load_tokenizer(splits["train"].tokenizer_path.parent), None
    if loaded is None:
        config = new_model_config(cfg, tokenizer.get_vocab_size())
        hf.check_context(config, cfg.max_length + cfg.n_ahead_talk + cfg.n_ahead)
        lm = Qwen2(config)
        lm.init_weights(cfg.init_std, cfg.embedding_std, cfg.seed)
        model = QuietStar(lm, banned=unknown_ids(tokenizer, config.vocab_size)).to(device)
    else:
        model, its_tokenizer, origin = loaded
        if its_tokenizer.to_str() != tokenizer.to_str():
            raise InputError(
                f"the data's tokenizer is not that of {cfg.model_path}: prepare the data again "
                f"with --tokenizer {cfg.tokenizer or origin.folder}")
        for name in ("start_init_text", "end_init_text") if origin.thinking.n_ahead else ():
            if (ours := getattr(cfg, name)) != origin.config.get(name, ours):
                log.say(f"{name} {ours!r} does nothing: start and end are as trained in "
                        f"{cfg.model_path}")
    model.thought_temperature = cfg.thought_temperature
    if device.type == "cuda" and model.lm.config.head_dim < 16:
        raise InputError(f"heads of {model.lm.config.head_dim} numbers: attention on a GPU needs "
                         "16 or more; lower n_heads, or raise hidden_size")
    init_thoughts(model, tokenizer, origin, cfg)
    if splits is None:
        n_val = cfg.eval_windows * (cfg.max_length + cfg.n_ahead_talk)
        fold.prepare(log.folder / "data", seed=cfg.seed, n_train=cfg.fold_tokens, n_val=n_val,
                     operands=cfg.fold_operands, operations=cfg.fold_operations,
                     ordinary=cfg.fold_ordinary_frac, worked=cfg.fold_worked_frac,
                     restated=cfg.fold_restated_frac)
        splits = open_splits(cfg, log.folder / "data")
    data = splits["train"]
    if (first := beginning_ids(tokenizer)) and "beginning_ids" not in data.meta:
        log.say(f"warning: {cfg.data} was prepared without the beginning-of-text token "
                f"({tokenizer.decode(first, skip_special_tokens=False)}) that this model knows "
                "before every document: prepare it again")
    if cfg.lora_rank:
        lora.add(model.lm, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    speed_up(model, device, cfg.checkpointing, cfg.compile)
    log.say(f"{log.folder}: {sum(p.numel() for p in model.lm.parameters()):,} parameters, "
            f"{data.n_tokens:,} training tokens, {device}, {torch.get_num_threads()} threads")
    return Run(cfg, log, signals, splits, model, tokenizer, origin)


def init_thoughts(model: QuietStar, tokenizer: Tokenizer, origin: hf.Settings | None,
                  cfg: TrainConfig) -> None:
    """Fresh start, end and mixing head; those of an earlier run are never initialised again."""
    if origin is None or not origin.thinking.n_ahead:
        start, end = (encode(tokenizer, getattr(cfg, name), name)
                      for name in ("start_init_text", "end_init_text"))
        model.init_thoughts(start, end, cfg.seed)


def pretrain(this: Run) -> None:
    """A new model learns to write first."""
    cfg = this.cfg
    if this.origin is not None or not cfg.pretrain_steps:
        return
    train(this, dataclasses.replace(
        cfg, n_ahead=0, trainable="all", lora_rank=0, max_steps=cfg.pretrain_steps,
        batch_size=cfg.pretrain_batch_size, grad_accum=1, learning_rate=cfg.pretrain_learning_rate,
        warmup_steps=30, schedule="cosine", beta2=0.99, weight_decay=0.01, save_every=1000),
        "pretrain")
    # from the embeddings as they are now
    init_thoughts(this.model, this.tokenizer, None, cfg)
    this.log.pretrained = cfg.pretrain_steps


def finish(this: Run) -> None:
    """The final evaluation, and where everything is."""
    cfg, log, last = this.cfg, this.log, this.first + this.cfg.max_steps
    evaluate_now(this, last, rollout_of(this), final=True)
    log.write("end", last, seconds=log.seconds)
    words, answer = " --show_thoughts" * (cfg.n_ahead > 0), ""
    if cfg.data == "fold":
        options, letter = fold.example(cfg.fold_operands, cfg.fold_operations, cfg.seed)
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
            this = prepare(cfg, log, signals, device, splits, loaded)
        with log.saying_what_is_kept():
            pretrain(this)
            train(this, cfg, "think" if cfg.n_ahead else "text", this.first)
            finish(this)
