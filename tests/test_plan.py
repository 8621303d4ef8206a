"""The plan's bytes are those that torch allocates, what fits is not refused, and advice fits."""

import dataclasses
import itertools
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train as script
from configs import PRESETS, TrainConfig
from nanoqstar import InputError, bench, cpu, lora, plan
from nanoqstar.device import speed_up
from nanoqstar.objective import Objective, Valid

CPU = torch.device("cpu")
DEEP = bench.qwen(128, 6, 8, 2, 344, 2048, tied=False, bias=False)  # activations outweigh the head
FLAT = bench.qwen(128, 6, 8, 8, 344, 500)  # every head has keys of its own
WIDE = bench.qwen(64, 2, 4, 2, 172, 20_000)  # the other way round
SHALLOW = bench.qwen(64, 1, 4, 2, 16, 50)  # the mixing head outweighs the block
UNTIED = replace(WIDE, tie_word_embeddings=False)
CFG = TrainConfig(model_path="a model", batch_size=2, n_ahead=7, n_passes=2, max_length=31)
CASES = [
    (DEEP, {}), (DEEP, dict(checkpointing=1.0)), (DEEP, dict(checkpointing=0.5)),
    (DEEP, dict(checkpointing=1.0, grad_accum=2)), (DEEP, dict(lora_rank=8)),
    (DEEP, dict(checkpointing=1.0, lora_rank=8)),
    (DEEP, dict(batch_size=1, n_passes=1, n_ahead=4, max_length=70)),
    (DEEP, dict(batch_size=1, n_passes=4, n_ahead=12, max_length=12)),
    (DEEP, dict(n_ahead=0, max_length=127, batch_size=8)),
    (FLAT, dict(n_ahead=0, max_length=127, batch_size=8, checkpointing=1.0)),
    (FLAT, dict(max_length=3, batch_size=1)), (FLAT, dict(max_length=3, grad_accum=2)),
    (FLAT, dict(checkpointing=1.0, lora_rank=8, n_ahead=12, n_ahead_talk=1, batch_size=1)),
    (WIDE, {}), (WIDE, dict(grad_accum=2)), (WIDE, dict(lora_rank=8)), (UNTIED, dict(grad_accum=2)),
    (WIDE, dict(max_length=2, batch_size=1)), (UNTIED, dict(max_length=2, batch_size=1)),
    (WIDE, dict(n_ahead=0, max_length=127, batch_size=8)),
    (WIDE, dict(n_ahead=0, max_length=8, batch_size=1)),
    (SHALLOW, dict(n_ahead=3, n_ahead_talk=12)),
    (WIDE, dict(policy_weight=0.0, max_length=8)),
    (WIDE, dict(clamp_advantage=False, max_length=8)),
]


def update_of(model, cfg, device=CPU):
    """One of train.py's updates, to be called again and again; and what stays between them."""
    made = bench.QuietStar(bench.Qwen2(model), banned=torch.arange(model.vocab_size) == 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(torch.ones(()) if "norm" in name
                    else 0.1 * torch.randn(p.shape, generator=generator))
    made = made.to(device)
    if cfg.lora_rank:
        lora.add(made.lm, cfg.lora_rank, cfg.lora_alpha)
    speed_up(made, device, cfg.checkpointing)
    optimizer, batches, counts = script.make_optimizer(made, cfg), [], 0
    for _ in range(cfg.grad_accum):
        size = (cfg.batch_size, cfg.max_length + cfg.n_ahead_talk)
        text = torch.randint(model.vocab_size, size, generator=generator)
        batches.append([text, docs := torch.zeros_like(text)])
        counts = counts + Valid.from_docs(docs, cfg.n_ahead_talk).counts()
        if cfg.n_ahead:
            batches[-1].append(torch.rand(cfg.batch_size, cfg.n_passes, cfg.max_length,
                                          cfg.n_ahead - 2, generator=generator))
    objective = Objective(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(Objective)})

    def update():
        script.train_step(made, optimizer, batches, counts, objective, 1e-9, cfg)
    update()  # the moments are there from now on
    moments = [x for state in optimizer.state.values() for x in state.values()]
    return update, [*made.parameters(), *moments]


def allocated(function):
    """The most bytes that torch's allocator has given out meanwhile and not got back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


def test_the_count_sees_what_no_operation_returns():
    x = torch.ones(1000)
    assert 4 * 2000 <= allocated(lambda: ((x + 1).exp(), torch.zeros(10))) < 4 * 2100
    assert allocated(lambda: torch.ones(100, 50).softmax(0).sum()) >= 4 * 10_000


def name_of(x):
    names = {DEEP: "deep", FLAT: "flat", WIDE: "wide", UNTIED: "untied", SHALLOW: "shallow"}
    return str(x) if isinstance(x, dict) else names[x]


@pytest.mark.parametrize(("model", "changes"), CASES, ids=name_of)
def test_planned_is_what_torch_allocates(monkeypatch, model, changes):
    """At an update's highest, with weights and moments and beyond them."""
    cfg = replace(CFG, **changes)
    monkeypatch.setattr(cpu, "choose_products", lambda _: 0.0)
    update, resident = update_of(model, cfg)
    highest = allocated(update)
    planned, staying = plan.of_run(model, cfg, "cpu"), sum(x.nbytes for x in resident)
    assert planned.state == pytest.approx(staying, rel=0.03)
    assert max(planned.stages.values()) == pytest.approx(highest, rel=0.06)
    assert planned.peak == pytest.approx(staying + highest, rel=0.05)
    assert planned.least <= staying + highest


