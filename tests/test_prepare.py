"""data/prepare.py: every kind of input, the split, interruption, a loopback Hub, and the sentences for mistakes."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data import prepare, sources
from data.writer import DatasetWriter, split_of
from nanoqstar.dataset import TokenDataset

ROOT = Path(__file__).parents[1]
OUTPUT = ("meta.json", "tokenizer.json", "train.bin", "train.docs.npy", "val.bin", "val.docs.npy")
WORDS = "the cat sat on a mat while seven small birds sang in two tall trees by the old stone bridge".split()


def sentences(seed, n):
    """n different documents."""
    rng = np.random.default_rng(seed)
    return [f"{seed}-{i} " + " ".join(rng.choice(WORDS, rng.integers(5, 30))) + "\n" for i in range(n)]


def write_jsonl(path, texts, field="text", **more):
    lines = "".join(json.dumps({field: text, **more}) + "\n" for text in texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer.json, as one that comes with a model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(prepare.train_tokenizer(400, sentences(0, 300)).to_str())
    return folder


@pytest.fixture
def run(tmp_path, tokenizer, capsys):
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
    documents = [tokens[docs == i] for i in range(data.meta[split]["documents"])]
    assert all(ids[-1] == data.meta["end_of_text_id"] for ids in documents)
    return [tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in documents]


def both(folder):
    return texts_of(folder, "train") + texts_of(folder, "val")


def same_files(a, b):
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir()) == sorted(OUTPUT)
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in OUTPUT)


def assert_refused(result, *words):
    """The run ended with status 2 and one sentence that has the words."""
    status, _, err = result
    line = err.strip().splitlines()[-1]
    assert status == 2 and line.startswith("error: ") and "Traceback" not in err
    for word in words:
        assert word in line, line


# --- kinds of input ---

def test_every_kind_of_file_in_a_folder(run, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "source"
    texts = {kind: sentences(i, 40) for i, kind in enumerate(("jsonl", "gz", "parquet", "parquet.gz"), 1)}
    write_jsonl(source / "a.jsonl", texts["jsonl"])
    write_jsonl(source / "deep" / "er" / "b.jsonl.gz", texts["gz"])
    pq.write_table(pa.table({"id": range(40), "text": texts["parquet"]}), source / "d.parquet", row_group_size=7)
    pq.write_table(pa.table({"text": texts["parquet.gz"]}), tmp_path / "e.parquet")
    (source / "e.parquet.gz").write_bytes(gzip.compress((tmp_path / "e.parquet").read_bytes()))
    plain = {"e.txt": "plain é\n", "f.py": "print('code')\n", "g.md": "# title\n"}
    for name, text in plain.items():
        (source / name).write_text(text, encoding="utf-8")
    (source / "i.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfzipped\n"))
    for name, content in (("image.png", b"\x89PNG\r\n\x1a\n\x00\xff"), ("latin.py", "# caf\xe9".encode("latin-1")),
                          ("latin.txt", "caf\xe9".encode("latin-1")), ("h.json", b'{"any": "thing"}'),
                          ("a.tar.gz", gzip.compress(b"text")), ("h.json.gz", gzip.compress(b"[]"))):
        (source / name).write_bytes(content)
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("hidden")

    status, out, _ = run("--input", source, "--val_fraction", 0.2, out="source/out dir")
    assert status == 0 and "skipped 6 of 14 files: .json, binary, or not UTF-8" in out
    folder = source / "out dir"
    assert sorted(both(folder)) == sorted(sum(texts.values(), []) + list(plain.values()) + ["zipped\n"])
    meta = TokenDataset(folder, "val").meta
    assert meta["val_fraction"] == 0.2 and meta["source"]["input"] == str(source) and meta["source"]["files"] == 8
    assert f"{meta['train']['tokens']:,} tokens" in out
    assert float(out.split(" tokens/s")[0].split()[-1].replace(",", "")) > 0  # as the benchmark reads it
    assert out.endswith(f"next: python train.py qwen2_5_3b --data '{folder}'\n")
    status, out, _ = run("--input", source, "--val_fraction", 0.2, out="source/out dir")  # its own files are no input
    assert status == 0 and "skipped 6 of 14" in out and "already prepared" in out


def test_a_big_text_file_is_cut_at_line_ends(run, tmp_path):
    lines = [f"line {i} of the book {'x' * (i % 60)}\n" for i in range(20000)]
    (tmp_path / "book.txt").write_text("".join(lines) + "y" * 300_000)  # and where there are none
    assert run("--input", tmp_path / "book.txt", "--val_fraction", 0.3)[0] == 0
    documents = both(tmp_path / "out")
    assert len(documents) > 10 and sum(map(len, documents)) == sum(map(len, lines)) + 300_000
    assert all(len(text) <= 2**17 for text in documents)
    assert all(text.endswith("\n") and text in "".join(lines) for text in documents if "y" not in text)


def test_text_field_empty_and_broken_texts(run, tmp_path):
    texts = sentences(1, 60)
    write_jsonl(tmp_path / "a.json", [*texts, "", None, "half \ud800 pair"], field="body")
    with open(tmp_path / "a.json", "a") as file:
        file.write("\n\n")
    assert run("--input", tmp_path / "a.json", "--text_field", "body", "--val_fraction", 0.2)[0] == 0
    assert sorted(both(tmp_path / "out")) == sorted([*texts, "half ? pair"])


def test_min_score_applies_where_int_score_exists(run, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts, scores = sentences(1, 100), [i % 6 for i in range(100)]
    write_jsonl(tmp_path / "in" / "b.jsonl", sentences(2, 10))
    write_jsonl(tmp_path / "in" / "c.jsonl", sentences(3, 10), int_score=3)
    pq.write_table(pa.table({"text": texts, "int_score": scores}), tmp_path / "in" / "a.parquet")
    assert run("--input", tmp_path / "in", "--val_fraction", 0.2, "--min_score", 4)[0] == 0
    kept = [text for text, score in zip(texts, scores) if score >= 4]
    assert sorted(both(tmp_path / "out")) == sorted(kept + sentences(2, 10))


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "parquet"])
def test_documents_come_with_the_share_of_the_input_read_so_far(tmp_path, kind):
    texts = ["".join(np.random.default_rng(i).choice(list("abcdefgh "), 2000)) + "\n" for i in range(500)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": texts}), path, row_group_size=20)
    else:
        write_jsonl(path, texts) if "jsonl" in kind else path.write_text("".join(texts))
    source = sources.Source(prepare.PrepareConfig(), [str(path)] * 2)
    shares = [share for _, _, share, _ in source.documents()]
    assert shares == sorted(shares) and shares[-1] > 0.9
    assert all(abs(share - (i + 1) / len(shares)) < 0.1 for i, share in enumerate(shares))


# --- tokens ---

def test_a_tokenizer_that_would_cut_pad_or_add_does_not(run, tmp_path, tokenizer):
    meddling = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    meddling.enable_truncation(4)
    meddling.enable_padding(length=50)
    (tmp_path / "meddling").mkdir()
    meddling.save(str(tmp_path / "meddling" / "tokenizer.json"))
    texts = [f"before <|endoftext|> after {text}" for text in sentences(1, 50)]  # and what is spelled stays text
    write_jsonl(tmp_path / "a.jsonl", texts)
    args = ("--input", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "meddling", "--val_fraction", 0.3)
    assert run(*args)[0] == 0
    assert sorted(both(tmp_path / "out")) == sorted(texts)
    data = TokenDataset(tmp_path / "out", "train")
    ends = data.windows([0], data.n_tokens)[0] == data.meta["end_of_text_id"]
    assert ends.sum() == data.meta["train"]["documents"]
    assert json.loads(data.tokenizer_path.read_text()) == json.loads((tokenizer / "tokenizer.json").read_text())


def test_a_large_vocabulary_takes_uint32(run, tmp_path):
    vocab = {f"w{i}": i for i in range(70000)} | {"<eos>": 70000}
    large = {"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "decoder": None,
             "truncation": None, "padding": None, "pre_tokenizer": {"type": "Whitespace"},
             "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(large))
    write_jsonl(tmp_path / "a.jsonl", [f"w{69000 + i} w{i}" for i in range(50)])
    assert run("--input", tmp_path / "a.jsonl", "--tokenizer", tmp_path, "--val_fraction", 0.3)[0] == 0
    data = TokenDataset(tmp_path / "out", "train")
    assert (data.meta["dtype"], data.meta["vocab_size"], data.meta["end_of_text_id"]) == ("uint32", 70001, 70000)
    assert data.windows([0], data.n_tokens)[0].max() == 70000
    assert all(int(text.split()[0][1:]) - int(text.split()[1][1:]) == 69000 for text in both(tmp_path / "out"))


def test_max_tokens_stops_at_the_first_document_end_past_it(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(1, 200))
    assert run("--input", tmp_path / "a.jsonl", "--val_fraction", 0.3, "--max_tokens", "none")[0] == 0
    assert len(both(tmp_path / "out")) == 200
    assert run("--input", tmp_path / "a.jsonl", "--val_fraction", 0.3, "--max_tokens", 500, out="cut")[0] == 0
    kept = both(tmp_path / "cut")
    assert sorted(kept) == sorted(sentences(1, 200)[:len(kept)])
    n_tokens = sum(TokenDataset(tmp_path / "cut", split).n_tokens for split in ("train", "val"))
    last = Tokenizer.from_file(str(tmp_path / "cut" / "tokenizer.json")).encode(sentences(1, 200)[len(kept) - 1])
    assert n_tokens >= 500 > n_tokens - len(last.ids) - 1


def test_trained_tokenizer_is_deterministic_and_sees_the_train_split_only(run, tmp_path, monkeypatch):
    texts = sentences(1, 400)
    texts[next(i for i, text in enumerate(texts) if split_of(text, 0.1) == "val")] = secret = next(
        text for i in range(100) if split_of(text := f"{i} " + "zyxwzyxw" * 50, 0.1) == "val")
    write_jsonl(tmp_path / "a.jsonl", texts)
    args = ("--input", tmp_path / "a.jsonl", "--tokenizer", "train:420", "--val_fraction", 0.1)
    status, out, _ = run(*args)
    assert status == 0 and out.endswith(f"next: python train.py text --data {tmp_path / 'out'}\n")
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, args), "--out", "again"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)  # a plain script, from anywhere
    assert same_files(tmp_path / "out", tmp_path / "again")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 420 and tokenizer.token_to_id("<|endoftext|>") == 0
    assert secret in texts_of(tmp_path / "out", "val") and not any("zyxw" in token for token in tokenizer.get_vocab())
    status, out, _ = run(*args, "--tokenizer", "train:9999", out="small")
    n_entries = TokenDataset(tmp_path / "small", "train").meta["vocab_size"]
    assert status == 0 and f"too little text for 9,999 entries: the tokenizer has {n_entries:,}" in out


def test_the_split_does_not_depend_on_the_order_of_files(run, tmp_path):
    texts = sentences(1, 90)
    for folder, order in (("x", texts), ("y", texts[::-1])):
        for i in range(3):
            write_jsonl(tmp_path / folder / f"{i}.jsonl", order[i * 30:i * 30 + 30])
        assert run("--input", tmp_path / folder, "--val_fraction", 0.25, out=f"out-{folder}")[0] == 0
    for split in ("train", "val"):
        x, y = texts_of(tmp_path / "out-x", split), texts_of(tmp_path / "out-y", split)
        assert x != y and sorted(x) == sorted(y)


# --- interruption ---

@pytest.fixture
def three_files(tmp_path, monkeypatch):
    for i in range(3):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", sentences(i, 100))
    monkeypatch.setattr(prepare, "BATCH_CHARS", 1500)
    return ("--input", tmp_path / "in", "--tokenizer", "train:300", "--val_fraction", 0.2)


KILLED = """
import os, signal, sys
from data import prepare
from data.writer import DatasetWriter

