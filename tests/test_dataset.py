"""The reading side: windows, document indices, determinism, and what is refused."""

import json

import numpy as np
import pytest
import torch

from nanoqstar import InputError
from data.writer import split_of, write_dataset
from nanoqstar.dataset import TokenDataset

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
    assert np.fromfile(folder / "train.bin", dtype=np.uint16).tolist() == sum(DOCUMENTS, [])
    assert np.load(folder / "train.docs.npy").tolist() == [0, 3, 4]
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["format"], meta["dtype"], meta["vocab_size"], meta["end_of_text_id"]) == (1, "uint16", 100, None)
    assert meta["train"] == {"tokens": 24, "documents": 3} and meta["val"] == {"tokens": 7, "documents": 1}
    assert meta["source"] == {"name": "test"}


def test_large_ids_survive(tmp_path):
    write_dataset(tmp_path / "d", "{}", 2**16 + 1, 65536, {"train": [[65536, 1]], "val": [[2, 65536]]}, {})
    data = TokenDataset(tmp_path / "d", "val")
    assert data.meta["dtype"] == "uint32"
    assert data.windows([0], 2)[0].tolist() == [[2, 65536]]


def test_writing_again_replaces(folder):
    write_dataset(folder, "{}", 10, 0, {"train": [[1, 2]], "val": [[3]]}, {})
    assert TokenDataset(folder, "train").windows([0], 2)[0].tolist() == [[1, 2]]


def test_windows_know_their_documents(folder):
    data = TokenDataset(folder, "train")
    assert data.n_tokens == 24 and data.tokenizer_path == folder / "tokenizer.json"
    tokens, docs = data.windows([1, 0], 4)
    assert tokens.tolist() == [[6, 7, 8, 10], [5, 6, 7, 8]] and docs.tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]
    assert tokens.dtype == docs.dtype == torch.int64
    assert data.windows([20], 4)[0].tolist() == [[26, 27, 28, 29]]
    with pytest.raises(AssertionError):
        data.windows([21], 4)


def test_a_batch_depends_on_seed_step_and_index_alone(folder):
    data = TokenDataset(folder, "train")
    whole = data.batch(3, 7, range(16), 4)
    for parts in ([[0, 1, 2], [3, 4], list(range(5, 16))], [[i] for i in range(16)]):  # micro-batches, ranks
        pieces = [data.batch(3, 7, part, 4) for part in parts]
        for k in (0, 1):
            assert torch.equal(torch.cat([piece[k] for piece in pieces]), whole[k])
    assert not torch.equal(whole[0], data.batch(4, 7, range(16), 4)[0])
    assert not torch.equal(whole[0], data.batch(3, 8, range(16), 4)[0])
    first = data.batch(0, 0, range(2000), 4)[0][:, 0]
    assert set(first.tolist()) == set(sum(DOCUMENTS, [])[:21])  # every start is drawn, the last one included


def test_evenly_spaced_windows_do_not_overlap(folder):
    data = TokenDataset(folder, "train")
    tokens, _ = data.evenly(6, 4)
    assert tokens.flatten().tolist() == sum(DOCUMENTS, [])
    assert torch.equal(data.evenly(5, 4)[0], data.evenly(5, 4)[0])
    assert data.evenly(5, 4)[0].flatten().unique().numel() == 20
    assert data.evenly(1, 4)[0].tolist() == [[5, 6, 7, 8]]
    assert len(data.evenly(100, 23)[0]) == 2  # there are no more


def test_a_short_split_is_refused(folder):
    data = TokenDataset(folder, "val")
    assert data.evenly(1, 7)[0].shape == (1, 7)
    for call in (lambda: data.batch(0, 0, [0], 8), lambda: data.evenly(1, 8)):
        with pytest.raises(InputError, match="window of 8 tokens does not fit in the 7 tokens of the val split"):
            call()


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


DAMAGE = {
    "no meta": (lambda f: (f / "meta.json").unlink(), "has no meta.json"),
    "no tokens": (lambda f: (f / "train.bin").unlink(), "has no train.bin"),
    "no offsets": (lambda f: (f / "train.docs.npy").unlink(), "has no train.docs.npy"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "cut meta": (lambda f: (f / "meta.json").write_text('{"format": 1, "dty'), "no JSON object|read as JSON"),
    "binary meta": (lambda f: (f / "meta.json").write_bytes(b"\xff\xfe\x00"), "no JSON object|read as JSON"),
    "list meta": (lambda f: (f / "meta.json").write_text("[]"), "no JSON object|read as JSON"),
    "other format": (lambda f: edit_meta(f, format=2), "not of format 1"),
    "no dtype": (lambda f: edit_meta(f, dtype=None), "garbles"),
    "no counts": (lambda f: edit_meta(f, train={"tokens": 24}), "garbles"),
    "text counts": (lambda f: edit_meta(f, train={"tokens": "24", "documents": 3}), "garbles"),
    "no vocabulary": (lambda f: edit_meta(f, vocab_size=None), "garbles"),
    "other dtype": (lambda f: edit_meta(f, dtype="uint32"), "has 48 bytes where meta.json says 96"),
    "cut tokens": (lambda f: (f / "train.bin").write_bytes(b"abc"), "has 3 bytes where meta.json says 48"),
    "other tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "not the tokenizer that made these tokens"),
    "cut offsets": (lambda f: (f / "train.docs.npy").write_bytes(b"\x93NUM"), "cannot be read"),
    "empty offsets": (lambda f: (f / "train.docs.npy").write_bytes(b""), "cannot be read"),
    "fewer offsets": (lambda f: np.save(f / "train.docs.npy", np.array([0, 3])), "3 ascending document starts"),
    "unsorted offsets": (lambda f: np.save(f / "train.docs.npy", np.array([0, 4, 3])), "3 ascending document starts"),
    "offsets beyond": (lambda f: np.save(f / "train.docs.npy", np.array([0, 4, 24])), "3 ascending document starts"),
    "float offsets": (lambda f: np.save(f / "train.docs.npy", np.array([0., 3., 4.])), "3 ascending document starts"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_mending(folder, damage):
    act, sentence = DAMAGE[damage]
    act(folder)
    with pytest.raises(InputError, match=sentence) as caught:
        TokenDataset(folder, "train")
    assert str(folder) in str(caught.value) and "data/prepare.py" in str(caught.value)


def test_absent_and_unfinished_folders(tmp_path):
    with pytest.raises(InputError, match="no prepared data in .*data/prepare.py"):
        TokenDataset(tmp_path / "absent", "train")
    (tmp_path / "absent.partial").mkdir()
    with pytest.raises(InputError, match="interrupted, give the same command again"):
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
    assert {text for text in texts if split_of(text, 0.05) == "val"} < val  # a larger share only adds
    assert split_of("é\n", 1e-12) == "train" and split_of("é\n", 1 - 1e-12) == "val"
