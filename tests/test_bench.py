"""The benchmark times train.py's own step and says what it measured."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models

import train
from data import fold
from nanoqstar import InputError, bench, flops

SMALL = bench.Shape(bench.qwen(32, 2, 4, 2, 64, 50, tied=False, bias=False), batch_size=2,
                    n_ahead=5, n_ahead_talk=2, n_passes=2, max_length=20)
CPU = torch.device("cpu")


def config(what="train", device="cpu", **options):
    return bench.BenchConfig(what=what, device=device, **options)


@pytest.fixture
def in_process(monkeypatch):
    """What `run_worker` would do in processes of their own, here; one round of two steps."""
    commands, run_process = [], bench.subprocess.run

    def run(command, **options):
        if "worker" not in command:  # what the platform asks the system
            return run_process(command, **options)
        commands.append(command)
        which, shape, compile, repeats = json.loads(command[-1])
        shape["model"] = bench.Qwen2Config(**shape["model"])
        done = bench.worker(which, bench.Shape(**shape), CPU, compile, repeats)
        return SimpleNamespace(returncode=0, stdout="a line\n" + json.dumps(done), stderr="")
    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "REPEATS", 2)
    threads = torch.get_num_threads()
    yield commands
    torch.set_num_threads(threads)


def test_quartiles_by_hand():
    assert bench.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert bench.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 1.5, "high": 4.5}


def test_the_step_is_train_pys_own_in_four_parts(monkeypatch):
    """On a clock that ticks when it is read: each part is a tick, and the optimizer is the rest."""
    steps, readings = [], iter(range(1000))
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: steps.append(a) or real(*a))
    monkeypatch.setattr(bench, "clock", lambda device: next(readings))
    step = bench.our_step(SMALL, CPU, None, True)
    for n in range(2):
        times, live = step(n)
        assert times == [1, 1, 1, 7 - 3]  # 8 readings from the first to the last
        assert 0 < live < 1
    model, optimizer, batches, *_, cfg = steps[1]
    assert len(steps) == 2 and len(optimizer.state) == len(list(model.parameters()))
    assert (cfg.batch_size, cfg.max_length) == (SMALL.batch_size, SMALL.max_length)
    text, docs, u = batches[0]
    assert text.shape == docs.shape == (2, 22) and u.shape == (2, 2, 20, 3)


def test_memory_is_measured_without_the_optimizers_moments(monkeypatch):
    steps, real = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: steps.append(a) or real(*a))
    memory = bench.worker("ours", SMALL, CPU, None, 0)
    assert memory.keys() == {"resident", "peak"} and memory["resident"] > 2**20
    assert len(steps) == 1 and not steps[0][1].state


def test_a_worker_is_a_process_with_its_own_memory():
    memory = bench.run_worker("staged", SMALL, config(), 0)
    assert memory["resident"] > 2**20 and memory["peak"] > 0


def test_a_worker_that_fails_says_why(monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nerror: no memory\n")
    monkeypatch.setattr(bench.subprocess, "run", lambda *a, **k: failed)
    assert bench.run_worker("ours", SMALL, config(), 1) == {"failed": "error: no memory"}
    failed.stderr = ""
    assert "killed" in bench.run_worker("ours", SMALL, config(), 1)["failed"]


def test_the_command_compares_in_one_run(tmp_path, in_process, capsys):
    """At the demo's shape, in turns; the ratio is staged over ours without the optimizer."""
    file = tmp_path / "b.json"
    assert bench.main(["train", "--config", "tiny", "--device", "cpu", "--batch_size", "1",
                       "--no_scaling", "--json", str(file)]) == 0
    jobs = [json.loads(command[-1]) for command in in_process]
    assert [(which, repeats) for which, _, _, repeats in jobs] == [
        ("ours", 0), ("staged", 0), ("ours", 2), ("staged", 2)]
    assert all(shape["batch_size"] == 1 and shape["max_length"] == 62 for _, shape, _, _ in jobs)
    result, printed = json.loads(file.read_text()), capsys.readouterr().out
    measured = result["train tiny"]
    assert {"hardware", "matrix_rate", "seconds"} <= result.keys()
    assert {"speedup", "memory_ratio", "floor_seconds", "parts", "tokens_per_second"
            } <= measured.keys()
    assert 0 < measured["mfu"]["median"] < 1 and "MFU" in printed and "times as fast" in printed


