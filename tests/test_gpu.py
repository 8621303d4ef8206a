"""What only a GPU runs, as a whole: a step, sampling, decoding, a run; against the same on a CPU in
float64."""

import copy

import pytest
import torch

from nanoqstar import sampling
from nanoqstar.attention import tiles_for_shape
from nanoqstar.device import autocast, pick_device, speed_up, speed_up_decoding
from nanoqstar.head import fp32_logits
from nanoqstar.objective import Objective, Valid, quiet_star_loss
from nanoqstar.sampling import generate

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
DEVICE = "cuda"
SIZES = dict(vocab_size=500, hidden_size=128, intermediate_size=192, num_attention_heads=14,
             num_key_value_heads=2, head_dim=32)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2}  # of the largest value


@pytest.fixture
def pair(make_model):
    """The same model in float64 on the CPU and in float32 on the GPU, where torch may not round
    products to TF32."""
    torch._dynamo.reset()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model = make_model(**SIZES)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(0.3)  # bf16 is judged by its rounding, not by a saturated softmax
    yield model, copy.deepcopy(model).float().to(pick_device(DEVICE))
    torch.set_float32_matmul_precision(precision)
    tiles_for_shape.cache_clear()


def assert_close(ours, reference, tolerance):
    error = (ours.detach().cpu().double() - reference.detach()).abs().max()
    assert error <= tolerance * reference.detach().abs().max()


def loss_of(model, text, docs, thoughts):
    """(loss, what the thoughts came to)."""
    states = model.score(text, docs, thoughts)
    valid = Valid.from_docs(docs, text.shape[1] - thoughts.shape[2])
    objective = Objective(policy_weight=1.0, clamp_advantage=False)
    loss, _, outcome = quiet_star_loss(states, model.lm.head_weight, text, thoughts, valid,
                                       valid.counts(), objective, model.banned)
    return loss, outcome


