"""data/prepare.py: every kind of input, the split, a loopback Hub, and the sentences for mistakes.

Interruptions are in test_writer.py.
"""

import gzip
import json
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants
from prepared import (
    assert_refused,
    both,
    make_tokenizer,
    runner,
    same_files,
    sentences,
    texts_of,
    write_jsonl,
)
from tokenizers import Tokenizer, processors

from configs import PrepareConfig, TrainConfig, load_config
from data import prepare, sources
from data.writer import split_of
from nanoqstar import cli, hub
from nanoqstar.dataset import TokenDataset

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def run(tmp_path, tokenizer, capsys):
    return runner(tmp_path, tokenizer, capsys)


# --- kinds of input ---

def test_every_kind_of_file_in_a_folder(run, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "source"
    kinds = ("jsonl", "gz", "parquet", "parquet.gz")
    texts = {kind: sentences(i, 40) for i, kind in enumerate(kinds, 1)}
    write_jsonl(source / "a.jsonl", texts["jsonl"])
    write_jsonl(source / "deep" / "er" / "b.jsonl.gz", texts["gz"])
    table = pa.table({"id": range(40), "text": texts["parquet"]})
    pq.write_table(table, source / "d.parquet", row_group_size=7)
    pq.write_table(pa.table({"text": texts["parquet.gz"]}), tmp_path / "e.parquet")
    (source / "e.parquet.gz").write_bytes(gzip.compress((tmp_path / "e.parquet").read_bytes()))
    plain = {"e.txt": "plain é\n", "f.py": "print('code')\n", "g.md": "# title\n"}
    for name, text in plain.items():
        (source / name).write_text(text, encoding="utf-8")
    (source / "i.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfzipped\n"))
    latin = "caf\xe9".encode("latin-1")
    for name, content in (("image.png", b"\x89PNG\r\n\x1a\n\x00\xff"), ("latin.py", latin),
                          ("latin.txt", latin), ("h.json", b'{"any": "thing"}'),
                          ("a.tar.gz", gzip.compress(b"text")),
                          ("h.json.gz", gzip.compress(b"[]"))):
        (source / name).write_bytes(content)
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("hidden")

    status, out, _ = run("--input", source, "--val_fraction", 0.2, out="source/out dir")
    assert status == 0
    assert "skipped 6 of 14 files: .json, binary, or not UTF-8" in out
    folder = source / "out dir"
    expected = [*chain(*texts.values()), *plain.values(), "zipped\n"]
    assert sorted(both(folder)) == sorted(expected)
    meta = TokenDataset(folder, "val").meta
    assert meta["val_fraction"] == 0.2
    assert meta["source"]["input"] == str(source)
    assert meta["source"]["files"] == 8
    assert f"{meta['train']['tokens']:,} tokens" in out
    assert float(out.split(" tokens/s")[0].split()[-1].replace(",", "")) > 0  # as bench reads it
    assert out.endswith(f"next: python train.py text --data '{folder}'\n")
    assert "left out" not in out
    status, out, _ = run("--input", source, "--val_fraction", 0.2, out="source/out dir")
    assert status == 0  # its own files are no input
    assert "skipped 6 of 14" in out
    assert "already prepared" in out


def test_a_big_text_file_is_cut_at_line_ends(run, tmp_path):
    lines = [f"line {i} of the book {'x' * (i % 60)}\n" for i in range(20000)]
    (tmp_path / "book.txt").write_text("".join(lines) + "y" * 300_000)  # and where there are none
    assert run("--input", tmp_path / "book.txt", "--val_fraction", 0.3)[0] == 0
    documents = both(tmp_path / "out")
    assert len(documents) > 10
    assert sum(map(len, documents)) == sum(map(len, lines)) + 300_000
    assert all(len(text) <= 2**17 for text in documents)
    assert all(text.endswith("\n") and text in "".join(lines)
               for text in documents if "y" not in text)


def test_text_field_empty_and_broken_texts(run, tmp_path):
    texts = sentences(1, 60)
    write_jsonl(tmp_path / "a.json", [*texts, "", None, "half \ud800 pair"], field="body")
    with open(tmp_path / "a.json", "a") as file:
        file.write("\n\n")
    args = ("--input", tmp_path / "a.json", "--text_field", "body", "--val_fraction", 0.2)
    assert run(*args)[0] == 0
    assert sorted(both(tmp_path / "out")) == sorted([*texts, "half \ufffd pair"])


