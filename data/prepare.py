"""Text to tokens: a Hugging Face dataset (FineWeb-Edu by default) or local files become a folder of memmaps.

    python data/prepare.py                                         # 200 million tokens of FineWeb-Edu
    python data/prepare.py --input FOLDER --tokenizer train:4096   # your own text and tokenizer, no network

Documents flow file by file: read, filtered, split by the hash of their text, tokenized in batches on all cores.
Interrupted, the same command continues after the last batch.  Downloads stay in the Hugging Face cache.
"""

import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script finds only its own folder
from configs import ConfigError, PrepareConfig, help_text, parse_options
from data.sources import Source, fetch, hub_files, local_files
from nanoqstar import InputError
from data.writer import JOURNAL, DatasetWriter, split_of
from nanoqstar.dataset import SPLITS, TokenDataset, partial_folder
from nanoqstar.files import read_json
from nanoqstar.tokenizer import END_OF_TEXT, end_of_text_id, load_tokenizer

BATCH_CHARS = 2**22  # tokenized at once: enough for all cores, about a second's work for two of them
TRAIN_CHARS = 100 * 10**6  # what a new tokenizer is trained on at most



def train_tokenizer(n_entries, texts):
    """A byte-level BPE of `n_entries`, the 256 bytes and end-of-text included; the same for the same texts."""
    def first_texts(n_chars=TRAIN_CHARS):
        for text in texts:
            yield text
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
        print(f"there is too little text for {n_entries:,} entries: the tokenizer has {tokenizer.get_vocab_size():,}")
    return tokenizer


def find_tokenizer(cfg, source):
    """The tokenizer that `cfg` names, or a new one trained on the train split."""
    if cfg.tokenizer.startswith("train:"):
        texts = (doc[-1] for doc in source.documents())
        return train_tokenizer(int(cfg.tokenizer.removeprefix("train:")),
                               (text for text in texts if split_of(text, cfg.val_fraction) == "train"))
    if Path(cfg.tokenizer).is_dir():
        return load_tokenizer(cfg.tokenizer)
    return load_tokenizer(Path(fetch(hf_hub_download, cfg.tokenizer, "tokenizer.json")).parent)


def batches(docs):
    batch, n_chars = [], 0
    for doc in docs:
        batch.append(doc)
        n_chars += len(doc[-1])
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    yield batch
    yield []  # so that `encoded` hands out the one before


def encoded(tokenizer, docs):
    """Yields batches of (document, encoding): each is tokenized while the last is written and the next is read."""
    with ThreadPoolExecutor(1) as worker:
        last, job = [], None
        for batch in batches(docs):
            texts = [doc[-1] for doc in batch]
            previous, job = job, worker.submit(tokenizer.encode_batch_fast, texts, add_special_tokens=False)
            if last:
                yield zip(last, previous.result())
            last = batch


def tokenize(cfg, source, tokenizer, writer, place, arguments):
    """Reads, tokenizes and writes from `place` on; returns the tokens per second, without waiting for the Hub."""
    limit, end_of_text = cfg.max_tokens or float("inf"), [writer.end_of_text_id]
    docs = source.documents(**place) if writer.n_tokens < limit else ()
    first, start = writer.n_tokens, time.perf_counter() - source.waited
    with tqdm(initial=first, unit="tok", unit_scale=True, desc=writer.folder.name) as bar:
        for batch in encoded(tokenizer, docs):
            for (file, number, share, text), encoding in batch:
                writer.add(split_of(text, cfg.val_fraction), encoding.ids + end_of_text)
                if writer.n_tokens >= limit:
                    break
            writer.commit(arguments=arguments, files=source.files, revision=source.revision,
                          place={"file": file, "skip": number})
            bar.total = min(limit, round(writer.n_tokens / share))
            bar.update(writer.n_tokens - bar.n)
            if writer.n_tokens >= limit:
                break
    return (writer.n_tokens - first) / (time.perf_counter() - source.waited - start)


