"""What a run is made of: its settings checked, model and data put together, evaluated and saved.

`cfg` is train.py's TrainConfig everywhere; `corpus` is data/fold.py's Corpus for the embedded
corpus, which has a tokenizer, a text and answers of its own, and None for prepared data.
"""

import hashlib
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from nanoqstar import (
    InputError,
    answers,
    cpu,
    evaluate,
    flops,
    hf,
    hub,
    lora,
    parallel,
    plan,
    tasks,
)
from nanoqstar.dataset import TokenDataset
from nanoqstar.device import pick_device, pick_threads, speed_up
from nanoqstar.quietstar import QuietStar, Rollout, draw_from
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.runlog import RunLog, Signals
from nanoqstar.state import Progress, State, load
from nanoqstar.tokenizer import (
    beginning_ids,
    encode,
    end_of_text_id,
    load_tokenizer,
    unknown_ids,
)

Splits = dict[str, TokenDataset]
Loaded = tuple[QuietStar, Tokenizer, hf.Settings]

# ---- before anything is made


def check(cfg: Any) -> tuple[torch.device, Splits | None, Loaded | None]:
    """Refuses what cannot work before anything is made; returns the device, the splits of prepared
    data, and the model to start from, where there is one."""
    check_shares(cfg, parallel.size())
    if cfg.push:
        hub.check_push(cfg.push)
    device, splits, loaded = pick_device(cfg.device), None, None
    if cfg.data != "fold":
        splits = open_splits(cfg, Path(cfg.data))
    if cfg.model_path is None:
        plan.refuse(new_model_config(cfg, 1), cfg, device)
    else:
        hf.check_context(config := hf.read_config(hf.resolve(cfg.model_path)),
                         cfg.max_length + cfg.n_ahead_talk + cfg.n_ahead)
        plan.refuse(config, cfg, device)
        dtype = torch.bfloat16 if cfg.lora_rank and device.type == "cuda" else torch.float32
        loaded = hf.load_thinker(cfg.model_path, device, dtype, tokenizer=cfg.tokenizer,
                                 shard=partial(wrap, cfg=cfg, device=device)
                                 if parallel.size() > 1 else None)
        taught = loaded[2].config
        for name in ("seed", "fold_operations", "fold_ordinary_frac"):  # its table and alphabet
            ours, its = getattr(cfg, name), taught.get(name, getattr(cfg, name))
            if cfg.data == taught.get("data") == "fold" and ours != its:
                raise InputError(f"{cfg.model_path} learned the embedded corpus of --{name} {its}: "
                                 f"with {ours} its letters would mean something else")
    pick_threads(cfg.threads, loaded[0].lm.config.hidden_size if loaded else cfg.hidden_size)
    return device, splits, loaded


def check_shares(cfg: Any, ranks: int) -> None:
    """InputError where so many processes would not compute what one does."""
    updates = {"batch_size x grad_accum": cfg.batch_size * cfg.grad_accum}
    if cfg.model_path is None and cfg.pretrain_steps:
        updates["pretrain_batch_size"] = cfg.pretrain_batch_size
    for name, n in updates.items():
        if n % ranks:
            raise InputError(f"{ranks} processes cannot share the {n} windows of an update evenly: "
                             f"make {name} a multiple of {ranks}, or start as many processes as "
                             f"divide {n}")
    if cfg.eval_windows < ranks:
        raise InputError(f"{ranks} processes cannot share {cfg.eval_windows} val windows: raise "
                         "eval_windows")
    if cfg.normalize_advantage and ranks > 1:
        raise InputError("normalize_advantage takes each forward by itself, and each process has "
                         "its own: leave it out, or start one process")


