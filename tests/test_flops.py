"""FLOPs are those that torch counts."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanoqstar import attention, bench, flops
from nanoqstar.objective import Objective, Valid

CPU = torch.device("cpu")
SMALL = bench.Shape(bench.qwen(32, 2, 4, 2, 64, 50, tied=False, bias=False), batch_size=2,
                    n_ahead=5, n_ahead_talk=2, n_passes=2, max_length=20)


def pair_flops(shape):
    """FLOPs of one query seeing one key, in all heads and blocks, in all windows."""
    m = shape.model
    return 4 * m.num_attention_heads * m.head_dim * m.num_hidden_layers * shape.batch_size


def products(counter):
    """FLOPs that torch counted for products with weights; attention's are batched."""
    return sum(n for op, n in counter.get_flop_counts()["Global"].items()
               if "mm" in str(op) and "bmm" not in str(op))


def drawn(shape):
    """Text, documents, uniform numbers, counts."""
    text, docs = bench.synthetic(shape)
    u = torch.rand(shape.batch_size, shape.n_passes, shape.max_length, shape.n_ahead - 2)
    return text, docs, u, Valid.from_docs(docs, shape.n_ahead_talk).counts()


@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, batch_size=1),
                                   replace(SMALL, n_passes=1, n_ahead=3, n_ahead_talk=1)])
def test_useful_flops_are_those_that_torch_counts(monkeypatch, shape):
    """Products exactly; of attention, two-part computes a little more than is visible."""
    monkeypatch.setattr(attention, "SCORES_PER_PIECE", 2**12 // torch.get_num_threads())
    model, (text, docs, u, counts) = bench.make_model(shape, CPU), drawn(shape)
    layout, n = shape.layout, shape.batch_size
    with FlopCounterMode(display=False) as counter:
        thoughts, sampled_lp = model.rollout(text, docs, u)
    sampling, _ = flops.thinking_flops(shape.model, layout, n)
    pairs = layout.n_text * (layout.n_text + 1) // 2 + sum(
        (i + 1) * (1 + shape.n_passes * (layout.n_sampled - 1)) + 1 + shape.n_passes * sum(
            offset + 1 for offset in range(1, layout.n_sampled)) for i in range(shape.max_length))
    assert sampling == products(counter) + pair_flops(shape) * pairs
    with FlopCounterMode(display=False) as counter:
        loss, stats = model.loss(text, docs, thoughts, sampled_lp, counts, Objective())
        loss.backward()
    live = float(stats["live"])
    _, learning = flops.thinking_flops(shape.model, layout, n, live)
    assert 0.2 < live < 0.8
    assert learning < flops.thinking_flops(shape.model, layout, n)[1]
    assert 0.9 < learning / counter.get_total_flops() < 1.15
    assert flops.of_update(shape.model, n, shape.max_length, shape.n_ahead, shape.n_ahead_talk,
                           shape.n_passes, live) == sampling + learning


@pytest.mark.parametrize("tied", [False, True])
def test_plain_training_by_torchs_count(tied):
    shape = replace(SMALL, model=replace(SMALL.model, tie_word_embeddings=tied))
    model, (text, docs, _, counts) = bench.make_model(shape, CPU), drawn(shape)
    with FlopCounterMode(display=False) as counter:
        model.text_loss(text, docs, counts, shape.n_ahead_talk)[0].backward()
    pairs = shape.max_length * (shape.max_length + 1) // 2
    counted = products(counter) + 3 * pair_flops(shape) * pairs
    assert flops.text_flops(shape.model, shape.max_length, shape.batch_size) == counted
    assert flops.of_update(shape.model, shape.batch_size, shape.max_length, 0, shape.n_ahead_talk,
                           shape.n_passes, 1.0) == counted


@pytest.mark.parametrize("name", ["tiny", "cpu_vocab"])
def test_parameters_are_those_of_the_products(name):
    model = bench.shape_of(name).model
    for config in (model, replace(model, tie_word_embeddings=not model.tie_word_embeddings)):
        with torch.device("meta"):
            made = bench.Qwen2(config)
        weights = sum(p.numel() for p in made.parameters() if p.dim() > 1)
        assert flops.n_parameters(config) == weights


@pytest.mark.parametrize(("card", "rate"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12), ("Tesla T4", None)])
def test_the_rate_of_a_card_by_its_name(card, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert flops.peak_flops(torch.device("cuda")) == rate
    assert flops.peak_flops(CPU) is None
