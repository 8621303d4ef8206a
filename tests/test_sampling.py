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


# ---- noise of their own, prompts that end, greedy thoughts, a text that goes on


def drawn(n_rows, n_tokens, n_ahead, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_rows, n_tokens, max(0, n_ahead - 2) + 1, generator=generator)


def written(steps):
    """{prompt: [(token, thought)]}"""
    rows = {}
    for step in steps:
        for row, token, thought in zip(step.rows, step.tokens.tolist(), step.thoughts.tolist()):
            rows.setdefault(row, []).append((token, *thought))
    return rows


@pytest.mark.parametrize("settings", [{}, {"top_k": 9, "top_p": 0.8, "temperature": 1.5}], ids=str)
@pytest.mark.parametrize("n_ahead", [0, 3, 5])
def test_with_noise_of_its_own_a_prompt_does_not_depend_on_the_others(make_model, n_ahead,
                                                                      settings):
    """Nor on how many tokens are asked for; the same prompt twice gets two texts."""
    model, prompts, u = make_model(), [*PROMPTS, PROMPTS[0]], drawn(5, 9, n_ahead)
    together = written(generate(model, prompts, 9, n_ahead, uniforms=u, **settings))
    assert together[0] != together[4]
    for row, prompt in enumerate(prompts):
        alone = written(generate(model, [prompt], 6, n_ahead, uniforms=u[row:row + 1], **settings))
        assert alone[0] == together[row][:6]


def test_text_and_thought_are_drawn_by_numbers_of_their_own(make_model):
    """The last of a row's numbers moves the token alone, another one its token of the thought."""
    model, u = make_model(), torch.full((1, 1, 4), 0.5)
    for k in range(4):
        v = u.clone()
        v[..., k] = 0.999
        (a,), (b,) = (generate(model, PROMPTS[:1], 1, 5, uniforms=x, temperature=5.0)
                      for x in (u, v))
        changed = a.thoughts[0] != b.thoughts[0]
        assert not changed[:k].any()
        assert k == 3 or changed[k]
        assert k < 3 or a.tokens != b.tokens


@pytest.mark.parametrize("n_ahead", [0, 5])
def test_prompts_that_ended_leave(make_model, monkeypatch, n_ahead):
    """Once half have; the others go on as they would have; when all have ended it is over."""
    model, u, sizes, last = make_model(), drawn(4, 12, n_ahead), [], {2: 2, 0: 3, 3: 4, 1: 8}
    everything = written(generate(model, PROMPTS, 12, n_ahead, uniforms=u))
    inner = Decoder.next_logits

    def spy(self, text, n, u):
        sizes.append(len(text))
        return inner(self, text, n, u)
    monkeypatch.setattr(Decoder, "next_logits", spy)
    ended, rows = set(), {}

    def steps():
        for i, step in enumerate(generate(model, PROMPTS, 12, n_ahead, uniforms=u, ended=ended)):
            ended.update(row for row, n in last.items() if n == i + 1)
            yield step
    rows = written(steps())
    assert sizes == [4, 4, 4, 2, 1, 1, 1, 1]
    assert {row: len(x) for row, x in rows.items()} == {0: 3, 1: 8, 2: 3, 3: 4}
    assert all(x == everything[row][:len(x)] for row, x in rows.items())


def test_prompts_may_have_ended_before_the_start(make_model):
    model, u = make_model(), drawn(4, 3, 4)
    rows = written(generate(model, PROMPTS, 3, 4, uniforms=u, ended={0, 3}))
    assert rows == {row: x for row, x in written(
        generate(model, PROMPTS, 3, 4, uniforms=u)).items() if row in (1, 2)}
    assert not list(generate(model, PROMPTS, 3, 4, ended=range(4)))


def test_greedy_thoughts_are_the_argmax_of_the_packed_forward(make_model):
    """Which has no cache; the likeliest ids of all are banned here."""
    model = make_model(tied=False, banned=BANNED, thought_temperature=2.0)
    with torch.no_grad():
        head = model.lm.lm_head.weight
        head[BANNED[0]] *= 100
        head[BANNED[1]] = -head[BANNED[0]]
    prompt = PROMPTS[3]
    steps = list(generate(model, [prompt], 8, 6, temperature=0, thought_temperature=0))
    again = generate(model, [prompt], 8, 6, temperature=0, thought_temperature=0,
                     generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(a.thoughts, b.thoughts) for a, b in zip(steps, again, strict=True))
    text = torch.tensor([[*prompt, *(int(s.tokens) for s in steps)]])
    n, last = len(prompt), text.shape[1] - 1
    thoughts = torch.zeros(1, 1, last, 4, dtype=torch.long)
    thoughts[0, 0, n - 1:] = torch.cat([s.thoughts for s in steps])
    with torch.no_grad():
        states = model.score(text, torch.zeros_like(text), thoughts)  # one token of lookahead
    assert states.thought.shape == (1, 1, last, 4, 24)
    logits = model.lm.logits(states.thought[0, 0, n - 1:])
    assert torch.isin(logits.argmax(-1), torch.tensor(BANNED)).any()
    logits[..., BANNED] = -math.inf
    assert torch.equal(logits.argmax(-1), thoughts[0, 0, n - 1:])
    mixed = model.lm.logits(states.mixed[0, 0, n - 1:, 0])
    mixed[..., BANNED] = -math.inf
    assert torch.equal(mixed.argmax(-1), text[0, n:])
    torch.testing.assert_close(mixed, torch.cat([s.logits for s in steps]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("n_ahead", [0, 3, 6])
def test_a_text_goes_on_without_being_read_again(make_model, monkeypatch, n_ahead):
    """Three turns over what earlier ones have read are the same as reading all of it each time;
    also beyond the first cache's length, after a turn cut short, and after one of no token."""
    monkeypatch.setattr(sampling, "SLOTS", 16)
    model, text, decoder, read = make_model(), [], None, []
    inner = Decoder.next_logits

    def spy(self, text, n, u):
        read.append(text.shape[1])
        return inner(self, text, n, u)
    monkeypatch.setattr(Decoder, "next_logits", spy)
    for turn, (more, n_tokens) in enumerate([(PROMPTS[0], 7), (PROMPTS[1], 0), (PROMPTS[3], 20)]):
        text, u = text + more, drawn(1, 20, n_ahead, turn)
        fresh = list(generate(model, [text], n_tokens, n_ahead, uniforms=u))
        read.clear()
        decoder = Decoder(model, 1, len(text) + 20, n_ahead, None, decoder)
        ours = list(decoder.write([text], n_tokens, uniforms=u))
        for a, b in zip(ours, fresh, strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.thoughts, b.thoughts)
            torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-11)
        assert read[:1] == [[5], [], [9]][turn]  # the third: the last token, and 1 + 7 new ones
        text = text + [int(s.tokens) for s in ours]


def test_a_cache_larger_than_the_memory_is_refused(make_model, monkeypatch):
    model = make_model()
    with pytest.raises(InputError, match=r"keys and values of .* GB of memory: write fewer"):
        generate(model, PROMPTS, 2**50, 5)
    size = 2 * 2 * 2 * 6 * 8 * 4 * sampling.SLOTS  # both, layers, heads, width, bytes, prompts
    monkeypatch.setattr(sampling, "total_memory", lambda device: size)
    assert len(list(generate(model, PROMPTS, 1, 5))) == 1
    monkeypatch.setattr(sampling, "total_memory", lambda device: size - 1)
    with pytest.raises(InputError, match="keys and values"):
        generate(model, PROMPTS, 1, 5)
