"""Where text comes from: the files of a folder or of a Hugging Face dataset, and the documents in each."""

import gzip
import io
import json
import re
import time
import zlib
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from nanoqstar import InputError
from nanoqstar.dataset import partial_folder
from nanoqstar.hf import hub_error

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "text"}
DOCUMENT_CHARS = 2**16  # plain text is cut into documents of about this size: so one big file has a val split, too


# ---- which files


def file_kind(name):
    """'parquet', 'jsonl' or 'text' by the ending of the name, or by the one before .gz; None for all others."""
    return KINDS.get(Path(name.lower().removesuffix(".gz")).suffix)


def looks_readable(path):
    """Whether a folder's file is data by its name, or begins as UTF-8 text; .json may be anything and is left out."""
    name = path.name.lower()
    if name.endswith((".parquet", ".jsonl", ".json", ".gz")):
        return file_kind(name) is not None and not name.endswith((".json", ".json.gz"))
    try:
        with open(path, encoding="utf-8") as file:
            return "\0" not in file.read(2**20)
    except UnicodeDecodeError:
        return False


def local_files(root, out):
    """Sorted paths of the readable files in `root`, a file or a folder; hidden ones and those of `out` are left out."""
    if not root.exists():
        raise InputError(f"--input: there is no file or folder {root}")
    if root.is_file():
        return [str(root)]
    ours = {out, partial_folder(out)}
    found = [path for path in sorted(root.rglob("*")) if path.is_file() and ours.isdisjoint(path.parents)
             and "/." not in f"/{path.relative_to(root).as_posix()}"]
    files = [str(path) for path in found if looks_readable(path)]
    if len(files) < len(found):
        print(f"skipped {len(found) - len(files)} of {len(found)} files: .json, binary, or not UTF-8")
    if not files:
        raise InputError(f"--input: {root} holds no .txt, .jsonl, .parquet or other text file")
    return files


def fetch(call, name, *args, **options):
    """call(name, ...) of the Hub's client, its failures as one sentence."""
    try:
        return call(name, *args, **options)
    except Exception as error:  # of the Hub's client or of its HTTP library, which depends on its version
        raise hub_error(name, error) from None


def train_patterns(data_files):
    """The train split's patterns; a card's `data_files` is a pattern, or a list of patterns or {split, path} dicts."""
    patterns = []
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        paths = entry if isinstance(entry, str) else entry["path"] if entry["split"] == "train" else []
        patterns += [paths] if isinstance(paths, str) else paths
    return patterns


def hub_files(name, subset):
    """(training files, revision) of a dataset's subset, by its card's configs or else by the folder of that name."""
    info = fetch(HfApi().dataset_info, name)
    names = sorted(file.rfilename for file in info.siblings or [] if file_kind(file.rfilename))
    configs = {c.get("config_name", "default"): c for c in (info.card_data or {}).get("configs") or []}
    if configs and subset not in configs:
        raise InputError(f"{name} has no subset {subset!r}; --dataset_subset can be {', '.join(configs)}")
    if configs:
        patterns = train_patterns(configs[subset].get("data_files") or f"{configs[subset].get('data_dir', subset)}/*")
    else:
        patterns = ["*" if subset == "default" else f"{subset}/*"]
        names = [n for n in names if not re.search(r"(?<![a-z])(test|val|validation|dev)(?![a-z])", n)]
    files = [n for n in names if any(fnmatchcase(n, pattern.replace("**/", "*")) for pattern in patterns)]
    if not files:
        raise InputError(f"{name} has no training files (.parquet, .jsonl, .json or .txt) in the subset {subset!r}: "
                         "choose another --dataset_subset")
    return files, info.sha


# ---- documents of a file


def read_text(file, cfg):
    """Pieces of about DOCUMENT_CHARS, cut at line ends where there are any."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    while piece := text.read(DOCUMENT_CHARS):
        yield piece + text.readline(DOCUMENT_CHARS)


def read_jsonl(file, cfg):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield text_of(row, f"line {number}", cfg)


def read_parquet(file, cfg):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError("reading .parquet needs pyarrow: pip install -e '.[data]'") from None
    parquet = ParquetFile(file, pre_buffer=False)  # or it reads far ahead, and the share read so far says nothing
    names = parquet.schema_arrow.names
    columns = [name for name in names if name in (cfg.text_field, "int_score")] if cfg.text_field in names else None
    for batch in parquet.iter_batches(batch_size=64, columns=columns):
        yield from (text_of(row, "a row", cfg) for row in batch.to_pylist())


def text_of(row, where, cfg):
    """The text of a dict, or None where its int_score is too low; ValueError where it has none."""
    if not isinstance(row, dict) or not isinstance(row.get(cfg.text_field, 0), str | None):
        found = f"the fields {', '.join(row)}" if isinstance(row, dict) else "no JSON object"
        raise ValueError(f"{where} has no text in {cfg.text_field!r}, but {found}; --text_field names another")
    score = row.get("int_score")
    return row[cfg.text_field] if score is None or score >= cfg.min_score else None


def read_documents(path, name, cfg):
    """Yields (share of the file read so far, text) for every document that passes the filter."""
    kind = file_kind(name) or "text"
    try:
        with open(path, "rb") as raw, gzip.open(raw) if name.lower().endswith(".gz") else raw as file:
            size = Path(path).stat().st_size
            for text in {"text": read_text, "jsonl": read_jsonl, "parquet": read_parquet}[kind](file, cfg):
                if text and not text.isspace():  # JSON can hold half a surrogate pair, UTF-8 cannot
                    yield raw.tell() / size, text.encode("utf-8", "replace").decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{name} cannot be read as {kind}: {error}") from None


class Source:
    """Files to read, here or, with a `revision`, on the Hub; `waited` counts the seconds that the Hub took."""

    def __init__(self, cfg, files, revision=None):
        self.cfg, self.files, self.revision, self.waited = cfg, files, revision, 0.0

    def local_path(self, name):
        if not self.revision:
            return name
        start = time.perf_counter()
        path = fetch(hf_hub_download, self.cfg.dataset_name, name, repo_type="dataset", revision=self.revision)
        self.waited += time.perf_counter() - start
        return path

    def documents(self, file=0, skip=0):
        """Yields (index of the file, documents of it so far, share of all read so far, text) from a place on."""
        for index in range(file, len(self.files)):
            name = self.files[index]
            for number, (share, text) in enumerate(read_documents(self.local_path(name), name, self.cfg), 1):
                if number > skip:
                    yield index, number, (index + share) / len(self.files), text
            skip = 0
