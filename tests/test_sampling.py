"""Decoding over the cache against full recomputation; what top-k, top-p and temperature leave."""

import math

import pytest
import torch

from nanoqstar import InputError, sampling
from nanoqstar.attention import dense
from nanoqstar.head import fp32_logits
from nanoqstar.sampling import Decoder, generate, sample_token

PROMPTS = [[5, 9, 2, 30, 11], [40], [3, 3, 58, 21], [8, 1, 44, 13, 13, 6, 52]]
BANNED = [7, 60]


def recompute(model, context, thought, with_thoughts):
    """Logits of the token after `context`, by causal forwards over the whole of it and no cache."""
    def forward(x, places=None):
        return model.lm(x[None], torch.arange(len(x)) if places is None else places, dense(None))[0]

    text = model.lm.embed(torch.tensor(context))
    hidden, mix = forward(text)[-1], 0.0
    if with_thoughts:
        thought, start, end = (model.lm.embed(thought), model.start_embedding,
                               model.end_embedding)
        places = torch.arange(len(text) + len(thought) + 2)
        if model.reread:
            start, end = text[-1] + start, thought[-1] + end
            places[len(text):] -= 1
            places[-1] -= 1
        thinking = torch.cat((text, start[None], thought, end[None]))
        talk = forward(thinking, places)[-1]
        mix = torch.nn.Sequential.forward(model.mixing_head, torch.cat((hidden, talk)))
        hidden = (1 - mix) * hidden + mix * talk
    return model.lm.logits(hidden).masked_fill(model.banned, -math.inf), float(mix)


