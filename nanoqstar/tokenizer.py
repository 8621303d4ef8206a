"""Tokenizers: loading, the ids that end a text, and those that no text holds."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from nanoqstar import InputError

END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
OFFICIAL_DELIMITERS = ("<|startthought|>", "<|endthought|>")  # ids of the official checkpoint that are no text


def load_tokenizer(folder):
    """The tokenizer in `folder`/tokenizer.json."""
    file = Path(folder) / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{folder} has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"{file} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text_id(tokenizer):
    """Id of the token that ends a document, or None: the first of END_OF_TEXT that the tokenizer has."""
    return next((i for i in map(tokenizer.token_to_id, END_OF_TEXT) if i is not None), None)


def unknown_ids(tokenizer, vocab_size):
    """(V,) bool: ids without a token, which must never be sampled; so are the official checkpoint's delimiters."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    if largest >= vocab_size:
        raise InputError(f"the tokenizer has id {largest}, the model {vocab_size} rows: they do not belong together")
    unknown = torch.ones(vocab_size, dtype=torch.bool)
    unknown[[i for token, i in vocabulary.items() if token not in OFFICIAL_DELIMITERS]] = False
    return unknown
