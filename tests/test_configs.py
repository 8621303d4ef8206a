"""The settings: what is refused, and in which words; the presets."""

import dataclasses
import json
import math

import pytest

from configs import (
    PRESETS,
    PrepareConfig,
    SampleConfig,
    TrainConfig,
    list_presets,
    load_config,
)
from nanoqstar import InputError, cli


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"n_ahead": 1}, "n_ahead=1 leaves no sampled token"),
    ({"n_ahead": 2}, "n_ahead=2 leaves no sampled token"),
    ({"n_ahead": -3}, "--n_ahead: must be at least 0"),
    ({"n_ahead_talk": 0}, "--n_ahead_talk: must be at least 1, got 0"),
    ({"n_passes": 0}, "--n_passes: must be at least 1"),
    ({"max_length": 0}, "--max_length: must be at least 1"),
    ({"learning_rate": math.nan}, "--learning_rate: expected float, got nan"),
    ({"learning_rate": -1.0}, "--learning_rate: must be greater than 0, got -1.0"),
    ({"device": "tpu"}, "'tpu' is not one of auto, cuda, mps, cpu"),
    ({"hidden_size": 97}, "heads must divide"),
    ({"beta2": 1.0}, "--beta2: must be less than 1, got 1.0"),
    ({"threads": 0}, "--threads: must be at least 1"),
    ({"threads": 1_000_000}, "--threads: must be at most 1,024"),
    ({"fold_worked_frac": 0.8}, "more than 1"),
    ({"seed": True}, "expected int"),
    ({"policy_weight": -2e12}, "--policy_weight: must be at least -1,000,000,000,000"),
    ({"fold_operands": 1}, "--fold_operands: must be at least 2"),
    ({"fold_shortest": 5}, "fold_shortest=5: at most fold_operands=4"),
    ({"fold_family": "sum", "fold_operations": 2}, "only folds have several operations"),
    ({"max_steps": math.inf}, "expected int"),
    ({"thought_temperature": 1e-300}, "--thought_temperature: must be at least 0.001"),
    ({"init_std": 1e30}, "--init_std: must be at most 100"),
    ({"fold_tokens": 10**12}, "--fold_tokens: must be at most 1,000,000,000"),
    ({"normalize_advantage": True, "grad_accum": 2}, "set grad_accum 1"),
    ({"n_ahead": 0, "trainable": "thoughts"}, "only the whole model can learn"),
    ({"warm_steps": 3, "trainable": "mixing_head"}, "cannot learn the thoughts of a warm start"),
    ({"fold_family": "sum", "fold_shortest": 2}, "only folds have several operations, or a short"),
])
def test_values_out_of_range(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        TrainConfig(**changes)


@pytest.mark.parametrize("changes", [
    {"max_new_tokens": 0}, {"temperature": -0.1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5},
    {"n_ahead": 2}, {"seed": -1}])
def test_sampling_values_out_of_range(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        SampleConfig(**changes)


@pytest.mark.parametrize("args", [[], ["--warm_steps", "3", "--n_ahead", "0"]])
def test_given_thoughts_that_nothing_would_learn_are_refused(args):
    with pytest.raises(InputError, match="is for "):
        cli.settings(TrainConfig, ["--fold_thoughts", "5", *args], "")


def test_no_thoughts_is_a_legal_n_ahead():
    assert TrainConfig(n_ahead=0).n_ahead == 0


def test_paper_presets_keep_the_official_values():
    official = dict(base_weight=0.5, mixed_weight=0.5, reinforce_temperature=3.0, policy_weight=1e6,
                    embedding_lr_factor=100.0, clamp_advantage=True, start_init_text="---",
                    end_init_text="---", learning_rate=1e-6, warmup_steps=20, weight_decay=0.001,
                    grad_clip=1.0)
    for name in ("qwen2_5_0_5b", "qwen2_5_3b", "qwen2_5_3b_math", "qwen2_5_7b", "mistral_7b_paper"):
        config = dataclasses.asdict(PRESETS[name].config)
        assert official.items() <= config.items()
    paper = PRESETS["mistral_7b_paper"].config
    assert (paper.n_ahead, paper.n_ahead_talk, paper.n_passes) == (11, 4, 2)  # official 12 / 4
    assert paper.max_steps == 100
    assert paper.max_length + paper.n_ahead_talk == 256
    assert paper.batch_size * paper.grad_accum == 8
    main = PRESETS["qwen2_5_3b"].config
    assert (main.n_ahead, main.n_ahead_talk, main.n_passes) == (8, 4, 4)
    assert (main.batch_size, main.max_length, main.max_steps) == (1, 1024, 100_000)


def test_saved_configs_round_trip(tmp_path):
    presets = [preset.config for preset in PRESETS.values()]
    for config in (*presets, dataclasses.replace(presets[0], seed=7, end_init_text="\n")):
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        assert load_config(str(tmp_path / "config.json")) == (tmp_path.name, config)


@pytest.mark.parametrize(("text", "sentence"), [
    ("{", "cannot be read as JSON"), ("[1]", "holds no JSON object"),
    ('{"n_ahed": 8}', "unknown key 'n_ahed'; did you mean n_ahead"),
    ('{"n_ahead": "8"}', "--n_ahead: expected int"), ('{"n_ahead": 2}', "n_ahead=2")])
def test_broken_saved_configs(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_config(str(tmp_path / "config.json"))


def test_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(InputError, match=r"did you mean qwen2_5_3b.*tiny, .*small, text, qwen2"):
        load_config("qwen2_5_3B")


def test_the_list_of_presets():
    text = list_presets()
    assert all(name in text and p.purpose in text for name, p in PRESETS.items())
    assert "GB" in text


@pytest.mark.parametrize("tokenizer", ["train:256", "train:99999999999", "train:", "train:4e3"])
def test_new_tokenizers_have_a_size(tokenizer):
    with pytest.raises(InputError, match="from 257"):
        PrepareConfig(tokenizer=tokenizer)
    assert PrepareConfig(tokenizer="train:257").tokenizer == "train:257"
