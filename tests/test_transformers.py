"""Thinking inside transformers' own generate: token for token what ours writes."""

import pytest
import torch
from tokenizers import Tokenizer, models

from nanoqstar import InputError, hf, sampling
from nanoqstar.transformers import generate, thinker

transformers = pytest.importorskip("transformers")
PROMPTS = [[5, 9, 2, 30, 11], [40], [3, 3, 58, 21]]
PAD = 0


def words(n):
    """n words, of which the last ends a text."""
    vocabulary = {f"t{i}": i for i in range(n - 1)} | {"</s>": n - 1}
    return Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))


@pytest.fixture(params=["tied", "untied", "mistral", "reread"])
def taught(request, make_model, tmp_path):
    """A float64 model in a folder, its ids from 59 on without a word, and as transformers has it:
    (ours, theirs)."""
    return load(make_model, tmp_path, tied=request.param == "tied",
                attention_bias=request.param != "mistral", reread=request.param == "reread")


@pytest.fixture
def tied_pair(make_model, tmp_path):
    return load(make_model, tmp_path)


def load(make_model, tmp_path, **sizes):
    model = make_model(banned=(59, 60), thought_temperature=0.7, **sizes)
    thinking = hf.Thinking(6, 2, 0.7, "reread" if model.reread else "learned")
    hf.save(tmp_path / "model", model, words(59), thinking=thinking, step=1, config={},
            source=None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model",
                                                               dtype=torch.float64)
    theirs.generation_config.eos_token_id = None
    return model, theirs


def padded(prompts):
    """Ids and attention mask, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])


def ours(model, prompts, n, n_ahead):
    torch.manual_seed(3)
    steps = list(sampling.generate(model, prompts, n, n_ahead, temperature=0))
    return torch.stack([step.tokens for step in steps], dim=1)


def theirs_greedy(model, ids, n, **options):
    torch.manual_seed(3)
    return model.generate(ids, custom_generate=generate, max_new_tokens=n, do_sample=False,
                          **options)[:, ids.shape[1]:]


@pytest.mark.parametrize(("asked", "n_ahead"), [({}, 6), ({"n_ahead": 3}, 3), ({"n_ahead": 0}, 0)])
def test_it_writes_what_we_write(taught, asked, n_ahead):
    """Greedy text behind sampled thoughts, float64, prompts of several lengths together."""
    model, theirs = taught
    ids, mask = padded(PROMPTS)
    written = theirs_greedy(theirs, ids, 9, attention_mask=mask, pad_token_id=PAD, **asked)
    assert torch.equal(written, ours(model, PROMPTS, 9, n_ahead))
    alone = theirs_greedy(theirs, torch.tensor(PROMPTS[:1]), 9, **asked)
    assert torch.equal(alone, ours(model, PROMPTS[:1], 9, n_ahead))


def test_without_thoughts_it_writes_what_plain_generate_writes(taught):
    _, theirs = taught
    theirs.generation_config.suppress_tokens = [59, 60]  # the ids that no text of ours holds
    ids, mask = padded(PROMPTS)
    options = dict(attention_mask=mask, pad_token_id=PAD)
    plain = theirs.generate(ids, max_new_tokens=9, do_sample=False, **options)[:, ids.shape[1]:]
    assert torch.equal(theirs_greedy(theirs, ids, 9, n_ahead=0, **options), plain)
    assert not torch.equal(theirs_greedy(theirs, ids, 9, **options), plain)  # thoughts do matter


def test_a_text_ends_and_is_padded(tied_pair):
    model, theirs = tied_pair
    ids, mask = padded(PROMPTS)
    expected = ours(model, PROMPTS, 20, 6)
    end = expected[0, 2].item()
    firsts = [(row == end).nonzero() for row in expected]
    for row, first in zip(expected, firsts, strict=True):
        row[int(first[0]) + 1 if len(first) else 20:] = PAD
    last = max(int(first[0]) if len(first) else 19 for first in firsts)
    written = theirs_greedy(theirs, ids, 20, attention_mask=mask, pad_token_id=PAD,
                            eos_token_id=end)
    assert torch.equal(written, expected[:, :last + 1])
    assert (written[0, 3:] == PAD).all()


def test_the_generation_config_says_how_text_is_sampled(tied_pair):
    """Against the distribution after temperature and top-k, which are transformers' own."""
    model, theirs = tied_pair
    ids = torch.tensor(PROMPTS[:1]).expand(4000, -1)
    torch.manual_seed(0)
    written = theirs.generate(ids, custom_generate=generate, max_new_tokens=1, do_sample=True,
                              temperature=2.0, top_k=3, n_ahead=0)[:, -1]
    step = next(sampling.generate(model, PROMPTS[:1], 1, 0))
    top = step.logits[0].topk(3)
    expected = (top.values / 2).softmax(-1)
    assert set(written.tolist()) == set(top.indices.tolist())
    share = (written[:, None] == top.indices).double().mean(0)
    assert (share - expected).abs().max() < 4 * (0.25 / 4000)**0.5
    torch.manual_seed(0)
    again = theirs.generate(ids, custom_generate=generate, max_new_tokens=1, do_sample=True,
                            temperature=2.0, top_k=3, n_ahead=0)[:, -1]
    assert torch.equal(again, written)