def add(self, split, ids, add=DatasetWriter.add):
    add(self, split, ids)
    if sum(count["documents"] for count in self.counts.values()) == 140:
        [file.flush() for files in self.files.values() for file in files]  # more on disk than in the journal
        os.kill(os.getpid(), signal.SIGKILL)

DatasetWriter.add, prepare.BATCH_CHARS = add, 1500
prepare.main(sys.argv[1:])
"""


def test_a_killed_run_continues_to_the_same_bytes(run, three_files, tmp_path, monkeypatch):
    assert run(*three_files, out="straight")[0] == 0
    command = [sys.executable, "-c", KILLED, *map(str, three_files), "--out", str(tmp_path / "out")]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    journal = json.loads((tmp_path / "out.partial" / "journal.json").read_text())
    done = journal["train"]["documents"] + journal["val"]["documents"]
    assert 100 < done < 140 and journal["place"] == {"file": 1, "skip": done - 100}
    assert (tmp_path / "out.partial" / "train.bin").stat().st_size > 2 * journal["train"]["tokens"]

    tokenized, training = [], []
    encoded, train_tokenizer = prepare.encoded, prepare.train_tokenizer
    monkeypatch.setattr(prepare, "encoded", lambda tokenizer, docs: encoded(
        tokenizer, (tokenized.append(doc[-1]) or doc for doc in docs)))
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *args: training.append(args) or train_tokenizer(*args))
    status, out, _ = run(*three_files)
    assert status == 0 and f"continuing after file 2, document {done - 100}" in out
    assert tokenized == sum((sentences(i, 100) for i in range(3)), [])[done:] and not training
    assert same_files(tmp_path / "straight", tmp_path / "out") and not (tmp_path / "out.partial").exists()

    tokenized.clear()
    status, out, _ = run(*three_files)
    assert status == 0 and "already prepared" in out and not tokenized
    assert_refused(run(*three_files, "--val_fraction", 0.3), "begun with val_fraction 0.2, now it is 0.3",
                   "delete", "--out")


@pytest.mark.parametrize("when", ["before the first batch", "after the last batch"])
def test_interrupted_at_either_end(run, three_files, tmp_path, monkeypatch, when):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "commit" if when.startswith("before") else "finish", interrupt)
        status, _, err = run(*three_files)
    assert status == 130 and "after the last batch saved, if any" in err
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
    assert run(*three_files)[0] == 0 and run(*three_files, out="straight")[0] == 0
    assert same_files(tmp_path / "straight", tmp_path / "out")


def test_a_leftover_of_other_input_is_refused(run, three_files, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(DatasetWriter, "finish", stop)
    assert run(*three_files)[0] == 130
    with open(tmp_path / "in" / "2.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    assert_refused(run(*three_files), "out.partial was begun with bytes", "delete")


# --- mistakes ---

def test_wrong_inputs_are_named(run, tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def given(name, content):
        (tmp_path / name).write_bytes(content)
        return run("--input", tmp_path / name)
    assert_refused(run("--input", tmp_path / "absent"), "--input: there is no file or folder", "absent")
    assert_refused(given("empty.txt", b""), "the train split is empty, of 0 documents")
    assert_refused(given("latin.txt", b"caf\xe9 au lait"), "latin.txt cannot be read as text", "utf-8")
    assert_refused(given("bad.jsonl", b'{"text": "a"}\n{"text": "b\n'), "bad.jsonl", "line 2 has no text in 'text'",
                   "no JSON")
    assert_refused(given("latin.jsonl", b'{"text": "caf\xe9"}\n'), "latin.jsonl", "line 1", "no JSON")
    assert_refused(given("field.json", b'{"body": "a", "url": 5}\n'), "line 1", "the fields body, url", "--text_field")
    assert_refused(run("--input", tmp_path / "field.json", "--text_field", "url"), "line 1 has no text in 'url'")
    assert_refused(given("cut.txt.gz", gzip.compress(b"text " * 1000)[:-20]), "cut.txt.gz cannot be read as text")
    assert_refused(given("not.txt.gz", b"text"), "not.txt.gz cannot be read as text", "gzip")
    assert_refused(given("one.txt", b"one document"), "the val split is empty, of 1 documents", "--val_fraction")
    assert not (tmp_path / "out.partial").exists()  # so that the next --val_fraction meets no leftover
    (tmp_path / "nothing").mkdir()
    assert_refused(run("--input", tmp_path / "nothing"), "nothing holds no .txt, .jsonl, .parquet")
    assert_refused(given("bad.parquet", b"PAR1 no"), "bad.parquet cannot be read as parquet")
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    assert_refused(run("--input", tmp_path / "a.parquet"), "a.parquet", "no text in 'text', but the fields body, n")
    assert_refused(run("--input", tmp_path / "a.parquet", "--text_field", "n"), "no text in 'n'")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert_refused(run("--input", tmp_path / "a.parquet"), "needs pyarrow: pip install -e '.[data]'")


def test_wrong_tokenizers_are_named(run, tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", sentences(1, 50))
    for spec in ("train:256", "train:many", "train:"):
        assert_refused(run("--input", text, "--tokenizer", spec), "at least 257")
    (tmp_path / "model").mkdir()
    assert_refused(run("--input", text, "--tokenizer", tmp_path / "model"), "model has no tokenizer.json")
    no_end = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    for content, words in (('{"version": "1.0"', "is not a tokenizer"), (json.dumps(no_end), "no end-of-text token")):
        (tmp_path / "model" / "tokenizer.json").write_text(content)
        assert_refused(run("--input", text, "--tokenizer", tmp_path / "model"), words)


def test_wrong_arguments_are_named(run, tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", sentences(1, 50))
    assert_refused(run("--min_scores", 3), "unknown option --min_scores; did you mean --min_score?")
    assert_refused(run("--input", text, "--dataset_name", "a/b"), "leave out --dataset_name")
    assert_refused(run("--input", text, "--val_fraction", 1), "val_fraction=1.0: must lie between 0 and 1")
    assert_refused(run("--input", text, "--max_tokens", 0), "max_tokens=0: must be at least 1")
    (tmp_path / "out").mkdir()
    assert_refused(run("--input", text), "out exists and is not prepared data", "--out")


def test_damaged_output_is_not_called_prepared(run, tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", sentences(1, 50))
    assert run("--input", text, "--val_fraction", 0.3)[0] == 0
    (tmp_path / "out" / "val.bin").write_bytes(b"")
    assert_refused(run("--input", text, "--val_fraction", 0.3), "val.bin has 0 bytes", "delete")


# --- the Hub ---

SHA = "5" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does: dataset_info, and HEAD or GET of a file with its commit and ETag."""

    datasets, files, asked = {}, {}, []

    def do_GET(self):
        self.asked.append((self.command, self.path.partition("?")[0]))
        path = self.asked[-1][1]
        if path.startswith("/acme/gated") or path.startswith("/api/datasets/acme/gated"):
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        if path.startswith("/acme/forbidden") or path.startswith("/api/datasets/acme/forbidden"):
            return self.answer(403, {})
        if path.startswith("/api/datasets/acme/broken"):
            return self.answer(418, {})
        if path.startswith("/api/datasets/"):
            info = self.datasets.get(path.removeprefix("/api/datasets/"))
            body = info and json.dumps({**info, "siblings": [{"rfilename": n} for n in info["siblings"]]}).encode()
        else:
            body = self.files.get(path)
        if not body:
            return self.answer(404, {"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"})
        self.answer(200, {"ETag": f'"{hash(body)}"', "X-Repo-Commit": SHA}, body)

    do_HEAD = do_GET

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


