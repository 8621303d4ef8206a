"""train.py and sample.py as a user runs them, at sizes of a second; and the demo, shortened, which must learn."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train as script
from configs import PRESETS, TrainConfig
from data import fold
from nanoqstar import InputError, hf
from nanoqstar.tokenizer import load_tokenizer
from data.writer import write_dataset
from nanoqstar.dataset import TokenDataset
from nanoqstar.objective import Valid, quiet_star_loss

ROOT = Path(__file__).parents[1]
SMALL = dict(hidden_size=16, intermediate_size=32, n_heads=2, n_kv_heads=1, pretrain_steps=3, pretrain_batch_size=4,
             fold_tokens=5000, max_length=20, batch_size=2, eval_windows=4, max_steps=2, eval_every=1, log_every=1,
             threads=1)


def small(**changes):
    return dataclasses.replace(PRESETS["tiny"].config, **{**SMALL, **changes})


def options(config):
    return [x for k, v in dataclasses.asdict(config).items() if v != getattr(PRESETS["tiny"].config, k)
            for x in (f"--{k}", str(v))]


def call(name, *args, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / name), *args], cwd=cwd, capture_output=True, text=True,
                          check=False)


def update(model, optimizer, data, step, cfg, sampler):
    batches, counts = script.load_batches(data, step, cfg)
    totals, norm, finite = script.train_step(model, optimizer, batches, counts, step, cfg, sampler)
    assert finite
    totals.pop("thoughts", None)
    return totals, norm


def setup(tmp_path, **changes):
    """(model, optimizer, training split, config) of a small run, thoughts initialised and mixing head past zero."""
    cfg = small(**changes)
    if not (tmp_path / "data").exists():
        script.prepare_fold(cfg, tmp_path / "data")
    data = TokenDataset(tmp_path / "data", "train")
    model, thoughts, tokenizer = script.build_model(cfg, data.tokenizer_path, torch.device("cpu"))
    script.init_thoughts(model, thoughts, cfg, tokenizer)
    torch.nn.init.normal_(model.mixing_head[4].weight, generator=torch.Generator().manual_seed(0))
    return model, script.make_optimizer(model, cfg), data, cfg


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished small run, made through the command line: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("runs") / "out" / "tiny"
    done = call("train.py", *options(small()), "--out_dir", str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_leaves_what_it_promises(run):
    out, printed = run
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records] == ["pretrain"] * 3 + ["eval", "think", "eval", "think", "eval", "end"]
    evaluation = records[-2]
    assert {"nll_base", "nll_mixed", "gain", "gain_hardest", "gain_by_decile", "reward", "mix", "entropy", "distinct",
            "answers"} <= evaluation.keys() and len(evaluation["gain_by_decile"]) == 10
    assert math.isclose(evaluation["gain"], evaluation["nll_base"] - evaluation["nll_mixed"], abs_tol=1e-5)
    assert 0 < evaluation["distinct"] <= 1 and 0 < evaluation["entropy"] < math.log(11) + 0.5
    think = next(r for r in records if r["kind"] == "think")
    assert {"nll_base", "nll_talk", "policy", "reward", "gain", "positive", "mix", "entropy", "distinct", "grad_norm",
            "seconds"} <= think.keys()
    assert "all tokens, NLL" in printed and "thinks" in printed and "base  thoughts" in printed
    saved = TrainConfig(**json.loads((out / "config.json").read_text()))
    assert saved == dataclasses.replace(small(), out_dir=str(out))
    kinds = {p.suffix for p in out.rglob("*") if p.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors", ".bin", ".npy"}  # .bin and .npy are the corpus; no pickle
    with pytest.raises(InputError, match="already holds a run"):
        script.new_folder(saved, "tiny")


def test_the_mixing_head_starts_at_the_base_model(run):
    first = next(r for r in map(json.loads, (run[0] / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "eval")
    assert abs(first["gain"]) < 1e-6 and first["mix"] == 0


def test_a_run_goes_on_from_an_earlier_one(run, tmp_path):
    out, _ = run
    cfg = small(model_path=str(out))
    model, thoughts, tokenizer = script.build_model(cfg, out / "checkpoint" / "tokenizer.json", torch.device("cpu"))
    script.init_thoughts(model, thoughts, cfg, tokenizer)
    assert model.mixing_head[4].weight.abs().sum() > 0  # trained, and not wiped
    stored = hf.load(out)[1]
    for name, x in stored.items():
        assert torch.equal(model.get_parameter(name), x), name
    folder = script.run("again", dataclasses.replace(cfg, out_dir=str(tmp_path / "again")))
    kinds = [json.loads(line)["kind"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "pretrain" not in kinds and kinds[-1] == "end"


def test_the_same_seed_gives_the_same_run(tmp_path):
    for name in ("a", "b"):
        script.run(name, small(out_dir=str(tmp_path / name)))
    a, b = ((tmp_path / n / "checkpoint" / "model.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_gradient_accumulation_equals_one_big_batch(tmp_path):
    results = []
    for changes in (dict(batch_size=4), dict(batch_size=2, grad_accum=2), dict(batch_size=1, grad_accum=4)):
        model, optimizer, data, cfg = setup(tmp_path, **changes)
        totals, norm = update(model.double(), optimizer, data, 0, cfg, model.rollout)
        results.append((torch.cat([p.detach().flatten() for p in model.parameters()]), norm, totals))
    for parameters, norm, totals in results[1:]:
        assert (parameters - results[0][0]).abs().max() < 1e-9 and abs(norm - results[0][1]) < 1e-9 * norm
        assert all(abs(totals[k] - v) < 1e-6 for k, v in results[0][2].items())


def test_optimizer_groups_and_schedule(tmp_path):
    model, optimizer, data, cfg = setup(tmp_path, learning_rate=1e-3, warmup_steps=4, weight_decay=0.01,
                                        embedding_lr_factor=10.0)
    matrices, vectors, delimiters = optimizer.param_groups
    assert {id(p) for p in delimiters["params"]} == {id(model.start_embedding), id(model.end_embedding)}
    assert (matrices["weight_decay"], vectors["weight_decay"], delimiters["weight_decay"]) == (0.01, 0.0, 0.001)
    assert all(p.dim() == 1 for p in vectors["params"]) and all(p.dim() == 2 for p in matrices["params"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert [script.learning_rate(s, cfg) for s in (0, 1, 3, 50)] == [0.00025, 0.0005, 0.001, 0.001]
    update(model, optimizer, data, 0, cfg, model.rollout)
    assert [g["lr"] for g in optimizer.param_groups] == [0.00025, 0.00025, 0.0025]
    cosine = dataclasses.replace(cfg, schedule="cosine", max_steps=104)
    assert math.isclose(script.learning_rate(54, cosine), 0.001 * 0.55)
    assert math.isclose(script.learning_rate(104, cosine), 1e-4)


@pytest.mark.parametrize("trainable, moved", [("all", {"lm", "start_embedding", "end_embedding", "mixing_head"}),
                                              ("thoughts", {"start_embedding", "end_embedding", "mixing_head"}),
                                              ("mixing_head", {"mixing_head"})])
def test_only_what_is_trainable_moves(tmp_path, trainable, moved):
    model, optimizer, data, cfg = setup(tmp_path, trainable=trainable, grad_clip=1e9)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    update(model, optimizer, data, 0, cfg, model.rollout)
    assert {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])} == moved


def test_no_thoughts_is_the_plain_mean_nll(tmp_path):
    model, optimizer, data, cfg = setup(tmp_path, n_ahead=0, batch_size=3)
    text, docs = data.batch(cfg.seed, 0, range(3), cfg.max_length + cfg.n_ahead_talk)
    with torch.no_grad():
        log_probs = model.lm.logits(model.text_states(text, docs)).log_softmax(-1)
    expected = -log_probs[:, :20].gather(-1, text[:, 1:21, None]).mean()
    totals, _ = update(model, optimizer, data, 0, cfg, None)
    assert abs(totals["nll_base"] - expected) < 1e-5 and set(totals) == {"nll_base"}


def test_control_thoughts_come_from_the_text(tmp_path):
    model, _, data, cfg = setup(tmp_path, thoughts_from="ab")
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(data.tokenizer_path))
    u = torch.rand(2, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    thoughts, log_probs = script.thought_sampler(model, cfg, tokenizer)(None, None, u)
    assert torch.equal(thoughts, (u >= 0.5).long()) and torch.allclose(log_probs, torch.tensor(0.5).log())
    fixed, _ = script.thought_sampler(model, dataclasses.replace(cfg, thoughts_from="\n"), tokenizer)(None, None, u)
    assert (fixed == 10).all()


def test_non_finite_steps_are_skipped_and_several_stop_the_run(tmp_path):
    model, optimizer, data, cfg = setup(tmp_path, max_steps=20, eval_every=1000)
    with torch.no_grad():
        model.end_embedding[0] = math.nan
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n != "end_embedding"}
    said = []
    log = type("Log", (), dict(write=lambda *a, **k: said.append(k), say=lambda *a, **k: None))()
    tokenizer = load_tokenizer(tmp_path / "data")
    with pytest.raises(InputError, match="not finite 5 updates in a row"):
        cfg = dataclasses.replace(cfg, eval_every=10**6)
        script.evaluate, evaluate = (lambda *a: None), script.evaluate
        try:
            script.train(model, {"train": data, "val": data}, cfg, log, tokenizer, "think")
        finally:
            script.evaluate = evaluate
    assert [k["skipped"] for k in said] == [1, 2, 3, 4]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_compiled_blocks_are_not_compiled_again_after_warm_up(tmp_path):
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    model, optimizer, data, cfg = setup(tmp_path, n_layers=4)
    plain, _ = update(model, optimizer, data, 0, cfg, model.rollout)
    model, optimizer, data, cfg = setup(tmp_path, n_layers=4)
    for block in model.lm.model.layers:
        block.compile(dynamic=False, backend="eager")  # the same guards as with any backend
    compiled, _ = update(model, optimizer, data, 0, cfg, model.rollout)
    assert all(abs(plain[k] - v) < 1e-5 for k, v in compiled.items())
    for step in range(3):
        update(model, optimizer, data, step, cfg, model.rollout)
        if step == 0:
            warm = counters["stats"]["unique_graphs"]
    assert 0 < warm <= 6 and counters["stats"]["unique_graphs"] == warm  # of the shapes, whatever the number of layers


class Kept:
    """Bytes that autograd keeps for the backward pass, parameters aside."""

    def __init__(self, model):
        self.seen, self.ours = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __call__(self, x):
        if x.untyped_storage().data_ptr() not in self.ours:
            self.seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_checkpointing_keeps_less_and_changes_nothing(tmp_path, monkeypatch, compiled):
    """A share of the blocks' activations is recomputed; the more, the less is kept, and the update is the same."""
    from nanoqstar.device import speed_up
    module_compile, results, kept = torch.nn.Module.compile, [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **settings: module_compile(
        block, backend="aot_eager_decomp_partition", **settings))  # inductor's choice of what to keep, without its code
    for checkpointing in (0.0, 0.5, 1.0):
        torch._dynamo.reset()
        model, optimizer, data, cfg = setup(tmp_path, n_layers=2)
        with torch._functorch.config.patch(activation_memory_budget=1.0):  # put back afterwards
            speed_up(model, torch.device("cpu"), checkpointing, compile=compiled)
            (text, docs, u), = script.load_batches(data, 0, cfg)[0]
            pack = Kept(model)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                states = model.score(text, docs, (u * 7).long())
            kept.append(sum(pack.seen.values()))
            del states
            update(model, optimizer, data, 0, cfg, model.rollout)
        results.append({n.replace("_checkpoint_wrapped_module.", ""): p.detach() for n, p in model.named_parameters()})
    assert kept[0] > 1.2 * kept[1] > 1.2**2 * kept[2]
    for result in results[1:]:
        assert results[0].keys() == result.keys()
        assert all(torch.allclose(results[0][n], p, atol=1e-6) for n, p in result.items())


