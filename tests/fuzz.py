"""python tests/fuzz.py [--cases 2000] [--seed 0] [--only N]: hostile and broken input.

Every file that the scripts read is damaged, forged, inflated, emptied or replaced by something that
it is not, and command lines are drawn from the settings' own fields. Each case runs in a process of
its own and must end in one sentence with exit code 2, or in a correct run: no traceback, no signal,
no hang, bounded memory, nothing written but what the command names, nothing opened but that, the
installation and the system's own, nothing unpickled or executed. Exit 0, or 1 with the findings.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
               "HF_HOME": str(Path(tempfile.gettempdir()) / "no-hub"),
               "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / "no-hub")}
sys.dont_write_bytecode = True
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch._inductor.config  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import seed as hypothesis_seed  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from prepared import make_tokenizer, sentences, write_jsonl  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from configs import PRESETS, PrepareConfig, SampleConfig, TrainConfig  # noqa: E402
from data import prepare, writer  # noqa: E402
from nanoqstar import InputError, bench, cli, device, experiments, flops, runlog, state  # noqa: E402

PATIENCE, HANG = 6, 20  # seconds after which a run is asked to end (again, twice so), hangs
GROWTH, ADDRESSES = 400 << 20, 24 << 30  # bytes: more resident than before; all that can be mapped
MEMORY = 300 << 20  # of the machine that runs believe to be on; they refuse what must take more
SENTENCE = 4000  # characters
SIZES = dict(hidden_size=16, intermediate_size=32, n_layers=2, n_heads=2, n_kv_heads=1,
             pretrain_steps=2, pretrain_batch_size=2, max_length=12, n_ahead=4, batch_size=2,
             eval_windows=2, max_steps=3, eval_every=2, save_every=1, keep=3, log_every=1,
             threads=1)
TINY = [f"--{key}={value}" for key, value in SIZES.items()]
CONTINUED = [f"--{key}={SIZES[key]}" for key in (
    "max_length", "n_ahead", "batch_size", "eval_windows", "max_steps", "log_every", "threads")]


# ---- what is damaged


def build(at: Path, log: int) -> None:
    """Whole inputs of every kind, made by the scripts themselves."""
    os.chdir(at)
    os.dup2(log, 1)
    os.dup2(log, 2)
    (at / "words").mkdir()
    make_tokenizer(at / "words")
    texts = sentences(1, 200)
    (at / "text").mkdir()
    write_jsonl(at / "text" / "a.jsonl", texts[:90])
    write_jsonl(at / "text" / "b.jsonl.gz", texts[90:120], int_score=4)
    (at / "text" / "c.txt").write_text("".join(texts[120:150]))
    (at / "text" / "d.txt.gz").write_bytes(gzip.compress("".join(texts[150:170]).encode()))
    import pyarrow
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"text": texts[170:], "int_score": [3] * 30}),
                        at / "text" / "e.parquet")
    assert prepare.main(["--input=text", "--tokenizer=words", "--out=data", "--val_fraction=0.2"
                         ]) == 0
    run = ["text", "--data=data", *TINY]
    runlog.in_host_memory = lambda tensors: None  # every save is waited for
    assert train.main([*run, "--out_dir=run"]) == 0
    assert train.main([*run, "--out_dir=adapted", "--lora_rank=2", "--learning_rate=0.1"]) == 0
    assert (at / "adapted/checkpoint/adapter").is_dir()
    for name in ("run", "adapted"):  # an out_dir that is in the way of none
        shutil.rmtree(at / name / "base")
    shutil.copytree(at / "run/checkpoint", at / "model")
    (at / "model/special_tokens_map.json").write_text('{"bos_token": "a"}')
    (at / "model/chat_template.jinja").write_text("{{ messages }}")
    shutil.copytree(at / "model", at / "shards")
    weights = load_file(at / "shards/model.safetensors")
    (at / "shards/model.safetensors").unlink()
    names = sorted(weights)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, at / "shards" / file, {"format": "pt"})
    (at / "shards/model.safetensors.index.json").write_text(json.dumps({
        "metadata": {}, "weight_map": {n: f for f, part in files.items() for n in part}}))
    prepare.BATCH_CHARS = 2000
    commit, calls = writer.DatasetWriter.commit, []

    def cut_short(self, **state):
        commit(self, **state)
        calls.append(1)
        if len(calls) == 3:
            os._exit(0)  # as killed: build's last act
    writer.DatasetWriter.commit = cut_short  # type: ignore[method-assign]
    prepare.main(["--input=text", "--tokenizer=words", "--out=cut", "--val_fraction=0.2"])


class Pickled:
    def __reduce__(self):
        return os.system, ("touch ../beside/executed",)


def others() -> list[bytes]:
    """Files of other types."""
    import pickle
    array = io.BytesIO()
    np.save(array, np.arange(5))
    return [b"\x89PNG\r\n\x1a\n" + bytes(50), gzip.compress(b"{}" * 99), b"PK\x03\x04" + bytes(50),
            pickle.dumps(Pickled()), array.getvalue(), b"PAR1" + bytes(20) + b"PAR1", b"\x7fELF",
            struct.pack("<Q", 2) + b"{}", b"import os; os.system('touch ../beside/executed')",
            b"{}", b"[]", b"null", b"{", b"0", b'""', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}"]


HOSTILE = [  # JSON, or what Python takes for it
    "null", "true", "false", "-1", "0", "1", "2", "0.5", "-0.0", "1e999", "-1e999", "NaN",
    "Infinity", "-Infinity", "1e308", "5e-324", "2147483648", "9223372036854775807",
    "9223372036854775808", "1" + "0" * 400, "9" * 5000, '""', '"1"', f'"{"x" * 10**5}"',
    r'"\u0000"', r'"\ud800"', r'"\u001b[2J"', '"../beside/model.safetensors"', '"/etc/passwd"',
    '"../beside"', "[]", "{}", "[null]", "[1, 2]", '["a"]', '{"a": 1}', "[" * 300 + "]" * 300,
    "[" * 10**5, '{"a":' * 500 + "1" + "}" * 500, "[-1]", "[1e999]"]
MARK = "@mark@"


def nodes(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    for key, x in items:
        yield from nodes(x, (*path, key))


def garble(rng: random.Random, text: str) -> str:
    """A JSON object in which a node, or a key, is something else."""
    value = json.loads(text)
    path = rng.choice([p for p in nodes(value) if p] or [("a",)])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    how, raw = rng.choice(["node"] * 6 + ["near"] * 3 + ["gone", "key", "twice"]), MARK
    old = parent.get(path[-1]) if isinstance(parent, dict) else parent[path[-1]]
    hostile = rng.choice([*HOSTILE, *(["[" * n + "]" * n for n in (90, rng.randrange(300, 1000))])])
    if how == "near" and type(old) in (int, float):
        hostile = repr(rng.choice([old + 1, old - 1, -old, old * 2, old / 2, str(old)]))
        hostile = hostile.replace("'", '"')
    if how == "gone":
        del parent[path[-1]]
    elif how == "key" and isinstance(parent, dict):
        parent[rng.choice(["", "x", "__class__", "\x1b[2J", "x" * 10**4])] = raw
    elif how == "twice" and isinstance(parent, dict):
        items = list(parent.items())
        parent.clear()
        parent |= {MARK + "key": raw} | dict(items)
    else:
        parent[path[-1]] = raw
    whole = json.dumps(value).replace(json.dumps(MARK), hostile)
    return whole.replace(json.dumps(MARK + "key"), json.dumps(path[-1]))


def garbled_tensors(rng: random.Random, data: bytes) -> bytes:
    n = int.from_bytes(data[:8], "little")
    header, rest = data[8:8 + n].decode(), data[8 + n:]
    how = rng.choice(["json"] * 4 + ["size", "offsets", "shape", "dtype", "values", "twice"])
    value = json.loads(header)
    name = rng.choice([k for k in value if k != "__metadata__"])
    if how == "json":
        header = garble(rng, header)
    elif how == "size":
        n = rng.choice([0, 1, 7, 2**31, 2**62, 2**63, 2**64 - 1, len(data), len(data) + 1, n - 1])
        return n.to_bytes(8, "little") + data[8:]
    elif how == "offsets":
        begin, end = value[name]["data_offsets"]
        value[name]["data_offsets"] = rng.choice([
            [end, begin], [begin, 2**62], [begin + 1, end + 1], [2**63, 2**63 + 4], [0, 4], [0, 0]])
    elif how == "shape":
        value[name]["shape"] = rng.choice([[2**40, 2**40], [0], [], [2**63, 2], [1] * 5000, [-1]])
    elif how == "dtype":
        value[name]["dtype"] = rng.choice(["I64", "BOOL", "F8_E4M3", "U8", "", "O", "C64", "F16"])
    elif how == "twice":
        return data + data
    else:
        bad = rng.choice([float("nan"), float("inf"), -float("inf"), 1e30, 3e38])
        begin = value[name]["data_offsets"][0] if value[name]["dtype"] == "F32" else 0
        rest = rest[:begin] + struct.pack("<f", bad) + rest[begin + 4:]
    if how in ("offsets", "shape", "dtype"):
        header = json.dumps(value)
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + rest


def garbled_array(rng: random.Random, data: bytes) -> bytes:
    shape = rng.choice([(2**62,), (2**40, 2**40), (-1,), (), (0,), (5,), "a", (10**400,)])
    kind = rng.choice(["<i8", "<i8", "|O", "<f8", ">i8", "<U9999999", "x", "<i8" * 9])
    text = rng.choice([
        repr({"descr": kind, "fortran_order": rng.choice([False, True, 3]), "shape": shape}),
        "__import__('os').system('touch ../beside/executed')", "{" * 5000, "9" * 6000, "("])
    header = text.encode() + b"\n"
    size = rng.choice([len(header), len(header), 65535])
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", min(size, 65535)) + header + data[128:]


def damage(rng: random.Random, file: Path) -> str:
    """Makes `file` something else; what, in words."""
    data = file.read_bytes()
    how = rng.choice(["garbled"] * 12 + ["flipped"] * 4 + [
        "truncated", "truncated", "emptied", "inflated", "inflated", "overwritten", "cut", "other",
        "other", "folder", "link to nothing", "link to itself", "pipe", "absent", "huge", "bytes",
        "unreadable"])
    if how == "garbled":
        if file.suffix == ".safetensors":
            file.write_bytes(garbled_tensors(rng, data))
        elif file.suffix == ".npy":
            file.write_bytes(garbled_array(rng, data))
        elif file.suffix == ".json":
            file.write_bytes(garble(rng, data.decode()).encode("utf-8", "surrogatepass"))
        elif file.suffix == ".jsonl":
            lines = data.decode().splitlines()
            i = rng.randrange(len(lines))
            lines[i] = garble(rng, lines[i])
            file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        else:
            how = "flipped"
    place = rng.randrange(len(data) or 1)
    if how == "flipped":
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 8, 100])):
            place = rng.choice([rng.randrange(len(data)), rng.randrange(min(99, len(data)))])
            flipped[place] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
    elif how == "truncated":
        file.write_bytes(data[:place])
    elif how == "emptied":
        file.write_bytes(b"")
    elif how == "inflated":
        more = rng.choice([b"\0" * 4096, b" " * 10**6, rng.randbytes(5000), data, b"\n", b"}"])
        file.write_bytes(data + more)
    elif how == "overwritten":
        file.write_bytes(data[:place] + rng.randbytes(64) + data[place + 64:])
    elif how == "cut":
        file.write_bytes(data[:place] + data[place + rng.randrange(1, 64):])
    elif how == "other":
        file.write_bytes(rng.choice(others()))
    elif how == "bytes":
        file.write_bytes(data[:place] + b"\xff\xc0\x80\0" + data[place:])
    elif how == "huge":  # and sparse
        os.truncate(file, 2 << 30)
    elif how == "unreadable":  # but for root
        file.chmod(0)
    elif how != "garbled":
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "pipe":
            os.mkfifo(file)
        elif how.startswith("link"):
            file.symlink_to(file.name if how == "link to itself" else "../nothing")
    return f"{file} {how}"


def readable(file: Path) -> bool:
    return file.is_file() and file.stat().st_size < 1 << 30 and os.access(file, os.R_OK)


def sign(file: Path) -> None:
    """Gives a forged file the sum that it should have, where it still is JSON."""
    needed = [file, *[file.with_name("tokenizer.json")] * (file.name == writer.JOURNAL)]
    if not all(map(readable, needed)):
        return
    try:
        value = json.loads(file.read_bytes())
        if file.name == "state.json":
            value.pop("sha256")
            value["sha256"] = state.sum_of(value)
        elif file.name == writer.JOURNAL:
            value.pop("checksum")
            words = hashlib.sha256(file.with_name("tokenizer.json").read_bytes()).hexdigest()
            value["checksum"] = writer.checksum(value, words)
        file.write_text(json.dumps(value))
    except (ValueError, OSError, KeyError, AttributeError, RecursionError, TypeError):
        pass


def sign_tensors(folder: Path) -> None:
    file = folder / "state.json"
    value = json.loads(file.read_bytes())
    name = "rank-00000.safetensors"
    if readable(folder / name):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        value["files"][name]["sha256"] = digest
        file.write_text(json.dumps(value))
        sign(file)


# ---- cases: (what is damaged, script, command line, inputs, what may be written)


SAMPLE = ["--prompt=the cat", "--max_new_tokens=3", "--show_thoughts"]
NAMES = {  # kind: files that are damaged, of the inputs that it takes
    "a model": ("model", ["config.json", "model.safetensors", "quietstar.safetensors",
                          "nanoqstar.json", "tokenizer.json", "tokenizer_config.json",
                          "generation_config.json", "special_tokens_map.json",
                          "chat_template.jinja"]),
    "a model in shards": ("shards", ["model.safetensors.index.json"] * 3
                          + ["model-00001-of-00002.safetensors", "config.json"]),
    "a model's adapter": ("adapted/checkpoint", ["adapter/adapter_config.json",
                                                 "adapter/adapter_model.safetensors"]),
    "prepared data": ("data", ["meta.json", "meta.json", "train.bin", "val.bin", "train.docs.npy",
                               "val.docs.npy", "tokenizer.json"]),
    "a run's states": ("run", ["state/step-000005/state.json"] * 2
                       + ["state/step-000005/rank-00000.safetensors"] * 2
                       + ["metrics.jsonl", "config.json", "config.json",
                          "checkpoint/config.json", "state/step-000004/state.json"]),
    "a saved config": ("run", ["config.json"]),
    "text": ("text", ["a.jsonl", "b.jsonl.gz", "c.txt", "d.txt.gz", "e.parquet", "e.parquet"]),
    "a journal": ("cut.partial", ["journal.json"] * 3 + [
        "tokenizer.json", "train.bin", "train.starts", "val.bin", "val.starts"]),
    "a tokenizer": ("words", ["tokenizer.json"]),
    "a table's runs": ("run", ["metrics.jsonl"]),
}


def drawn(rng: random.Random, kind: str, slot: Path, source: Path,
          whole: bool = False) -> tuple:
    """Puts a case's inputs into `slot` and damages them."""
    folder, names = NAMES[kind]
    inputs = {folder.split("/")[0]} | (
        {"text", "words"} if kind in ("text", "a journal", "a tokenizer") else {"data"})
    for name in inputs:
        shutil.copytree(source / name, slot / name, symlinks=True,
                        copy_function=shutil.copy2)
    said, done = [], set()
    for name in [rng.choice(names) for _ in range(rng.choice([1, 1, 1, 2]))]:
        if name not in done and not whole:
            done.add(name)
            said.append(damage(rng, Path(folder) / name))
    forged = rng.random() < 0.6
    if kind == "a run's states" and forged:
        sign(Path(folder, names[0]))
        if any("rank" in x for x in done) and readable(Path(folder, names[0])):
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                sign_tensors(Path(folder, names[0]).parent)
    if kind == "a journal" and forged:
        sign(Path(folder, "journal.json"))
    if kind == "prepared data" and forged and "tokenizer.json" in done:
        file = Path(folder, "tokenizer.json")
        if readable(file) and readable(Path("data/meta.json")):
            with suppress(ValueError, TypeError, RecursionError):
                meta = json.loads(Path("data/meta.json").read_bytes())
                meta["tokenizer_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
                Path("data/meta.json").write_text(json.dumps(meta))
    what = "; ".join(said) + " (signed)" * forged
    out = ("out", "out.partial")
    if kind.startswith("a model"):
        if rng.random() < 0.2:
            prompts = [b"the cat", b"", b"\xff\xfe", rng.randbytes(99), b"\0", b"x" * 10**5]
            Path("stdin").write_bytes(b"\n".join(rng.choices(prompts, k=3)))
            return f"{what}; prompts", sample.main, [f"--model_path={folder}",
                                                     "--max_new_tokens=3"], ()
        if rng.random() < 0.6:
            return what, sample.main, [f"--model_path={folder}", *SAMPLE], ()
        return what, train.main, ["text", f"--model_path={folder}", "--data=data", "--out_dir=out",
                                  *CONTINUED], out
    if kind == "prepared data":
        return what, train.main, ["text", "--data=data", "--out_dir=out", *TINY], out
    if kind == "a run's states":
        return what, train.main, ["--resume=run", "--max_steps=4"], ("run",)
    if kind == "a saved config":
        return what, train.main, ["run/config.json", "--out_dir=out"], out
    if kind in ("text", "a tokenizer"):
        given = rng.choice(["text", f"text/{min(done)}"]) if kind == "text" and done else "text"
        words = "--tokenizer=words" if rng.random() < 0.7 else "--tokenizer=train:300"
        strict = ["--strict"] if rng.random() < 0.3 else []
        return what, prepare.main, [f"--input={given}", words, "--out=out", *strict], out
    if kind == "a journal":
        return what, prepare.main, ["--input=text", "--tokenizer=words", "--out=cut",
                                    "--val_fraction=0.2"], ("cut", "cut.partial")
    folder = "table/tiny/main/seed-0"
    Path(folder).parent.mkdir(parents=True)
    Path("run").rename(folder)
    return what, experiments.main, ["controls", "--seeds=1", "--out=table"], ("table",)


# ---- command lines


WORDS = ["", " ", "none", "None", "true", "FALSE", "nan", "inf", "-inf", "1e999", "-1", "0", "1",
         "2", "3", "0x10", "1_000", "_", "1__0", " 5 ", "٣", "½", "1e3", "1.5", "-0", "+1",
         "9223372036854775807", "9223372036854775808", "1" + "0" * 400, "9" * 5000, "x" * 10**5,
         "é", "日本", "\udcff", "\0", "a\0b", "\n", "\x1b[2J", "--", "--help", "-h", "=", "a=b",
         "\\n", "data", "run", "model", "words", "text", "train:300", "train:", "train:-1",
         "train:٣٣٣", "train:99999999999", "a/b", ".", "nothing", "data/meta.json", "$(id)", "%s"]


def edges(f) -> list[str]:
    """Values at and beyond a field's bounds."""
    bounds, accepted = f.metadata["bounds"].values(), cli.types_of(f)[0]
    near = [x + d for x in (*bounds, 0) for d in (-1, 0, 1)]
    if float in accepted:
        near += [x * y for x in bounds for y in (1 - 1e-16, 1 + 1e-15)] + [1e-300, 1e300, 0.1]
    if int in accepted:
        near = [int(x) for x in near] + [7, 100, 2**31, 2**32, 2**63 - 1, 2**63, -2**63, 10**30]
    choices = [*(cli.types_of(f)[1] or ()), *(["true", "false"] if bool in accepted else ())]
    return [str(x) for x in near if accepted != (str,)] + choices


def suitable(f) -> list[str]:
    """Those of them that the field itself accepts, and that do not take long."""
    good = []
    for text in edges(f):
        try:
            value = cli.parse_value(f, text)
            if isinstance(value, bool | str) or value is None or all(
                    {"at least": value >= x, "greater than": value > x, "at most": value <= x,
                     "less than": value < x}[bound] for bound, x in f.metadata["bounds"].items()):
                good.append(text)
        except InputError:
            pass
    return good or WORDS


UNSAFE = ("out_dir", "out", "json")  # where the words name a folder to write: inside, please


def options(cls: type) -> st.SearchStrategy:
    """A few options of a settings class, in either spelling, and what is none."""
    def of(f):
        good = st.sampled_from(suitable(f))
        values = st.one_of(*[good] * 9, st.sampled_from(edges(f) or WORDS), st.sampled_from(WORDS),
                           st.text(max_size=20), st.integers().map(str), st.floats().map(str))
        if f.name in UNSAFE:
            values = st.sampled_from(["out", "out/a/b", "", "é", "x" * 300, "data",
                                      "data/meta.json", "a\0b", "\udcff"])
        return st.tuples(values, st.booleans()).map(
            lambda x: [f"--{f.name}={x[0]}"] if x[1] else [f"--{f.name}", x[0]])

    junk = st.sampled_from([["--nothing=1"], ["--"], ["-x"], ["--=1"], ["--max_step", "3"], ["é"],
                            ["--\0"], ["x" * 10**5], ["--" + "x" * 10**5], [""], ["--seed"],
                            ["--seed", "1", "--seed=2"], ["--help"], ["-h"], ["--\x1b[2J=1"]])
    option = st.sampled_from([f for f in fields(cls) if f.name != "compile"]).flatmap(of)
    one = st.one_of(*[option] * 20, junk)
    return st.lists(one, min_size=1, max_size=4).map(lambda x: [w for ws in x for w in ws])


FIRST = st.sampled_from([*["text"] * 60, "tiny", *PRESETS, "tinny", "", "run/config.json",
                         "configs", "data/meta.json", "run", "\0", "x" * 10**5,
                         "../beside/config.json"])


def command_lines(n: int, seed: int) -> list[tuple]:
    """n of (script, command line, inputs, what may be written), drawn by hypothesis."""
    def line(main, base, cls, inputs, out):
        return options(cls).map(lambda x: (main, [*base, *x], inputs, out))

    new = [*TINY, "--data=data", "--out_dir=out"]
    out = ("out", "out.partial", "é", "é.partial", "data", "data.partial", "\udcff",
           "\udcff.partial")
    lines = st.one_of(
        *[st.tuples(FIRST, options(TrainConfig)).map(lambda x: (
            train.main, [x[0], *new, *x[1]], ("data", "run"), out))] * 4,
        line(train.main, ["text", "--model_path=model", "--data=data", "--out_dir=out", *CONTINUED],
             TrainConfig, ("data", "model"), out),
        line(train.main, ["tiny", *TINY, "--fold_tokens=3000", "--out_dir=out"], TrainConfig,
             (), out),
        line(train.main, ["--resume=run"], TrainConfig, ("data", "run"), (*out, "run")),
        *[line(sample.main, ["--model_path=model", "--max_new_tokens=3", "--prompt=a"],
               SampleConfig, ("model", "words"), ())] * 2,
        *[line(prepare.main, ["--input=text", "--tokenizer=words", "--out=out"], PrepareConfig,
               ("text", "words"), out)] * 2,
        line(bench.main, ["train"], bench.BenchConfig, (), out),
        st.tuples(options(experiments.TableConfig), options(TrainConfig)).map(lambda x: (
            experiments.main, ["controls", "--out=out", *x[0], "--", *x[1]], (), out)))
    found: list[tuple] = []

    @settings(max_examples=n, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @hypothesis_seed(seed)
    @given(lines)
    def collect(line):
        found.append(line)

    collect()
    return found[:n]


# ---- running one


READABLE = tuple(map(os.path.realpath, (
    sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), ROOT,
    *(os.path.dirname(os.path.dirname(m.__file__)) for m in (np, torch)), "/proc", "/sys",
    "/dev", "/usr", "/lib", "/etc")))
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
             "os.fork", "os.forkpty", "socket.connect", "pty.spawn", "webbrowser.open")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod",
           "os.chown", "os.truncate", "shutil.rmtree", "os.listdir", "os.scandir")