SEVERAL = """
import contextlib, io, json, sys
from data import prepare

results = []
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = prepare.main(argv)
    results.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


@pytest.fixture
def hub(tmp_path, tokenizer):
    """Starts a Hub; returns a function that runs the command against it in a process of its own."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    Hub.datasets, Hub.files, Hub.asked = {}, {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.files["/acme/model/resolve/main/tokenizer.json"] = (tokenizer / "tokenizer.json").read_bytes()

    def add(dataset, files, configs=None):
        """files: name -> texts; a parquet's i-th text has the int_score i % 6."""
        card = {"configs": configs} if configs else {"license": "apache-2.0"}
        Hub.datasets[dataset] = {"id": dataset, "sha": SHA, "siblings": ["README.md", *files], "cardData": card}
        for name, texts in files.items():
            local = tmp_path / Path(name).name
            if name.endswith(".parquet"):
                pq.write_table(pa.table({"text": texts, "int_score": [i % 6 for i in range(len(texts))]}), local)
            else:
                write_jsonl(local, texts)
            Hub.files[f"/datasets/{dataset}/resolve/{SHA}/{name}"] = local.read_bytes()

    def commands(*lists, **env):
        """Runs the command once for each list of arguments; returns statuses, outputs and errors."""
        lists = [["--tokenizer", "acme/model", "--out", str(tmp_path / "out"), "--val_fraction", "0.3", *map(str, args)]
                 for args in lists]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "",
               "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1", **env}
        done = subprocess.run([sys.executable, "-c", SEVERAL, json.dumps(lists)], cwd=ROOT, env=env, check=True,
                              capture_output=True, text=True)
        return [tuple(result) for result in json.loads(done.stdout)]

    def command(*args, **env):
        return commands(args, **env)[0]

    command.several = commands
    command.add = add
    yield command
    server.shutdown()
    server.server_close()


