"""What training on a CPU needs and torch does not do by itself; a GPU's compiler and allocator do.

Products go to the library that is faster here, what lies between them is done while it is in the
cache, and freed memory is kept. Every function has the value of the formula in its docstring.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CACHED = 2**16  # numbers of a piece that stays in a core's own cache while it is worked on
LOGITS = 12_000_000  # held at once: large products, and little memory
ROWS, COLUMNS = 512, 8192  # the most of the products that are timed
MARGIN = 1.3  # times as fast oneDNN has to be: another day must not choose otherwise
onednn = False  # whether it computes the products: of `choose_products`


def is_eager_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def is_large(x: torch.Tensor) -> bool:
    """Whether it pays to work on x in pieces."""
    return x.numel() > CACHED and is_eager_cpu(x)


def keep_memory() -> None:
    """Freed memory stays with the process (glibc), but for the largest pieces: every step needs the
    same again, and fresh pages cost a fifth of a step with a real vocabulary."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**26)  # M_MMAP_THRESHOLD: of the pieces that are given back
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


# ---- products: torch's own go through MKL, which leaves much of an AMD core unused


def has_onednn() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a (N, K) @ b (K, M) + bias (M,)."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")


def is_onednns(x: torch.Tensor) -> bool:
    return onednn and x.dtype == torch.float32 and is_eager_cpu(x)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (N, K) @ b (K, M)."""
    return by_onednn(a, b) if is_onednns(a) else a @ b


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (N, M) += a (N, K) @ b (K, M)."""
    if is_onednns(a):
        total += by_onednn(a, b)
    else:
        total.addmm_(a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return by_onednn(x, weight.T, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x, weight), (needs_x, needs_weight, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
        return (by_onednn(grad, weight) if needs_x else None,
                by_onednn(grad.T, x) if needs_weight else None,
                grad.sum(0) if needs_bias else None)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
           ) -> torch.Tensor:
    """x (.., I) @ weight (O, I).T + bias."""
    if not is_onednns(x) or not is_large(x):
        return F.linear(x, weight, bias)
    out = _Linear.apply(x.flatten(0, -2), weight, bias)
    return out.view(*x.shape[:-1], len(weight))


def choose_products(weights: Iterable[torch.Tensor]) -> float:
    """Has oneDNN compute products, where it is clearly the faster one with weights of these shapes.

    Those that are matrices (O, I) count, each shape once: the product with a weight and its two
    gradients. Returns how many times as fast as torch's own products oneDNN's are, in CPU seconds;
    0 where torch has no such operator. It takes less than a step of training.
    """
    global onednn
    onednn, times = False, [0.0, 0.0]
    if not has_onednn():
        return 0.0
    for n_out, n_in in {tuple(w.shape) for w in weights if w.dim() == 2}:
        n_rows, n_out = max(1, min(ROWS, LOGITS // n_out)), min(n_out, COLUMNS)
        x, weight, grad = (torch.randn(size) for size in (
            (n_rows, n_in), (n_out, n_in), (n_rows, n_out)))
        for a, b in ((x, weight.T), (grad, weight), (grad.T, x)):
            times = [times[0] + seconds(torch.matmul, a, b), times[1] + seconds(by_onednn, a, b)]
    onednn = times[0] > MARGIN * times[1]
    return times[0] / times[1]


def seconds(function: Callable[..., Any], *args: torch.Tensor) -> float:
    """The best of three, or of as many as take 3 ms: the one that other work disturbed least, and,
    of products that take microseconds, after the first ones, which are slower."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.003:
        start = time.process_time()
        function(*args)
        times.append(time.process_time() - start)
    return min(times)


# ---- between products, in pieces


def pieces(*tensors: torch.Tensor, dim: int = 0) -> Iterable[tuple[torch.Tensor, ...]]:
    """The same rows of each, so few that they stay in the cores' caches."""
    x = tensors[0]
    n_rows = max(1, torch.get_num_threads() * CACHED * x.shape[dim] // x.numel())
    return zip(*(x.split(n_rows, dim) for x in tensors), strict=True)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        out, scale = torch.empty_like(x), x.new_empty(len(x), 1)
        for rows, s, o in pieces(x, scale, out):
            torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=s)
            s.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            torch.mul(rows, s, out=o).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for rows, s, g, out in pieces(x, scale, grad, grad_x):
            normed = rows * s
            by_weight = normed * g
            grad_weight += by_weight.sum(0)
            mean = (by_weight @ weight).div_(x.shape[1])[:, None]
            torch.mul(g, weight, out=out).addcmul_(normed, mean, value=-1).mul_(s)
        return grad_x, grad_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (.., D) / sqrt(mean(x^2) + eps) * weight, statistics in fp32 at least."""
    if is_large(x) and x.dtype == weight.dtype in (torch.float32, torch.float64):
        return _RMSNorm.apply(x.flatten(0, -2), weight, eps).view(x.shape)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        half, out = x.shape[-1] // 2, torch.empty_like(x)
        ctx.save_for_backward(cos, sin)
        for rows, c, s, o in pieces(x, cos, sin, out, dim=-2):
            torch.mul(rows, c, out=o).addcmul_(rows.roll(half, -1), s)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + (x with its halves swapped) * sin, for x (B, heads, N, d), in fp32 at least."""
    if is_large(x) and x.dtype == cos.dtype:
        return _Rotate.apply(x, cos, sin)
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)