def step(model, text, docs, thoughts):
    """What the thoughts came to, and every gradient."""
    loss, outcome = loss_of(model, text, docs, thoughts)
    model.zero_grad()
    loss.backward()
    return outcome, {n.replace("_checkpoint_wrapped_module.", ""): p.grad
                     for n, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_compiled_step_is_that_of_the_cpu(pair, make_text, make_thoughts, dtype, checkpointing):
    """flex_attention forward and backward, compiled blocks and log-prob chunks: losses and every
    gradient."""
    reference, model = pair
    text, docs = make_text(3, 63, vocab=500)
    thoughts = make_thoughts(3, 2, 60, 3, vocab=499)
    thoughts[thoughts == 7] = thoughts[thoughts == 60] = 8  # banned ids
    expected, expected_grads = step(reference, text, docs, thoughts)
    device = model.lm.head_weight.device
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        speed_up(model, device, checkpointing)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outcome, grads = step(model, *(x.to(device) for x in (text, docs, thoughts)))
    tolerance = TOLERANCE[dtype]
    for name in ("base_lp", "mixed_lp"):
        assert_close(getattr(outcome, name), getattr(expected, name), tolerance)
    for name, grad in expected_grads.items():
        assert_close(grads[name], grad, tolerance if dtype == torch.float32 else 5 * tolerance)


@pytest.mark.parametrize("weight", [1e-4, 1e-2])
def test_rewards_do_not_drown_in_bf16(pair, make_text, make_thoughts, weight):
    """With a mixing weight as small as at the start, bf16 advantages are those of the CPU; without
    one they are exactly zero, however a chunk's products were rounded."""
    reference, model = pair
    text, docs = make_text(3, 63, vocab=500)
    thoughts = make_thoughts(3, 2, 60, 3, vocab=499)
    thoughts[thoughts == 7] = thoughts[thoughts == 60] = 8  # banned ids
    with torch.no_grad():
        mix = reference.score(text, docs, thoughts).mix.abs().mean()
        reference.mixing_head[4].weight.mul_(weight / mix)
        model.mixing_head[4].weight.copy_(reference.mixing_head[4].weight)
        expected = loss_of(reference, text, docs, thoughts)[1].advantage.flatten()
        on_device = [x.to(model.lm.head_weight.device) for x in (text, docs, thoughts)]
        with autocast(on_device[0].device):
            advantage = loss_of(model, *on_device)[1].advantage.flatten().cpu().double()
            model.mixing_head[4].weight.zero_()
            assert not loss_of(model, *on_device)[1].reward.any()
    assert torch.corrcoef(torch.stack((advantage, expected)))[0, 1] > 0.98


def test_a_step_is_compiled_once(pair, make_text):
    """Sampling, scoring and loss: nothing is compiled after warm-up but chunks of a new number of
    rows, once."""
    _, model = pair
    device = model.lm.head_weight.device
    speed_up(model, device)
    counts, objective = [], Objective(policy_weight=1.0, clamp_advantage=False)
    for seed in range(4):
        text, docs = (x.to(device) for x in make_text(2, 63, vocab=500, seed=seed))
        u = torch.rand(2, 2, 60, 3, generator=torch.Generator().manual_seed(seed)).to(device)
        thoughts, sampled_lp = model.rollout(text, docs, u)
        valid = Valid.from_docs(docs, 3)
        loss, _ = model.loss(text, docs, thoughts, sampled_lp, valid.counts(), objective)
        loss.backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[3] == counts[1]


def test_thoughts_are_those_of_the_cpu(pair, make_text):
    """The same uniform numbers give the same thoughts, but for numbers within rounding of an id's
    boundary: in fp32, outside the autocast that a rollout has of its own."""
    reference, model = pair
    device, (text, docs) = model.lm.head_weight.device, make_text(2, 63, vocab=500)
    u = torch.rand(2, 2, 60, 4, generator=torch.Generator().manual_seed(0))
    expected, expected_lp = reference.rollout(text, docs, u)
    speed_up(model, device)
    with torch.no_grad():
        thoughts, log_probs = model._rollout(*(x.to(device) for x in (text, docs, u)))
    same = (thoughts.cpu() == expected).all(-1)
    assert same.float().mean() > 0.98
    assert_close(log_probs.cpu()[same], expected_lp[same], 1e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("n_ahead", [0, 3, 6])
def test_decoding_is_that_of_the_cpu(pair, monkeypatch, n_ahead, compiled):
    """The captured graph over prompts of several lengths; thoughts and text the likeliest."""
    def likeliest(hidden, weight, u, temperature, banned):
        return fp32_logits(hidden, weight, banned).argmax(-1, keepdim=True), None
    monkeypatch.setattr(sampling, "sample_tokens", likeliest)
    reference, model = pair
    if compiled:
        speed_up_decoding(model, model.lm.head_weight.device)
    prompts = [[5, 9, 2, 30, 11], [40], [3, 3, 58, 21]]
    steps = (generate(m, prompts, 6, n_ahead, temperature=0) for m in (model, reference))
    for ours, expected in zip(*steps, strict=True):
        assert_close(*(x.logits.nan_to_num(neginf=0.0) for x in (ours, expected)), 1e-3)
        assert torch.equal(ours.tokens.cpu(), expected.tokens)
        assert torch.equal(ours.thoughts.cpu(), expected.thoughts)


@pytest.mark.parametrize("n_ahead", [0, 6])
def test_prompts_leave_the_batch_as_on_the_cpu(pair, n_ahead):
    """A graph is captured again for the smaller batch; thoughts of temperature 0."""
    written = []
    for model in pair:
        ended, rows = set(), []
        for i, step in enumerate(generate(model, [[5, 9, 2], [40], [3, 58, 21, 8]], 9, n_ahead,
                                          temperature=0, ended=ended, thought_temperature=0)):
            ended |= {0, 2} if i == 3 else set()
            rows.append((list(step.rows), step.tokens.tolist(), step.thoughts.tolist()))
        written.append(rows)
    assert written[0] == written[1]
    assert [len(rows) for rows, _, _ in written[0]] == [3] * 4 + [1] * 5


def test_a_run_learns_on_the_gpu(tmp_path):
    """The demo, shortened, as train.py runs it: bf16, fused optimizer, pinned batches, evaluation,
    checkpoint."""
    from test_train import rows, start

    out = tmp_path / "out"
    assert start(out, device=DEVICE, n_heads=1, pretrain_steps=60, pretrain_batch_size=16,
                 max_steps=4) == 0
    losses = [row["nll_base"] for row in rows(out, "pretrain")]
    assert losses[-1] < losses[0] - 0.02 and rows(out, "eval")[-1]["step"] == 4
    assert (out / "checkpoint" / "quietstar.safetensors").exists()