def fetched():
    """Files that were downloaded, in order."""
    return [path.partition(f"/resolve/{SHA}/")[2] for method, path in Hub.asked if method == "GET" and SHA in path]


def test_hub_parquet_by_config(hub, tmp_path):
    files = {f"sample/10BT/00{i}_00000.parquet": sentences(i, 60) for i in range(3)}
    others = {"data/other/000.parquet": sentences(9, 10)}
    hub.add("HuggingFaceFW/fineweb-edu", files | others, [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]}])
    status, out, err = hub()  # every default but the tokenizer, the folder and the size of the split
    assert status == 0, err
    kept = [text for texts in files.values() for i, text in enumerate(texts) if i % 6 >= 3]
    assert sorted(both(tmp_path / "out")) == sorted(kept) and fetched() == list(files)
    meta = TokenDataset(tmp_path / "out", "train").meta
    assert meta["source"]["revision"] == SHA and meta["source"]["dataset_name"] == "HuggingFaceFW/fineweb-edu"
    assert meta["source"]["dataset_subset"] == "sample-10BT" and meta["source"]["min_score"] == 3

    Hub.asked.clear()
    assert hub()[0] == 0 and not Hub.asked  # finished: nothing is asked
    assert hub("--max_tokens", 300, "--out", tmp_path / "cut")[0] == 0 and fetched() == []  # from the cache, as pinned
    assert {text.split("-")[0] for text in both(tmp_path / "cut")} == {"0"}
    assert not any("001_" in path for _, path in Hub.asked)  # files past --max_tokens are not even asked for


