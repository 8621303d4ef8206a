"""Thinking inside transformers' own `generate`, of a plain model that it has loaded:

    from nanoqstar.transformers import generate
    model.generate(**inputs, custom_generate=generate)  # n_ahead=8, folder=..: as below

Nothing of the Hub is executed and no weight is copied. transformers 4.56 and later take a function
there. A `streamer` they do not hand on to one.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoqstar import InputError, sampling
from nanoqstar.hf import Thinking, check_context, read_info, read_thinking, resolve, stamp
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.tokenizer import load_tokenizer, unknown_ids
from nanoqstar.weights import check, copy, read_config, read_header

Added = tuple[Qwen2Config, Thinking, Tensor, dict[str, Tensor]]


@lru_cache(1)
def read_added(folder: Path, stamp: tuple[int, int] | None, dtype: torch.dtype) -> Added:
    """What thinking needs beside a model's weights: its sizes, how it was taught, which ids no
    thought may hold (V,), and start, end and mixing head in `dtype`. Raises InputError."""
    config, own = read_config(folder), folder / "quietstar.safetensors"
    if not own.exists():
        raise InputError(f"{folder} has no quietstar.safetensors: its model was never taught to "
                         "think, or is in the official layout, which `python -m nanoqstar.export` "
                         "turns into this one")
    stored, metadata = read_header(own)
    with torch.device("meta"):
        model = QuietStar(Qwen2(config))
    shapes = {n: p.shape for n, p in model.named_parameters() if not n.startswith("lm.")}
    check(own, stored, shapes)
    copy(stored, tensors := {n: torch.empty(shape, dtype=dtype) for n, shape in shapes.items()})
    return (config, read_thinking(own, read_info(folder)[1] | metadata),
            unknown_ids(load_tokenizer(folder), config.vocab_size), tensors)


def thinker(model: Any, folder: str | None = None) -> tuple[QuietStar, Thinking]:
    """A transformers model as a QuietStar that shares its weights, and how it was taught to think.

    folder: a model's or a run's, or a Hub id, that holds quietstar.safetensors and tokenizer.json;
    None: where the model was loaded from. Raises InputError.
    """
    found = resolve(folder or model.name_or_path)
    given = dict(model.state_dict(keep_vars=True))
    x = next(iter(given.values()))
    config, thinking, banned, tensors = read_added(
        found, stamp(found), torch.promote_types(x.dtype, torch.float32))
    with torch.device("meta"):
        ours = QuietStar(Qwen2(config), thinking.thought_temperature,
                         reread=thinking.delimiters == "reread")
    wanted = ours.lm.state_dict()
    wrong = [name for name, p in wanted.items() if name not in given or given[name].shape != p.shape
             or (given[name].dtype, given[name].device) != (x.dtype, x.device)]
    if wrong:
        raise InputError(f"{wrong[0]} is not in the model as in {found}: load it whole onto one "
                         "device, in one dtype, neither quantised nor wrapped")
    tensors = {name: y.to(x.device) for name, y in tensors.items()}
    ours.load_state_dict(tensors | {f"lm.{name}": given[name] for name in wanted}, assign=True)
    ours.banned = banned.to(x.device)
    return ours, thinking


def generate(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
             generation_config: Any, n_ahead: int | None = None, folder: str | None = None,
             **model_kwargs: Any) -> Tensor:
    """For `model.generate(.., custom_generate=generate)`: ids (B, N) and what follows them.

    n_ahead: K of a thought before every token, 0 for none; None: as trained. folder: `thinker`'s.
    The generation config says all the rest, do_sample, temperature and eos_token_id included; it
    is about the text, a thought is sampled at the temperature it was trained with. Random numbers
    are torch's (`torch.manual_seed`). Raises InputError.
    """
    ours, thinking = thinker(model, folder)
    n_ahead = thinking.n_ahead if n_ahead is None else n_ahead
    if n_ahead < 0 or n_ahead in (1, 2):
        raise InputError(f"n_ahead={n_ahead} leaves no sampled token: start and end need n_ahead "
                         ">= 3 (or 0 for no thoughts)")
    if generation_config.num_beams not in (None, 1) or generation_config.return_dict_in_generate:
        raise InputError("thinking writes one text at a time and returns its ids: leave num_beams "
                         "and return_dict_in_generate out")
    input_ids = input_ids.to(ours.lm.head_weight.device)
    mask = model_kwargs.get("attention_mask")  # None: no padding
    is_text = torch.ones_like(input_ids) if mask is None else mask.to(input_ids)
    if not is_text.numel() or not is_text[:, -1].all() or (is_text.diff(dim=1) < 0).any():
        raise InputError("each prompt must be ids, padded on the left only: give the tokenizer "
                         "padding_side='left', and no empty prompt")
    prompts = [row[kept > 0].tolist() for row, kept in zip(input_ids, is_text, strict=True)]
    n_new, pad = generation_config.max_length - input_ids.shape[1], generation_config.pad_token_id
    check_context(ours.lm.config, max(map(len, prompts)) + n_new + n_ahead)
    unfinished = torch.ones_like(input_ids[:, 0], dtype=torch.bool)

    def choose(logits: Tensor) -> Tensor:
        """The next ids (B,), as transformers chooses them."""
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            newest = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            newest = scores.argmax(-1)
        return newest if unfinished.all() else torch.where(unfinished, newest, pad)

    for step in sampling.generate(ours, prompts, n_new, n_ahead, choose=choose):
        input_ids = torch.cat((input_ids, step.tokens[:, None]), dim=1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if not unfinished.any():
            break
    return input_ids
