"""Text to tokens: a Hugging Face dataset (FineWeb-Edu by default) or local files become a folder of memmaps.

    python data/prepare.py                                    # 200 million tokens of FineWeb-Edu
    python data/prepare.py --input FOLDER --tokenizer train:4096   # your own text and tokenizer, no network

Documents flow file by file: read, filtered, split by the hash of their text, tokenized in batches on all cores.
Interrupted, the same command continues after the last batch.  Downloads stay in the Hugging Face cache.
"""

import argparse
import difflib
import gzip
import hashlib
import io
import json
import re
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError  # of the HTTP library in use: refused connections are none of the Hub's
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from nanoqstar import InputError
from nanoqstar.data import JOURNAL, DatasetWriter, TokenDataset, partial_folder, read_json, split_of

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
DOCUMENT_CHARS = 2**16  # plain text is cut into documents of about this size: so one big file has a val split, too
BATCH_CHARS = 2**22  # tokenized at once: enough for all cores, about a second's work for two of them
TRAIN_CHARS = 100 * 10**6  # what a new tokenizer is trained on at most


# --- which files -----------------------------------------------------------------------------------------------------

def file_kind(name):
    """'parquet', 'jsonl', 'json' or 'text' by the file's name; None where the name alone does not say."""
    end = Path(name.lower().removesuffix(".gz")).suffix
    if end == ".parquet":
        return "parquet" if name.lower().endswith(end) else None
    return {".jsonl": "jsonl", ".json": "json", ".txt": "text"}.get(end)


def is_text(path):
    """Whether the whole file is UTF-8 text."""
    try:
        with open(path, encoding="utf-8") as file:
            return all("\0" not in chunk for chunk in iter(lambda: file.read(2**20), ""))
    except UnicodeDecodeError:
        return False


def local_files(root, output):
    """Sorted paths of the readable files in `root` (a file or a folder); binary and hidden ones are left out."""
    if not root.exists():
        raise InputError(f"--input: there is no file or folder {root}")
    found = [root] if root.is_file() else sorted(
        path for path in root.rglob("*") if path.is_file() and output not in path.parents
        and partial_folder(output) not in path.parents
        and not any(part.startswith(".") for part in path.relative_to(root).parts))
    # a .txt that is not UTF-8 is skipped among others; given alone, it is an error when read
    checked = (None, "text") if root.is_dir() else (None,)
    files = [path for path in found
             if path.name.lower().endswith(".gz") and file_kind(path.name)
             or file_kind(path.name) not in checked or is_text(path)]
    if len(files) < len(found):
        print(f"skipped {len(found) - len(files)} of {len(found)} files: binary, or not UTF-8")
    if not files:
        raise InputError(f"--input: {root} holds no .txt, .jsonl, .parquet or other text file")
    return [str(path) for path in files]


def glob_regex(pattern):
    """A dataset card's file pattern as a regular expression: `*` stays within a folder, `**` does not."""
    meaning = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(meaning.get(part) or re.escape(part) for part in parts))


