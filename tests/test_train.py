"""train.py at sizes of a second, in process; and the demo, shortened, which must learn."""

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared import fold_text
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

import train as script
from configs import PRESETS, TrainConfig
from data import fold
from data.writer import write_dataset
from nanoqstar import InputError, cpu, evaluate, files, hf, runlog, state
from nanoqstar.dataset import KINDS, PHASES, TokenDataset, stream
from nanoqstar.device import speed_up
from nanoqstar.objective import Objective, Valid, quiet_star_loss
from nanoqstar.quietstar import QuietStar, uniforms
from nanoqstar.run import Run, check_shares
from nanoqstar.runlog import RunLog, Signals
from nanoqstar.state import States

ROOT = Path(__file__).parents[1]
TINY = PRESETS["tiny_learned"].config
SMALL = dict(hidden_size=16, intermediate_size=32, n_heads=2, n_kv_heads=1, pretrain_steps=3,
             pretrain_batch_size=4, fold_tokens=5000, max_length=20, batch_size=2, eval_windows=4,
             max_steps=2, schedule="constant", eval_every=1000, save_every=1000, log_every=1,
             threads=1)
FULL = OSError(errno.ENOSPC, "No space left on device")


def small(**changes):
    return dataclasses.replace(TINY, **SMALL | changes)


def options(**changes):
    """The command line of a small run: what is not as in the preset, and applies."""
    config = small(**changes)
    return ["tiny_learned"] + [
        word for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != getattr(TINY, f.name)
        and (f.metadata["when"] is None or f.metadata["when"].holds(config))
        for word in (f"--{f.name}", str(value))]


def start(out, *args, **changes):
    """Exit code of a small run in the folder `out`."""
    return script.main([*options(out_dir=str(out), **changes), *args])


def rows(out, *kinds):
    """Of metrics.jsonl: all, or those of some kinds."""
    read = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in read if not kinds or row["kind"] in kinds]


def saved_step(folder):
    return json.loads((folder / "nanoqstar.json").read_text())["step"]


FOLDERS = itertools.count()


def prepared(folder, cfg):
    return script.prepare(cfg, fold.Corpus.of(cfg), RunLog(folder, {}), Signals(),
                          *script.check(cfg))


def setup(tmp_path, **changes):
    """(a run that is prepared and whose mixing head is past zero, its optimizer)."""
    cfg, folder = small(**changes), tmp_path / f"run-{next(FOLDERS)}"
    folder.mkdir()
    this = prepared(folder, cfg)
    torch.nn.init.normal_(this.model.mixing_head[4].weight,
                          generator=torch.Generator().manual_seed(0))
    return this, script.make_optimizer(this.model, cfg)


def objective_of(cfg):
    return Objective(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(Objective)})


def update(this, optimizer, step=0, rollout=None):
    """(means, gradient norm) of one update."""
    batches, counts = script.load_batches(this.splits["train"], "think", step, this.cfg)
    stats, _, norm, finite = script.train_step(
        this.model, optimizer, batches, counts, objective_of(this.cfg),
        script.learning_rate(step, this.cfg), this.cfg, rollout)
    assert finite
    return stats, norm


def before_call(monkeypatch, module, name, n, act):
    """Its n-th call (from 1) first does act()."""
    function, calls = getattr(module, name), itertools.count(1)

    def hooked(*args, **options):
        if next(calls) == n:
            act()
        return function(*args, **options)
    monkeypatch.setattr(module, name, hooked)


def raises(error):
    def act():
        raise error
    return act


def kill(*numbers):
    """Sends signals to this process."""
    def act():
        for number in numbers:
            os.kill(os.getpid(), number)
    return act


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished small run as a user makes it, with `| head -1` behind: (its folder, that line)."""
    out = tmp_path_factory.mktemp("runs") / "out" / "tiny"
    command = [sys.executable, "train.py", *options(eval_every=1, out_dir=str(out))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as child:
        first = child.stdout.readline()
        child.stdout.close()
        said = child.stderr.read()
    assert child.returncode == 0 and not said, said
    return out, first


# ---- what a run leaves and says


def test_a_run_leaves_what_it_promises(run):
    out, first = run
    assert first.startswith(f"{out}: 4,928 parameters, ") and "cpu, 1 threads" in first
    assert [r["kind"] for r in rows(out)] == [
        "pretrain", "pretrain", "pretrain", "eval", "think", "eval", "think", "eval", "end"]
    assert [r["step"] for r in rows(out)] == [1, 2, 3, 0, 1, 1, 2, 2, 2]
    evaluation = rows(out)[-2]
    assert evaluation.keys() >= {
        "nll_base", "nll_mixed", "gain", "gain_hardest", "gain_by_decile", "gain_stderr", "reward",
        "mix", "entropy", "distinct", "answers", "greedy"}
    stories = [[(e["context"], e["target"]) for e in r["examples"]] for r in rows(out, "eval")]
    assert len(stories[0]) >= 1 and stories == [stories[0]] * 3  # the same prompts every time
    assert all(context[-1] == "=" for context, _ in stories[0])  # before direct answers
    assert len(evaluation["gain_by_decile"]) == 10
    assert math.isclose(evaluation["gain"], evaluation["nll_base"] - evaluation["nll_mixed"],
                        abs_tol=1e-5)
    assert 0 < evaluation["distinct"] <= 1 and 0 < evaluation["entropy"] < math.log(11) + 0.5
    assert rows(out, "think")[0].keys() >= {
        "nll_base", "nll_talk", "policy", "reward", "gain", "positive", "mix", "entropy",
        "distinct", "grad_norm", "learning_rate", "skipped", "seconds", "tokens_per_second",
        "tflops"}
    assert [r["learning_rate"] for r in rows(out, "think")] == [
        script.learning_rate(step, small()) for step in (0, 1)]
    saved = TrainConfig(**json.loads((out / "config.json").read_text()))
    assert saved == small(eval_every=1, out_dir=str(out))
    assert sorted(p.name for p in out.iterdir()) == [
        "base", "checkpoint", "config.json", "data", "metrics.jsonl", "state"]  # no lock
    kinds = {p.suffix for p in out.rglob("*") if p.is_file()}  # .bin and .npy are the corpus
    assert kinds == {".json", ".jsonl", ".safetensors", ".bin", ".npy"}  # no pickle
    _, _, settings = hf.load_thinker(out)
    assert (settings.step, settings.thinking) == (2, hf.Thinking(6, 2, 1.0))
    assert TrainConfig(**settings.config) == saved
    assert hf.load_thinker(out / "base")[2].thinking.n_ahead == saved_step(out / "base") == 0


def test_the_mixing_head_starts_at_the_base_model(run):
    first = rows(run[0], "eval")[0]
    assert first["gain"] == 0 and first["reward"] == 0 and first["mix"] == 0


@pytest.fixture(scope="module")
def lines(run, tmp_path_factory):
    """Prepared data of `run`'s vocabulary, each line a document."""
    folder = tmp_path_factory.mktemp("data") / "lines"
    characters = fold.vocabulary()
    splits = {split: [fold.encode(line, characters) for line in
                      fold_text(0, split, 2000).splitlines(keepends=True)]
              for split in ("train", "val")}
    write_dataset(folder, fold.tokenizer_json(characters), len(characters), None, splits, {})
    return folder


def test_the_last_evaluation_is_right(run, lines, tmp_path, capsys):
    """Computed again from what was saved: means over valid positions, deciles from easy to hard,
    the error by window; and the table shows that."""
    out = tmp_path / "x"
    assert start(out, model_path=str(run[0]), data=str(lines), max_steps=6, learning_rate=0.03,
                 warmup_steps=0, eval_windows=9) == 0
    model, _, _ = hf.load_thinker(out)
    text, docs = TokenDataset(lines, "val").evenly(9, 22)
    with torch.no_grad():
        thoughts, _ = model.rollout(text, docs, uniforms(0, "eval", 0, range(9), (1, 20, 4)))
        states = model.score(text, docs, thoughts)
        targets = text[:, 1:21, None]
        base, mixed = (
            -(hidden @ model.lm.head_weight.T).log_softmax(-1).gather(-1, targets)[..., 0]
            for hidden in (states.base[:, :20], states.mixed[:, 0, :, 0]))
    valid = docs[:, 1:21] == docs[:, :20]
    assert 0.5 < valid.float().mean() < 0.95
    row, gain = rows(out, "eval")[-1], (base - mixed)[valid].double()
    deciles = np.array_split(gain[base[valid].argsort()].numpy(), 10)
    deviations = [(base - mixed - gain.mean())[n][valid[n]].sum().item() for n in range(9)]
    expected = {"nll_base": base[valid].mean().item(), "nll_mixed": mixed[valid].mean().item(),
                "gain": gain.mean().item(), "gain_by_decile": [part.mean() for part in deciles],
                "gain_hardest": deciles[-1].mean(),
                "gain_stderr": math.sqrt(9 / 8 * sum(d * d for d in deviations)) / len(gain)}
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, abs=1e-5), key
    printed = capsys.readouterr().out
    table = printed[printed.index("base  thoughts"):]
    nlls = re.search(r"all tokens, NLL +(\S+) +(\S+)\n", table).groups()
    assert nlls == (f"{row['nll_base']:.4f}", f"{row['nll_mixed']:.4f}") and nlls[0] != nlls[1]
    assert f"mean gain {row['gain']:+.4f} +- {2 * row['gain_stderr']:.4f} (2 standard" in table
    assert " ".join(f"{x:+.3f}" for x in row["gain_by_decile"]) in table
    assert "thinks" in printed and "answers" not in printed