def test_every_stage_is_some_updates_highest():
    """But sampling, which scoring outweighs: else a formula would not have been tested."""
    highest = {max((stages := plan.of_run(model, replace(CFG, **changes), "cpu").stages),
                   key=stages.get) for model, changes in CASES}
    assert highest == stages.keys() - {"sampling"}


@pytest.mark.skipif(not cpu.has_onednn(), reason="no oneDNN")
@pytest.mark.parametrize("changes", [{}, dict(n_ahead=0, max_length=127, batch_size=16),
                                     dict(lora_rank=8)], ids=str)
def test_a_librarys_products_copy_what_is_transposed(monkeypatch, changes):
    """A chunk's gradient; and where there are several, a gradient of the head more."""
    monkeypatch.setattr(cpu, "choose_products", lambda _: 0.0)
    monkeypatch.setattr(cpu, "onednn", True)
    update, _ = update_of(WIDE, cfg := replace(CFG, **changes))
    planned = max(plan.of_run(WIDE, cfg, "cpu").stages.values())
    assert planned == pytest.approx(allocated(update), rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("changes", [{}, dict(checkpointing=1.0), dict(n_ahead=0)], ids=str)
def test_planned_on_a_gpu(changes):
    model = replace(FLAT, vocab_size=50_000)
    cfg = replace(CFG, max_length=127, **changes)
    update, _ = update_of(model, cfg, torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    update()
    planned = plan.of_run(model, cfg, "cuda").peak
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.3)


# ---- what is refused


def test_a_run_is_refused_for_the_larger_of_its_two_phases():
    new = replace(CFG, model_path=None, pretrain_batch_size=500)
    both, thinking = (plan.of_run(DEEP, c, "cpu") for c in (new, replace(new, pretrain_steps=0)))
    alone = replace(new, n_ahead=0, batch_size=500, pretrain_steps=0)
    assert both == plan.of_run(DEEP, alone, "cpu") and both.least > 2 * thinking.least
    few = replace(new, pretrain_batch_size=1)
    assert plan.of_run(DEEP, few, "cpu") == thinking


def test_what_cannot_fit_is_one_sentence(monkeypatch):
    least = plan.of_run(DEEP, CFG, "cpu").least
    monkeypatch.setattr(plan, "total_memory", lambda device: int(least) + 1)
    plan.refuse(DEEP, CFG, CPU)
    monkeypatch.setattr(plan, "total_memory", lambda device: int(least) - 1)
    with pytest.raises(InputError, match="an update would need more than 0 GiB of memory, and"):
        plan.refuse(DEEP, CFG, CPU)
    with pytest.raises(InputError, match=r"an update would need more than [\d,]{20,} GiB"):
        plan.refuse(DEEP, replace(CFG, batch_size=2**62, max_length=2**62, n_passes=2**62), CPU)


def test_the_windows_that_wait_are_counted(monkeypatch):
    cfg = replace(CFG, eval_windows=10**6, n_ahead=3)  # 35 tokens and documents, 62 random numbers
    waiting = 10**6 * (16 * 35 + 4 * 62)
    monkeypatch.setattr(plan, "total_memory", lambda device: waiting)
    plan.refuse(WIDE, cfg, CPU)
    monkeypatch.setattr(plan, "total_memory", lambda device: waiting - 1)
    with pytest.raises(InputError, match="the windows of an update or evaluation would need"):
        plan.refuse(WIDE, cfg, CPU)


def test_frozen_weights_have_no_moments_and_on_a_gpu_two_bytes():
    """If they were loaded: those of a new model stay as they were trained."""
    parts = {kind: plan.of_update(DEEP, replace(CFG, lora_rank=8, model_path=path), kind[:4].strip()
                                  ).parts for kind, path in
             (("cpu", "x"), ("cuda", "x"), ("cuda, new", None))}
    adapters, own = lora.n_weights(DEEP, 8), 3 * 128**2
    base = plan.flops.n_parameters(DEEP)
    for kind, size in (("cpu", 4), ("cuda", 2), ("cuda, new", 4)):
        assert parts[kind]["weights"] == size * base + 4 * (adapters + own)
        assert parts[kind]["moments"] == 8 * (adapters + own)
    control = plan.of_update(DEEP, replace(CFG, trainable="thoughts"), "cpu")
    assert control.parts["gradients"] == 4 * own
    assert control.least == 4 * base + 16 * own


# ---- what would fit


def test_advice_fits_is_as_harmless_as_can_be_and_says_what_it_saves():
    cfg = replace(PRESETS["qwen2_5_3b"].config, batch_size=8, checkpointing=0.0)
    model, order = bench.MODELS["Qwen/Qwen2.5-3B"], ("batch_size", "checkpointing", "lora_rank",
                                                     "n_passes", "max_length")
    named, highest = [], plan.of_run(model, cfg, "cuda").peak
    for room in (300e9, 150e9, 80e9, 48e9, 24e9):
        found = plan.changes(model, cfg, "cuda", room)
        changed = replace(cfg, **{k: v for change, _ in found for k, v in change.items()})
        assert plan.of_run(model, changed, "cuda").peak <= room and 1 <= len(found) <= 3
        assert all(saved > 0 for _, saved in found)
        assert highest - sum(s for _, s in found) == pytest.approx(
            plan.of_run(model, changed, "cuda").peak)
        assert changed.batch_size * changed.grad_accum == 8
        names = [next(iter(change)) for change, _ in found]
        assert names == sorted(names, key=order.index)
        named.append(order.index(names[-1]))
    assert named == sorted(named) and named[0] == 0 and named[-1] > 1
    assert not plan.changes(model, cfg, "cuda", 12e9)  # not three


def test_advice_is_no_stronger_than_needed():
    cfg = replace(CFG, batch_size=12)
    peaks = {n: plan.of_run(DEEP, replace(CFG, batch_size=n, grad_accum=12 // n), "cpu").peak
             for n in (6, 4, 3, 2, 1)}
    for n, peak in peaks.items():
        (change, _), = plan.changes(DEEP, cfg, "cpu", peak)
        assert change == {"batch_size": n, "grad_accum": 12 // n}
    whole = replace(cfg, normalize_advantage=True)  # each forward by itself: no accumulation
    assert "batch_size" not in plan.changes(DEEP, whole, "cpu", peaks[6])[0][0]


@pytest.mark.parametrize("changes", [
    dict(normalize_advantage=True), dict(trainable="thoughts"), dict(n_ahead=0), dict(lora_rank=4),
    dict(model_path=None, pretrain_batch_size=64), dict(max_length=2**40)], ids=str)
def test_advice_can_be_followed(changes):
    """Whatever it names, TrainConfig takes."""
    cfg, found = replace(CFG, batch_size=6, n_passes=4, **changes), 0
    highest = plan.of_run(DEEP, cfg, "cpu").peak
    for share in (0.9, 0.7, 0.5, 0.3, 0.2):
        for change, _ in plan.changes(DEEP, cfg, "cpu", share * highest):
            cfg = replace(cfg, **change)
            found += 1
    assert found


# ---- what is printed


def test_plan_prints_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main(["qwen2_5_3b", "--plan", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    planned = plan.of_run(bench.MODELS["Qwen/Qwen2.5-3B"], PRESETS["qwen2_5_3b"].config, "cpu")
    for size in (*filter(None, planned.parts.values()), planned.peak, 4 * planned.state):
        assert plan.in_words(size) in said
    lines = [line for line in said.splitlines() if " GB: " in line and "updates" in line]
    assert "80 GB: fits; 100,000 updates in 2." in lines[0] and "H200 at 50% MFU" in lines[1]
    assert script.main(["tiny", "--plan", "--plan", "--batch_size", "3"]) == 0
    assert "planned: an update takes" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_plan_of_a_model_that_is_not_known_is_an_input_error(tmp_path, capsys):
    assert script.main(["qwen2_5_3b", "--plan", "--model_path", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert script.main(["text", "--plan", "--data", str(tmp_path)]) == 2


def test_a_run_that_hardly_fits_says_what_would(monkeypatch):
    peak = plan.of_run(DEEP, CFG, "cpu").peak
    monkeypatch.setattr(plan, "total_memory", lambda device: int(peak / plan.USABLE) + 1)
    assert plan.summary(DEEP, CFG, CPU).endswith(": fits")
    monkeypatch.setattr(plan, "total_memory", lambda device: int(peak))
    assert "fits with --batch_size 1 --grad_accum 2 saves" in plan.summary(DEEP, CFG, CPU)
    assert plan.advice(DEEP, CFG, CPU).startswith("the memory is used up: by plan --batch_size")
    monkeypatch.setattr(plan, "total_memory", lambda device: 1000)
    assert plan.summary(DEEP, CFG, CPU).endswith("does not fit with any three changes")
    assert plan.advice(DEEP, CFG, CPU) == ""


@pytest.mark.parametrize("name", PRESETS)
def test_presets_state_what_is_planned(monkeypatch, name):
    """On their hardware, which holds it by plan."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    preset = PRESETS[name]
    kind = "cpu" if "CPU" in preset.hardware else "cuda"
    planned = plan.of_run(bench.shape_of(name).model, preset.config, kind)
    assert preset.memory == plan.in_words(planned.peak)
    card = [int(word) for word in preset.hardware.split() if word.isdecimal() and int(word) > 9]
    if card:
        assert planned.peak <= card[0] * 1e9
