"""Rollout and packed score against the staged oracle; who influences whom; exactness of batches."""

import math

import numpy as np
import pytest
import torch
from staged import StagedConfig, staged_step

from nanoqstar import attention, head, quietstar
from nanoqstar.attention import Flex, TwoPart, dense
from nanoqstar.device import speed_up
from nanoqstar.head import weighted_log_probs
from nanoqstar.objective import Objective, Valid, quiet_star_loss
from nanoqstar.quietstar import QuietStar, uniforms
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.thoughts import ThoughtLayout

LOSS = dict(base_weight=0.5, mixed_weight=0.5, policy_weight=5.0, clamp_advantage=True,
            reinforce_temperature=3.0)


def our_loss(model, text, docs, thoughts, counts=None, **kwargs):
    """Loss and its parts, and the states they are made of."""
    states = model.score(text, docs, thoughts)
    valid = Valid.from_docs(docs, text.shape[1] - thoughts.shape[2])
    loss, stats, outcome = quiet_star_loss(states, model.lm.head_weight, text, thoughts, valid,
                                           valid.counts() if counts is None else counts,
                                           Objective(**LOSS | kwargs), model.banned)
    return loss, stats | vars(outcome), states


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_gradients_close(ours, reference, tolerance=1e-10):
    assert ours.keys() == reference.keys()
    for name, x in reference.items():
        assert x.any(), name
        assert (ours[name] - x).abs().max() <= tolerance * x.abs().max(), name


def staged(model, text, docs, **kwargs):
    """The independent implementation, a forward per token, on the same weights; those weights."""
    config = {name: getattr(model.lm.config, name) for name in StagedConfig.__dataclass_fields__}
    params = {name.removeprefix("lm."): p.detach().clone().requires_grad_()
              for name, p in model.named_parameters()}
    banned = set(model.banned.nonzero()[:, 0].tolist())
    kwargs = dict(banned_ids=banned, policy_weight=LOSS["policy_weight"]) | kwargs
    return staged_step(params, StagedConfig(**config), text, docs, reread=model.reread,
                       **kwargs), params


# ---- packed equals staged -----------------------------------------------------------------------

@pytest.mark.parametrize(("K", "A"), [(3, 1), (3, 3), (5, 1), (5, 3)])
@pytest.mark.parametrize(("P", "T"), [(1, 18), (2, 7)])
def test_packed_is_staged(make_model, make_text, make_thoughts, tied, reread, K, A, P, T):
    """Qwen2 with biases, several documents in a window: every number and every gradient."""
    model, (text, docs) = make_model(tied, reread=reread), make_text(3, T + A)
    thoughts = make_thoughts(3, P, T, K - 2, vocab=60)
    thoughts[thoughts == 7] = 8  # a banned id has log-prob -inf
    clamp = dict(clamp_advantage=P > 1)  # one pass has no baseline: all rewards might be negative
    loss, parts, states = our_loss(model, text, docs, thoughts, **clamp)
    theirs, params = staged(model, text, docs, n_ahead=K, n_ahead_talk=A, n_passes=P,
                            thoughts=thoughts, **clamp)
    _, thought_lp = weighted_log_probs(
        states.thought.detach().flatten(0, 3), model.lm.head_weight.detach(), thoughts.flatten(),
        torch.zeros(thoughts.numel()), 3.0, model.banned)
    for ours, reference in (
            (-parts["base_lp"][:, None].expand(-1, P, -1), theirs["nll_base"]),
            (-parts["mixed_lp"], theirs["nll_mixed"]), (states.mix, theirs["mix"]),
            (parts["reward"], theirs["reward"]), (parts["policy"], theirs["policy_loss"]),
            (thought_lp.view(thoughts.shape), theirs["thought_lp"]), (loss, theirs["loss"]),
            (0.5 * (parts["nll_base"] + parts["nll_talk"]), theirs["nll_loss"])):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    assert parts["policy"].abs() > 1e-3  # or there would be nothing to compare
    theirs["loss"].backward()
    ours = {name.removeprefix("lm."): g for name, g in gradients(model, loss).items()}
    assert_gradients_close(ours, {name: p.grad for name, p in params.items()})


