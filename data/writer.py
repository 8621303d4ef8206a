"""Writes prepared token folders: `DatasetWriter`, document by document, or `write_dataset`, at once."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np

from nanoqstar import InputError
from nanoqstar.dataset import FORMAT, SPLITS, partial_folder
from nanoqstar.files import write_json

JOURNAL = "journal.json"


def split_of(text, val_fraction):
    """'val' or 'train', from a hash of the document alone: the same whatever the order of documents and files."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


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
