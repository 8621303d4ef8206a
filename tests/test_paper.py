"""The paper's experiment from its beginning to its table, every command of it in this process."""

import importlib
import json
import subprocess

import pytest
from test_tasks import CHOICES, QUESTIONS, qwen_like, write

import train as script
from data.writer import write_dataset
from nanoqstar import experiments, hf, paper
from nanoqstar.flops import matched_steps
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config

SHAPE = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8, max_position_embeddings=4096)
OVERRIDES = ["--max_length", "10", "--n_ahead", "4", "--max_steps", "2", "--batch_size", "2",
             "--eval_windows", "2", "--threads", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The experiment's command line, and the commands that it has run."""
    tokenizer = qwen_like()
    model = QuietStar(Qwen2(Qwen2Config(vocab_size=tokenizer.get_vocab_size(), **SHAPE,
                                        tie_word_embeddings=True)))
    model.lm.init_weights(0.1, 0.1, 0)
    hf.save(tmp_path / "model", model, tokenizer, thinking=None, step=0, config={}, source=None)
    ids = [tokenizer.encode(f"Q: {q}\nA: {a}").ids[:60] for q, a in QUESTIONS]
    write_dataset(tmp_path / "data", tokenizer.to_str(), tokenizer.get_vocab_size(), None,
                  {"train": ids, "val": ids}, {})
    gsm8k = write(tmp_path / "g.jsonl", [dict(question=q, answer=a) for q, a in QUESTIONS])
    choices = write(tmp_path / "c.jsonl", [
        dict(question=q, choices=dict(label=list("ABCDE"), text=t), answerKey=k)
        for q, t, k in CHOICES])
    ran = []

    def run(words, check):
        ran.append(words[1:])
        if words[1] == "-m":
            return subprocess.CompletedProcess(
                words, importlib.import_module(words[2]).main(words[3:]))
        assert words[1] == "train.py"
        return subprocess.CompletedProcess(words, script.main(words[2:]))

    monkeypatch.setattr(paper.subprocess, "run", run)
    return ["paper", "--preset", "tiny", "--out", str(tmp_path / "out"), "--gsm8k", gsm8k,
            "--commonsense_qa", choices, "--samples", "2", "--votes", "2", "--limit", "3", "--",
            "--model_path", str(tmp_path / "model"), "--data", str(tmp_path / "data"),
            "--delimiters", "learned", "--start_init_text", "a", "--end_init_text", "a",
            *OVERRIDES], ran


def test_from_the_beginning_to_the_table(here, tmp_path, monkeypatch, capsys):
    command, ran = here
    monkeypatch.setattr("nanoqstar.answers.ANSWER_TOKENS", 3)
    assert experiments.main(command) == 0
    (out,) = (tmp_path / "out").iterdir()
    kinds = [" ".join(w[:2]) if w[0] == "train.py" else w[2] for w in ran]
    assert kinds == ["train.py tiny"] * 3 + ["text"] * 3 + ["gsm8k"] * 6 + [
        "commonsense_qa"] * 3 + [str(out / "thoughts")]
    assert ran[0][-1] == "--plan" and [r[2:4] for r in ran[6:12] if "--cot" in r]
    made = {name: json.loads((out / name / "config.json").read_text())
            for name in ("thoughts", "plain")}
    cfg = type("Cfg", (), made["thoughts"])
    assert (made["thoughts"]["n_ahead"], made["plain"]["n_ahead"]) == (4, 0)
    assert made["plain"]["max_steps"] == matched_steps(cfg) > 2
    assert made["plain"]["model_path"] == made["thoughts"]["model_path"]

    table = (out / "table.md").read_text()
    assert table.rstrip("\n") in capsys.readouterr().out
    rows = {row.split(" | ")[0].strip("| "): [x.strip(" |") for x in row.split(" | ")[1:]]
            for row in table.splitlines()[2:]}
    assert list(rows) == [
        "text, NLL", "gsm8k, answer prob %", "gsm8k, exact match %",
        "gsm8k --cot, maj@1 %", "gsm8k --cot, maj@2 %",
        "commonsense qa, answer prob %", "commonsense qa, exact match %"]
    assert rows["gsm8k, answer prob %"][4] == "5.9 -> 10.9"
    for task, name, column, thinks in (
            ("gsm8k", "before", 0, 0), ("gsm8k", "plain", 1, 0), ("gsm8k", "thoughts", 2, 0),
            ("gsm8k", "thoughts", 3, 1)):
        (file,) = (f for f in out.glob(f"{task}-{name}-*.json"))
        found = json.loads(file.read_text())["found"]["answer_prob"]
        assert rows["gsm8k, answer prob %"][column] == (
            f"{100 * found['thoughts' if thinks else 'base']:.2f}")
    assert (out / "thoughts" / "report.html").is_file()

    ran.clear()  # nothing is done twice
    assert experiments.main(command) == 0
    assert [w[:2] for w in ran] == [["-m", "nanoqstar.report"]]
    assert (out / "table.md").read_text() == table
    next(out.glob("text-plain-*.json")).unlink()  # as a kill leaves it
    metrics = out / "plain" / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(True)[:-1]))
    ran.clear()
    assert experiments.main(command) == 0
    assert [w[0] for w in ran] == ["train.py", "-m", "-m"] and "--resume=auto" in ran[0]


def test_what_a_tokenizer_cannot_say_is_left_out(here, tmp_path, monkeypatch, capsys):
    """And a command that fails ends it all in a sentence."""
    command, ran = here
    command = [*command[:command.index("--")], "--", *OVERRIDES, "--pretrain_steps", "1",
               "--fold_tokens", "3000", "--hidden_size", "16"]
    assert experiments.main(command) == 0
    assert {w[2] for w in ran if w[1] == "nanoqstar.evaluate"} == {"text"}
    assert capsys.readouterr().out.count("left out: gsm8k: the tokenizer cannot") == 1
    monkeypatch.setattr(paper.subprocess, "run",
                        lambda words, check: subprocess.CompletedProcess(words, 2))
    assert experiments.main([*command, "--seed", "5"]) == 2
    assert "python train.py tiny" in (said := capsys.readouterr().err) and "exit code 2" in said
    assert experiments.main([*command, "--resume", "auto"]) == 2
    assert "--resume is set by the experiment" in capsys.readouterr().err
