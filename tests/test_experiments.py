"""Tables over seeds: every run once, bases shared, intervals by hand."""

import json

import pytest

from nanoqstar import experiments


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Stands in for train.py: notes every command and writes what a finished run leaves."""
    commands = []
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)

    def run(command, **_):
        commands.append(command)
        out, seed = (command[command.index(o) + 1] for o in ("--out_dir", "--seed"))
        folder = tmp_path / out
        (folder / "base").mkdir(parents=True)
        direct = {"n": 10, "accuracy_base": 0.1, "accuracy_mixed": 0.9 + 0.01 * int(seed), "nll_mixed": 0.5}
        answers = {"direct": direct, "thoughts": {"worked": 0.8, "useful": 0.1}}
        records = [{"kind": "eval", "nll_base": 1.0, "nll_mixed": 0.9, "gain": 0.1, "answers": answers},
                   {"kind": "end"}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr(experiments.subprocess, "run", run)
    return commands


def test_every_row_runs_once_on_its_seeds_base(runs, capsys, tmp_path):
    experiments.main(["controls", "--seeds", "3", "--jobs", "1"])
    printed = capsys.readouterr().out
    assert len(runs) == 3 * len(experiments.CONTROLS) and "| thoughts, policy on | 3 |" in printed
    assert "91.0 ± 2.5" in printed  # 90, 91, 92: mean 91, t(2) 4.30 x 1 / sqrt(3) = 2.48
    main, others = runs[:3], runs[3:]
    assert all("--model_path" not in c for c in main)
    for command in others:
        base = command[command.index("--model_path") + 1]
        assert base == f"out/experiments/tiny/main/seed-{command[command.index('--seed') + 1]}/base"
    fixed = next(c for c in others if "--thoughts_from" in c and "\\n" in c)
    assert fixed[fixed.index("--policy_weight") + 1] == "0"
    experiments.main(["controls", "--seeds", "3", "--jobs", "1"])
    assert len(runs) == 3 * len(experiments.CONTROLS)  # nothing is repeated


def test_an_interrupted_run_starts_over_and_overrides_have_their_own_folder(runs, tmp_path):
    experiments.main(["controls", "--seeds", "1", "--jobs", "1"])
    n = len(runs)
    metrics = tmp_path / "out/experiments/tiny/main/seed-0/metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0])
    experiments.main(["controls", "--seeds", "1", "--jobs", "1"])
    assert len(runs) == n + 1
    experiments.main(["controls", "--seeds", "1", "--jobs", "1", "--", "--max_steps", "40"])
    assert len(runs) == 2 * n + 1 and all(c[c.index("--max_steps") + 1] for c in runs[n + 1:])


def test_rows_with_a_text_of_their_own_pretrain_their_own_base(runs):
    experiments.main(["questions", "--seeds", "1", "--jobs", "1"])
    own = [c for c in runs if any(o.startswith(("--fold_", "--pretrain_")) for o in c)]
    assert own and all("--model_path" not in c for c in own)


def test_failed_runs_are_said(runs, monkeypatch, capsys):
    monkeypatch.setattr(experiments.subprocess, "run", lambda *a, **k: None)
    with pytest.raises(SystemExit, match="7 runs failed"):
        experiments.main(["controls", "--seeds", "1", "--jobs", "1"])
    assert "failed, see" in capsys.readouterr().out


def test_text_needs_data(runs):
    with pytest.raises(SystemExit):
        experiments.main(["text"])
    experiments.main(["text", "--seeds", "2", "--jobs", "1", "--data", "somewhere"])
    assert all(c[c.index("--data") + 1] == "somewhere" for c in runs) and len(runs) == 6


def test_matched_flops_by_hand(runs):
    """Packed tokens x 6 and rollout tokens x 2 of a thinking window, over 62 x 6 of a plain one."""
    packed, rollout = 63 + 62 * (1 + 2 * (4 + 2)), 63 + 62 + 62 * 2 * 3
    steps = round(40 * (packed * 6 + rollout * 2) / (62 * 6))
    experiments.main(["controls", "--seeds", "1", "--jobs", "1", "--", "--max_steps", "40"])
    last = [c[len(c) - 1 - c[::-1].index("--max_steps") + 1] for c in runs]
    assert last.count("40") == 6 and last.count(str(steps)) == 1


@pytest.mark.parametrize("args", [["controls", "--seeds", "0"], ["controls", "--seeds", "11"],
                                  ["controls", "--", "--n_ahed", "3"]])
def test_bad_arguments_are_refused(runs, args):
    with pytest.raises(SystemExit, match="2"):
        experiments.main(args)
    assert not runs
