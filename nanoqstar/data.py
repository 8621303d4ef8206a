"""Prepared token folders: written by `DatasetWriter`, read by `TokenDataset`.

A folder holds, for each split, the token ids (`train.bin`, raw uint16 or uint32) and the start of every document
(`train.docs.npy`, int64); besides them `tokenizer.json` and `meta.json`, which says what the rest must look like.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from nanoqstar import InputError

FORMAT = 1
SPLITS = ("train", "val")
JOURNAL = "journal.json"


def split_of(text, val_fraction):
    """'val' or 'train', from a hash of the document alone: the same whatever the order of documents and files."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def read_json(path):
    """The JSON object in `path`, or None where there is no such file or it holds anything else."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path, value):
    """Replaces `path` in one step: a reader (or a run after a crash) sees the old file or the new one, whole."""
    fresh = Path(f"{path}.new")
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


class DatasetWriter:
    """Appends documents to `<folder>.partial`, which gets its final name only when whole.

    `commit` makes all that was added so far durable; a writer opened with the journal of the last commit goes on from
    there, dropping what was written after it.  `counts[split]` has the tokens and documents added so far.
    """

    def __init__(self, folder, tokenizer_json, vocab_size, end_of_text_id, journal=None):
        self.folder, self.partial = Path(folder), partial_folder(folder)
        self.tokenizer_json, self.vocab_size, self.end_of_text_id = tokenizer_json, vocab_size, end_of_text_id
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.counts = {s: dict(journal[s]) if journal else {"tokens": 0, "documents": 0} for s in SPLITS}
        self.partial.mkdir(parents=True, exist_ok=True)
        (self.partial / "tokenizer.json").write_bytes(tokenizer_json.encode())
        self.files = {}  # split -> (token ids, document starts), both raw while the folder is partial
        for split, count in self.counts.items():
            sizes = {"bin": count["tokens"] * self.dtype.itemsize, "starts": count["documents"] * 8}
            self.files[split] = [open(self.partial / f"{split}.{end}", "ab") for end in sizes]
            for file, size in zip(self.files[split], sizes.values()):
                if os.path.getsize(file.name) < size:
                    raise InputError(f"{file.name} is too short: delete {self.partial} and start again")
                file.truncate(size)

    @property
    def n_tokens(self):
        return sum(count["tokens"] for count in self.counts.values())

    def add(self, split, ids):
        """Appends one document: a non-empty list or array of token ids, end-of-text included where there is one."""
        tokens, starts = self.files[split]
        tokens.write(np.asarray(ids, dtype=self.dtype).tobytes())
        starts.write(np.int64(self.counts[split]["tokens"]).tobytes())
        self.counts[split]["tokens"] += len(ids)
        self.counts[split]["documents"] += 1

    def commit(self, **state):
        """Makes all that was added durable and journals it, together with `state` (of whoever feeds the writer)."""
        for file in (f for files in self.files.values() for f in files):
            file.flush()
            os.fsync(file.fileno())
        write_json(self.partial / JOURNAL, {**state, **self.counts})

    def finish(self, source, val_fraction=None):
        """Writes `meta.json` and gives the folder its final name.  source: where the text is from, JSON-able."""
        for split, files in self.files.items():
            for file in files:
                file.close()
            np.save(self.partial / f"{split}.docs.npy", np.fromfile(self.partial / f"{split}.starts", dtype=np.int64))
        write_json(self.partial / "meta.json", {
            "format": FORMAT, "dtype": self.dtype.name, "vocab_size": self.vocab_size,
            "tokenizer_sha256": hashlib.sha256(self.tokenizer_json.encode()).hexdigest(),
            "end_of_text_id": self.end_of_text_id, "val_fraction": val_fraction, "source": source, **self.counts,
        })
        os.replace(self.partial, self.folder)
        for leftover in ("train.starts", "val.starts", JOURNAL):  # only now: a crash before the rename can go on
            (self.folder / leftover).unlink(missing_ok=True)


def partial_folder(folder):
    """Where `folder` is written until it is whole."""
    return Path(f"{folder}.partial")


def write_dataset(folder, tokenizer_json, vocab_size, end_of_text_id, splits, source, val_fraction=None):
    """Writes a whole prepared folder at once, replacing one that is there.

    splits: {"train": documents, "val": documents}, a document being a list or array of token ids.
    end_of_text_id: None where the text has no such token.
    """
    writer = DatasetWriter(folder, tokenizer_json, vocab_size, end_of_text_id)
    for split, documents in splits.items():
        for ids in documents:
            writer.add(split, ids)
    if (Path(folder) / "meta.json").exists():
        shutil.rmtree(folder)
    writer.finish(source, val_fraction)


class TokenDataset:
    """One split ('train' or 'val') of a prepared folder, memory-mapped; all its files are checked when it is opened.

    Attributes: `meta` (the dict of meta.json), `n_tokens`, `tokenizer_path`.
    """

    def __init__(self, folder, split):
        folder = Path(folder)
        self.split, self.tokenizer_path = split, folder / "tokenizer.json"
        self.mend = f"delete {folder} and prepare it again (python data/prepare.py ...)"
        if not folder.is_dir():
            hint = ": its preparation was interrupted, give the same command again" if partial_folder(
                folder).is_dir() else ": make it with data/prepare.py (see README), or check the path"
            raise InputError(f"there is no prepared data in {folder}{hint}")
        for name in ("meta.json", "tokenizer.json", f"{split}.bin", f"{split}.docs.npy"):
            self._require((folder / name).is_file(), f"{folder} has no {name}")

        self.meta = meta = read_json(folder / "meta.json")
        self._require(meta is not None, f"{folder / 'meta.json'} is not a JSON object")
        self._require(meta.get("format") == FORMAT, f"{folder} is not of format {FORMAT}, the one this version reads")
        count = meta.get(split)
        whole = isinstance(count, dict) and meta.get("dtype") in ("uint16", "uint32") and all(
            type(n) is int and n >= 0 for n in (count.get("tokens"), count.get("documents"), meta.get("vocab_size")))
        self._require(whole, f"{folder / 'meta.json'} lacks, or garbles, dtype, vocab_size or the counts of {split}")
        self._require(hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest() == meta.get("tokenizer_sha256"),
                      f"{self.tokenizer_path} is not the tokenizer that made these tokens")

        self.n_tokens, dtype = count["tokens"], np.dtype(meta["dtype"])
        size, expected = (folder / f"{split}.bin").stat().st_size, self.n_tokens * dtype.itemsize
        self._require(size == expected, f"{folder}/{split}.bin has {size:,} bytes where meta.json says {expected:,}")
        self._require(size > 0, f"{folder}/{split}.bin is empty")
        self._tokens = np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r")
        try:
            self._starts = np.load(folder / f"{split}.docs.npy")
        except (ValueError, EOFError):
            raise InputError(f"{folder}/{split}.docs.npy cannot be read: {self.mend}") from None
        starts = self._starts
        self._require(starts.dtype == np.int64 and starts.shape == (count["documents"],) and len(starts)
                      and starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < self.n_tokens,
                      f"{folder}/{split}.docs.npy does not hold {count['documents']:,} ascending document starts")

    def _require(self, condition, problem):
        if not condition:
            raise InputError(f"{problem}: {self.mend}")

    def last_start(self, length):
        """Where the last window of `length` tokens starts; InputError where not one fits."""
        if length > self.n_tokens:
            raise InputError(f"a window of {length:,} tokens does not fit in the {self.n_tokens:,} tokens of the "
                             f"{self.split} split: prepare more text, or lower max_length")
        return self.n_tokens - length

    def windows(self, starts, length):
        """Tokens and document indices of the windows at `starts`, both (B, length) int64."""
        starts = np.asarray(starts, dtype=np.int64)
        assert ((starts >= 0) & (starts <= self.last_start(length))).all(), "a window reaches outside the split"
        places = starts[:, None] + np.arange(length)  # (B, length)
        tokens = self._tokens[places].astype(np.int64)
        self._require(tokens.size == 0 or tokens.max() < self.meta["vocab_size"],
                      f"the {self.split} split holds a token id beyond its vocabulary of {self.meta['vocab_size']:,}")
        docs = np.searchsorted(self._starts, places, side="right") - 1
        return torch.from_numpy(tokens), torch.from_numpy(docs)

    def batch(self, seed, step, indices, length):
        """Random windows: each is a function of (seed, step, its global sample index) and of nothing else.

        So neither the micro-batch size nor the number of ranks changes what a step is trained on.
        """
        last = self.last_start(length)
        return self.windows([np.random.default_rng([seed, step, i]).integers(last + 1) for i in indices], length)

    def evenly(self, n, length):
        """The same `n` evenly spaced windows every time (fewer where the split has fewer different ones).

        They do not overlap where n * length tokens exist.
        """
        last = self.last_start(length)
        n = min(n, last + 1)
        return self.windows(np.arange(n) * last // max(n - 1, 1), length)
