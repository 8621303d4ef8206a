"""Files that are whole or not there: JSON, atomic replacement, and a lock that a process holds."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanoqstar import InputError

try:
    import fcntl
except ImportError:  # on Windows: two processes in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
LARGEST = 2**26  # bytes of a tokenizer.json; Gemma's 262,144 entries take half of that
LARGEST_JSON = 2**24  # of any other; parsed, it may take thirty times as many
DEEPEST = 100  # what can just be read could not be shown, or written again
LONGEST = 100  # characters of a name in an error


def shown(name: str) -> str:
    """A name that anybody may have chosen, as one short line of a sentence."""
    line = repr(name)[1:-1]
    return line if len(line) <= LONGEST else line[:LONGEST] + ".."


def plain(path: str | os.PathLike) -> Path:
    """`path`, a file or nothing yet; InputError where it is anything else: opening a pipe, say,
    waits until somebody writes, and through a link to nothing a file is made elsewhere."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is not a plain file, nor a link to one: choose another, or "
                         "remove what is there")
    return Path(path)


def read_small(path: str | os.PathLike, largest: int = LARGEST) -> bytes:
    """A whole file, or InputError where it has more than `largest` bytes. Raises OSError."""
    if (size := plain(path).stat().st_size) > largest:
        raise InputError(f"{path} has {size:,} bytes, of {largest:,} at most: it cannot be what "
                         "its name says")
    return Path(path).read_bytes()


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file; InputError where the file is missing or holds anything else."""
    try:
        value = json.loads(read_small(path, LARGEST_JSON))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [y for x in level if isinstance(x, dict | list)
                 for y in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise InputError(f"{path} is nested more than {DEEPEST} deep: no file of ours is")
    return value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """`write_whole` of a JSON file."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Replaces `path` in one step: whoever reads it sees the old file or the new one, whole.
    InputError where it is no file: a folder, or a device, which would be a file from then on."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is no file: choose another name")
    fresh = Path(f"{path}.new")
    fresh.write_bytes(data)
    sync(fresh)
    os.replace(fresh, path)
    sync(Path(path).parent)


def sync(path: str | os.PathLike) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    if os.path.isdir(path) and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """Holds a plain file (made where it is not) for this process, which alone appends to it;
    InputError where another one does. Its folder must be there."""
    with plain(file).open("ab") as held:
        try:
            if fcntl is not None:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is writing {file}: wait until it has ended, or "
                             "choose another file") from None
        yield file


@contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Holds `folder` (made where it is not) for this process; InputError where another one does.

    The lock is a file in it, LOCK, removed at the end; the system lets go of it however the process
    ends.
    """
    folder = Path(folder)
    path = folder / LOCK
    tries = 100
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a")  # noqa: SIM115
        except (FileNotFoundError, FileExistsError):  # no folder, or one that somebody just removes
            tries -= 1
            if not tries:
                raise
            continue
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise InputError(f"another process is writing {folder}: wait until it has ended, or "
                             "choose another folder") from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # removed by its holder between our opening and our locking it: once more
    with file:  # closed, and so unlocked, whatever becomes of its name
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
