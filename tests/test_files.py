"""Files that are whole or not there, and a lock that a process holds."""

import builtins
import json
import os
import subprocess
import sys

import pytest

from nanoqstar import InputError, files
from nanoqstar.files import LOCK, alone, lock, read_json, shown, sync, write_json


@pytest.mark.parametrize(("content", "message"), [
    (b"", "cannot be read as JSON"), (b"{", "cannot be read as JSON"),
    (b"\xff\xfe\x00", "cannot be read as JSON"), (b"\x00" * 9, "cannot be read as JSON"),
    (b'{"a": ' + b"[" * 10**6, "cannot be read as JSON"), (b"9" * 10**5, "cannot be read as JSON"),
    (b'{"a": ' * 100 + b"1" + b"}" * 100, "is nested more than 100 deep"),
    (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "is nested more than 100 deep"),
    (b"[1]", "holds no JSON object"), (b"null", "holds no JSON object"),
    (b'"text"', "holds no JSON object")])
def test_read_json_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 300


def test_read_json_of_what_is_no_file(tmp_path):
    with pytest.raises(InputError, match=r"a\.json is missing"):
        read_json(tmp_path / "a.json")
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for ever
    (tmp_path / "link.json").symlink_to("nothing")
    for path in (tmp_path, tmp_path / "pipe.json", tmp_path / "link.json"):
        with pytest.raises(InputError, match="is not a plain file"):
            read_json(path)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"{}")
    os.truncate(path, 2**40)  # sparse: more than there is memory for
    with pytest.raises(InputError, match=r"1,099,511,627,776 bytes, of 16,777,216 at most"):
        read_json(path)
    os.truncate(path, 2)
    assert read_json(path) == {}


def test_what_is_not_too_deep_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ' * 99 + "1" + "}" * 99)
    assert json.dumps(read_json(tmp_path / "a.json")).count("{") == 99


def test_what_is_written_is_read(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"ü": "\u2028"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(str(tmp_path / "a.json")) == value
    assert [x.name for x in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("failing", ["write", "fsync", "replace", "nothing", "fsync of the folder"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path, calls = tmp_path / "a.json", []
    write_json(path, {"a": "old"})
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fail(*_):
        raise KeyboardInterrupt

    def fsync(handle):
        calls.append(handle)
        return fail() if len(calls) == 2 else real["fsync"](handle)
    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr(files.Path, "write_bytes", lambda self, data: (
                self.write_text(data[:8].decode()), fail()))
        elif failing == "fsync of the folder":
            patch.setattr(os, "fsync", fsync)
        elif failing != "nothing":
            patch.setattr(os, failing, fail)
        if failing == "nothing":
            write_json(path, {"a": "new"})
        else:
            with pytest.raises(KeyboardInterrupt):
                write_json(path, {"a": "new"})
    done = failing in ("nothing", "fsync of the folder")
    assert read_json(path) == {"a": "new" if done else "old"}
    write_json(path, {"a": "newer"})
    assert read_json(path) == {"a": "newer"}
    assert len(list(tmp_path.iterdir())) == 1


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    monkeypatch.setattr(files, "sync", lambda path: calls.append(os.path.basename(path)))
    write_json(tmp_path / "a.json", {})
    assert calls == ["a.json.new", "replace", tmp_path.name]


def test_sync(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino),
                                                     fsync(handle)))
    sync(tmp_path / "a")
    sync(tmp_path)
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "b")


@pytest.mark.parametrize(("name", "line"), [
    ("a", "a"), ("a\nb\u2028", r"a\nb\u2028"), ("x" * 101, "x" * 100 + ".."), ("ü", "ü")])
def test_a_name_is_shown_as_a_short_line(name, line):
    assert shown(name) == line


# ---- the lock

fcntl = pytest.importorskip("fcntl")


def refused(folder):
    with pytest.raises(InputError, match="another process is writing") as error, lock(folder):
        pass
    return str(folder) in str(error.value)


def test_a_second_holder_is_refused(tmp_path):
    folder = tmp_path / "new" / "folder"
    with lock(folder):
        assert folder.is_dir()
        assert refused(folder)
        assert refused(str(folder))
        with lock(tmp_path / "other"):
            pass
        assert refused(folder)  # a refusal takes nothing away from the holder
    assert not list(folder.iterdir())
    with lock(folder):
        assert refused(folder)
    with pytest.raises(ZeroDivisionError), lock(folder):
        raise ZeroDivisionError
    with lock(folder):
        pass


HOLD = """
import sys, time
from nanoqstar.files import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_holder_lets_go(tmp_path):
    """Its file stays, and blocks nobody."""
    root = os.path.dirname(os.path.dirname(__file__))
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=root, text=True,
                          stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            assert refused(tmp_path)
        finally:
            holder.kill()
    assert (tmp_path / LOCK).exists()
    with lock(tmp_path):
        assert refused(tmp_path)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("successor", [False, True])
def test_a_file_removed_between_opening_and_locking(tmp_path, monkeypatch, successor):
    """The holder ends, and removes its file, just after we opened it: ours locks nothing then."""
    opened, path = [], tmp_path / LOCK

    def race(*args, **options):
        file = builtins.open(*args, **options)  # noqa: SIM115
        opened.append(file)
        if len(opened) == 1:
            path.unlink()
            if successor:  # a third process has come first
                path.touch()
        return file
    monkeypatch.setattr(files, "open", race, raising=False)
    with lock(tmp_path):
        assert len(opened) == 2
        assert opened[0].closed
        assert os.path.samestat(path.stat(), os.fstat(opened[1].fileno()))
        monkeypatch.undo()
        assert refused(tmp_path)


def test_a_folder_removed_before_its_lock_is_there(tmp_path, monkeypatch):
    folder, opened = tmp_path / "a", []

    def race(*args, **options):
        opened.append(args)
        if len(opened) == 1:
            folder.rmdir()
        return builtins.open(*args, **options)
    monkeypatch.setattr(files, "open", race, raising=False)
    with lock(folder):
        assert len(opened) == 2
        assert (folder / LOCK).exists()


def test_a_lock_is_let_go_whatever_becomes_of_its_name(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError
    with monkeypatch.context() as patch, pytest.raises(PermissionError) as held, lock(tmp_path):
        patch.setattr(files.Path, "unlink", fail)
    with lock(tmp_path):
        assert held.traceback  # keeps what its frames hold


@pytest.mark.skipif(files.fcntl is None, reason="Windows")
def test_a_file_is_written_by_one_process(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"kept")
    with alone(file) as held:
        assert held == file
        with pytest.raises(InputError, match="another process is writing"), alone(file):
            pass
    with alone(file):
        assert file.read_bytes() == b"kept"


def test_lock_of_what_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), lock(tmp_path / "file"):
        pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows")
@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", None)])
def test_write_json_replaces_files_alone(tmp_path, make):
    """To root /dev/null is a name like any other."""
    make(path := tmp_path / "a")
    kind = path.stat().st_mode
    with pytest.raises(InputError, match="is no file"):
        write_json(path, {})
    assert path.stat().st_mode == kind and os.listdir(tmp_path) == ["a"]