@pytest.mark.parametrize("n_ahead", [0, 3, 4, 6])
def test_cached_decoding_is_full_recomputation(make_model, tied, reread, n_ahead):
    """Token by token, prompts of several lengths together; no thought is in a later context."""
    model, contexts = make_model(tied, reread=reread), [list(p) for p in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for step in generate(model, PROMPTS, 6, n_ahead, generator=generator):
            assert step.logits.dtype == torch.float64
            assert step.thoughts.shape == (4, max(n_ahead - 2, 0))
            for row, context in enumerate(contexts):
                logits, mix = recompute(model, context, step.thoughts[row], n_ahead > 0)
                torch.testing.assert_close(step.logits[row], logits, rtol=0, atol=1e-10)
                assert abs(step.mix[row].item() - mix) < 1e-10
                assert (n_ahead == 0) == (mix == 0)
                context.append(step.tokens[row].item())
    assert [len(c) for c in contexts] == [11, 7, 10, 13]


@pytest.fixture
def likeliest(monkeypatch):
    """Text and thoughts are the likeliest tokens each time."""
    def likeliest_thought(hidden, weight, u, temperature, banned):
        return fp32_logits(hidden, weight, banned, temperature).argmax(-1, keepdim=True), None
    monkeypatch.setattr(sampling, "sample_tokens", likeliest_thought)
    monkeypatch.setattr(sampling, "sample_token", lambda logits, *settings: logits.argmax(-1))


@pytest.mark.parametrize("n_ahead", [0, 3, 6])
def test_thoughts_are_those_of_full_recomputation(make_model, likeliest, n_ahead):
    """Every token of a thought from the unmixed state before it; here the likeliest each time."""
    model, context = make_model(thought_temperature=2.0), list(PROMPTS[0])
    with torch.no_grad():
        for step in generate(model, PROMPTS[:1], 4, n_ahead):
            x = torch.cat((model.lm.embed(torch.tensor(context)), model.start_embedding[None]))
            for token in step.thoughts[0]:
                hidden = model.lm(x[None], torch.arange(len(x)), dense(None))[0, -1]
                logits = model.lm.logits(hidden).masked_fill(model.banned, -math.inf)
                assert token == logits.argmax()
                x = torch.cat((x, model.lm.embed(token)[None]))
            context.append(step.tokens[0].item())


@pytest.mark.parametrize("n_ahead", [0, 3, 6])
def test_prompts_together_are_prompts_alone(make_model, likeliest, n_ahead):
    """What pads the shorter ones on the left is seen by nobody."""
    model = make_model(tied=False)
    together = list(generate(model, PROMPTS, 7, n_ahead))
    for row, prompt in enumerate(PROMPTS):
        for ours, alone in zip(together, generate(model, [prompt], 7, n_ahead), strict=True):
            assert torch.equal(ours.tokens[row], alone.tokens[0])
            assert torch.equal(ours.thoughts[row], alone.thoughts[0])
            torch.testing.assert_close(ours.logits[row], alone.logits[0], rtol=0, atol=1e-11)


def test_compiled_steps_are_not_compiled_again(make_model, likeliest):
    """A graph for the forwards of one token, one for those of two, whatever the prompt."""
    counters, model = torch._dynamo.utils.counters, make_model(num_hidden_layers=3)
    plain = list(generate(model, PROMPTS[:1], 5, 5))
    torch._dynamo.reset()
    counters.clear()
    for block in model.lm.model.layers:
        block.compile(dynamic=False, backend="eager")
    list(generate(model, [[1, 2]], 3, 5))  # on a CPU, not on a GPU, every length is a shape
    warm = counters["stats"]["unique_graphs"]
    compiled = list(generate(model, PROMPTS[:1], 5, 5))
    assert 2 <= warm <= 2 * 3
    for a, b in zip(compiled, plain, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_ahead", [0, 3, 6])
def test_a_decoder_takes_new_prompts(make_model, n_ahead):
    """Shorter or longer than the last ones, and padded otherwise; the last ones leave no trace."""
    model, decoder = make_model(), Decoder(make_model(), 4, 20, n_ahead)
    for prompts in (PROMPTS, PROMPTS[::-1], [[9], [1, 2], [4], [3] * 12], [[5], [6], [7], [8]]):
        (step,) = generate(model, prompts, 1, n_ahead, generator=torch.Generator().manual_seed(0))
        text, n = decoder.begin(prompts)
        u = torch.rand(4, max(0, n_ahead - 2), generator=torch.Generator().manual_seed(0))
        assert text[:, -1].tolist() == [p[-1] for p in prompts]
        assert n.tolist() == list(range(max(map(len, prompts))))
        logits, thoughts, mix = decoder.next_logits(text, n, u)
        assert torch.equal(logits, step.logits)
        assert torch.equal(thoughts, step.thoughts)
        assert torch.equal(mix, step.mix)
        assert not logits.requires_grad
        if n_ahead:
            thought, base = decoder.think(text, n, u)
            assert torch.equal(thought, thoughts)
            assert base.shape == (4, 24)
            assert not base.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_ahead", [0, 5])
def test_decoding_in_fewer_bits(make_model, likeliest, n_ahead, dtype):
    """Weights of any dtype, thoughts' parameters in fp32 as they are loaded; logits are fp32."""
    model = make_model()
    with torch.no_grad():
        for p in model.lm.parameters():
            p.copy_(p.bfloat16())
    reference = next(generate(model, PROMPTS, 3, n_ahead))
    model.float().lm.to(dtype)
    steps = list(generate(model, PROMPTS, 3, n_ahead))
    assert len(steps) == 3
    assert steps[0].logits.dtype == torch.float32
    assert steps[0].mix.dtype == (torch.float32 if n_ahead else dtype)
    error = (steps[0].logits - reference.logits).nan_to_num(0.0).abs().max()
    assert 0 < error < {torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("n_ahead", [0, 4])
def test_logits_that_are_no_numbers_are_refused(make_model, n_ahead, settings):
    """Also where a thought's token is drawn from them first."""
    for value in (math.nan, math.inf, 1e308):
        model = make_model()
        model.lm.model.norm.weight.detach().fill_(value)
        with pytest.raises(InputError, match="not finite"):
            next(generate(model, PROMPTS, 3, n_ahead, **settings))


@pytest.mark.parametrize("n_ahead", [0, 4])
def test_top_k_of_one_is_greedy(make_model, monkeypatch, n_ahead):
    """The same tokens as temperature 0 given the same thoughts, whatever the temperature."""
    model, likely = make_model(), []

    def same_thoughts(hidden, weight, u, temperature, banned):
        return fp32_logits(hidden, weight, banned).argmax(-1, keepdim=True), None
    monkeypatch.setattr(sampling, "sample_tokens", same_thoughts)
    for settings in ({"temperature": 0}, {"top_k": 1}, {"top_k": 1, "temperature": 9.0},
                     {"top_p": 1e-9}, {"top_p": 1e-300}, {"temperature": 1e-300}):
        steps = list(generate(model, PROMPTS, 8, n_ahead,
                              generator=torch.Generator().manual_seed(1), **settings))
        likely.append(torch.stack([s.tokens for s in steps]))
        assert all(torch.equal(s.tokens, s.logits.argmax(-1)) for s in steps)
    assert all(torch.equal(likely[0], other) for other in likely[1:])


def test_generation_is_reproducible(make_model):
    model = make_model()

    def tokens(seed):
        steps = generate(model, PROMPTS, 10, 4, generator=torch.Generator().manual_seed(seed))
        return torch.stack([torch.cat((s.tokens[:, None], s.thoughts), 1) for s in steps])
    assert torch.equal(tokens(3), tokens(3))
    assert not torch.equal(tokens(3), tokens(4))


def shares(probabilities, n=40_000, dtype=torch.float64, **settings):
    logits = torch.tensor(probabilities, dtype=dtype).log().expand(n, -1)
    ids = sample_token(logits, generator=torch.Generator().manual_seed(0), **settings)
    assert ids.shape == (n,)
    return ids.bincount(minlength=len(probabilities)) / n


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, [0.1, 0.4, 0.0, 0.2, 0.3]),
    ({"top_k": 1}, [0, 1, 0, 0, 0]),
    ({"top_k": 2}, [0, 4 / 7, 0, 0, 3 / 7]),
    ({"top_k": 100}, [0.1, 0.4, 0.0, 0.2, 0.3]),
    ({"top_p": 0.001}, [0, 1, 0, 0, 0]),
    ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
    ({"top_p": 0.41}, [0, 4 / 7, 0, 0, 3 / 7]),
    ({"top_p": 0.71}, [0, 4 / 9, 0, 2 / 9, 3 / 9]),
    ({"top_p": 1.0}, [0.1, 0.4, 0.0, 0.2, 0.3]),
    ({"temperature": 0.5}, [1 / 30, 16 / 30, 0, 4 / 30, 9 / 30]),
    ({"temperature": 0}, [0, 1, 0, 0, 0]),
    ({"top_k": 3, "top_p": 0.43}, [0, 1, 0, 0, 0]),  # of 4/9, 3/9, 2/9: top-k comes first
    ({"temperature": 0.5, "top_p": 0.53}, [0, 1, 0, 0, 0]),  # of 16/30 ..: temperature comes first
    ({"temperature": 1e-4}, [0, 1, 0, 0, 0]), ({"temperature": 1e-300}, [0, 1, 0, 0, 0]),
    ({"temperature": 5e-324}, [0, 1, 0, 0, 0]), ({"top_p": 1e-300}, [0, 1, 0, 0, 0]),
    ({"temperature": 1e-300, "top_k": 3, "top_p": 1e-300}, [0, 1, 0, 0, 0]),
], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sample_token_by_hand(settings, expected, dtype):
    """Exactly the right ids survive, in the right proportions."""
    ours = shares([0.1, 0.4, 0.0, 0.2, 0.3], dtype=dtype, **settings)
    expected = torch.tensor(expected)
    assert torch.equal(ours > 0, expected > 0)
    assert (ours - expected).abs().max() < 0.01


@pytest.mark.parametrize(("u", "expected"), [(0.0, 1), (1 - 2**-24, 3)])
@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
def test_no_draw_is_an_id_of_zero_probability(monkeypatch, u, expected, settings):
    """The lowest and the highest number that there is, the first and the last ids impossible."""
    monkeypatch.setattr(sampling.torch, "rand", lambda *shape, **options: torch.full(shape, u))
    logits = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log()
    assert sample_token(logits, **settings) == expected


def test_a_small_temperature_gives_the_right_probabilities():
    """Of logits that lie closer together than their quotients by the temperature can tell."""
    logits, temperature = torch.tensor([10_000.0, 10_000.0 - 2**-10]), 1.4e-3
    expected = 1 / (1 + math.exp(-(2**-10) / temperature))
    ids = sample_token(logits.expand(40_000, -1), temperature,
                       generator=torch.Generator().manual_seed(0))
    assert abs((ids == 0).double().mean() - expected) < 0.02


def test_rows_of_a_batch_are_filtered_apart():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]]).log()
    generator = torch.Generator().manual_seed(0)
    for settings, kept in (({"top_k": 2}, 2), ({"top_p": 0.45}, 1)):
        drawn = torch.stack([sample_token(logits, generator=generator, **settings)
                             for _ in range(200)])
        for row in range(3):
            assert set(drawn[:, row].tolist()) == set(logits[row].topk(kept).indices.tolist())


