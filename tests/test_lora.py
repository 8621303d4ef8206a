"""Adapters: zero ones change no bit, others compute what merged weights compute, they learn and the
model does not, and PEFT, transformers and we read what a run saves."""

import copy
import json
import shutil
import signal

import golden
import pytest
import torch
from safetensors.torch import load_file
from test_flops import SMALL, drawn, products
from test_golden import CASES
from test_hf import IDS, random_model, store
from test_quietstar import our_loss
from test_train import TINY, before_call, kill, learned, setup, small, start, update
from torch.utils.flop_counter import FlopCounterMode

import sample
import train as script
from nanoqstar import InputError, bench, flops, hf, lora, plan, quietstar
from nanoqstar import run as run_room
from nanoqstar.attention import dense
from nanoqstar.device import speed_up
from nanoqstar.state import States

CPU = torch.device("cpu")
RANK, ALPHA = 3, 7
LORA = dict(lora_rank=4, lora_alpha=12, learning_rate=3e-2, warmup_steps=0)


def add(model, seed=5):
    """Adapters none of whose numbers is zero."""
    lora.add(model.lm, RANK, ALPHA)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def pairs(model):
    """(W, A, B, name) of every adapted layer."""
    named = dict(model.named_parameters())
    for name, a in named.items():
        if name.endswith("lora_A.weight"):
            yield (named[name.replace("lora_A.", "")], a, named[name.replace("lora_A", "lora_B")],
                   name.replace(".lora_A.weight", ""))


def merge_by_hand(adapted, plain, sign=1.0):
    """plain: its weights become W + sign * alpha / rank * B A of the adapted model's A and B."""
    named = dict(plain.named_parameters())
    with torch.no_grad():
        for w, a, b, name in pairs(adapted):
            product = torch.einsum("or,ri->oi", b, a)
            named[f"{name}.weight"].copy_(w + sign * ALPHA / RANK * product)
    return plain


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that pre-trained a model and taught adapters of it to think."""
    out = tmp_path_factory.mktemp("lora") / "run"
    assert start(out, **LORA) == 0
    return out


# ---- what they compute


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_adapters_change_no_bit(make_model, make_text, make_thoughts, dtype, tied):
    model, (text, docs) = make_model(tied).to(dtype), make_text(2, 12)
    u, thoughts = torch.rand(2, 2, 9, 2), make_thoughts(2, 2, 9, 2)
    results = []
    for wrap in (lambda: None, lambda: lora.add(model.lm, RANK, ALPHA)):
        wrap()
        loss, parts, states = our_loss(model, text, docs, thoughts)
        results.append([loss, *model.rollout(text, docs, u), *vars(states).values(),
                        *(x for x in parts.values() if torch.is_tensor(x))])
        grads = gradients(model, loss)
        results[-1] += [grads[name] for name in grads if "lora_" not in name]
    assert len(results[0]) > 40
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(g.any() for n, g in grads.items() if "lora_A" in n)  # as long as B is zero
    assert all(g.any() for n, g in grads.items() if "lora_B" in n)


def test_others_compute_what_merged_weights_compute(make_model, make_text, make_thoughts, tied):
    """States, thoughts, losses; and merging leaves the adapted model as it is."""
    plain, (text, docs) = make_model(tied), make_text(2, 12)
    u, thoughts = torch.rand(2, 2, 9, 2, dtype=torch.float64), make_thoughts(2, 2, 9, 2)
    adapted = add(copy.deepcopy(plain))
    before = copy.deepcopy(adapted.state_dict())
    names = set(plain.lm.state_dict())
    merge_by_hand(adapted, plain)
    by_us = lora.merged(adapted.lm)
    assert by_us.keys() == names
    assert all((by_us[n] - x).abs().max() < 1e-14 for n, x in plain.lm.state_dict().items())
    assert all(torch.equal(x, before[n]) for n, x in adapted.state_dict().items())

    (ours, _, states), (reference, _, merged) = (
        our_loss(model, text, docs, thoughts) for model in (adapted, plain))
    assert abs(ours - reference) < 1e-12
    assert all((a - b).abs().max() < 1e-11 for a, b in
               zip(vars(states).values(), vars(merged).values(), strict=True))
    (drawn, lp), (drawn_merged, lp_merged) = (m.rollout(text, docs, u) for m in (adapted, plain))
    assert torch.equal(drawn, drawn_merged)
    assert (lp - lp_merged).abs().max() < 1e-12


def test_every_product_of_every_block_has_its_own(make_model, make_text):
    """One adapter at a time: with it alone the states change, in every layer that PEFT names."""
    model, (text, docs) = make_model(), make_text(2, 9)
    base = model.text_states(text, docs)
    lora.add(model.lm, RANK, ALPHA)
    seen = set()
    for _, _, b, name in list(pairs(model)):
        with torch.no_grad():
            b.fill_(0.3)
            assert (model.text_states(text, docs) - base).abs().max() > 1e-4, name
            b.zero_()
        seen.add(name)
    assert seen == {f"lm.model.layers.{i}.{part}_proj" for i in (0, 1) for part in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up",
        "mlp.down")}
    config = model.lm.config
    assert lora.n_weights(config, RANK) == sum(a.numel() + b.numel() for _, a, b, _ in pairs(model))


def test_gradients_are_finite_differences(make_model, make_text, make_thoughts):
    """In a random direction of each adapter; of the NLLs, as a thought's credit is a constant."""
    model, (text, docs), thoughts = add(make_model()), make_text(2, 9), make_thoughts(2, 2, 6, 2)

    def loss():
        return our_loss(model, text, docs, thoughts, policy_weight=0.0)[0]
    grads, step = gradients(model, loss()), 1e-6
    generator = torch.Generator().manual_seed(3)
    checked = 0
    for name, p in model.named_parameters():
        if "lora_" in name:
            way = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            with torch.no_grad():
                values = [(p.add_(way, alpha=d), loss())[1] for d in (step, -2 * step)]
                p.add_(way, alpha=step)
            measured = (values[0] - values[1]) / (2 * step)
            assert abs(measured - (grads[name] * way).sum()) < 1e-7, name
            checked += 1
    assert checked == 28


