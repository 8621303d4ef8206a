"""The objective's pure functions against plain float64 log_softmax, autograd and arithmetic."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from nanoqstar import head as room
from nanoqstar import objective
from nanoqstar.head import sample_tokens, weighted_log_probs
from nanoqstar.objective import Objective, States, Valid, advantage, quiet_star_loss

BANNED = torch.zeros(11, dtype=torch.bool).index_fill(0, torch.tensor([0, 4, 10]), True)
WEIGHTS = dict(base_weight=0.3, mixed_weight=0.7, policy_weight=2.0, clamp_advantage=True,
               reinforce_temperature=3.0)


def randn(*shape, seed=0, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad)


def randint(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def log_probs_of(hidden, weight, targets, temperature=1.0, banned=None):
    """The oracle: log softmax of all logits, banned ids at -inf; differentiable."""
    logits = hidden @ weight.T / temperature
    if banned is not None:
        logits = logits.masked_fill(banned, -math.inf)
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


# ---- log-probs ----------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [1, 30, 2**22], ids=["row by row", "two rows", "at once"])
@pytest.mark.parametrize(("temperature", "banned"), [(1.0, None), (3.0, None), (0.7, BANNED)])
def test_weighted_log_probs(monkeypatch, temperature, banned, chunk):
    monkeypatch.setattr(room, "CHUNK_LOGITS", {"cpu": chunk})
    hidden, weight, row_weights = randn(7, 5), randn(11, 5, seed=1), randn(7, seed=2, grad=False)
    targets = torch.tensor([1, 2, 3, 5, 6, 9, 1])
    total, log_probs = weighted_log_probs(hidden, weight, targets, row_weights, temperature, banned)
    expected = log_probs_of(hidden, weight, targets, temperature, banned)
    torch.testing.assert_close(log_probs, expected.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(total, (row_weights * expected).sum(), rtol=0, atol=1e-13)
    assert not log_probs.requires_grad
    ours = torch.autograd.grad(-2.5 * total, (hidden, weight))
    theirs = torch.autograd.grad(-2.5 * (row_weights * expected).sum(), (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_one_gradient_without_the_other(needs):
    hidden, weight = randn(4, 5, grad=needs[0]), randn(11, 5, seed=1, grad=needs[1])
    arguments = torch.tensor([1, 2, 3, 5]), torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    weighted_log_probs(hidden, weight, *arguments)[0].backward()
    wanted = (hidden, weight)[needs.index(True)]
    total = (arguments[1] * log_probs_of(hidden, weight, arguments[0])).sum()
    (expected,) = torch.autograd.grad(total, wanted)
    torch.testing.assert_close(wanted.grad, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("place", ["hidden", "weight"])
def test_finite_differences(place):
    """The gradient is the slope of the value itself; no autograd in the reference."""
    inputs = dict(hidden=randn(3, 5), weight=randn(11, 5, seed=1))
    rest = (torch.tensor([1, 2, 9]), torch.tensor([1.0, -2.0, 0.5]).double(), 1.7, BANNED)
    weighted_log_probs(*inputs.values(), *rest)[0].backward()
    x = inputs[place].detach()
    for index in ((0, 0), (1, 3), (2, 4)):
        values = []
        for step in (1e-5, -1e-5):
            moved = x.clone()
            moved[index] += step
            values.append(weighted_log_probs(*(inputs | {place: moved}).values(), *rest)[0].item())
        assert abs((values[0] - values[1]) / 2e-5 - inputs[place].grad[index].item()) < 1e-8


def test_log_probs_without_gradient():
    hidden, weight, targets = randn(4, 5), randn(11, 5, seed=1), torch.tensor([1, 2, 3, 5])
    with torch.no_grad():
        total, log_probs = weighted_log_probs(hidden, weight, targets, torch.ones(4))
    assert not total.requires_grad
    expected = log_probs_of(hidden, weight, targets).detach()
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-13)


def test_no_rows():
    hidden, weight = randn(0, 5), randn(11, 5, seed=1)
    nothing = torch.zeros(0)
    total, log_probs = weighted_log_probs(hidden, weight, nothing.long(), nothing, 3.0, BANNED)
    total.backward()
    assert total == 0 and log_probs.shape == (0,) and hidden.grad.shape == (0, 5)
    assert not weight.grad.any()


def test_dtypes():
    """float64 stays float64; bf16 gives fp32 log-probs, and gradients in the inputs' own dtype."""
    f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
    for given, result in ((f64, f64), (f32, f32), (bf16, f32)):
        hidden, weight = (randn(4, 5, dtype=torch.float32).to(given).detach().requires_grad_()
                          for _ in range(2))
        total, log_probs = weighted_log_probs(hidden, weight, torch.arange(4), torch.ones(4))
        total.backward()
        assert total.dtype == log_probs.dtype == result
        assert hidden.grad.dtype == weight.grad.dtype == given