def test_min_score_applies_where_int_score_exists(run, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts, scores = sentences(1, 100), [i % 6 for i in range(100)]
    write_jsonl(tmp_path / "in" / "b.jsonl", sentences(2, 10))
    write_jsonl(tmp_path / "in" / "c.jsonl", sentences(3, 10), int_score=3)
    write_jsonl(tmp_path / "in" / "d.jsonl", sentences(4, 10), int_score="none")  # no number
    pq.write_table(pa.table({"text": texts, "int_score": scores}), tmp_path / "in" / "a.parquet")
    args = ("--input", tmp_path / "in", "--val_fraction", 0.2, "--min_score", 4)
    assert run(*args)[0] == 0
    kept = [text for text, score in zip(texts, scores) if score >= 4]
    assert sorted(both(tmp_path / "out")) == sorted(kept + sentences(2, 10) + sentences(4, 10))


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "parquet"])
def test_documents_come_with_the_share_of_the_input_read_so_far(tmp_path, kind):
    def document(i):
        return "".join(np.random.default_rng(i).choice(list("abcdefgh "), 2000)) + "\n"
    texts, path = [document(i) for i in range(500)], tmp_path / f"a.{kind}"
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": texts}), path, row_group_size=20)
    elif "jsonl" in kind:
        write_jsonl(path, texts)
    else:
        path.write_text("".join(texts))
    source = sources.Source(prepare.PrepareConfig(), [str(path)] * 2)
    shares = [item.share for item in source.items()]
    assert shares == sorted(shares)
    assert shares[-1] > 0.9
    assert all(abs(share - (i + 1) / len(shares)) < 0.1 for i, share in enumerate(shares))


# --- what is wrong with some of the text ---

def test_bad_bytes_and_broken_lines_are_left_out_and_counted(run, tmp_path):
    folder, good = tmp_path / "in", sentences(1, 80)
    write_jsonl(folder / "a.jsonl", good)
    with open(folder / "a.jsonl", "ab") as file:
        file.write(b'{"text": "b\n{"body": 1, "url": 2}\n[1]\n' + b"[" * 10**5
                   + b'\n{"text": "caf\xe9 au lait"}\n')
    spoilt = ("word " * 300).encode() + b"\xff\xfe and \xe9\n"
    (folder / "b.txt").write_bytes(spoilt)
    (folder / "c.txt.gz").write_bytes(gzip.compress(("line\n" * 3000).encode(), 0)[:-20])
    (folder / "d.jsonl.gz").write_bytes(b"no gzip")
    (folder / "e.parquet").write_bytes(b"PAR1 no")
    write_jsonl(folder / "f.jsonl", sentences(2, 20))
    args = ("--input", folder, "--val_fraction", 0.2)
    status, out, _ = run(*args)
    assert status == 0
    documents = both(tmp_path / "out")
    assert set(good + sentences(2, 20)) < set(documents)
    assert {"caf\ufffd au lait", "word " * 300 + "\ufffd and \ufffd\n"} < set(documents)
    line = next(line for line in out.splitlines() if line.startswith("left out"))
    for words in ("3 times no JSON", "a.jsonl, line 81,", "1 times no text in 'text'", "line 82,",
                  "3 times no UTF-8", "a.jsonl, line 85,", "3 times cannot be read", "c.txt.gz",
                  "--strict"):
        assert words in line, words
    left_out = TokenDataset(tmp_path / "out", "train").meta["source"]["left_out"]
    assert {kind: n for kind, (n, _) in left_out.items()} == {
        "no JSON": 3, "no text in 'text'": 1, "no UTF-8": 3, "cannot be read": 3}
    assert_refused(run(*args, "--strict", out="strict"), "a.jsonl, line 81, is no JSON")
    assert not (tmp_path / "strict.partial").exists()