@pytest.mark.parametrize(("K", "A", "P"), [(3, 1, 2), (5, 3, 2), (4, 2, 1)])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_rollout_is_staged_sampling(make_model, make_text, tied, reread, K, A, P, temperature):
    """The same uniforms give the same thoughts and log-probs; a forced forward then agrees."""
    T = 17
    model = make_model(tied, thought_temperature=temperature, reread=reread)
    text, docs = make_text(3, T + A)
    generator = torch.Generator().manual_seed(4)
    draws = torch.rand(3, P, T, K - 2, generator=generator, dtype=torch.float64)
    thoughts, log_probs = model.rollout(text, docs, draws)
    theirs, _ = staged(model, text, docs, n_ahead=K, n_ahead_talk=A, n_passes=P, uniforms=draws,
                       thought_temperature=temperature, reinforce_temperature=temperature)
    assert torch.equal(thoughts, theirs["thoughts"]) and len(thoughts.unique()) > 20
    torch.testing.assert_close(log_probs, theirs["thought_lp"], rtol=0, atol=1e-11)
    states = model.score(text, docs, thoughts)
    _, forced = weighted_log_probs(
        states.thought.flatten(0, 3), model.lm.head_weight, thoughts.flatten(),
        torch.zeros(thoughts.numel()), temperature, model.banned)
    torch.testing.assert_close(forced.view(thoughts.shape), log_probs, rtol=0, atol=1e-11)


def test_rollout_keeps_no_graph_and_banned_ids_out(make_model, make_text):
    model, (text, docs) = make_model(banned=range(0, 61, 2)), make_text(2, 11)
    draws = torch.rand(2, 3, 9, 2, generator=torch.Generator().manual_seed(5))
    thoughts, log_probs = model.rollout(text, docs, draws)
    assert (thoughts % 2 == 1).all() and not log_probs.requires_grad and (log_probs < 0).all()


# ---- one update, however it is cut --------------------------------------------------------------

@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [3, 1], [2, 2]], ids=str)
def test_gradient_accumulation_is_one_big_batch(make_model, make_text, cuts):
    """Micro-batches whose windows differ in their valid positions; counts are the update's."""
    K, A, P, T = 4, 2, 2, 8
    model, (text, docs) = make_model(), make_text(4, T + A)
    draws = uniforms(0, "think", 5, range(4), (P, T, K - 2))
    valid = Valid.from_docs(docs, A)
    assert len(set(valid.policy.sum(1).tolist())) == 4
    thoughts, _ = model.rollout(text, docs, draws)
    whole, _, _ = our_loss(model, text, docs, thoughts)
    expected = gradients(model, whole)
    model.zero_grad()
    total = 0
    for part in torch.arange(4).split(cuts):
        thoughts, _ = model.rollout(text[part], docs[part], draws[part])
        loss, _, _ = our_loss(model, text[part], docs[part], thoughts, counts=valid.counts())
        loss.backward()
        total += loss.item()
    assert abs(total - whole.item()) < 1e-12 * abs(total)
    assert_gradients_close({name: p.grad for name, p in model.named_parameters()}, expected, 1e-11)


def test_thoughts_do_not_depend_on_the_micro_batch(make_model, make_text):
    """The same (seed, step, sample index) gives the same thoughts alone, in pairs, in any order."""
    model, (text, docs) = make_model(), make_text(4, 12)
    index = torch.tensor([100, 101, 102, 103])

    def sample(rows):
        draws = uniforms(7, "think", 3, index[rows], (2, 10, 3))
        return model.rollout(text[rows], docs[rows], draws)[0]

    together = sample([0, 1, 2, 3])
    for rows in ([0], [3], [2, 1], [3, 0, 2]):
        assert torch.equal(sample(rows), together[rows])


