"""LoRA (arXiv 2106.09685) by hand: beside each of a block's seven products W x learns a low-rank
alpha / rank * B A x, and W stays as it is.

The model is wrapped, never edited: a layer gets two children and a forward hook, so all its names
remain, and those of the adapters are PEFT's: `q_proj.weight`, `q_proj.lora_A.weight`.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from nanoqstar import InputError, parallel
from nanoqstar.files import write_json
from nanoqstar.qwen2 import Qwen2Config

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def n_weights(config: Qwen2Config, rank: int) -> int:
    """Of all adapters. InputError: the rank is larger than a layer's width."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    if rank > (narrowest := min(hidden, inner, q, kv)):
        raise InputError(f"lora_rank={rank} is more than the width of the model's narrowest layer: "
                         f"take at most {narrowest}")
    return config.num_hidden_layers * rank * (7 * hidden + 2 * q + 2 * kv + 3 * inner)


def add(lm: Any, rank: int, alpha: int, seed: int = 0) -> None:
    """Gives the layers of a Qwen2 adapters, in fp32 at least: A (rank, in) uniform as PEFT's, B
    (out, rank) zero, so that it computes what it did. Before checkpointing, compilation and
    sharding, which keep to what they find; what learns is the optimizer's matter (`learns`)."""
    lm.lora_alpha = alpha
    for name, layer in list(lm.named_modules()):
        if name.endswith(LAYERS):
            w = layer.weight
            for child, shape in (("lora_A", (rank, layer.in_features)),
                                 ("lora_B", (layer.out_features, rank))):
                x = w.new_empty(shape, dtype=torch.promote_types(w.dtype, torch.float32))
                layer.add_module(child, nn.ParameterDict({"weight": x}))
            layer.register_forward_hook(partial(adapted, scale=alpha / rank))
    lm.model.embed_tokens.register_forward_hook(widened)
    init(lm, seed)


def init(lm: Any, seed: int = 0) -> None:
    """Fresh values of all adapters; those of a model on meta have none before it is filled."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lm.modules():
        if hasattr(layer, "lora_A"):
            draws = torch.rand(layer.lora_A.weight.shape, generator=generator)
            parallel.fill(layer.lora_A.weight, (draws * 2 - 1) * layer.in_features**-0.5)
            parallel.fill(layer.lora_B.weight, torch.zeros(layer.lora_B.weight.shape))


def adapted(layer: Any, inputs: Any, output: torch.Tensor, scale: float) -> torch.Tensor:
    """What a layer made of its input (.., in), plus scale * B A x: (.., out), of the same dtype."""
    x, a, b = inputs[0], layer.lora_A.weight, layer.lora_B.weight
    return output.add(F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)), alpha=scale)


def widened(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Embeddings under autocast in fp32, also if stored in bf16: then so is the sum of the blocks'
    work, and the model computes what fp32 masters of the same numbers would."""
    return output.float() if torch.is_autocast_enabled(output.device.type) else output


def learns(name: str, rank: int) -> bool:
    """Whether a QuietStar's parameter may: with a rank, adapters in place of their model."""
    return not name.startswith("lm.") or (".lora_" in name) == (rank > 0)


def split(lm: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of (model, adapters) by name; adapters that have learned nothing are none."""
    model = {name: x.detach() for name, x in lm.state_dict().items()}
    adapters = {name: model.pop(name) for name in list(model) if ".lora_" in name}
    return model, adapters if any(x.any() for n, x in adapters.items() if "lora_B" in n) else {}


def merged(lm: Any) -> dict[str, torch.Tensor]:
    """The tensors of a plain model that computes the same, W + alpha / rank * B A, on the CPU and
    in fp32 at least; of one without adapters its own. The model itself is not changed."""
    model, adapters = split(lm)
    for name, x in model.items() if adapters else ():
        x = x.cpu().to(torch.promote_types(x.dtype, torch.float32))
        b, a = (adapters.get(name.replace("weight", f"lora_{n}.weight")) for n in "BA")
        model[name] = x if a is None or b is None else x.add(
            b.cpu() @ a.cpu(), alpha=lm.lora_alpha / len(a))
    return model


def save(folder: Path, lm: Any, base: str) -> None:
    """Writes the adapters of `base`, a model's folder or Hub id, as PEFT reads them; none: nothing.
    Into a new folder, as beside a config.json they would have transformers load `base` instead."""
    if adapters := {f"base_model.model.{n}": x.contiguous() for n, x in split(lm)[1].items()}:
        folder.mkdir()
        write_json(config := folder / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": min(next(iter(adapters.values())).shape), "lora_alpha": lm.lora_alpha,
            "lora_dropout": 0.0, "target_modules": LAYERS, "bias": "none",
            "fan_in_fan_out": False, "inference_mode": True})
        save_file(adapters, file := folder / "adapter_model.safetensors", {"format": "pt"})
        shutil.copymode(config, file)  # safetensors' own is for its owner alone
