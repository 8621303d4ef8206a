"""Preparation cut off at every moment, done twice at once, on a full disk, over other input."""

import errno
import hashlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from prepared import (
    OUTPUT,
    assert_refused,
    both,
    make_tokenizer,
    runner,
    same_files,
    sentences,
    texts_of,
    write_jsonl,
)

from data import prepare, sources
from data.writer import DatasetWriter, checksum, write_dataset
from nanoqstar import InputError
from nanoqstar.dataset import TokenDataset
from nanoqstar.files import LOCK, lock


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def run(tmp_path, tokenizer, capsys):
    return runner(tmp_path, tokenizer, capsys)


@pytest.fixture
def three_files(tmp_path, monkeypatch):
    """Arguments for three files of a hundred documents, each with a fault, in a few batches."""
    for i in range(3):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", sentences(i, 100))
        with open(tmp_path / "in" / f"{i}.jsonl", "ab") as file:
            file.write(b'no JSON\n{"text": "caf\xe9"}\n')
    monkeypatch.setattr(prepare, "BATCH_CHARS", 15_000)
    return ("--input", tmp_path / "in", "--val_fraction", 0.2)


# --- cut off ---

def test_a_stopped_run_continues_to_the_same_bytes(run, three_files, tmp_path, monkeypatch):
    three_files = (*three_files, "--tokenizer", "train:300")
    assert run(*three_files, out="straight")[0] == 0

    def add(self, split, ids, add=DatasetWriter.add):
        add(self, split, ids)
        if sum(count["documents"] for count in self.counts.values()) == 160:
            self._sync()  # more on disk than in the journal
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "add", add)
        status, _, err = run(*three_files)
    assert status == 130
    assert "the same command goes on there" in err
    assert not (tmp_path / "out").exists()
    journal = json.loads((tmp_path / "out.partial" / "journal.json").read_text())
    done = journal["train"]["documents"] + journal["val"]["documents"]
    assert 101 < done < 160
    assert journal["place"] == {"file": 1, "skip": done - 101}  # after a file of 101 and its fault
    assert journal["left_out"]["no JSON"][0] == 1
    assert (tmp_path / "out.partial" / "train.bin").stat().st_size > 2 * journal["train"]["tokens"]

    tokenized, training, encoded = [], [], prepare.encoded
    monkeypatch.setattr(prepare, "encoded", lambda tokenizer, items: encoded(
        tokenizer, (tokenized.append(item.text) or item for item in items)))
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *args: training.append(args))
    status, out, _ = run(*three_files)
    assert status == 0
    assert f"continuing after file 2, document {done - 101}" in out
    assert "3 times no JSON" in out
    assert "3 times no UTF-8" in out
    assert len([text for text in tokenized if text]) == 303 - done
    assert not training
    assert same_files(tmp_path / "straight", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()

    tokenized.clear()
    status, out, _ = run(*three_files)
    assert status == 0
    assert "already prepared" in out
    assert not tokenized
    assert_refused(run(*three_files, "--val_fraction", 0.3),
                   "begun with val_fraction 0.2, now it is 0.3", "delete", "--out")


OPERATIONS = [(os, "replace"), (os, "fsync"), (np, "save"), (Path, "unlink"), (Path, "mkdir"),
              (Path, "write_bytes"), (DatasetWriter, "add"), (DatasetWriter, "_cut")]


def stop_after(patch, n, error):
    """Lets the n-th of all OPERATIONS end, or not begin if n is negative, in an error."""
    seen = []

    def stopping(operation):
        def stopped(*args, **options):
            seen.append(operation)
            if len(seen) == -n:
                raise error()
            result = operation(*args, **options)
            if len(seen) == n:
                raise error()
            return result
        return stopped
    for owner, name in OPERATIONS:
        patch.setattr(owner, name, stopping(getattr(owner, name)))
    return seen


@pytest.mark.parametrize("stop", [KeyboardInterrupt, lambda: OSError(errno.ENOSPC, "No space")])
def test_stopped_at_every_moment(run, tmp_path, monkeypatch, stop):
    """Three batches and documents that move to an empty val split: what is there is right or can
    be continued, and nothing lies around."""
    write_jsonl(tmp_path / "a.jsonl", texts := sentences(1, 12))
    monkeypatch.setattr(prepare, "BATCH_CHARS", 700)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # it takes most of the time
    args = ("--input", tmp_path / "a.jsonl", "--val_fraction", 1e-9)
    with monkeypatch.context() as patch:
        seen = stop_after(patch, 0, stop)
        assert run(*args, out="straight")[0] == 0
    assert texts_of(tmp_path / "straight", "val") == [texts[-1], texts[-2]]
    assert len(seen) > 40
    for n in (n for i in range(1, len(seen) + 1) for n in (i, -i)):
        with monkeypatch.context() as patch:
            stop_after(patch, n, stop)
            result = run(*args, out=f"out{n}")
        if stop is KeyboardInterrupt:
            assert result[0] == 130
        else:
            assert_refused(result)
        partial = tmp_path / f"out{n}.partial"
        assert not partial.exists() or (partial / "journal.json").exists() or not any(
            path.suffix == ".bin" for path in partial.iterdir())
        assert run(*args, out=f"out{n}")[0] == 0
        assert same_files(tmp_path / "straight", tmp_path / f"out{n}"), n
        assert not partial.exists()


def test_stopped_twice_while_documents_move(run, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", sentences(1, 12))
    args = ("--input", tmp_path / "a.jsonl", "--val_fraction", 1e-9)
    assert run(*args, out="straight")[0] == 0

    def stop(*args):
        raise KeyboardInterrupt
    for method in ("fill_short_split", "finish", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(DatasetWriter, method, stop)
            assert run(*args)[0] == 130
    assert run(*args)[0] == 0
    assert same_files(tmp_path / "straight", tmp_path / "out")


def test_a_full_disk_is_one_sentence_and_what_was_saved_stays(run, three_files, tmp_path,
                                                              monkeypatch):
    assert run(*three_files, out="straight")[0] == 0

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() > 3000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def full(path, mode="r", *args, open_=Path.open, **options):
        if mode == "ab":
            return io.BufferedWriter(Full(path, "a"))
        return open_(path, mode, *args, **options)
    unraisable = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        patch.setattr(sys, "unraisablehook", unraisable.append)
        result = run(*three_files)
    assert_refused(result, "the disk of", "out.partial is full: make room", "goes on")
    assert not unraisable
    assert (tmp_path / "out.partial" / "journal.json").exists()
    status, out, _ = run(*three_files)
    assert status == 0
    assert "continuing after" in out
    assert same_files(tmp_path / "straight", tmp_path / "out")


def test_a_failed_start_leaves_no_folder(run, three_files, tmp_path, monkeypatch):
    def stop(*args, **state):
        raise KeyboardInterrupt
    monkeypatch.setattr(DatasetWriter, "commit", stop)
    status, _, err = run(*three_files)
    assert status == 130
    assert "goes on" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]

    def full(*args, **state):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(DatasetWriter, "commit", full)
    result = run(*three_files)
    assert_refused(result, "out.partial is full: make room, then the same command begins anew")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def tree(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link inside", "named as ours"])
def test_foreign_files_where_the_output_is_written_stay(run, three_files, tmp_path, monkeypatch,
                                                        kind):
    partial, mine = tmp_path / "out.partial", tmp_path / "mine"
    mine.mkdir()
    for name in ("precious.txt", "train.bin", "tokenizer.json"):
        (mine / name).write_text("mine")
    if kind == "file":
        partial.write_text("mine")
    elif kind == "folder":
        mine.rename(partial)
    elif kind == "link":
        (mine / "precious.txt").unlink()
        partial.symlink_to(mine)
    else:
        partial.mkdir()
        if kind == "link inside":
            (partial / "tokenizer.json").symlink_to(mine / "tokenizer.json")
        else:
            (partial / "val.bin").mkdir()
    before = tree(tmp_path)
    monkeypatch.setattr(prepare, "make", lambda *args: pytest.fail("begun"))
    assert_refused(run(*three_files), "out.partial, where --out is written", "choose another --out")
    assert tree(tmp_path) == before


def test_only_our_own_files_are_removed(run, three_files, tmp_path, monkeypatch):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "train.bin").write_text("of a start that was cut off")

    def stop(*args, **state):
        (partial / "new").mkdir()
        (partial / "new" / "precious.txt").write_text("put there meanwhile")
        raise KeyboardInterrupt
    monkeypatch.setattr(DatasetWriter, "commit", stop)
    assert run(*three_files)[0] == 130
    assert [path.name for path in partial.rglob("*")] == ["new", "precious.txt"]


def changed(key, value):
    return lambda journal, _: journal | {key: value}


DAMAGE = {
    "no place": changed("place", None), "other file": changed("place", {"file": 0, "skip": 7}),
    "negative": changed("place", {"file": -1, "skip": 0}), "no files": changed("files", []),
    "revision": changed("revision", 5), "left out": changed("left_out", []),
    "fewer tokens": changed("train", {"tokens": 5, "documents": 1}), "no state": lambda *_: {},
    "no object": lambda *_: [], "of an earlier version": lambda journal, _: {
        key: value for key, value in journal.items() if key != "checksum"},
    "no tokenizer": lambda journal, partial: (partial / "tokenizer.json").unlink() or journal,
    "other tokenizer": lambda journal, partial: (partial / "tokenizer.json").write_text("{}")
    and journal}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_is_refused(run, three_files, tmp_path, monkeypatch, damage):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(DatasetWriter, "fill_short_split", stop)
    assert run(*three_files)[0] == 130
    file = tmp_path / "out.partial" / "journal.json"
    file.write_text(json.dumps(DAMAGE[damage](json.loads(file.read_text()), file.parent)))
    assert_refused(run(*three_files), "journal.json", "damaged", "out.partial and start again")


@pytest.mark.parametrize("name", ["train.bin", "val.starts", "tokenizer.json", "journal.json"])
def test_a_pipe_in_what_was_interrupted_is_not_waited_for(run, three_files, tmp_path, monkeypatch,
                                                          name):
    file = interrupted(run, three_files, tmp_path, monkeypatch, {}).with_name(name)
    file.unlink()
    os.mkfifo(file)
    assert_refused(run(*three_files), "not a plain file" if name[-4:] != "json" else "damaged")


@pytest.mark.parametrize("target", ["nothing", "precious"])
def test_nothing_is_written_through_a_link(run, three_files, tmp_path, monkeypatch, target):
    (tmp_path / "precious").write_bytes(b"mine")
    file = interrupted(run, three_files, tmp_path, monkeypatch, {}).with_name("train.bin")
    file.unlink()
    file.symlink_to(tmp_path / target)
    assert_refused(run(*three_files), "out.partial", "holds something else")
    assert (tmp_path / "precious").read_bytes() == b"mine"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("forgery", [
    {"place": None}, {"place": {"file": "0", "skip": 0}}, {"place": {"file": 0, "skip": -1}},
    {"files": [{}]}, {"files": 5}, {"revision": 5}, {"left_out": {"kind": 5}}, {"left_out": []},
    {"train": {"tokens": 0.5, "documents": 1}}, {"val": {}}])
def test_a_forged_journal_is_refused(run, three_files, tmp_path, monkeypatch, forgery):
    """Its sum is right, here."""
    journal = interrupted(run, three_files, tmp_path, monkeypatch, forgery)
    assert_refused(run(*three_files), str(journal), "damaged")


def interrupted(run, three_files, tmp_path, monkeypatch, changes):
    """The journal of a preparation that was interrupted, with changes and their sum."""
    def stop(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "fill_short_split", stop)
        assert run(*three_files)[0] == 130
    file = tmp_path / "out.partial" / "journal.json"
    journal = json.loads(file.read_text()) | changes
    del journal["checksum"]
    words = hashlib.sha256(file.with_name("tokenizer.json").read_bytes()).hexdigest()
    file.write_text(json.dumps(journal | {"checksum": checksum(journal, words)}))
    return file


def test_a_journal_does_not_say_which_files_are_read(run, three_files, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "elsewhere.jsonl", ["a secret"] * 9)
    interrupted(run, three_files, tmp_path, monkeypatch, {
        "files": [str(tmp_path / "elsewhere.jsonl")], "place": {"file": 0, "skip": 0}})
    assert run(*three_files)[0] == 0
    assert not any("secret" in text for text in both(tmp_path / "out"))


def test_nobody_reads_the_output(three_files, tmp_path, tokenizer, monkeypatch, capfd):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def fileno(self):
            return spare
    with open(tmp_path / "spare", "w") as file:
        spare = file.fileno()
        args = [*map(str, three_files), "--tokenizer", str(tokenizer)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Closed())
            assert prepare.main([*args, "--out", str(tmp_path / "out")]) == 0
    assert "Traceback" not in capfd.readouterr().err
    assert prepare.main([*args, "--out", str(tmp_path / "straight")]) == 0
    assert same_files(tmp_path / "straight", tmp_path / "out")


# --- two at once ---

def test_a_second_process_is_refused_and_harms_nothing(run, three_files, tmp_path, monkeypatch):
    assert run(*three_files, out="straight")[0] == 0
    seconds, add = [], DatasetWriter.add

    def meanwhile(self, *args):
        add(self, *args)
        if not seconds:
            seconds.append(None)
            seconds[0] = run(*three_files)
    monkeypatch.setattr(DatasetWriter, "add", meanwhile)
    assert run(*three_files)[0] == 0
    status, _, err = seconds[0]
    assert status == 2
    assert "error: another process is writing" in err
    assert same_files(tmp_path / "straight", tmp_path / "out")


@pytest.mark.parametrize("same", [True, False])
def test_another_process_has_just_finished(run, three_files, tmp_path, monkeypatch, same):
    args = (*three_files, "--max_tokens", 3000)

    def after_it(out, arguments, found=prepare.is_prepared, first=[]):  # noqa: B006
        if not first:
            first.append(found(out, arguments))
            assert run(*(args if same else three_files))[0] == 0
            return False  # so it was, a moment ago
        return found(out, arguments)
    monkeypatch.setattr(prepare, "is_prepared", after_it)
    result = run(*args)
    if same:
        assert result[0] == 0
        assert "already prepared" in result[1]
    else:
        assert_refused(result, "out was begun with max_tokens 200000000, now it is 3000")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(OUTPUT)
    assert not (tmp_path / "out.partial").exists()


def test_leftovers_of_a_finished_folder_go(run, three_files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("data.writer.remove_leftovers", lambda folder: None)
        assert run(*three_files)[0] == 0
    assert (tmp_path / "out" / "journal.json").exists()
    assert run(*three_files)[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(OUTPUT)


def test_write_dataset_holds_its_folder(tmp_path):
    arguments = ("{}", 10, 0, {"train": [[1, 2]], "val": [[3]]}, {})
    write_dataset(tmp_path / "d", *arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()}
    with lock(tmp_path / "d.partial"), pytest.raises(InputError, match="another process"):
        write_dataset(tmp_path / "d", "{}", 10, 0, {"train": [[4]], "val": [[5]]}, {})
    assert {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()} == before
    assert LOCK not in before


# --- other input ---

def test_input_of_other_content_is_not_the_same(run, three_files, tmp_path):
    assert run(*three_files)[0] == 0
    file = tmp_path / "in" / "1.jsonl"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes().replace(b"cat", b"dog"))  # as many files and bytes
    assert file.stat().st_size == size
    assert_refused(run(*three_files), "out was begun with other files: names", "delete")
    assert run(*three_files, out="new")[0] == 0
    assert any("dog" in text for text in both(tmp_path / "new"))
    file.rename(file.with_name("4.jsonl"))
    assert_refused(run(*three_files, out="new"), "new was begun with other files: names")


def test_another_tokenizer_under_the_name_is_not_the_same(run, three_files, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(prepare.train_tokenizer(300, sentences(5, 90)).to_str())
    assert run(*three_files, "--tokenizer", folder)[0] == 0
    (folder / "tokenizer.json").write_text(prepare.train_tokenizer(301, sentences(5, 90)).to_str())
    assert_refused(run(*three_files, "--tokenizer", folder), "begun with another tokenizer.json:")


def test_a_leftover_of_other_input_is_refused(run, three_files, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "finish", stop)
        assert run(*three_files)[0] == 130
    with open(tmp_path / "in" / "2.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    before = {path.name: path.read_bytes() for path in (tmp_path / "out.partial").iterdir()}
    assert_refused(run(*three_files), "out.partial was begun with other files:", "delete")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out.partial").iterdir()}


def test_a_folder_of_an_earlier_version_is_readable_and_not_the_same(run, three_files, tmp_path):
    assert run(*three_files)[0] == 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    del meta["beginning_ids"], meta["source"]["names_sizes_times"]
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta))
    assert TokenDataset(tmp_path / "out", "train").beginning_ids is None
    assert_refused(run(*three_files), "out was begun by an earlier version", "delete")
    for source in (None, 1, "text", ["text_field"]):
        (tmp_path / "out" / "meta.json").write_text(json.dumps(meta | {"source": source}))
        assert_refused(run(*three_files), "out was begun by an earlier version", "delete")


# --- the short split ---

@pytest.mark.parametrize(("train", "val", "expected"), [
    ([900] * 10, [], ([900] * 9, [900])),  # a tenth
    ([5000] * 20, [], ([5000] * 19, [5000])),  # enough
    ([500] * 100, [100], ([500] * 96, [100, *[500] * 4])),  # several
    ([], [30, 20], ([20], [30])), ([7], [], ([7], [])), ([1, 1], [], ([1], [1])),
    ([10_000] * 9, [10_000], ([10_000] * 9, [10_000]))])
def test_the_short_split_is_filled_from_the_end_of_the_other(tmp_path, train, val, expected):
    ids = iter(range(100_000))
    with DatasetWriter(tmp_path / "d", "{}", 10**6, None) as writer:
        for split, lengths in (("train", train), ("val", val)):
            for n in lengths:
                writer.add(split, [next(ids) for _ in range(n)])
        writer.commit(mark=1)
        writer.fill_short_split()
        counts = writer.counts
        writer._sync()
        tokens = [np.fromfile(tmp_path / "d.partial" / f"{split}.bin", np.uint32).tolist()
                  for split in ("train", "val")]
    assert [count["documents"] for count in counts.values()] == [len(x) for x in expected]
    assert [count["tokens"] for count in counts.values()] == [sum(x) for x in expected]
    assert sorted(tokens[0] + tokens[1]) == list(range(sum(train) + sum(val)))
    starts = [np.fromfile(tmp_path / "d.partial" / f"{split}.starts", np.int64).tolist()
              for split in ("train", "val")]
    assert starts == [[0, *np.cumsum(x)[:-1].tolist()] if x else [] for x in expected]
    assert json.loads((tmp_path / "d.partial" / "journal.json").read_text())["mark"] == 1


def test_small_documents_for_little_text():
    def n_chars(n_bytes):
        return sources.Source(prepare.PrepareConfig(), [], None, n_bytes).n_chars
    assert [n_chars(n) for n in (100, 10**6, 10**9, float("inf"))] == [4096, 15625, 65536, 65536]