def test_the_demo_ends_with_its_own_table(tmp_path, capsys):
    out = tmp_path / "x"
    assert start(out, eval_windows=40, learning_rate=0.03) == 0
    row, printed = rows(out, "eval")[-1], capsys.readouterr().out
    direct, greedy = row["answers"]["direct"], row["greedy"]
    assert re.search(rf"direct answers right, .*n={direct['n']}\) +{direct['accuracy_base']:.1%} +"
                     rf"{direct['accuracy_mixed']:.1%}\n", printed)
    assert re.search(rf"direct answers, NLL +{direct['nll_base']:.3f} +{direct['nll_mixed']:.3f}\n",
                     printed)
    assert re.search(rf"greedily .*n={greedy['n']}\) +{greedy['base']['right']:.1%} +"
                     rf"{greedy['thoughts']['right']:.1%}\n", printed)
    assert "greedy" not in rows(out, "eval")[0]  # it takes a while
    answer, hint = printed.splitlines()[-2:]
    problem = fold.example_prompt(4, 1, 0)
    assert hint == (f"python sample.py --model_path {out} --show_thoughts --prompt '{problem}' "
                    "--temperature 0 --max_new_tokens 8")
    right = fold.solve(problem[:-1], fold.latin_squares(0))[-1]
    assert answer.endswith(f"Try it (right is {right}):")


def test_pretraining_shows_a_sign_of_life(tmp_path, monkeypatch, capsys):
    """A line at least every few seconds, and no more."""
    for silence, shown in ((0.0, 3), (1e9, 0)):
        monkeypatch.setattr(runlog, "SILENCE", silence)
        assert start(tmp_path / str(shown), max_steps=1) == 0
        printed = capsys.readouterr().out
        assert printed.count("pretrain ") == shown and printed.count("think ") == 1


def test_the_same_seed_gives_the_same_run(tmp_path, run):
    assert start(tmp_path / "a", eval_every=1) == 0
    a, b = ((out / "checkpoint" / "model.safetensors").read_bytes()
            for out in (tmp_path / "a", run[0]))
    assert a == b
    assert start(tmp_path / "c", seed=1) == 0
    assert (tmp_path / "c" / "checkpoint" / "model.safetensors").read_bytes() != a


def test_wandb_counts_every_step_once(tmp_path, monkeypatch):
    """Over pre-training and thinking; and a start that is refused is no run of it."""
    steps, inits = [], []
    fake = types.SimpleNamespace(
        init=lambda **options: inits.append(options) or fake,
        log=lambda values, step: steps.append((step, sorted({k.split("/")[0] for k in values}))))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert start(tmp_path / "bad", wandb=True, data="nowhere") == 2
    assert not inits
    assert start(tmp_path / "x", wandb=True) == 0
    assert inits[0]["project"] == "nanoqstar" and inits[0]["config"]["wandb"] is True
    assert steps == [(1, ["pretrain"]), (2, ["pretrain"]), (3, ["pretrain"]), (3, ["eval"]),
                     (4, ["think"]), (5, ["think"]), (5, ["eval"]), (5, ["end"])]
    steps.clear()
    assert script.main(["--resume", str(tmp_path / "x")]) == 0
    assert steps == [(5, ["eval"]), (5, ["end"])]


# ---- a run goes on


def recorded(monkeypatch):
    """{(phase, step): tensors of the batches} of the runs to come."""
    drawn, load = {}, script.load_batches

    def recording(data, phase, step, cfg, pin=False):
        batches, counts = load(data, phase, step, cfg, pin)
        drawn[phase, step] = batches
        return batches, counts
    monkeypatch.setattr(script, "load_batches", recording)
    return drawn


def test_a_continued_run_goes_on_with_other_windows_and_thoughts(tmp_path, monkeypatch):
    """Two updates and two continuations are six updates in a row, after three of pre-training; the
    reader may read one ahead of what is used, never of what is left."""
    drawn, used = recorded(monkeypatch), []
    step = script.train_step
    monkeypatch.setattr(script, "train_step", lambda *args: used.append(args[2]) or step(*args))
    assert start(tmp_path / "0") == 0
    for n in (1, 2):
        assert start(tmp_path / str(n), model_path=str(tmp_path / str(n - 1))) == 0
    assert list(drawn) == [*(("pretrain", n) for n in range(3)), *(("think", n) for n in range(6))]
    assert all(a is b for a, b in zip(used, drawn.values(), strict=True))
    windows = [tuple(row.tolist()) for batches in drawn.values() for x in batches for row in x[0]]
    numbers = [x[2].flatten().tolist() for key, batches in drawn.items() if key[0] == "think"
               for x in batches]
    assert len(set(windows)) == len(windows) == 3 * 4 + 6 * 2
    assert len(set(itertools.chain(*numbers))) > 0.999 * len([*itertools.chain(*numbers)])
    for n in range(3):
        assert saved_step(tmp_path / str(n) / "checkpoint") == 2 * (n + 1)
        assert [r["step"] for r in rows(tmp_path / str(n), "think")] == [2 * n + 1, 2 * n + 2]
        assert [r["step"] for r in rows(tmp_path / str(n), "eval")] == [2 * n, 2 * n + 2]


def test_every_stream_is_another():
    """Numpy's seeds [0, 1] and [0, 1, 0] are the same; ours always have all their numbers."""
    tags = itertools.product(KINDS, PHASES, (0, 1, 2**32 - 1), (0, 1, 5),
                             (0, 1, 2**32, 2**32 + 1, 2**63 - 1))
    firsts = [stream(*tag).integers(2**63) for tag in tags]
    assert len(set(firsts)) == len(firsts) == 2 * 6 * 3 * 3 * 5
    again = [stream("windows", "think", 3, 4, 5).random() for _ in range(2)]
    assert again[0] == again[1]