def test_bf16_autocast():
    """Products in bf16, the rest in fp32: close to float64; fp32 tensors have fp32 gradients."""
    hidden, weight = randn(64, 32, dtype=torch.float32), randn(50, 32, seed=1, dtype=torch.float32)
    targets, row_weights = randint(0, 50, 64), randn(64, seed=2, dtype=torch.float32, grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        total, log_probs = weighted_log_probs(hidden, weight, targets, row_weights)
    total.backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = log_probs_of(*wide, targets)
    (row_weights * expected).sum().backward()
    assert log_probs.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    for a, b in ((log_probs, expected), (hidden.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        assert (a - b).abs().max() < 0.02 * b.abs().max()


class AllocationRecorder(TorchDispatchMode):
    """The largest tensor and the most bytes alive that torch makes meanwhile, beyond `known`."""

    def __init__(self, known):
        super().__init__()
        self.known, self.alive = WeakIdKeyDictionary(), WeakIdKeyDictionary()  # storage -> bytes
        self.largest, self.peak = 0, 0
        for x in known:
            self.known[x.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
                self.alive[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_the_recorder_sees_what_it_should():
    with AllocationRecorder([]) as recorder:
        x = torch.zeros(1000)
        y = x.view(10, 100).T[:5] + 1  # 50 elements; views cost nothing
        del x
        torch.zeros(900)
    assert recorder.largest == 1000 and recorder.peak == 4 * 1050
    assert sum(recorder.alive.values()) == 4 * 50 and y.any()


@pytest.mark.parametrize("chunk", [None, 2**19], ids=["default chunks", "small chunks"])
def test_logits_of_the_whole_sequence_never_exist(monkeypatch, make_model, make_text, chunk):
    """Vocabulary 60,000, width 8: sampling, scoring, loss and backward, by what torch allocates."""
    if chunk:
        monkeypatch.setattr(room, "CHUNK_LOGITS", {"cpu": chunk})
    vocab, batch, n_talk = 60_000, 2, 2
    shape = dict(vocab_size=vocab, hidden_size=8, intermediate_size=16, head_dim=4,
                 num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    model = make_model(**shape).float()
    text, docs = make_text(batch, 24 + n_talk, vocab)
    draws = torch.rand(batch, 3, 24, 2, generator=torch.Generator().manual_seed(3))
    with AllocationRecorder(model.parameters()) as recorder:
        thoughts, _ = model.rollout(text, docs, draws)
        states, valid = model.score(text, docs, thoughts), Valid.from_docs(docs, n_talk)
        loss, _, outcome = quiet_star_loss(states, model.lm.head_weight, text, thoughts, valid,
                                           valid.counts(), Objective(**WEIGHTS), model.banned)
        loss.backward()
    assert (outcome.advantage > 0).any()
    packed_logits = batch * (25 + 24 * (1 + 3 * 4)) * vocab  # elements: 674 packed tokens
    weights = 8 * vocab
    assert recorder.largest <= (chunk or room.CHUNK_LOGITS["cpu"]) < packed_logits / 3
    gradients = 4 * 4 * weights  # bytes: of the head, twice, of the embedding, and their sum
    assert recorder.peak - gradients < 4 * packed_logits * (0.25 if chunk else 1)


def test_compiled_chunks_are_the_same_and_compiled_once(monkeypatch):
    """As a GPU runs them, where the number of rows changes with every update."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(room, "CHUNK_LOGITS", {"cpu": 10 * 31})
    monkeypatch.setattr(room, "can_compile", lambda device: True)
    eager, generator = room.log_prob_chunk, torch.Generator().manual_seed(0)
    compiled = torch.compile(eager, backend="aot_eager")
    banned = torch.arange(31) == 5
    for n_rows, temperature, ids in ((25, 1.0, None), (7, 3.0, banned), (12, 3.0, banned),
                                     (38, 1.0, None), (9, 3.0, banned), (23, 1.0, None)):
        values = []
        for chunk in (eager, compiled):
            monkeypatch.setattr(room, "log_prob_chunk", chunk)
            generator.manual_seed(n_rows)
            hidden, head, weights = (
                torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
                for shape in ((n_rows, 4), (31, 4), (n_rows,)))
            targets = torch.randint(6, 31, (n_rows,), generator=generator)
            total, log_probs = weighted_log_probs(
                hidden, head, targets, weights.detach(), temperature, ids)
            values.append([total, log_probs, *torch.autograd.grad(total, (hidden, head))])
        for a, b in zip(*values, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert counters["stats"]["unique_graphs"] <= 4


# ---- which positions count ----------------------------------------------------------------------

def test_valid_by_hand():
    """Two windows of T = 4, A = 2: a prediction across a document's end counts nowhere."""
    valid = Valid.from_docs(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]]), 2)
    assert valid.base.int().tolist() == [[1, 1, 0, 1], [0, 1, 1, 0]]
    assert valid.talk.int().tolist() == [
        [[1, 1], [1, 0], [0, 0], [1, 1]], [[0, 0], [1, 1], [1, 0], [0, 0]]]
    assert valid.policy.int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 0]]
    assert valid.counts().tolist() == [5, 5, 3, 3]  # base; talk at lookahead 0, 1; policy
    one = Valid.from_docs(torch.tensor([[0, 0, 1], [3, 4, 4]]), 1)
    assert one.base.int().tolist() == one.policy.int().tolist() == [[1, 0], [0, 1]]
    assert one.counts().tolist() == [2, 2, 2]


# ---- advantage ----------------------------------------------------------------------------------

# by text, pass, position
REWARD = torch.tensor([[[1.0, 2.0, 5.0], [3.0, -4.0, 5.0]], [[10.0, 0.0, 7.0], [20.0, 6.0, 1.0]]])


def test_advantage_by_hand():
    """The baseline is the mean of one text's passes, itself included; all rows differ."""
    valid = torch.tensor([[True, True, True], [True, False, True]])
    assert advantage(REWARD, valid, clamp=False).tolist() == [
        [[-1, 3, 0], [1, -3, 0]], [[-5, 0, 3], [5, 0, -3]]]
    assert advantage(REWARD, valid, clamp=True).tolist() == [
        [[0, 3, 0], [1, 0, 0]], [[0, 0, 3], [5, 0, 0]]]


def test_advantage_of_three_passes_by_hand():
    reward = torch.tensor([[[1.0], [2.0], [6.0]], [[0.0], [0.0], [-3.0]]])
    assert advantage(reward, torch.ones(2, 1).bool(), clamp=True).tolist() == [
        [[0], [0], [3]], [[1], [1], [0]]]


def test_one_pass_has_no_baseline():
    valid = torch.tensor([[True, False, True], [True, True, True]])
    reward = torch.tensor([[[1.0, 2.0, -5.0]], [[3.0, -4.0, 5.0]]])
    assert advantage(reward, valid, clamp=False).tolist() == [[[1, 0, -5]], [[3, -4, 5]]]
    assert advantage(reward, valid, clamp=True).tolist() == [[[1, 0, 0]], [[3, 0, 5]]]


def test_normalized_advantage_by_hand():
    """Divided by the root mean square over valid entries, before the clamp."""
    valid = torch.tensor([[True, True, True], [True, False, True]])
    unit = math.sqrt((1 + 1 + 9 + 9 + 25 + 25 + 9 + 9) / 10)
    expected = torch.tensor([[[0, 3, 0], [1, 0, 0]], [[0, 0, 3], [5, 0, 0]]]) / unit
    torch.testing.assert_close(advantage(REWARD, valid, clamp=True, normalize=True), expected)
    nothing = advantage(REWARD, torch.zeros(2, 3).bool(), clamp=True, normalize=True)
    assert not nothing.any() and not nothing.isnan().any()


# ---- the loss -----------------------------------------------------------------------------------

B, P, T, A, S, V, D = 2, 2, 4, 2, 2, 11, 5
DOCS = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, 3]])