def test_uniforms_are_a_function_of_their_arguments():
    draws = uniforms(1, "think", 2, [3, 4, 2**31], (2, 5, 3))
    assert draws.dtype == torch.float32 and draws.shape == (3, 2, 5, 3)
    assert draws.min() >= 0 and draws.max() < 1
    np.random.seed(0)
    torch.manual_seed(0)
    assert torch.equal(draws, uniforms(1, "think", 2, torch.tensor([3, 4, 2**31]), (2, 5, 3)))
    assert torch.equal(draws[1:2], uniforms(1, "think", 2, [4], (2, 5, 3)))
    others = [uniforms(*arguments, (2, 5, 3))[0] for arguments in (
        (0, "think", 2, [3]), (1, "think", 3, [3]), (1, "think", 2, [5]), (2, "think", 1, [3]),
        (1, "text", 2, [3]), (1, "eval", 2, [3]), (2**33 + 1, "think", 2, [3]))]
    # no two streams alike
    assert torch.stack([draws[0], draws[1], *others]).flatten().unique().numel() == 9 * 30


def test_uniforms_begin_alike_whatever_the_shape():
    """More passes, or more positions of one pass, go on where fewer end."""
    draws = uniforms(1, "think", 2, [3, 4], (3, 5, 2))
    assert torch.equal(uniforms(1, "think", 2, [3, 4], (1, 5, 2)), draws[:, :1])
    assert torch.equal(uniforms(1, "think", 2, [3, 4], (1, 4, 2)), draws[:, :1, :4])


def test_uniforms_are_uniform():
    draws = uniforms(0, "think", 0, range(50), (2, 100, 2)).flatten().double()
    share = draws.mul(20).long().bincount(minlength=20) / len(draws)
    assert abs(draws.mean() - 0.5) < 0.01 and (share - 0.05).abs().max() < 0.01


# ---- who influences whom (SEMANTICS J) ----------------------------------------------------------

def test_thoughts_see_the_text_from_its_first_token(make_model, make_text, make_thoughts):
    """Another x_0 moves the states of the thoughts at all positions of its document, no other's."""
    K, A, T = 4, 2, 9
    model, (text, docs) = make_model(), make_text(2, T + A)
    docs[1] = torch.tensor([5] * 4 + [6] * 7)
    thoughts, changed = make_thoughts(2, 2, T, K - 2), text.clone()
    changed[:, 0] = (text[:, 0] + 1) % 61
    with torch.no_grad():
        before, after = (model.score(x, docs, thoughts) for x in (text, changed))
    reached = torch.tensor([[True] * T, [True] * 4 + [False] * 5])[:, None].expand(2, 2, T)
    for name in ("thought", "mixed"):
        moved = (getattr(before, name) - getattr(after, name)).abs().amax((-1, -2))
        assert (moved[reached] > 1e-6).all() and (moved[~reached] == 0).all()


def test_a_thought_token_moves_what_comes_after_it(make_model, make_text, make_thoughts):
    """Its own thought's later and mixed states; no other pass, position or text, nor the base."""
    model, (text, docs) = make_model(), make_text(2, 9)
    thoughts = make_thoughts(2, 3, 7, 3)
    changed = thoughts.clone()
    changed[1, 2, 4, 1] = (thoughts[1, 2, 4, 1] + 1) % 61  # t_2
    with torch.no_grad():
        before, after = (model.score(text, docs, x) for x in (thoughts, changed))
    moved = {name: (getattr(before, name) - getattr(after, name)).abs().amax(-1) > 1e-9
             for name in ("base", "thought", "mixed")}
    expected = {name: torch.zeros_like(x) for name, x in moved.items()}
    expected["thought"][1, 2, 4, 2:] = True  # t_2 is read where t_3 is predicted
    expected["mixed"][1, 2, 4] = True
    for name in moved:
        assert torch.equal(moved[name], expected[name]), name


