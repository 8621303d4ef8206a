"""Prepared token folders, as `data/writer.py` leaves them, read by `TokenDataset`.

A folder holds, for each split, the token ids (`train.bin`, raw uint16 or uint32) and the start of every document
(`train.docs.npy`, int64); besides them `tokenizer.json` and `meta.json`, which says what the rest must look like.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from nanoqstar import InputError
from nanoqstar.files import read_json

FORMAT = 1
SPLITS = ("train", "val")


def partial_folder(folder):
    """Where `folder` is written until it is whole."""
    return Path(f"{folder}.partial")


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

        try:
            self.meta = meta = read_json(folder / "meta.json")
        except InputError as error:
            raise InputError(f"{error}: {self.mend}") from None
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