def test_a_line_without_end_does_not_fill_the_memory(run, tmp_path, monkeypatch):
    """It is left out as a line that is no JSON, and the next one is found."""
    monkeypatch.setattr(sources, "LONGEST_LINE", 1000)
    texts = [*sentences(0, 5), "x" * 987, "y" * 988, "z" * 5000, *sentences(1, 5)]
    file = write_jsonl(tmp_path / "in" / "a.jsonl.gz", texts)
    assert len(json.dumps({"text": "x" * 987})) == 999  # with its end the longest that there is
    found = list(sources.read_documents(str(file), file.name, PrepareConfig(), 1000))
    assert [text for _, text, _ in found if text] == [*texts[:6], *texts[8:]]
    assert [fault.sentence[:21] for _, _, fault in found if fault] == [
        "a.jsonl.gz, line 7, i", "a.jsonl.gz, line 8, i"]


def test_links_in_a_loop_are_refused(run, tmp_path):
    (tmp_path / "a").symlink_to("a")
    assert_refused(run("--input", tmp_path / "a"), "there is no file or folder")


def test_strict_refuses_one_bad_byte(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"word " * 3000 + b"\xff" + b" word" * 3000)
    args = ("--input", tmp_path / "a.txt", "--val_fraction", 0.2)
    assert_refused(run(*args, "--strict"), "a.txt, document", "no UTF-8")
    assert run(*args)[0] == 0


def test_a_wrong_text_field_is_refused_before_everything_is_read(tmp_path, run, monkeypatch):
    read = []
    monkeypatch.setattr(sources, "text_of", lambda row, *rest, text_of=sources.text_of: (
        read.append(row) or text_of(row, *rest)))
    write_jsonl(tmp_path / "a.jsonl", sentences(1, 5000), field="body")
    assert_refused(run("--input", tmp_path / "a.jsonl"), "line 1", "fields 'body'", "--text_field")
    assert len(read) == sources.HOPELESS


# --- tokens ---