@pytest.mark.parametrize("settings", [
    {"temperature": 0}, {"temperature": 1.0}, {"temperature": 5.0, "top_p": 0.99}, {"top_k": 2},
], ids=str)
def test_unknown_ids_are_never_emitted(make_model, settings):
    """Neither in text nor in thoughts, though one of them is always the likeliest."""
    model = make_model(tied=False, banned=BANNED)
    with torch.no_grad():
        head = model.lm.lm_head.weight
        head[BANNED[0]] *= 100
        head[BANNED[1]] = -head[BANNED[0]]

    def emitted():
        generator = torch.Generator().manual_seed(0)
        steps = list(generate(model, PROMPTS, 10, 5, generator=generator, **settings))
        return torch.cat([torch.cat((s.tokens[:, None], s.thoughts), 1) for s in steps])
    assert not torch.isin(emitted(), torch.tensor(BANNED)).any()
    model.banned = None
    assert torch.isin(emitted(), torch.tensor(BANNED)).float().mean() > 0.8


def test_thoughts_have_the_thought_temperature(make_model):
    """Frequencies of the first thought token of many copies of a prompt; text has another one."""
    for temperature in (0.5, 2.0):
        model = make_model(thought_temperature=temperature)
        (step,) = generate(model, [PROMPTS[0]] * 4000, 1, 3, temperature=0,
                           generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            x = torch.cat((model.lm.embed(torch.tensor(PROMPTS[0])), model.start_embedding[None]))
            hidden = model.lm(x[None], torch.arange(len(x)), dense(None))[0, -1]
            logits = (model.lm.logits(hidden) / temperature).masked_fill(model.banned, -math.inf)
            expected = logits.softmax(-1)
        frequency = step.thoughts[:, 0].bincount(minlength=61) / 4000
        assert (frequency - expected).abs().max() < 0.03