VIOLATION = "VIOLATION"


def watch(slot: str, errors: int) -> None:
    """Notes what this process must not do, from here on, on the descriptor `errors`."""
    def inside(path, more=()):
        if isinstance(path, int) or path is None:
            return True
        real = os.path.realpath(os.fsdecode(path))
        return any(os.path.commonpath((real, x)) == x for x in (slot, *more)) and not (
            real.startswith(f"{slot}/beside"))

    def hook(event, args):
        try:
            if event == "open":
                writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                bad = not inside(args[0], () if writes else READABLE) and args[0] != "/dev/null"
            elif event in CHANGES:
                more = READABLE if event in ("os.listdir", "os.scandir") else ()
                paths = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
                bad = not all(inside(path, more) for path in paths)
            elif event in ("exec", "compile"):
                name = args[0].co_filename if event == "exec" else args[1]
                bad = isinstance(name, str) and name.startswith("/") and not inside(name, READABLE)
            elif event == "ctypes.dlopen":
                bad = args[0] is not None and not str(args[0]).startswith(READABLE)
            else:
                bad = event in FORBIDDEN
        except ValueError:  # of a name with a NUL, which opens nothing
            bad = False
        if bad:
            os.write(errors, f"{VIOLATION}: {event} {args!r:.300}\n".encode(errors="replace"))
    sys.addaudithook(hook)


