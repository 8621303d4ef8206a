"""Text to tokens: a Hugging Face dataset (FineWeb-Edu) or local files become a folder of memmaps.

    python data/prepare.py                                        # 200M tokens of FineWeb-Edu
    python data/prepare.py --input FOLDER --tokenizer train:4096  # your own text, no network
    python data/prepare.py --input FOLDER --thoughts FILE.jsonl   # with thoughts to begin from

Documents flow file by file: read, filtered, split by the hash of their text, tokenized in batches
on all cores.  Interrupted, the same command continues after the last batch.  Downloads stay in the
Hugging Face cache.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only its own folder
from configs import PRESETS, PrepareConfig
from nanoqstar import InputError, cli


def main(args: list[str]) -> int:
    """Exit code of the command line `args`."""
    return cli.command(args, lambda a: (cli.settings(PrepareConfig, a, __doc__ or ""),),
                       "data.prepare:run")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

import errno
import hashlib
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data.sources import Item, Source, hub_files, local_files
from data.thoughts import digest_of, note, placed, read_thoughts
from data.writer import (
    JOURNAL,
    NAMES,
    DatasetWriter,
    read_journal,
    remove_leftovers,
    split_of,
)
from nanoqstar.dataset import SPLITS, TokenDataset, partial_folder
from nanoqstar.files import lock, read_small
from nanoqstar.tokenizer import END_OF_TEXT, beginning_ids, end_of_text_id, load_tokenizer

BATCH_CHARS = 2**22  # tokenized at once: enough for all cores, about a second's work for two
TRAIN_CHARS = 100 * 10**6  # what a new tokenizer is trained on at most


# ---- tokenizers


def train_tokenizer(n_entries: int, texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE, the 256 bytes and end-of-text included; the same for the same texts."""
    def first_texts(n_chars: int = TRAIN_CHARS) -> Iterator[str]:
        for text in texts:
            # cut where there is no space or nothing else: training squares the length of a word
            ends = [run.end() for run in re.finditer(r"\S{1000}|\s{1000}", text)]
            yield from (text[i:j] for i, j in zip([0, *ends], [*ends, len(text)]))
            n_chars -= len(text)
            if n_chars <= 0:
                return

    print(f"training a tokenizer of {n_entries:,} entries")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(first_texts(), trainers.BpeTrainer(
        vocab_size=n_entries, special_tokens=[END_OF_TEXT[0]], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if tokenizer.get_vocab_size() < n_entries:
        print(f"there is too little text for {n_entries:,} entries: the tokenizer has "
              f"{tokenizer.get_vocab_size():,}")
    return tokenizer


def find_tokenizer(cfg: PrepareConfig, source: Source) -> Tokenizer:
    """The tokenizer that `cfg` names, or a new one trained on what hashes to the train split."""
    new = cfg.tokenizer.startswith("train:")
    try:
        tokenizer = None if new else load_tokenizer(cfg.tokenizer)
    except InputError as error:
        if Path(cfg.tokenizer).exists():
            raise
        raise InputError(f"{error}; or, without network, --tokenizer train:4096 makes one of the "
                         "text") from None
    source.require_documents()  # before the long work
    if tokenizer is None:
        texts = (item.text for item in source.items() if item.text)
        tokenizer = train_tokenizer(
            int(cfg.tokenizer.removeprefix("train:")),
            (text for text in texts if split_of(text, cfg.val_fraction) == "train"))
    return tokenizer


def fitting_preset(tokenizer: str) -> str:
    """The words for train.py that name a model with this tokenizer."""
    for name, preset in PRESETS.items():
        if preset.config.model_path == tokenizer:
            return name
    folder = Path(tokenizer)
    if not (folder / "config.json").is_file():
        return "text"  # a new model
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return f"{'qwen2_5_3b' if size > 2**29 else 'text'} --model_path {shlex.quote(tokenizer)}"


# ---- tokens


def batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch, n_chars = [], 0
    for item in items:
        batch.append(item)
        n_chars += len(item.text) + 64  # what has no text takes room, too
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


Encoded = Iterable[tuple[Item, Encoding]]


def encoded(tokenizer: Tokenizer, items: Iterable[Item]) -> Iterator[Encoded]:
    """Yields batches: each is tokenized while the last is written and the next is read."""
    def encode(batch: list[Item]) -> Encoded:
        texts = [item.text for item in batch]
        try:
            return zip(batch, tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"the tokenizer cannot encode this text: {error}") from None

    with ThreadPoolExecutor(1) as worker:
        job = None
        for batch in batches(items):
            last, job = job, worker.submit(encode, batch)
            if last:
                yield last.result()
        if job:
            yield job.result()


def tokenize(cfg: PrepareConfig, source: Source, tokenizer: Tokenizer, writer: DatasetWriter,
             state: dict[str, Any]) -> float:
    """Reads, tokenizes and writes from `state` (the journal's) on; tokens/s, downloads aside."""
    limit, left_out = cfg.max_tokens or float("inf"), state["left_out"]
    before, after = writer.meta["beginning_ids"], [writer.meta["end_of_text_id"]]
    tokenizer.encode_special_tokens = True  # those that the text itself spells stay text
    items = source.items(**state["place"]) if writer.n_tokens < limit else ()
    first, start = writer.n_tokens, time.perf_counter() - source.waited
    with tqdm(initial=first, unit="tok", unit_scale=True, desc=writer.folder.name) as bar:
        for batch in encoded(tokenizer, items):
            for item, encoding in batch:
                if item.fault:
                    note(left_out, item.fault)
                if item.text:
                    writer.add(split_of(item.text, cfg.val_fraction), before + encoding.ids + after)
                if writer.n_tokens >= limit:
                    break
            state["place"] = {"file": item.file, "skip": item.number}
            writer.commit(**state)
            bar.total = min(limit, round(writer.n_tokens / item.share))
            bar.update(writer.n_tokens - bar.n)
            if writer.n_tokens >= limit:
                break
    return (writer.n_tokens - first) / (time.perf_counter() - source.waited - start)


# ---- the folder


OTHER = {"tokenizer_sha256": "another tokenizer.json", "thoughts_sha256": "other --thoughts",
         **dict.fromkeys(("files", "bytes", "names_sizes_times"),
                         "other files: names, sizes or times have changed")}


def require_same(before: Any, now: dict[str, Any], folder: Path) -> None:
    before = {"thoughts_sha256": None} | (before if isinstance(before, dict) else {})
    for key, value in now.items():
        if before.get(key, ...) != value:
            how = "by an earlier version"
            if key in before:
                how = f"with {OTHER.get(key) or f'{key} {before[key]!r}, now it is {value!r}'}"
            raise InputError(f"{folder} was begun {how}: delete that folder, or choose another "
                             "--out")


def is_prepared(out: Path, arguments: dict[str, Any]) -> bool:
    """Whether `out` is there; InputError where it is anything but what `arguments` make."""
    above = next((path for path in out.absolute().parents if path.exists()), out)
    if not above.is_dir() or (out.is_symlink() and not out.exists()):
        raise InputError(f"--out: {out} cannot be made: "
                         f"{'it is a link to nothing' if above.is_dir() else f'{above} is a file'}")
    if not out.exists():
        return False
    if not (out / "meta.json").exists():
        raise InputError(f"{out} exists and is not prepared data: choose another --out")
    for split in SPLITS:
        require_same(TokenDataset(out, split).meta.get("source"), arguments, out)
    remove_leftovers(out)
    print(f"{out} is already prepared with these arguments; delete it to prepare it again")
    return True


@contextmanager
def claimed(partial: Path) -> Iterator[None]:
    """Holds `partial` for this process; where it fails, only what can be continued stays."""
    foreign = InputError(f"{partial}, where --out is written until it is whole, is there and holds "
                         "something else: move it, or choose another --out")
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise foreign
    try:
        with lock(partial):
            inside = [*partial.iterdir()]
            if any(path.is_symlink() for path in inside) or (
                    not (partial / JOURNAL).exists() and not all(
                        path.name in NAMES and path.is_file() for path in inside)):
                raise foreign
            try:
                yield
            except BaseException as error:
                saved = (partial / JOURNAL).exists()
                if not saved:
                    remove_leftovers(partial, NAMES)  # none where it got its final name
                elif isinstance(error, KeyboardInterrupt):
                    print("\nwhat is saved stays: the same command goes on there", file=sys.stderr)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise InputError(
                        f"the disk of {partial} is full: make room, then the same command "
                        f"{'goes on from what is saved' if saved else 'begins anew'}") from None
                raise
    finally:
        with suppress(OSError):  # not empty, or by its final name
            partial.rmdir()


def make(cfg: PrepareConfig, out: Path, arguments: dict[str, Any], files: list[str],
         given: dict[str, Any]) -> None:
    """Makes `out`, from its beginning or from where an interrupted run stopped.

    given: what says which thoughts; they come last, so other ones may be given to what is begun.
    """
    journal, n_bytes = partial_folder(out) / JOURNAL, arguments.get("bytes", float("inf"))
    rows, faults = read_thoughts(cfg.thoughts, cfg) if cfg.thoughts else ({}, {})
    if journal.exists():
        state = read_journal(journal.parent)
        require_same(state["arguments"], arguments, journal.parent)
        source = Source(cfg, files or state["files"], None if files else state["revision"], n_bytes)
        tokenizer, place = load_tokenizer(journal.parent), state["place"]
        print(f"continuing after file {place['file'] + 1}, document {place['skip']:,}")
        counts = state
    else:
        revision, counts = None, None
        if not files:
            files, revision = hub_files(cfg.dataset_name, arguments["dataset_subset"])
        source = Source(cfg, files, revision, n_bytes)
        tokenizer = find_tokenizer(cfg, source)
        state = {"arguments": arguments, "files": files, "revision": revision,
                 "place": {"file": 0, "skip": 0}, "left_out": {}}

    end_of_text = end_of_text_id(tokenizer)
    if end_of_text is None:
        raise InputError(f"--tokenizer: {cfg.tokenizer} has no end-of-text token "
                         f"({', '.join(END_OF_TEXT)})")
    with DatasetWriter(out, tokenizer.to_str(pretty=True), max(tokenizer.get_vocab().values()) + 1,
                       end_of_text, beginning_ids(tokenizer), counts) as writer:
        speed = tokenize(cfg, source, tokenizer, writer, state)
        writer.fill_short_split()
        train, val = (writer.counts[split] for split in SPLITS)
        n_documents = train["documents"] + val["documents"]
        if n_documents < 2:
            journal.unlink()  # not to be continued
            raise InputError(f"a split is empty, of {n_documents} documents in all: give more "
                             "text, or take more of it (--max_tokens, --min_score)")
        thoughts, n_val = placed(writer, tokenizer, rows, faults, cfg.strict) if rows else ([], 0)
        left_out = state["left_out"] | faults
        writer.finish(arguments | given | {"revision": source.revision, "left_out": left_out},
                      cfg.val_fraction, thoughts)
    print(f"{out}: {train['tokens']:,} tokens to train on, {val['tokens']:,} held out, "
          f"{n_documents:,} documents, {speed:,.0f} tokens/s")
    if thoughts:
        print(f"{len(thoughts):,} thoughts to train on" + (
            f"; {n_val:,} of held-out documents are not used" * (n_val > 0)))
    if left_out:
        print("left out, or bytes replaced: " + "; ".join(
            f"{n:,} times {kind} (first: {sentence})" for kind, (n, sentence)
            in left_out.items()) + "; --strict refuses instead")


def run(cfg: PrepareConfig) -> None:
    """Makes the folder --out, where it is not made yet, and says how to go on."""
    root = Path(os.path.realpath(cfg.input)) if cfg.input else None
    out = Path(cfg.out or Path(__file__).resolve().parent
               / (root or Path(cfg.dataset_name)).name.split(".")[0])
    # what decides the result: a run may only continue, or stand for, another with the same
    keys = ("text_field", "min_score", "max_tokens", "val_fraction", "strict", "tokenizer")
    arguments: dict[str, Any] = {key: getattr(cfg, key) for key in keys}
    files: list[str] = []
    if (file := Path(cfg.tokenizer, "tokenizer.json")).is_file():
        arguments["tokenizer_sha256"] = hashlib.sha256(read_small(file)).hexdigest()
    if root:
        files = [file for file in local_files(root, Path(os.path.realpath(out)))
                 if not cfg.thoughts or file != os.path.realpath(cfg.thoughts)]
        stats = [Path(file).stat() for file in files]
        states = repr([(f, s.st_size, s.st_mtime_ns) for f, s in zip(files, stats)])
        arguments |= {"input": str(root), "files": len(files),
                      "bytes": sum(s.st_size for s in stats),
                      "names_sizes_times": hashlib.sha256(states.encode()).hexdigest()}
    else:
        default = "sample-10BT" if cfg.dataset_name == PrepareConfig.dataset_name else "default"
        arguments |= {"dataset_name": cfg.dataset_name,
                      "dataset_subset": cfg.dataset_subset or default}
    given = {"thoughts_sha256": digest_of(cfg.thoughts) if cfg.thoughts else None}
    if not is_prepared(out, arguments | given):
        with claimed(partial_folder(out)):
            if not is_prepared(out, arguments | given):  # another process may just have done it
                make(cfg, out, arguments, files, given)
    print(f"next: python train.py {fitting_preset(cfg.tokenizer)} --data {shlex.quote(str(out))}"
          + " --warm_steps 300" * bool(cfg.thoughts))