def test_a_checkpointed_model_is_saved_under_its_own_names(tmp_path):
    out = script.run("x", small(checkpointing=1.0, out_dir=str(tmp_path / "out")))
    _, thoughts, _ = hf.load(out)
    assert set(thoughts) == {"start_embedding", "end_embedding", *(f"mixing_head.{n}" for n in (
        "0.weight", "0.bias", "2.weight", "2.bias", "4.weight"))}


@pytest.mark.parametrize("args, sentence", [
    (["--data", "nowhere"], "there is no prepared data in nowhere"),
    (["--model_path", "nowhere"], "there is no folder 'nowhere'"),
    (["--start_init_text", "z"], "start_init_text: the tokenizer cannot encode 'z'|start_init_text: 'z' has no tokens"),
    (["--max_length", "20000"], "a window of 20,002 tokens does not fit"),
    (["missing.json"], "no config 'missing.json'"),
])
def test_bad_input_is_one_sentence(tmp_path, args, sentence):
    name = [args.pop(0)] if not args[0].startswith("--") else []
    done = call("train.py", *name, *options(small()), *args, "--out_dir", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert re.search(sentence, done.stderr), done.stderr


def test_a_tokenizer_that_is_not_the_models_is_refused(run, tmp_path):
    swapped = fold.tokenizer_json(fold.vocabulary()[::-1])
    ids = [fold.encode(fold.make_text(0, "train", 3000), fold.vocabulary()[::-1])]
    write_dataset(tmp_path / "swapped", swapped, 11, None, {"train": ids, "val": ids}, {})
    with pytest.raises(InputError, match="is not the tokenizer of"):
        script.run("x", small(model_path=str(run[0]), data=str(tmp_path / "swapped"), out_dir=str(tmp_path / "x")))


def test_sample_writes_with_and_without_thoughts(run):
    out, _ = run
    base = ["--model_path", str(out), "--prompt", "abcd=", "--max_new_tokens", "6"]
    done = call("sample.py", *base, "--show_thoughts")
    assert done.returncode == 0 and done.stdout.startswith("abcd=⟨'") and done.stdout.count("⟨") == 6, done.stderr
    assert call("sample.py", *base, "--show_thoughts").stdout == done.stdout  # the same seed
    plain = call("sample.py", *base, "--no_thoughts", "--temperature", "0")
    assert plain.returncode == 0 and "⟨" not in plain.stdout and len(plain.stdout.rstrip("\n")) <= 11
    newest = call("sample.py", "--prompt", "abcd=", "--max_new_tokens", "2", cwd=out.parents[1])
    assert newest.returncode == 0, newest.stderr
    base_only = call("sample.py", "--model_path", str(out / "base"), "--prompt", "a", "--max_new_tokens", "2")
    assert base_only.returncode == 0 and "never taught to think" in base_only.stderr


def test_sample_asks_for_prompts(run):
    done = subprocess.run([sys.executable, "sample.py", "--model_path", str(run[0]), "--max_new_tokens", "2"], cwd=ROOT,
                          input="abcd=\nhallo\naaaa=\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("> ") == 4 and done.stderr.count("\n") == 1


def test_a_broken_checkpoint_or_an_unfinished_run_is_one_sentence(run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run[0] / "checkpoint", broken)
    (broken / "nanoqstar.json").write_text("{")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "metrics.jsonl").write_text("")
    cut = tmp_path / "cut"
    shutil.copytree(run[0] / "checkpoint", cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    for folder, sentence in ((broken, "cannot be read as JSON"), (unfinished, "has saved nothing yet"),
                             (cut, "model.safetensors")):
        done = call("sample.py", "--model_path", str(folder), "--prompt", "abcd=")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and sentence in done.stderr, done.stderr


def test_plain_training_saves_no_untrained_thoughts(run, tmp_path):
    base = str(run[0] / "base")
    out = script.run("x", small(model_path=base, n_ahead=0, out_dir=str(tmp_path / "x")))
    assert not (out / "checkpoint" / "quietstar.safetensors").exists()
    out = script.run("y", small(model_path=str(run[0]), n_ahead=0, out_dir=str(tmp_path / "y")))
    assert (out / "checkpoint" / "quietstar.safetensors").exists()  # trained before, and kept


def test_logged_means_leave_out_predictions_across_documents(tmp_path):
    model, optimizer, data, cfg = setup(tmp_path, batch_size=1)
    text, _ = data.batch(0, 0, [0], cfg.max_length + cfg.n_ahead_talk)
    docs = (torch.arange(text.shape[1]) >= 9).long()[None]
    u = torch.rand(1, cfg.n_passes, cfg.max_length, cfg.n_ahead - 2, generator=torch.Generator().manual_seed(0))
    valid = Valid.from_docs(docs, cfg.n_ahead_talk)
    thoughts, lp = model.rollout(text, docs, u)
    states = model.score(text, docs, thoughts)
    _, parts = quiet_star_loss(states, model.lm.head_weight, text, thoughts, valid, valid.counts(), base_weight=0.5,
                               mixed_weight=0.5, policy_weight=1.0, clamp_advantage=False, reinforce_temperature=1.0)
    totals, _, _ = script.train_step(model, optimizer, [[text, docs, u]], valid.counts(), 0, cfg, model.rollout)
    kept = valid.policy[0].nonzero()[:, 0]
    assert 0 < len(kept) < cfg.max_length
    for key, expected in (("reward", parts["reward"][:, :, kept].mean()), ("entropy", -lp[:, :, kept].mean()),
                          ("positive", (parts["advantage"][:, :, kept] > 0).float().mean())):
        assert abs(totals[key] - expected) < 1e-5, key
    talk = valid.talk[0]
    mix = torch.stack([states.mix[0, :, talk[:, j], j].mean() for j in range(cfg.n_ahead_talk)]).mean()
    assert abs(totals["mix"] - mix) < 1e-6


@pytest.mark.parametrize("args, sentence", [
    (["--prompt", "xyz"], "cannot encode this prompt|prompt is empty"), (["--prompt", ""], "the prompt is empty"),
    (["--prompt", "ab" * 2000], "more than the model's context of 2048: shorten"), (["--top_p", "2"], "top_p=2.0"),
    (["--promt", "a"], "did you mean --prompt")])
def test_sample_refuses_in_one_sentence(run, args, sentence):
    done = call("sample.py", "--model_path", str(run[0]), *args)
    assert done.returncode == 2 and re.search(sentence, done.stderr) and done.stderr.count("\n") == 1, done.stderr


def test_sample_without_any_run(tmp_path):
    done = call("sample.py", "--prompt", "a", cwd=tmp_path)
    assert done.returncode == 2 and "there is no finished run under out/" in done.stderr


def test_the_demo_learns_to_think(tmp_path):
    """The regression test of the whole method: thoughts gain on held-out answers, within 80 updates."""
    out = script.run("tiny", dataclasses.replace(PRESETS["tiny"].config, out_dir=str(tmp_path / "out"), max_steps=80,
                                                 eval_every=1000, eval_windows=48))
    last = [r for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "eval"][-1]
    direct = last["answers"]["direct"]
    assert direct["n"] > 100 and direct["accuracy_base"] < 0.3, direct
    # 97%, -1.2 when written
    assert direct["accuracy_mixed"] > 0.7 and direct["nll_mixed"] < direct["nll_base"] - 0.5, direct
    assert last["answers"]["thoughts"]["worked"] > 0.7 and last["gain"] > 0.05
