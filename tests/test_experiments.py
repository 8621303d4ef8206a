"""Tables over seeds: every run once, bases shared, options that apply, intervals by hand."""

import dataclasses
import io
import json
import os
from typing import get_args, get_type_hints

import pytest

import train
from configs import PRESETS
from nanoqstar import cli, experiments
from nanoqstar.files import LOCK, lock


def option(command, name):
    """The value of --name=value in a command, or None."""
    return dict(o[2:].split("=", 1) for o in command if o.startswith("--")).get(name)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Stands in for train.py: reads every command and writes what a finished run leaves."""
    commands = []
    monkeypatch.chdir(tmp_path)

    def run(command, **_):
        commands.append(command)
        assert command[1].endswith("train.py")
        _, cfg = train.read(command[2:])  # refuses what does not apply
        folder = tmp_path / cfg.out_dir
        assert not folder.exists() or not [*folder.iterdir()], "a run needs an empty folder"
        if cfg.model_path is None and cfg.pretrain_steps:
            (folder / "base").mkdir(parents=True)
        folder.mkdir(parents=True, exist_ok=True)
        direct = {"n": 10, "accuracy_base": 0.1, "accuracy_mixed": 0.9 + 0.01 * cfg.seed,
                  "nll_mixed": 0.5}
        answers = {"direct": direct, "thoughts": {"worked": 0.8, "useful": 0.1}}
        records = [{"kind": "eval", "nll_base": 1.0, "nll_mixed": 0.9, "gain": 0.1,
                    "answers": answers}, {"kind": "end"}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    monkeypatch.setattr(experiments.subprocess, "run", run)
    monkeypatch.setattr(experiments.interventions, "measure", lambda run: {
        "answers": 70.0, "problems": 60.0, "votes": 0.5 + 0.01 * int(run.name[-1])})
    return commands


def call(*args):
    return experiments.main([*args, "--jobs", "1"] if "--" not in args else list(args))


def test_the_help_names_every_table(capsys):
    names = get_args(get_type_hints(experiments.TableConfig)["name"])
    assert names == tuple(experiments.TABLES)
    assert experiments.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in names) and "--seeds" in printed


def test_every_row_runs_once_on_its_seeds_base(runs, capsys):
    assert call("controls", "--seeds", "3") == 0
    printed = capsys.readouterr().out
    assert len(runs) == 3 * len(experiments.CONTROLS) and "| thoughts, policy on | 3 |" in printed
    assert "91.0 ± 2.5" in printed  # 90, 91, 92: mean 91, t(2) 4.30 x 1 / sqrt(3) = 2.48
    assert printed.endswith("| votes | 3 | 51.0 ± 2.5 |\n\nDirect answers, of so many different "
                            "problems: 70 of 60, 70 of 60, 70 of 60\n")
    main, others = runs[:3], runs[3:]
    assert [option(c, "seed") for c in main] == ["0", "1", "2"]
    assert all(option(c, "model_path") is None for c in main)
    for command in others:
        base = f"out/experiments/tiny/main/seed-{option(command, 'seed')}/base"
        assert option(command, "model_path") == base
    fixed = next(c for c in others if option(c, "thoughts_from") == "\n")
    assert option(fixed, "policy_weight") == "0.0"
    assert call("controls", "--seeds", "3") == 0
    assert len(runs) == 3 * len(experiments.CONTROLS)  # nothing is repeated


@pytest.mark.parametrize("table", experiments.TABLES)
def test_every_row_is_a_command_that_train_py_takes(runs, table):
    """From a base or without, and all that a row asks for is what the run gets."""
    args = ["--data", "a folder"] if table == "text" else []
    assert call(table, "--seeds", "1", *args) == 0
    rows, preset = experiments.TABLES[table]
    assert len(runs) == len(rows) and all(command[2] == preset for command in runs)
    folders = {option(c, "out_dir") for c in runs}
    assert len(folders) == len(rows)
    for command in runs:
        _, cfg = train.read(command[2:])
        assert cfg.data == ("a folder" if args else "fold") and cfg.seed == 0
        assert cfg.eval_every == (1_000_000 if "/main/" not in cfg.out_dir
                                  else PRESETS[preset].config.eval_every)


def test_rows_share_the_base_of_their_own_text(runs):
    """Which the row makes that has no other settings, wherever in the table it stands."""
    assert call("rarity", "--seeds", "2") == 0
    made = [c for c in runs if option(c, "model_path") is None]
    assert [option(c, "fold_worked_frac") for c in made] == [None, "0.03", "0.01"] * 2
    assert [option(c, "pretrain_steps") for c in made] == [None, "1800", "6000"] * 2
    for command in (c for c in runs if c not in made):
        share, seed = (option(command, name) for name in ("fold_worked_frac", "seed"))
        maker = next(c for c in made if option(c, "seed") == seed
                     and option(c, "fold_worked_frac") == share)
        assert option(command, "model_path") == option(maker, "out_dir") + "/base"
        assert option(command, "pretrain_steps") is None


def test_the_row_that_rereads_is_the_demo():
    preset = PRESETS[experiments.TABLES["rarity"][1]].config
    row = experiments.RARITY["10% worked lines, re-reading"].split()
    assert cli.settings(type(preset), row, "", base=preset) == PRESETS["tiny"].config


def test_given_thoughts_need_no_other_base(runs):
    assert call("given", "--seeds", "1") == 0
    made = [c for c in runs if option(c, "model_path") is None]
    assert [option(c, "out_dir") for c in made] == [
        "out/experiments/tiny_learned/fold_worked_frac-0/seed-0"]
    assert {option(c, "fold_thoughts") for c in runs} == {None, "30", "100", "300", "1000"}


def test_overrides_go_to_the_rows_they_apply_to(runs):
    """A new model's sizes to those that make one, a thought's settings to those that think."""
    assert call("learned", "--seeds", "1", "--", "--hidden_size", "48", "--n_passes", "4",
                "--start_init_text", "a\\n", "--fold_tokens", "5000", "--max_steps", "40",
                "--threads", "2") == 0
    main, *others = runs
    assert option(main, "hidden_size") == "48" and option(main, "start_init_text") == "a\n"
    for command in others:
        thinks = option(command, "n_ahead") is None
        assert option(command, "model_path") and option(command, "hidden_size") is None
        assert option(command, "n_passes") == ("4" if thinks else None)
        if "start_init_text" not in option(command, "out_dir"):  # a row's own wins
            assert (option(command, "start_init_text") == "a\n") == thinks
        assert option(command, "fold_tokens") == "5000" and option(command, "threads") == "2"


def test_a_rows_own_settings_win(runs):
    assert call("recipe", "--seeds", "1", "--", "--n_passes", "3") == 0
    passes = [option(c, "n_passes") for c in runs]
    assert passes.count("4") == 1 and passes.count("3") == len(runs) - 1


def test_an_interrupted_run_starts_over_and_overrides_have_their_own_folder(runs, tmp_path):
    call("controls", "--seeds", "1")
    n, folder = len(runs), tmp_path / "out/experiments/tiny/main/seed-0"
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0])
    call("controls", "--seeds", "1")
    assert len(runs) == n + 1 and (folder / "metrics.jsonl").exists()
    call("controls", "--seeds", "1", "--", "--max_steps", "40")
    assert len(runs) == 2 * n + 1
    assert all(option(c, "max_steps") for c in runs[n + 1:])


def test_a_finished_run_of_other_settings_is_no_result(runs, tmp_path, capsys):
    """As where the preset has changed since, or somebody else's run lies there."""
    call("controls", "--seeds", "1")
    n, saved = len(runs), tmp_path / "out/experiments/tiny/main/seed-0/config.json"
    whole = saved.read_text()
    settings = json.loads(whole)
    for text, sentence in (
            (json.dumps(settings | {"max_steps": 170}), "(max_steps 170 -> 200): remove it"),
            (json.dumps(settings | {"of_old": 1}), "unknown key 'of_old'"),
            ("{", "cannot be read")):
        saved.write_text(text)
        capsys.readouterr()
        assert call("controls", "--seeds", "1") == 2
        output = capsys.readouterr()
        assert sentence in output.out and "1 runs failed" in output.err
        assert "| thoughts, policy on |" not in output.out
    saved.write_text(whole)
    assert call("controls", "--seeds", "1") == 0 and len(runs) == n


