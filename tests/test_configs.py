"""The command line: one grammar derived from the fields, and one sentence for whatever is wrong."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import configs
from configs import PRESETS, ConfigError, SampleConfig, TrainConfig, load_config, parse_options

ROOT = Path(__file__).parents[1]


def train(*args):
    return subprocess.run([sys.executable, "train.py", *args], cwd=ROOT, capture_output=True, text=True, check=False)


def test_both_spellings_and_bare_booleans():
    values = parse_options(TrainConfig, ["--n_ahead", "8", "--learning_rate=1e-5", "--wandb", "--compile", "false",
                                         "--model_path", "none", "--max_steps", "100_000"])
    assert values == {"n_ahead": 8, "learning_rate": 1e-5, "wandb": True, "compile": False, "model_path": None,
                      "max_steps": 100000}
    assert parse_options(TrainConfig, ["--wandb", "--seed", "3"]) == {"wandb": True, "seed": 3}
    assert parse_options(TrainConfig, ["--start_init_text", "\\n"]) == {"start_init_text": "\n"}
    assert parse_options(TrainConfig, ["--thoughts_from", "é(\\n"]) == {"thoughts_from": "é(\n"}


@pytest.mark.parametrize("args, sentence", [
    (["--n_ahed", "8"], "unknown option --n_ahed; did you mean --n_ahead?"),
    (["--learning_rate", "fast"], "--learning_rate: expected float, got 'fast'"),
    (["--n_ahead", "7.5"], "--n_ahead: expected int, got '7.5'"),
    (["--wandb=maybe"], "--wandb: expected bool, got 'maybe'"),
    (["--seed"], "--seed: a value is missing"),
    (["seed", "3"], "unexpected argument 'seed'"),
])
def test_refused_options(args, sentence):
    with pytest.raises(ConfigError, match="^" + sentence.replace("?", r"\?")):
        parse_options(TrainConfig, args)


@pytest.mark.parametrize("changes, sentence", [
    ({"n_ahead": 1}, "n_ahead=1 leaves no sampled token"), ({"n_ahead": 2}, "n_ahead=2 leaves no sampled token"),
    ({"n_ahead": -3}, "n_ahead=-3 leaves"), ({"n_ahead_talk": 0}, "n_ahead_talk=0"), ({"n_passes": 0}, "n_passes=0"),
    ({"max_length": 0}, "max_length=0"), ({"learning_rate": float("nan")}, "learning_rate"),
    ({"learning_rate": -1.0}, "learning_rate=-1.0"), ({"device": "tpu"}, "'tpu' is not one of auto, cuda, mps, cpu"),
    ({"hidden_size": 97}, "heads must divide"), ({"beta2": 1.0}, "beta2"), ({"threads": 0}, "threads=0"),
    ({"fold_worked_frac": 0.8}, "more than 1"), ({"seed": True}, "expected int"),
    ({"policy_weight": -1.0}, "policy_weight"), ({"fold_operands": 1}, "fold_operands=1"),
    ({"max_steps": float("inf")}, "expected int"),
])
def test_values_out_of_range(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TrainConfig(**changes)


@pytest.mark.parametrize("changes", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_k": 0}, {"top_p": 0.0},
                                     {"top_p": 1.5}, {"n_ahead": 2}, {"seed": -1}])
def test_sampling_values_out_of_range(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        SampleConfig(**changes)


def test_no_thoughts_is_a_legal_n_ahead():
    assert TrainConfig(n_ahead=0).n_ahead == 0


def test_paper_presets_keep_the_official_values():
    for name in ("qwen2_5_0_5b", "qwen2_5_3b", "qwen2_5_3b_math", "qwen2_5_7b", "mistral_7b_paper"):
        c = PRESETS[name].config
        assert (c.base_weight, c.mixed_weight, c.reinforce_temperature, c.policy_weight, c.embedding_lr_factor) == (
            0.5, 0.5, 3.0, 1e6, 100.0)
        assert c.clamp_advantage and (c.start_init_text, c.end_init_text) == ("---", "---")
        assert (c.learning_rate, c.warmup_steps, c.weight_decay, c.grad_clip) == (1e-6, 20, 0.001, 1.0)
    paper = PRESETS["mistral_7b_paper"].config
    assert (paper.n_ahead, paper.n_ahead_talk, paper.n_passes, paper.max_steps) == (11, 4, 2, 100)  # official 12 / 4
    assert paper.max_length + paper.n_ahead_talk == 256 and paper.batch_size * paper.grad_accum == 8
    main = PRESETS["qwen2_5_3b"].config
    assert (main.n_ahead, main.n_ahead_talk, main.n_passes, main.batch_size, main.max_length, main.max_steps) == (
        8, 4, 4, 1, 1024, 100_000)


def test_saved_config_round_trips(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"].config, seed=7, end_init_text="\n")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert load_config(str(tmp_path / "config.json")) == (tmp_path.name, config)


@pytest.mark.parametrize("text, sentence", [("{", "not readable as JSON"), ("[1]", "holds no settings"),
                                            ('{"n_ahed": 8}', "unknown key 'n_ahed'; did you mean n_ahead"),
                                            ('{"n_ahead": "8"}', "--n_ahead: expected int"),
                                            ('{"n_ahead": 2}', "n_ahead=2")])
def test_broken_saved_configs(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_config(str(tmp_path / "config.json"))


def test_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ConfigError, match="did you mean qwen2_5_3b.*tiny, small, text, qwen2_5_0_5b"):
        load_config("qwen2_5_3B")


def test_help_explains_every_field():
    text = configs.help_text(TrainConfig, "usage")
    for f in dataclasses.fields(TrainConfig):
        assert f"--{f.name} (" in text and f.metadata["help"] in text


def test_the_script_prints_one_line_and_exits_2():
    done = train("tiny", "--n_ahead", "2")
    assert done.returncode == 2 and done.stderr.startswith("error: n_ahead=2") and done.stderr.count("\n") == 1
    listed = train("configs")
    assert listed.returncode == 0 and all(name in listed.stdout for name in PRESETS) and "GB" in listed.stdout
    assert "--n_ahead_talk" in train("--help").stdout
