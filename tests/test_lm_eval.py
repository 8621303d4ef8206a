"""The harness's log-likelihoods are score_text's with thoughts, and its own hf model's without."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from test_sample import byte_tokenizer

from nanoqstar import InputError, hf
from nanoqstar.evaluate import score_text
from nanoqstar.lm_eval import How, ModelArgs, Scorer, main, register
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config
from nanoqstar.sampling import generate

THINKING = hf.Thinking(5, 2, 0.8)


def make(folder, tokenizer, thinking=THINKING, **changes):
    """A random model in a folder."""
    config = Qwen2Config(**dict(
        vocab_size=tokenizer.get_vocab_size() + 2, hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=64) | changes)
    model, generator = QuietStar(Qwen2(config)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    hf.save(folder, model, tokenizer, thinking=thinking, step=3, config={}, source=None)
    return folder


@pytest.fixture(params=["qwen2", "mistral"])
def folder(request, tmp_path):
    """As Qwen's: no beginning of text, tied; as Mistral's: with one, untied, no biases."""
    if request.param == "qwen2":
        return make(tmp_path / "model", byte_tokenizer("<|endoftext|>"))
    return make(tmp_path / "model", byte_tokenizer("<s>", "</s>", beginning="<s>"),
                attention_bias=False, tie_word_embeddings=False, rope_theta=1e4)


@pytest.fixture
def scorer(tmp_path):
    """In float64."""
    folder = make(tmp_path / "model", byte_tokenizer("<|endoftext|>"))

    def build(batch_size=16, **args):
        made = Scorer(ModelArgs(path=str(folder), **args), batch_size, "cpu")
        made.model.double()
        return made
    return build


# ---- without the harness


@pytest.mark.parametrize("thoughts", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_log_likelihoods_are_those_of_score_text(scorer, make_text, thoughts, batch_size):
    """Whole windows, of several lengths at once: neither batch nor padding changes a number."""
    made, pairs, expected = scorer(batch_size, thoughts=thoughts, seed=3), [], []
    for length in (9, 14):
        text, docs = make_text(3, length, vocab=256, seed=length)
        scores = score_text(made.model, text, torch.zeros_like(docs), made.n_ahead, 1, seed=3,
                            batch_size=3)
        for row in range(3):
            pairs.append((text[row, :4].tolist(), text[row, 4:].tolist()))
            lp = scores.mixed_lp if thoughts else scores.base_lp
            expected.append(lp[row, 3:].sum().item())
    if thoughts:  # score_text numbers windows from 0 in each call
        found = [x for half in (pairs[:3], pairs[3:]) for x in made.log_likelihoods(half)]
    else:
        found = made.log_likelihoods(pairs)
    assert [x for x, _ in found] == pytest.approx(expected, abs=1e-9)
    together = made.log_likelihoods(pairs)
    assert [x for x, _ in together][:3] == pytest.approx(expected[:3], abs=1e-9)
    assert made.log_likelihoods(pairs[::-1])[-1][0] != expected[0] or not thoughts


@pytest.mark.parametrize("thoughts", [True, False])
def test_one_forward_serves_all_last_tokens(scorer, monkeypatch, thoughts):
    """Their probabilities sum to 1, and the likeliest of all is the greedy one."""
    made, calls = scorer(thoughts=thoughts), []
    states = made.states
    monkeypatch.setattr(made, "states", lambda text, *rest: (calls.append(len(text)),
                                                             states(text, *rest))[1])
    n = made.model.lm.config.vocab_size
    found = made.log_likelihoods([([5, 9, 2], [i]) for i in range(n)])
    assert calls == [1]
    assert math.fsum(math.exp(lp) for lp, _ in found) == pytest.approx(1, abs=1e-12)
    best = max(range(n), key=lambda i: found[i][0])
    assert [i for i in range(n) if found[i][1]] == [best]


def test_a_continuation_is_greedy_where_every_token_is(scorer):
    made = scorer(thoughts=False)
    context, best = [5, 9, 2], []
    for _ in range(3):
        found = made.log_likelihoods([(context + best, [i]) for i in range(258)])
        best.append(max(range(258), key=lambda i: found[i][0]))
    wrong = [best[0], (best[1] + 1) % 256, best[2]]
    found = made.log_likelihoods([(context, best), (context, wrong)])
    assert [x for _, x in found] == [True, False]


def test_a_context_is_cut_from_the_left(scorer):
    for thoughts in (False, True):
        made = scorer(thoughts=thoughts, max_length=10)
        context = list(range(40))
        cut = made.log_likelihoods([(context, [7, 8])])
        assert cut == made.log_likelihoods([(context[-9:], [7, 8])])
        assert cut != made.log_likelihoods([(context[-8:], [7, 8])])
        with pytest.raises(InputError, match="11 tokens, a window 10"):
            made.log_likelihoods([([1], [2] * 11)])


def test_writing_is_batched_and_stops(scorer):
    made = scorer(thoughts=False)
    prompts = [[5, 9, 2, 11, 8], [30], [8, 8]]
    alone = [made.write([p], [], How(12))[0] for p in prompts]
    assert made.write(prompts, [], How(12)) == alone
    stop = alone[1][3]
    text = made.write(prompts, [stop], How(12))[1]
    assert text == alone[1][:alone[1].index(stop) + 1]
    ids = [step.tokens.item() for step in generate(made.model, prompts[:1], 12, 0, 0)]
    end = next(n for n, x in enumerate(ids) if x != ids[0])
    assert alone[0] == made.decode(ids)
    made.end_ids = (ids[end],)
    assert made.write(prompts, [], How(12))[0] == made.decode(ids[:end])
    assert made.write([list(range(60))], [], How(40)) == made.write(
        [list(range(36, 60))], [], How(40))
    with pytest.raises(InputError, match="max_gen_toks=64 leaves no room"):
        made.write(prompts, [], How(64))
    thinks = scorer()
    assert thinks.write(prompts, [], How(6, 1.0)) == thinks.write(prompts, [], How(6, 1.0))


def test_what_is_refused(tmp_path):
    folder = str(make(tmp_path / "plain", byte_tokenizer("<|endoftext|>"), None))
    with pytest.raises(InputError, match="never taught to think: add thoughts=false"):
        Scorer(ModelArgs(path=folder))
    for wrong, message in (({"n_ahead": 2}, "n_ahead: must be at least 3"),
                           ({"path": None}, "path"), ({"thoughts": "yes"}, "expected bool")):
        with pytest.raises(InputError, match=message):
            ModelArgs(**{"path": folder, **wrong})
    with pytest.raises(InputError, match="1000 positions are more than the model's context of 64"):
        Scorer(ModelArgs(path=folder, thoughts=False, max_length=1000))


def test_without_the_harness_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert main(["--tasks", "x"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "pip install -e '.[harness]'" in err


# ---- inside it


WORDS = ["a tree", "two stones", "some rain", "an old dog", "every night", "the sea"]


@pytest.fixture
def tasks(tmp_path):
    """A folder of local tasks of all three kinds."""
    rows = [{"text": f"{WORDS[i]} and {WORDS[i - 2]} ",
             "choices": [WORDS[i - 1], WORDS[i - 3], "it"],
             "whole": " ".join(WORDS[i:] * (1 + 3 * i))} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {"dataset_path": "json", "test_split": "test", "dataset_kwargs": {
        "data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}}
    made = {
        "choose": {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": 0,
                   "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}]},
        "begin": {"output_type": "multiple_choice", "doc_to_text": "", "doc_to_target": 0,
                  "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}]},
        "roll": {"output_type": "loglikelihood_rolling", "doc_to_text": "",
                 "doc_to_target": "{{whole}}", "metric_list": [{"metric": "byte_perplexity"}]},
        "write": {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x",
                  "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12},
                  "metric_list": [{"metric": "exact_match"}]}}
    (tmp_path / "tasks").mkdir()
    for name, task in made.items():  # JSON is YAML
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(
            {"task": name, **common, **task}))
    return tmp_path / "tasks"


def answers(model, tasks):
    """What a model answered: {task: [a number or text for each request]}."""
    harness, manager = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
    result = harness.simple_evaluate(
        model, tasks=["choose", "begin", "roll", "write"], log_samples=True, bootstrap_iters=0,
        task_manager=manager.TaskManager(include_path=str(tasks), include_defaults=False))
    return {task: [x for row in rows for resp in row["resps"] for x in (
        resp[0] if isinstance(resp[0], (list, tuple)) else [resp[0]])]
            for task, rows in result["samples"].items()}


def test_base_answers_are_those_of_the_harness_own_model(folder, tasks):
    transformers = pytest.importorskip("transformers")
    theirs = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)  # lm_eval[hf]
    theirs = answers(theirs.HFLM(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(folder), device="cpu",
        batch_size=4), tasks)
    ours = answers(register()(path=str(folder), thoughts=False, batch_size=4, device="cpu"), tasks)
    assert ours["write"] == theirs["write"]
    for task in ("choose", "begin", "roll"):
        assert ours[task] == pytest.approx(theirs[task], rel=1e-5), task
    assert len(ours["roll"]) == 6
    with_thoughts = answers(register()(path=str(folder), batch_size=4, device="cpu"), tasks)
    assert with_thoughts["choose"] != pytest.approx(ours["choose"], rel=1e-2)


def test_the_command_prints_the_harness_table(tmp_path, tasks, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(sys, "argv", sys.argv)
    folder = make(tmp_path / "model", byte_tokenizer("<|endoftext|>"))
    assert main(["--model", "nanoqstar", "--model_args", f"path={folder},n_ahead=3", "--tasks",
                 "choose", "--device", "cpu", "--include_path", str(tasks), "--batch_size",
                 "auto"]) == 0
    assert "|choose|" in capsys.readouterr().out


def test_the_harness_is_told_what_is_wrong(tmp_path):
    pytest.importorskip("lm_eval")
    folder = str(make(tmp_path / "model", byte_tokenizer("end")))
    for given, message in (({"path": folder, "n_ahed": 4}, "n_ahed; did you mean n_ahead?"),
                           ({}, "path: expected str")):
        with pytest.raises(InputError, match=message):
            register()(**given)
    model = register()(path=folder, device="cpu")
    with pytest.raises(InputError, match="no token that ends a text"):
        model.prefix_token_id  # noqa: B018
    request = SimpleNamespace(args=("a", {"until": [], "num_beams": 4}))
    with pytest.raises(InputError, match="num_beams cannot be had here"):
        model.generate_until([request])