def test_gradients_show_no_leak(make_model, make_text, make_thoughts, reread, monkeypatch):
    """Of each hidden state, which input embeddings have a gradient: exactly those they should.

    In particular none for x_{i+1+j}, which mixed[i, j] predicts, nor for other positions' or other
    passes' thoughts.
    """
    B, P, T, K, A = 2, 2, 5, 4, 2
    S, layout = K - 2, ThoughtLayout(K, A, P, T)
    model, (text, docs) = make_model(reread=reread), make_text(B, T + A)
    docs[1] = torch.tensor([3, 3, 4, 4, 4, 4, 4])
    captured, embed = [], model.lm.embed
    monkeypatch.setattr(model.lm, "embed", lambda ids: captured.append(embed(ids)) or captured[-1])
    states = model.score(text, docs, make_thoughts(B, P, T, S))
    (embedded,) = captured

    def reached(hidden, b):
        (gradient,) = torch.autograd.grad(hidden.sum(), embedded, retain_graph=True)
        assert not gradient[1 - b].any()
        return (gradient[b] != 0).any(-1)

    def allowed(b, text_of=(), branch_of=None, n_branch=0):
        """Their documents up to these positions; branch (i, p)'s first n_branch tokens but end."""
        mask = torch.zeros(1, layout.packing.n_packed, dtype=torch.bool)
        base, start, branches = layout.packing.split(mask)  # views
        for i in text_of:
            base[0, :i + 1] |= docs[b, :i + 1] == docs[b, i]
        if branch_of:
            i, p = branch_of
            start[0, i] = reread  # else start and end are vectors of their own
            branches[0, p, i, :n_branch] = True
            branches[0, p, i, S] &= reread
        return mask[0]

    for b in range(B):
        for i in range(T + A - 1):
            assert torch.equal(reached(states.base[b, i], b), allowed(b, [i]))
        for i in range(T):
            for p in range(P):
                for k in range(S):
                    seen = reached(states.thought[b, p, i, k], b)
                    assert torch.equal(seen, allowed(b, [i], (i, p), k))
                for j in range(A):
                    seen = reached(states.mixed[b, p, i, j], b)
                    assert torch.equal(seen, allowed(b, [i, i + j], (i, p), S + 1 + j))


# ---- no label leaks: i.i.d. tokens --------------------------------------------------------------

