"""A run's folder, what is logged and said whatever happens to disk and readers, and signals."""

import errno
import json
import os
import signal
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from nanoqstar import InputError, files, runlog
from nanoqstar.cli import Interrupted
from nanoqstar.hf import Thinking, load_thinker
from nanoqstar.runlog import RunLog, Signals, run_folder, start_wandb
from nanoqstar.state import Progress, States

FULL = OSError(errno.ENOSPC, "No space left on device")
STATS = {"nll_base": 1.5, "grad_norm": 0.5, "learning_rate": 1e-3, "skipped": 0}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets: clock[0]."""
    now = [100.0]
    monkeypatch.setattr(runlog, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path, {"seed": 0})


def fail(error):
    raise error


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_obeyed_when_asked(number, capsys):
    before = signal.getsignal(number)
    with Signals().caught() as signals:
        signals.check()
        os.kill(os.getpid(), number)
        assert capsys.readouterr().err == "ending after this update\n"
        for _ in range(2):  # at whatever stage
            with pytest.raises(Interrupted) as end:
                signals.check()
            assert end.value.number == number
        with pytest.raises(Interrupted), signals.at_once():
            pytest.fail("nothing is begun any more")
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)  # the second, of either kind
    assert signal.getsignal(number) == before


def test_a_signal_is_obeyed_at_once_where_nothing_can_be_lost():
    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it goes on")
    with Signals().caught() as signals:
        with pytest.raises(Interrupted), signals.at_once():
            work()
        assert not signals.now


def test_nothing_takes_a_signal_for_its_own_error():
    assert not issubclass(Interrupted, Exception)


def test_a_signal_may_come_while_stderr_is_written(monkeypatch):
    for error in (RuntimeError("reentrant call"), BrokenPipeError()):
        monkeypatch.setattr(runlog.tqdm, "write", lambda *a, error=error, **k: fail(error))
        signals = Signals()
        signals.handle(signal.SIGINT, None)
        assert signals.number == signal.SIGINT


def test_other_threads_get_no_signals():
    before, entered = signal.getsignal(signal.SIGINT), []

    def work():
        with Signals().caught() as signals:
            entered.append((signals.number, signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [(None, before)]


# ---- the folder


def test_a_folder_is_held_while_the_run_goes_on(tmp_path):
    with run_folder(str(tmp_path / "a" / "b"), "x") as out:
        assert out == tmp_path / "a" / "b" and os.listdir(out) == [".lock"]
        with pytest.raises(InputError, match="another process is writing"), files.lock(out):
            pass
        (out / "config.json").write_text("{}")
    assert os.listdir(out) == ["config.json"]


def test_names_are_those_of_the_first_free_folder(tmp_path, monkeypatch):
    """Whoever takes a name first, also between our look and our lock, has it."""
    monkeypatch.chdir(tmp_path)
    with run_folder(None, "x") as first, run_folder(None, "x") as second:
        assert (first, second) == (Path("out/x"), Path("out/x-2"))
        exists = Path.exists  # of the folders, too late
        monkeypatch.setattr(Path, "exists", lambda p: p.parent.name != "out" and exists(p))
        with run_folder(None, "x") as third:
            assert third == Path("out/x-3")


@pytest.mark.parametrize(("made", "kept"), [
    ({}, False), ({"config.json": "{}", "data/train.bin": ""}, False),
    ({"metrics.jsonl": ""}, False),
    ({"metrics.jsonl": '{"kind": "eval", "step": 0}\n'}, False),
    ({"metrics.jsonl": '{"kind": "eval", "step": 0}\n{"kind": "think", "step": 1}\n'}, True),
    ({"metrics.jsonl": "", "base/config.json": "{}"}, True),
    ({"metrics.jsonl": '{"kind": "eval", "step": 0}\n', "checkpoint/config.json": "{}"}, True)])
@pytest.mark.parametrize("error", [InputError("bad"), Interrupted(2), OSError("full")])
def test_a_failed_start_leaves_no_folder_and_a_failed_run_what_it_learned(tmp_path, made, kept,
                                                                          error):
    def start(out):
        for name, text in made.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(text)
        raise error
    with pytest.raises(type(error)), run_folder(str(tmp_path / "x"), "x") as out:
        start(out)
    assert out.exists() == kept and not (out / ".lock").exists()


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with (pytest.raises(InputError, match="already holds a run or other files"),
          run_folder(str(tmp_path), "x")):
        pass
    assert os.listdir(tmp_path) == ["thesis.txt"]


# ---- metrics


def test_rows_are_there_when_they_are_written(log, tmp_path):
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 0}
    log.write("eval", 3, gain=0.5)
    log.write("end", 4, seconds=1)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"kind": "eval", "step": 3, "gain": 0.5}, {"kind": "end", "step": 4, "seconds": 1}]


def test_rows_that_found_no_room_are_written_when_there_is_some(log, tmp_path, monkeypatch, capsys):
    """Each once and whole, however much a full disk took of it."""
    file, taken = log.metrics, iter([b"x" * 5, FULL, b"", b"x" * 9, FULL])

    def write(data):
        part = next(taken, data)
        return fail(part) if part is FULL else file.write(data[:len(part)])
    log.metrics = types.SimpleNamespace(write=write)
    for step in range(4):
        log.write("think", step, text="y" * 9000)
    found = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], len(row["text"])) for row in found] == [(n, 9000) for n in range(4)]
    assert capsys.readouterr().err.count("could not be logged (No space left on device)") == 2


def test_speed_is_that_since_the_last_row(log, tmp_path, clock, capsys):
    log.peak = 6e12
    log.start_clock(10)
    clock[0] += 8
    log.update("think", 14, 20, 1000, 3e12, None, STATS)
    clock[0] += 1
    log.peak = None
    thoughts = torch.tensor([[[[1, 2], [1, 2]], [[3, 4], [2, 1]]]])  # three of the four
    log.update("think", 15, 20, 1000, 3e12, thoughts, STATS | {"skipped": 2})
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["seconds"], first["tokens_per_second"], first["tflops"], first["mfu"]) == (
        2, 500, 1.5, 0.25)
    assert (second["seconds"], second["tokens_per_second"], second["tflops"]) == (1, 1000, 3)
    assert "mfu" not in second and second["skipped"] == 2
    assert second["distinct"] == 0.75 and "distinct" not in first
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("think    14/20  base 1.500  gnorm 0.50")
    assert "MFU 25%" in printed[0] and "skipped" not in printed[0] and "skipped 2" in printed[1]


def test_pretraining_speaks_when_nothing_was_said_for_some_seconds(log, clock, capsys):
    log.say("begin")
    log.start_clock(0)
    for step in range(1, 13):
        clock[0] += 1
        log.update("pretrain", step, 12, 1000, 1e9, None, STATS)
    said = capsys.readouterr().out.splitlines()
    assert [line[:16] for line in said] == ["begin", "pretrain     5/1", "pretrain    10/1"]
    clock[0] += 1
    log.update("think", 13, 14, 1000, 1e9, None, STATS)
    assert "think" in capsys.readouterr().out


def test_failures_of_the_disk_are_told_and_no_more(log, capsys):
    assert log.guard("it failed", lambda: None)
    assert not log.guard("this could not be saved", fail, FULL)
    assert not log.guard("that neither", fail, OSError("in words"))
    assert capsys.readouterr().err == (
        "warning: this could not be saved (No space left on device); the run goes on\n"
        "warning: that neither (in words); the run goes on\n")
    with pytest.raises(ValueError, match="a defect"):
        log.guard("", fail, ValueError("a defect"))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_lines_are_written_though_nobody_reads(log, monkeypatch, name):
    """As after `| head -1`: the first is lost, the next go nowhere."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, name, stream)
        for _ in range(3):
            log.say("a line")
            log.guard("it failed", fail, FULL)
        monkeypatch.undo()
        assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))


