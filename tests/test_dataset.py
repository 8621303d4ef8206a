"""The reading side: windows, document indices, determinism, and what is refused."""

import json
from itertools import chain

import numpy as np
import pytest
import torch

from data.writer import split_of, write_dataset
from nanoqstar import InputError, dataset
from nanoqstar.dataset import TokenDataset, prefetched, stream

DOCUMENTS = [[5, 6, 7], [8], list(range(10, 30))]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "words"
    splits = {"train": DOCUMENTS, "val": [np.arange(7)]}
    write_dataset(path, '{"any": "tokenizer"}', 100, None, splits, {"name": "test"})
    return path


def test_folder_holds_what_was_written(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "meta.json", "tokenizer.json", "train.bin", "train.docs.npy", "val.bin", "val.docs.npy"]
    assert not folder.with_name("words.partial").exists()
    assert np.fromfile(folder / "train.bin", dtype=np.uint16).tolist() == list(chain(*DOCUMENTS))
    assert np.load(folder / "train.docs.npy").tolist() == [0, 3, 4]
    meta = json.loads((folder / "meta.json").read_text())
    assert {key: value for key, value in meta.items() if key != "tokenizer_sha256"} == {
        "format": 1, "dtype": "uint16", "vocab_size": 100, "end_of_text_id": None,
        "beginning_ids": [], "val_fraction": None, "source": {"name": "test"},
        "train": {"tokens": 24, "documents": 3}, "val": {"tokens": 7, "documents": 1}}


def test_beginning_ids_may_be_absent_in_an_older_folder(folder):
    assert TokenDataset(folder, "train").beginning_ids == []
    edit_meta(folder, beginning_ids=[1, 5])
    assert TokenDataset(folder, "train").beginning_ids == [1, 5]
    meta = json.loads((folder / "meta.json").read_text())
    del meta["beginning_ids"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert TokenDataset(folder, "train").beginning_ids is None
    assert TokenDataset(folder, "train").n_tokens == 24


def test_large_ids_survive(tmp_path):
    splits = {"train": [[65536, 1]], "val": [[2, 65536]]}
    write_dataset(tmp_path / "d", "{}", 2**16 + 1, 65536, splits, {})
    data = TokenDataset(tmp_path / "d", "val")
    assert data.meta["dtype"] == "uint32"
    assert data.windows([0], 2)[0].tolist() == [[2, 65536]]


def test_writing_again_replaces(folder):
    write_dataset(folder, "{}", 10, 0, {"train": [[1, 2]], "val": [[3]]}, {})
    assert TokenDataset(folder, "train").windows([0], 2)[0].tolist() == [[1, 2]]


def test_windows_know_their_documents(folder):
    data = TokenDataset(folder, "train")
    assert data.n_tokens == 24
    assert data.tokenizer_path == folder / "tokenizer.json"
    tokens, docs = data.windows([1, 0], 4)
    assert tokens.tolist() == [[6, 7, 8, 10], [5, 6, 7, 8]]
    assert docs.tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]
    assert tokens.dtype == docs.dtype == torch.int64
    assert data.windows([20], 4)[0].tolist() == [[26, 27, 28, 29]]
    with pytest.raises(AssertionError):
        data.windows([21], 4)


def test_a_batch_depends_on_seed_phase_step_and_index_alone(folder):
    data = TokenDataset(folder, "train")
    whole = data.batch(3, "think", 7, range(16), 4)
    micro_batches, ranks = [[0, 1, 2], [3, 4], list(range(5, 16))], [[i] for i in range(16)]
    for parts in (micro_batches, ranks):
        pieces = [data.batch(3, "think", 7, part, 4) for part in parts]
        for k in (0, 1):
            assert torch.equal(torch.cat([piece[k] for piece in pieces]), whole[k])
    for other in ((4, "think", 7), (3, "pretrain", 7), (3, "think", 8)):
        assert not torch.equal(whole[0], data.batch(*other, range(16), 4)[0])
    first = data.batch(0, "pretrain", 0, range(2000), 4)[0][:, 0]
    assert set(first.tolist()) == set(list(chain(*DOCUMENTS))[:21])  # the last start, too


def test_no_two_streams_are_the_same():
    keys = [(kind, phase, step, index, seed) for kind in ("windows", "thoughts")
            for phase in ("pretrain", "think", "text", "eval") for step in (0, 1)
            for index in (0, 1) for seed in (0, 1, 2**32, 2**33)]
    assert len({stream(*key).integers(2**63) for key in keys}) == len(keys)


def test_prefetched_reads_every_step_in_order_and_one_ahead():
    read = []
    for step, value in zip(range(3, 6), prefetched(lambda step: read.append(step) or step * 10,
                                                   range(3, 6))):
        assert value == step * 10
        assert max(read) <= min(step + 1, 5)
    assert read == [3, 4, 5]


def test_evenly_spaced_windows_do_not_overlap(folder):
    data = TokenDataset(folder, "train")
    tokens, _ = data.evenly(6, 4)
    assert tokens.flatten().tolist() == list(chain(*DOCUMENTS))
    assert torch.equal(data.evenly(5, 4)[0], data.evenly(5, 4)[0])
    assert data.evenly(5, 4)[0].flatten().unique().numel() == 20
    assert data.evenly(1, 4)[0].tolist() == [[5, 6, 7, 8]]
    assert len(data.evenly(100, 23)[0]) == 2  # there are no more


def test_a_short_split_is_refused(folder):
    data = TokenDataset(folder, "val")
    assert data.evenly(1, 7)[0].shape == (1, 7)
    sentence = "window of 8 tokens does not fit in the 7 tokens of the val split"
    for call in (lambda: data.batch(0, "think", 0, [0], 8), lambda: data.evenly(1, 8)):
        with pytest.raises(InputError, match=sentence):
            call()


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def meta(**changes):
    return lambda folder: edit_meta(folder, **changes)


