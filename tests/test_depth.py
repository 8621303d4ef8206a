"""The depth law's map: its runs, its tables, and a picture whose border is where it should be."""

import dataclasses
import json
import re
from xml.etree import ElementTree

import pytest

import train
from nanoqstar import depth, experiments
from nanoqstar.plot import DARK, LIGHT

SVG = "{http://www.w3.org/2000/svg}"


def right(operands, n_ahead, seed):
    """What a stand-in scores: all where the thought holds the steps, else one in four."""
    return 0.99 - 0.02 * seed if n_ahead - 2 >= operands else 0.25


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Stands in for train.py: (folder, settings) of every run."""
    ran = []
    monkeypatch.chdir(tmp_path)

    def run(command, **_):
        _, cfg = train.read(command[2:])  # refuses what does not apply
        folder = tmp_path / cfg.out_dir
        folder.mkdir(parents=True, exist_ok=True)
        if cfg.model_path is None:
            assert cfg.max_steps == 1
            (folder / "base").mkdir()
        else:
            assert (tmp_path / cfg.model_path).is_dir(), "the base comes first"
        ran.append((folder, cfg))
        answers = {"by_operands": {str(n): {"direct": {
            "n": 100 + n, "accuracy_mixed": right(n, cfg.n_ahead, cfg.seed)}}
            for n in depth.OPERANDS}, "direct": {
                "accuracy_base": 0, "accuracy_mixed": 0, "nll_mixed": 0}, "thoughts": {
                    "worked": 0, "useful": 0}}
        records = [{"kind": "eval", "nll_base": 1.0, "nll_mixed": 0.9, "gain": 0.1,
                    "answers": answers}, {"kind": "end"}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    monkeypatch.setattr(experiments.subprocess, "run", run)
    return ran


def rows(printed):
    """{(layers, operands): cells} of the printed tables."""
    tables = re.split(r"\nlayers: (\d)\n", printed)[1:]
    return {(int(n), int(cells[0])): cells for n, table in zip(tables[::2], tables[1::2])
            for cells in ([c.strip() for c in line.strip("|").split("|")]
                          for line in table.splitlines() if re.match(r"\| \d", line))}


def test_one_command_makes_the_map(runs, tmp_path, capsys):
    assert experiments.main(["depth", "--seeds", "2", "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert len(runs) == 2 * 3 * (1 + 8 + 2)
    assert {cfg.fold_shortest for _, cfg in runs} == {2}
    bases = [cfg for _, cfg in runs if cfg.model_path is None]
    assert sorted((cfg.seed, cfg.n_layers) for cfg in bases) == [
        (seed, n) for seed in (0, 1) for n in (1, 2, 4)]
    for folder, cfg in runs:  # each from the base of its own depth and seed
        if cfg.model_path:
            assert (folder.parent / "base" / "base").samefile(tmp_path / cfg.model_path)
    def cost(s):  # of an update, in plain ones: tokens x 6 to learn, x 2 to sample
        return (6 * (95 + 94 * (1 + 2 * (s + 2))) + 2 * (95 + 94 + 94 * 2 * (s - 1))) / (6 * 94)
    matched = round(80 * cost(8))
    lengths = {(cfg.n_ahead - 2, cfg.max_steps) for _, cfg in runs}
    assert {(-2, 1), (-2, matched), (-2, 4 * matched), (8, 80)} <= lengths and len(lengths) == 11
    assert all(abs(steps * cost(s) / matched - 1) < 0.01 for s, steps in lengths if s > 0)
    found = rows(printed)
    assert found.keys() == {(n, k) for n in (1, 2, 4) for k in range(2, 9)}
    assert found[2, 3] == ["3", "103", *["25"] * 3, *["25"] * 2, *["98"] * 6]  # 99 and 97
    assert experiments.main(["depth", "--seeds", "2", "--jobs", "1"]) == 0
    assert len(runs) == 66  # nothing is repeated
    assert experiments.main(["depth", "--jobs", "1", "--", "--max_steps", "40"]) == 0
    assert len(runs) == 66 + 33 and runs[-1][1].max_steps == 4 * round(matched / 2)


def test_the_border_is_drawn_where_thoughts_begin_to_hold_the_steps(runs, tmp_path):
    assert experiments.main(["depth", "--jobs", "1"]) == 0
    tree = ElementTree.fromstring((tmp_path / "out/experiments/depth/map.svg").read_text())
    panels = tree.findall(f"{SVG}g")
    assert len(panels) == 3
    assert [p.find(f"{SVG}text").text for p in panels] == ["1 layer", "2 layers", "4 layers"]
    for panel in panels:
        cells = {(int(r.get("x")), int(r.get("y"))): float(r.get("fill-opacity"))
                 for r in panel.findall(f"{SVG}rect")}
        assert len(cells) == 7 * 10
        x, y = map(int, re.match(r"M(\d+) (\d+)", panel.find(f"{SVG}path").get("d")).groups())
        border = {}
        for across, down in re.findall(r"H(\d+) V(\d+)", panel.find(f"{SVG}path").get("d")):
            border[y], y = int(across), int(down)
        assert x == border[min(border)]
        for (left, top), shade in cells.items():  # dark to its right, pale to its left
            assert (shade > 0.9) == (left >= border[top]), (left, top, shade)
    numbers = [t.text for p in panels for t in p.findall(f"{SVG}text") if t.text.isdigit()]
    assert numbers.count("99") == 3 * (7 + 6 + 5 + 4 + 3 + 2 + 1)
    assert numbers.count("25") == 3 * 7 * 10 - numbers.count("99")


def test_the_picture_is_legible_in_light_and_dark_mode():
    text = depth.picture({2: {(n, c): 0.5 for n in depth.OPERANDS for c in depth.COLUMNS[1:]}})
    assert text.index(LIGHT[0]) < text.index("prefers-color-scheme:dark") < text.index(DARK[0])
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_lengths_that_few_windows_do_not_show_leave_gaps(runs, tmp_path, capsys):
    assert experiments.main(["depth", "--jobs", "1"]) == 0
    for folder, _ in runs:
        text = (folder / "metrics.jsonl").read_text().splitlines()
        evaluation = json.loads(text[0])
        del evaluation["answers"]["by_operands"]["5"]["direct"]
        (folder / "metrics.jsonl").write_text(f"{json.dumps(evaluation)}\n{text[1]}")
    capsys.readouterr()
    assert experiments.main(["depth", "--jobs", "1"]) == 0
    found = rows(capsys.readouterr().out)
    assert found[2, 5] == ["5", "0", *[""] * 11] and found[2, 4][:3] == ["4", "104", "25"]


def test_failed_runs_leave_gaps_and_are_said(runs, monkeypatch, capsys):
    run = experiments.subprocess.run

    def some(command, **more):
        if "--n_ahead=5" not in command:
            run(command, **more)
    monkeypatch.setattr(experiments.subprocess, "run", some)
    assert experiments.main(["depth", "--jobs", "1"]) == 2
    output = capsys.readouterr()
    assert "error: 3 runs failed" in output.err
    assert rows(output.out)[4, 4][7] == "" and rows(output.out)[4, 4][8] == "99"


def test_nothing_begins_at_a_base_of_other_settings(runs, tmp_path, capsys):
    base = tmp_path / "out/experiments/depth/seed-0/layers-2/base"
    assert experiments.main(["depth", "--jobs", "1"]) == 0
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"hidden_size": 48}))
    (base.parent / "3/metrics.jsonl").unlink()
    assert experiments.main(["depth", "--jobs", "1"]) == 2
    output = capsys.readouterr()
    assert len(runs) == 33 and "hidden_size 48 -> 96" in output.out
    assert "error: 11 runs failed, or are of other settings" in output.err


@pytest.mark.parametrize(("args", "sentence"), [
    (["--seeds", "0"], "--seeds: must be at least 1"),
    (["--", "--n_ahed", "3"], "did you mean --n_ahead?"),
    (["--", "--out_dir", "x"], "--out_dir is set by the table"),
    *[(["--", f"--{name}", "3"], f"--{name} is set by the table")  # else not heard, or no map
      for name in ("n_layers", "n_ahead", "model_path", "fold_shortest", "fold_operands")],
    (["--", "--fold_family", "sum"], "--fold_family is"),
])
def test_bad_arguments_are_refused_before_anything_runs(runs, capsys, args, sentence):
    assert experiments.main(["depth", *args]) == 2
    assert sentence in capsys.readouterr().err and not runs