def test_a_finished_table_is_itself_wherever_it_is_printed(runs, tmp_path, monkeypatch):
    """With a GPU or without, after its bases are gone, or where another table has made one."""
    overrides = ["--seeds", "1", "--", "--pretrain_steps", "20", "--hidden_size", "48"]
    assert call("questions", *overrides) == 0  # pretrains its own, as no base is there
    assert call("controls", *overrides) == 0
    n = len(runs)
    assert call("questions", *overrides) == 0 and call("controls", *overrides) == 0
    [base] = tmp_path.glob("out/experiments/tiny-*/main/seed-0/base")
    base.rmdir()
    monkeypatch.setattr(experiments.torch.cuda, "is_available", lambda: True)
    assert call("controls", *overrides) == 0 and len(runs) == n


def test_nothing_begins_at_a_base_of_other_settings(runs, tmp_path, capsys):
    assert call("controls", "--seeds", "1") == 0
    n, folder = len(runs), tmp_path / "out/experiments/tiny"
    saved = folder / "main/seed-0/config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"hidden_size": 48}))
    (folder / "n_ahead-0/seed-0/metrics.jsonl").unlink()
    assert call("controls", "--seeds", "1") == 2 and len(runs) == n
    output = capsys.readouterr()
    assert "n_ahead-0/seed-0: not run, as the run of its base, " in output.out
    assert "error: 2 runs failed, or are of other settings" in output.err