def test_no_weight_is_copied_and_nothing_is_changed(taught):
    _, theirs = taught
    before = {name: x.clone() for name, x in theirs.state_dict().items()}
    model, thinking = thinker(theirs)
    assert thinking == hf.Thinking(6, 2, 0.7, "reread" if model.reread else "learned")
    given = theirs.state_dict(keep_vars=True)
    shared = dict(model.lm.named_parameters())
    assert all(p is given[name] for name, p in shared.items())
    assert set(shared) | {"lm_head.weight"} == set(given)
    theirs_greedy(theirs, torch.tensor(PROMPTS[:1]), 2)
    assert all(torch.equal(x, before[name]) for name, x in theirs.state_dict().items())
    assert model.banned.nonzero()[:, 0].tolist() == [59, 60]


def test_bfloat16_keeps_what_is_ours_in_fp32(tied_pair):
    _, theirs = tied_pair
    model, _ = thinker(theirs.bfloat16())
    assert model.lm.head_weight.dtype == torch.bfloat16
    assert model.mixing_head[0].weight.dtype == model.start_embedding.dtype == torch.float32
    assert theirs_greedy(theirs, torch.tensor(PROMPTS[:1]), 3).shape == (1, 3)


def test_a_model_loaded_from_elsewhere(tied_pair, tmp_path):
    model, theirs = tied_pair
    theirs.save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain",
                                                              dtype=torch.float64)
    plain.generation_config.eos_token_id = None
    ids = torch.tensor(PROMPTS[:1])
    with pytest.raises(InputError, match=r"plain has no quietstar\.safetensors: .*export"):
        theirs_greedy(plain, ids, 1)
    written = theirs_greedy(plain, ids, 5, folder=str(tmp_path / "model"))
    assert torch.equal(written, ours(model, PROMPTS[:1], 5, 6))
    plain.lm_head = torch.nn.Linear(24, 61, dtype=torch.float32)  # as of a wrapped model
    plain.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(InputError, match=r"layers.1.mlp\S* is not in the model as in .*: load it"):
        theirs_greedy(plain, ids, 1, folder=str(tmp_path / "model"))


def test_a_folder_that_changes_is_read_again(tied_pair, make_model, tmp_path):
    _, theirs = tied_pair
    before = thinker(theirs)[0].start_embedding
    hf.save(tmp_path / "model", make_model(seed=1), words(59), thinking=hf.Thinking(4, 2, 1.0),
            step=2, config={}, source=None)
    model, thinking = thinker(theirs)
    assert thinking.n_ahead == 4
    assert not torch.equal(model.start_embedding, before)


@pytest.mark.parametrize(("options", "message"), [
    ({"n_ahead": 2}, "n_ahead=2 leaves no sampled token"),
    ({"n_ahead": -1}, "n_ahead=-1 leaves"),
    ({"num_beams": 2}, "leave num_beams"),
    ({"return_dict_in_generate": True}, "return_dict_in_generate out"),
    ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "padded on the left only.*padding_side"),
    ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "padded on the left only"),
    ({"attention_mask": torch.tensor([[0, 0, 0, 0]])}, "no empty prompt"),
    ({"max_new_tokens": 5000}, "more than the model's context of 4096"),
], ids=str)
def test_it_refuses_in_one_sentence(tied_pair, options, message):
    _, theirs = tied_pair
    asked = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": PAD} | options
    with pytest.raises(InputError, match=message):
        theirs.generate(torch.tensor([[5, 9, 2, 1]]), custom_generate=generate, **asked)


def test_other_settings_of_generate_hold_as_well(tied_pair):
    """Such as penalties and stopping criteria: they are transformers' own."""
    model, theirs = tied_pair
    ids = torch.tensor(PROMPTS[:1])
    first = ours(model, PROMPTS[:1], 1, 6).item()
    written = theirs_greedy(theirs, ids, 6, suppress_tokens=[first])
    assert first not in written[0].tolist()
    stop = transformers.StoppingCriteriaList([lambda ids, scores, **_: ids[:, 0] >= 0])
    assert theirs_greedy(theirs, ids, 6, stopping_criteria=stop).shape == (1, 1)