def perform(main, args: list[str], slot: Path) -> None:
    """Runs a command line in this process, which ends with its exit code."""
    code = 70
    try:
        device.can_compile = lambda device: False  # or it takes a minute
        flops.total_memory = lambda device: MEMORY
        bench.run = experiments.subprocess.run = lambda *args, **options: None  # minutes
        if main is experiments.main and "--out=table" not in args:
            experiments.run = lambda *args: None
        for name, mode, fd in (("stdin", "r", 0), ("stdout", "w", 1), ("stderr", "w", 2)):
            path = f"../{name}" if fd else "stdin" if os.path.exists("stdin") else "/dev/null"
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC if fd else os.O_RDONLY), fd)
            setattr(sys, name, open(fd, mode, closefd=False, encoding="utf-8"))  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        watch(os.path.realpath(slot), 2)
        code = main(args)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def tree(folder: Path) -> dict[str, tuple]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).parts[0] == "beside":  # the system tells
            continue
        stat = path.lstat()
        data = b""
        if path.is_file() and not path.is_symlink() and stat.st_size < 1 << 25 and (
                os.access(path, os.R_OK)):
            data = hashlib.sha256(path.read_bytes()).digest()
        found[path.relative_to(folder).as_posix()] = (stat.st_mode, path.is_dir() or stat.st_size,
                                                      data)
    return found