def test_runs_of_other_settings_are_not_measured(runs, tmp_path, capsys):
    assert call("controls", "--seeds", "3") == 0
    saved = tmp_path / "out/experiments/tiny/main/seed-0/config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"start_init_text": "\x1b[2J\n"}))
    capsys.readouterr()
    assert call("controls", "--seeds", "3") == 2
    output = capsys.readouterr().out
    assert "(start_init_text \ufffd[2J -> (): remove it" in output
    assert "| votes | 2 | 51.0 / 52.0 |" in output


def test_as_many_updates_as_another_preset_had_are_other_settings(runs, tmp_path, capsys):
    """At a constant rate, too, where a resumed run may have more of them."""
    assert call("text", "--seeds", "1", "--data", "a folder") == 0
    [saved] = tmp_path.glob("out/experiments/text-*/main/seed-0/config.json")
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"max_steps": 400}))
    assert call("text", "--seeds", "1", "--data", "a folder") == 2
    assert "(max_steps 400 -> 300): remove it" in capsys.readouterr().out


@pytest.mark.parametrize("row", ["[]", "5", "{}", '{"kind": 5}', "[" * 10**5, "\xff", None])
@pytest.mark.parametrize("place", [0, -1])
def test_a_log_that_is_damaged_is_of_no_finished_run(runs, tmp_path, row, place):
    call("controls", "--seeds", "1")
    n, metrics = len(runs), tmp_path / "out/experiments/tiny/main/seed-0/metrics.jsonl"
    rows = metrics.read_text().splitlines()
    rows[place] = row or rows[place].replace("nll_base", "nll").replace("end", "ned")
    metrics.write_bytes("\n".join(rows).encode("latin1"))
    assert call("controls", "--seeds", "1") == 0
    assert len(runs) == n + 1
    os.truncate(metrics, 2**40)
    assert experiments.finished(metrics.parent) is None