def train_patterns(data_files, name):
    """The patterns of the train split; `data_files` as a card has it: a pattern, patterns, or {split, path} dicts."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    plain = [entry for entry in entries if isinstance(entry, str)]
    by_split = {entry["split"]: entry["path"] for entry in entries if isinstance(entry, dict)}
    if not plain and "train" not in by_split:
        raise InputError(f"{name} has no train split, only {', '.join(by_split)}: choose another --dataset_subset")
    paths = plain or by_split["train"]
    return paths if isinstance(paths, list) else [paths]


def hub_files(name, subset):
    """Revision and training files of a dataset's subset, by its card's configs or else by the folder of that name."""
    info = on_hub(lambda: HfApi().dataset_info(name), f"the dataset {name}", "give local text as --input")
    names = sorted(sibling.rfilename for sibling in info.siblings or [])
    configs = {c.get("config_name", "default"): c for c in (info.card_data or {}).get("configs") or []}
    if configs:
        if subset not in configs:
            raise InputError(f"{name} has no subset {subset!r}; --dataset_subset can be {', '.join(configs)}")
        config = configs[subset]
        patterns = train_patterns(config.get("data_files") or f"{config.get('data_dir', subset)}/**", name)
    else:
        patterns = ["**" if subset == "default" else f"{subset}/**"]
        names = [n for n in names if not re.search(r"(?<![a-z])(test|val|validation|dev)(?![a-z])", n)]
    regexes = [glob_regex(pattern) for pattern in patterns]
    files = [n for n in names if file_kind(n) and any(regex.fullmatch(n) for regex in regexes)]
    if not files:
        raise InputError(f"{name} has no .parquet, .jsonl, .json or .txt files for the subset {subset!r} "
                         "(tried: " + ", ".join(patterns) + "): check --dataset_subset")
    return info.sha, files


def on_hub(call, what, instead):
    """call(), with every failure of the network or the Hub as one sentence about `what`."""
    try:
        return call()
    except (OSError, HTTPError, ValueError) as error:
        # hf_hub_download hides some answers of the Hub behind a "not in the cache" error
        responses = (getattr(e, "response", None) for e in (error, error.__cause__))
        status = next((response.status_code for response in responses if response is not None), None)
        reason = str(error).partition("\n")[0]
        raise InputError({
            None: f"{what} cannot be fetched from the Hugging Face Hub ({reason}): check the network, or {instead}",
            401: f"the Hugging Face Hub refuses access to {what} (gated, private or misspelt): accept its terms "
                 "on its page, then set HF_TOKEN or run `hf auth login`",
            404: f"the Hugging Face Hub has no such thing as {what}: check the name, or {instead}",
        }.get(401 if status == 403 else status, f"the Hugging Face Hub answered {status} for {what}: try again later, "
                                                f"or {instead}")) from None


# --- documents of a file ---------------------------------------------------------------------------------------------

def read_documents(path, name, args):
    """Yields (share of the file read so far, text) for every non-empty document of one file that passes the filter."""
    kind = file_kind(name)
    try:
        if kind == "parquet":
            yield from read_parquet(path, name, args)
            return
        with open(path, "rb") as raw, gzip.open(raw) if name.lower().endswith(".gz") else raw as file:
            size = Path(path).stat().st_size
            # a .json is JSON Lines, as on the Hub; but among the files of a folder it may be one like any other
            if kind == "json" and args.input and args.input.is_dir():
                kind = "jsonl" if has_field(file.readline(), args.text_field) else "text"
                file.seek(0)
            for text in read_text(file) if kind in ("text", None) else read_jsonl(file, name, args):
                yield raw.tell() / size, text
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text: convert it (iconv -f latin1 -t utf-8) or leave it out") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{name} is not a whole .gz file: fetch or compress it again") from None


def has_field(line, field):
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and field in record


def read_text(file):
    """Pieces of about DOCUMENT_CHARS, cut at line ends where there are any."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    while piece := text.read(DOCUMENT_CHARS):
        piece += text.readline(DOCUMENT_CHARS)
        if not piece.isspace():
            yield piece


def read_jsonl(file, name, args):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{name}, line {number}: not valid JSON ({error})") from None
        if not isinstance(record, dict) or args.text_field not in record:
            there = f"has {', '.join(record) or 'no field'}" if isinstance(record, dict) else "is not an object"
            raise InputError(f"{name}, line {number}: no field {args.text_field!r}, the line {there}; name the text's "
                             "field with --text_field")
        text = record[args.text_field]
        if text is not None and not isinstance(text, str):
            raise InputError(f"{name}, line {number}: {args.text_field!r} is not a string; name another --text_field")
        if text and passes(record.get("int_score"), args):
            yield text.encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair, UTF-8 cannot


def read_parquet(path, name, args):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"reading {name} needs pyarrow: pip install -e '.[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if args.text_field not in fields:
                raise InputError(f"{name} has no column {args.text_field!r}, only {', '.join(fields)}; name the column "
                                 "of the text with --text_field")
            if file.schema_arrow.field(args.text_field).type not in (pyarrow.string(), pyarrow.large_string()):
                raise InputError(f"{name}: the column {args.text_field!r} holds no text; name another --text_field")
            columns = [field for field in (args.text_field, "int_score") if field in fields]
            done, rows = 0, file.metadata.num_rows
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                done += batch.num_rows
                texts = batch.column(args.text_field).to_pylist()
                scores = batch.column("int_score").to_pylist() if "int_score" in columns else [None] * len(texts)
                yield from ((done / rows, text) for text, score in zip(texts, scores) if text and passes(score, args))
    except pyarrow.ArrowException as error:
        raise InputError(f"{name} is not a readable parquet file ({str(error).partition(chr(10))[0]})") from None


def passes(int_score, args):
    return int_score is None or int_score >= args.min_score


def documents(args, files, revision, file=0, skip=0):
    """Yields (index of the file, documents of it so far, share of all input read so far, text) from a point on."""
    weights = [1 if revision else Path(name).stat().st_size for name in files]
    for index in range(file, len(files)):
        path = name = files[index]
        if revision:
            path = on_hub(lambda: hf_hub_download(args.dataset_name, name, repo_type="dataset", revision=revision),
                          f"{name} of {args.dataset_name}", "give local text as --input")
        for number, (share, text) in enumerate(read_documents(path, name, args), 1):
            if number > skip:
                yield index, number, (sum(weights[:index]) + share * weights[index]) / sum(weights), text
        skip = 0


# --- tokenizer -------------------------------------------------------------------------------------------------------