def train_on_noise(steps=60, vocab=13):
    """Base and mixed NLL (by lookahead) on fresh uniform tokens, after training on such tokens."""
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64)
    K, A, P, T = 3, 2, 2, 8
    model = QuietStar(Qwen2(config))
    model.lm.init_weights(std=0.15, embedding_std=0.3)
    model.init_thoughts([1], [2])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.mixing_head[4].weight.normal_(0, 0.3, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)

    def batch(size, step):
        text = torch.randint(vocab, (size, T + A), generator=generator)
        docs = torch.zeros_like(text)
        draws = uniforms(0, "think", step, range(size), (P, T, K - 2))
        thoughts, _ = model.rollout(text, docs, draws)
        return text, docs, thoughts

    for step in range(steps):
        loss, _, _ = our_loss(model, *batch(16, step), policy_weight=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * (1 - step / steps)
    with torch.no_grad():
        _, parts, _ = our_loss(model, *batch(256, steps))
    mixed = [-x.item() for x in parts["mixed_lp"].mean((0, 1, 2))]
    return -parts["base_lp"].mean().item(), mixed, math.log(vocab)


def test_noise_cannot_be_predicted():
    """Uniform tokens never score below ln V, with thoughts or without, however one trains."""
    base, mixed, floor = train_on_noise()
    assert floor - 0.02 < base < floor + 0.3 and all(floor - 0.02 < x < floor + 0.3 for x in mixed)


def test_noise_reveals_a_leak(monkeypatch):
    """The lookahead moved on by a token, so that it holds its own targets: far below ln V."""
    right = ThoughtLayout.pack

    def pack(self, text, thoughts):
        ids, is_start, is_end = right(self, text, thoughts)
        # a view: x_{i+2} where x_{i+1} belongs
        self.packing.split(ids)[2][..., -1] = text[:, None, 2:]
        return ids, is_start, is_end
    monkeypatch.setattr(ThoughtLayout, "pack", pack)
    _, mixed, floor = train_on_noise()
    assert mixed[1] < floor - 0.2


# ---- where training starts ----------------------------------------------------------------------

def test_a_zero_mixing_head_is_the_base_model(make_model, make_text, make_thoughts, tied):
    """Mixed equals base, rewards are 0, and of what thinking adds only the last layer learns."""
    K, A, P, T = 4, 3, 2, 8
    model, (text, docs) = make_model(tied), make_text(2, T + A)
    model.init_thoughts([1, 2], [3])
    thoughts = make_thoughts(2, P, T, K - 2, vocab=7)
    loss, parts, states = our_loss(model, text, docs, thoughts)
    assert not states.mix.any()
    base_ahead = states.base.unfold(1, A, 1).movedim(-1, 2)[:, None]
    assert torch.equal(states.mixed, base_ahead.expand_as(states.mixed))
    torch.testing.assert_close(parts["reward"], torch.zeros(2, P, T).double(), rtol=0, atol=1e-12)
    added = {name: g for name, g in gradients(model, loss).items() if not name.startswith("lm.")}
    assert added.pop("mixing_head.4.weight").abs().max() > 1e-6
    assert max(g.abs().max() for g in added.values()) < 1e-11


def test_start_and_end_begin_at_the_mean_embedding(make_model):
    model = make_model()
    model.init_thoughts([4, 9], [5])
    embedding = model.lm.model.embed_tokens.weight
    mean = (embedding[4] + embedding[9]) / 2
    torch.testing.assert_close(model.start_embedding, mean, rtol=1e-14, atol=0)
    assert torch.equal(model.end_embedding, embedding[5])
    assert model.end_embedding.std() > 0.1  # no constant
    model.reread = True
    model.init_thoughts([4, 9], [5])
    assert not model.start_embedding.any() and not model.end_embedding.any()
    assert model.mixing_head[0].weight.std() > 0.05 and model.mixing_head[2].bias.std() > 0.05


def test_the_mixing_head_reads_base_then_talk(make_model):
    """Its halves applied apart are one linear layer over [base; talk]; the weight is unbounded."""
    head, generator = make_model().mixing_head, torch.Generator().manual_seed(0)
    base, talk = torch.randn(2, 7, 24, dtype=torch.float64, generator=generator).mul(30)
    expected = torch.nn.Sequential.forward(head, torch.cat((base, talk), -1))
    torch.testing.assert_close(head(head.base_half(base), talk), expected, rtol=1e-12, atol=1e-12)
    assert expected.min() < -1 and expected.max() > 1


# ---- precision ----------------------------------------------------------------------------------

def test_float64_stays_float64(make_model, make_text):
    """With the float32 numbers that training draws, too."""
    model, (text, docs) = make_model(), make_text(2, 9)
    thoughts, log_probs = model.rollout(text, docs, uniforms(0, "think", 0, range(2), (2, 7, 2)))
    loss, parts, states = our_loss(model, text, docs, thoughts)
    named = {"loss": loss, **parts, **vars(states), "rollout's log-probs": log_probs}
    assert {name: x.dtype for name, x in named.items()} == dict.fromkeys(named, torch.float64)


def test_float32_is_close_to_float64(make_model, make_text, make_thoughts):
    model, (text, docs) = make_model(), make_text(3, 20)
    thoughts = make_thoughts(3, 2, 17, 2, vocab=7)
    wide, _, _ = our_loss(model, text, docs, thoughts)
    expected = gradients(model, wide)
    model.float()
    loss, _, states = our_loss(model, text, docs, thoughts)
    assert loss.dtype == states.mixed.dtype == torch.float32
    assert abs(loss.item() / wide.item() - 1) < 1e-5
    assert_gradients_close(gradients(model, loss), expected, 1e-4)


@pytest.mark.parametrize("weight", [1e-4, 1e-3, 1e-2, 1e-1])
def test_rewards_do_not_drown_in_bf16(make_model, make_text, make_thoughts, weight):
    """With a mixing weight as small as at the start, bf16 advantages are those of fp32: the policy
    weight multiplies them by up to 1e6. Without `exact` products the correlation is 0.3 at 1e-4."""
    K, A, P, T = 6, 3, 2, 40
    model = make_model(vocab_size=512, hidden_size=64, intermediate_size=192, head_dim=16,
                       banned=()).float()
    with torch.no_grad():
        for p in model.lm.parameters():
            if p.dim() == 2:
                p.mul_(0.3)  # logits of a size that a trained model has
    text, docs = make_text(4, T + A, vocab=512)
    thoughts = make_thoughts(4, P, T, K - 2, vocab=512)
    with torch.no_grad():
        mix = model.score(text, docs, thoughts).mix
        model.mixing_head[4].weight.mul_(weight / mix.abs().mean())
        advantages = []
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                _, parts, _ = our_loss(model, text, docs, thoughts, clamp_advantage=False)
            advantages.append(parts["advantage"].flatten())
    assert torch.corrcoef(torch.stack(advantages))[0, 1] > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_without_a_mixing_weight_every_reward_is_exactly_zero(make_model, make_text, make_thoughts,
                                                              monkeypatch, dtype):
    """However products are rounded, which on a GPU depends on a chunk's size: here on its rows."""
    product = head.fp32_product
    monkeypatch.setattr(head, "fp32_product", lambda a, b, dtype: product(a, b, dtype) + 1e-6 * (
        torch.arange(len(a))[:, None] * torch.arange(b.shape[1]) % 3))
    model = make_model().float()
    torch.nn.init.zeros_(model.mixing_head[4].weight)
    text, docs = make_text(2, 23)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        _, parts, _ = our_loss(model, text, docs, make_thoughts(2, 3, 20, 2))
    assert not parts["reward"].any() and parts["reward"].dtype == torch.float32


def flex_by_definition(q, k, v, block_mask, enable_gqa):
    """FlexAttention has no backward on a CPU: the same mask, looked up at every pair."""
    b, n, m = (torch.arange(size) for size in (len(q), q.shape[2], k.shape[2]))
    seen = block_mask.mask_mod(b[:, None, None], None, n[:, None], m)
    return dense(seen[:, None])(q, k, v)


@pytest.mark.parametrize("form", [TwoPart, Flex])
def test_two_forwards_alive_at_once(make_model, make_text, make_thoughts, monkeypatch, form):
    """Recomputed in the backward pass, each sees its own documents, as if it were alone."""
    monkeypatch.setattr(quietstar, "packed_attention", form)
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_by_definition)
    model, shape = make_model(), (2, 2, 9, 2)
    speed_up(model, torch.device("cpu"), checkpointing=1.0, compile=False)
    batches = [(*make_text(2, 12, seed=seed), make_thoughts(*shape, seed=seed)) for seed in (1, 5)]
    expected = [gradients(model, our_loss(model, *batch)[0]) for batch in batches]
    losses = [our_loss(model, *batch)[0] for batch in batches]
    for loss, alone in zip(losses, expected, strict=True):
        assert_gradients_close(gradients(model, loss), alone, 1e-12)


@pytest.mark.parametrize("form", [TwoPart, Flex])
def test_training_after_inference_mode(make_model, make_text, make_thoughts, monkeypatch, form):
    """What an evaluation in inference mode leaves in the caches serves a step with gradients."""
    monkeypatch.setattr(quietstar, "packed_attention", form)
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_by_definition)
    model = make_model()
    text, docs = make_text(1, 14)
    thoughts = make_thoughts(1, 2, 11, 3)  # a shape that no other test uses
    with torch.inference_mode():
        model.rollout(text, docs, torch.rand(1, 2, 11, 3))
        model.score(text, docs, thoughts)
    loss, _, _ = our_loss(model, text, docs, thoughts)
    assert all(g.isfinite().all() for g in gradients(model, loss).values())
