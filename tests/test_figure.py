"""The README's figures say what the code does and what was measured."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from nanoqstar.thoughts import ThoughtLayout, dense_mask

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("figure", ROOT / "docs" / "figure.py")
figure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figure)


def evaluation(step, base, mixed):
    direct = {"accuracy_base": base, "accuracy_mixed": mixed}
    return {"kind": "eval", "step": step, "answers": {"direct": direct}}


def test_the_committed_mask_is_the_one_the_code_has():
    assert (ROOT / "docs" / "mask.svg").read_text(encoding="utf-8") == figure.mask_svg()


def test_every_visible_pair_is_a_filled_cell():
    layout = ThoughtLayout(n_ahead=4, n_ahead_talk=2, n_passes=2, n_positions=3)
    mask = dense_mask(layout.packing, torch.zeros(1, 5).long())[0, 0]
    cells = re.findall(r'<rect x="(\d+)" y="(\d+)" width="12" height="12" class="seen (\w+)"/>',
                       figure.mask_svg())
    at = sorted(((int(y) - 389) // 14, (int(x) - 105) // 14) for x, y, _ in cells)
    assert at == [tuple(pair) for pair in mask.nonzero().tolist()]
    kinds = {column: kind for (_, column), kind in zip(
        (((int(y) - 389) // 14, (int(x) - 105) // 14) for x, y, _ in cells), (c[2] for c in cells))}
    group = ["delimiter", "sampled", "sampled", "delimiter", "ahead", "sampled", "sampled",
             "delimiter", "ahead"]
    assert [kinds[k] for k in range(31)] == ["text"] * 4 + group * 3


def test_the_boxed_end_token_sees_its_prefix_and_its_own_thought():
    """Filled tokens of the packed row: x_0 x_1, the start, t_1 t_2 and the end of pass 1."""
    filled = re.findall(r'height="28" class="(\w+)"/>\n<text[^>]*class="mid on">(\w+)<',
                        figure.mask_svg())
    assert filled == [("text", "x₀"), ("text", "x₁"), ("delimiter", "start"), ("sampled", "t₁"),
                      ("sampled", "t₂"), ("delimiter", "end")]


def test_the_curve_passes_through_the_measured_points():
    drawn = figure.curve_svg([evaluation(0, 0.0, 0.5), {"kind": "train", "step": 3},
                              evaluation(10, 1.0, 1.0), evaluation(20, 0.25, 1.0)])
    assert re.findall(r'<polyline points="(.*?)" class="line (\w+)-line"/>', drawn) == [
        ("64.0,142.0 234.0,52.0 404.0,52.0", "sampled"),
        ("64.0,232.0 234.0,52.0 404.0,187.0", "text")]
    assert re.findall(r">(\d+% with\w*)", drawn) == ["100% with", "25% without"]


def test_the_curve_of_a_run_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(figure, "HERE", tmp_path)
    records = [evaluation(0, 0.1, 0.1), evaluation(40, 0.2, 0.8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert figure.main(["curve", str(tmp_path)]) == 0
    assert (tmp_path / "demo.svg").read_text(encoding="utf-8") == figure.curve_svg(records)


@pytest.mark.parametrize(("metrics", "sentence"), [
    (None, "no whole metrics.jsonl"), ("{", "no whole metrics.jsonl"),
    (json.dumps(evaluation(0, 0, 0)), "fewer than two evaluations")])
def test_a_run_without_a_curve_is_one_sentence(tmp_path, monkeypatch, capsys, metrics, sentence):
    monkeypatch.setattr(figure, "HERE", tmp_path)
    if metrics:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    assert figure.main(["curve", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "demo.svg").exists()


def test_the_page_is_photographed_at_its_first_full_colour(tmp_path, monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(figure, "photograph", lambda *args, **place: taken.append((args, place)))
    assert figure.main(["page", str(tmp_path)]) == 2
    assert f"report.html is missing: python -m nanoqstar.report {tmp_path}" in (
        capsys.readouterr().err)
    (tmp_path / "report.html").write_text(
        '<i class="t y" style="--a:1.00" id="t3"></i><i class="t g" style="--a:1.00" id="t7"></i>')
    assert figure.main(["page", str(tmp_path)]) == 0
    assert taken == [((tmp_path / "report.html", ROOT / "docs" / "report.png"), {"place": "#t7"})]


def test_the_picture_is_small_enough_to_show():
    picture = (ROOT / "docs" / "report.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) < 300_000


def test_curve_and_table_of_the_readme_are_of_one_run():
    base, mixed = re.search(r"direct answers right.*?\(.*?\) +([\d.]+)% +([\d.]+)%",
                            (ROOT / "README.md").read_text(encoding="utf-8")).groups()
    drawn = re.findall(r">(\d+)% (with thoughts|without)<",
                       (ROOT / "docs" / "demo.svg").read_text(encoding="utf-8"))
    assert drawn == [(f"{float(mixed):.0f}", "with thoughts"), (f"{float(base):.0f}", "without")]


def test_relative_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        written = page.read_text(encoding="utf-8")
        for link in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', written):
            target, _, anchor = "".join(link).partition("#")
            if "://" in target:
                continue
            found = page if not target else page.parent / target
            assert found.exists(), f"{page.name}: {target}"
            if anchor:
                heads = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in
                         re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.M)]
                assert anchor in heads, f"{page.name}: #{anchor}"


def test_tests_that_the_pages_name_exist():
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("*.py")]
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
            found = any(f"def {name}(" in source for source in sources)
            assert found, f"{page.name}: {name}"
