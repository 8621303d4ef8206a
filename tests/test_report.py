"""The report's page: what it is made of, what it does without, and how Chromium shows it."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from configs import TrainConfig
from data import prepare
from data.writer import write_dataset
from nanoqstar import hf, report
from nanoqstar.heatmap import look
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import Qwen2, Qwen2Config

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`&\u202e"
TEXT = ("The cat <script>alert(1)</script> sat on a mat & ate 3 € of fish 🙂.\n\n\tThen it "
        "slept, \"well\", as cats do: " + "very_long_name_without_a_space" * 4 + " é ü 中文.\n")


def evaluation(step, gain, thought, target="c"):
    example = {"context": f"bc=(edbc)f\nfedd={EVIL}"[-40:], "thought": thought, "target": target,
               "p_base": 0.09, "p_mixed": 0.09 + gain}
    return {"kind": "eval", "step": step, "nll_base": 1.25, "nll_mixed": 1.25 - gain, "gain": gain,
            "gain_stderr": 0.01, "gain_hardest": 3 * gain, "gain_by_decile": [gain] * 10,
            "reward": gain, "mix": 0.1, "entropy": 1.5, "distinct": 0.25, "examples": [example]}


def update(step, kind="think"):
    return {"kind": kind, "step": step, "nll_base": 1.3, "reward": 0.1, "mix": 0.2, "entropy": 1.0,
            "distinct": 0.5, "seconds": 0.1, "tokens_per_second": 1e6 + step * 31250.5}


ROWS = [*(update(n, "pretrain") for n in range(0, 10**6 + 1, 10**5)),
        evaluation(0, 0.0, "fedd"), *map(update, (10, 20)),
        evaluation(20, 0.4, EVIL), *map(update, (30, 40)),
        evaluation(40, 0.375, "fedc"), {"kind": "end", "step": 40, "seconds": 12.0}]


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, text=TEXT):
    """A run's folder as train.py leaves it, of a random model and a tokenizer of its own."""
    folder.mkdir()
    tokenizer = prepare.train_tokenizer(300, [TEXT] * 3)
    ids = np.array(tokenizer.encode(text * 9, add_special_tokens=False).ids, dtype=np.uint16)
    write_dataset(folder / "data", tokenizer.to_str(), tokenizer.get_vocab_size(), None,
                  {"train": [ids], "val": [ids, ids[:200]]}, {"corpus": EVIL})
    config = TrainConfig(n_ahead=5, n_ahead_talk=2, max_length=40, eval_windows=6, max_steps=40,
                         start_init_text=EVIL.replace("\u202e", ""), seed=3)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    shape = Qwen2Config(vocab_size=tokenizer.get_vocab_size(), hidden_size=24, intermediate_size=40,
                        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        head_dim=6, max_position_embeddings=256)
    model, generator = QuietStar(Qwen2(shape)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    hf.save(folder / "checkpoint", model, tokenizer, thinking=hf.Thinking(5, 2), step=40,
            config=dataclasses.asdict(config), source=None)
    write_rows(folder, ROWS)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a hostile name, its report made."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "<b>run & 'co' \u202e")
    assert report.main([str(folder), "--tokens", "200"]) == 0
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """Of that run, to be damaged; its name is harmless."""
    return shutil.copytree(run, tmp_path / "copy")


def page_of(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element's name and attributes; whether all that is opened is closed."""

    VOID = ("meta", "link", "br", "wbr")

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open = set(), set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open += [tag] * (tag not in self.VOID)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def text_of(page):
    return html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", "", page, flags=re.DOTALL))


# ---- the page


def test_the_page_is_whole_harmless_and_alone(run):
    page = page_of(run)
    elements = Elements(page)
    assert elements.open == []
    assert elements.tags == {
        "html", "head", "meta", "title", "link", "style", "body", "header", "h1", "p", "b", "nav",
        "a", "main", "section", "h2", "div", "span", "i", "wbr", "br", "aside", "figure",
        "figcaption", "svg", "path", "text", "rect", "circle", "table", "thead", "tbody", "tr",
        "th", "td", "details", "summary", "footer"}
    assert not {name for name in elements.attributes if name.startswith("on")} | (
        {"src", "srcdoc", "action"} & elements.attributes)
    assert set(re.findall(r'href="([^"]*)"', page)) == {
        "data:,", "#after", "#thoughts", "#story", "#worth", "#curves"}
    assert "://" not in page and "url(" not in page and "@import" not in page
    assert "\u202e" not in page
    said = text_of(page)
    for where in ("<b>run & 'co' \\u202e", "update 40 after 12 s"):
        assert where in said, where
    assert said.count("<script>alert(1)</script>") == 2  # the story, the settings
    assert re.search(r'aria-describedby="d\d+">(<i>·</i>)?&lt;', page)  # a token of the text


def test_every_figure_has_its_place(run):
    page, said = page_of(run), text_of(page_of(run))
    assert "takes held-out NLL from 1.250 to 0.875: a gain of +0.375 ± 0.020 nats" in said
    titles = re.findall(r"<figcaption><b>(.*?)</b>", page)
    assert titles == [
        "Gain by decile of base NLL", "Gains", "Gain against base NLL", "NLL", "Gain",
        "Gain on the hardest tenth", "Reward", "Mixing weight", "Entropy of thoughts",
        "Distinct thoughts", "Speed", "NLL of pre-training"]
    assert page.count('role="img" aria-label="') == 1 + len(titles)
    assert page.count('class="whisker"') == 10
    assert "without thoughts 1.25 at update 0, 1.25 at update 40" in page
    n = int(re.search(r"Held-out text of the run, ([\d,]+) tokens in 5 windows", said)[1])
    assert 190 <= n <= 200
    assert page.count('role="tooltip"') == len(re.findall(r'id="d\d+"', page)) <= n
    assert page.count('class="w"') == n  # of tokens that make a character together, one each
    assert re.search(r"<i>↵</i><br>(<i>↵</i><br><i>→</i>)?", page)  # where a line ends
    assert "🙂" in re.findall(r'aria-describedby="d\d+">(?:<i>·</i>)?(.)', page)


def test_the_story_goes_from_first_to_last(run):
    story = page_of(run).split('<section id="story"')[1].split("</section>")[0]
    rows = [[text_of(cell) for cell in re.findall(r"<td.*?</td>", row)]
            for row in re.findall(r"<tr>(<td.*?)</tr>", story)]
    said = EVIL.replace(" ", "·").replace("\u202e", "\\u202e")
    assert rows == [["0", "fedd", "", "9.0% → 9.0%"], ["20", said, "", "9.0% → 49%"],
                    ["40", "fedc", "", "9.0% → 46%"]]
    assert story.count('class="new"') == 2


def test_a_long_story_is_told_in_twelve_evaluations(copy):
    write_rows(copy, [evaluation(n, 0.1, f"t{n}") for n in range(101)])
    assert report.main([str(copy), "--tokens", "1"]) == 0
    steps = [int(n) for n in re.findall(r"<tr><td>(\d+)</td>", page_of(copy))]
    assert len(steps) == 12 and steps[0] == 0 and steps[-1] == 100 and steps == sorted(steps)


def test_it_is_deterministic_and_follows_the_seed(copy, capsys):
    before = page_of(copy).replace("&lt;b&gt;run &amp; &#x27;co&#x27; \\u202e", "copy")
    pages = []
    for seed in (3, 4):  # 3 is the run's
        out, options = copy / f"{seed}.html", ["--tokens", "200", "--seed", str(seed)]
        assert report.main([str(copy), *options, "--out", str(out)]) == 0
        pages.append(out.read_text(encoding="utf-8"))
    assert pages[0] == before != pages[1]
    size = (copy / "4.html").stat().st_size
    assert f"{copy / '4.html'}: {size / 1e3:,.0f} kB, " in capsys.readouterr().out


def test_the_thoughts_shown_are_those_of_the_evaluation(run):
    """Of as many windows as asked for, evenly over the evaluation's, whole or their beginnings."""
    made = TrainConfig(**json.loads((run / "config.json").read_text()))
    seen = look(run, made, 130, 5, torch.device("cpu"))
    places = [0, 2, 4]  # three of six
    assert len(seen.windows) == 3 and seen.step == 40 and len(seen.scores.text) == 6
    for window, i in zip(seen.windows, places):
        assert window.ids == seen.scores.text[i, :41].tolist()
        assert window.thoughts[0] == seen.scores.thoughts[i].tolist()
        for ours, theirs in ((window.base_lp, seen.scores.base_lp[i]),
                             (window.mixed_lp[0], seen.scores.mixed_lp[i])):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    short = look(run, made, 7, 5, torch.device("cpu")).windows
    assert [w.ids for w in short] == [seen.windows[0].ids[:8]]


# ---- what it does without


def made(folder, capsys, *args):
    """The page of a run as it is now, as text."""
    assert report.main([str(folder), "--tokens", "40", *args]) == 0
    page = page_of(folder)
    assert Elements(page).open == []
    return text_of(page), capsys.readouterr().err


def test_a_run_that_is_going_on(copy, capsys):
    """Half a row is being written, nothing is saved yet, and there was one evaluation."""
    shutil.rmtree(copy / "checkpoint")
    write_rows(copy, ROWS[10:14])
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"kind": "think", "st')
    said, err = made(copy, capsys)
    assert "at update 20 of 40 and without an end: it goes on, or ended early" in said
    assert "has saved nothing yet" in said and "has saved nothing yet" in err
    assert "Gain by decile" in said and "How its thoughts changed" in said


def test_a_run_in_pre_training(copy, capsys):
    shutil.rmtree(copy / "checkpoint")
    write_rows(copy, [ROWS[0], update(10, "pretrain")])
    said, _ = made(copy, capsys)
    assert "at update 10 of pre-training of 600 and without an end" in said
    assert "Nothing has been evaluated yet" in said and "NLL of pre-training" in said
    write_rows(copy, [])
    assert "has logged nothing yet" in made(copy, capsys)[0]


def test_a_plain_run_has_base_curves_only(copy, capsys):
    config = json.loads((copy / "config.json").read_text()) | {"n_ahead": 0}
    (copy / "config.json").write_text(json.dumps(config))
    plain = {"nll_base": 1.5, "nll_mixed": 1.5, "gain": 0.0, "kind": "eval", "examples": []}
    write_rows(copy, [plain | {"step": 0}, {"kind": "text", "step": 10, "nll_base": 1.4,
                      "tokens_per_second": 9.0}, plain | {"step": 10}])
    said, err = made(copy, capsys)
    assert "No thoughts (n_ahead 0)" in said and "1.500" in said and not err
    assert re.findall(r"<figcaption><b>(.*?)</b>", page_of(copy)) == ["NLL", "Speed"]
    assert "tooltip" not in page_of(copy)


def test_a_run_of_before_has_no_story(copy, capsys):
    write_rows(copy, [{k: v for k, v in row.items() if k != "examples"} for row in ROWS])
    said, _ = made(copy, capsys)
    assert "How its thoughts changed" not in said and "What it thought" in said


@pytest.mark.parametrize(("harm", "why"), [
    (lambda run: shutil.rmtree(run / "data"), "there is no prepared data in"),
    (lambda run: (run / "config.json").unlink(), "config.json is missing"),
    (lambda run: (run / "config.json").write_text('{"n_ahed": 4}'), "unknown key 'n_ahed'"),
    (lambda run: (run / "checkpoint" / "quietstar.safetensors").unlink(), "is missing"),
    (lambda run: (run / "checkpoint" / "tokenizer.json").write_text(
        prepare.train_tokenizer(290, [TEXT]).to_str()), "are not those of the run")])
def test_without_its_model_or_data_the_rest_is_shown(copy, capsys, monkeypatch, harm, why):
    monkeypatch.chdir(copy)
    harm(copy)
    said, err = made(copy, capsys)
    assert "Its thoughts on text are not shown" in said
    assert why in said and why in err and "How its thoughts changed" in said


@pytest.mark.parametrize("row", [
    {"kind": "eval", "step": 1, "examples": [1, {"context": 2}, None], "gain_by_decile": "x"},
    {"kind": "eval", "step": 1, "nll_base": float("nan"), "nll_mixed": float("inf"), "gain": None},
    {"kind": "eval", "step": 1, "reward": 1e308, "gain_by_decile": [None], "answers": []},
    {"kind": "eval", "step": 2**60}, {"kind": ["eval"], "step": 1}, [], 5, {"step": True},
    {"kind": "eval", "step": 1, "examples": [{"context": "\ud800", "thought": "", "target": "",
                                             "p_base": "x", "p_mixed": 9e99}]},
    {"kind": "end", "step": 1, "seconds": []}])
def test_rows_of_anything(copy, capsys, row):
    shutil.rmtree(copy / "checkpoint")
    for rows in ([row], [*ROWS[:-1], row]):
        write_rows(copy, rows)
        assert made(copy, capsys)[0]


def test_wrong_input_is_one_sentence(copy, capsys):
    (copy / "folder.html").mkdir()
    for args, sentence in (
            ([str(copy / "data")], "holds no metrics.jsonl: give the folder of a run"),
            ([str(copy), "--out", str(copy / "no" / "x.html")], "there is no folder"),
            ([str(copy), "--out", str(copy / "config.json")], "is no name of a page"),
            ([str(copy), "--out", str(copy / "folder.html")], "is not a plain file"),
            ([], "run must be given"), ([str(copy), "--tokens", "0"], "must be at least 1")):
        assert report.main(args) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


# ---- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """
const seen = {};
for (const frame of document.querySelectorAll("iframe")) {
  const view = frame.contentWindow, page = frame.contentDocument, width = view.innerWidth;
  const all = (what, from = page) => [...from.querySelectorAll(what)];
  const box = e => e.getBoundingClientRect(), style = e => view.getComputedStyle(e);
  const shown = () => all(".d").filter(e => style(e).display != "none");
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
    && a.top < b.bottom - 3 && b.top < a.bottom - 3;
  const crossed = svg => all("text", svg).map(box).filter(b => b.width).some((a, i, boxes) =>
    boxes.slice(i + 1).some(b => meet(a, b)));
  const clipped = e => box(e).left < box(e.closest("svg")).left - 1
    || box(e).right > box(e.closest("svg")).right + 1;
  const colour = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v =>  // as WCAG has it
    v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((sum, v, i) =>
    sum + v * [.2126, .7152, .0722][i], 0);
  const ground = e => e === page.body || colour(style(e).backgroundColor)[3] !== 0
    ? e : ground(e.parentElement);
  const contrast = e => {
    const both = [style(e).color, style(ground(e)).backgroundColor].map(c => light(colour(c)));
    return (Math.max(...both) + .05) / (Math.min(...both) + .05);
  };
  const token = all(".heat .t")[30], at = {
    width, scroll: page.documentElement.scrollWidth, scripts: page.scripts.length,
    out: all("body *").filter(e => box(e).width && box(e).right > width + 1).length,
    clipped: all("svg text").filter(clipped).map(e => e.textContent),
    crossed: all("svg").filter(crossed).length,
    contrast: Math.min(...all("p, h1, h2, th, td, .key, figcaption span, footer, summary")
      .map(contrast)),
    background: style(page.body).backgroundColor, closed: shown().length};
  token.focus();
  at.open = shown().map(e => e.parentElement === token);
  at.tip = shown().map(e => [box(e).left >= 0, box(e).right <= width, box(e).top >= 0,
    box(e).bottom <= view.innerHeight + 1, e.scrollWidth <= e.clientWidth,
    !meet(box(e), box(token))]);
  at.words = shown().map(e => e.innerText);
  token.blur();
  at.after = shown().length;
  seen[frame.id] = at;
}
document.body.innerHTML = "<pre></pre>";
document.body.firstChild.textContent = JSON.stringify(seen);
"""


def look_at(page, tmp_path, *options):
    """What is measured of the page, unchanged, in frames as wide as a phone and as a desk."""
    frames = "".join(f'<iframe id="w{width}" srcdoc="{html.escape(page)}" style="width:{width}px;'
                     f'height:{height}px"></iframe>' for width, height in ((390, 844), (1440, 900)))
    (tmp_path / "frames.html").write_text(
        f'<!doctype html><meta charset="utf-8"><body>{frames}'
        f"<script>onload = () => {{{MEASURE}}}</script>", encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", *options,
         (tmp_path / "frames.html").as_uri()], capture_output=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", done.stdout.decode(), re.S)[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_in_a_browser(run, tmp_path, mode):
    """Nothing overflows or lies over something else, a token's details open on focus inside the
    window and beside the token, and all can be read in both modes."""
    dark = ["--force-dark-mode"] if mode == "dark" else []
    for width, at in look_at(page_of(run), tmp_path, *dark).items():
        assert f"w{at['width']}" == width
        assert at["scroll"] <= at["width"] and at["out"] == 0
        assert at["clipped"] == [] and at["crossed"] == 0
        assert at["scripts"] == 0
        assert (at["closed"], at["open"], at["after"]) == (0, [True], 0)
        assert all(at["tip"][0]), at["tip"]
        for word in ("thought", "gain", "reward", "weight", "without", "with thoughts", "→"):
            assert word in at["words"][0]
        assert at["contrast"] >= 4.5
        shade = sum(map(int, re.findall(r"\d+", at["background"])[:3])) / 3
        assert (shade < 60) == (mode == "dark")