def test_gradients_by_the_chain_rule(make_model, make_text, make_thoughts):
    """With the policy term: those of A and B follow from that of the merged weight."""
    plain, (text, docs), thoughts = make_model(), make_text(2, 12), make_thoughts(2, 2, 9, 2)
    adapted = add(copy.deepcopy(plain))
    merge_by_hand(adapted, plain)
    ours, merged = (gradients(m, our_loss(m, text, docs, thoughts)[0]) for m in (adapted, plain))
    for _, a, b, name in pairs(adapted):
        g = ALPHA / RANK * merged[f"{name}.weight"]
        assert (ours[f"{name}.lora_B.weight"] - g @ a.T).abs().max() < 1e-10
        assert (ours[f"{name}.lora_A.weight"] - b.T @ g).abs().max() < 1e-10


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_official_values(case):
    """With zero adapters, and with such as the weights have been lessened by."""
    def compensated(model):
        add(model)
        merge_by_hand(model, model, -1.0)
    for wrap in (lambda model: lora.add(model.lm, RANK, ALPHA), compensated):
        errors = golden.check(case, wrap)
        assert len(errors) == 9 and max(errors.values()) < 1e-9


def test_frozen_weights_in_bf16_compute_what_masters_in_fp32_do(make_model, make_text,
                                                                make_thoughts, monkeypatch):
    """Bit for bit under autocast, gradients included: products round the masters just so."""
    monkeypatch.setattr(quietstar, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    text, docs = make_text(2, 12)
    u, thoughts = torch.rand(2, 2, 9, 2), make_thoughts(2, 2, 9, 2)
    results = []
    for stored in (torch.float32, torch.bfloat16):
        model = make_model().float()
        model.lm.to(torch.bfloat16).to(stored)
        add(model)
        assert {p.dtype for n, p in model.named_parameters()
                if "lora_" in n or not n.startswith("lm.")} == {torch.float32}
        for name, p in model.named_parameters():
            p.requires_grad_(lora.learns(name, RANK))
        counts = torch.tensor([20] * 5)
        drawn, lp = model.rollout(text, docs, u)
        loss, stats = model.loss(text, docs, thoughts, lp, counts, quietstar.Objective())
        grads = gradients(model, loss)
        assert len(grads) == 28 + 7
        results.append([loss, drawn, lp, *stats.values(), *grads.values()])
        with torch.no_grad():  # as decoding computes: without autocast
            assert model.lm.embed(text).dtype == model.text_states(text, docs).dtype == stored
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("wrapped", ["checkpointed", "compiled"])
def test_wrapped_blocks(tmp_path, wrapped):
    """Checkpointing, and one graph without a break: the same updates, names and files."""
    results = []
    for how in ("plain", wrapped):
        this, optimizer = setup(tmp_path, lora_rank=RANK, n_layers=2, n_ahead=3)
        speed_up(this.model, CPU, float(how == "checkpointed"), compile=False)
        for block in this.model.lm.model.layers:
            if how == "compiled":
                block.compile(dynamic=False, backend="eager", fullgraph=True)
        stats = [update(this, optimizer, step)[0] for step in range(2)]
        tensors = lora.merged(this.model.lm) | lora.split(this.model.lm)[1]
        results.append((tensors, stats))
    (tensors, stats), (wrapped_tensors, wrapped_stats) = results
    assert tensors.keys() == wrapped_tensors.keys()
    assert any("lora_B" in name for name in tensors)
    assert all((x - wrapped_tensors[n]).abs().max() < 1e-5 for n, x in tensors.items())
    for a, b in zip(stats, wrapped_stats, strict=True):
        assert all(abs(a[key] - b[key]) < 1e-5 for key in a)


# ---- what learns


@pytest.mark.parametrize(("changes", "learning"), [
    ({}, {"adapters", "thoughts"}),
    ({"n_ahead": 0, "n_ahead_talk": 2}, {"adapters"}),
    ({"lora_rank": 0}, {"model", "thoughts"}),  # as in pre-training, and without adapters
])
def test_what_learns(tmp_path, changes, learning):
    this, _ = setup(tmp_path, **LORA)
    optimizer = script.make_optimizer(this.model, small(**LORA | changes))

    def kind(name):
        return ("thoughts" if not name.startswith("lm.") else
                "adapters" if "lora_" in name else "model")
    named = dict(this.model.named_parameters())
    kinds = {kind(name) for name, p in named.items() if p.requires_grad}
    assert kinds == learning
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in named.values() if p.requires_grad}