def wrap(model: QuietStar, cfg: Any, device: torch.device) -> None:
    """Adapters, checkpointing or compilation, and shards, in this order; it may be on meta."""
    if cfg.lora_rank:
        lora.add(model.lm, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    speed_up(model, device, cfg.checkpointing, cfg.compile)
    parallel.shard(model, device)


def planned(cfg: Any, corpus: Any) -> str:
    """What --plan prints; of a model that is known by name nothing is fetched."""
    if cfg.model_path is not None:
        config = flops.MODELS.get(cfg.model_path) or hf.read_config(hf.resolve(cfg.model_path))
    else:
        folder = None if corpus else open_splits(cfg, Path(cfg.data))["train"].tokenizer_path.parent
        tokenizer = load_tokenizer(folder) if folder else corpus.tokenizer()
        config = new_model_config(cfg, tokenizer.get_vocab_size())
    return plan.report(config, cfg, pick_device(cfg.device))


def open_splits(cfg: Any, folder: Path) -> Splits:
    splits = {split: TokenDataset(folder, split) for split in ("train", "val")}
    for split in splits.values():  # a window that does not fit is refused before any work
        split.last_start(cfg.max_length + cfg.n_ahead_talk)
    return splits


def read_questions(cfg: Any, tokenizer: Tokenizer) -> list[tasks.Questions]:
    """Of eval_tasks; InputError where the tokenizer does not suit them, or a file is not there."""
    return [tasks.read_questions(name, tokenizer, file, cfg.eval_limit)
            for name, file in cfg.task_files.items()]


def new_model_config(cfg: Any, vocab_size: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads, head_dim=cfg.hidden_size // cfg.n_heads,
        max_position_embeddings=max(2048, 2 * cfg.max_length), rope_theta=1e4)


# ---- ready to train


@dataclass
class Run:
    """What the stages of a run hand on."""

    cfg: Any
    corpus: Any
    log: RunLog
    signals: Signals
    splits: Splits
    model: QuietStar
    tokenizer: Tokenizer
    origin: hf.Settings | None  # of the model it started from
    state: State | None = None  # to go on from
    questions: Sequence[tasks.Questions] = ()  # answered at every evaluation

    @property
    def first(self) -> int:
        """Updates that the model has had: a continued run goes on in the data, too."""
        return self.origin.step if self.origin else 0

    @property
    def end_ids(self) -> Sequence[int]:
        """That end a text."""
        end = end_of_text_id(self.tokenizer)
        return self.origin.end_ids if self.origin else () if end is None else (end,)

    @property
    def rollout(self) -> Rollout:
        """Where thoughts come from: the model, or in a control experiment the tokens of a text."""
        text = self.cfg.thoughts_from
        if text is None:
            return self.model.rollout
        return draw_from(encode(self.tokenizer, text, "thoughts_from"))

    def init_thoughts(self) -> None:
        """Fresh start, end and mixing head; those of an earlier run are never initialised again."""
        if self.origin is None or not self.origin.thinking.n_ahead:
            start, end = ([] if self.model.reread else
                          encode(self.tokenizer, getattr(self.cfg, name), name)
                          for name in ("start_init_text", "end_init_text"))
            with parallel.gathered(self.model):
                self.model.init_thoughts(start, end, self.cfg.seed)

    def begin(self, phase: str, first: int, last: int, optimizer: torch.optim.Optimizer
              ) -> Progress:
        """A phase's start; or where a state was saved in it, whose tensors come back."""
        if self.state is None:
            return Progress(phase, first, self.log.pretrained)
        (folder, info), self.state = self.state, None
        at = info["progress"]
        self.log.pretrained = at.pretrained
        if at.phase != phase:
            raise InputError(f"{folder} is of phase {at.phase}, and this command begins with "
                             f"{phase}: leave n_ahead, pretrain_steps and model_path as they were, "
                             f"or start a new run with --model_path {self.log.folder}")
        if (began := info.get("first", self.first)) != self.first:  # rates and length hang on it
            raise InputError(f"{self.cfg.model_path} was of update {began} when this run began, "
                             f"and is of {self.first} now: put it back, or start a new run with "
                             f"--model_path {self.log.folder}")
        if at.update > last:
            raise InputError(f"{folder} is of update {at.update} of {at.phase}: this command ends "
                             f"with update {last} of {phase}, so nothing is left to do")
        load(folder, info, self.model, optimizer)
        self.log.start -= info.get("seconds", 0.0)  # of its earlier lives
        self.log.go_on(folder, info)
        self.log.say(f"goes on from {folder}: {phase} {at.update}/{last}")
        if info["made_by"] != self.made_by:
            self.log.say(f"warning: it was made by {info['made_by']}, and this is {self.made_by}: "
                         "figures will differ in their last digits")
        return at

    def evaluate(self, at: Progress, final: bool = False) -> None:
        """Scores the same val windows every time, logs the summary and shows a few thoughts; at the
        end the table as well. Raises InputError where training has spoiled the base."""
        cfg, corpus, log = self.cfg, self.corpus, self.log
        text, docs = self.splits["val"].evenly(cfg.eval_windows, cfg.max_length + cfg.n_ahead_talk)
        if len(text) < parallel.size():
            raise parallel.Agreed(f"{parallel.size()} processes cannot share {len(text)} val "
                                  "windows: raise eval_windows, or prepare more text")
        with self.signals.at_once(), parallel.gathered(self.model):  # nothing changes here
            scores = evaluate.score_text(
                self.model, text, docs, cfg.n_ahead, cfg.n_ahead_talk, seed=cfg.seed,
                batch_size=cfg.batch_size, sampler=self.rollout,
                choices=corpus.choices if corpus else None)
            report = evaluate.report(scores)
            base, mixed = parallel.exchange([report.summary["nll_base"],
                                             report.summary["nll_mixed"]])[0]
            if not math.isfinite(base):
                raise parallel.Agreed(
                    f"the predictions are not finite at update {at.update}: lower learning_rate, "
                    f"or pretrain_learning_rate; {log.kept}")
            if corpus:
                corpus.add_answers(report, scores, self.model, final)
            for q in self.questions:
                found = answers.measure(self.model, self.tokenizer, q, cfg.n_ahead, seed=cfg.seed,
                                        batch_size=cfg.batch_size, end_ids=self.end_ids)
                report.summary[q.name] = found
                report.said += tasks.line(q.name, found)
        examples = [evaluate.example(scores, self.tokenizer, n, i)
                    for n, i in (report.examples if cfg.n_ahead else [])]
        log.write("eval", at.update, **report.summary, examples=examples)
        for line in evaluate.lines(report, scores, self.tokenizer, at.update, final):
            log.say(line)
        start = at.start_nll = base if at.start_nll is None else at.start_nll
        if cfg.max_base_rise is not None and base > start + cfg.max_base_rise:
            log.wait()
            best = log.states.best()
            raise parallel.Agreed(
                f"the base's NLL on val has risen from {start:.3f} to {base:.3f} by update "
                f"{at.update}, by more than max_base_rise {cfg.max_base_rise}: " + (
                    f"the best state is {best}, go on from it with --resume {best} --force and "
                    if best else "no state was evaluated before, start anew with ")
                + "a lower policy_weight or learning_rate")
        at.score = start - mixed  # the gain, over what cannot be spoiled

    def is_best(self, at: Progress) -> bool:
        """Whether no state has a better score."""
        best = max(self.log.states.scores().values(), default=-math.inf)
        return parallel.exchange(at.score is not None and at.score > best)[0]

    def save(self, at: Progress, optimizer: torch.optim.Optimizer | None,
             background: bool = False) -> None:
        """State and model, that being the language model alone as long as it has never learned to
        think. No optimizer: an update was cut short, so there is no state."""
        cfg, origin, thinking = self.cfg, self.origin, None
        if cfg.n_ahead and at.phase != "pretrain":
            thinking = hf.Thinking(cfg.n_ahead, cfg.n_ahead_talk, cfg.thought_temperature,
                                   cfg.delimiters)
        elif origin and origin.thinking.n_ahead:
            thinking = origin.thinking
        self.log.save(at, self.model, optimizer, self.tokenizer, thinking,
                      origin.folder if origin else None,
                      {"data": data_sum(self.splits), "made_by": self.made_by,
                       "first": self.first, "onednn": cpu.onednn,
                       "seconds": self.log.seconds}, background)

    def finish(self, at: Progress) -> None:
        """The final evaluation, and where everything is."""
        cfg, log = self.cfg, self.log
        self.evaluate(at, final=True)
        log.write("end", at.update, seconds=log.seconds)
        with self.signals.at_once():
            log.back_up(at.update, last=True)
        words, answer = " --show_thoughts" * (cfg.n_ahead > 0), ""
        if self.corpus:
            options, letter = self.corpus.example()
            words, answer = words + options, f" (right is {letter})"
        log.say(f"{log.seconds:.0f} s in all. Try it{answer}:\n"
                f"python sample.py --model_path {shlex.quote(str(log.folder))}{words}")
        if not parallel.exchange(log.saved == (log.folder / "checkpoint", at.update))[0]:
            raise parallel.Agreed(f"the model of update {at.update} could not be saved, for want "
                                  f"of room or of rights in {log.folder}; {log.kept}")

    @property
    def made_by(self) -> str:
        """What the last digits depend on."""
        return (f"torch {torch.__version__} on {self.model.lm.head_weight.device.type}, "
                f"{torch.get_num_threads()} threads"
                + f", {parallel.size()} processes" * (parallel.size() > 1))


def data_sum(splits: Splits) -> str:
    """Which data this is."""
    prints = "".join(splits[name].fingerprint for name in sorted(splits))
    return hashlib.sha256(prints.encode()).hexdigest()


def prepare(cfg: Any, corpus: Any, log: RunLog, signals: Signals, device: torch.device,
            splits: Splits | None, loaded: Loaded | None,
            state: State | None = None) -> Run:
    """Model and data, ready to train. device, splits, loaded: of `check`. state: to go on from."""
    if splits is None:
        tokenizer, origin = corpus.tokenizer(), None
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
        if origin.thinking.n_ahead and cfg.n_ahead and model.reread != (cfg.delimiters == "reread"):
            raise InputError(f"delimiters {cfg.delimiters}: {cfg.model_path} was taught to think "
                             f"with --delimiters {origin.thinking.delimiters}")
        for name in ("start_init_text", "end_init_text") if origin.thinking.n_ahead else ():
            if (ours := getattr(cfg, name)) != origin.config.get(name, ours):
                log.say(f"{name} {ours!r} does nothing: start and end are as trained in "
                        f"{cfg.model_path}")
    model.thought_temperature = cfg.thought_temperature
    if cfg.n_ahead:
        model.reread = cfg.delimiters == "reread"
    if device.type == "cuda" and model.lm.config.head_dim < 16:
        raise InputError(f"heads of {model.lm.config.head_dim} numbers: attention on a GPU needs "
                         "16 or more; lower n_heads, or raise hidden_size")
    this = Run(cfg, corpus, log, signals, splits or {}, model, tokenizer, origin, state,
               parallel.together(read_questions, cfg, tokenizer))
    this.init_thoughts()
    if splits is None:
        folder = log.folder / "data"
        if not parallel.exchange(bool(state and folder.exists()))[0]:
            n_val = cfg.eval_windows * (cfg.max_length + cfg.n_ahead_talk)
            try:
                parallel.first(corpus.prepare, folder, cfg.fold_tokens, n_val)
            except OSError as error:
                raise parallel.Agreed(f"{folder} cannot be written ({error.strerror or error}): "
                                      "make room, or choose another --out_dir") from None
        this.splits = open_splits(cfg, folder)
    data = this.splits["train"]
    if state and (data_sum(this.splits) != state[1]["data"] or (
            corpus and {"thoughts": 0, **data.meta["source"]} != {  # of a folder from before these
                "corpus": "fold", **asdict(corpus)})):
        raise InputError(f"the data in {data.tokenizer_path.parent} are not those of {state[0]}: "
                         "put the data back, or start anew")
    if (first := beginning_ids(tokenizer)) and "beginning_ids" not in data.meta:
        log.say(f"warning: {cfg.data} was prepared without the beginning-of-text token "
                f"({tokenizer.decode(first, skip_special_tokens=False)}) that this model knows "
                "before every document: prepare it again")
    if not parallel.is_sharded(model):
        wrap(model, cfg, device)
    elif cfg.lora_rank:
        lora.init(model.lm, cfg.seed)
    if state:  # timed once more, another library might have won, which rounds otherwise
        cpu.onednn = cpu.has_onednn() and bool(state[1].get("onednn", cpu.onednn))
    cpu.onednn = parallel.exchange(cpu.onednn)[0]  # the others' timings may say otherwise
    log.say(f"{log.folder}: {sum(p.numel() for p in model.lm.parameters()):,} parameters, "
            f"{data.n_tokens:,} training tokens, {device}, {torch.get_num_threads()} threads")
    size = 3 * sum(p.nbytes for p in model.parameters())
    log.say(plan.summary(model.lm.config, cfg, device))
    log.advice = plan.advice(model.lm.config, cfg, device) or log.advice
    log.say(parallel.together(log.states.check_room, size))
    return this
