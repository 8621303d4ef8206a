"""Where text comes from: the files of a folder or of a Hugging Face dataset, their documents."""

import gzip
import io
import json
import re
import time
import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, hf_hub_download

from configs import PrepareConfig
from nanoqstar import InputError
from nanoqstar.dataset import partial_folder
from nanoqstar.hub import fetch

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "text"}
DOCUMENT_CHARS = 2**16  # plain text is cut into documents of about this size ..
SMALL_DOCUMENT_CHARS = 2**12  # .. or less, down to this, so that there are 64 of them to split
LONGEST_LINE = 2**25  # bytes of a line of JSON; what is longer is none, and would fill the memory
HOPELESS = 1000  # rows without text at the very beginning: --text_field must be wrong


# ---- which files


def file_kind(name: str) -> str | None:
    """'parquet', 'jsonl' or 'text' by the ending of the name, or by the one before .gz."""
    return KINDS.get(Path(name.lower().removesuffix(".gz")).suffix)


def looks_readable(path: Path) -> bool:
    """Whether a file is data by its name, or begins, unzipped, as UTF-8 with hardly a bad byte."""
    if file_kind(path.name) in ("jsonl", "parquet"):
        return True
    zipped = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            sample = file.read(2**20)
    except (OSError, EOFError, zlib.error):
        if zipped:
            return True  # to be named as a fault
        raise
    n_bad = len(re.findall("[\udc80-\udcff]", sample.decode("utf-8", "surrogateescape")))
    return b"\0" not in sample and n_bad * 100 <= len(sample)


def local_files(root: Path, out: Path) -> list[str]:
    """Sorted paths of the readable files in `root`, a file or a folder; InputError: there is none.

    Of a folder, hidden files, those of `out` and .json, which may hold anything, are left out.
    """
    if not root.exists():
        raise InputError(f"--input: there is no file or folder {root}")
    if root.is_file():
        if not looks_readable(root):
            raise InputError(f"--input: {root} is no UTF-8 text: convert it first")
        return [str(root)]
    ours = {out, partial_folder(out)}
    found = [path for path in sorted(root.rglob("*")) if path.is_file()
             and ours.isdisjoint(path.parents)
             and "/." not in f"/{path.relative_to(root).as_posix()}"]
    files = [str(path) for path in found
             if not path.name.lower().endswith((".json", ".json.gz"))
             and (file_kind(path.name) or path.suffix.lower() != ".gz") and looks_readable(path)]
    if len(files) < len(found):
        print(f"skipped {len(found) - len(files)} of {len(found)} files: .json, binary, or not "
              "UTF-8")
    if not files:
        raise InputError(f"--input: {root} holds no .txt, .jsonl, .parquet or other text file")
    return files


def train_patterns(data_files: Any) -> list[str]:
    """The train split's, of a card's `data_files`: a pattern, or a list of them or of dicts."""
    patterns: list[str] = []
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        paths = entry
        if isinstance(entry, dict):
            paths = entry.get("path", []) if entry.get("split", "train") == "train" else []
        patterns += [paths] if isinstance(paths, str) else paths
    return patterns


def hub_files(name: str, subset: str) -> tuple[list[str], str]:
    """(training files, revision) of a dataset's subset, by its card, else by its folder's name."""
    info = fetch(HfApi().dataset_info, name)
    names = sorted(file.rfilename for file in info.siblings or [] if file_kind(file.rfilename))
    configs = {c.get("config_name", "default"): c
               for c in (info.card_data or {}).get("configs") or []}
    if configs and subset not in configs:
        raise InputError(f"{name} has no subset {subset!r}; --dataset_subset can be "
                         f"{', '.join(configs)}")
    if configs:
        config = configs[subset]
        patterns = train_patterns(config.get("data_files")
                                  or f"{config.get('data_dir', subset)}/*")
    else:
        patterns = ["*" if subset == "default" else f"{subset}/*"]
        other = re.compile(r"(?<![a-z])(test|val|validation|dev)(?![a-z])")
        names = [n for n in names if not other.search(n)]
    files = [n for n in names if any(fnmatchcase(n, p.replace("**/", "*")) for p in patterns)]
    if not files:
        raise InputError(f"{name} has no training files (.parquet, .jsonl, .json or .txt) in the "
                         f"subset {subset!r}: choose another --dataset_subset")
    return files, info.sha


# ---- documents of a file


class Fault(NamedTuple):
    """Text that is left out, or whose bad bytes are replaced, `n` times in one place."""

    kind: str
    sentence: str
    n: int = 1


class Item(NamedTuple):
    """The `number`-th thing found in the `file`-th file: a text, a fault, or a text with one."""

    file: int
    number: int
    share: float  # of all files that is read by then
    text: str
    fault: Fault | None


