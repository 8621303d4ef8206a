"""Tokenizers: what is loaded, what begins and ends a text, what no text holds."""

import json
import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from nanoqstar import InputError
from nanoqstar.tokenizer import (
    beginning_ids,
    encode,
    end_of_text_id,
    load_tokenizer,
    unknown_ids,
)


def words(*special, unknown="t0"):
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(5)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def like_mistral():
    """`<s>` before every text, bytes for what is unknown, spaces as in sentencepiece."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)},
                  "▁": 259, "a": 260, "b": 261, "▁a": 262}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>",
                                     byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


def write(folder, tokenizer):
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


def test_loading(tmp_path):
    tokenizer = words()
    expected = tokenizer.to_str()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    loaded = load_tokenizer(write(tmp_path, tokenizer))
    assert loaded.to_str() == expected
    assert loaded.encode("t1 t2 t3").ids == [1, 2, 3]
    assert load_tokenizer(str(tmp_path)).to_str() == expected


@pytest.mark.parametrize("content", ["{}", "", "\xff", "[" * 10**5, '{"a": ' + "[" * 10**5])
def test_broken_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin1"))
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer") as error:
        load_tokenizer(tmp_path)
    assert len(str(error.value)) < 300


def test_missing_tokenizer(tmp_path):
    with pytest.raises(InputError, match=r"has no tokenizer\.json: name .* with --tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_no_file(tmp_path):
    """Opening a FIFO would wait for ever."""
    (tmp_path / "a" / "tokenizer.json").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "tokenizer.json")
    for name in ("a", "b"):
        with pytest.raises(InputError, match=r"has no tokenizer\.json"):
            load_tokenizer(tmp_path / name)


def test_a_tokenizer_that_is_far_too_large_is_not_read(tmp_path):
    write(tmp_path, words())
    os.truncate(tmp_path / "tokenizer.json", 2**40)
    with pytest.raises(InputError, match=r"tokenizer\.json has 1,099,511,627,776 bytes"):
        load_tokenizer(tmp_path)


def test_beginning():
    assert beginning_ids(like_mistral()) == [1]
    assert like_mistral().encode("a").ids == [1, 262]
    assert beginning_ids(words("<s>")) == []  # it has one, but puts it nowhere

    qwen = words("<|endoftext|>")
    qwen.post_processor = processors.ByteLevel()
    assert beginning_ids(qwen) == []

    both = words("[CLS]", "[SEP]", "[MASK]")
    both.post_processor = processors.TemplateProcessing(
        "[CLS] [MASK] $A [SEP]", None, [("[CLS]", 5), ("[SEP]", 6), ("[MASK]", 7)])
    assert beginning_ids(both) == [5, 7]
    end = words("</s>")
    end.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 5)])
    assert beginning_ids(end) == []


def test_encode_adds_nothing():
    assert encode(like_mistral(), "a", "prompt") == [262]
    assert encode(words(), "t3 t4", "prompt") == [3, 4]


def test_what_cannot_be_encoded():
    with pytest.raises(InputError, match="prompt: the tokenizer cannot encode 'zebra'"):
        encode(words(unknown="no such token"), "zebra", "prompt")
    with pytest.raises(InputError, match=r"prompt: the tokenizer cannot encode 't1\\udcff'"):
        encode(words(), "t1\udcff", "prompt")  # a byte that was no UTF-8
    for text in ("", " \n"):
        with pytest.raises(InputError, match=r"start_init_text: .* has no tokens") as error:
            encode(words(), text, "start_init_text")
        assert repr(text) in str(error.value)


@pytest.mark.parametrize(("special", "expected"), [
    ((), None), (("<s>", "<|im_end|>"), None), (("</s>",), 5), (("</s>", "<|endoftext|>"), 6),
    (("<|end_of_text|>",), 5), (("<eos>",), 5)])
def test_end_of_text(special, expected):
    assert end_of_text_id(words(*special)) == expected


def test_unknown_ids():
    unknown = unknown_ids(words("<|endoftext|>", "<|startthought|>", "<|endthought|>"), 10)
    assert unknown.dtype == torch.bool
    assert unknown.shape == (10,)
    assert unknown.nonzero()[:, 0].tolist() == [6, 7, 8, 9]  # 6, 7: the official delimiters
    with pytest.raises(InputError, match="the tokenizer has id 7, the model 7 rows: they do not"):
        unknown_ids(words("a", "b", "c"), 7)


def test_unknown_ids_of_a_vocabulary_with_holes(tmp_path):
    content = json.loads(words().to_str())
    content["model"]["vocab"]["t9"] = 9
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    unknown = unknown_ids(load_tokenizer(tmp_path), 10)
    assert unknown.nonzero()[:, 0].tolist() == [5, 6, 7, 8]
