"""What the tests of preparing, of the embedded corpus and of training share."""

import gzip
import json

import numpy as np
from tokenizers import Tokenizer

from data import fold, prepare
from nanoqstar.dataset import TokenDataset

OUTPUT = ("meta.json", "tokenizer.json", "train.bin", "train.docs.npy", "val.bin", "val.docs.npy")
TEXT = "the cat sat on a mat while seven small birds sang in two tall trees by the old stone bridge"
WORDS = TEXT.split()


def sentences(seed, n):
    """n different documents."""
    rng = np.random.default_rng(seed)
    return [f"{seed}-{i} " + " ".join(rng.choice(WORDS, rng.integers(5, 30))) + "\n"
            for i in range(n)]


def write_jsonl(path, texts, field="text", **more):
    lines = "".join(json.dumps({field: text, **more}) + "\n" for text in texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def make_tokenizer(folder):
    """Makes `folder` one with a tokenizer.json, as one that comes with a model."""
    tokenizer = prepare.train_tokenizer(400, sentences(0, 300))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


def runner(tmp_path, tokenizer, capsys):
    """Runs the command in this process; returns its exit status, output and errors."""
    def run(*args, out="out"):
        args = [str(arg) for arg in args] + ["--out", str(tmp_path / out)]
        if "--tokenizer" not in args:
            args += ["--tokenizer", str(tokenizer)]
        status = prepare.main(args)
        return status, *capsys.readouterr()
    return run


def texts_of(folder, split):
    """The documents of a prepared split, decoded, each having ended in end-of-text."""
    data = TokenDataset(folder, split)
    tokenizer = Tokenizer.from_file(str(data.tokenizer_path))
    tokens, docs = (row[0].numpy() for row in data.windows([0], data.n_tokens))
    documents = np.split(tokens, np.flatnonzero(np.diff(docs)) + 1)
    assert len(documents) == data.meta[split]["documents"]
    assert all(ids[-1] == data.meta["end_of_text_id"] for ids in documents)
    return [tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in documents]


def both(folder):
    return texts_of(folder, "train") + texts_of(folder, "val")


def same_files(a, b):
    names = [sorted(p.name for p in folder.iterdir()) for folder in (a, b)]
    assert names == [sorted(OUTPUT)] * 2, names
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in OUTPUT)


def assert_refused(result, *words):
    """The run ended with status 2 and one sentence that has the words."""
    status, _, err = result
    line = err.strip().splitlines()[-1]
    assert status == 2, result
    assert line.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in line, line


def fold_text(seed, split, n_characters, **make):
    """The embedded corpus's text, in one piece."""
    return "".join(fold.texts(seed, split, n_characters, **make))
