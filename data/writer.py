"""Writes prepared token folders: `DatasetWriter`, bit by bit, or `write_dataset`, at once."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from nanoqstar import InputError
from nanoqstar.dataset import FORMAT, SPLITS, THOUGHTS, Thoughts, partial_folder
from nanoqstar.files import LOCK, lock, plain, read_json, read_small, sync, write_json

Ids = Sequence[int] | np.ndarray
JOURNAL = "journal.json"
TEMPORARY = (*(f"{split}.starts" for split in SPLITS), JOURNAL, f"{JOURNAL}.new", "meta.json.new",
             LOCK)  # what only the preparation needs
NAMES = (*TEMPORARY, "meta.json", "tokenizer.json",
         *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "docs.npy")), THOUGHTS)
LEAST_TOKENS = 2048  # of a split, where there is text enough: room for a window of any preset


def split_of(text: str, val_fraction: float) -> str:
    """'val' or 'train', from a hash of the document alone: the same in any order of documents."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def remove_leftovers(folder: Path, names: Iterable[str] = TEMPORARY) -> None:
    """Removes our own files from a folder: of a finished one, what only its preparation needed."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def checksum(state: Mapping[str, Any], tokenizer_sha256: str) -> str:
    return hashlib.sha256((json.dumps(state) + tokenizer_sha256).encode()).hexdigest()


def sound(journal: Mapping[str, Any]) -> bool:
    """Whether all is of its kind: the sum of a journal is no secret."""
    counts = [journal["place"]["file"], journal["place"]["skip"]]
    counts += [journal[split][key] for split in SPLITS for key in ("tokens", "documents")]
    texts = [*journal["files"], journal["revision"] or ""]
    for kind, (n, sentence) in journal["left_out"].items():
        counts, texts = [*counts, n], [*texts, kind, sentence]
    return (all(type(n) is int and 0 <= n < 2**63 for n in counts)
            and all(isinstance(x, str) for x in texts))


def read_journal(partial: Path) -> dict[str, Any]:
    """The journal of a partial folder; InputError where it, or its tokenizer.json, was changed."""
    try:
        journal = read_json(partial / JOURNAL)
        tokenizer = hashlib.sha256(read_small(partial / "tokenizer.json")).hexdigest()
        if journal.pop("checksum", None) == checksum(journal, tokenizer) and sound(journal):
            return journal
    except (InputError, OSError, KeyError, TypeError, ValueError, AttributeError):
        pass
    raise InputError(f"{partial / JOURNAL} or the tokenizer.json beside it is damaged, or from an "
                     f"earlier version: delete {partial} and start again")


class DatasetWriter:
    """Appends documents to `<folder>.partial`, which gets its final name only when whole.

    `commit` makes all that was added so far durable; a writer opened with the journal of the last
    commit goes on from there, dropping what was written after it.  `counts[split]` has the tokens
    and documents added so far.  For a `with` statement, under `files.lock` of the partial folder.
    """

    def __init__(self, folder: str | os.PathLike, tokenizer_json: str, vocab_size: int,
                 end_of_text_id: int | None, beginning_ids: Sequence[int] = (),
                 journal: Mapping[str, Any] | None = None) -> None:
        self.folder, self.partial = Path(folder), partial_folder(folder)
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.meta: dict[str, Any] = {
            "format": FORMAT, "dtype": self.dtype.name, "vocab_size": vocab_size,
            "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
            "end_of_text_id": end_of_text_id, "beginning_ids": list(beginning_ids)}
        none = {"tokens": 0, "documents": 0}
        self.counts = {split: dict(journal[split] if journal else none) for split in SPLITS}
        self.state = dict(journal or {})
        self.partial.mkdir(parents=True, exist_ok=True)
        (self.partial / "tokenizer.json").write_bytes(tokenizer_json.encode())
        self._open = ExitStack()
        self.files = {split: [self._open.enter_context(plain(self.partial / name).open("ab"))
                              for name in (f"{split}.bin", f"{split}.starts")] for split in SPLITS}
        self._cut()

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _cut(self) -> None:
        """Drops what the files hold beyond the counts."""
        for split, (tokens, starts) in self.files.items():
            count = self.counts[split]
            for file, size in ((tokens, count["tokens"] * self.dtype.itemsize),
                               (starts, count["documents"] * 8)):
                if os.path.getsize(file.name) < size:
                    raise InputError(f"{file.name} is too short: delete {self.partial} and start "
                                     "again")
                file.truncate(size)

    def _sync(self) -> None:
        for file in (f for files in self.files.values() for f in files):
            file.flush()
            os.fsync(file.fileno())

    @property
    def n_tokens(self) -> int:
        return sum(count["tokens"] for count in self.counts.values())

    def add(self, split: str, ids: Ids) -> None:
        """Appends one document: token ids, not empty, with those that stand before and after it."""
        tokens, starts = self.files[split]
        tokens.write(np.asarray(ids, dtype=self.dtype).tobytes())
        starts.write(np.int64(self.counts[split]["tokens"]).tobytes())
        self.counts[split]["tokens"] += len(ids)
        self.counts[split]["documents"] += 1

    def commit(self, **state: Any) -> None:
        """Makes all that was added durable and journals it with `state` (of whoever feeds this)."""
        self._sync()
        self.state = {**state, **self.counts}
        write_json(self.partial / JOURNAL, self.state | {
            "checksum": checksum(self.state, self.meta["tokenizer_sha256"])})

    def documents(self, split: str) -> Iterator[tuple[int, np.ndarray]]:
        """(where it begins, its tokens) of every document that was added."""
        self._sync()
        file, starts = self.files[split]
        tokens = np.memmap(file.name, self.dtype, "r")
        firsts = np.fromfile(starts.name, np.int64).tolist()
        for first, end in zip(firsts, [*firsts[1:], len(tokens)]):
            yield first, tokens[first:end]

    def fill_short_split(self) -> None:
        """Moves the last documents of the larger split to the smaller one, while that has less than
        LEAST_TOKENS and less than a tenth of all tokens, and the larger one more than one document.

        So neither is empty where there are two documents.  Call it after the last commit, or with
        its journal: interrupted at any moment, it can be done again.
        """
        large, small = sorted(SPLITS, key=lambda split: self.counts[split]["tokens"], reverse=True)
        from_, to = self.counts[large], self.counts[small]
        least = min(LEAST_TOKENS, max(1, self.n_tokens // 10))
        if to["tokens"] >= least or from_["documents"] < 2:
            return
        starts = np.fromfile(self.files[large][1].name, dtype=np.int64)
        while to["tokens"] < least and from_["documents"] > 1:
            first, size = int(starts[from_["documents"] - 1]), self.dtype.itemsize
            ids = np.fromfile(self.files[large][0].name, self.dtype, from_["tokens"] - first,
                              offset=first * size)
            self.add(small, ids)
            from_ |= {"tokens": first, "documents": from_["documents"] - 1}
        self.commit(**self.state)
        self._cut()

    def finish(self, source: Mapping[str, Any], val_fraction: float | None = None,
               thoughts: Sequence[tuple[int, Ids]] = ()) -> None:
        """Writes meta.json and gives the folder its final name.  source: where the text is from.

        thoughts: given ones, (index of the train split's token that it follows, ids) each.
        """
        self._sync()
        self._open.close()
        for split in SPLITS:
            offsets = self.partial / f"{split}.docs.npy"
            np.save(offsets, np.fromfile(self.partial / f"{split}.starts", dtype=np.int64))
            sync(offsets)
        sync(self.partial / "tokenizer.json")
        if thoughts:
            self.meta["thoughts_sha256"] = self._write_thoughts(thoughts)
        write_json(self.partial / "meta.json", self.meta | {
            "val_fraction": val_fraction, "source": source, **self.counts})
        os.replace(self.partial, self.folder)
        sync(self.folder.parent)
        remove_leftovers(self.folder)  # only now: a crash before the rename can go on


    def _write_thoughts(self, thoughts: Sequence[tuple[int, Ids]]) -> str:
        """Their sum; the same for the same thoughts."""
        file, ordered = self.partial / THOUGHTS, sorted(thoughts, key=lambda x: x[0])
        raw = safetensors.numpy.save(Thoughts(
            np.array([position for position, _ in ordered], np.int64),
            np.cumsum([len(ids) for _, ids in ordered], dtype=np.int64),
            np.concatenate([np.asarray(ids, np.int64) for _, ids in ordered]))._asdict())
        file.write_bytes(raw)
        sync(file)
        return hashlib.sha256(raw).hexdigest()


def write_dataset(folder: str | os.PathLike, tokenizer_json: str, vocab_size: int,
                  end_of_text_id: int | None, splits: Mapping[str, Iterable[Ids]],
                  source: Mapping[str, Any], thoughts: Sequence[tuple[int, Ids]] = ()) -> None:
    """Writes a whole prepared folder at once, replacing one that is there.

    splits: {"train": documents, "val": documents}, a document being a list or array of token ids.
    end_of_text_id: None where the text has no such token.  thoughts: as of `DatasetWriter.finish`.
    """
    with (lock(partial_folder(folder)),
          DatasetWriter(folder, tokenizer_json, vocab_size, end_of_text_id) as writer):
        for split, documents in splits.items():
            for ids in documents:
                writer.add(split, ids)
        if (Path(folder) / "meta.json").exists():
            shutil.rmtree(folder)
        writer.finish(source, thoughts=thoughts)