def test_updates_leave_the_model_as_it_is(tmp_path):
    this, optimizer = setup(tmp_path, **LORA)
    before = {n: p.detach().clone() for n, p in this.model.named_parameters()}
    for step in range(2):
        update(this, optimizer, step)
    for name, p in this.model.named_parameters():
        frozen = name.startswith("lm.") and "lora_" not in name
        assert torch.equal(p, before[name]) == frozen, name
        assert (p in optimizer.state) == (not frozen)


@pytest.mark.parametrize(("device", "rank", "dtype"), [
    ("cuda", 4, torch.bfloat16), ("cuda", 0, torch.float32), ("cpu", 4, torch.float32)])
def test_a_frozen_model_is_loaded_in_bf16_on_cuda(run, monkeypatch, device, rank, dtype):
    seen = []

    def load(path, device, dtype, tokenizer, shard):
        seen.append(dtype)
        raise InputError("enough")
    monkeypatch.setattr(run_room, "pick_device", lambda _: torch.device(device))
    monkeypatch.setattr(plan, "refuse", lambda *_: None)
    monkeypatch.setattr(hf, "load_thinker", load)
    with pytest.raises(InputError, match="enough"):
        script.check(small(model_path=str(run), lora_rank=rank))
    assert seen == [dtype]


@pytest.mark.parametrize("n_ahead", [0, SMALL.n_ahead])
def test_flops_that_frozen_weights_spare_are_those_that_torch_counts(n_ahead):
    """Exactly: of three products one."""
    sizes = (SMALL.batch_size, SMALL.max_length, n_ahead, SMALL.n_ahead_talk, SMALL.n_passes)
    model, (text, docs, u, counts) = bench.make_model(SMALL, CPU), drawn(SMALL)
    thoughts, sampled_lp = model.rollout(text, docs, u)
    counted, expected = [], []
    for frozen in (False, True):
        for name, p in model.named_parameters():  # gradients flow as with adapters
            p.requires_grad_(lora.learns(name, RANK * frozen) or "embed_tokens" in name)
        with FlopCounterMode(display=False) as counter:
            loss, stats = (
                model.loss(text, docs, thoughts, sampled_lp, counts, quietstar.Objective())
                if n_ahead else model.text_loss(text, docs, counts, SMALL.n_ahead_talk))
            loss.backward()
        live = float(stats.get("live", 1))
        counted.append(products(counter))
        expected.append(flops.of_update(SMALL.model, *sizes, live, frozen))
    assert expected[0] - expected[1] == pytest.approx(counted[0] - counted[1], rel=1e-6)