def test_a_run_that_is_still_going_on_is_left_alone(runs, tmp_path, capsys):
    """As when the table was killed and its run was not."""
    folder = tmp_path / "out/experiments/tiny/main/seed-0"
    with lock(folder):
        (folder / "metrics.jsonl").write_text("")
        assert call("controls", "--seeds", "1") == 2
        assert {p.name for p in folder.iterdir()} == {LOCK, "metrics.jsonl"}
    output = capsys.readouterr()
    assert "another process is writing" in output.out and "1 runs failed" in output.err
    assert all("/main/" not in option(c, "out_dir") for c in runs)
    assert call("controls", "--seeds", "1") == 0


def test_two_tables_at_once_in_one_folder_are_refused(runs, tmp_path, capsys):
    with lock(tmp_path / "out/experiments/tiny"):
        assert call("controls", "--seeds", "1") == 2
    assert "another process is writing out/experiments/tiny" in capsys.readouterr().err
    assert not runs


def test_rows_with_a_text_of_their_own_pretrain_their_own_base(runs):
    call("questions", "--seeds", "1")
    own = [c for c in runs if option(c, "fold_operands") or option(c, "fold_worked_frac")]
    assert len(own) == 2 and all(option(c, "model_path") is None for c in own)


def test_failed_runs_are_said(runs, monkeypatch, capsys):
    monkeypatch.setattr(experiments.subprocess, "run", lambda *a, **k: None)
    assert call("controls", "--seeds", "1") == 2
    output = capsys.readouterr()
    assert "failed, see" in output.out and "error: 9 runs failed" in output.err


def test_matched_flops_by_hand(runs):
    """Packed tokens x 6 and rollout tokens x 2 of a thinking window, over 62 x 6 of a plain one."""
    packed, rollout = 63 + 62 * (1 + 2 * (4 + 2)), 63 + 62 + 62 * 2 * 3
    steps = round(40 * (packed * 6 + rollout * 2) / (62 * 6))
    call("learned", "--seeds", "1", "--", "--max_steps", "40")
    asked = [option(c, "max_steps") for c in runs]
    assert asked.count("40") == 10 and asked.count(str(steps)) == 1


@pytest.mark.parametrize(("args", "sentence"), [
    ([], "name must be given"),
    (["contorls"], "no experiment 'contorls'; did you mean controls?; there are controls, lea"),
    (["detph"], "did you mean depth?"),
    (["controls", "--seeds", "0"], "--seeds: must be at least 1"),
    (["controls", "--seeds", "11"], "--seeds: must be at most 10"),
    (["text"], "the table text needs --data FOLDER"),
    (["controls", "--data", "x"], "--data is for the table text only"),
    (["controls", "--", "--n_ahed", "3"], "did you mean --n_ahead?"),
    (["controls", "--", "--seed", "3"], "--seed is set by the table"),
    (["controls", "--", "--out_dir", "x"], "--out_dir is set by the table"),
    (["controls", "--", "--plan"], "--plan is set by the table"),
    (["controls", "--", "--resume", "auto"], "--resume is set by the table"),
    (["controls", "--", "--n_ahead", "0"], "the row 'policy weight 0: NLL terms only' does not go"),
    (["controls", "--", "--tokenizer", "x"], "--tokenizer is for model_path only"),
    (["paper", "--preset", "tiny", "--", "--plan"], "--plan is set by the experiment"),
    (["paper", "--preset", "tiny", "--", "--push", "a/b"], "--push is set by the experiment"),
    (["paper", "--preset", "tiny", "--", "--trainable", "thoughts"], "only the whole model can"),
    (["paper", "--preset", "tiny", "--gsm8k", "none.jsonl"], "none.jsonl cannot be read"),
])
def test_bad_arguments_are_refused_before_anything_runs(runs, tmp_path, capsys, args, sentence):
    assert experiments.main(args) == 2
    output = capsys.readouterr().err
    assert sentence in output and output.startswith("error: ") and output.count("\n") == 1
    assert not runs and not [*tmp_path.iterdir()]


def test_a_name_that_cannot_be_shown_is_refused_without_stderr(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)  # closed by whoever started this
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert experiments.main(["d\u00e9pth"]) == 2
