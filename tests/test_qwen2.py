"""The hand-written model equals transformers' Qwen2 and Mistral, read from transformers' files."""

import itertools
import json

import pytest
import torch
from tokenizers import Tokenizer, models

from nanoqstar.attention import dense, text_mask
from nanoqstar.cpu import rotate
from nanoqstar.hf import load_thinker
from nanoqstar.qwen2 import KVCache, RMSNorm, rope_tables

BOUND = 1e-5  # of max|a-b| / max|b|, float32

CASES = {  # model, tied head, key/value heads of 4, shard size in bytes
    "qwen2-tied-2groups-single": ("Qwen2", True, 2, None),
    "qwen2-untied-1group-sharded": ("Qwen2", False, 1, 40_000),
    "qwen2-tied-1group-sharded": ("Qwen2", True, 1, 40_000),
    "qwen2-untied-4groups-single": ("Qwen2", False, 4, None),
    "mistral-untied-2groups-sharded": ("Mistral", False, 2, 40_000),
    "mistral-untied-1group-single": ("Mistral", False, 1, None),
    "mistral-tied-4groups-single": ("Mistral", True, 4, None),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from the files it wrote)."""
    transformers = pytest.importorskip("transformers")
    kind, tied, kv_heads, shard = request.param
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=128,
        tie_word_embeddings=tied, rms_norm_eps=1e-5, attn_implementation="eager",
        rope_parameters={"rope_theta": 5e4, "rope_type": "default"})
    torch.manual_seed(0)
    reference = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    # at their initial values biases and norms would test nothing
    for name, p in reference.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.3)
    folder = tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    n_files = len(list(folder.glob("*.safetensors")))
    assert n_files > 1 if shard else n_files == 1
    ours = load(folder)
    assert ours.config.rope_theta == 5e4 and ours.config.tie_word_embeddings == tied
    assert ours.config.attention_bias == (kind == "Qwen2")
    return reference, ours


def load(folder):
    """The language model of a folder, to which a tokenizer is added."""
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(97)}, unk_token="t0")).save(
        str(folder / "tokenizer.json"))
    model, _, settings = load_thinker(folder)
    assert settings.thinking.n_ahead == 0
    return model.lm


def relative_error(ours, reference):
    assert ours.shape == reference.shape and ours.dtype == reference.dtype
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def some_ids(batch=2, length=23):
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits(pair):
    reference, ours = pair
    ids = some_ids()
    positions = torch.arange(ids.shape[1])
    expected = reference(ids).logits
    assert expected.std() > 0.1
    assert relative_error(ours.logits(ours(ids, positions, dense(None))), expected) < BOUND
    embedded = ours(ours.embed(ids), positions, dense(None))
    assert relative_error(ours.logits(embedded), expected) < BOUND


@torch.no_grad()
def test_logits_of_several_documents(pair):
    """Rows that differ in their documents, each with positions of its own."""
    reference, ours = pair
    ids = some_ids()
    docs = torch.tensor([[0] * 9 + [1] * 14, [0] * 2 + [1] * 20 + [2]])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row.bincount().tolist()])
                             for row in docs])
    mask = text_mask(docs)
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = reference(ids, attention_mask=bias, position_ids=positions).logits
    assert relative_error(ours.logits(ours(ids, positions, dense(mask))), expected) < BOUND
    assert relative_error(reference(ids).logits, expected) > 0.01


@pytest.mark.parametrize("reverse_slots", [False, True])
@torch.no_grad()
def test_logits_with_cache(pair, reverse_slots):
    """The prompt in pieces; which slots hold it does not matter, nor what those held before."""
    reference, ours = pair
    ids, n_slots = some_ids(), 30
    slots = torch.arange(n_slots).flip(0) if reverse_slots else torch.arange(n_slots)
    cache = KVCache(ours.config, len(ids), n_slots)
    for stale in (*cache.keys, *cache.values):
        stale.fill_(7.0)
    logits = []
    for start, stop in itertools.pairwise((0, 1, 8, 9, 20, 23)):
        positions = torch.arange(start, stop)
        mask = torch.zeros(1, 1, stop - start, n_slots, dtype=torch.bool)
        mask[..., slots] = torch.arange(n_slots) <= positions[:, None]
        cache.slots = slots[start:stop]
        logits.append(ours.logits(ours(ids[:, start:stop], positions, dense(mask), cache)))
    assert relative_error(torch.cat(logits, dim=1), reference(ids).logits) < BOUND


def test_config_of_older_transformers(pair, tmp_path):
    """rope_theta and torch_dtype at the top level, as before transformers 5."""
    reference, ours = pair
    config = reference.config.to_dict()
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config |= {"model_type": reference.config.model_type, "rope_scaling": None, "head_dim": None}
    reference.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).config == ours.config


def test_norm_statistics_are_fp32_in_bf16():
    """All but a few elements are the exact result, rounded once."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    x = (x * torch.logspace(-2, 2, 64)[:, None]).bfloat16()
    exact = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    bf16_statistics = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()

    def misrounded(out):
        return (out != exact.bfloat16()).double().mean().item()
    assert misrounded(RMSNorm(4096, 1e-6)(x)) < 1e-3 < 0.1 < misrounded(bf16_statistics)


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_is_fp32_in_bf16(masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 200, 64, generator=generator).bfloat16()
               for heads in (4, 2, 2))
    q = q * 3  # logits of some dozens, where bf16 has steps of 1/8
    mask = torch.ones(200, 200, dtype=torch.bool).tril()[None, None]
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 64**-0.5
    exact = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.double().repeat_interleave(2, 1)
    probs = scores.bfloat16().masked_fill(~mask, -torch.inf).softmax(-1)

    def error(out):
        return ((out.double() - exact).abs().max() / exact.abs().max()).item()
    ours = dense(mask if masked else None)(q, k, v)
    assert error(ours) < 4e-3 < 1e-2 < error(probs @ v.repeat_interleave(2, 1))


def test_rope_is_fp32_in_bf16():
    """Turned to a far position and back, a bf16 vector is itself up to its own rounding."""
    x = torch.randn(1, 1, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.arange(8) + 30_001
    cos, sin = rope_tables(positions, 64, 1e6, torch.float32)
    exact = [table.to(torch.float32) for table in rope_tables(positions, 64, 1e6, torch.float64)]
    assert (cos - exact[0]).abs().max() < 5e-3 and (sin - exact[1]).abs().max() < 5e-3
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert (rotate(turned.float(), cos, -sin) - x).abs().max() < 0.02