# ---- a run, and what it saves


def test_adapters_go_on_bit_for_bit_and_merge_before_they_are_rounded(tmp_path, monkeypatch):
    """Killed in pre-training and while they learn; saved in the background, as bf16."""
    given = LORA | dict(max_steps=5, save_every=2, save_dtype="bf16", resume="auto")
    assert start(tmp_path / "a", **given) == 0
    for n in (1, 5):
        with monkeypatch.context() as patch:
            before_call(patch, script, "train_step", n, kill(signal.SIGTERM))
            assert start(tmp_path / "b", **given) == 143
    assert start(tmp_path / "b", **given) == 0
    assert learned(tmp_path / "a") == learned(tmp_path / "b")
    weights = load_file(tmp_path / "a" / "checkpoint" / "model.safetensors")
    config = json.loads((tmp_path / "a" / "checkpoint" / "config.json").read_text())
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    assert config["torch_dtype"] == "bfloat16"
    state = load_file(States(tmp_path / "a" / "state", 1).folders()[-1] / "rank-00000.safetensors")
    name = "model.layers.0.mlp.up_proj"
    whole, a, b = (state[f"lm.{name}.{n}"] for n in ("weight", "lora_A.weight", "lora_B.weight"))
    assert b.any() and a.dtype == torch.float32
    scale = given.get("lora_alpha", 32) / given["lora_rank"]
    assert torch.equal(weights[f"{name}.weight"], (whole + scale * (b @ a)).bfloat16())


def test_a_run_saves_the_merged_model_and_its_adapters(run):
    checkpoint, base = run / "checkpoint", load_file(run / "base" / "model.safetensors")
    merged = load_file(checkpoint / "model.safetensors")
    adapters = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    config = json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())
    assert not (run / "base" / "adapter").exists()  # it has none yet
    assert config["r"] == 4 and config["lora_alpha"] == 12
    assert config["base_model_name_or_path"] == str(run / "base")
    assert (checkpoint / "quietstar.safetensors").exists()
    assert {p.stat().st_mode for p in (checkpoint / "adapter").iterdir()} == {
        (checkpoint / "config.json").stat().st_mode}
    assert merged.keys() == base.keys() and len(adapters) == 2 * 14
    changed = 0
    for name, w in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapters:
            a, b = (adapters[f"{stem}.lora_{x}.weight"].double() for x in "AB")
            w, changed = w.double() + 3 * (b @ a), changed + 1
            assert b.any()
        assert (merged[name] - w).abs().max() < 1e-6, name
    assert changed == 14


def test_a_base_is_the_same_with_and_without_adapters(run, tmp_path):
    """Pre-training is of all weights, and zero adapters are not even saved."""
    assert start(tmp_path / "plain") == 0
    for name in ("model.safetensors", "config.json"):
        assert (run / "base" / name).read_bytes() == (
            tmp_path / "plain" / "base" / name).read_bytes()
    assert not (tmp_path / "plain" / "checkpoint" / "adapter").exists()