def test_a_run_goes_on_from_an_earlier_one(run, tmp_path):
    out, _ = run
    cfg = small(model_path=str(out))
    (tmp_path / "x").mkdir()
    this = prepared(tmp_path / "x", cfg)
    assert this.model.mixing_head[4].weight.abs().sum() > 0  # trained, and not wiped
    stored = hf.load_thinker(out)[0]
    for (name, p), q in zip(this.model.named_parameters(), stored.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert this.first == 2
    assert start(tmp_path / "y", model_path=str(out)) == 0
    kinds = [r["kind"] for r in rows(tmp_path / "y")]
    assert "pretrain" not in kinds and kinds[-1] == "end"
    assert not (tmp_path / "y" / "base").exists()


def test_plain_training_saves_no_untrained_thoughts(run, tmp_path):
    for source, thinking in ((run[0] / "base", hf.Thinking()), (run[0], hf.Thinking(6, 2, 1.0))):
        out = tmp_path / source.name
        assert start(out, model_path=str(source), n_ahead=0) == 0
        assert hf.load_thinker(out)[2].thinking == thinking  # trained before: kept
        assert (out / "checkpoint" / "quietstar.safetensors").exists() == (thinking.n_ahead > 0)
        assert [r["kind"] for r in rows(out)] == ["eval", "text", "text", "eval", "end"]


def test_the_official_checkpoint_is_a_start(run, tmp_path):
    """Its layout, without a tokenizer: nothing that it holds is initialised again."""
    checkpoint, official = run[0] / "checkpoint", tmp_path / "official"
    official.mkdir()
    shutil.copy(checkpoint / "config.json", official)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, x in load_file(checkpoint / "quietstar.safetensors").items():
        if name.endswith("_embedding"):
            tensors[name] = torch.stack((x / 100, torch.full_like(x, 9.0)))
        else:
            tensors[name.replace("mixing_head.", "talk_head.0.")] = x
    save_file(tensors, official / "model.safetensors", {"format": "pt"})
    out, given = tmp_path / "x", dict(model_path=str(official), data=str(run[0] / "data"))
    assert start(out, **given) == 2  # no tokenizer
    assert start(out, tokenizer=str(checkpoint), learning_rate=1e-9, **given) == 0
    ours, theirs = (hf.load_thinker(folder)[0] for folder in (out, run[0]))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name


@pytest.fixture
def at_once(monkeypatch):
    """Saves are waited for, as where host memory does not hold a copy: none is left out."""
    monkeypatch.setattr(runlog, "in_host_memory", lambda tensors: None)


def test_checkpoints_are_written_every_so_many_updates(tmp_path, monkeypatch, at_once):
    saves, save = [], hf.save

    def recording(folder, *args, step, **options):
        save(folder, *args, step=step, **options)
        saves.append((folder.name, step, saved_step(folder)))
    monkeypatch.setattr(hf, "save", recording)
    assert start(tmp_path / "x", max_steps=7, save_every=3) == 0
    assert saves == [("base", 0, 0), *(("checkpoint", n, n) for n in (3, 6, 7))]
    this, _ = setup(tmp_path)
    cfg = dataclasses.replace(this.cfg, n_ahead=0, save_every=2, max_steps=5)
    script.train(this, cfg, "pretrain")
    assert saves[4:] == [("base", 0, 0)] * 3


# ---- a run goes on where it stopped, bit for bit


def learned(out):
    """All that a run has come to: rows but for the clock's, the last state, the model's weights."""
    clock = {"seconds", "tokens_per_second", "tflops"}
    logged = [{k: v for k, v in row.items() if k not in clock} for row in rows(out)]
    state = States(out / "state", 1).folders()[-1]
    info = {k: v for k, v in files.read_json(state / "state.json").items()
            if k in ("progress", "adam_step", "files")}
    return (logged, state.name, info, (state / "rank-00000.safetensors").read_bytes(),
            (out / "checkpoint" / "model.safetensors").read_bytes())


RESUMED = dict(max_steps=7, save_every=2, eval_every=3, log_every=2, keep=99, grad_accum=2,
               pretrain_steps=5)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing stopped, all of whose states are kept: 5 updates and 7."""
    out = tmp_path_factory.mktemp("straight") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog, "in_host_memory", lambda tensors: None)
        assert start(out, **RESUMED) == 0
    return out


def test_every_state_leads_to_the_same_end(straight, tmp_path, capsys):
    """Pre-training's, the last of it among them, and thinking's; in the middle of accumulation of
    nothing, as all else is a function of the step. No row twice, none missing."""
    expected = learned(straight)
    names = [x.name for x in (straight / "state").iterdir()]
    assert sorted(names) == [f"step-{n:06d}" for n in (2, 4, 5, 7, 8, 9, 11, 12)]
    assert [(r["kind"], r["step"]) for r in expected[0]] == [
        ("pretrain", 2), ("pretrain", 4), ("pretrain", 5), ("eval", 0), ("think", 2), ("eval", 3),
        ("think", 4), ("think", 6), ("eval", 6), ("think", 7), ("eval", 7), ("end", 7)]
    for name in names:
        out = tmp_path / name
        shutil.copytree(straight, out)
        assert script.main(["--resume", str(out / "state" / name)]) == 0
        printed = capsys.readouterr().out
        assert f"goes on from {out / 'state' / name}: " in printed and "warning" not in printed
        spent = files.read_json(straight / "state" / name / "state.json")["seconds"]
        assert rows(out, "end")[0]["seconds"] > spent > 0  # of both lives
        assert [row.split(",")[0] for row in printed.splitlines() if "removed" in row] == [
            f"removed: {out / 'state' / x}" for x in sorted(names) if x > name]
        assert learned(out) == expected, name


@pytest.mark.parametrize("n", [2, 5, 7, 9])  # two of pre-training, the last of it among them
def test_a_signal_and_resume_are_as_if_nothing_had_been(straight, tmp_path, monkeypatch, capsys, n):
    """The same command twice; and its states are those of the run that was not stopped."""
    out, command = tmp_path / "x", dict(RESUMED, resume="auto")
    with monkeypatch.context() as patch:
        before_call(patch, script, "train_step", n, kill(signal.SIGTERM))
        assert start(out, **command) == 143
    assert f"go on with --resume {out}" in capsys.readouterr().err
    assert rows(out)[-1]["step"] in (n, n - 1) if n < 6 else rows(out)[-1]["step"] <= n - 5
    assert start(out, **command) == 0
    assert learned(out) == learned(straight)
    before = learned(out)
    assert start(out, **command) == 0  # of a run that has ended, too
    assert learned(out) == before


def test_text_goes_on_as_thoughts_do(run, tmp_path, monkeypatch):
    """And a run that began with another's model counts on from there."""
    given = dict(model_path=str(run[0]), data=str(run[0] / "data"), n_ahead=0, max_steps=6,
                 save_every=2, eval_every=2)
    assert start(tmp_path / "a", **given) == 0
    with monkeypatch.context() as patch:
        before_call(patch, script, "train_step", 3, kill(signal.SIGINT))
        assert start(tmp_path / "b", **given) == 130
    assert States(tmp_path / "b" / "state", 1).folders()[-1].name == "step-000005"  # after two
    assert script.main(["--resume", str(tmp_path / "b")]) == 0
    assert learned(tmp_path / "b") == learned(tmp_path / "a")
    assert {r["kind"] for r in rows(tmp_path / "b")} == {"eval", "text", "end"}


def test_a_longer_run_is_the_shorter_one_gone_on_with(straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "x")
    assert script.main(["--resume", str(tmp_path / "x"), "--max_steps", "9"]) == 0
    assert "otherwise than before: max_steps 7 -> 9\n" in capsys.readouterr().out
    assert start(tmp_path / "y", **RESUMED | {"max_steps": 9}) == 0
    ours, theirs = learned(tmp_path / "x"), learned(tmp_path / "y")
    ours[0].remove(next(r for r in ours[0] if (r["kind"], r["step"]) == ("think", 7)))  # the last
    assert ours == theirs
    assert files.read_json(tmp_path / "x" / "config.json")["max_steps"] == 9
    code = script.main(["--resume", str(tmp_path / "x"), "--max_steps", "3"])
    check_refused(capsys, code, "is of update 9 of think: this command ends with update 3")
    code = script.main(["--resume", str(tmp_path / "x"), "--n_ahead", "0", "--force"])
    assert code == 2
    assert "is of phase think, and this command begins with text" in capsys.readouterr().err


def test_a_damaged_state_gives_way_to_the_one_before(straight, tmp_path, capsys, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    shutil.copytree(straight, tmp_path / "x")
    file = tmp_path / "x" / "state" / "step-000012" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert script.main(["--resume", str(tmp_path / "x")]) == 0
    said = capsys.readouterr()
    assert f"warning: {file} is damaged" in said.err and "step-000011: think 6/7" in said.out
    assert learned(tmp_path / "x") == learned(straight)
    with monkeypatch.context() as patch:  # what may pass is no damage
        patch.setattr(state, "plain", failing)
        assert script.main(["--resume", str(tmp_path / "x")]) == 2
    assert "Input/output error" in capsys.readouterr().err
    for file in (tmp_path / "x" / "state").glob("*/state.json"):
        file.write_text("{}")
    before = sorted((tmp_path / "x").rglob("*"))
    assert script.main(["--resume", str(tmp_path / "x")]) == 2
    assert "error: " in (said := capsys.readouterr().err) and "holds no whole state" in said
    assert sorted((tmp_path / "x").rglob("*")) == before


@pytest.mark.parametrize(("args", "words"), [
    (["--learning_rate", "0.5"], "learning_rate 0.001 -> 0.5"),
    (["--seed", "1", "--batch_size", "3"], "seed 0 -> 1, batch_size 2 -> 3"),
    (["--schedule", "cosine", "--max_steps", "9"],
     "max_steps 7 -> 9, schedule constant -> cosine"),
    (["--pretrain_steps", "9"], "pretrain_steps 5 -> 9")])
def test_other_settings_are_shown_and_need_force(straight, tmp_path, capsys, args, words):
    shutil.copytree(straight, tmp_path / "x")
    config, before = tmp_path / "x" / "config.json", learned(straight)
    code = script.main(["--resume", str(tmp_path / "x"), *args])
    check_refused(capsys, code, f"the run had other settings: {words}: leave these", "--force")
    assert learned(tmp_path / "x") == before
    assert config.read_bytes() == (straight / "config.json").read_bytes()
    if args[0] == "--learning_rate":
        state = tmp_path / "x" / "state" / "step-000009"
        assert script.main(["--resume", str(state), *args, "--force", "--log_every", "1"]) == 0
        said = capsys.readouterr().out
        assert f"otherwise than before: {words}\n" in said and "log_every 2 -> 1\n" in said
        assert [(r["step"], r["learning_rate"]) for r in rows(tmp_path / "x", "think")] == [
            (2, 1e-3 * 0.2), (4, 1e-3 * 0.4), *((n, 0.5 * n / 10) for n in (5, 6, 7))]
        assert files.read_json(config)["learning_rate"] == 0.5
        assert not files.read_json(config)["force"]


@pytest.mark.skipif(not cpu.has_onednn(), reason="there is one library only")
def test_products_stay_with_the_library_that_they_began_with(straight, tmp_path, monkeypatch):
    """Which is the faster one is timed at a start, and on a busy machine the other may win."""
    shutil.copytree(straight, tmp_path / "x")
    folder = tmp_path / "x" / "state" / "step-000007"
    began = files.read_json(folder / "state.json")["onednn"]
    monkeypatch.setattr(cpu, "onednn", cpu.onednn)  # as it is, after this test
    monkeypatch.setattr(cpu, "choose_products", lambda _: setattr(cpu, "onednn", not began))
    assert script.main(["--resume", str(folder)]) == 0
    assert cpu.onednn == began
    assert learned(tmp_path / "x") == learned(straight)


def test_a_run_whose_config_was_changed_is_refused(straight, tmp_path, capsys):
    """By hand, or by a bad disk: the states know their settings."""
    shutil.copytree(straight, tmp_path / "x")
    config = tmp_path / "x" / "config.json"
    files.write_json(config, files.read_json(config) | {"learning_rate": 0.5})
    check_refused(capsys, script.main(["--resume", str(tmp_path / "x")]),
                  "the run had other settings: learning_rate 0.001 -> 0.5: leave")


def test_data_that_changed_underneath_are_refused(straight, tmp_path, capsys):
    out = tmp_path / "x"
    shutil.copytree(straight, out)
    files.write_json(out / "data" / "meta.json",
                     files.read_json(out / "data" / "meta.json") | {"val_fraction": 0.5})
    before = (out / "metrics.jsonl").read_bytes()
    for force in ([], ["--force"]):
        check_refused(capsys, script.main(["--resume", str(out), *force]),
                      f"the data in {out / 'data'} are not those of {out / 'state'}")
    code = script.main(["--resume", str(straight), "--fold_operands", "3", "--force"])
    assert code == 2 and "are not those of" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before
    shutil.copy(straight / "data" / "meta.json", out / "data")
    tokens = out / "data" / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[::-1])  # which meta.json does not tell
    check_refused(capsys, script.main(["--resume", str(out), "--force"]), "are not those of")
    shutil.rmtree(out / "data")  # made again, to the byte
    assert script.main(["--resume", str(out)]) == 0
    assert learned(out) == learned(straight)


def test_a_disk_that_is_full_while_data_are_made_is_said(tmp_path, capsys, monkeypatch):
    def write(*args):
        raise OSError(errno.ENOSPC, "No space left on device")  # a file's write names no file

    monkeypatch.setattr(fold.Corpus, "prepare", write)
    check_refused(capsys, start(tmp_path / "x"), f"{tmp_path / 'x' / 'data'} cannot be written (No",
                  "make room, or choose another --out_dir")
    assert not (tmp_path / "x").exists()


def test_too_few_val_windows_for_the_processes_are_refused_at_once():
    with pytest.raises(InputError, match="2 processes cannot share 1 val windows"):
        check_shares(TrainConfig(eval_windows=1, batch_size=2), 2)
    check_shares(TrainConfig(eval_windows=2, batch_size=2), 2)


def test_a_run_whose_first_model_has_learned_more_is_refused(run, tmp_path, capsys):
    """Its rates, its evaluations and its end would lie at other updates."""
    shutil.copytree(run[0], model := tmp_path / "model")
    assert start(tmp_path / "x", model_path=str(model), max_steps=2) == 0
    file = model / "checkpoint" / "nanoqstar.json"
    settings = files.read_json(file)
    files.write_json(file, settings | {"step": settings["step"] + 1})
    before = learned(tmp_path / "x")
    code = script.main(["--resume", str(tmp_path / "x"), "--max_steps", "3"])
    assert code == 2
    assert f"{model} was of update {settings['step']} when this run" in capsys.readouterr().err
    assert learned(tmp_path / "x") == before
    files.write_json(file, settings)
    assert script.main(["--resume", str(tmp_path / "x"), "--max_steps", "3"]) == 0


def test_what_there_is_nothing_to_go_on_from(run, tmp_path, capsys):
    check_refused(capsys, script.main(["--resume", str(tmp_path)]), "there is no run in")
    (tmp_path / "config.json").write_text("{}")
    check_refused(capsys, script.main(["--resume", str(tmp_path)]), "holds no state to go on from")
    check_refused(capsys, script.main(["--resume", str(run[0] / "checkpoint")]),
                  "checkpoint holds no state to go on from")
    check_refused(capsys, start(tmp_path, resume="auto"), "already holds a run or other files")
    check_refused(capsys, script.main(["--resume", str(run[0]), "--out_dir", str(tmp_path)]),
                  "--out_dir is for a new run")
    check_refused(capsys, script.main(["--force"]), "--force is for resume only")
    assert sorted(os.listdir(tmp_path)) == ["config.json"]


def test_auto_begins_anew_what_was_killed_before_its_first_save(straight, tmp_path, monkeypatch):
    """In this command's own folder, never in the next free one; others' files in it stay."""
    monkeypatch.chdir(tmp_path)
    out = Path("out") / "tiny_learned"
    (out / "state" / "step-000002.partial").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "job.log", "data.partial/train.bin"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{")
    command = [*options(**RESUMED), "--resume", "auto"]
    assert script.main(command) == 0 and os.listdir("out") == ["tiny_learned"]
    assert learned(out) == learned(straight) and (out / "job.log").read_text() == "{"
    assert "data.partial" not in os.listdir(out)


def test_an_update_cut_in_the_middle_is_no_state(tmp_path, monkeypatch):
    """Some parameters have had it and others not: the model is kept for what it is worth, and the
    run goes on from the state before."""
    step, calls = torch.optim.AdamW.step, itertools.count(1)

    def cut(self, *args):
        if next(calls) == 6:  # the third of thinking
            torch.nn.init.zeros_(self.param_groups[0]["params"][0])
            kill(signal.SIGINT, signal.SIGINT)()
        return step(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", cut)
        assert start(tmp_path / "x", max_steps=4) == 130
    assert saved_step(tmp_path / "x" / "checkpoint") == 2
    assert os.listdir(tmp_path / "x" / "state") == ["step-000003"]  # pre-training's
    assert script.main(["--resume", str(tmp_path / "x")]) == 0
    assert start(tmp_path / "y", max_steps=4) == 0
    assert learned(tmp_path / "x") == learned(tmp_path / "y")


def test_a_run_that_is_killed_goes_on(straight, tmp_path):
    """Once, as soon as there is a state; `python tests/kill.py` does it thirty times."""
    out = tmp_path / "x"
    command = [sys.executable, "train.py", *options(out_dir=str(out), **RESUMED)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None and not any((out / "state").glob("step-*[0-9]")):
            time.sleep(0.001)
        child.kill()
    assert child.returncode == -signal.SIGKILL and (out / ".lock").exists()
    assert start(out, resume="auto", **RESUMED) == 0
    assert learned(out) == learned(straight)


def test_want_of_memory_names_the_state(tmp_path, monkeypatch, capsys):
    before_call(monkeypatch, script, "train_step", 5, raises(torch.OutOfMemoryError("CUDA")))
    assert start(tmp_path / "x") == 2
    assert capsys.readouterr().err.endswith(f": go on with --resume {tmp_path / 'x'}\n")


def test_spikes_are_left_out_counted_and_no_matter_to_resume(tmp_path, monkeypatch):
    """Of three norms and no sigma, about half are spikes."""
    monkeypatch.setattr(state, "WINDOW", 3)
    monkeypatch.setattr(state, "SIGMAS", 0)
    given = dict(max_steps=8, skip_spikes=True, eval_every=2)
    assert start(tmp_path / "a", **given) == 0
    logged, norms, spikes = rows(tmp_path / "a", "think"), [], 0
    for row in logged:
        spikes += len(norms) >= 3 and row["grad_norm"] > sum(norms[-3:]) / 3
        norms.append(row["grad_norm"])
        assert row["spikes"] == row["skipped"] == spikes
    assert 1 < spikes < 5
    with monkeypatch.context() as patch:
        before_call(patch, script, "train_step", 8, kill(signal.SIGTERM))
        assert start(tmp_path / "b", **given) == 143
    assert script.main(["--resume", str(tmp_path / "b")]) == 0
    assert learned(tmp_path / "b") == learned(tmp_path / "a")
    info = files.read_json(States(tmp_path / "a" / "state", 1).folders()[-1] / "state.json")
    assert max(info["adam_step"].values()) == 8 - spikes  # Adam has not seen them
    assert start(tmp_path / "c", **given | {"skip_spikes": False}) == 0
    assert "spikes" not in rows(tmp_path / "c", "think")[-1]


def test_a_base_that_thinking_ruins_ends_the_run(tmp_path, monkeypatch, capsys, at_once):
    """With the best state named, from which it goes on."""
    report, rise = evaluate.report, iter([0.0, 0.1, 0.3, 0.6])

    def ruined(scores):
        found, more = report(scores), next(rise)
        found.summary["nll_base"] += more
        found.summary["nll_mixed"] += abs(more - 0.1) / 2
        return found
    monkeypatch.setattr(evaluate, "report", ruined)
    out = tmp_path / "x"
    assert start(out, max_steps=9, eval_every=2, save_every=100) == 2
    said, first = capsys.readouterr().err, rows(out, "eval")[0]["nll_base"]
    best = out / "state" / "step-000005"  # at 2 of thinking, after 3
    assert said.startswith(f"error: the base's NLL on val has risen from {first:.3f} to ")
    assert said.endswith(
        f"by update 6, by more than max_base_rise 0.5: the best state is {best}, go on from it "
        f"with --resume {best} --force and a lower policy_weight or learning_rate\n")
    names = [x.name for x in States(out / "state", 2).folders()]
    assert names == ["step-000005", "step-000009"]  # an evaluation that is not the best saves none
    monkeypatch.setattr(evaluate, "report", report)
    assert script.main(["--resume", str(best), "--policy_weight", "1", "--force"]) == 0
    assert rows(out, "think")[-1]["step"] == 9
    monkeypatch.setattr(evaluate, "report", ruined)
    rise = iter([0.0, 0.6])
    assert start(tmp_path / "y") == 2  # at the end as well
    assert "no state was evaluated before" in capsys.readouterr().err
    rise = iter([0.0, 0.6])
    assert start(tmp_path / "z", max_base_rise=None) == 0


def test_the_model_for_others_may_be_bf16_and_states_stay_exact(tmp_path, run):
    assert start(tmp_path / "x", eval_every=1, save_dtype="bf16") == 0
    ours, theirs = (load_file(out / "checkpoint" / "model.safetensors")
                    for out in (tmp_path / "x", run[0]))
    assert all(torch.equal(ours[n], x.bfloat16()) for n, x in theirs.items())
    assert files.read_json(tmp_path / "x" / "checkpoint" / "config.json")["torch_dtype"] == (
        "bfloat16")
    states = [next((out / "state").glob("step-000005")) / "rank-00000.safetensors"
              for out in (tmp_path / "x", run[0])]
    assert states[0].read_bytes() == states[1].read_bytes()
    model, _, _ = hf.load_thinker(tmp_path / "x")
    assert model.lm.head_weight.dtype == torch.float32  # as it is asked for


# ---- a run is cut short


@pytest.mark.parametrize(("n", "number", "code", "folder", "step"), [
    (2, signal.SIGINT, 130, "base", 2), (3, signal.SIGTERM, 143, "base", 3),
    (4, signal.SIGTERM, 143, "checkpoint", 1), (5, signal.SIGINT, 130, "checkpoint", 2)])
def test_a_signal_ends_a_run_after_the_update_at_hand(tmp_path, monkeypatch, capsys, n, number,
                                                      code, folder, step):
    """Updates 1 to 3 are pre-training; nothing of either has been logged or saved before."""
    before_call(monkeypatch, script, "train_step", n, kill(number))
    out, handlers = tmp_path / "x", [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert start(out, max_steps=9 if n == 4 else 2, log_every=10) == code
    said = capsys.readouterr().err.splitlines()
    assert said == ["ending after this update",
                    f"interrupted; update {step} is saved in {out / folder}: go on with "
                    f"--resume {out}"]
    assert saved_step(out / folder) == (step if folder == "checkpoint" else 0)
    assert (out / "checkpoint").exists() == (folder == "checkpoint")
    assert not rows(out, "end") and not (out / ".lock").exists()
    hf.load_thinker(out / folder)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(("n", "folder", "step"), [
    (1, "base", 3), (2, "checkpoint", 1), (3, "checkpoint", 2)])
def test_a_signal_ends_an_evaluation_at_once(tmp_path, monkeypatch, capsys, n, folder, step):
    """And what was learned before it is saved."""
    before_call(monkeypatch, evaluate, "score_text", n, kill(signal.SIGINT))
    out = tmp_path / "x"
    assert start(out, eval_every=1) == 130
    assert len(rows(out, "eval")) == n - 1
    assert capsys.readouterr().err == (
        f"interrupted; update {step} is saved in {out / folder}: go on with --resume {out}\n")
    assert saved_step(out / folder) == (step if folder == "checkpoint" else 0)


def test_a_signal_before_anything_is_learned_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        before_call(patch, fold, "prepare", 1, kill(signal.SIGTERM))
        assert start(tmp_path / "x") == 143
    assert capsys.readouterr().err == "interrupted\n"  # at once: not after an update
    for n in (1, 2):  # while it evaluates, and right after that
        with monkeypatch.context() as patch:
            before_call(patch, evaluate, "score_text" if n == 1 else "line", 1, kill(signal.SIGINT))
            assert start(tmp_path / "x", model_path=str(run[0])) == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.count("interrupted; nothing is saved\n") == 2


def test_a_second_signal_ends_a_run_at_once(tmp_path, monkeypatch, capsys):
    """Not after the update; what was learned before that is saved all the same."""
    before_call(monkeypatch, script, "train_step", 5, kill(signal.SIGINT, signal.SIGINT))
    assert start(tmp_path / "x") == 130
    assert saved_step(tmp_path / "x" / "checkpoint") == 1
    assert "update 1 is saved in" in capsys.readouterr().err


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize(("place", "n", "kept"), [
    ("train_step", 1, "nothing is saved"), ("train_step", 5, "update 1 is saved in"),
    ("evaluate", 2, "update 2 is saved in")])
def test_want_of_memory_loses_nothing(tmp_path, monkeypatch, capsys, error, place, n, kept):
    before_call(monkeypatch, Run if place == "evaluate" else script, place, n, raises(error))
    assert start(tmp_path / "x") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the memory is used up: by plan --batch_size 1") and kept in said
    assert said.count("\n") == 1
    if place == "train_step" and n == 1:
        assert not (tmp_path / "x").exists()
    else:
        assert saved_step(tmp_path / "x" / "checkpoint") == (1 if n == 5 else 2)


def test_an_evaluation_that_fails_loses_nothing(tmp_path, monkeypatch):
    """A defect is a traceback; at the end, and in between."""
    for n in (2, 3):
        with monkeypatch.context() as patch:
            before_call(patch, evaluate, "summarize", n, raises(RuntimeError("a defect")))
            with pytest.raises(RuntimeError, match="a defect"):
                start(tmp_path / str(n), eval_every=1)
        assert saved_step(tmp_path / str(n) / "checkpoint") == n - 1


def test_a_failed_save_is_reported_and_the_run_goes_on(tmp_path, monkeypatch, capsys, at_once):
    before_call(monkeypatch, hf, "save", 2, raises(FULL))
    assert start(tmp_path / "x", max_steps=4, save_every=2, pretrain_steps=2) == 0
    assert saved_step(tmp_path / "x" / "checkpoint") == 4
    assert capsys.readouterr().err == (
        "warning: update 2 could not be saved (No space left on device); the run goes on\n")


def test_a_last_save_that_fails_says_what_is_kept(tmp_path, monkeypatch, capsys, at_once):
    """The base is of three updates, too: it is not taken for the checkpoint of the third."""
    save, write = hf.save, States.save
    for name, failing, kept in (("a", 4, "update 2 is saved in"), ("b", 3, "update 3 is saved in")):
        calls, out = {"model": itertools.count(1), "state": itertools.count(1)}, tmp_path / name

        def broken(kind, function, calls=calls, failing=failing):
            return lambda *args, **options: (
                raises(FULL)() if next(calls[kind]) >= failing else function(*args, **options))
        monkeypatch.setattr(hf, "save", broken("model", save))
        monkeypatch.setattr(States, "save", broken("state", write))
        assert start(out, max_steps=3, save_every=2) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        folder = "checkpoint" if failing == 4 else "base"
        assert said.startswith("error: the model of update 3 could not be saved, for want of room")
        assert kept in said
        assert said.endswith(str(out / folder)) and len(rows(out, "eval")) == 2


def test_a_model_that_an_update_has_broken_is_not_saved(tmp_path, monkeypatch, capsys):
    """And the evaluation that finds it says what to do."""
    out, step = tmp_path / "x", script.train_step

    def breaking(model, *args):
        result = step(model, *args)
        if result[1] is not None:  # it thinks
            torch.nn.init.constant_(model.lm.head_weight, math.inf)
        return result
    monkeypatch.setattr(script, "train_step", breaking)
    assert start(out, max_steps=1) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: update 1 is not saved: its weights are not finite"
    assert said[1].startswith("error: the predictions are not finite at update 1: lower learning_")
    assert said[1].endswith(f"update 3 is saved in {out / 'base'}") and len(said) == 2
    assert sorted(os.listdir(out)) == ["base", "config.json", "data", "metrics.jsonl", "state"]
    assert os.listdir(out / "state") == ["step-000003"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, capsys):
    full = types.SimpleNamespace(write=lambda row: raises(FULL)())
    init = RunLog.__init__

    def broken(self, *args):
        init(self, *args)
        self.metrics.close()
        self.metrics = full
    monkeypatch.setattr(RunLog, "__init__", broken)
    assert start(tmp_path / "x") == 0
    assert saved_step(tmp_path / "x" / "checkpoint") == 2
    said = capsys.readouterr().err
    assert "warning: think 2 could not be logged (No space left on device)" in said


# ---- the update


def test_gradient_accumulation_equals_one_big_batch(tmp_path):
    """And a window's thoughts are the same in any micro-batch."""
    results = []
    for changes in (dict(batch_size=4), dict(batch_size=2, grad_accum=2),
                    dict(batch_size=1, grad_accum=4)):
        this, optimizer = setup(tmp_path, **changes)
        this.model.double()
        thoughts = []

        def rollout(*args, rollout=this.model.rollout, thoughts=thoughts):
            thoughts.append(rollout(*args))
            return thoughts[-1]
        stats, norm = update(this, optimizer, rollout=rollout)
        assert len(thoughts) == this.cfg.grad_accum
        results.append((torch.cat([p.detach().flatten() for p in this.model.parameters()]), norm,
                        stats, torch.cat([ids for ids, _ in thoughts])))
    expected = results[0]
    for parameters, norm, stats, thoughts in results[1:]:
        assert (parameters - expected[0]).abs().max() < 1e-9
        assert abs(norm - expected[1]) < 1e-9 * norm
        assert all(abs(stats[k] - v) < 1e-6 for k, v in expected[2].items())
        assert torch.equal(thoughts, expected[3])


def test_every_setting_reaches_the_step(tmp_path, monkeypatch):
    """The seven of the objective and the temperature of thoughts, none at its default."""
    given = dict(base_weight=0.3, mixed_weight=0.7, policy_weight=3.0, clamp_advantage=True,
                 normalize_advantage=True, reinforce_temperature=2.0, thought_temperature=0.5)
    seen, loss = [], QuietStar.loss
    monkeypatch.setattr(QuietStar, "loss", lambda self, *args: (
        seen.append((args[-1], self.thought_temperature, args[2].shape)) or loss(self, *args)))
    assert start(tmp_path / "x", n_passes=3, n_ahead=5, n_ahead_talk=3, max_steps=1, **given) == 0
    temperature = given.pop("thought_temperature")
    assert seen == [(Objective(**given), temperature, (2, 3, 20, 3))]
    assert hf.load_thinker(tmp_path / "x")[2].thinking == hf.Thinking(5, 3, 0.5)


def test_optimizer_groups_and_schedule(tmp_path):
    this, optimizer = setup(tmp_path, learning_rate=1e-3, warmup_steps=4, weight_decay=0.01,
                            embedding_lr_factor=10.0)
    model, cfg = this.model, this.cfg
    matrices, vectors, delimiters = optimizer.param_groups
    assert {id(p) for p in delimiters["params"]} == {
        id(model.start_embedding), id(model.end_embedding)}
    decays = (matrices["weight_decay"], vectors["weight_decay"], delimiters["weight_decay"])
    assert decays == (0.01, 0.0, 0.001)
    assert all(p.dim() == 1 for p in vectors["params"])
    assert all(p.dim() == 2 for p in matrices["params"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert [script.learning_rate(s, cfg) for s in (0, 1, 3, 50)] == [0.00025, 0.0005, 0.001, 0.001]
    update(this, optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [0.00025, 0.00025, 0.0025]
    cosine = dataclasses.replace(cfg, schedule="cosine", max_steps=104)
    assert math.isclose(script.learning_rate(54, cosine), 0.001 * 0.55)
    assert math.isclose(script.learning_rate(104, cosine), 1e-4)


@pytest.mark.parametrize(("changes", "moved"), [
    ({}, {"lm", "start_embedding", "end_embedding", "mixing_head"}),
    ({"trainable": "thoughts"}, {"start_embedding", "end_embedding", "mixing_head"}),
    ({"trainable": "mixing_head"}, {"mixing_head"}), ({"n_ahead": 0}, {"lm"})])
def test_only_what_is_trainable_moves(tmp_path, changes, moved):
    this, optimizer = setup(tmp_path, grad_clip=1e9, **changes)
    before = {n: p.detach().clone() for n, p in this.model.named_parameters()}
    update(this, optimizer)
    assert moved == {n.split(".")[0] for n, p in this.model.named_parameters()
                     if not torch.equal(p, before[n])}


def test_no_thoughts_is_the_plain_mean_nll(tmp_path):
    this, optimizer = setup(tmp_path, n_ahead=0, batch_size=3)
    model = this.model
    text, docs = this.splits["train"].batch(0, "think", 0, range(3), 22)
    with torch.no_grad():
        log_probs = model.lm.logits(model.text_states(text, docs)).log_softmax(-1)
    expected = -log_probs[:, :20].gather(-1, text[:, 1:21, None]).mean()
    stats, _ = update(this, optimizer)
    assert abs(stats["nll_base"] - expected) < 1e-5 and set(stats) == {"nll_base"}


def test_control_thoughts_come_from_the_text(tmp_path):
    this, _ = setup(tmp_path, thoughts_from="ab")
    text = torch.zeros(2, 22, dtype=torch.long)
    u = torch.rand(2, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    thoughts, log_probs = this.rollout(text, None, u)
    assert torch.equal(thoughts, (u >= 0.5).long())
    assert torch.allclose(log_probs, torch.tensor(0.5).log())
    this.cfg = dataclasses.replace(this.cfg, thoughts_from="\n")
    assert (this.rollout(text, None, u)[0] == 10).all()
    out = tmp_path / "x"
    assert start(out, thoughts_from="ab") == 0
    for row in rows(out, "eval", "think"):  # evaluations have them as well
        assert row["entropy"] == pytest.approx(math.log(2)) and row["distinct"] <= 2**4 / 40


def test_non_finite_steps_are_skipped_and_several_stop_the_run(tmp_path, monkeypatch, capsys):
    this, _ = setup(tmp_path, max_steps=20)
    monkeypatch.setattr(Run, "evaluate", lambda *args: None)
    with torch.no_grad():
        this.model.end_embedding[0] = math.nan
    before = {n: p.detach().clone() for n, p in this.model.named_parameters()}
    with pytest.raises(InputError, match=r"not finite 5 updates in a row \(update 5\): lower"):
        script.train(this, this.cfg, "think")
    assert [r["skipped"] for r in rows(this.log.folder)] == [1, 2, 3, 4]
    assert all(torch.equal(p, before[n]) for n, p in this.model.named_parameters()
               if n != "end_embedding")
    assert "skipped 4" in capsys.readouterr().out


def test_a_finite_step_ends_the_count_of_those_that_were_not(tmp_path, monkeypatch):
    this, _ = setup(tmp_path, max_steps=20)
    monkeypatch.setattr(Run, "evaluate", lambda *args: None)
    norms = iter([math.nan] * 4 + [1.0] + [math.inf] * 4 + [1.0] * 11)
    step = script.train_step
    monkeypatch.setattr(script, "train_step", lambda *args: (
        *step(*args)[:2], norm := torch.tensor(next(norms)), bool(norm.isfinite())))
    script.train(this, this.cfg, "think")
    assert rows(this.log.folder)[-1]["skipped"] == 8 and next(norms, None) is None


def test_logged_means_leave_out_predictions_across_documents(tmp_path):
    this, optimizer = setup(tmp_path, batch_size=1, policy_weight=1.0)
    model, cfg = this.model, this.cfg
    text, _ = this.splits["train"].batch(0, "think", 0, [0], 22)
    docs = (torch.arange(22) >= 9).long()[None]
    u = torch.rand(1, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    valid = Valid.from_docs(docs, 2)
    thoughts, lp = model.rollout(text, docs, u)
    states = model.score(text, docs, thoughts)
    outcome = quiet_star_loss(states, model.lm.head_weight, text, thoughts, valid, valid.counts(),
                              objective_of(cfg), model.banned)[2]
    stats, _, _, _ = script.train_step(model, optimizer, [[text, docs, u]], valid.counts(),
                                       objective_of(cfg), 1e-3, cfg)
    kept = valid.policy[0].nonzero()[:, 0]
    assert 0 < len(kept) < 20
    reward = outcome.reward[:, :, kept].mean()
    mix = torch.stack([states.mix[0, :, valid.talk[0, :, j], j].mean() for j in range(2)]).mean()
    for key, expected in (("reward", reward), ("gain", reward / 2), ("mix", mix),
                          ("entropy", -lp[:, :, kept].mean()),
                          ("positive", (outcome.advantage[:, :, kept] > 0).float().mean())):
        assert abs(stats[key] - expected) < 1e-5, key


# ---- how it is computed


def test_compiled_blocks_are_not_compiled_again_after_warm_up(tmp_path):
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    plain, _ = update(*setup(tmp_path, n_layers=4))
    this, optimizer = setup(tmp_path, n_layers=4)
    for block in this.model.lm.model.layers:
        block.compile(dynamic=False, backend="eager")  # the same guards as with any backend
    compiled, _ = update(this, optimizer)
    assert all(abs(plain[k] - v) < 1e-5 for k, v in compiled.items())
    for step in range(3):
        update(this, optimizer, step)
        if step == 0:
            warm = counters["stats"]["unique_graphs"]
    # of the shapes, whatever the number of layers
    assert 0 < warm <= 6 and counters["stats"]["unique_graphs"] == warm


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
    """A share of the blocks' activations is recomputed: the more, the less is kept, and the update
    is the same."""
    module_compile, results, kept = torch.nn.Module.compile, [], []
    # inductor's choice of what to keep, without its code
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **settings: module_compile(
        block, backend="aot_eager_decomp_partition", **settings))
    for checkpointing in (0.0, 0.5, 1.0):
        torch._dynamo.reset()
        this, optimizer = setup(tmp_path, n_layers=2, n_ahead=3)  # few shapes to compile
        with torch._functorch.config.patch(activation_memory_budget=1.0):  # put back afterwards
            speed_up(this.model, torch.device("cpu"), checkpointing, compile=compiled)
            (text, docs, u), = script.load_batches(this.splits["train"], "think", 0, this.cfg)[0]
            pack = Kept(this.model)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                states = this.model.score(text, docs, (u * 7).long())
            kept.append(sum(pack.seen.values()))
            del states
            update(this, optimizer)
        results.append({n.replace("_checkpoint_wrapped_module.", ""): p.detach()
                        for n, p in this.model.named_parameters()})
    assert kept[0] > 1.2 * kept[1] > 1.2**2 * kept[2]
    for result in results[1:]:
        assert results[0].keys() == result.keys()
        assert all(torch.allclose(results[0][n], p, atol=1e-6) for n, p in result.items())


def test_a_checkpointed_model_is_saved_under_its_own_names(tmp_path, run):
    """Its state as well, whose end a plain run can come to."""
    assert start(tmp_path / "x", checkpointing=1.0, eval_every=1) == 0
    states = [load_file(out / "state" / "step-000005" / "rank-00000.safetensors")
              for out in (tmp_path / "x", run[0])]
    assert states[0].keys() == states[1].keys()
    assert all(torch.allclose(states[0][n], x, atol=1e-5) for n, x in states[1].items())
    assert script.main(["--resume", str(tmp_path / "x" / "state" / "step-000004"), "--force",
                        "--checkpointing", "0"]) == 0
    for name in ("model", "quietstar"):  # the last update of a plain run
        ours, plain = (load_file(out / "checkpoint" / f"{name}.safetensors")
                       for out in (tmp_path / "x", run[0]))
        assert ours.keys() == plain.keys()
        assert all(torch.allclose(ours[n], x, atol=1e-5) for n, x in plain.items())


# ---- what is refused


def check_refused(capsys, code, *sentences):
    """Whether a start has ended in one sentence that holds these."""
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert all(sentence in said for sentence in sentences), said


@pytest.mark.parametrize(("args", "sentence"), [
    (["--init_std", "1e30"], "--init_std: must be at most 100"),
    (["--hidden_size", "1000000000"], "GiB of memory"),
    (["--n_layers", "1000", "--hidden_size", "100000"], "GiB of memory"),
    (["--n_passes", "100000000"], "GiB of memory"), (["--n_ahead", "100000000"], "GiB of memory"),
    (["--batch_size", "100000000"], "GiB of memory"),
    (["--pretrain_batch_size", "100000000"], "GiB of memory"),
    (["--grad_accum", "1000000000"], "the windows of an update or evaluation would need"),
    (["--max_length", "100000000"], "GiB of memory"),
    (["--fold_tokens", "1000000000000"], "--fold_tokens: must be at most 1,000,000,000"),
    (["--eval_windows", "100000000"], "--eval_windows: must be at most 1,000,000"),
    (["--threads", "1000000"], "--threads: must be at most 1,024"),
    (["--thought_temperature", "1e-300"], "--thought_temperature: must be at least 0.001"),
    (["--reinforce_temperature", "1e-300"], "--reinforce_temperature: must be at least 0.001")])
def test_absurd_sizes_are_refused_before_anything_is_made(tmp_path, monkeypatch, capsys, args,
                                                          sentence):
    for stage in ("prepare", "RunLog"):
        monkeypatch.setattr(script, stage, raises(AssertionError("too late")))
    before = resource.getrusage(resource.RUSAGE_SELF)
    code = start(tmp_path / "x", *args)
    after = resource.getrusage(resource.RUSAGE_SELF)
    check_refused(capsys, code, sentence)
    assert after.ru_maxrss - before.ru_maxrss < 2**17  # KiB
    assert after.ru_utime - before.ru_utime < 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("args", "sentence"), [
    (["--data", "nowhere"], "there is no prepared data in nowhere"),
    (["--model_path", "nowhere"], "there is no folder 'nowhere'"),
    (["--start_init_text", "z"], "start_init_text: the tokenizer cannot encode 'z'"),
    (["--end_init_text", ""], "end_init_text: '' has no tokens"),
    (["--thoughts_from", "z"], "thoughts_from: the tokenizer cannot encode 'z'"),
    (["--n_ahead", "0", "--max_length", "20000"], "a window of 20,002 tokens does not fit"),
    (["--max_length", "2", "--n_ahead", "2047"], "more than the model's context"),
    (["--device", "mps"], "device mps is not available here"),
    (["--max_step", "3"], "unknown option --max_step; did you mean --max_steps?")])
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, args, sentence):
    new = {"--data": "data", "--model_path": "model_path"}.get(args[0])
    if new:  # only what applies to it is given with it
        check_refused(capsys, start(tmp_path / "x", **{new: args[1]}), sentence)
    else:
        check_refused(capsys, start(tmp_path / "x", *args), sentence)
    assert list(tmp_path.iterdir()) == []


def test_bad_configs_are_one_sentence(tmp_path, capsys):
    check_refused(capsys, script.main(["missing.json"]), "no config 'missing.json'")
    check_refused(capsys, script.main(["tinny"]), "no config 'tinny'; did you mean tiny?")
    (tmp_path / "config.json").write_text('{"max_step": 3}')
    check_refused(capsys, script.main([str(tmp_path / "config.json")]), "unknown key 'max_step'")


@pytest.mark.parametrize(("change", "sentence"), [
    ({"tokenizer.json": fold.tokenizer_json(fold.vocabulary()[::-1])}, "tokenizer is not that of"),
    ({"tokenizer.json": fold.tokenizer_json(fold.vocabulary(ordinary=0.5))}, "the model 11 rows"),
    ({"tokenizer.json": "{"}, "is not a tokenizer"),
    ({"nanoqstar.json": "{"}, "cannot be read as JSON"),
    ({"config.json": None}, "config.json is missing"),
    ({"model.safetensors": math.nan}, "numbers that are not finite"),
    ({"quietstar.safetensors": math.inf}, "numbers that are not finite")])
def test_a_damaged_model_is_one_sentence_and_leaves_nothing(run, tmp_path, capsys, change,
                                                            sentence):
    """NaN weights and a vocabulary that does not fit among them."""
    shutil.copytree(run[0] / "checkpoint", tmp_path / "model")
    for name, content in change.items():
        file = tmp_path / "model" / name
        if isinstance(content, float):
            tensors = load_file(file)
            next(iter(tensors.values())).view(-1)[0] = content
            save_file(tensors, file, {"format": "pt"} | hf.read_header(file)[1])
        elif content is None:
            file.unlink()
        else:
            file.write_text(content)
    check_refused(capsys, start(tmp_path / "x", model_path=str(tmp_path / "model")), sentence)
    assert not (tmp_path / "x").exists()


def test_data_of_another_tokenizer_is_refused(run, tmp_path, capsys):
    swapped = fold.vocabulary()[::-1]
    ids = [fold.encode(fold_text(0, "train", 3000), swapped)]
    write_dataset(tmp_path / "swapped", fold.tokenizer_json(swapped), 11, None,
                  {"train": ids, "val": ids}, {})
    code = start(tmp_path / "x", model_path=str(run[0]), data=str(tmp_path / "swapped"))
    check_refused(capsys, code, f"the data's tokenizer is not that of {run[0]}",
            "prepare the data again")
    assert not (tmp_path / "x").exists()


def test_trained_delimiters_stay_and_a_text_for_them_is_said_to_do_nothing(run, tmp_path, capsys):
    assert start(tmp_path / "x", model_path=str(run[0]), start_init_text="=") == 0
    said = [row for row in capsys.readouterr().out.splitlines() if "does nothing" in row]
    assert said == [f"start_init_text '=' does nothing: start and end are as trained in {run[0]}"]


def test_delimiters_that_reread(tmp_path, capsys):
    """From the command line into the folder, on from there, and not on as the other kind."""
    assert start(tmp_path / "x", delimiters="reread") == 0
    model, _, settings = hf.load_thinker(tmp_path / "x")
    assert model.reread and settings.thinking.delimiters == "reread"
    assert model.start_embedding.any() and model.start_embedding.abs().max() < 0.1  # from zero
    assert start(tmp_path / "y", model_path=str(tmp_path / "x"), delimiters="reread") == 0
    assert hf.load_thinker(tmp_path / "y")[0].reread
    capsys.readouterr()
    check_refused(capsys, start(tmp_path / "z", model_path=str(tmp_path / "x")),
                  "was taught to think with --delimiters reread")
    assert start(tmp_path / "z", model_path=str(tmp_path / "x"), n_ahead=0) == 0
    assert hf.load_thinker(tmp_path / "z")[2].thinking.delimiters == "reread"
    check_refused(capsys, start(tmp_path / "w", "--start_init_text", "a", delimiters="reread"),
                  "start_init_text")


@pytest.mark.parametrize(("change", "sentence"), [
    ({"seed": 1}, "of --seed 0: with 1 its letters"),
    ({"fold_operations": 2}, "of --fold_operations 1: with 2 its letters"),
    ({"fold_ordinary_frac": 0.2}, "of --fold_ordinary_frac 0.0: with 0.2 its letters")])
def test_another_corpus_would_mean_something_else(run, tmp_path, capsys, change, sentence):
    code = start(tmp_path / "x", model_path=str(run[0]), **change)
    check_refused(capsys, code, "learned the embedded corpus " + sentence)
    assert not (tmp_path / "x").exists()


def test_prepared_data_may_have_another_seed(run, tmp_path):
    assert start(tmp_path / "x", model_path=str(run[0]), data=str(run[0] / "data"), seed=1) == 0


@pytest.mark.parametrize(("args", "sentence"), [
    (["--model_path", "x", "--hidden_size", "32"], "--hidden_size is for a new model"),
    (["--data", "x", "--fold_operands", "3"], "--fold_operands is for the embedded corpus"),
    (["--n_ahead", "0", "--n_passes", "4"], "--n_passes is for thoughts"),
    (["--n_ahead", "0", "--policy_weight", "4"], "--policy_weight is for thoughts"),
    (["--tokenizer", "x"], "--tokenizer is for model_path")])
def test_what_does_not_apply_is_refused(capsys, args, sentence):
    check_refused(capsys, script.main(args), sentence, "leave it out")


def test_help_lists_what_applies(capsys):
    listed = {}
    for name in ("tiny", "text", "qwen2_5_3b"):
        assert script.main([name, "--help"]) == 0
        printed = capsys.readouterr().out
        assert f"Defaults are those of {name}" in printed
        listed[name] = set(re.findall(r"^  --(\w+) \(", printed, re.MULTILINE))
    fold_options, sizes = {f for f in SMALL if f.startswith("fold_")}, {"hidden_size", "n_layers"}
    assert listed["tiny"] >= fold_options | sizes and listed["text"] >= sizes
    assert not any(name.startswith("fold_") for name in listed["text"] | listed["qwen2_5_3b"])
    assert not listed["qwen2_5_3b"] & (sizes | {"pretrain_steps", "init_std"})
    assert "tokenizer" in listed["qwen2_5_3b"] - listed["tiny"]
    assert script.main(["configs"]) == 0
    assert "qwen2_5_3b" in capsys.readouterr().out


# ---- the run's folder


def test_runs_take_the_next_free_name(tmp_path, monkeypatch, capsys):
    """A run that holds its folder is left alone by one that starts beside it."""
    monkeypatch.chdir(tmp_path)
    arguments = options(max_steps=1)[1:]
    assert script.main(["tiny", *arguments]) == 0
    with files.lock(Path("out") / "tiny-2"):
        assert script.main(arguments) == 0
        assert os.listdir(Path("out") / "tiny-2") == [".lock"]
    assert script.main([str(Path("out") / "tiny-3" / "config.json")]) == 0  # named after its folder
    assert sorted(os.listdir("out")) == ["tiny", "tiny-2", "tiny-3", "tiny-3-2"]
    assert "--model_path out/tiny-3-2 " in capsys.readouterr().out


def test_two_runs_in_one_folder(run, tmp_path, capsys):
    """The second is refused, and the first unharmed, whether it goes on or has ended."""
    out = tmp_path / "x"
    with files.lock(out):
        (out / "metrics.jsonl").write_text("of the first\n")
        check_refused(capsys, start(out), f"another process is writing {out}")
        assert (out / "metrics.jsonl").read_text() == "of the first\n" and (out / ".lock").exists()
    check_refused(capsys, start(out), f"{out} already holds a run or other files")
    assert os.listdir(out) == ["metrics.jsonl"]
    before = {p: p.stat().st_mtime_ns for p in run[0].rglob("*")}
    check_refused(capsys, start(run[0]), "already holds a run")
    assert before == {p: p.stat().st_mtime_ns for p in run[0].rglob("*")}


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    check_refused(capsys, start(tmp_path / "file" / "x"), "cannot be made",
                  "choose another --out_dir")
    check_refused(capsys, start(tmp_path / "file"), "cannot be made")


def test_half_of_torchruns_variables_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    check_refused(capsys, start(tmp_path / "x"), "WORLD_SIZE is set and LOCAL_RANK, MASTER_ADDR",
                  "start several processes with torchrun")
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_refused(capsys, start(tmp_path / "x", data="nowhere"), "no prepared data")


def test_an_older_data_folder_lacks_the_beginning_of_text(tmp_path, capsys):
    """Where the tokenizer has one; the warning says what to do."""
    characters = fold.vocabulary()
    tokenizer = Tokenizer.from_str(fold.tokenizer_json(characters))
    tokenizer.add_special_tokens(["<s>"])
    plain = tokenizer.to_str()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", len(characters))])
    ids = [fold.encode(fold_text(0, "train", 3000), characters)]
    for name, words, older in (("older", tokenizer.to_str(), True),
                               ("newer", tokenizer.to_str(), False), ("plain", plain, True)):
        folder = tmp_path / name
        write_dataset(folder, words, len(characters) + 1, None, {"train": ids, "val": ids}, {})
        if older:
            meta = files.read_json(folder / "meta.json")
            del meta["beginning_ids"]
            files.write_json(folder / "meta.json", meta)
        assert start(tmp_path / f"run-{name}", data=str(folder), max_steps=1) == 0
        printed = capsys.readouterr().out
        if name == "older":
            assert f"warning: {folder} was prepared without" in printed
            assert "(<s>)" in printed and "prepare it again" in printed
        else:
            assert "warning" not in printed


# ---- the method


def test_the_demo_learns_to_think(tmp_path):
    """The regression test of the whole method: thoughts gain on held-out answers in 100 updates."""
    out = tmp_path / "out"
    demo = PRESETS["tiny"].config
    script.run("tiny", dataclasses.replace(demo, out_dir=str(out), max_steps=100, eval_every=1000,
                                           eval_windows=48))
    last = rows(out, "eval")[-1]
    direct = last["answers"]["direct"]
    assert direct["n"] > 100 and direct["accuracy_base"] < 0.3, direct
    # 97%, -1.2 when written
    assert direct["accuracy_mixed"] > 0.7, direct
    assert direct["nll_mixed"] < direct["nll_base"] - 0.5, direct
    assert last["answers"]["thoughts"]["worked"] > 0.7 and last["gain"] > 0.05
