"""Where and how a model runs: device, precision, activation checkpointing, compilation."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._triton import has_triton

from nanoqstar import InputError, cpu

SMALL_WIDTH = 256  # of models whose products gain nothing from a third thread


def pick_device(wanted: str) -> torch.device:
    """The torch device of a `device` setting: auto, cuda, mps or cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    name = wanted if wanted != "auto" else next(n for n, there in available.items() if there)
    if not available[name]:
        raise InputError(f"device {name} is not available here: use --device auto")
    if name == "cuda" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # a nearly full GPU has no room for gaps
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    return torch.device(name)


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 products over fp32 master weights on a GPU; elsewhere as it is, fp32 as a rule."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler, and on a GPU Triton."""
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    return has_compiler and (device.type != "cuda" or has_triton())


def compiled(function: Callable, **options: Any) -> Callable:
    """torch.compile of a function with the settings that our graphs need, made when called for.

    One graph a shape: scoring and both kinds of rollout step, in training and in evaluation. A
    temperature is a setting: a graph for each, no scalars on the CPU.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.specialize_float = True
    return torch.compile(function, **options)


def speed_up(model: Any, device: torch.device, checkpointing: float = 0.0,
             compile: bool | None = None) -> None:
    """Activation checkpointing and torch.compile of a QuietStar's blocks; compile None: on CUDA.

    On a CPU uncompiled products go where they are fastest, and freed memory is kept.
    checkpointing: the share of activations that the backward pass recomputes. A compiled block
    chooses which, the cheapest ones for their size first; uncompiled, it is the share of blocks
    that are recomputed whole. On a CPU compiling takes a minute and wins 3% of a step (measured at
    `bench`'s cpu shape): the products are the library's either way.
    """
    layers = model.lm.model.layers
    if compile or (compile is None and device.type == "cuda"):
        if can_compile(device):
            import torch._dynamo  # takes a second, and only who compiles needs it
            import torch._functorch.config

            torch._functorch.config.activation_memory_budget = 1 - checkpointing
            torch._dynamo.config.recompile_limit = 64
            for block in layers:
                block.compile(dynamic=False)
            return
        if compile:
            raise InputError("compile=true needs a C++ compiler (on a GPU Triton, too) and none is "
                             "found: install g++, or set --compile false")
        print("no C++ compiler or no Triton is found, so the model runs uncompiled and far slower: "
              "install g++")
    if device.type == "cpu":
        cpu.keep_memory()
        cpu.choose_products([model.lm.head_weight, *layers.parameters()])
    for i in range(round(checkpointing * len(layers))):
        # nothing in a block is random
        layers[i] = checkpoint_wrapper(layers[i], preserve_rng_state=False)


def speed_up_decoding(model: Any, device: torch.device) -> None:
    """torch.compile of decoding's steps: products with one row become kernels tuned for the GPU."""
    if device.type != "cuda" or not can_compile(device):
        raise InputError("compiling for decoding needs a CUDA GPU, Triton and a C++ compiler: "
                         "leave --compile out")
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64
    for block in model.lm.model.layers:
        block.compile(dynamic=False, options={"coordinate_descent_tuning": True})


def pick_threads(wanted: int | None, hidden_size: int) -> None:
    """Sets torch's CPU threads: as wanted, else one a core, of which a small model uses two.

    The same on every start, because another number of threads rounds otherwise. `cli.command` has
    them sleep after a moment of waiting: where cores are taken, spinning costs minutes for seconds.
    """
    few = torch.get_num_threads() if hidden_size > SMALL_WIDTH else 2
    torch.set_num_threads(wanted or min(few, torch.get_num_threads()))


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine or the container that limits this process."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        return 2**62
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(pages, int(text)) if text.isdecimal() else pages
