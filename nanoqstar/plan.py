"""What an update takes before it is run: bytes by what they are for, and time.

The arithmetic follows what the code allocates. On a CPU it is within 15% of what torch's allocator
counts at the shapes of tests/test_plan.py; MPS runs the same code. For CUDA (bf16 products,
compiled blocks that keep what the compiler finds cheapest to keep, no probabilities) it has not
been measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from nanoqstar import InputError, attention, cpu, flops, lora, parallel
from nanoqstar.device import total_memory
from nanoqstar.head import CHUNK_LOGITS
from nanoqstar.qwen2 import Qwen2Config
from nanoqstar.state import in_words
from nanoqstar.thoughts import ThoughtLayout

CARDS = {12: "", 24: "RTX 4090", 48: "L40S", 80: "H100", 141: "H200"}  # GB, and one that has them
MFU = 0.5  # stated, not measured: the share of a card's peak that the time is counted with
USABLE = 0.93  # of a device's memory: the rest is the driver's, and lost in gaps


@dataclass(frozen=True)
class Plan:
    """Bytes of an update. Its stages come one after the other, weights and moments in each."""

    parts: dict[str, float]  # by what they are for; not all are there at the same time
    stages: dict[str, float]  # where each is at its highest
    least: float  # what is certain: a device with less cannot hold it

    @property
    def peak(self) -> float:
        return (self.parts["weights"] + self.parts["moments"] + self.parts["gathered weights"]
                + max(self.stages.values()))

    @property
    def state(self) -> float:
        """On disk: fp32 masters and two moments, 12 bytes a parameter that learns."""
        return self.parts["weights"] + self.parts["moments"]


def of_run(model: Qwen2Config, cfg: Any, kind: str) -> Plan:
    """Of a run's largest update: of its own, or of the pre-training before; of this process's
    share. kind: of device."""
    if (ranks := parallel.size()) > 1:
        cfg = replace(cfg, batch_size=min(cfg.batch_size, cfg.batch_size * cfg.grad_accum // ranks),
                      pretrain_batch_size=max(1, cfg.pretrain_batch_size // ranks))
    plans = [of_update(model, cfg, kind)]
    if cfg.model_path is None and cfg.pretrain_steps:
        plans.append(of_update(model, replace(
            cfg, n_ahead=0, trainable="all", lora_rank=0, batch_size=cfg.pretrain_batch_size,
            grad_accum=1), kind))
    return replace(max(plans, key=lambda p: p.peak), least=max(p.least for p in plans))


def of_update(model: Qwen2Config, cfg: Any, kind: str) -> Plan:
    """Of `train_step` with cfg's settings, once the optimizer has its moments; at most, where not
    all is `trainable`."""
    d, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    heads, vocab, gpu = model.num_attention_heads, model.vocab_size, kind == "cuda"
    q, kv = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    number = 2 if gpu else 4  # bytes between products; residual stream and hidden states: 4
    adapters, own, lm = lora.n_weights(model, cfg.lora_rank), 3 * d * d, flops.n_parameters(model)
    learning = cfg.trainable == "all"
    frozen_in_bf16 = gpu and adapters and cfg.model_path
    weights: float = (2 if frozen_in_bf16 else 4) * lm + 4 * (adapters + own)
    gradients: float = 4 * (learning * (adapters or lm) + (own if cfg.n_ahead else 0))
    ranks = parallel.size()
    gathered = weights if ranks > 1 else 0  # whole as long as an update takes
    weights, gradients = weights / ranks, gradients / ranks
    held = gradients if cfg.grad_accum > 1 else 0  # of the micro-batches before
    head = 4 * vocab * d * (learning and not adapters)  # a gradient of the head's weight
    tied = head * model.tie_word_embeddings  # waits to be added to the embedding's gradient

    # what the forward keeps for the backward pass
    n, t, p = cfg.batch_size, cfg.max_length, cfg.n_passes
    if cfg.n_ahead:
        layout = ThoughtLayout(cfg.n_ahead, cfg.n_ahead_talk, p, t)
        text, packed, group = layout.n_text, layout.packing.n_packed, layout.packing.n_group
        talk, thought = n * t * p * layout.n_ahead_talk, n * t * p * layout.n_sampled
        cache = 2 * number * layers * kv * n * layout.rollout_packing.n_packed
        size = torch.get_num_threads() * attention.SCORES_PER_PIECE
        size = min(t, max(1, size // (n * heads * group * (text + group))))
        scores = n * heads * (text**2 + t * group * ((t + size) // 2 + group))
        ends = 5 * talk + thought + n * text  # the mixing head's, and copies of hidden states
    else:
        text = packed = t
        talk = thought = cache = scores = ends = 0
    tokens = n * packed
    whole = number * tokens * (4 * d + 2 * q + 2 * kv + 4 * inner + 7 * cfg.lora_rank) + (
        0 if gpu else 4 * scores)  # of a block
    inputs, share = 4 * tokens * d, cfg.checkpointing
    if gpu:  # residual stream; o_proj's output, queries, keys, values, attention's, gate and up
        blocks = layers * (inputs + (1 - share) * tokens * (
            2 * d + 4 * q + 4 * kv + 4 * heads + 4 * inner))
        again = max(0, whole - blocks / layers)  # what a block makes anew in its backward pass
    else:
        recomputed = round(share * layers)
        blocks = recomputed * inputs + (layers - recomputed) * whole
        again = whole - inputs if recomputed == layers else 0
    if cfg.trainable == "mixing_head":  # no gradient goes through them
        blocks = again = 0
    backward = number * tokens * (2 * d + 2 * inner + (4 * q if gpu else 0))
    kept = blocks + 8 * tokens * d + 4 * d * ends + 8 * packed * model.head_dim

    def chunked(n_rows: float) -> float:
        """Products with the head, of so many rows, beside the rows and their gradients."""
        size = max(1, CHUNK_LOGITS.get(kind, 2**24) // vocab)
        copies = 2 if gpu or (cpu.onednn and head) else 1  # of logits: exact, or transposed
        more = head * (n_rows >= 2 * size and (gpu or cpu.onednn))  # a chunk's gradient
        cast = 2 * vocab * d if gpu else 0
        return min(n_rows, size) * 4 * (copies * vocab + d) + more + cast

    rows = n * text + talk
    live = thought * live_share(cfg)
    nll = 8 * rows * d + head + chunked(rows)
    policy = 4 * rows * d + head + 8 * live * d + head + chunked(live)
    loss = max(nll, policy if thought else 0)
    begun = 4 * d * (rows + live + 3 * tokens + 2 * thought) + (2 if thought else 1) * head
    a_block = 4 * flops.block_weights(model) / layers * (learning and not adapters)
    stages = {
        "sampling": held + cache + chunked(n * t) * bool(cache),
        "the loss": held + kept + max(loss, begun),
        "the last block's backward pass": (
            held + blocks + (tied if held else head) + backward + again),
        "the first block's": (gradients + tied - (0 if held else head + a_block)
                              + inputs + whole + backward),
        "the embedding's": gradients + (head if held else tied) + inputs}
    parts = {"weights": weights, "moments": 2 * gradients, "gradients": gradients,
             "gathered weights": gathered,
             "activations": kept, "head and logits": loss, "a block's backward pass":
             backward + again, "cache of sampling": cache}
    certain = max(gradients, held + learning * kept / 2)  # half, as nobody has measured a GPU
    return Plan(parts, stages, weights + gathered + 2 * gradients + certain)


def live_share(cfg: Any) -> float:
    """Of the thoughts, about how many have a gradient of their own."""
    return bool(cfg.policy_weight) * (0.5 if cfg.clamp_advantage and cfg.n_passes > 1 else 1.0)


# ---- what would fit


def levers(model: Qwen2Config, cfg: Any) -> Iterator[list[dict[str, Any]]]:
    """Changes of settings that save memory, those first that cost least; each from mild to strong.
    The first three learn the same."""
    n = cfg.pretrain_batch_size if cfg.model_path is None and cfg.pretrain_steps else 1
    yield [{"pretrain_batch_size": n >> i} for i in range(1, n.bit_length())]
    n = cfg.batch_size
    yield [{"batch_size": i, "grad_accum": cfg.grad_accum * n // i} for i in range(n - 1, 0, -1)
           if n % i == 0 and not cfg.normalize_advantage]
    yield [{"checkpointing": 1.0}] if cfg.checkpointing < 1 else []
    narrow = min(model.hidden_size, model.intermediate_size,
                 model.num_key_value_heads * model.head_dim)
    yield [{"lora_rank": 16}] if cfg.model_path and cfg.trainable == "all" and (
        not cfg.lora_rank and narrow >= 16) else []
    yield [{"n_passes": i} for i in range(cfg.n_passes - 1, 1, -1)] if cfg.n_ahead else []
    yield [{"max_length": cfg.max_length >> i} for i in (1, 2, 3, 4) if cfg.max_length >> i >= 32]


def changes(model: Qwen2Config, cfg: Any, kind: str, room: float
            ) -> list[tuple[dict[str, Any], float]]:
    """Up to three changes with which an update fits into `room` bytes, and the bytes that each
    saves after those before it; empty: there are none.

    The last of them is as early a lever as can be, and they are as few, and as mild.
    """
    ways = [lever for lever in levers(model, cfg) if lever]
    chosen = [c for k in (1, 2, 3) for c in combinations(range(len(ways)), k)]

    def peak(steps: list[dict[str, Any]]) -> float:
        return of_run(model, replace(cfg, **{k: v for s in steps for k, v in s.items()}), kind).peak
    for choice in sorted(chosen, key=lambda c: (c[-1], len(c))):
        steps = [ways[i][-1] for i in choice]
        if peak(steps) > room:
            continue
        for place, i in enumerate(choice):
            steps[place] = next(s for s in ways[i]
                                if peak([*steps[:place], s, *steps[place + 1:]]) <= room)
        peaks = [peak(steps[:k]) for k in range(len(steps) + 1)]
        return [(s, before - after) for s, before, after in zip(steps, peaks, peaks[1:])]
    return []


def in_options(found: list[tuple[dict[str, Any], float]]) -> str:
    return ", ".join(" ".join(f"--{k} {v}" for k, v in change.items()) + f" saves {in_words(saved)}"
                     for change, saved in found)


def refuse(model: Qwen2Config, cfg: Any, device: torch.device) -> None:
    """InputError where even less than an update can need is more than there is: of the device's
    memory, or of the host's for the windows and random numbers that wait."""
    drawn = cfg.n_passes * cfg.max_length * max(0, cfg.n_ahead - 2)
    windows = max(cfg.batch_size * cfg.grad_accum, cfg.eval_windows)
    host = windows * (16 * (cfg.max_length + cfg.n_ahead_talk) + 4 * drawn)
    for what, size, there in (
            ("an update", of_run(model, cfg, device.type).least, total_memory(device)),
            ("the windows of an update or evaluation", host, total_memory(torch.device("cpu")))):
        if size > there:
            raise InputError(f"{what} would need more than {int(size) >> 30:,} GiB of memory, and "
                             f"there are {there >> 30:,}: lower batch_size, grad_accum, n_passes, "
                             "max_length, eval_windows or the model's sizes")