def random_states():
    return States(base=randn(B, T + A - 1, D, seed=3), thought=randn(B, P, T, S, D, seed=4),
                  mixed=randn(B, P, T, A, D, seed=5), mix=randn(B, P, T, A, seed=6))


TEXT = randint(0, V, B, T + A, seed=7)
THOUGHTS = randint(1, 4, B, P, T, S, seed=8)  # none of them banned
HEAD_SEED = 9


def loss_by_definition(states, head, docs=DOCS, *, base_weight, mixed_weight, policy_weight,
                       clamp_advantage, reinforce_temperature):
    """DESIGN section 2, one term at a time, over plain log_softmax."""
    def mean(terms):
        return sum(terms) / len(terms) if terms else torch.zeros(()).double()

    def nll(hidden, target):
        return -(hidden @ head.T).log_softmax(-1)[target]

    nll_base = [[nll(states.base[b, i], TEXT[b, i + 1]) for i in range(T + A - 1)]
                for b in range(B)]
    nll_mixed = [[[[nll(states.mixed[b, p, i, j], TEXT[b, i + 1 + j]) for j in range(A)]
                   for i in range(T)] for p in range(P)] for b in range(B)]
    reward = torch.tensor(
        [[[sum((nll_base[b][i + j] - nll_mixed[b][p][i][j]).item() for j in range(A))
           for i in range(T)] for p in range(P)] for b in range(B)], dtype=torch.float64)

    def same(b, i, j):
        return docs[b, i] == docs[b, i + 1 + j]

    policy = []
    for b in range(B):
        for i in range(T):
            if all(same(b, i, j) for j in range(A)):
                for p in range(P):
                    adv = reward[b, p, i] - reward[b, :, i].mean() if P > 1 else reward[b, p, i]
                    adv = adv.clamp(min=0) if clamp_advantage else adv
                    for k in range(S):
                        logits = states.thought[b, p, i, k] @ head.T / reinforce_temperature
                        log_pi = logits.masked_fill(BANNED, -math.inf).log_softmax(-1)
                        policy.append(-adv * log_pi[THOUGHTS[b, p, i, k]])
    base = mean([nll_base[b][i] for b in range(B) for i in range(T) if same(b, i, 0)])
    mixed = sum(mean([nll_mixed[b][p][i][j] for b in range(B) for p in range(P) for i in range(T)
                      if same(b, i, j)]) for j in range(A)) / A
    policy = mean(policy)
    return base_weight * base + mixed_weight * mixed + policy_weight * policy, dict(
        nll_base=base, nll_talk=mixed, policy=policy, reward=reward)


