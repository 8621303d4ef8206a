"""python -m nanoqstar.evaluate from the command line, and what training writes of the same."""

import dataclasses
import json
import math
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from many import launch
from prepared import sentences, write_jsonl
from test_evaluate import listed, made_up, scores_of  # noqa: F401
from test_tasks import CHOICES, QUESTIONS, TOKENIZERS, files  # noqa: F401

import train as script
from configs import EvaluateConfig, TrainConfig, changes
from data import prepare
from nanoqstar import InputError, answers, cli, hf, tasks, worth
from nanoqstar.charts import ticks
from nanoqstar.dataset import TokenDataset
from nanoqstar.evaluate import main, score_text
from nanoqstar.plot import chart

SMALL = dict(hidden_size=16, intermediate_size=32, n_heads=2, n_kv_heads=1, n_layers=1, threads=1,
             pretrain_steps=2, pretrain_batch_size=4, max_length=20, batch_size=4, eval_windows=4,
             max_steps=2, eval_every=1, log_every=1, n_ahead_talk=2, learning_rate=0.01)
OPTIONS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
THINKING = [*OPTIONS, "--n_ahead", "4"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data, questions, and a run that was evaluated on them twice and at the end."""
    folder = tmp_path_factory.mktemp("worth")
    (folder / "words").mkdir()
    (folder / "words" / "tokenizer.json").write_text(TOKENIZERS["qwen"].to_str())
    text = write_jsonl(folder / "text.jsonl", sentences(0, 400))
    assert prepare.main(["--input", str(text), "--tokenizer", str(folder / "words"), "--out",
                         str(folder / "data"), "--val_fraction", "0.2"]) == 0
    write_jsonl(folder / "gsm8k.jsonl", [])
    (folder / "gsm8k.jsonl").write_text("".join(
        json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS))
    (folder / "csqa.jsonl").write_text("".join(json.dumps({
        "question": q, "answerKey": key, "choices": {"label": list("ABCDE"), "text": texts}}) + "\n"
        for q, texts, key in CHOICES))
    assert script.main(["text", "--data", str(folder / "data"), "--out_dir", str(folder / "run"),
                        *THINKING, "--eval_limit", "4", "--eval_tasks",
                        f"gsm8k={folder / 'gsm8k.jsonl'},commonsense_qa={folder / 'csqa.jsonl'}"
                        ]) == 0
    return folder


@pytest.fixture
def run(work, tmp_path, capsys, monkeypatch):
    """A command line on that run -> (exit code, output, errors, the figures in its JSON)."""
    def call(*args, model="run"):
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        code = main([*map(str, args), "--model_path", str(work / model), "--json", "x.json"])
        file = tmp_path / "x.json"
        found = json.loads(file.read_text()) if file.exists() else None
        file.unlink(missing_ok=True)
        return code, *capsys.readouterr(), found
    return call


def refused(result, *words):
    code, out, err, found = result
    assert (code, out, found) == (2, "", None), result
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


# ---- questions


def test_training_writes_what_the_command_finds(work, run):
    """The last evaluation, and one of the model that was saved then."""
    rows = [json.loads(x) for x in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert len(evaluations) == 3
    for name, file, n in (("gsm8k", "gsm8k.jsonl", 4), ("commonsense_qa", "csqa.jsonl", 3)):
        code, out, err, said = run(name, "--input", work / file, "--limit", 4, "--samples", 1,
                                   "--batch_size", 4)
        assert (code, err) == (0, "")
        last = evaluations[-1][name]
        assert last["n"] == n == said["found"]["n"]
        assert said["n_ahead"] == 4 and said["step"] == 2
        for what in ("answer_prob", "exact_match"):
            for key in ("base", "thoughts", "difference"):
                assert said["found"][what][key] == pytest.approx(last[what][key], abs=1e-7)
            assert last[what]["spread"] is None
        assert evaluations[0][name]["answer_prob"]["difference"] == 0  # mixing weight 0
        assert last["answer_prob"]["difference"] != 0
        lines = out.splitlines()
        assert lines[0] == f"{name}: {n} questions, n_ahead 4, mean of 1 thoughts a position"
        assert lines[2].split()[0] == "answer_prob"
        assert lines[2].split()[1] == f"{last['answer_prob']['base']:.2%}"


def test_samples_have_a_spread_and_lengths_may_differ(work, run):
    code, out, _, said = run("gsm8k", "--input", work / "gsm8k.jsonl", "--n_ahead", 6)
    assert code == 0 and said["n_ahead"] == 6 and "spread" in out
    found = said["found"]["answer_prob"]
    assert found["spread"] > 0
    model, tokenizer, settings = hf.load_thinker(work / "run")
    questions = tasks.read_questions("gsm8k", tokenizer, str(work / "gsm8k.jsonl"))
    expected = answers.measure(model, tokenizer, questions, 6, end_ids=settings.end_ids,
                               n_samples=3)
    assert found == expected["answer_prob"]


def test_a_model_that_never_learned_to_think(work, run):
    code, out, err, said = run("commonsense_qa", "--input", work / "csqa.jsonl", model="run/base")
    assert code == 0 and "without thoughts" in err
    assert "thoughts" not in out.replace("without thoughts", "")
    assert "thoughts" not in said["found"]["answer_prob"]
    refused(run("text", "--input", work / "data", "--sweep", "n_ahead=4", model="run/base"),
            "was never taught to think")
    refused(run("text", "--input", work / "data", "--plot", "x.svg", model="run/base"),
            "leave --plot out")


def test_the_text_of_a_base_is_that_of_its_run(work, run):
    """The same windows: NLL before and after compare token by token."""
    rows = [json.loads(x) for x in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["kind"] == "eval")
    *_, said = run("text", "--input", work / "data", "--windows", SMALL["eval_windows"],
                   model="run/base")
    found = next(iter(said["found"].values()))
    assert found["nll_base"] == pytest.approx(first["nll_base"], abs=1e-6)


@pytest.mark.parametrize("value", ["20", -5, True, None, [20]])
def test_what_a_model_says_of_its_training_may_be_anything(work, run, tmp_path, value):
    shutil.copytree(work / "run" / "base", tmp_path / "model")
    file = tmp_path / "model" / "nanoqstar.json"
    info = json.loads(file.read_text())
    info["config"] |= {"max_length": value, "n_ahead_talk": value}
    file.write_text(json.dumps(info))
    code, out, *_ = run("text", "--input", work / "data", "--windows", 2, model=tmp_path / "model")
    assert code == 0 and out.startswith("2 windows")


def test_votes_are_kept_where_the_settings_say(work, run, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "CHAIN_TOKENS", 6)
    args = ("gsm8k", "--input", work / "gsm8k.jsonl", "--cot", "--votes", 2, "--limit", 2)
    code, out, _, said = run(*args)
    assert code == 0
    assert said["found"].keys() == {"n", "maj@1", "maj@2"}
    (file,) = (tmp_path / "out" / "answers").iterdir()
    kept = file.read_bytes()
    assert kept.count(b"\n") == 1 + 8 and file.name in out
    monkeypatch.setattr(answers, "write_on", lambda model, waiting, *rest, **options: (
        pytest.fail("computed again") if waiting else iter(())))
    assert run(*args)[3] == said
    assert file.read_bytes() == kept
    monkeypatch.undo()
    monkeypatch.setattr(answers, "CHAIN_TOKENS", 6)
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, args), "--model_path", str(work / "run"), "--seed", "1"]) == 0
    assert len(list((tmp_path / "out" / "answers").iterdir())) == 2
    refused(run(*args, "--answers", file, "--seed", 2), "another model or other settings", "seed 0")
    refused(run(*args, "--official_items"), "leave --official_items out")


# ---- text


def test_a_perplexity_beyond_all_numbers_is_infinite():
    valid = torch.ones(2, 30, dtype=torch.bool)
    found = worth.gains(scores_of(1000 + torch.rand(2, 30), torch.rand(2, 30), valid))
    assert found["perplexity_base"] == found["perplexity_mixed"] == math.inf
    assert 1000 < found["nll_base"] < 1001


def test_gains_by_hand(made_up):  # noqa: F811
    """Sorted by base NLL; errors from the sums of deviations of each window."""
    found, rows = worth.gains(made_up), sorted(listed(made_up), key=lambda r: r[1])
    gain = np.array([r[1] - r[2] for r in rows])
    assert found["tokens"] == 26 and found["windows"] == 6
    assert found["helped"] == pytest.approx((gain > 0).mean())
    assert found["perplexity_base"] == pytest.approx(np.exp(np.mean([r[1] for r in rows])))
    assert found["perplexity_mixed"] == pytest.approx(np.exp(np.mean([r[2] for r in rows])))
    assert found["gain_ahead"] == pytest.approx(found["reward"] / 3)

    def half(values, windows):
        sums = [sum(v - np.mean(values) for v, w in zip(values, windows) if w == n)
                for n in sorted(set(windows))]
        n = len(sums)
        return 1.96 * (n / (n - 1) * sum(s * s for s in sums)) ** 0.5 / len(values)

    windows = [r[0] for r in rows]
    assert found["gain_error"] == pytest.approx(half(gain, windows))
    assert found["helped_error"] == pytest.approx(half(gain > 0, windows))
    first = 0
    for decile, size in zip(found["deciles"], [3] * 6 + [2] * 4):
        part = slice(first, first + size)
        assert decile["nll_base"] == pytest.approx(np.mean([r[1] for r in rows[part]]))
        assert decile["gain"] == pytest.approx(gain[part].mean())
        several = len(set(windows[part])) > 1
        assert decile["gain_error"] == (
            pytest.approx(half(gain[part], windows[part])) if several else None)
        first += size
    assert [d["gain"] for d in found["deciles"]] == pytest.approx(found["gain_by_decile"])


def test_text_of_a_prepared_folder(work, run):
    code, out, err, said = run("text", "--input", work / "data", "--windows", 8)
    assert (code, err) == (0, "")
    model = hf.load_thinker(work / "run")[0]
    text, docs = TokenDataset(work / "data", "val").evenly(8, 22)
    expected = worth.gains(score_text(model, text, docs, 4, 2))
    assert said["found"].keys() == {"n_ahead 4, n_ahead_talk 2"}
    found = said["found"]["n_ahead 4, n_ahead_talk 2"]
    assert found.keys() == expected.keys()
    for key in ("nll_base", "nll_mixed", "gain", "gain_error", "helped", "perplexity_base"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)
    lines = out.splitlines()
    assert lines[0].startswith("8 windows, ")
    assert f"{found['nll_base']:.4f}" in lines[2] and f"{found['helped']:.1%}" in lines[2]
    assert [line.split()[0] for line in lines[5:]] == [
        "easiest", *map(str, range(2, 10)), "hardest"]


def test_sweeps_score_the_same_tokens(work, run, tmp_path):
    """One row each, the base's the same; a length as trained is what it is alone."""
    alone = run("text", "--input", work / "data", "--windows", 4)[3]["found"]
    for sweep, names in (("n_ahead=3,4,6", ["n_ahead 3, n_ahead_talk 2", *alone,
                                            "n_ahead 6, n_ahead_talk 2"]),
                         ("n_ahead_talk=1,2", ["n_ahead 4, n_ahead_talk 1", *alone])):
        code, *_, said = run("text", "--input", work / "data", "--windows", 4, "--sweep", sweep,
                             "--plot", "gains.svg")
        assert code == 0
        assert list(said["found"]) == names
        assert len({x["nll_base"] for x in said["found"].values()}) == 1
        assert said["found"][names[1]]["nll_mixed"] == pytest.approx(
            alone[names[1]]["nll_mixed"], rel=1e-5)
        drawn = ET.parse(tmp_path / "gains.svg").getroot()
        ns = "{http://www.w3.org/2000/svg}"
        assert len(drawn.findall(f"{ns}circle")) == 10 * len(names)
        assert set(names) <= {x.text for x in drawn.findall(f"{ns}text")}


def test_text_of_a_file(work, run, tmp_path):
    """Its documents from the beginning, each between the tokenizer's own marks."""
    text, docs = worth.read_windows(work / "text.jsonl", TOKENIZERS["mistral"], 3, 40)
    assert text.shape == docs.shape == (3, 40)
    expected, numbers = [], []
    for number, document in enumerate(sentences(0, 9)):
        ids = [1, *TOKENIZERS["mistral"].encode(document, add_special_tokens=False).ids, 2]
        expected, numbers = expected + ids, numbers + [number] * len(ids)
    assert text.flatten().tolist() == expected[:120]
    assert docs.flatten().tolist() == numbers[:120]
    code, _, _, said = run("text", "--input", work / "text.jsonl", "--windows", 5)
    assert code == 0
    assert said["found"]["n_ahead 4, n_ahead_talk 2"]["windows"] == 5
    (tmp_path / "short.txt").write_text("the cat sat")
    refused(run("text", "--input", tmp_path / "short.txt"), "a window of 22 tokens does not fit in")
    refused(run("text", "--input", tmp_path / "none.txt"), "no file or folder")
    refused(run("text", "--input", work / "data", "--max_length", 4000), "model's context of 2048")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text(TOKENIZERS["mistral"].to_str())
    assert prepare.main(["--input", str(work / "text.jsonl"), "--tokenizer",
                         str(tmp_path / "words"), "--out", str(tmp_path / "data")]) == 0
    refused(run("text", "--input", tmp_path / "data"), "is not the model's: prepare the data with")


def test_one_window_has_no_intervals():
    scores = scores_of(torch.rand(1, 30), torch.rand(1, 30), torch.ones(1, 30, dtype=torch.bool))
    said = worth.gains_table({"x": worth.gains(scores)})
    assert "+-" not in said and "hardest" in said
    few = scores_of(torch.rand(2, 3), torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert len(worth.gains(few)["deciles"]) == 1
    assert "hardest" in worth.gains_table({"x": worth.gains(few)})


# ---- command lines


@pytest.mark.parametrize(("args", "word"), [
    (["gsm8k"], "model_path must be given"),
    (["arc", "--model_path", "x"], "'arc' is not one of gsm8k, commonsense_qa, text"),
    (["text", "--model_path", "x"], "text needs --input"),
    (["gsm8k", "--model_path", "x", "--votes", "3"], "--votes is for gsm8k with --cot only"),
    (["commonsense_qa", "--model_path", "x", "--cot"], "--cot is for gsm8k only"),
    (["gsm8k", "--model_path", "x", "--cot", "--samples", "2"], "without --cot only"),
    (["gsm8k", "--model_path", "x", "--sweep", "n_ahead=4"], "--sweep is for the task text only"),
    *[(["text", "--model_path", "x", "--input", "y", "--sweep", sweep], "--sweep: ")
      for sweep in ("n_ahead=2", "n_ahead", "n_passes=3", "n_ahead=4,,6", "n_ahead_talk=0", "=3")],
    (["text", "--model_path", "x", "--input", "y", "--n_ahead", "4", "--sweep", "n_ahead=5"],
     "without --n_ahead"),
    (["gsm8k", "--model_path", "no/such-model-here"], "no/such-model-here")])
def test_command_lines_that_are_refused(args, word, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and word in said and said.count("\n") == 1


def test_files_that_cannot_be_written_are_known_first(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "load_thinker", lambda *args: pytest.fail("it works already"))
    (tmp_path / "x.svg").mkdir()
    for option, file, word in (("--json", tmp_path / "none" / "x.json", "there is no folder"),
                               ("--plot", tmp_path / "x.svg", "not a plain file"),
                               ("--plot", tmp_path / "notes.txt", "ends in .svg, not ")):
        assert main(["text", "--model_path", "x", "--input", "y", option, str(file)]) == 2
        assert word in capsys.readouterr().err


def test_what_is_swept():
    config = EvaluateConfig(task="text", model_path="x", input="y", sweep="n_ahead=4,12")
    assert config.swept == [{"n_ahead": 4}, {"n_ahead": 12}]
    config = dataclasses.replace(config, sweep="n_ahead_talk=1,8", n_ahead=5)
    assert config.swept == [{"n_ahead": 5, "n_ahead_talk": 1}, {"n_ahead": 5, "n_ahead_talk": 8}]
    assert dataclasses.replace(config, sweep=None).swept == [{"n_ahead": 5}]


def test_help_is_of_this_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("python -m nanoqstar.evaluate TASK --model_path MODEL")
    assert all(f"--{f.name}" in said for f in dataclasses.fields(EvaluateConfig)[1:])


# ---- training


def test_which_tasks_an_evaluation_answers():
    assert TrainConfig().task_files == {}
    assert TrainConfig(eval_tasks="gsm8k,commonsense_qa=a=b").task_files == {
        "gsm8k": None, "commonsense_qa": "a=b"}
    for bad in ("arc", "gsm8k,gsm8k", "gsm8k=", "gsm8k,", "GSM8K"):
        with pytest.raises(InputError, match="--eval_tasks: "):
            TrainConfig(eval_tasks=bad)
    with pytest.raises(InputError, match="own thoughts"):
        TrainConfig(eval_tasks="gsm8k", thoughts_from="abc")
    with pytest.raises(InputError, match="--eval_limit is for eval_tasks only"):
        cli.settings(TrainConfig, ["--eval_limit", "3"], "")
    told = changes(TrainConfig(), TrainConfig(eval_tasks="gsm8k", eval_limit=7))
    assert len(told[0]) == 2 and not told[1]  # a resumed run may have other ones


def test_training_refuses_tasks_before_it_starts(work, tmp_path, capsys):
    """A tokenizer of letters, a file that is not there; nothing is left behind."""
    for args in (["tiny", "--eval_tasks", f"gsm8k={work / 'gsm8k.jsonl'}", "--threads", "1"],
                 ["text", "--data", str(work / "data"), *THINKING, "--eval_tasks", "gsm8k=none.x"]):
        assert script.main([*args, "--out_dir", str(tmp_path / "x")]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "x").exists()


def test_plain_training_answers_without_thoughts(work, tmp_path, capsys):
    assert script.main(["text", "--data", str(work / "data"), "--out_dir", str(tmp_path / "x"),
                        *OPTIONS, "--n_ahead", "0", "--eval_tasks",
                        f"commonsense_qa={work / 'csqa.jsonl'}"]) == 0
    rows = [json.loads(x) for x in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    found = [row["commonsense_qa"] for row in rows if row["kind"] == "eval"]
    assert len(found) == 3
    assert all(x["answer_prob"].keys() == {"base", "base_interval"} for x in found)
    assert f"commonsense_qa (n=3): answer prob {found[-1]['answer_prob']['base']:.1%}, exact " in (
        capsys.readouterr().out)


# ---- the plot


def test_a_chart_shows_every_point_where_it_is():
    drawn = ET.fromstring(chart("T < 1", "x & y", "z", ["a", "b"],
                                {"one": [(1.0, 0.5), (-1.0, 0.0)], "<two>": [(0.0, 0), (0.5, 0)]}))
    ns = "{http://www.w3.org/2000/svg}"
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in drawn.findall(f"{ns}circle")]
    assert places[0][1] < places[3][1] < places[2][1] < places[1][1]  # 1, 0.5, 0, -1
    assert places[1][1] - places[2][1] == pytest.approx(2 * (places[2][1] - places[3][1]), abs=0.2)
    words = {t.text for t in drawn.findall(f"{ns}text")}
    assert {"T < 1", "x & y", "a", "b", "one", "<two>"} <= words
    zero = next(x for x in drawn.findall(f"{ns}line") if x.get("class") == "zero")
    assert float(zero.get("y1")) == pytest.approx(places[2][1], abs=0.1)
    assert chart("t", "x", "y", ["1"], {"flat": [(0.0, 0.0)]})


@pytest.mark.parametrize(("low", "high"), [(-1.2, 3.4), (-1e-5, 1e-5), (0, 700), (-0.3, 0)])
def test_ticks_are_few_and_within(low, high):
    found = ticks(low, high, 5)
    assert 3 <= len(found) <= 9
    assert low <= found[0] and found[-1] <= high
    assert any(abs(x) < 1e-12 for x in found)


# ---- many processes


def test_two_processes_find_what_one_does(work, run, tmp_path):
    """Each scores its share, and writes its votes into the one file: the same ones, however late
    another process begins."""
    commands = [["gsm8k", "--input", str(work / "gsm8k.jsonl")],
                ["text", "--input", str(work / "data"), "--windows", "5"],
                *(["gsm8k", "--input", str(work / "gsm8k.jsonl"), "--cot", "--votes", "2",
                 "--answers", str(tmp_path / f"{name}.jsonl")] for name in ("prompt", "late"))]
    code = f"""
import time
from pathlib import Path
from nanoqstar import answers, parallel, worth
from nanoqstar.evaluate import read
answers.CHAIN_TOKENS, cast_votes, read_answers = 6, answers.cast_votes, answers.read_answers
def late(act, seconds):
    def wait(*args, **kwargs):
        time.sleep(parallel.rank() * seconds)
        return act(*args, **kwargs)
    return wait
with parallel.joined('cpu'):
    for n, command in enumerate({commands!r}):
        if n == 3:
            answers.cast_votes, answers.read_answers = late(cast_votes, 0.5), late(read_answers, 1)
        worth.run_on_all(*read([*command, '--model_path', {str(work / 'run')!r}, '--device', 'cpu',
                                '--json', {str(tmp_path)!r} + f'/{{n}}.json']))
# gloo's threads that outlive the group abort the process, one time in ten, at its end
threads = [x.read_text() for x in Path('/proc/self/task').glob('*/comm')]
assert not [x for x in threads if 'gloo' in x], threads"""
    codes = launch(2, code, tmp_path / "log", timeout=120)
    assert codes == [0, 0], (tmp_path / "log").read_text()
    one, two = ([run(*commands[0])[3]["found"]["answer_prob"],
                 *run(*commands[1])[3]["found"].values()],
                [json.loads((tmp_path / "0.json").read_text())["found"]["answer_prob"],
                 *json.loads((tmp_path / "1.json").read_text())["found"].values()])
    for a, b, keys in zip(one, two, (("base", "thoughts", "difference_interval"),
                                     ("nll_base", "nll_mixed", "gain_error"))):
        for key in keys:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-9), key
    kept = answers.read_answers(tmp_path / "late.jsonl")
    assert kept.keys() == {(i, v, t) for i in range(5) for v in range(2) for t in (False, True)}
    prompt, late = (sorted((tmp_path / f"{name}.jsonl").read_text().splitlines())
                    for name in ("prompt", "late"))
    assert prompt == late and len(late) == 1 + 20
    assert (tmp_path / "log").read_text().count("maj@2") == 2  # one process speaks