def test_what_is_compared_by_hand(monkeypatch, capsys):
    """Made-up times of a GPU: MFU, the ratio without the optimizer, and what does not fit."""
    shape, cfg = replace(SMALL, batch_size=1, n_passes=4), config(device="cuda")

    def run(which, shape, cfg, repeats):
        if (which == "staged" and shape.max_length > 20) or shape.batch_size == 8:
            return {"failed": "CUDA out of memory"}
        return {"times": [[1.0, 2.0, 3.0, 1.0]] * repeats, "live": [0.5] * repeats,
                "resident": 2**30, "peak": 2**31}
    monkeypatch.setattr(bench, "run_worker", run)
    work = sum(flops.thinking_flops(shape.model, shape.layout, 1, 0.5))
    rate = bench.spread([float(work)])
    sizes = bench.bench_sizes(shape, cfg, rate, {"failed": "for once"})
    assert sizes["checkpointing 0.5"]["mfu"] == pytest.approx(1 / 7)
    assert sizes["batch_size 4"]["mfu"] == pytest.approx(4 / 7)
    assert sizes["batch_size 4"]["bytes"] == 3 * 2**30
    assert sizes["n_passes 2, batch_size 8"] == {"failed": "CUDA out of memory"}
    measured = bench.bench_train(replace(shape, max_length=40), cfg, rate)
    assert measured["compared_at"] == 20 and measured["memory_ratio"] == 1
    assert measured["speedup"]["median"] == pytest.approx(7 / 6)
    assert measured["step"]["median"] == 7 and measured["parts"]["forward"]["median"] == 2
    printed = capsys.readouterr().out
    assert "3.0 GiB" in printed and "trying max_length 20" in printed
    monkeypatch.setattr(bench, "run_worker", lambda *a: {"failed": "nothing works"})
    assert bench.bench_train(shape, cfg, rate) == {"failed": "nothing works"}


def test_no_size_is_measured_twice(monkeypatch):
    """The shape itself is known from before; a size that fails says why."""
    shape, seen = bench.SHAPES["cpu"], []

    def run(which, shape, cfg, repeats):
        seen.append(shape)
        if shape.n_passes == 4:
            return {"failed": "no memory"}
        return {"times": [[shape.n_ahead, shape.n_passes, 0, 0]], "live": [1.0]}
    monkeypatch.setattr(bench, "run_worker", run)
    known = {"step": bench.spread([77.0]), "mfu": bench.spread([0.5])}
    result = bench.bench_sizes(shape, config(), bench.spread([1e9]), known)
    assert shape not in seen and len(seen) == len(set(seen)) == 2 + 2 + 3
    assert result.pop("n_passes 4") == {"failed": "no memory"}
    assert {what: row["step"]["median"] for what, row in result.items()} == {
        "n_ahead 3": 5, "n_ahead 7": 77, "n_ahead 11": 13, "n_passes 1": 8, "n_passes 2": 77,
        "max_length 64": 9, "max_length 128": 9, "max_length 256": 9}