def our_loss(states, head, docs=DOCS, **kwargs):
    valid = Valid.from_docs(docs, A)
    loss, stats, outcome = quiet_star_loss(states, head, TEXT, THOUGHTS, valid, valid.counts(),
                                           Objective(**WEIGHTS | kwargs), BANNED)
    return loss, stats | vars(outcome)


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("change", [
    {}, dict(clamp_advantage=False), dict(policy_weight=1e6), dict(policy_weight=0.0),
    dict(policy_weight=-2.0),
    dict(base_weight=0.0), dict(reinforce_temperature=1.0)], ids=str)
def test_loss_and_gradients_by_definition(monkeypatch, change, chunk):
    """Rewards are constants: the oracle takes them as numbers."""
    monkeypatch.setattr(room, "CHUNK_LOGITS", {"cpu": chunk})
    states, head = random_states(), randn(V, D, seed=HEAD_SEED)
    loss, parts = our_loss(states, head, **change)
    expected, terms = loss_by_definition(states, head, **WEIGHTS | change)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, term in terms.items():
        assert not parts[name].requires_grad
        if name != "policy" or (WEIGHTS | change)["policy_weight"]:  # at weight 0 not even computed
            torch.testing.assert_close(parts[name], term.detach(), rtol=1e-12, atol=1e-12)
    leaves = (states.base, states.mixed, states.thought, head)
    for a, b in zip(*(torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True)
                      for x in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())


def test_an_empty_mean_is_zero():
    """Every token a document of its own: no valid prediction, loss and gradients 0 and not NaN."""
    states, head = random_states(), randn(V, D, seed=HEAD_SEED)
    loss, parts = our_loss(states, head, torch.arange(B * (T + A)).view(B, -1))
    loss.backward()
    assert loss == 0 and all(parts[name] == 0 for name in ("nll_base", "nll_talk", "policy"))
    assert not any(x.grad.any() for x in (states.base, states.mixed, states.thought, head))


