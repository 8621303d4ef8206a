"""The benchmark counts and measures what it says."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanoqstar import bench
from nanoqstar.objective import Valid, quiet_star_loss

SMALL = bench.Shape(bench.qwen(32, 2, 4, 2, 64, 50, tied=False, bias=False), 2, 5, 2, 2, 20)


def test_quartiles_by_hand():
    assert bench.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert bench.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 1.5, "high": 4.5}


@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, n_passes=1, n_ahead=3, n_ahead_talk=1),
                                   replace(SMALL, batch=1)])
def test_useful_flops_are_those_that_torch_counts(shape):
    """Products with weights exactly; attention besides, of which two-part computes a little more than is visible."""
    cpu, m, t = torch.device("cpu"), shape.model, shape.n_positions
    model = bench.make_model(shape, cpu)
    text, docs = bench.synthetic(shape, cpu)
    with FlopCounterMode(display=False) as counter:
        model.rollout(text, docs, torch.rand(shape.batch, shape.n_passes, t, shape.n_ahead - 2))
    sampling, _ = bench.flops(shape)
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items()
                   if "mm" in str(op) and "bmm" not in str(op))
    attention = 4 * m.num_attention_heads * m.head_dim * m.num_hidden_layers * shape.batch
    layout = shape.layout
    pairs = layout.n_text * (layout.n_text + 1) // 2 + sum(
        (i + 1) * (1 + shape.n_passes * (layout.n_sampled - 1)) + 1 + shape.n_passes * sum(
            place + 1 for place in range(1, layout.n_sampled)) for i in range(t))
    assert sampling == products + attention * pairs
    thoughts = torch.randint(m.vocab_size, (shape.batch, shape.n_passes, t, shape.n_ahead - 2))
    valid = Valid.from_docs(docs, shape.n_ahead_talk)
    with FlopCounterMode(display=False) as counter:
        states = model.score(text, docs, thoughts)
        loss, parts = quiet_star_loss(
            states, model.lm.head_weight, text, thoughts, valid, valid.counts(), base_weight=0.5, mixed_weight=0.5,
            policy_weight=1.0, clamp_advantage=True, reinforce_temperature=3.0)
        loss.backward()
    live = (parts["advantage"] != 0).double().mean().item()
    learning = bench.flops(shape, live)[1]
    assert 0.3 < live < 0.7 and learning < bench.flops(shape)[1]
    assert 0.9 < learning / counter.get_total_flops() < 1.15


@pytest.mark.parametrize("which", ["ours", "staged"])
def test_workers_report_times_and_memory(which):
    cpu = torch.device("cpu")
    times = bench.worker(which, SMALL, cpu, None, 2)["times"]
    assert len(times) == 2 and all(len(t) == 4 and sum(t) > 0 for t in times)
    memory = bench.worker(which, SMALL, cpu, None, 0)
    assert memory.keys() == {"resident", "peak"} and memory["resident"] > 2**20


def test_the_command_compares_in_one_run(tmp_path, monkeypatch, capsys):
    """At the demo's shape, which is small; ours must at least be measured, and the ratio be theirs over ours."""
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(bench, "ROUNDS", 1)
    threads = torch.get_num_threads()
    try:
        bench.main(["train", "--config", "tiny", "--device", "cpu", "--batch_size", "1", "--no_scaling",
                    "--json", str(tmp_path / "b.json")])
    finally:
        torch.set_num_threads(threads)
    result, printed = json.loads((tmp_path / "b.json").read_text()), capsys.readouterr().out
    train = result["train tiny"]
    assert {"hardware", "matrix_rate"} <= result.keys()
    assert {"speedup", "memory_ratio", "mfu", "parts", "step"} <= train.keys()
    assert 0 < train["mfu"]["median"] < 1 and "MFU" in printed and "times as fast" in printed
    assert train["memory_ratio"] > 0 and train["peak_bytes"] > 0
    ours = sum(train["parts"][k]["median"] for k in ("sampling", "forward", "backward"))
    assert abs(train["speedup"]["median"] / (train["staged"]["median"] / ours) - 1) < 0.2


def test_decoding_is_measured_against_the_bandwidth(monkeypatch):
    monkeypatch.setattr(bench, "copy_rate", lambda device: bench.spread([1e9]))
    result = bench.bench_sample(SMALL, torch.device("cpu"))
    assert set(result) == {f"batch {b}, {w}" for b in (1, 8) for w in ("thoughts of 5", "no thoughts")}
    weights = sum(p.numel() for n, p in bench.make_model(SMALL, torch.device("cpu")).lm.named_parameters()
                  if "embed_tokens" not in n) * 4
    one = result["batch 1, no thoughts"]
    assert abs(one["bound"] - weights / 1e9 / one["seconds_per_token"]["median"]) < 1e-9


def test_scaling_measures_every_size_once(monkeypatch):
    """The shape itself is known from before; a size that fails is left out."""
    shape, seen = bench.SHAPES["cpu"], []

    def run(which, shape, args, repeats):
        seen.append(shape)
        return {"failed": "no memory"} if shape.n_passes == 4 else {"times": [[shape.n_ahead, shape.n_passes, 0, 0]]}
    monkeypatch.setattr(bench, "run_worker", run)
    result = bench.bench_scaling(shape, SimpleNamespace(device="cpu"), bench.spread([77.0]))
    assert shape not in seen and len(seen) == len(set(seen)) == 2 + 2 + 3
    medians = {name: {value: s["median"] for value, s in row.items()} for name, row in result.items()}
    assert medians == {"n_ahead": {3: 5, 7: 77, 11: 13}, "n_passes": {1: 8, 2: 77},
                       "n_positions": {64: 9, 128: 9, 256: 9}}


def test_what_a_gpu_reports(monkeypatch, capsys):
    """The parts of the report that only a GPU has, on made-up times: MFU by hand, and what does not fit."""
    shape, args = replace(SMALL, batch=1, n_passes=4), SimpleNamespace(device="cuda")

    def run(which, shape, args, repeats):
        if which == "staged" and shape.n_positions > 20 or shape.batch == 8:
            return {"failed": "CUDA out of memory"}
        return {"times": [[1.0, 2.0, 3.0, 1.0]] * repeats, "live": [0.5] * repeats, "resident": 2**30, "peak": 2**31}
    monkeypatch.setattr(bench, "run_worker", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=2**33))
    rate = bench.spread([float(sum(bench.flops(shape, 0.5)))])
    variants = bench.bench_variants(shape, args, rate)
    assert variants["checkpointing 0.5"]["mfu"] == pytest.approx(1 / 7)
    assert variants["batch 4"]["mfu"] == pytest.approx(4 / 7) and variants["batch 4"]["bytes"] == 3 * 2**30
    assert variants["n_passes 2, batch 8"] == {"failed": "CUDA out of memory"}
    train = bench.bench_train(replace(shape, n_positions=40), args, rate)
    assert train["compared_at"] == 20
    assert train["speedup"]["median"] == pytest.approx(7 / 6) and train["memory_ratio"] == 1
    assert "3.0 of 8.0 GiB" in (printed := capsys.readouterr().out) and "trying T = 20" in printed


def test_unknown_config_is_one_sentence():
    with pytest.raises(SystemExit, match="no config 'nope'"):
        bench.shape_of("nope")
    assert bench.shape_of("qwen2_5_3b").model.hidden_size == 2048
    from data import fold
    assert bench.shape_of("small").model.vocab_size == len(fold.vocabulary(3, 0.1))
