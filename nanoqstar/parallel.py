"""Many processes, one run: `torchrun --nproc-per-node N train.py ..`, on one node or several.

FSDP2 shards a QuietStar by block and root; ranks share an update's windows, never its result: what
is learned is a function of the step alone. Everything here is plain for one process. What ranks say
to each other is JSON over gloo; a decision (an error, a signal, a save) is one of all of them.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # now: it keeps, to the end, a group it finds when imported

from nanoqstar import InputError
from nanoqstar.cli import WRONG_INPUT, Interrupted

TIMEOUT = timedelta(minutes=10)  # a rank that is not heard of for so long ends the run
# of a QuietStar: parameters are whole within them
FORWARDS = ("rollout", "loss", "given_loss", "text_loss")
LOST = "another process of this run has ended, or was not heard of for too long"


class Agreed(InputError):
    """Raised on all ranks: the first one says it."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(device: str) -> Iterator[None]:
    """The processes that torchrun has started, together; one started alone is left alone.

    device: the setting. InputError: torchrun's variables are not all there, or too few GPUs.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        yield
        return
    lacking = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if lacking or device == "mps":
        raise InputError(f"WORLD_SIZE is set and {', '.join(sorted(lacking)) or 'device mps'} "
                         + ("is not" if lacking else "knows no other process")
                         + ": start several processes with torchrun, on cuda or cpu, or unset it")
    on_gpus, local = device != "cpu" and torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if on_gpus and local >= torch.cuda.device_count():
        raise InputError(f"process {local} of this machine has no GPU, there are "
                         f"{torch.cuda.device_count()}: lower --nproc-per-node")
    if on_gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=TIMEOUT)
    try:
        yield
        exchange(None)  # nobody leaves before the others have heard all
    except (Agreed, Interrupted) as end:
        if rank() == 0:
            raise
        with suppress(RuntimeError):  # torchrun ends all once one has: the first one speaks before
            exchange(None)
        raise SystemExit(getattr(end, "number", WRONG_INPUT - 128) + 128) from None
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise InputError(LOST) from error
    finally:  # on every way out, or gloo's threads abort at the process's end
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether it is what a collective raises for want of the others."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


# ---- words and decisions


def another_group() -> Any:
    """For the words of a thread beside training; None for one process."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if size() > 1 else None


def exchange(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, which JSON can hold, in order."""
    if size() == 1:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(mine)]), group)
    longest = int(max(lengths))
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group)
    return [json.loads(bytes(x[:n].tolist())) for x, n in zip(texts, lengths, strict=True)]


def together(act: Callable, *args: Any, group: Any = None) -> Any:
    """act(*args) on every rank; what goes wrong on any, InputError or OSError, all raise."""
    result, error = None, None
    try:
        result = act(*args)
    except (InputError, OSError) as caught:
        if size() == 1:
            raise
        error = caught
    said = exchange(error and [isinstance(error, OSError), str(error)], group)
    for is_system, sentence in filter(None, said):
        raise (OSError if is_system else Agreed)(sentence)
    return result


def first(act: Callable, *args: Any, group: Any = None) -> Any:
    """act(*args) on rank 0, and what it returns, which JSON can hold, on all."""
    result = together(lambda: act(*args) if rank() == 0 else None, group=group)
    return exchange(result, group)[0]


@contextmanager
def firsts(context: AbstractContextManager[Path]) -> Iterator[Path]:
    """A context of rank 0 whose path all know."""
    with ExitStack() as held:
        yield Path(first(lambda: str(held.enter_context(context))))


# ---- shares of numbers


def share(n: int, of: int | None = None) -> range:
    """Which of n things are this rank's, or those of rank `of`: as many as the others', or one."""
    of = rank() if of is None else of
    return range(n * of // size(), n * (of + 1) // size())


def collect(mine: torch.Tensor, n: int) -> torch.Tensor:
    """All n rows, on the CPU, of which each rank has its share."""
    if size() == 1:
        return mine
    rows = mine.new_empty(n, *mine.shape[1:])
    for of in range(size()):
        part = rows[share(n, of).start:share(n, of).stop]
        dist.broadcast(part.copy_(mine) if of == rank() else part, of)
    return rows


def summed(stats: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The ranks' shares of an update's means, added up."""
    if size() > 1 and stats:
        values = torch.stack([x.detach().double() for x in stats.values()]).cpu()
        dist.all_reduce(values)
        return dict(zip(stats, values, strict=True))
    return dict(stats)


# ---- shards of parameters: rows, as torch.chunk has them


def shard(model: Any, device: torch.device) -> None:
    """FSDP2 of a QuietStar, after adapters, checkpointing and compilation; it may be on meta.

    Once gathered, a block serves rollout, score and backward. Gradients are summed: a loss is a
    share of the update's. One process: as it is.
    """
    if size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (size(),))
    for module in (*model.lm.model.layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other sum
    for name in FORWARDS:
        register_fsdp_forward_method(model, name)


def is_sharded(model: Any) -> bool:
    return hasattr(model, "unshard")


def reshard_after(model: Any, last: bool) -> None:
    """Whether the next backward is an update's last: blocks stay gathered until then."""
    if is_sharded(model):
        model.set_reshard_after_backward(last)


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """All parameters whole on every rank: within, no rank waits for another to compute with them.

    What is written into those that are no block's and not the language model's stays.
    """
    if not is_sharded(model):
        yield
        return
    modules = (*model.lm.model.layers, model)
    for module in modules:
        module.unshard()
    try:
        yield
        written = {n: x.detach().clone() for n, x in model.named_parameters() if n[:3] != "lm."}
    finally:
        for module in modules:
            module.reshard()
    for name, x in written.items():
        fill(model.get_parameter(name), x)


def follow(model: Any) -> None:
    """Has gradients computed of what learns now: FSDP2 looks at the first gathering only."""
    learning = [p.requires_grad for p in model.parameters()]
    with gathered(model):
        for p, learns in zip(model.parameters(), learning, strict=True):
            p.requires_grad_(learns)


def local(x: Any) -> torch.Tensor:
    """What this rank has of a tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def rows(x: torch.Tensor) -> slice:
    """Which rows those are."""
    if local(x) is x:
        return slice(0, len(x))
    each = -(-len(x) // size())
    start = min(rank() * each, len(x))
    assert len(local(x)) == min(each, len(x) - start), (x.shape, local(x).shape)
    return slice(start, start + len(local(x)))


@torch.no_grad()
def fill(x: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies this rank's rows of a whole tensor."""
    local(x).copy_(whole[rows(x)])


def whole(x: Any) -> torch.Tensor:
    """A tensor of all ranks' rows, gathered on its device."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def on_first(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Whole tensors in rank 0's host memory, one after the other; nothing on the others."""
    kept = {}
    for name, x in tensors.items():
        x = whole(x.detach())
        if rank() == 0:
            kept[name] = x.cpu()
    return kept