# ---- in words


def fits(model: Qwen2Config, cfg: Any, kind: str, room: float) -> str:
    """Whether an update fits into `room` bytes, or what would make it."""
    if of_run(model, cfg, kind).peak <= room:
        return "fits"
    found = in_options(changes(model, cfg, kind, room))
    return f"fits with {found}" if found else "does not fit with any three changes"


def summary(model: Qwen2Config, cfg: Any, device: torch.device) -> str:
    """A line for the beginning of a run."""
    planned, there = of_run(model, cfg, device.type), total_memory(device)
    return (f"planned: an update takes {in_words(planned.peak)}, of them "
            f"{in_words(planned.state)} weights and moments; there are {in_words(there)}: "
            + fits(model, cfg, device.type, USABLE * there))


def advice(model: Qwen2Config, cfg: Any, device: torch.device) -> str:
    """For whom the memory was not enough: what takes a quarter less than planned, or than there is;
    '' where nothing does."""
    there = min(of_run(model, cfg, device.type).peak, total_memory(device))
    found = in_options(changes(model, cfg, device.type, 0.75 * there))
    return f"the memory is used up: by plan {found}" if found else ""


def report(model: Qwen2Config, cfg: Any, device: torch.device) -> str:
    """What --plan prints: bytes on the device at hand, and on which cards an update fits."""
    lines = []
    for kind in dict.fromkeys((device.type, "cuda")):
        planned = of_run(model, cfg, kind)
        rows = {k: v for k, v in planned.parts.items() if v} | {"at its highest": planned.peak}
        lines += [f"an update on {kind}" + " (by arithmetic, not measured)" * (kind == "cuda"),
                  *(f"  {name:26}{in_words(size):>10}" for name, size in rows.items())]
        lines[-1] += f", in {max(planned.stages, key=planned.stages.__getitem__)}"
    lines += [f"a state on disk {in_words(planned.state)}; {cfg.keep} newest, the best and one "
              f"being written {in_words((cfg.keep + 2) * planned.state)}",
              summary(model, cfg, device)]
    shape = (cfg.batch_size * cfg.grad_accum, cfg.max_length, cfg.n_ahead, cfg.n_ahead_talk)
    warm = cfg.warm_steps if cfg.n_ahead else 0
    work = (cfg.max_steps * flops.of_update(
                model, *shape, cfg.n_passes, live_share(cfg), cfg.lora_rank > 0)
            + warm * flops.of_update(model, *shape, 1, 0.0, cfg.lora_rank > 0))
    for size, card in CARDS.items():
        lines.append(f"{size:3} GB: " + fits(model, cfg, "cuda", size * 1e9))
        if card and lines[-1].endswith("fits"):
            hours = work / (MFU * flops.PEAKS[card]) / 3600
            time = f"{hours / 24:.1f} days" if hours >= 48 else f"{max(0.1, hours):.1f} hours"
            lines[-1] += (f"; {warm + cfg.max_steps:,} updates in {time} of one {card}"
                          f" at {MFU:.0%} MFU (stated, not measured)")
    return "\n".join(lines)