class Beside:
    """A folder with decoys beside the inputs, of which the system tells what is opened."""

    def __init__(self, folder: Path, source: Path) -> None:
        import ctypes
        shutil.copytree(source / "model", folder)
        libc = ctypes.CDLL(None)
        self.events = libc.inotify_init1(os.O_NONBLOCK)
        opened_or_changed = 0x20 | 0x2 | 0x100 | 0x200 | 0x40 | 0x80
        libc.inotify_add_watch(self.events, os.fsencode(folder), opened_or_changed)

    def touched(self) -> bool:
        if select.select([self.events], [], [], 0)[0]:
            return bool(os.read(self.events, 1 << 16))
        return False


class Runner:
    """Runs cases in a folder of its own, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.slot, self.source = folder / "slot", folder / "source"
        self.slot.mkdir(parents=True)
        with open(folder / "log", "w+") as log:
            # there, as a journal knows where its input is
            os.waitpid(forked(build, self.slot, log.fileno()), 0)
            if not (self.slot / "cut.partial").exists():
                raise SystemExit(log.read())
        self.slot.rename(self.source)
        self.slot.mkdir()
        self.beside = Beside(self.slot / "beside", self.source)
        self.expected: str | None = None
        self.base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    def clear(self) -> None:
        os.chdir(self.slot)
        for path in self.slot.iterdir():
            if path.name != "beside":
                (shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink)(path)

    def weights(self) -> str | None:
        """Of the run that was resumed."""
        digest = hashlib.sha256()
        for name in ("model", "quietstar"):  # the order of a file's metadata is random
            for x in load_file(self.slot / f"run/checkpoint/{name}.safetensors").values():
                digest.update(x.numpy().tobytes())
        return digest.hexdigest()

    def run(self, main, args, out, growth: int | None = None) -> tuple[int, list[str], dict]:
        """(exit code, what was wrong, figures)."""
        before, wrong = tree(self.slot), []
        begun, asked = time.monotonic(), 0
        self.beside.touched()  # by us
        pid = os.fork()
        if not pid:
            perform(main, args, self.slot)
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            seconds = time.monotonic() - begun
            if done:
                break
            if seconds > PATIENCE * (asked + 1) and asked < 2:  # a second ends it inside an update
                os.kill(pid, signal.SIGTERM)
                asked += 1
            if seconds > HANG:
                os.kill(pid, signal.SIGKILL)
                wrong.append(f"hangs over {HANG} s")
                os.wait4(pid, 0)
                status, usage = 9, None
                break
            time.sleep(0.004)
        code = os.waitstatus_to_exitcode(status)
        grown = (usage.ru_maxrss << 10) - self.base if usage else 0
        cpu = usage.ru_utime + usage.ru_stime if usage else 0  # little: it just waits
        said = (self.slot.parent / "stderr").read_text(errors="replace")
        last = said.strip("\n").splitlines()[-1:] or [""]
        if "Traceback" in said or (code not in (0, 2) and not (
                asked and code in (143, -15) and cpu > 1)):
            wrong.append(f"exit code {code}")
        if code == 2 and not last[0].startswith("error: "):
            wrong.append("no sentence")
        if len(last[0]) > SENTENCE or re.search("[\x00-\x08\x0b-\x1f\x7f]", last[0]):
            wrong.append("a sentence that no terminal should show")
        if VIOLATION in said:
            wrong.append("does what it must not")
        if grown > (GROWTH if growth is None else growth):
            wrong.append(f"takes {grown >> 20} MB")
        if self.beside.touched():
            wrong.append("opens what lies beside")
        after = tree(self.slot)
        changed = [name for name in before.keys() | after.keys()
                   if before.get(name) != after.get(name) and name.split("/")[0] not in out]
        if changed:
            wrong.append(f"changes {sorted(changed)[:5]}")
        if code == 0:
            wrong += self.check_rows(out)
        return code, wrong, {"seconds": seconds, "grown": grown, "asked": bool(asked), "said": said}

    def check_rows(self, out) -> list[str]:
        """What is wrong with what a finished run has logged."""
        for folder in out:
            file = self.slot / folder / "metrics.jsonl"
            if folder == "out" and file.is_file():
                rows = [json.loads(row) for row in file.read_text().splitlines()]
                numbers = [x for row in rows for x in row.values() if isinstance(x, float)]
                if not rows or rows[-1]["kind"] != "end" or not (
                        np.isfinite(numbers).all() or any(row.get("skipped") for row in rows)):
                    return ["a run that has ended well, and has not"]
        return []

    def undamaged(self, kind: str, seed: int) -> tuple:
        self.clear()
        _, main, args, out = drawn(random.Random(seed), kind, self.slot, self.source, whole=True)
        code, wrong, figures = self.run(main, args, out)
        if kind == "a run's states":
            self.expected = self.weights()
        return kind, wrong, code, figures["said"]

    def case(self, number: int, seed: int, line: tuple | None) -> dict:
        """One case: a command line that was drawn, or damage."""
        rng = random.Random(f"{seed}-{number}")
        self.clear()
        if line:
            main, args, inputs, out = line
            kind, what = f"command lines of {main.__module__.split('.')[-1]}", ""
            for name in inputs:
                shutil.copytree(self.source / name, self.slot / name)
        else:
            kind = rng.choice([*NAMES, "a run's states", "a model", "prepared data", "text"])
            what, main, args, out = drawn(rng, kind, self.slot, self.source)
        code, wrong, figures = self.run(main, args, out, 4 * MEMORY if line else None)
        if kind == "a run's states" and code == 0 and "(signed)" not in what and (
                self.weights() != self.expected):
            wrong.append("goes on, to other weights")
        return {"kind": kind, "what": what, "code": code, "wrong": wrong, "number": number,
                "command": " ".join([main.__module__, *map(repr, args)])[:3000], **figures}


def work(folder: Path, cases: list, seed: int, results: Path) -> None:
    """A worker's cases, a line of `results` each; first, undamaged, everything must work."""
    runner = Runner(folder)
    for kind in NAMES:
        _, wrong, code, said = runner.undamaged(kind, seed)
        assert not wrong and (code == 0 or kind == "a table's runs"), (kind, code, wrong, said)
    with open(results, "w") as file:
        for number, line in cases:
            file.write(json.dumps(runner.case(number, seed, line)) + "\n")
            file.flush()


