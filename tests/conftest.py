"""Tiny random models and texts; rows of a batch always differ."""

import pytest
import torch

from nanoqstar import cpu
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config

SHAPE = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=4096)


@pytest.fixture(autouse=True)
def torchs_own_products(monkeypatch):
    """Whatever a test before has chosen for its process."""
    monkeypatch.setattr(cpu, "onednn", False)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["learned", "reread"])
def reread(request):
    return request.param


@pytest.fixture
def make_model():
    """(tied, banned ids, temperature, seed, reread, sizes) -> float64 Qwen2, biases, grouped keys.

    Every parameter of the QuietStar is random and none is zero: biases, start, end and the mixing
    head's last layer included.
    """
    def make(tied=True, banned=(7, 60), thought_temperature=1.0, seed=0, reread=False,
             **sizes):
        config = Qwen2Config(**SHAPE | sizes, tie_word_embeddings=tied)
        forbidden = torch.zeros(config.vocab_size, dtype=torch.bool)
        forbidden[list(banned)] = True
        model = QuietStar(Qwen2(config), thought_temperature, forbidden, reread).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
        return model
    return make


@pytest.fixture
def make_text():
    """(batch, tokens) -> ids and document ids (batch, tokens); row n holds n + 1 documents."""
    def make(batch, n_tokens, vocab=61, seed=1):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(vocab, (batch, n_tokens), generator=generator)
        first = torch.zeros(batch, n_tokens, dtype=torch.long)
        for row in range(1, batch):
            first[row, 1 + torch.randperm(n_tokens - 1, generator=generator)[:row]] = 1
        return text, 10 * torch.arange(batch)[:, None] + first.cumsum(1)
    return make


@pytest.fixture
def make_thoughts():
    """(batch, passes, positions, sampled) -> random thoughts, no two alike to speak of."""
    def make(*shape, vocab=61, seed=2):
        return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))
    return make