def tokenizer_file(args):
    """Path of the tokenizer.json that --tokenizer names; None for train:N."""
    if args.tokenizer.startswith("train:"):
        return None
    path = Path(args.tokenizer)
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.exists():
            raise InputError(f"--tokenizer: there is no tokenizer.json in {args.tokenizer}")
    elif not path.exists():
        path = Path(on_hub(lambda: hf_hub_download(args.tokenizer, "tokenizer.json"), f"the tokenizer {args.tokenizer}",
                           "give a folder with a tokenizer.json, or train:4096, as --tokenizer"))
    return path


def train_tokenizer(n_entries, texts):
    """A byte-level BPE of `n_entries`, the 256 bytes and end-of-text included, as JSON; the same for the same texts."""
    def first_texts():
        n_chars = 0
        for text in texts:
            yield text
            n_chars += len(text)
            if n_chars >= TRAIN_CHARS:
                return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(first_texts(), trainers.BpeTrainer(
        vocab_size=n_entries, special_tokens=[END_OF_TEXT[0]], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if tokenizer.get_vocab_size() < n_entries:
        print(f"there is too little text for {n_entries:,} entries: the tokenizer has {tokenizer.get_vocab_size():,}")
    return tokenizer.to_str(pretty=True)


def load_tokenizer(tokenizer_json, name):
    """Tokenizer and end-of-text id; special tokens that the text itself spells stay text, nothing is cut or padded."""
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"--tokenizer: {name} is not a file of the tokenizers library ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    end_of_text = next((i for token in END_OF_TEXT if (i := tokenizer.token_to_id(token)) is not None), None)
    if end_of_text is None:
        raise InputError(f"--tokenizer: {name} has no end-of-text token ({', '.join(END_OF_TEXT)}); use another one")
    return tokenizer, end_of_text


def encoded(tokenizer, docs):
    """Yields batches of (document, encoding): each is tokenized while the last is written and the next is read."""
    def batches():
        batch, n_chars = [], 0
        for doc in docs:
            batch.append(doc)
            n_chars += len(doc[-1])
            if n_chars >= BATCH_CHARS:
                yield batch
                batch, n_chars = [], 0
        if batch:
            yield batch

    with ThreadPoolExecutor(1) as worker:
        last = None
        for batch in batches():
            job = worker.submit(tokenizer.encode_batch_fast, [doc[-1] for doc in batch], add_special_tokens=False)
            if last:
                yield zip(last[0], last[1].result())
            last = batch, job
        if last:
            yield zip(last[0], last[1].result())


# --- the command -----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Its complaints are one sentence, as all others are."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


def parse(argv):
    def max_tokens(text):
        if text == "none":
            return None
        if not text.replace("_", "").isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, or none, not {text!r}")
        return int(text)

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--input", type=Path, help=".txt, .jsonl, .parquet (the first two also .gz) or other text "
                        "file, or a folder of them, instead of a dataset")
    parser.add_argument("--dataset_name", help=f"id of a Hugging Face dataset (default {FINEWEB_EDU})")
    parser.add_argument("--dataset_subset", help="config or folder of it (default sample-10BT of FineWeb-Edu, else "
                        "'default')")
    parser.add_argument("--text_field", default="text", help="column or key of the text (default text)")
    parser.add_argument("--min_score", type=int, default=3, help="least int_score of a document, where the data has "
                        "int_score (default 3)")
    parser.add_argument("--max_tokens", type=max_tokens, default=200_000_000, help="stop after the document that "
                        "reaches this many; none takes all (default 200000000)")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="share of documents held out (default 0.01)")
    parser.add_argument("--tokenizer", default="Qwen/Qwen2.5-3B", help="folder or Hub id with a tokenizer.json, or "
                        "train:N to train a byte-level BPE of N entries on the text (default Qwen/Qwen2.5-3B)")
    parser.add_argument("--out", type=Path, help="folder to make (default: named after the data, beside this file)")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, 1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    if args.input and (args.dataset_name or args.dataset_subset):
        parser.error("--input takes the place of a dataset: leave out --dataset_name and --dataset_subset")
    if not 0 < args.val_fraction < 1:
        parser.error(f"--val_fraction must lie between 0 and 1, not {args.val_fraction}")
    args.n_entries = None
    if args.tokenizer.startswith("train:"):
        count = args.tokenizer.removeprefix("train:")
        if not count.isdecimal() or int(count) < 257:
            parser.error("--tokenizer train:N needs a number of at least 257: 256 bytes and the end-of-text token")
        args.n_entries = int(count)
    args.dataset_name = args.dataset_name or FINEWEB_EDU
    args.dataset_subset = args.dataset_subset or ("sample-10BT" if args.dataset_name == FINEWEB_EDU else "default")
    if args.out is None:
        path = args.input.resolve() if args.input else Path(args.dataset_name)
        args.out = Path(__file__).parent / (path.name.split(".")[0] if path.is_file() else path.name)
    return args