def test_only_the_longest_lookahead_empty():
    """Documents of two tokens: x_{i+1} counts here and there, x_{i+2} and rewards nowhere."""
    states, head = random_states(), randn(V, D, seed=HEAD_SEED)
    docs = (torch.arange(T + A) // 2).expand(B, -1)
    loss, _ = our_loss(states, head, docs)
    expected, _ = loss_by_definition(states, head, docs, **WEIGHTS)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    assert states.mixed.grad[..., 0, :].any() and not states.mixed.grad[..., 1, :].any()
    assert not states.thought.grad.any()


def test_the_policy_gradient_reaches_every_sampled_token():
    """All S hidden states of every thought above its baseline, and none of the others."""
    states, head = random_states(), randn(V, D, seed=HEAD_SEED)
    loss, parts = our_loss(states, head, base_weight=0.0, mixed_weight=0.0)
    loss.backward()
    live = parts["advantage"] > 0
    assert 0 < live.sum() < live.numel()
    assert torch.equal((states.thought.grad != 0).any(-1), live[..., None].expand(-1, -1, -1, S))


@pytest.mark.parametrize("sign", [1, -1])
def test_likelier_good_thoughts_lower_the_loss(sign):
    """And likelier bad ones raise it, where the clamp lets them count; rewards do not move. With a
    negative weight, the control, it is the other way round."""
    states, head = random_states(), randn(V, D, seed=HEAD_SEED)
    weights = dict(base_weight=0.0, mixed_weight=0.0, clamp_advantage=False, policy_weight=sign)
    before, parts = our_loss(states, head, **weights)
    log_pi = log_probs_of(states.thought, head, THOUGHTS, WEIGHTS["reinforce_temperature"], BANNED)
    (uphill,) = torch.autograd.grad(log_pi.sum(), states.thought)
    for b, p, i in (parts["advantage"] != 0).nonzero().tolist():
        for k in range(S):
            moved = states.thought.detach().clone()
            moved[b, p, i, k] += 0.01 * uphill[b, p, i, k]
            states_after = States(states.base, moved, states.mixed, states.mix)
            after, _ = our_loss(states_after, head, **weights)
            assert (after < before) == (sign * parts["advantage"][b, p, i] > 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_advantages_are_those_of_other_thoughts(seed):
    """Of the same window, each once and none its own; where nothing counts none is given out."""
    others = objective.shuffle(P * T, seed, torch.device("cpu")).tolist()
    assert sorted(others) == [*range(P * T)] and all(k != other for k, other in enumerate(others))
    assert others != objective.shuffle(P * T, 1 - seed, torch.device("cpu")).tolist()
    docs = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, 2]])  # the second counts everywhere
    states, head = random_states(), randn(V, D, seed=HEAD_SEED)
    weights = dict(base_weight=0.0, mixed_weight=0.0, clamp_advantage=False, seed=seed)
    _, parts = our_loss(states, head, docs, **weights)
    loss, shuffled = our_loss(states, head, docs, shuffle_advantage=True, **weights)
    assert torch.equal(shuffled["reward"], parts["reward"])
    log_pi, total = log_probs_of(states.thought, head, THOUGHTS, 3.0, BANNED), 0.0
    for b, valid in enumerate(Valid.from_docs(docs, A).policy):
        for k, other in enumerate(others):
            (p, i), (its_pass, its_position) = divmod(k, T), divmod(other, T)
            given = parts["advantage"][b, its_pass, its_position] if valid[i] else 0.0
            assert shuffled["advantage"][b, p, i] == given
            total = total - given * log_pi[b, p, i].mean()
    expected = WEIGHTS["policy_weight"] * total / (P * Valid.from_docs(docs, A).policy.sum())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_counts_of_a_larger_update_divide():
    """With counts over twice the data, each micro-batch contributes half its mean."""
    states, head, valid = random_states(), randn(V, D, seed=HEAD_SEED), Valid.from_docs(DOCS, A)
    arguments = states, head, TEXT, THOUGHTS, valid
    alone, twice = (
        quiet_star_loss(*arguments, n * valid.counts(), Objective(**WEIGHTS), BANNED)[0]
        for n in (1, 2))
    torch.testing.assert_close(twice, alone / 2, rtol=1e-13, atol=0)


def test_an_impossible_target_without_weight_counts_nothing():
    """Its log-prob is -inf; a sum that it has no share in is a number all the same."""
    hidden, weight = randn(3, 5), randn(V, 5, seed=1)
    banned = torch.zeros(V, dtype=torch.bool).index_fill(0, torch.tensor([2]), True)
    total, log_probs = weighted_log_probs(hidden, weight, torch.tensor([1, 2, 3]),
                                          torch.tensor([1.0, 0.0, 2.0]), 1.0, banned)
    assert log_probs[1] == -math.inf
    torch.testing.assert_close(total.detach(), log_probs[0] + 2 * log_probs[2])
    assert all(x.isfinite().all() for x in torch.autograd.grad(total, (hidden, weight)))