def test_sample_and_another_run_start_from_the_merged_model(run, tmp_path, capsys):
    model = hf.load_thinker(run)[0]
    assert not any("lora_" in name for name, _ in model.named_parameters())
    args = ["--model_path", str(run), "--prompt", "abde=", "--max_new_tokens", "3"]
    assert sample.main(args) == 0
    assert capsys.readouterr().out.startswith("abde=")
    out = tmp_path / "on"
    assert start(out, model_path=str(run), pretrain_steps=TINY.pretrain_steps, **LORA) == 0
    config = json.loads((out / "checkpoint" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run / "checkpoint")
    again, before = hf.load_thinker(out)[0].lm.state_dict(), model.lm.state_dict()
    assert torch.equal(again["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0 < (again[name] - before[name]).abs().max() < 1


def test_saving_again_replaces_the_adapters_and_none_leave_none(tmp_path, monkeypatch):
    folder, model, synced = tmp_path / "model", random_model(), []
    monkeypatch.setattr(hf, "sync", lambda path: synced.append(path.name))
    source = store(tmp_path / "source", model)
    add(model)
    for seed in (1, 2):
        add_again = copy.deepcopy(model)
        with torch.no_grad():
            next(p for n, p in add_again.named_parameters() if "lora_A" in n).fill_(seed)
        store(folder, add_again, source=source, config={"model_path": "owner/name"})
        stored = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert (next(x for n, x in stored.items() if "q_proj.lora_A" in n) == seed).all()
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"  # not the cache that it lies in
    assert synced.count("adapter_model.safetensors") == synced.count("adapter") == 2
    store(folder, random_model())
    assert not (folder / "adapter").exists()


def test_a_base_in_bf16_is_merged_and_saved_in_fp32(tmp_path):
    model = random_model()
    model.lm.to(torch.bfloat16)
    add(model)
    loaded = hf.load_thinker(store(tmp_path / "model", model))[0]
    for w, a, b, name in pairs(model):
        expected = w.double() + ALPHA / RANK * (b.double() @ a.double())
        ours = dict(loaded.named_parameters())[f"{name}.weight"]
        assert (ours - expected).abs().max() < 1e-6
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.float32}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "float32"


def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_transformers_loads_the_merged_model(run):
    """Also where peft is installed, which would have it load an adapter's base instead."""
    ids, ours = IDS % 10, hf.load_thinker(run)[0].lm
    with torch.no_grad():
        expected = ours.logits(ours(ids, torch.arange(ids.shape[1]), dense(None)))
        assert (theirs(run / "checkpoint")(ids).logits - expected).abs().max() < 1e-4
        assert (theirs(run / "base")(ids).logits - expected).abs().max() > 1e-2


def test_peft_loads_and_merges_the_adapters(run):
    peft = pytest.importorskip("peft")
    ours = load_file(run / "checkpoint" / "model.safetensors")
    model = peft.PeftModel.from_pretrained(theirs(run / "base"), run / "checkpoint" / "adapter")
    with torch.no_grad():
        wrapped, plain = model(IDS % 10).logits, theirs(run / "checkpoint")(IDS % 10).logits
    assert (wrapped - plain).abs().max() < 1e-4
    merged = model.merge_and_unload().state_dict()
    assert all((merged[name] - x).abs().max() < 1e-6 for name, x in ours.items())
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(run / "checkpoint" / "adapter")
    again = auto.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], x) for name, x in again.items())


# ---- what cannot be


@pytest.mark.parametrize(("changes", "args", "sentence"), [
    ({"lora_rank": 9}, (), "lora_rank=9 is more than the width of the model's narrowest layer: "
     "take at most 8"),
    ({}, ("--lora_alpha", "3"), "--lora_alpha is for adapters (lora_rank above 0) only: leave it "
     "out"),
    ({"lora_rank": 2}, ("--trainable", "thoughts"), "lora_rank=2: adapters need trainable=all and "
     "a model that has learned before"),
    ({"lora_rank": 2}, ("--pretrain_steps", "0"), "lora_rank=2: adapters need trainable=all and a "
     "model that has learned before"),
])
def test_refused(tmp_path, capsys, changes, args, sentence):
    assert start(tmp_path / "out", *args, **changes) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    assert not (tmp_path / "out").exists()


def test_a_rank_too_large_for_a_loaded_model(run, tmp_path, capsys):
    shutil.copytree(run / "base", tmp_path / "base")
    assert start(tmp_path / "out", model_path=str(tmp_path / "base"),
                 pretrain_steps=TINY.pretrain_steps, lora_rank=50) == 2
    assert "take at most 8" in capsys.readouterr().err


def test_adapters_without_thoughts(tmp_path):
    """Plain continued training of the adapters alone."""
    assert start(tmp_path / "out", n_ahead=0, n_ahead_talk=2, **LORA) == 0
    assert (tmp_path / "out" / "checkpoint" / "adapter").is_dir()
    assert not (tmp_path / "out" / "checkpoint" / "quietstar.safetensors").exists()