def test_lines_on_a_full_disk_are_let_go(log, monkeypatch):
    tried = []
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(
        write=lambda text: tried.append(text) or fail(FULL), flush=lambda: fail(FULL)))
    log.say("a line")
    assert tried


# ---- checkpoints


@pytest.fixture
def model(make_model):
    return make_model(banned=()).float()


@pytest.fixture
def tokenizer():
    return Tokenizer(models.WordLevel({chr(97 + i): i for i in range(20)}, unk_token="a"))


def fail_in(out):
    with run_folder(str(out), "x") as made:
        (made / "data").mkdir()
        (made / "data" / "train.bin").write_text("x")
        (made / "config.json").write_text("{}")
        raise InputError("no")


def test_what_was_there_before_a_failed_start_stays(tmp_path):
    """An empty folder of the user's, by another name too; of a path, only what was missing goes."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for out in ("mine", "link", "a/b/c"):
        with pytest.raises(InputError, match=r"^no$"):
            fail_in(tmp_path / out)
    assert sorted(os.listdir(tmp_path)) == ["link", "mine"]
    assert os.listdir(tmp_path / "mine") == []


def save(log, model, tokenizer, phase, update, thinking=None, background=False):
    optimizer = torch.optim.AdamW(model.parameters())
    log.save(Progress(phase, update, 7 * (phase == "think")), model, optimizer, tokenizer, thinking,
             None, {"data": "", "made_by": ""}, background)


def test_saved_is_what_can_be_loaded(log, model, tokenizer):
    assert log.kept == "nothing is saved" and log.how_to_go_on == ""
    save(log, model, tokenizer, "pretrain", 7)
    assert log.kept == f"update 7 is saved in {log.folder / 'base'}"
    assert log.how_to_go_on == f": go on with --resume {log.folder}"
    save(log, model, tokenizer, "think", 3, Thinking(6, 2, 0.5))
    assert log.saved == (log.folder / "checkpoint", 3)
    assert [x.name for x in log.states.folders()] == ["step-000007", "step-000010"]
    for name, step, thinking in (("base", 0, Thinking()), ("checkpoint", 3, Thinking(6, 2, 0.5))):
        _, _, settings = load_thinker(log.folder / name)
        assert (settings.step, settings.thinking, settings.config) == (step, thinking, {"seed": 0})


def test_a_broken_model_does_not_replace_a_good_one(log, model, tokenizer, capsys):
    save(log, model, tokenizer, "think", 3, Thinking(6, 2))
    with torch.no_grad():
        model.lm.head_weight[0, 0] = float("inf")
    save(log, model, tokenizer, "think", 4, Thinking(6, 2))
    assert [x.name for x in log.states.folders()] == ["step-000010"]
    assert load_thinker(log.folder)[2].step == 3 and log.saved == (log.folder / "checkpoint", 3)
    assert capsys.readouterr().err == (
        "warning: update 4 is not saved: its weights are not finite\n")


def test_training_goes_on_while_a_copy_is_written(log, model, tokenizer, monkeypatch, capsys):
    """What changes meanwhile is not in it; and no second save waits for the first."""
    write, may_write, before = States.save, threading.Event(), model.end_embedding.detach().clone()

    def slow(*args):
        assert may_write.wait(20)
        write(*args)
    monkeypatch.setattr(States, "save", slow)
    save(log, model, tokenizer, "think", 1, Thinking(6, 2), background=True)
    torch.nn.init.ones_(model.end_embedding)
    save(log, model, tokenizer, "think", 2, Thinking(6, 2), background=True)
    assert log.states.folders() == [] and log.saved is None
    assert capsys.readouterr().out == (
        "update 2 is not saved: the save before it is still being written\n")
    may_write.set()
    assert log.kept == f"update 1 is saved in {log.folder / 'checkpoint'}"  # it waits
    folder, = log.states.folders()
    for file in (folder / "rank-00000.safetensors", log.folder / "checkpoint" /
                 "quietstar.safetensors"):
        assert torch.equal(load_file(file)["end_embedding"], before)
    save(log, model, tokenizer, "think", 3, Thinking(6, 2), background=True)
    log.wait()
    assert log.saved[1] == 3


def test_a_state_that_cannot_be_written_is_told_and_the_model_saved(log, model, tokenizer,
                                                                    monkeypatch, capsys):
    for background in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(States, "save", lambda *args: fail(FULL))
            save(log, model, tokenizer, "think", 3, Thinking(6, 2), background)
            log.wait()
        assert capsys.readouterr().err == ("warning: the state of update 3 could not be saved (No "
                                           "space left on device); the run goes on\n")
        assert log.saved == (log.folder / "checkpoint", 3) and not log.states.folders()
        assert log.how_to_go_on == f": go on with --model_path {log.folder / 'checkpoint'}"


def test_a_defect_of_the_background_is_no_secret(log, model, tokenizer, monkeypatch):
    monkeypatch.setattr(States, "save", lambda *args: fail(ValueError("a defect")))
    save(log, model, tokenizer, "think", 3, Thinking(6, 2), background=True)
    with pytest.raises(ValueError, match="a defect"):
        log.wait()


def test_rows_are_on_the_disk_before_the_state_that_counts_them(log, model, tokenizer, monkeypatch):
    log.write("think", 1, gain=0.5)
    size, write, seen = log.folder.joinpath("metrics.jsonl").stat().st_size, States.save, []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: seen.append(n) or fsync(n))
    monkeypatch.setattr(States, "save", lambda self, tensors, at, info, group: (
        seen.append(info["metrics"]) or write(self, tensors, at, info, group)))
    save(log, model, tokenizer, "think", 1, Thinking(6, 2))
    assert seen[:2] == [log.metrics.fileno(), size]


def test_whatever_ends_a_run_says_what_is_kept(log):
    with (pytest.raises(Interrupted, match=r"^interrupted; nothing is saved$") as end,
          log.saying_what_is_kept()):
        raise Interrupted(15)
    assert end.value.number == 15
    log.saved = Path("x/checkpoint"), 9
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with (pytest.raises(InputError, match=r"memory is used up.*; update 9 is saved in x/check"),
              log.saying_what_is_kept()):
            raise error
    with pytest.raises(RuntimeError, match=r"^a defect$"), log.saying_what_is_kept():
        raise RuntimeError("a defect")


# ---- W&B


def test_wandb_gets_every_row_with_its_step(tmp_path, monkeypatch, capsys):
    logged, inits = [], []
    fake = types.SimpleNamespace(log=lambda values, step: logged.append((values, step)),
                                 init=lambda **options: inits.append(options) or fake)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = RunLog(tmp_path, {}, start_wandb("tiny", {"seed": 1}))
    assert inits == [{"project": "nanoqstar", "name": "tiny", "config": {"seed": 1}}]
    log.write("pretrain", 3, nll_base=2.0)
    log.pretrained = 3
    log.write("eval", 0, gain=0.0)
    assert logged == [({"pretrain/nll_base": 2.0}, 3), ({"eval/gain": 0.0}, 3)]
    log.wandb.log = lambda values, step: fail(ValueError("no network"))
    log.write("eval", 1, gain=0.5)
    assert "warning: eval 1 could not be logged (W&B: no network)" in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_wandb_that_does_not_start_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb is not installed: pip install"):
        start_wandb("x", {})
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=lambda **k: fail(ValueError("no API key\nconfigured"))))
    with pytest.raises(InputError, match="W&B does not start: no API key configured; log in"):
        start_wandb("x", {})


def test_a_log_that_is_no_file_is_refused(tmp_path):
    """Opening it would wait for a reader; through a link, a file would be made elsewhere."""
    for make in (os.mkfifo, lambda path: os.symlink(tmp_path / "elsewhere", path)):
        make(tmp_path / "metrics.jsonl")
        with pytest.raises(InputError, match=r"metrics\.jsonl is not a plain file"):
            RunLog(tmp_path, {})
        (tmp_path / "metrics.jsonl").unlink()
    assert not (tmp_path / "elsewhere").exists()