def test_decoding_is_measured_against_the_bandwidth(monkeypatch):
    monkeypatch.setattr(bench, "read_rate", lambda device: bench.spread([1e9]))
    monkeypatch.setattr(bench, "beside_transformers", lambda model: "compared")
    result = bench.bench_sample(SMALL, CPU)
    assert result.pop("transformers") == "compared"
    assert set(result) == {f"batch {b}, {w}" for b in (1, 8)
                           for w in ("thoughts of 5", "no thoughts")}
    weights = sum(p.numel() for n, p in bench.make_model(SMALL, CPU).lm.named_parameters()
                  if "embed_tokens" not in n) * 4
    one = result["batch 1, no thoughts"]
    assert one["bound"] == pytest.approx(weights / 1e9 / one["seconds_per_token"]["median"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_transformers_generates_the_same(tied, bias):
    """On the very same weights, and token by token what ours does."""
    pytest.importorskip("transformers")
    shape = replace(SMALL, model=bench.qwen(32, 2, 4, 2, 64, 50, tied=tied, bias=bias, theta=30.0))
    model = bench.make_model(shape, CPU)
    with torch.no_grad():
        for p in model.lm.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    result = bench.beside_transformers(model, 8)
    assert result["same_tokens"] is True
    assert result["speedup"]["median"] > 0 and result["ours"]["low"] > 0


def test_without_transformers_nothing_is_compared(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    skipped = bench.beside_transformers(bench.make_model(SMALL, CPU))
    assert skipped == {"skipped": "transformers is not installed"}
    assert "transformers is not installed" in capsys.readouterr().out


def test_a_run_decodes_at_all_three_shapes(monkeypatch, tmp_path):
    seen, file, threads = [], tmp_path / "b.json", torch.get_num_threads()
    monkeypatch.setattr(bench, "bench_sample", lambda shape, device: seen.append(shape) or {})
    assert bench.main(["sample", "--device", "cpu", "--json", str(file)]) == 0
    assert bench.main(["sample", "--device", "cpu", "--config", "cpu"]) == 0
    torch.set_num_threads(threads)
    assert seen == [*bench.SHAPES.values(), bench.SHAPES["cpu"]]
    assert {f"sample {name}" for name in bench.SHAPES} <= json.loads(file.read_text()).keys()
    assert bench.SHAPES["cpu_0_5b"].model.hidden_size == 896


def test_preparing_reads_what_prepare_py_prints(tmp_path, monkeypatch):
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))

    def run(command, **_):
        out = tmp_path / command[command.index("--out") + 1]
        out.mkdir()
        tokenizer.save(str(out / "tokenizer.json"))
        return SimpleNamespace(returncode=0, stdout=f"{out}: 1,234 documents, 5,678 tokens/s\n")
    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "COPIES", 1)
    result = bench.bench_prepare()
    assert result["ours"]["median"] == 5678
    assert 0 < result["ratio"]["low"] <= 5678 / result["bare"]["low"]
    failed = SimpleNamespace(returncode=2, stdout="", stderr="a bar\nerror: no room\n")
    monkeypatch.setattr(bench.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(InputError, match=r"prepare.py failed: error: no room"):
        bench.bench_prepare()


def test_shapes_are_those_of_the_presets():
    assert bench.shape_of("qwen2_5_3b").model.hidden_size == 2048
    assert bench.shape_of("qwen2_5_3b").checkpointing == 1 and bench.shape_of("tiny").n_ahead == 6
    assert bench.shape_of("small").model.vocab_size == len(fold.vocabulary(3, 0.1))


@pytest.mark.parametrize(("args", "sentence"), [
    ([], "what must be given"),
    (["trian"], "'trian' is not one of train, sample"),
    (["train", "--config", "tyny", "--device", "cpu"], "no config 'tyny'; did you mean tiny?"),
    (["prepare", "--config", "tiny"], "--config is for train, sample and all only"),
    (["sample", "--no_scaling"], "--no_scaling is for train and all only"),
    (["train", "--batch_size", "0"], "must be at least 1"),
    (["train", "--device", "cpu", "--json", "/no/such/folder/b.json"], "/no/such/folder"),
])
def test_bad_arguments_are_one_sentence(args, sentence, capsys):
    assert bench.main(args) == 2
    output = capsys.readouterr().err
    assert sentence in output and output.startswith("error: ") and output.count("\n") == 1


def test_what_needs_a_clone_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "train", None)
    monkeypatch.setitem(sys.modules, "configs", None)
    for what in ("train", "prepare", "all"):
        assert bench.main([what, "--device", "cpu"]) == 2
        assert "no train.py here: run this from the root of a clone" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"no configs.py here"):
        bench.shape_of("tiny")
    assert bench.shape_of("cpu").model.hidden_size == 256


def test_help_lists_what_can_be_measured(capsys):
    assert bench.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "what (train|sample|prepare|all, required)" in printed and "--batch_size" in printed


def test_a_step_that_failed_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(bench, "bench_train", lambda *arguments: {"failed": "for want of memory"})
    monkeypatch.setattr(bench, "matrix_rate", lambda device: bench.spread([1e9]))
    assert bench.main(["train", "--config", "cpu", "--device", "cpu", "--no_scaling"]) == 2
    assert capsys.readouterr().err.startswith("error: train cpu failed")