def test_language_model_loss():
    """Continued pre-training: the mean over predictions inside a document of the window's T."""
    hidden, head = randn(B, T, D), randn(V, D, seed=1)
    count = Valid.from_docs(DOCS, A).counts()[0]
    loss = objective.language_model_loss(hidden, head, TEXT, DOCS, count)
    log_probs = log_probs_of(hidden, head, TEXT[:, 1:T + 1])
    inside = DOCS[:, :T] == DOCS[:, 1:T + 1]
    expected = -log_probs[inside].mean()
    assert 0 < inside.sum() < B * T
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    ours, theirs = (torch.autograd.grad(x, (hidden, head)) for x in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    alone = torch.arange(T + A).expand(B, -1)
    assert objective.language_model_loss(hidden, head, TEXT, alone, torch.tensor(0)) == 0


# ---- sampling -----------------------------------------------------------------------------------

GRID = (torch.arange(100_000).double() + 0.5) / 100_000
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


@pytest.mark.parametrize(("temperature", "banned"),
                         [(1.0, None), (1.0, BANNED), (2.5, BANNED), (0.3, None)])
@pytest.mark.parametrize("block", [256, 4, 1])  # of 11 ids: one level, an end of 3, none
@pytest.mark.parametrize("chunk", [1, 2**22])
def test_samples_have_the_exact_distribution(monkeypatch, temperature, banned, chunk, block):
    """Evenly spaced uniform numbers hit every id as often as its probability says."""
    monkeypatch.setattr(room, "CHUNK_LOGITS", {"cpu": chunk})
    monkeypatch.setattr(room, "BLOCK", block)
    hidden, weight = randn(3, 5, grad=False), randn(11, 5, seed=1, grad=False)
    ids, log_probs = sample_tokens(hidden, weight, GRID.expand(3, -1), temperature, banned)
    logits = hidden @ weight.T / temperature
    expected = (logits if banned is None else logits.masked_fill(banned, -math.inf)).softmax(-1)
    for row in range(3):
        frequency = ids[row].bincount(minlength=11) / len(GRID)
        assert (frequency - expected[row]).abs().max() <= 1.01 / len(GRID)
        assert (ids[row].diff() >= 0).all()  # lowest ids first
    torch.testing.assert_close(log_probs.exp(), expected.gather(-1, ids), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("draws_in", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [256, 7, 2])
def test_impossible_ids_are_never_sampled(monkeypatch, dtype, draws_in, block):
    """Banned and vanishing ids at both ends and in between, at the ends of [0, 1)."""
    monkeypatch.setattr(room, "BLOCK", block)
    hidden, weight = (randn(n, 5, seed=seed, grad=False).to(dtype)
                      for n, seed in ((200, 0), (50, 1)))
    weight[[1, 2, 25, 47, 48]] *= 1e4  # one sign of them has probability 0, the other all
    banned = torch.zeros(50, dtype=torch.bool).index_fill(0, torch.tensor([0, 1, 24, 48, 49]), True)
    for forbidden in (banned, torch.arange(50) != 24):
        draws = torch.tensor([0.0, 2**-25, 0.5, BELOW_ONE - 2**-24, BELOW_ONE, 1 - 2**-53],
                             dtype=torch.float64)
        if draws_in == torch.float32:
            draws = draws[:-1].float()
        ids, log_probs = sample_tokens(hidden, weight, draws.expand(200, -1), 1.0, forbidden)
        assert ids.min() >= 0 and ids.max() < 50 and not forbidden[ids].any()
        assert log_probs.isfinite().all() and (log_probs <= 1e-6).all()


def test_a_single_long_flat_distribution_stays_inside():
    """Rounding of a sum over many ids: the last numbers below 1 still give an id that exists."""
    hidden, weight = torch.ones(1, 1), torch.zeros(100_003, 1)
    banned = torch.zeros(100_003, dtype=torch.bool)
    banned[-3:] = banned[:3] = True
    ids, _ = sample_tokens(hidden, weight, torch.tensor([[0.0, BELOW_ONE]]), 1.0, banned)
    assert ids[0, 0] == 3 and 99_000 < ids[0, 1] < 100_000


@pytest.mark.parametrize("vocab", [3, 511, 600, 1024])
def test_no_numbers_give_ids_of_the_vocabulary(vocab):
    """What follows says that the logits are none: an index beyond the last would hide it."""
    hidden, weight = torch.full((2, 4), math.nan), torch.ones(vocab, 4)
    ids, log_probs = sample_tokens(hidden, weight, torch.rand(2, 3))
    assert ids.min() >= 0 and ids.max() < vocab and log_probs.isnan().all()