def read_text(file: Any, cfg: PrepareConfig, n_chars: int) -> Iterator[tuple[str, Any]]:
    """Pieces of about `n_chars`, cut at line ends where there are any."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
    for number, piece in enumerate(iter(lambda: text.read(n_chars), ""), 1):
        yield f"document {number}", piece + text.readline(n_chars)


def read_jsonl(file: Any, cfg: PrepareConfig, n_chars: int) -> Iterator[tuple[str, Any]]:
    lines = iter(lambda: file.readline(LONGEST_LINE), b"")
    for number, line in enumerate(lines, 1):
        cut = rest = len(line) == LONGEST_LINE and line[-1:] != b"\n"
        while rest:
            rest = file.readline(LONGEST_LINE)[-1:] not in (b"\n", b"")
        if line.strip():
            try:
                row = None if cut else json.loads(line.decode("utf-8-sig", "surrogateescape"))
            except (ValueError, RecursionError):
                row = None
            yield f"line {number}", row


def read_parquet(file: Any, cfg: PrepareConfig, n_chars: int) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError("reading .parquet needs pyarrow: pip install -e '.[data]'") from None
    parquet = ParquetFile(file, pre_buffer=False)  # or it reads far ahead of the share read so far
    names = parquet.schema_arrow.names
    columns = [name for name in names if name in (cfg.text_field, "int_score")]
    batches = parquet.iter_batches(64, columns=columns)
    rows: Iterator[dict] = (row for batch in batches for row in batch.to_pylist())
    if cfg.text_field not in names:  # all that is to be said of the rows
        rows = repeat(dict.fromkeys(names), parquet.metadata.num_rows)
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


TYPES = {int: "a number", float: "a number", list: "a list", dict: "an object"}
READERS = {"text": read_text, "jsonl": read_jsonl, "parquet": read_parquet}


def text_of(row: Any, where: str, cfg: PrepareConfig) -> tuple[str, Fault | None]:
    """The text of a row ('': it has none, or too low an int_score) and what is wrong with it."""
    text, score = row, None
    if isinstance(row, dict):
        text, score = row.get(cfg.text_field, 0), row.get("int_score")
        if not isinstance(text, str | None):
            found = TYPES.get(type(text), type(text).__name__)
            if cfg.text_field not in row:
                names = [repr(name)[:60] for name in row]
                found = f"the fields {', '.join(names[:10])}{', ..' if names[10:] else ''}"
            return "", Fault(f"no text in {cfg.text_field!r}", f"{where} has no text in "
                             f"{cfg.text_field!r}, but {found}; --text_field names another")
    elif not isinstance(row, str):
        return "", Fault("no JSON", f"{where} is no JSON object: a .json or .jsonl file holds one "
                         "object a line")
    if not text or text.isspace() or (isinstance(score, int | float) and score < cfg.min_score):
        return "", None
    try:
        text.encode()
        return text, None
    except UnicodeEncodeError:  # bad bytes; JSON can also hold half a surrogate pair
        text, n = re.subn("[\ud800-\udfff]+", "\ufffd", text)
        return text, Fault("no UTF-8", f"{where} has bytes that are no UTF-8", n)


def read_documents(path: str, name: str, cfg: PrepareConfig, n_chars: int
                   ) -> Iterator[tuple[float, str, Fault | None]]:
    """Yields (share of the file read so far, text, fault) for every document or fault."""
    kind = file_kind(name) or "text"
    zipped = name.lower().endswith(".gz")
    try:
        with open(path, "rb") as raw, gzip.open(raw) if zipped else raw as file:
            size = Path(path).stat().st_size or 1  # 0: of one that the system makes up
            for where, row in READERS[kind](file, cfg, n_chars):
                text, fault = text_of(row, f"{name}, {where},", cfg)
                if text or fault:
                    yield min(1.0, raw.tell() / size), text, fault
    except (OSError, EOFError, ValueError, NotImplementedError, OverflowError, zlib.error) as error:
        yield 1.0, "", Fault("cannot be read", f"{name} cannot be read as {kind}: "
                             f"{' '.join(str(error).split())}")


class Source:
    """Files to read, here or, with a `revision`, on the Hub.

    n_bytes: of all files, where that is known.  `waited` counts the seconds that the Hub took.
    """

    def __init__(self, cfg: PrepareConfig, files: list[str], revision: str | None = None,
                 n_bytes: float = float("inf")) -> None:
        self.cfg, self.files, self.revision, self.waited = cfg, files, revision, 0.0
        self.n_chars = int(min(DOCUMENT_CHARS, max(SMALL_DOCUMENT_CHARS, n_bytes / 64)))

    def local_path(self, name: str) -> str:
        if not self.revision:
            return name
        start = time.perf_counter()
        path = fetch(hf_hub_download, self.cfg.dataset_name, name, repo_type="dataset",
                     revision=self.revision)
        self.waited += time.perf_counter() - start
        return path

    def items(self, file: int = 0, skip: int = 0) -> Iterator[Item]:
        """All after the `skip`-th of a file, in order; InputError for a fault (--strict)."""
        for index in range(file, len(self.files)):
            name = self.files[index]
            found = read_documents(self.local_path(name), name, self.cfg, self.n_chars)
            for number, (share, text, fault) in islice(enumerate(found, 1), skip, None):
                if fault and self.cfg.strict:
                    raise InputError(fault.sentence)
                yield Item(index, number, (index + share) / len(self.files), text, fault)
            skip = 0

    def require_documents(self) -> None:
        """InputError, soon, where there are not the two documents that two splits need."""
        n_texts, faults = 0, []
        for item in self.items():
            n_texts += item.text != ""
            faults += [item.fault] if item.fault else []
            if n_texts == 2:
                return
            if not n_texts and len(faults) == HOPELESS:
                break
        if faults:
            raise InputError(faults[0].sentence)
        aside = ""
        if any(file_kind(name) in ("jsonl", "parquet") for name in self.files):
            aside = (f", not counting what has no text in {self.cfg.text_field!r} or an int_score "
                     f"below --min_score {self.cfg.min_score}")
        raise InputError(f"{', '.join(self.files[:3])}: two documents are needed, to train on and "
                         f"to hold out, and there are {n_texts}{aside}: give more than "
                         f"{self.n_chars:,} characters of plain text, or .jsonl with a document a "
                         "line")
