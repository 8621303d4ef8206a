"""Prepared token folders, as `data/writer.py` leaves them, read by `TokenDataset`.

A folder holds, for each split, the token ids (`train.bin`, raw uint16 or uint32) and the start of
every document (`train.docs.npy`, int64); besides them `tokenizer.json` and `meta.json`, which says
what the rest must look like.  Where thoughts were given to the text, they are in
`train.thoughts.safetensors`.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch

from nanoqstar import InputError
from nanoqstar.files import read_json, read_small

FORMAT = 1
SPLITS = ("train", "val")
THOUGHTS = "train.thoughts.safetensors"
BLOCKS, BLOCK = 1024, 4096  # that tell data from others, and their bytes
KINDS, PHASES = ("windows", "thoughts"), (
    "pretrain", "think", "text", "eval", "sample", "warm")


def stream(kind: str, phase: str, step: int, index: int, seed: int) -> np.random.Generator:
    """The random numbers of one sample: what is drawn, in which phase of a run, at which update,
    for which global sample index.

    Always five numbers, of which only the last may need more than 32 bits: numpy pads shorter seeds
    with zeros, so that [0, 1] and [0, 1, 0] would be the same.
    """
    assert max(step, index) < 2**32, (step, index)
    return np.random.default_rng([KINDS.index(kind), PHASES.index(phase), step, index, seed])


def partial_folder(folder: str | os.PathLike) -> Path:
    """Where `folder` is written until it is whole."""
    return Path(f"{folder}.partial")


def garbled(meta: dict[str, Any], split: str) -> bool:
    """Whether something that reading `split` needs is missing from meta.json, or is no such."""
    def are_counts(*values: Any) -> bool:
        return all(type(n) is int and n >= 0 for n in values)

    count, vocab_size, ids = meta.get(split), meta.get("vocab_size"), meta.get("beginning_ids", [])
    return not (isinstance(count, dict) and meta.get("dtype") in ("uint16", "uint32")
                and are_counts(count.get("tokens"), count.get("documents"), vocab_size)
                and isinstance(ids, list) and are_counts(*ids))


class Thoughts(NamedTuple):
    """Those that the text was given: n of them, in order of position."""

    positions: np.ndarray  # (n,) int64: of the token of the split that each follows
    ends: np.ndarray  # (n,) int64: where each ends in ids; it begins where the one before ends
    ids: np.ndarray  # int64: their tokens, one after the other

    def of(self, n: int) -> np.ndarray:
        return self.ids[self.ends[n - 1] if n else 0:self.ends[n]]

    def sound(self, n_tokens: int, vocab_size: int) -> bool:
        """Whether they can be of a split of so many tokens."""
        lengths = np.diff(self.ends, prepend=0)
        return (all(x.dtype == np.int64 and x.ndim == 1 for x in self)
                and 0 < len(self.positions) == len(self.ends) and bool((lengths > 0).all())
                and bool((np.diff(self.positions) >= 0).all()) and self.positions[0] >= 0
                and self.positions[-1] < n_tokens and self.ends[-1] == len(self.ids)
                and bool((self.ids >= 0).all()) and bool((self.ids < vocab_size).all()))


class TokenDataset:
    """One split ('train' or 'val') of a prepared folder, memory-mapped.

    All its files are checked when it is opened: InputError for what is missing or does not fit.
    Attributes: `meta` (the dict of meta.json), `n_tokens`, `tokenizer_path`, `beginning_ids`, which
    stand before each document (None: the folder was made before there were any), and `thoughts`.
    """

    def __init__(self, folder: str | os.PathLike, split: str) -> None:
        folder = Path(folder)
        self.split, self.tokenizer_path = split, folder / "tokenizer.json"
        self.mend = f"delete {folder} and prepare it again (python data/prepare.py ...)"
        if not folder.is_dir():
            hint = "make it with data/prepare.py (see README), or check the path"
            if partial_folder(folder).is_dir():
                hint = "its preparation goes on or was interrupted, give the same command again"
            raise InputError(f"there is no prepared data in {folder}: {hint}")
        if not (folder / "meta.json").is_file():  # it may be anything: no word of deleting
            raise InputError(f"{folder} is no prepared data (no meta.json): name a folder that "
                             "data/prepare.py made")
        tokens, offsets = folder / f"{split}.bin", folder / f"{split}.docs.npy"
        for file in (self.tokenizer_path, tokens, offsets):
            self._require(file.is_file(), f"{folder} has no {file.name}")

        try:
            self.meta = meta = read_json(folder / "meta.json")
        except InputError as error:
            raise InputError(f"{error}: {self.mend}") from None
        self._require(meta.get("format") == FORMAT,
                      f"{folder} is not of format {FORMAT}, the one this version reads")
        self._require(not garbled(meta, split), f"{folder / 'meta.json'} lacks, or garbles, dtype, "
                      f"vocab_size, beginning_ids or the counts of {split}")
        digest = hashlib.sha256(read_small(self.tokenizer_path)).hexdigest()
        self._require(digest == meta.get("tokenizer_sha256"),
                      f"{self.tokenizer_path} is not the tokenizer that made these tokens")
        self.beginning_ids: list[int] | None = meta.get("beginning_ids")
        self.n_tokens: int = meta[split]["tokens"]

        size, dtype, n = tokens.stat().st_size, np.dtype(meta["dtype"]), meta[split]["documents"]
        expected = self.n_tokens * dtype.itemsize
        self._require(size == expected,
                      f"{tokens} has {size:,} bytes where meta.json says {expected:,}")
        self._require(size > 0, f"{tokens} is empty")
        self._tokens = np.memmap(tokens, dtype=dtype, mode="r")
        try:
            self._starts = starts = np.lib.format.open_memmap(offsets, mode="r")
        except Exception:  # a damaged header brings any: OverflowError, tokenize.TokenError ..
            raise InputError(f"{offsets} cannot be read: {self.mend}") from None
        self._require(starts.dtype == np.int64 and starts.shape == (n,) and n and starts[0] == 0
                      and (np.diff(starts) > 0).all() and starts[-1] < self.n_tokens,
                      f"{offsets} does not hold {n:,} ascending document starts")
        self.thoughts: Thoughts | None = None
        if split == "train" and "thoughts_sha256" in meta:
            self.thoughts = self._read_thoughts(folder / THOUGHTS)

    def _read_thoughts(self, file: Path) -> Thoughts:
        self._require(file.is_file(), f"{file.parent} has no {file.name}")
        raw = file.read_bytes()
        self._require(hashlib.sha256(raw).hexdigest() == self.meta["thoughts_sha256"],
                      f"{file} does not hold the thoughts that were given to this text")
        try:
            found = Thoughts(**safetensors.numpy.load(raw))
            sound = found.sound(self.n_tokens, self.meta["vocab_size"])
        except Exception:  # whatever the sum was made of
            sound = False
        self._require(sound, f"{file} holds no thoughts of this text")
        return found

    def _require(self, condition: Any, problem: str) -> None:
        if not condition:
            raise InputError(f"{problem}: {self.mend}")

    @cached_property
    def fingerprint(self) -> str:
        """Of meta.json, document starts and tokens; of large ones BLOCKS blocks, evenly spaced."""
        digest = hashlib.sha256((self.tokenizer_path.parent / "meta.json").read_bytes())
        for x in (self._starts, self._tokens):
            raw = x.view(np.uint8)
            n = min(BLOCKS, -(-len(raw) // BLOCK))
            for start in np.arange(n) * max(0, len(raw) - BLOCK) // max(1, n - 1):
                digest.update(raw[start:start + BLOCK].tobytes())
        return digest.hexdigest()

    def last_start(self, length: int) -> int:
        """Where the last window of `length` tokens starts; InputError where not one fits."""
        if length > self.n_tokens:
            raise InputError(f"a window of {length:,} tokens does not fit in the {self.n_tokens:,} "
                             f"tokens of the {self.split} split: prepare more text, or lower "
                             "max_length")
        return self.n_tokens - length

    def windows(self, starts: Iterable[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and document indices of the windows at `starts`, both (B, length) int64."""
        first = np.asarray(starts, dtype=np.int64)
        inside = (first >= 0) & (first <= self.last_start(length))
        assert inside.all(), "a window reaches outside the split"
        places = first[:, None] + np.arange(length)  # (B, length)
        tokens, n_ids = self._tokens[places].astype(np.int64), self.meta["vocab_size"]
        self._require(tokens.size == 0 or tokens.max() < n_ids,
                      f"the {self.split} split holds a token id beyond its vocabulary of {n_ids:,}")
        docs = np.searchsorted(self._starts, places, side="right") - 1
        return torch.from_numpy(tokens), torch.from_numpy(docs)

    def batch(self, seed: int, phase: str, step: int, indices: Iterable[int], length: int
              ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random windows: each is a function of (seed, phase, step, its global sample index) alone.

        So neither the micro-batch size nor the number of ranks changes what a step is trained on.
        """
        last = self.last_start(length)
        draws = (stream("windows", phase, step, i, seed) for i in indices)
        return self.windows([int(rng.integers(last + 1)) for rng in draws], length)

    def thought_batch(self, seed: int, step: int, indices: Iterable[int], n_positions: int,
                      n_talk: int, n_sampled: int
                      ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Windows of T + A tokens: of two neighbours one around a given thought drawn at random,
        with all given thoughts that stand in it, and one anywhere, without; functions of the same
        as those of `batch`.

        Returns text and document indices (B, T+A), and thoughts (B, 1, T, S): their first S tokens,
        -1 after their end and where there are none.
        """
        known, last, starts, thoughts = self.thoughts, self.last_start(n_positions + n_talk), [], []
        assert known is not None
        for index in indices:
            rng = stream("windows", "warm", step, index, seed)
            start, inside = int(rng.integers(last + 1)), np.zeros(2, int)
            if (step + index) % 2 == 0:
                drawn = known.positions[rng.integers(len(known.positions))]
                start = min(max(int(drawn - rng.integers(n_positions)), 0), last)
                inside = np.searchsorted(known.positions, (start, start + n_positions))
            starts.append(start)
            given = np.full((1, n_positions, n_sampled), -1)
            for n in rng.permutation(np.arange(*inside)):  # of several in a place, any
                ids = known.of(n)[:n_sampled]
                place = given[0, known.positions[n] - start]
                place[:], place[:len(ids)] = -1, ids
            thoughts.append(given)
        text, docs = self.windows(starts, n_positions + n_talk)
        return text, docs, torch.from_numpy(np.stack(thoughts))

    def evenly(self, n: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same `n` evenly spaced windows every time (fewer where fewer different ones exist).

        They do not overlap where n * length tokens exist.
        """
        last = self.last_start(length)
        n = min(n, last + 1)
        return self.windows(np.arange(n) * last // max(n - 1, 1), length)


def prefetched(read: Callable[[int], Any], steps: range) -> Iterator[Any]:
    """read(step) of every step, each while the one before is worked on."""
    reader = ThreadPoolExecutor(1)
    try:
        upcoming = reader.submit(read, steps[0])
        for step in steps:
            now = upcoming.result()
            if step + 1 < steps.stop:
                upcoming = reader.submit(read, step + 1)
            yield now
    finally:  # nobody waits for a batch that nobody wants
        reader.shutdown(wait=False, cancel_futures=True)