def test_hub_json_lines_without_config(hub, tmp_path):
    files = {f"en/c4-train.0000{i}-of-00002.json.gz": sentences(i, 60) for i in range(2)}
    hub.add("acme/c4", files | {"en/c4-validation.0.json.gz": sentences(7, 9), "fr/c4-train.json.gz": sentences(8, 9)})
    status, out, err = hub("--dataset_name", "acme/c4", "--dataset_subset", "en")
    assert status == 0, err
    assert sorted(both(tmp_path / "out")) == sorted(sum(files.values(), [])) and fetched() == list(files)


def test_hub_errors_are_one_sentence(hub, tmp_path):
    hub.add("acme/two", {"a.jsonl": sentences(1, 5)}, [
        {"config_name": "en", "data_files": "a.jsonl"},
        {"config_name": "test", "data_files": [{"split": "test", "path": "a.jsonl"}]}])
    local = write_jsonl(tmp_path / "local.jsonl", sentences(1, 50))
    expected = [
        (["--dataset_name", "acme/gated"], "acme/gated", "HF_TOKEN", "`hf auth login`"),
        (["--input", local, "--tokenizer", "acme/forbidden"], "acme/forbidden", "`hf auth login`"),
        (["--dataset_name", "acme/absent"], "acme/absent", "404"),
        (["--input", local, "--tokenizer", "./no/such/folder"], "there is no folder './no/such/folder'"),
        (["--dataset_name", "acme/broken"], "acme/broken", "the Hub answered 418"),
        (["--dataset_name", "acme/two", "--dataset_subset", "fr"], "no subset 'fr'", "en, test"),
        (["--dataset_name", "acme/two", "--dataset_subset", "test"], "no training files", "'test'"),
    ]
    for result, (_, *words) in zip(hub.several(*(args for args, *_ in expected)), expected, strict=True):
        assert_refused(result, *words)
    assert_refused(hub(HF_ENDPOINT="http://127.0.0.1:9"), "HuggingFaceFW/fineweb-edu", "cannot be fetched")
    assert_refused(hub("--input", local, HF_HUB_OFFLINE="1"), "acme/model", "HF_HUB_OFFLINE")


def test_train_patterns_in_every_form():
    assert sources.train_patterns("a/*") == ["a/*"] and sources.train_patterns(["a/*", "c.*"]) == ["a/*", "c.*"]
    by_split = {"test": "c.*", "train": ["a/*", "b"]}
    assert sources.train_patterns([{"split": s, "path": p} for s, p in by_split.items()]) == ["a/*", "b"]
