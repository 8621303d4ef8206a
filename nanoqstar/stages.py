"""The stages of a run: a new model learns to write first; where the data was given thoughts, the
model may learn those in a warm start; then it thinks.

Half of the windows of a warm start are drawn around given thoughts, and all that stand in them are
learned in one packed forward with a single pass. The others are of any text, as ever: there the
model samples, and the mixing head learns what its thoughts are worth by now.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from nanoqstar import InputError
from nanoqstar.dataset import TokenDataset
from nanoqstar.objective import Valid
from nanoqstar.run import Run


def stages(this: Run) -> Iterator[tuple[Any, str, int]]:
    """(settings, phase, updates before it) of each stage, beginning with that of the state that
    the run goes on from; what lies between two is done when the next one is asked for."""
    cfg = this.cfg
    at = this.state[1]["progress"].phase if this.state else "pretrain"
    warms = cfg.n_ahead and cfg.warm_steps and at in ("pretrain", "warm")
    if warms and this.splits["train"].thoughts is None:
        how = "set fold_thoughts" if cfg.data == "fold" else "prepare them with --thoughts FILE"
        raise InputError(f"warm_steps {cfg.warm_steps}: the data were given no thoughts to start "
                         f"from; {how}, or leave warm_steps out")
    if this.origin is None and cfg.pretrain_steps and at == "pretrain":
        yield replace(
            cfg, n_ahead=0, trainable="all", lora_rank=0, max_steps=cfg.pretrain_steps,
            batch_size=cfg.pretrain_batch_size, grad_accum=1,
            learning_rate=cfg.pretrain_learning_rate, warmup_steps=30, schedule="cosine",
            beta2=0.99, weight_decay=0.01), "pretrain", 0
        this.init_thoughts()  # from the embeddings as they are now
        this.log.pretrained = cfg.pretrain_steps
    if warms:
        yield replace(cfg, n_passes=1, max_steps=cfg.warm_steps), "warm", this.first
        this.log.pretrained += cfg.warm_steps
    yield cfg, "think" if cfg.n_ahead else "text", this.first


def load_given(data: TokenDataset, step: int, cfg: Any
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text and document ids (B, T+A) and given thoughts (B, 1, T, S) of a warm update's windows,
    and the counts that `QuietStar.given_loss` divides by."""
    text, docs, given = data.thought_batch(
        cfg.seed, step, range(cfg.batch_size * cfg.grad_accum), cfg.max_length, cfg.n_ahead_talk,
        cfg.n_ahead - 2)
    valid = Valid.from_docs(docs, cfg.n_ahead_talk)
    n_taught = (given >= 0).sum() + valid.after_given(given).sum()
    return text, docs, given, torch.cat((valid.without_given(given).counts(), n_taught[None]))
