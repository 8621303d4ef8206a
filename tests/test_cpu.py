"""What a CPU does in pieces or by another library is the plain formula, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from nanoqstar import cpu
from nanoqstar.cpu import choose_products, linear, product, rms_norm, rotate
from nanoqstar.qwen2 import rope_tables


def drawn(*size, seed=0, dtype=torch.float64):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


@pytest.fixture(params=["whole", "pieces"])
def in_pieces(request, monkeypatch):
    """Small tensors count as large, and are worked on a few rows at a time."""
    monkeypatch.setattr(cpu, "CACHED", {"whole": 10**6, "pieces": 50}[request.param])
    monkeypatch.setattr(cpu, "is_large", cpu.is_eager_cpu)


def test_rms_norm(in_pieces):
    """Against its formula, and its gradients against finite differences."""
    x, weight = drawn(2, 7, 12), drawn(12, seed=1)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    assert torch.allclose(rms_norm(x, weight, 0.1), expected, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.1), (x, weight), atol=1e-9)


def test_rotation(in_pieces):
    """Each pair of numbers turns by its angle, as complex numbers do."""
    x, positions = drawn(2, 3, 9, 8), torch.arange(18).view(2, 9)
    tables = rope_tables(positions, 8, 100.0, torch.float64)
    angles = positions[:, None, :, None] * 100.0**-(torch.arange(0, 8, 2).double() / 8)
    first, second = x.chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), -1)
    assert torch.allclose(rotate(x, *tables), expected, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: rotate(x, *tables), (x,), atol=1e-9)


def test_transposed_queries_keep_their_layout(in_pieces):
    """What attention makes contiguous again is not made so twice."""
    x = drawn(2, 9, 3, 8).transpose(1, 2)
    out = rotate(x, *rope_tables(torch.arange(9), 8, 100.0, torch.float64))
    assert out.stride() == x.stride()


needs_onednn = pytest.mark.skipif(not cpu.has_onednn(), reason="torch was built without oneDNN")


@needs_onednn
def test_a_linear_layer_by_onednn(monkeypatch, in_pieces):
    """Value and gradients in fp32, against float64, which is computed as ever."""
    monkeypatch.setattr(cpu, "onednn", True)
    calls, by_onednn = [], cpu.by_onednn
    monkeypatch.setattr(cpu, "by_onednn", lambda *args: calls.append(1) or by_onednn(*args))
    exact = [drawn(2, 40, 20), drawn(30, 20, seed=1), drawn(30, seed=2)]
    cotangent = drawn(2, 40, 30, seed=3)
    expected = linear(*exact)
    assert torch.equal(expected, F.linear(*exact)) and not calls
    ours = [x.detach().float().requires_grad_() for x in exact]
    out = linear(*ours)
    pairs = [(out, expected), *zip(torch.autograd.grad(out, ours, cotangent.float()),
                                   torch.autograd.grad(expected, exact, cotangent), strict=True)]
    for a, b in pairs:
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert (a - b).abs().max() < 1e-6 * b.abs().max()
    assert len(calls) == 3


@needs_onednn
def test_frozen_weights_have_no_gradient(monkeypatch, in_pieces):
    monkeypatch.setattr(cpu, "onednn", True)
    x, weight = (drawn(*s, dtype=torch.float32) for s in ((40, 20), (30, 20)))
    linear(x, weight.requires_grad_(False)).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(40, 20), atol=1e-5)
    assert weight.grad is None


@needs_onednn
@pytest.mark.parametrize("chosen", [False, True])
def test_products_and_sums_of_them(monkeypatch, chosen):
    monkeypatch.setattr(cpu, "onednn", chosen)
    weight, x, grad = (drawn(*s, dtype=torch.float32).detach()
                       for s in ((30, 20), (40, 20), (40, 30)))
    for a, b in ((x, weight.T), (grad, weight), (grad.T, x)):
        exact = a.double() @ b.double()
        assert (product(a, b) - exact).abs().max() < 1e-6 * exact.abs().max()
        total = torch.ones_like(exact).float()
        cpu.add_product(total, a, b)
        assert (total - 1 - exact).abs().max() < 1e-6 * exact.abs().max()


@needs_onednn
@pytest.mark.parametrize(("slower", "chosen"), [(1.2, False), (1.4, True)])
def test_the_faster_library_computes(monkeypatch, slower, chosen):
    """Only where the difference is no accident; each shape is timed once, in three products."""
    timed = []
    monkeypatch.setattr(cpu, "onednn", not chosen)
    monkeypatch.setattr(cpu, "seconds", lambda f, a, b: timed.append((a @ b).shape) or (
        slower if f is torch.matmul else 1.0))
    ratio = choose_products([torch.zeros(30, 20), torch.zeros(9), torch.zeros(30, 20)])
    assert ratio == pytest.approx(slower) and cpu.onednn is chosen
    assert timed[::2] == timed[1::2] == [(cpu.ROWS, 30), (cpu.ROWS, 20), (30, 20)]


def test_it_is_off_where_torch_has_no_such_operator(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    monkeypatch.setattr(cpu, "onednn", True)
    assert choose_products([torch.zeros(30, 20)]) == 0 and not cpu.onednn
