"""Tokenizers: loading, what they put before a text, the ids that end it, those no text holds."""

import os
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer

from nanoqstar import InputError
from nanoqstar.files import read_small
from nanoqstar.hub import fetch, hub_id

END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
END_OF_TURN = "<|im_end|>"  # of an instruct model
OFFICIAL_DELIMITERS = ("<|startthought|>", "<|endthought|>")  # entries of the official checkpoint


def load_tokenizer(path_or_id: str | os.PathLike) -> Tokenizer:
    """The tokenizer.json of a folder or of the Hub's `owner/name`; InputError: there is none."""
    file = Path(path_or_id, "tokenizer.json")
    if not os.path.isdir(path_or_id):
        file = Path(fetch(hf_hub_download, hub_id(path_or_id), file.name))
    elif not file.is_file():
        raise InputError(f"{path_or_id} has no tokenizer.json: name a folder or Hub id that has it "
                         "with --tokenizer")
    data = read_small(file)
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"{file} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """Ids of the setting `name`'s text alone; InputError where there are none."""
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"{name}: the tokenizer cannot encode {text!r} ({error}): it lacks "
                         "some of these characters; another text or another model") from None
    if not ids:
        raise InputError(f"{name}: {text!r} has no tokens under this tokenizer; choose another "
                         "text")
    return ids


def beginning_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text: [1] (`<s>`) for Mistral, nothing for Qwen."""
    if not tokenizer.num_special_tokens_to_add(False):
        return []
    encoded = tokenizer.encode("a")
    n = next((i for i, added in enumerate(encoded.special_tokens_mask) if not added), 0)
    return encoded.ids[:n]


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """Id of the token that ends a document: the first of END_OF_TEXT that the tokenizer has."""
    return next((i for i in map(tokenizer.token_to_id, END_OF_TEXT) if i is not None), None)


def unknown_ids(tokenizer: Tokenizer, vocab_size: int) -> torch.Tensor:
    """(V,) bool: ids that must never be sampled: without a token, or an official delimiter."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    if largest >= vocab_size:
        raise InputError(f"the tokenizer has id {largest}, the model {vocab_size} rows: they do "
                         "not belong together")
    unknown = torch.ones(vocab_size, dtype=torch.bool)
    unknown[[i for token, i in vocabulary.items() if token not in OFFICIAL_DELIMITERS]] = False
    return unknown