def test_a_tokenizer_that_would_cut_pad_or_add_does_not(run, tmp_path, tokenizer):
    meddling = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    meddling.enable_truncation(4)
    meddling.enable_padding(length=50)
    (tmp_path / "meddling").mkdir()
    meddling.save(str(tmp_path / "meddling" / "tokenizer.json"))
    # and what is spelled stays text
    texts = [f"before <|endoftext|> after {text}" for text in sentences(1, 50)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    args = ("--input", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "meddling")
    assert run(*args, "--val_fraction", 0.3)[0] == 0
    assert sorted(both(tmp_path / "out")) == sorted(texts)
    data = TokenDataset(tmp_path / "out", "train")
    ends = data.windows([0], data.n_tokens)[0] == data.meta["end_of_text_id"]
    assert ends.sum() == data.meta["train"]["documents"]
    original = json.loads((tokenizer / "tokenizer.json").read_text())
    assert json.loads(data.tokenizer_path.read_text()) == original
    assert data.beginning_ids == []


def test_each_document_begins_as_its_tokenizer_begins_a_text(run, tmp_path, tokenizer):
    mistral = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    mistral.add_special_tokens(["<s>"])
    begin = mistral.token_to_id("<s>")
    mistral.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", begin)])
    (tmp_path / "mistral").mkdir()
    mistral.save(str(tmp_path / "mistral" / "tokenizer.json"))
    texts = [f"<s> spelled {text}" for text in sentences(1, 50)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    args = ("--input", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "mistral")
    assert run(*args, "--val_fraction", 0.3)[0] == 0
    for split in ("train", "val"):
        data = TokenDataset(tmp_path / "out", split)
        assert data.meta["beginning_ids"] == data.beginning_ids == [begin]
        tokens, docs = (row[0] for row in data.windows([0], data.n_tokens))
        assert (tokens == begin).sum() == data.meta[split]["documents"] == docs[-1] + 1
        first = [True, *(docs[1:] != docs[:-1]).tolist()]
        assert tokens[first].tolist() == [begin] * len(docs.unique())


def test_a_large_vocabulary_takes_uint32(run, tmp_path):
    vocab = {f"w{i}": i for i in range(70000)} | {"<eos>": 70000}
    large = {"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
             "decoder": None, "truncation": None, "padding": None,
             "pre_tokenizer": {"type": "Whitespace"},
             "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(large))
    write_jsonl(tmp_path / "a.jsonl", [f"w{69000 + i} w{i}" for i in range(50)])
    args = ("--input", tmp_path / "a.jsonl", "--tokenizer", tmp_path, "--val_fraction", 0.3)
    assert run(*args)[0] == 0
    data = TokenDataset(tmp_path / "out", "train")
    found = data.meta["dtype"], data.meta["vocab_size"], data.meta["end_of_text_id"]
    assert found == ("uint32", 70001, 70000)
    assert data.windows([0], data.n_tokens)[0].max() == 70000
    for text in both(tmp_path / "out"):
        first, second = (int(word[1:]) for word in text.split())
        assert first - second == 69000


def test_max_tokens_stops_at_the_first_document_end_past_it(run, tmp_path):
    texts = sentences(1, 200)
    write_jsonl(tmp_path / "a.jsonl", texts)
    args = ("--input", tmp_path / "a.jsonl", "--val_fraction", 0.3, "--max_tokens")
    assert run(*args, "none")[0] == 0
    assert len(both(tmp_path / "out")) == 200
    assert run(*args, 500, out="cut")[0] == 0
    kept = both(tmp_path / "cut")
    assert sorted(kept) == sorted(texts[:len(kept)])
    n_tokens = sum(TokenDataset(tmp_path / "cut", s).n_tokens for s in ("train", "val"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "cut" / "tokenizer.json"))
    assert n_tokens >= 500 > n_tokens - len(tokenizer.encode(texts[len(kept) - 1]).ids) - 1
    assert_refused(run(*args, 1, out="one"), "a split is empty, of 1 documents", "--max_tokens")
    assert not (tmp_path / "one.partial").exists()  # no leftover for the next --max_tokens


@pytest.mark.parametrize("character", ["\u4e00", "ab", " "])
def test_a_tokenizer_is_trained_on_pieces_of_text_that_has_no_spaces(monkeypatch, character):
    given, train = [], Tokenizer.train_from_iterator
    monkeypatch.setattr(Tokenizer, "train_from_iterator", lambda self, texts, trainer: train(
        self, (given.append(text) or text for text in texts), trainer))
    ordinary, endless = "".join(sentences(1, 300)), "x y " + character * 5000 + " z"
    prepare.train_tokenizer(300, [ordinary, endless])
    assert given[0] == ordinary  # as it is
    assert "".join(given[1:]) == endless
    assert 1000 <= max(map(len, given[1:])) <= 1010


def test_a_file_without_a_size_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("ab\n" * 5000)  # as /proc has them
    monkeypatch.setattr(Path, "stat", lambda self, **options: SimpleNamespace(st_size=0))
    source = sources.Source(prepare.PrepareConfig(), [str(tmp_path / "a.txt")], None, 0)
    assert [item.share for item in source.items()] == [1.0] * 4


def test_a_parquet_file_without_the_text_field_is_not_read(tmp_path, run, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *args, **options: iter(()))
    pq.write_table(pa.table({"body": ["a"] * 5, "n": [1] * 5}), tmp_path / "a.parquet")
    assert_refused(run("--input", tmp_path / "a.parquet"), "row 1", "but the fields 'body', 'n';")


AS_A_SCRIPT = """
import runpy, sys
root, *args = sys.argv[1:]

def script(*args):
    sys.argv = [root + "/data/prepare.py", *args]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code

assert script("--inptu", "x") == 2
heavy = {"torch", "numpy", "tokenizers", "huggingface_hub", "tqdm"} & set(sys.modules)
assert not heavy, heavy
sys.exit(script(*args))  # from any folder
"""


def test_trained_tokenizer_is_deterministic_and_sees_the_train_split_only(run, tmp_path):
    texts = sentences(1, 400)
    secret = next(t for i in range(100) if split_of(t := f"{i} " + "zyxwzyxw" * 50, 0.1) == "val")
    texts[next(i for i, text in enumerate(texts) if split_of(text, 0.1) == "val")] = secret
    write_jsonl(tmp_path / "a.jsonl", texts)
    args = ("--input", tmp_path / "a.jsonl", "--tokenizer", "train:420", "--val_fraction", 0.1)
    status, out, _ = run(*args)
    assert status == 0
    assert out.endswith(f"next: python train.py text --data {tmp_path / 'out'}\n")
    command = [sys.executable, "-c", AS_A_SCRIPT, str(ROOT), *map(str, args), "--out", "again"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean --input?" in done.stderr
    assert same_files(tmp_path / "out", tmp_path / "again")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 420
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert secret in texts_of(tmp_path / "out", "val")
    assert not any("zyxw" in token for token in tokenizer.get_vocab())
    status, out, _ = run(*args, "--tokenizer", "train:9999", out="small")
    n_entries = TokenDataset(tmp_path / "small", "train").meta["vocab_size"]
    assert status == 0
    assert f"too little text for 9,999 entries: the tokenizer has {n_entries:,}" in out


# --- the split ---

def test_the_split_does_not_depend_on_the_order_of_files(run, tmp_path):
    texts = sentences(1, 90)
    for folder, order in (("x", texts), ("y", texts[::-1])):
        for i in range(3):
            write_jsonl(tmp_path / folder / f"{i}.jsonl", order[i * 30:i * 30 + 30])
        args = ("--input", tmp_path / folder, "--val_fraction", 0.25)
        assert run(*args, out=f"out-{folder}")[0] == 0
    for split in ("train", "val"):
        x, y = texts_of(tmp_path / "out-x", split), texts_of(tmp_path / "out-y", split)
        assert x != y
        assert sorted(x) == sorted(y)


@pytest.mark.parametrize("n_chars", [10_000, 100_000, 1_000_000])
def test_one_text_file_with_default_settings_trains(run, tmp_path, n_chars):
    text = "".join(sentences(1, 12_000))[:n_chars].rpartition("\n")[0] + "\n"
    (tmp_path / "book.txt").write_text(text)
    assert run("--input", tmp_path / "book.txt")[0] == 0
    window = load_config("text")[1].max_length + load_config("text")[1].n_ahead_talk
    n_tokens = {split: TokenDataset(tmp_path / "out", split).n_tokens for split in ("train", "val")}
    assert n_tokens["val"] >= window
    assert n_tokens["val"] < 0.5 * n_tokens["train"]
    if n_chars == 1_000_000:
        assert 2048 <= n_tokens["val"] < 0.05 * n_tokens["train"]
    assert sorted("".join(both(tmp_path / "out")).splitlines()) == sorted(text.splitlines())


@pytest.mark.parametrize("fraction", [0.01, 0.99])
@pytest.mark.parametrize("n", [2, 10])
def test_neither_split_is_empty_where_there_are_two_documents(run, tmp_path, n, fraction):
    write_jsonl(tmp_path / "a.jsonl", texts := sentences(1, n))
    assert {split_of(text, fraction) for text in texts} == {"train" if fraction < 0.5 else "val"}
    assert run("--input", tmp_path / "a.jsonl", "--val_fraction", fraction)[0] == 0
    splits = [texts_of(tmp_path / "out", split) for split in ("train", "val")]
    assert all(splits)
    assert sorted(chain(*splits)) == sorted(texts)
    few = splits[1] if fraction < 0.5 else splits[0]
    assert few == texts[-len(few):][::-1]
    assert len(few) < 3


@pytest.mark.parametrize(("name", "content"), [("one.txt", b"one document"), ("empty.txt", b""),
                                               ("a.jsonl", b'{"text": "a"}\n{"text": " "}\n')])
def test_a_single_document_is_refused_before_the_work(run, tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *args: pytest.fail("trained"))
    (tmp_path / name).write_bytes(content)
    assert_refused(run("--input", tmp_path / name, "--tokenizer", "train:300"), name,
                   "two documents are needed", ".jsonl with a document a line")
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


# --- how to go on ---

@pytest.mark.parametrize(("tokenizer", "words"), [
    ("Qwen/Qwen2.5-0.5B", "qwen2_5_0_5b"), ("Qwen/Qwen2.5-3B", "qwen2_5_3b"),
    ("Qwen/Qwen2.5-7B", "qwen2_5_7b"), ("mistralai/Mistral-7B-v0.1", "mistral_7b_paper"),
    ("train:4096", "text"), ("openai-community/gpt2", "text"), ("a folder", "text"),
    ("a model", "text --model_path 'a model'"), ("big", "qwen2_5_3b --model_path big")])
def test_the_preset_has_a_model_of_this_tokenizer(tmp_path, monkeypatch, tokenizer, words):
    monkeypatch.chdir(tmp_path)
    for name, size in (("a folder", None), ("a model", 9), ("big", 2**29 + 1)):
        Path(name).mkdir()
        if size:
            Path(name, "config.json").write_text("{}")
            with open(Path(name, "model.safetensors"), "wb") as file:
                file.truncate(size)
    assert prepare.fitting_preset(tokenizer) == words
    preset, *options = shlex.split(words)
    settings = cli.settings(TrainConfig, [*options, "--data", "d"], "", base=load_config(preset)[1])
    assert settings.model_path in (tokenizer, None)


# --- mistakes ---

def test_wrong_inputs_are_named(run, tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def given(name, content):
        (tmp_path / name).write_bytes(content)
        return run("--input", tmp_path / name)
    assert_refused(run("--input", tmp_path / "absent"), "--input: there is no file or folder")
    assert_refused(given("latin.txt", b"caf\xe9 au lait"), "latin.txt is no UTF-8 text")
    assert_refused(given("16.txt", "a text".encode("utf-16")), "16.txt is no UTF-8 text")
    assert_refused(given("bad.jsonl", b'{"text": "a"}\n{"text": "b\n'), "line 2, is no JSON")
    assert_refused(given("field.json", b'{"body": "a", "url": 5}\n'), "--text_field",
                   "line 1, has no text in 'text', but the fields 'body', 'url'")
    assert_refused(run("--input", tmp_path / "field.json", "--text_field", "url"),
                   "line 1, has no text in 'url', but a number; --text_field")
    many = json.dumps({"a\nb": 1, "x" * 10**5: 2} | {f"k{i}": i for i in range(99)}).encode()
    result = given("many.jsonl", many)
    assert_refused(result, r"fields 'a\nb', 'xxx", "xxx, 'k0',", "'k7', ..; --text_field")
    assert len(result[2]) < 500
    assert_refused(given("array.json", b'[{"text": "a"}]'), "holds one object a line")
    assert_refused(given("low.jsonl", b'{"text": "a", "int_score": 1}\n' * 9), "there are 0",
                   "no text in 'text' or an int_score below --min_score 3")
    for content in ("text".encode("utf-16"), b"ab\0" * 9000):
        assert_refused(given("zip.txt.gz", gzip.compress(content)), "zip.txt.gz is no UTF-8 text")
    assert_refused(given("cut.txt.gz", gzip.compress(b"text " * 1000)[:-20]),
                   "cut.txt.gz cannot be read as text")
    assert_refused(given("not.txt.gz", b"text"), "not.txt.gz cannot be read as text", "gzip")
    (tmp_path / "nothing").mkdir()
    assert_refused(run("--input", tmp_path / "nothing"), "nothing holds no .txt, .jsonl, .parquet")
    assert_refused(given("bad.parquet", b"PAR1 no"), "bad.parquet cannot be read as parquet")
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    assert_refused(run("--input", tmp_path / "a.parquet"), "a.parquet, row 1,",
                   "no text in 'text', but the fields 'body', 'n';")
    assert_refused(run("--input", tmp_path / "a.parquet", "--text_field", "n"), "no text in 'n'")
    far = pa.table({"text": pa.array([2**62] * 9, pa.timestamp("us"))})
    pq.write_table(far, tmp_path / "far.parquet")
    assert_refused(run("--input", tmp_path / "far.parquet"), "far.parquet cannot be read as")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert_refused(run("--input", tmp_path / "a.parquet"), "needs pyarrow: pip install")
    assert not list(tmp_path.glob("out*"))


def test_wrong_tokenizers_are_named(run, tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", sentences(1, 50))
    for spec in ("train:256", "train:many", "train:", "train:99999999999", "train:1000001"):
        assert_refused(run("--input", text, "--tokenizer", spec), "from 257", "to 1,000,000")
    folder = tmp_path / "model"
    folder.mkdir()
    assert_refused(run("--input", text, "--tokenizer", folder), "model has no tokenizer.json")
    no_end = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    no_unknown = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"</s>": 0},
                                              "unk_token": "[UNK]"}}
    for content, words in (('{"version": "1.0"', "is not a tokenizer"),
                           (json.dumps(no_end), "no end-of-text token"),
                           (json.dumps(no_unknown), "the tokenizer cannot encode")):
        (folder / "tokenizer.json").write_text(content)
        assert_refused(run("--input", text, "--tokenizer", folder), words)
    assert not list(tmp_path.glob("out*"))


def test_wrong_arguments_are_named(run, tmp_path, monkeypatch):
    text = write_jsonl(tmp_path / "a.jsonl", sentences(1, 50))
    assert_refused(run("--min_scores", 3), "unknown option --min_scores; did you mean --min_score?")
    assert_refused(run("--input", text, "--dataset_name", "a/b"), "--dataset_name is for")
    assert_refused(run("--input", text, "--val_fraction", 1), "--val_fraction: must be less than 1")
    assert_refused(run("--input", text, "--max_tokens", 0), "--max_tokens: must be at least 1")
    (tmp_path / "out").mkdir()
    assert_refused(run("--input", text), "out exists and is not prepared data", "--out")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    monkeypatch.setattr(prepare, "make", lambda *args: pytest.fail("begun"))
    assert_refused(run("--input", text, out="link"), "--out", "link cannot be made: it is a link")
    assert_refused(run("--input", text, out="a.jsonl/x/y"), "a.jsonl/x/y cannot be made",
                   "a.jsonl is a file")
    assert_refused(run("--input", text, out="/"), "/ exists and is not prepared data")
    assert not (tmp_path / "out.partial").exists()


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
        path = self.path.partition("?")[0]
        self.asked.append((self.command, path))
        dataset = path.removeprefix("/api/datasets") if path.startswith("/api/datasets/") else None
        if (dataset or path).startswith("/acme/gated"):
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        if (dataset or path).startswith("/acme/forbidden"):
            return self.answer(403, {})
        if dataset == "/acme/broken":
            return self.answer(418, {})
        body = self.datasets.get(dataset) if dataset else self.files.get(path)
        if not body:
            code = "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
            return self.answer(404, {"X-Error-Code": code})
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


@pytest.fixture
def point_at(monkeypatch):
    """Lets the Hub's client ask another address."""
    def point(url):
        hub.answers.cache_clear()
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            url + "/{repo_id}/resolve/{revision}/{filename}")
    yield point
    hub.answers.cache_clear()


@pytest.fixture
def fake_hub(tmp_path, tokenizer, monkeypatch, point_at, run):
    """Starts a Hub; returns a function that runs the command against it."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    Hub.datasets, Hub.files, Hub.asked = {}, {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.files["/acme/model/resolve/main/tokenizer.json"] = (
        tokenizer / "tokenizer.json").read_bytes()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    point_at(f"http://127.0.0.1:{server.server_port}")

    def add(dataset, files, configs=None):
        """files: name -> texts; a parquet's i-th text has the int_score i % 6."""
        siblings = [{"rfilename": name} for name in ("README.md", *files)]
        card = {"configs": configs} if configs else {"license": "apache-2.0"}
        Hub.datasets[f"/{dataset}"] = json.dumps(
            {"id": dataset, "sha": SHA, "siblings": siblings, "cardData": card}).encode()
        for name, texts in files.items():
            local = tmp_path / Path(name).name
            if name.endswith(".parquet"):
                scores = [i % 6 for i in range(len(texts))]
                pq.write_table(pa.table({"text": texts, "int_score": scores}), local)
            else:
                write_jsonl(local, texts)
            Hub.files[f"/datasets/{dataset}/resolve/{SHA}/{name}"] = local.read_bytes()

    def command(*args, **options):
        return run("--tokenizer", "acme/model", "--val_fraction", 0.3, *args, **options)

    command.add = add
    yield command
    server.shutdown()
    server.server_close()


def downloads():
    """Files that were downloaded, in order."""
    return [path.partition(f"/resolve/{SHA}/")[2]
            for method, path in Hub.asked if method == "GET" and SHA in path]


def test_hub_parquet_by_config(fake_hub, tmp_path):
    files = {f"sample/10BT/00{i}_00000.parquet": sentences(i, 60) for i in range(3)}
    others = {"data/other/000.parquet": sentences(9, 10)}
    fake_hub.add("HuggingFaceFW/fineweb-edu", files | others, [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "sample-10BT",
         "data_files": [{"split": "train", "path": "sample/10BT/*"}]}])
    status, _, err = fake_hub()  # every default but the tokenizer, the folder and the split's size
    assert status == 0, err
    kept = [text for texts in files.values() for i, text in enumerate(texts) if i % 6 >= 3]
    assert sorted(both(tmp_path / "out")) == sorted(kept)
    assert downloads() == list(files)
    found = TokenDataset(tmp_path / "out", "train").meta["source"]
    assert found["revision"] == SHA
    assert found["dataset_name"] == "HuggingFaceFW/fineweb-edu"
    assert found["dataset_subset"] == "sample-10BT"
    assert found["min_score"] == 3

    Hub.asked.clear()
    assert fake_hub()[0] == 0
    assert not Hub.asked  # finished: nothing is asked
    assert fake_hub("--max_tokens", 300, out="cut")[0] == 0
    assert downloads() == []  # from the cache, as pinned
    assert {text.split("-")[0] for text in both(tmp_path / "cut")} == {"0"}
    assert not any("001_" in path for _, path in Hub.asked)  # past --max_tokens: not even asked for


def test_hub_json_lines_without_config(fake_hub, tmp_path):
    files = {f"en/c4-train.0000{i}-of-00002.json.gz": sentences(i, 60) for i in range(2)}
    fake_hub.add("acme/c4", files | {"en/c4-validation.0.json.gz": sentences(7, 9),
                                     "fr/c4-train.json.gz": sentences(8, 9)})
    status, _, err = fake_hub("--dataset_name", "acme/c4", "--dataset_subset", "en")
    assert status == 0, err
    assert sorted(both(tmp_path / "out")) == sorted(chain(*files.values()))
    assert downloads() == list(files)


def test_hub_errors_are_one_sentence(fake_hub, tmp_path, point_at, monkeypatch):
    fake_hub.add("acme/two", {"a.jsonl": sentences(1, 5)}, [
        {"config_name": "en", "data_files": "a.jsonl"},
        {"config_name": "test", "data_files": [{"split": "test", "path": "a.jsonl"}]}])
    local = write_jsonl(tmp_path / "local.jsonl", sentences(1, 50))
    for args, *words in (
            (["--dataset_name", "acme/gated"], "acme/gated", "HF_TOKEN", "`hf auth login`"),
            (["--input", local, "--tokenizer", "acme/forbidden"], "forbidden", "`hf auth login`"),
            (["--dataset_name", "acme/absent"], "acme/absent", "404"),
            (["--input", local, "--tokenizer", "./no/folder"], "there is no folder './no/folder'"),
            (["--dataset_name", "acme/broken"], "acme/broken", "the Hub answered 418"),
            (["--dataset_name", "acme/two", "--dataset_subset", "fr"], "no subset 'fr'",
             "en, test"),
            (["--dataset_name", "acme/two", "--dataset_subset", "test"], "no training files",
             "'test'")):
        assert_refused(fake_hub(*args), *words)
    point_at("http://127.0.0.1:9")
    assert_refused(fake_hub(), "HuggingFaceFW/fineweb-edu", "cannot be fetched", "no network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(fake_hub("--input", local), "acme/model", "HF_HUB_OFFLINE",
                   "--tokenizer train:4096")
    assert not list(tmp_path.glob("out*"))


def test_without_network_the_client_is_not_left_to_retry(fake_hub, tmp_path, point_at, monkeypatch):
    local = write_jsonl(tmp_path / "local.jsonl", sentences(1, 50))
    point_at("http://127.0.0.1:9")
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    assert_refused(fake_hub("--input", local), "acme/model", "no network")
    assert not slept  # five times, 23 seconds together, if the client was asked


def test_train_patterns_in_every_form():
    assert sources.train_patterns("a/*") == ["a/*"]
    assert sources.train_patterns(["a/*", "c.*"]) == ["a/*", "c.*"]
    by_split = {"test": "c.*", "train": ["a/*", "b"]}
    dicts = [{"split": split, "path": path} for split, path in by_split.items()]
    assert sources.train_patterns(dicts) == ["a/*", "b"]
    assert sources.train_patterns([{"path": "a"}, {"split": "train"}]) == ["a"]
