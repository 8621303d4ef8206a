"""Where and how a model runs: device, precision, activation checkpointing, compilation."""

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nanoqstar import InputError
from nanoqstar.attention import can_compile


def pick_device(wanted):
    """The torch device of a `device` setting: auto, cuda, mps or cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = wanted if wanted != "auto" else next(n for n, there in available.items() if there)
    if not available[name]:
        raise InputError(f"device {name} is not available here: use --device auto")
    return torch.device(name)


def autocast(device):
    """bf16 products over fp32 master weights on a GPU; plain fp32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def speed_up(model, device, checkpointing=False, compile=None):
    """Activation checkpointing and torch.compile, block by block; compile None: on CUDA only.

    On a CPU compiling takes a minute and wins 3% of a step (measured at `bench`'s cpu shape): the products are the
    library's either way.
    """
    layers = model.lm.model.layers
    if checkpointing:
        for i, block in enumerate(layers):
            layers[i] = checkpoint_wrapper(block, preserve_rng_state=False)  # nothing in a block is random
    if not (compile or compile is None and device.type == "cuda"):
        return
    if not can_compile(device):
        if compile:
            raise InputError("compile=true needs a C++ compiler (on a GPU Triton, too) and none is found: install g++, "
                             "or set --compile false")
        print("no C++ compiler or no Triton is found, so the model runs uncompiled and far slower: install g++")
        return
    for block in layers:
        block.compile(dynamic=False)