def require_same(before, now, folder):
    for key, value in now.items():
        if before.get(key) != value:
            raise InputError(f"{folder} was begun with {key} {before.get(key)}, now it is {value}: delete that folder, "
                             "or choose another --out")


def prepare(cfg):
    """Makes the folder --out, from its beginning or from where an interrupted run stopped, and returns its path."""
    root = cfg.input and Path(cfg.input).resolve()
    out = Path(cfg.out or Path(__file__).resolve().parent / (root or Path(cfg.dataset_name)).name.split(".")[0])
    # what decides the result: a run may only continue, or stand for, another with the same
    arguments = {k: getattr(cfg, k) for k in ("text_field", "min_score", "max_tokens", "val_fraction", "tokenizer")}
    if root:
        files = local_files(root, out.resolve())
        size = sum(Path(file).stat().st_size for file in files)
        arguments |= {"input": str(root), "files": len(files), "bytes": size}
    else:
        subset = cfg.dataset_subset or ("sample-10BT" if cfg.dataset_name == PrepareConfig.dataset_name else "default")
        arguments |= {"dataset_name": cfg.dataset_name, "dataset_subset": subset}

    if out.exists():
        if not (out / "meta.json").exists():
            raise InputError(f"{out} exists and is not prepared data: choose another --out")
        for split in SPLITS:
            require_same(TokenDataset(out, split).meta["source"], arguments, out)
        print(f"{out} is already prepared with these arguments; delete it to prepare it again")
        return out
    partial = partial_folder(out)
    journal = read_json(partial / JOURNAL) if (partial / JOURNAL).exists() else None
    if journal:
        require_same(journal["arguments"], arguments, partial)
        source, place = Source(cfg, journal["files"], journal["revision"]), journal["place"]
        tokenizer = load_tokenizer(partial)
        print(f"continuing after file {place['file'] + 1}, document {place['skip']:,}")
    else:
        source = Source(cfg, files) if root else Source(cfg, *hub_files(cfg.dataset_name, subset))
        tokenizer, place = find_tokenizer(cfg, source), {"file": 0, "skip": 0}

    end_of_text = end_of_text_id(tokenizer)
    if end_of_text is None:
        raise InputError(f"--tokenizer: {cfg.tokenizer} has no end-of-text token ({', '.join(END_OF_TEXT)})")
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    writer = DatasetWriter(out, tokenizer.to_str(pretty=True), vocab_size, end_of_text, journal)
    tokenizer.encode_special_tokens = True  # those that the text itself spells stay text
    speed = tokenize(cfg, source, tokenizer, writer, place, arguments)

    n_documents = sum(count["documents"] for count in writer.counts.values())
    for split, count in writer.counts.items():
        if not count["documents"]:
            shutil.rmtree(partial)
            raise InputError(f"the {split} split is empty, of {n_documents:,} documents in all: give more text, or "
                             f"change --val_fraction (now {cfg.val_fraction})")
    writer.finish(arguments | {"revision": source.revision}, cfg.val_fraction)
    train, val = (writer.counts[split]["tokens"] for split in SPLITS)
    print(f"{out}: {train:,} tokens to train on, {val:,} held out, {n_documents:,} documents, {speed:,.0f} tokens/s")
    return out


def main(args):
    if "--help" in args or "-h" in args:
        print(help_text(PrepareConfig, __doc__.strip()))
        return 0
    try:
        cfg = PrepareConfig(**parse_options(PrepareConfig, args))
        out = prepare(cfg)
    except (ConfigError, InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command again goes on after the last batch saved, if any", file=sys.stderr)
        return 130
    preset = "text" if cfg.tokenizer.startswith("train:") else "qwen2_5_3b"  # a new tokenizer needs a new model
    print(f"next: python train.py {preset} --data {shlex.quote(str(out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