def run_arguments(args, files):
    """What decides the result: a run may only continue, or stand for, another with the same."""
    if args.input:
        size = sum(Path(name).stat().st_size for name in files)
        origin = {"input": str(args.input.resolve()), "files": len(files), "bytes": size}
    else:
        origin = {"dataset_name": args.dataset_name, "dataset_subset": args.dataset_subset}
    if Path(args.tokenizer).exists():
        origin["tokenizer_sha256"] = hashlib.sha256(tokenizer_file(args).read_bytes()).hexdigest()
    return origin | {key: getattr(args, key) for key in ("text_field", "min_score", "max_tokens", "val_fraction",
                                                         "tokenizer")}


def require_same(before, now, folder):
    for key in before | now:
        if before.get(key) != now.get(key):
            raise InputError(f"{folder} was begun with {key} {before.get(key)}, now it is {now.get(key)}: delete that "
                             "folder, or choose another --out")


def prepare(args):
    """Makes the folder `args.out`, from its beginning or from where an interrupted run stopped."""
    files = local_files(args.input, args.out.resolve()) if args.input else None
    arguments, partial = run_arguments(args, files), partial_folder(args.out)
    if args.out.exists():
        meta = read_json(args.out / "meta.json")
        if meta is None or not isinstance(meta.get("source"), dict):
            raise InputError(f"{args.out} exists and is not prepared data: delete it, or choose another --out")
        require_same({k: v for k, v in meta["source"].items() if k != "revision"}, arguments, args.out)
        for split in ("train", "val"):
            TokenDataset(args.out, split)
        print(f"{args.out} is already prepared with these arguments; delete it to prepare it again")
        return

    journal = read_json(partial / JOURNAL)
    if journal:
        require_same(journal["arguments"], arguments, partial)
        files, revision, place = journal["files"], journal["revision"], journal["place"]
        tokenizer_json = (partial / "tokenizer.json").read_bytes().decode()
        print(f"continuing after file {place['file'] + 1}, document {place['skip']:,}")
    else:
        revision, place = None, {"file": 0, "skip": 0}
        if not files:
            revision, files = hub_files(args.dataset_name, args.dataset_subset)
        if args.n_entries:
            print(f"training a tokenizer of {args.n_entries:,} entries")
            texts = (doc[-1] for doc in documents(args, files, revision))
            texts = (text for text in texts if split_of(text, args.val_fraction) == "train")
            tokenizer_json = train_tokenizer(args.n_entries, texts)
        else:
            # what is not UTF-8 is kept for load_tokenizer to refuse
            tokenizer_json = tokenizer_file(args).read_bytes().decode(errors="surrogateescape")
    tokenizer, end_of_text = load_tokenizer(tokenizer_json, args.tokenizer)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    writer = DatasetWriter(args.out, tokenizer_json, vocab_size, end_of_text, journal)

    def n_tokens():
        return sum(count["tokens"] for count in writer.counts.values())

    limit = float("inf") if args.max_tokens is None else args.max_tokens
    docs = documents(args, files, revision, **place) if n_tokens() < limit else ()
    with tqdm(initial=n_tokens(), unit="tok", unit_scale=True, desc=args.out.name) as bar:
        for batch in encoded(tokenizer, docs):
            for (file, number, share, text), encoding in batch:
                writer.add(split_of(text, args.val_fraction), encoding.ids + [end_of_text])
                if n_tokens() >= limit:
                    break
            writer.commit(arguments=arguments, files=files, revision=revision, place={"file": file, "skip": number})
            bar.total = min(limit, round(n_tokens() / share))
            bar.update(n_tokens() - bar.n)
            if n_tokens() >= limit:
                break

    n_documents = sum(count["documents"] for count in writer.counts.values())
    for split, count in writer.counts.items():
        if not count["documents"]:
            shutil.rmtree(partial)
            change = "raise" if split == "val" else "lower"
            raise InputError(f"there is no text in {args.input or args.dataset_name}" if not n_documents else
                             f"the {split} split got no document (of {n_documents:,}): {change} --val_fraction (now "
                             f"{args.val_fraction}), or give more text")
    writer.finish(arguments | ({"revision": revision} if revision else {}), args.val_fraction)
    for split, count in writer.counts.items():
        print(f"{split:5} {count['tokens']:13,} tokens in {count['documents']:9,} documents")
    config = "tiny" if args.n_entries else "qwen2_5_3b"  # a new tokenizer needs a new model
    print(f"written to {args.out}; next: python train.py {config} --data {args.out}")


def main(argv=None):
    try:
        prepare(parse(argv))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command again continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
