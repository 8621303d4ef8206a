"""States of a run: written whole or not at all, read back bit for bit, and never a pickle."""

import errno
import json
import math
import os
import re
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanoqstar import InputError, state
from nanoqstar.state import Progress, States, adam_steps, load, named_tensors, read

FULL = OSError(errno.ENOSPC, "No space left on device")
INFO = {"config": {"seed": 0}, "data": "d", "metrics": 7, "made_by": "torch"}


class Model(torch.nn.Module):
    """A tied matrix, a vector, a bf16 one, one that learns nothing, one that has no elements."""

    def __init__(self, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.matrix = torch.nn.Parameter(torch.randn(5, 3, generator=draw))
        self.vector = torch.nn.Parameter(torch.randn(3, generator=draw))
        self.low = torch.nn.Parameter(torch.randn(3, generator=draw).bfloat16())
        self.frozen = torch.nn.Parameter(torch.randn(2, generator=draw), requires_grad=False)
        self.empty = torch.nn.Parameter(torch.zeros(0, 3), requires_grad=False)


def trained(seed=0, updates=3):
    model = Model(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for step in range(updates):
        x = torch.randn(5, generator=torch.Generator().manual_seed(step))
        out = (x @ model.matrix + model.vector + model.low.float()).square().sum()
        out.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saved(states, update=3, seed=0, score=None, **info):
    model, optimizer = trained(seed)
    states.save(named_tensors(model, optimizer), Progress("think", update, score=score),
                INFO | info | {"adam_step": adam_steps(model, optimizer)})
    return model, optimizer


@pytest.fixture
def states(tmp_path):
    return States(tmp_path / "state", 2)


def names(states):
    return sorted(x.name for x in states.folder.iterdir())


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---- one state


def test_a_state_is_what_safetensors_reads(states):
    """The library's own reader, of a file that we wrote; and every name stands for its tensor."""
    model, optimizer = saved(states)
    folder, = states.folders()
    assert sorted(os.listdir(folder)) == ["rank-00000.safetensors", "state.json"]
    held = load_file(folder / "rank-00000.safetensors")
    for name, p in model.named_parameters():
        assert held[name].dtype == p.dtype and torch.equal(held.pop(name), p)
        for moment in ("exp_avg", "exp_avg_sq") if p.requires_grad else ():
            assert torch.equal(held.pop(f"{name}@{moment}"), optimizer.state[p][moment])
    assert not held
    info = json.loads((folder / "state.json").read_text())
    assert info["adam_step"] == {"matrix": 3, "vector": 3, "low": 3}
    assert info["progress"]["update"] == 3 and info["config"] == {"seed": 0}
    assert states.path(Progress("think", 20, pretrained=100)).name == "step-000120"


def test_training_goes_on_as_if_it_had_never_stopped(states):
    """Adam's moments and step among it: five updates are three, a state, and two."""
    saved(states)
    model, optimizer = trained(seed=9, updates=0)
    load(*read(states.folders()[0]), model, optimizer)
    assert optimizer.state[model.matrix]["step"].dtype == torch.float32
    straight, _ = trained(updates=5)
    for step in (3, 4):
        x = torch.randn(5, generator=torch.Generator().manual_seed(step))
        (x @ model.matrix + model.vector + model.low.float()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert equal(model, straight)


def test_another_model_is_refused(states):
    saved(states)
    model, optimizer = trained(updates=0)
    model.vector = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(InputError, match=r"vector is \[3\] torch.float32 there and \[4\]"):
        load(*read(states.folders()[0]), model, optimizer)
    model.vector = torch.nn.Parameter(torch.zeros(3).double())
    with pytest.raises(InputError, match="of another model"):
        load(*read(states.folders()[0]), model, optimizer)
    model, optimizer = trained(updates=0)
    model.more = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(InputError, match="more is nothing there"):
        load(*read(states.folders()[0]), model, optimizer)


def test_what_is_new_to_the_optimizer_begins_without_moments(states):
    saved(states)
    model, optimizer = Model(), None
    optimizer = torch.optim.AdamW([model.matrix, model.frozen], fused=True)
    load(*read(states.folders()[0]), model, optimizer)
    assert set(optimizer.state) == {model.matrix}


# ---- whole or not at all


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]


@pytest.mark.parametrize(("name", "change"), [
    ("rank-00000.safetensors", lambda data: data[:-1]),
    ("rank-00000.safetensors", lambda data: flip(data, len(data) - 1)),
    ("rank-00000.safetensors", lambda data: flip(data, 9)),
    ("rank-00000.safetensors", None), ("state.json", None), ("state.json", lambda data: b"{"),
    ("state.json", lambda data: data.replace(b'"update": 3', b'"update": 4')),
    ("state.json", lambda data: data.replace(b'"format": 1', b'"format": 2')),
    ("state.json", lambda data: b"[]"), ("rank-00000.safetensors", "pipe"),
    ("state.json", "pipe")])
def test_a_damaged_state_does_not_count(states, name, change):
    """The one before it does, and that is said; where there is none, that is a sentence."""
    saved(states, 2)
    saved(states, 3)
    file = states.folders()[1] / name
    if callable(change):
        file.write_bytes(change(file.read_bytes()))
    else:
        file.unlink()
        if change == "pipe":
            os.mkfifo(file)
    said = []
    folder, info = states.newest(said.append)
    assert folder.name == "step-000002" and info["progress"].update == 2
    assert len(said) == 1 and "step-000003" in said[0]
    states.remove([folder])
    with pytest.raises(InputError, match="holds no whole state"):
        states.newest(said.append)


def test_a_state_under_another_name_does_not_count(states):
    """A copy named as a later update would be taken for that update's, its tensors included."""
    saved(states, 2)
    states.folders()[0].rename(states.folder / "step-000004")
    saved(states, 3, score=0.1)
    said = []
    folder, info = states.newest(said.append)
    assert folder.name == "step-000003" and info["progress"].update == 3
    assert len(said) == 1 and "step-000004 is step-000002, under another name" in said[0]
    assert states.best() == folder


@pytest.mark.parametrize("change", [
    {"files": {"../../secret": {"bytes": 1, "sha256": "x"}}}, {"files": 7}, {"progress": {"a": 1}},
    {"progress": None}, {"files": {"rank-00000.safetensors": 5}}, {"adam_step": {"low": "3"}},
    {"adam_step": []}, {"config": None}, {"data": 5}, {"made_by": None}, {"metrics": -1},
    {"seconds": -1.0}, {"seconds": "long"},
    {"progress": {"phase": "think", "update": 3.0}}, {"progress": {"phase": "think", "update": -3}},
    {"progress": {"phase": "think", "update": 3, "norms": ["1"]}},
    {"progress": {"phase": "think", "update": 3, "norms": [math.nan]}},
    {"progress": {"phase": "think", "update": 3, "start_nll": math.inf}}])
def test_a_forged_state_is_refused(states, change):
    """Files elsewhere are not read, nor words of another version; the sum is right, here."""
    saved(states)
    folder, = states.folders()
    info = json.loads((folder / "state.json").read_text()) | change
    del info["sha256"]
    (folder / "state.json").write_text(json.dumps(info | {"sha256": state.sum_of(info)}))
    with pytest.raises(InputError, match="names files that are no state's"):
        read(folder)


def test_tensors_that_are_none_are_refused(states):
    saved(states)
    folder, info = read(states.folders()[0])
    (folder / "rank-00000.safetensors").write_bytes(b"junk" * 9)
    with pytest.raises(InputError, match="cannot be read"):
        load(folder, info, *trained(updates=0))


@pytest.mark.parametrize("place", ["write_tensors", "write_json", "sync", "prune"])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_states_before_it(states, monkeypatch, place, error):
    saved(states, 1)
    before = states.newest(print)

    def fail(*args, **options):
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(States if place == "prune" else state, place, fail)
        with pytest.raises(type(error)):
            saved(states, 2)
    whole = ["step-000001", "step-000002"] if place in ("prune", "sync") else ["step-000001"]
    assert names(states) == whole and read(before[0]) == before
    saved(states, 3)
    assert [x.name for x in states.folders()] == [*whole, "step-000003"][-2:]


def test_bytes_are_on_the_disk_before_the_name_is(states, monkeypatch):
    """Files, then state.json, then the folder's name: whatever the order of a crash."""
    events, sync, fsync, rename = [], state.sync, os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda n: events.append(
        Path(os.readlink(f"/proc/self/fd/{n}")).name) or fsync(n))
    monkeypatch.setattr(Path, "rename", lambda a, b: events.append(f"-> {b.name}") or rename(a, b))
    assert sync is not None
    saved(states)
    assert events == ["rank-00000.safetensors", "state.json.new", "step-000003.partial",
                      "-> step-000003", "state"]


def test_half_a_state_is_cleared_away(states):
    (states.folder / "step-000009.partial").mkdir(parents=True)
    (states.folder / "step-000002.partial").mkdir()
    (states.folder / "step-000002.partial" / "junk").write_text("x")
    (states.folder / "mine").mkdir()
    assert states.folders() == []
    saved(states, 2)
    assert names(states) == ["mine", "step-000002"]


# ---- which are kept


def test_the_newest_and_the_best_are_kept(states):
    for update, score in ((1, 0.1), (2, 0.5), (3, None), (4, 0.3), (5, None), (6, 0.4)):
        saved(states, update, score=score)
    assert names(states) == ["step-000002", "step-000005", "step-000006"]
    assert states.best().name == "step-000002"
    saved(states, 7, score=0.6)
    saved(states, 8)
    assert names(states) == ["step-000007", "step-000008"]
    saved(states, 1_000_000)
    assert states.newest(print)[0].name == "step-1000000"


def test_an_evaluation_is_added_to_the_state_it_is_of(states):
    saved(states, 3)
    before = states.newest(print)[1]
    saved(states, 3, score=0.25, metrics=99)
    after = states.newest(print)[1]
    assert (after["progress"].score, after["metrics"]) == (0.25, 99)
    assert after["files"] == before["files"] and before["progress"].score is None


# ---- room


def test_room_is_asked_for_before_the_first_update(states, monkeypatch):
    usage = type(state.shutil.disk_usage("/"))
    for free, words in ((int(5e9), "a state takes 1.0 GB, all together 4.0 GB at most; 5.0 GB are "
                                   f"free in {states.folder}"),
                        (int(3e9), ": warning, too little for all")):
        monkeypatch.setattr(state.shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        assert states.check_room(10**9).endswith(words)
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage(0, 0, 1999))
    with pytest.raises(InputError, match=r"takes 1.0 kB, there must be room for two, and 2.0 kB"):
        states.check_room(1000)
    saved(states)  # what is there already will make room
    assert "takes 1.0 kB" in states.check_room(1000)


def test_a_copy_that_host_memory_does_not_hold_is_not_made(monkeypatch):
    tensors = {"x": torch.ones(1000)}
    copy = state.in_host_memory(tensors)["x"]
    tensors["x"][0] = 2.0
    assert copy[0] == 1 and state.free_memory() > 1e6
    monkeypatch.setattr(state, "free_memory", lambda: 4999)
    assert state.in_host_memory(tensors) is None
    monkeypatch.setattr(state, "free_memory", lambda: 5001)
    assert state.in_host_memory(tensors) is not None


# ---- spikes


def test_a_spike_lies_six_sigma_over_the_mean_of_the_last_128():
    at = Progress("think", 0)
    norms = [1 + 0.1 * math.sin(n) for n in range(200)]
    for n, norm in enumerate(norms):
        last = norms[max(0, n - 128):n]
        if n < 128:
            assert at.spike() == math.inf
        else:
            expected = statistics.fmean(last) + 6 * statistics.pstdev(last)
            assert at.spike() == pytest.approx(expected, rel=1e-12)
        at.note(norm, True)
    before = at.spike()
    at.note(50.0, False)
    assert (at.update, at.skipped, at.spikes, at.in_a_row) == (201, 1, 1, 0)
    assert at.spike() > before  # it counts: a level that stays is no spike for ever
    at.note(math.nan, False)
    assert (at.skipped, at.spikes, at.in_a_row) == (2, 1, 1) and math.isfinite(at.spike())
    at.note(1.0, True)
    assert at.in_a_row == 0


def test_equal_norms_are_no_spikes():
    at = Progress("think", 0, norms=[2.0] * 128)
    assert at.spike() == 2.0


# ---- nothing is pickled


def test_no_file_of_ours_unpickles():
    words = re.compile(r"import pickle|torch\.(load|save)\b|np\.load|allow_pickle|marshal|shelve")
    root = Path(__file__).parents[1]
    files = [*root.glob("*.py"), *root.glob("nanoqstar/*.py"), *root.glob("data/*.py")]
    assert len(files) > 25
    assert [f.name for f in files if words.search(f.read_text())] == []
