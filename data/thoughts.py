"""Thoughts that a file gives to documents, as `data/prepare.py --thoughts` takes them.

A line is {"document": TEXT, "position": N, "thought": TEXT}: what to think after the first N
characters of a document, which is named by its whole text, as the input has it.  Texts are matched
with documents that are tokenized already, so this can be done again at any time.
"""

import gzip
import hashlib
import re
import zlib
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from configs import PrepareConfig
from data.sources import Fault, read_jsonl
from data.writer import DatasetWriter
from nanoqstar import InputError
from nanoqstar.dataset import SPLITS

Rows = dict[str, list["Row"]]  # by document
Faults = dict[str, tuple[int, str]]  # how many of a kind, and the first in words


class Row(NamedTuple):
    where: str
    position: int
    thought: str


def note(faults: Faults, fault: Fault, strict: bool = False) -> None:
    """So many more of its kind; InputError where strict."""
    if strict:
        raise InputError(fault.sentence)
    n, sentence = faults.get(fault.kind, (0, fault.sentence))
    faults[fault.kind] = (n + fault.n, sentence)


def parse(row: Any, where: str) -> tuple[str, Row] | Fault:
    """(document, the rest) of a line."""
    if not isinstance(row, dict):
        return Fault("no thought", f"{where} is no JSON object: a line holds a document, a "
                     "position and a thought")
    for name in ("document", "thought"):
        if not isinstance(row.get(name), str) or not row[name]:
            return Fault("no thought", f"{where} has no text in {name!r}")
    position = row.get("position")
    if type(position) is not int or not 0 <= position <= len(row["document"]):
        return Fault("no position", f"{where} has {str(position)[:20]} in 'position', which counts "
                     f"the characters before the thought, of {len(row['document']):,} there are")
    document, thought = (re.sub("[\ud800-\udfff]+", "\ufffd", row[name])  # as in the text
                         for name in ("document", "thought"))
    return document, Row(where, position, thought)


def read_thoughts(file: str, cfg: PrepareConfig) -> tuple[Rows, Faults]:
    """All of a .jsonl (also .gz), and what is wrong with the others. InputError: none is right."""
    rows, faults = defaultdict[str, list[Row]](list), Faults()
    try:
        with open(file, "rb") as raw, (
                gzip.open(raw) if file.lower().endswith(".gz") else raw) as lines:
            for line, row in read_jsonl(lines, cfg, 0):
                found = parse(row, f"{file}, {line},")
                if isinstance(found, Fault):
                    note(faults, found, cfg.strict)
                else:
                    rows[found[0]].append(found[1])
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"--thoughts: {file} cannot be read: {error}") from None
    if not rows:
        first = next(iter(faults.values()), (0, "it is empty"))[1]
        raise InputError(f"--thoughts: {file} holds no thought: {first}")
    return rows, faults


def digest_of(file: str) -> str:
    """The sum of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as raw:
            while piece := raw.read(2**20):
                digest.update(piece)
    except OSError as error:
        raise InputError(f"--thoughts: {file} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def placed(writer: DatasetWriter, tokenizer: Tokenizer, rows: Rows, faults: Faults, strict: bool
           ) -> tuple[list[tuple[int, list[int]]], int]:
    """Where in the tokens of the train split each thought stands: (index of the token that it
    follows, its ids); and how many stand in held-out documents.

    A thought inside a token comes before that token.  faults: more are added.  InputError: none
    has a place.
    """
    before, after = writer.meta["beginning_ids"], [writer.meta["end_of_text_id"]]
    encodings = {text: tokenizer.encode(text, add_special_tokens=False) for text in rows}
    keys = {np.asarray(before + encoding.ids + after, writer.dtype).tobytes(): text
            for text, encoding in encodings.items()}
    lengths = {len(key) // writer.dtype.itemsize for key in keys}
    found: dict[str, list[tuple[int, list[int]]]] = {split: [] for split in SPLITS}
    for split, thoughts in found.items():
        for start, tokens in writer.documents(split):
            text = keys.pop(tokens.tobytes(), None) if len(tokens) in lengths else None
            if text is None:
                continue  # of equal documents the first has the thoughts
            ends = np.array([end for _, end in encodings[text].offsets])
            for where, position, thought in rows[text]:
                n = len(before) + int((ends <= position).sum())
                ids = tokenizer.encode(thought, add_special_tokens=False).ids
                if n and ids:
                    thoughts.append((start + n - 1, ids))
                else:
                    note(faults, Fault("no place", f"{where} has a thought before its document's "
                                       "first token: a thought follows one") if ids else Fault(
                        "no thought", f"{where} has a thought without tokens"), strict)
    for text in keys.values():
        for row in rows[text]:
            note(faults, Fault("no such document", f"{row.where} names a document that the "
                               "prepared text does not have (a line of a .txt is none: give the "
                               "text as .jsonl)"), strict)
    if not found["train"]:
        first = next(iter(faults.values()), (0, "they stand in held-out documents"))[1]
        raise InputError(f"--thoughts: none has a place in the training text: {first}")
    return found["train"], len(found["val"])