def header(shape):
    text = (b"{'descr': '<i8', 'fortran_order': False, 'shape': " + shape + b", }").ljust(117)
    return write("train.docs.npy", b"\x93NUMPY\x01\x00\x76\x00" + text + b"\n" + bytes(8))


def offsets(values):
    return lambda folder: np.save(folder / "train.docs.npy", np.array(values))


NO_JSON, NO_STARTS = "no JSON object|read as JSON", "3 ascending document starts"
DAMAGE = {
    "no meta": (remove("meta.json"), "is no prepared data .no meta.json.: name a folder"),
    "no tokens": (remove("train.bin"), "has no train.bin"),
    "no offsets": (remove("train.docs.npy"), "has no train.docs.npy"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer.json"),
    "cut meta": (write("meta.json", b'{"format": 1, "dty'), NO_JSON),
    "binary meta": (write("meta.json", b"\xff\xfe\x00"), NO_JSON),
    "list meta": (write("meta.json", b"[]"), NO_JSON),
    "other format": (meta(format=2), "not of format 1"),
    "no dtype": (meta(dtype=None), "garbles"),
    "no counts": (meta(train={"tokens": 24}), "garbles"),
    "text counts": (meta(train={"tokens": "24", "documents": 3}), "garbles"),
    "no vocabulary": (meta(vocab_size=None), "garbles"),
    "text for beginning ids": (meta(beginning_ids="<s>"), "garbles"),
    "texts as beginning ids": (meta(beginning_ids=["<s>"]), "garbles"),
    "other dtype": (meta(dtype="uint32"), "has 48 bytes where meta.json says 96"),
    "cut tokens": (write("train.bin", b"abc"), "has 3 bytes where meta.json says 48"),
    "other tokenizer": (write("tokenizer.json", b"{}"), "not the tokenizer that made these tokens"),
    "cut offsets": (write("train.docs.npy", b"\x93NUM"), "cannot be read"),
    "empty offsets": (write("train.docs.npy", b""), "cannot be read"),
    "fewer offsets": (offsets([0, 3]), NO_STARTS),
    "unsorted offsets": (offsets([0, 4, 3]), NO_STARTS),
    "offsets beyond": (offsets([0, 4, 24]), NO_STARTS),
    "float offsets": (offsets([0., 3., 4.]), NO_STARTS),
    "an archive as offsets": (write("train.docs.npy", b"PK\x03\x04" + b"x" * 50), "cannot be read"),
    "archived offsets": (lambda folder: np.savez((folder / "train.docs.npy").open("wb"), [0, 3, 4]),
                         "cannot be read"),
    "enormous offsets": (header(b"(10000000000000,)"), "cannot be read"),
    "boundless offsets": (header(b"(1000000000000000000000000,)"), "cannot be read"),
    "unclosed offsets": (header(b"((((("), "cannot be read"),
    "offsets without a shape": (header(b"()"), NO_STARTS),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_mending(folder, damage):
    act, sentence = DAMAGE[damage]
    act(folder)
    with pytest.raises(InputError, match=sentence) as caught:
        TokenDataset(folder, "train")
    assert str(folder) in str(caught.value)
    assert ("delete" in str(caught.value)) == (damage != "no meta")  # that may be anything
    assert "data/prepare.py" in str(caught.value)


def test_absent_and_unfinished_folders(tmp_path):
    with pytest.raises(InputError, match=r"no prepared data in .*data/prepare\.py"):
        TokenDataset(tmp_path / "absent", "train")
    (tmp_path / "absent.partial").mkdir()
    with pytest.raises(InputError, match="was interrupted, give the same command again"):
        TokenDataset(tmp_path / "absent", "train")


def test_an_id_beyond_the_vocabulary_is_refused(folder):
    edit_meta(folder, vocab_size=20)
    data = TokenDataset(folder, "train")
    assert data.windows([0], 4)[0].max() == 8
    with pytest.raises(InputError, match="beyond its vocabulary of 20"):
        data.windows([20], 4)


def test_hash_split_has_the_asked_size():
    texts = [f"document {i}" for i in range(4000)]
    val = {text for text in texts if split_of(text, 0.1) == "val"}
    assert 320 < len(val) < 480
    assert {text for text in texts if split_of(text, 0.05) == "val"} < val  # more only adds
    assert split_of("é\n", 1e-12) == "train"
    assert split_of("é\n", 1 - 1e-12) == "val"


def test_a_fingerprint_is_of_what_a_folder_holds(tmp_path, monkeypatch):
    """Of small files any byte; of large ones what evenly spaced blocks hold, the last included."""
    ids = [np.arange(100) % 11 for _ in range(80)]
    for name in ("a", "b"):
        write_dataset(tmp_path / name, "{}", 11, None, {"train": ids, "val": [[1, 2]]}, {})
    of = {name: TokenDataset(tmp_path / name, "train").fingerprint for name in ("a", "b")}
    assert of["a"] == of["b"]
    file = tmp_path / "b" / "train.bin"
    whole = file.read_bytes()
    for place in (0, 7777, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        assert TokenDataset(tmp_path / "b", "train").fingerprint != of["a"]
    monkeypatch.setattr(dataset, "BLOCKS", 3)
    seen = TokenDataset(tmp_path / "a", "train").fingerprint
    for place, told in ((0, True), (len(whole) // 2, True), (5000, False),
                        (len(whole) - 1, True)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        assert (TokenDataset(tmp_path / "b", "train").fingerprint != seen) == told