def forked(function, *args) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=(
        argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    begun = time.monotonic()
    lines = command_lines(given.cases * 2 // 5, given.seed)
    cases = [(i, lines[i // 5 * 2 + i % 5] if i % 5 < 2 and i // 5 * 2 + i % 5 < len(lines)
              else None) for i in range(given.cases)]
    if given.only is not None:
        cases = [cases[given.only]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.path.realpath(temporary))
        files = [folder / f"results-{n}" for n in range(2)]
        workers = [forked(work, folder / f"worker-{n}", cases[n::2], given.seed, files[n])
                   for n in range(min(2, len(cases)))]
        failed = sum(os.waitpid(pid, 0)[1] for pid in workers) != 0
        results = [json.loads(line) for file in files if file.exists()
                   for line in file.read_text().splitlines()]
    return report(results, failed, time.monotonic() - begun)


def report(results: list[dict], failed: bool, seconds: float) -> int:
    counts: dict[str, Counter] = {}
    for r in results:
        counts.setdefault(r["kind"], Counter())[r["code"]] += 1
    codes = sorted({r["code"] for r in results}, key=lambda c: (c != 0, c != 2, c))
    print(f"{'':36}" + "".join(f"{f'exit {c}':>10}" for c in codes))
    for kind, count in sorted(counts.items()):
        print(f"{kind:36}" + "".join(f"{count[c]:10}" for c in codes))
    wrong = [r for r in results if r["wrong"]]
    for r in wrong:
        tail = "\n  ".join(r["said"].strip()[-1500:].splitlines())
        print(f"\n{r['number']}: {'; '.join(r['wrong'])}\n  {r['what']:.500}\n  {r['command']:.500}"
              f"\n  {tail}")
    slow = max(results, key=lambda r: r["seconds"], default={"seconds": 0})
    large = max(results, key=lambda r: r["grown"], default={"grown": 0})
    print(f"{len(results)} cases in {seconds:.0f} s: {len(wrong)} findings; the slowest took "
          f"{slow['seconds']:.1f} s, the largest {large['grown'] >> 20} MB more than at its start; "
          f"{sum(r['asked'] for r in results)} were still running after {PATIENCE} s and asked to "
          "end")
    return int(bool(wrong) or failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
