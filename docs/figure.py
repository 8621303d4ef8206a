"""python docs/figure.py mask | curve RUN | page RUN: draws the README's three figures.

mask       docs/mask.svg, from the mask that training uses (`nanoqstar.thoughts`)
curve RUN  docs/demo.svg, from the evaluations in RUN/metrics.jsonl
page RUN   docs/report.png, what Chromium shows of RUN/report.html (python -m nanoqstar.report RUN)
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from nanoqstar import InputError, cli  # noqa: E402

WIDTH = 580  # a phone shows it at 0.6 of that: no letter below 13
KINDS = {"text": "text", "delimiter": "start, end", "sampled": "sampled thought",
         "ahead": "true tokens after it"}
LIGHT = {"card": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "grid": "#d1d9e0", "on": "#ffffff",
         "text": "#0067a5", "delimiter": "#a85400", "sampled": "#00775a", "ahead": "#98407c"}
DARK = {"card": "#0d1117", "ink": "#f0f6fc", "soft": "#9198a1", "grid": "#3d444d", "on": "#0d1117",
        "text": "#58a6ff", "delimiter": "#f0a04b", "sampled": "#3fc79a", "ahead": "#e58fc9"}
RULES = """text{font:16px sans-serif;fill:var(--ink)}
.soft{fill:var(--soft)} .small{font-size:13px} .mid{text-anchor:middle} .right{text-anchor:end}
.on{fill:var(--on)} .box{fill:none;stroke:var(--ink);stroke-width:2} .rule{stroke:var(--grid)}
.line{fill:none;stroke-width:2.5} .dash{stroke:var(--soft);stroke-dasharray:2 4}"""


def svg(height: int, title: str, body: list[str]) -> str:
    """A whole figure on a card of its own, whose colours follow the reader's light or dark mode."""
    def colours(palette):
        return ":root{" + ";".join(f"--{name}:{value}" for name, value in palette.items()) + "}"

    per_kind = "\n".join(f".{k}{{fill:var(--{k})}} .{k}-line{{stroke:var(--{k})}}" for k in KINDS)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{title}</title>", f"<style>{colours(LIGHT)}",
        f"@media (prefers-color-scheme:dark){{{colours(DARK)}}}", RULES, per_kind + "</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" style="fill:var(--card)"/>',
        *body, "</svg>\n"])


def text(x: float, y: float, words: str, classes: str = "") -> str:
    named = f' class="{classes}"' if classes else ""
    return f'<text x="{x:g}" y="{y:g}"{named}>{words}</text>'


def rect(x: float, y: float, width: float, height: float, classes: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{classes}"/>'


def line(x: float, y: float, to_x: float, to_y: float, classes: str) -> str:
    return f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" class="{classes}"/>'


def subscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


# ---- who sees whom

def tokens(layout: Any) -> list[tuple[str, str]]:
    """(kind, label) of every packed token."""
    named = []
    for position, _, offset in zip(*(x.tolist() for x in layout.packing.describe()), strict=True):
        after_end = offset - layout.n_sampled - 1
        if offset < 0:
            named.append(("text", "x" + subscript(position)))
        elif offset == 0 or after_end == 0:
            named.append(("delimiter", "end" if offset else "start"))
        elif after_end < 0:
            named.append(("sampled", "t" + subscript(offset)))
        else:
            named.append(("ahead", "x" + subscript(position + after_end)))
    return named


def mask_svg() -> str:
    """The packed row of a small window, what one of its tokens sees, and the whole mask."""
    import torch

    from nanoqstar.thoughts import ThoughtLayout, dense_mask

    layout = ThoughtLayout(n_ahead=4, n_ahead_talk=2, n_passes=2, n_positions=3)
    packing, named = layout.packing, tokens(layout)
    mask = dense_mask(packing, torch.zeros(1, layout.n_text).long())[0, 0]  # of one document
    position, pass_, offset = packing.describe()
    is_shown = (position == 1) & (pass_ == 1) & (offset == layout.n_sampled + 1)  # an end token
    shown = is_shown.nonzero().item()

    body = [text(16, 28, "One sequence: the text once, then a group of thoughts per position.")]
    x = 16.0
    for kind, meaning in KINDS.items():
        body += [rect(x, 42, 14, 14, kind), text(x + 20, 54, meaning, "soft")]
        x += 42 + 8 * len(meaning)

    def token(n, x, y, width=46.0, height=28.0):
        kind, label = named[n]
        seen = bool(mask[shown, n])
        body.append(rect(x, y, width, height, kind if seen else f"{kind}-line line"))
        body.append(text(x + width / 2, y + 19, label, "mid on" if seen else f"mid {kind}"))
        if n == shown:
            body.append(rect(x - 2.5, y - 2.5, width + 5, height + 5, "box"))

    for n in range(packing.n_text):
        token(n, 105 + 50 * n, 76)
    body.append(text(16, 95, "text"))
    for i in range(packing.n_positions):
        y, x = 118 + 42 * i, 105.0
        body.append(text(16, y + 19, f"group({i})"))
        for k in range(packing.n_group):
            token(packing.n_text + i * packing.n_group + k, x, y)
            x += 50 + 8 * (k % packing.n_branch == 0)  # a gap before each pass
    for p in range(packing.n_passes):
        body.append(text(163 + p * (50 * packing.n_branch + 8), 257, f"pass {p}", "soft"))
    body += [text(16, 286, "Filled: what the boxed end token sees. The text up to its position,"),
             text(16, 306, "its start and its own thought; no other thought and nothing later.")]

    cell, left, top = 14, 104, 388
    n = packing.n_packed
    body.append(text(16, 346, "The whole mask: a row looks, a column is seen. Boxed: that token."))
    starts = [0, *range(packing.n_text, n + 1, packing.n_group)]
    names = ["text", *(f"group({i})" for i in range(packing.n_positions))]
    for name, a, b in zip(names, starts, starts[1:]):
        body.append(text(left + (a + b) * cell / 2, top - 16, name, "mid"))
        body.append(text(left - 16, top + (a + b) * cell / 2 + 5, name, "right"))
    for k, (kind, _) in enumerate(named):
        body.append(rect(left + k * cell + 1, top - 9, cell - 2, 5, kind))
        body.append(rect(left - 9, top + k * cell + 1, 5, cell - 2, kind))
    for row, column in mask.nonzero().tolist():
        body.append(rect(left + column * cell + 1, top + row * cell + 1, cell - 2, cell - 2,
                         f"seen {named[column][0]}"))
    for k in [*starts, n]:
        body.append(line(left + k * cell, top, left + k * cell, top + n * cell, "rule"))
        body.append(line(left, top + k * cell, left + n * cell, top + k * cell, "rule"))
    body.append(rect(left - 12, top + shown * cell - 1, n * cell + 14, cell + 2, "box"))
    body.append(text(16, top + n * cell + 28,
                     f"n_ahead {layout.n_ahead}, n_ahead_talk {layout.n_ahead_talk}, n_passes "
                     f"{layout.n_passes}, {layout.n_positions} positions", "soft"))
    return svg(top + n * cell + 44, "The packed sequence and its attention mask", body)


# ---- the demo's curve

def curve_svg(records: list[dict[str, Any]]) -> str:
    """Held-out direct answers right against updates, with thoughts and without."""
    points = [(r["step"], r["answers"]["direct"]) for r in records
              if r["kind"] == "eval" and "direct" in r.get("answers", {})]
    if len(points) < 2:
        raise InputError("there are fewer than two evaluations of direct answers in this run: "
                         "draw one of python train.py")
    left, right, top, bottom = 64, 404, 52, 232

    def x(step):
        first, last = points[0][0], points[-1][0]
        return left + (right - left) * (step - first) / (last - first)

    def y(share):
        return bottom - (bottom - top) * share

    body = [text(16, 28, "Held-out direct answers right, over updates of thinking")]
    for percent in (0, 50, 100):
        body += [line(left, y(percent / 100), right, y(percent / 100), "rule"),
                 text(left - 8, y(percent / 100) + 5, f"{percent}%", "soft right")]
    body += [text(x(step), bottom + 22, f"{step}", "soft mid") for step, _ in points]
    for kind, key, name in (("sampled", "accuracy_mixed", "with thoughts"),
                            ("text", "accuracy_base", "without")):
        last = points[-1][1][key]
        path = " ".join(f"{x(step):.1f},{y(a[key]):.1f}" for step, a in points)
        body += [f'<polyline points="{path}" class="line {kind}-line"/>',
                 *(f'<circle cx="{x(step):.1f}" cy="{y(a[key]):.1f}" r="4" class="{kind}"/>'
                   for step, a in points),
                 text(right + 12, y(last) + 5, f"{last:.0%} {name}", kind)]
    body += [line(left, y(1 / 7), right, y(1 / 7), "dash"),
             text(right - 4, y(1 / 7) - 7, "chance: one letter of seven", "soft right small")]
    return svg(266, "Accuracy on held-out direct answers against updates", body)


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl. Raises InputError."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(entry) for entry in lines]
    except (OSError, ValueError):
        raise InputError(f"{run} has no whole metrics.jsonl: give the folder of a finished "
                         "python train.py") from None


# ---- the report's page

def photograph(page: Path, picture: Path, size: tuple[int, int] = (1280, 900),
               place: str = "") -> None:
    """What Chromium shows of a page at an id's place; in a frame, since its own window is never
    narrower than 500 pixels and is drawn from the top."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise InputError("there is no chromium to look at the page with: install it")
    with tempfile.TemporaryDirectory() as folder:
        frame, (width, height) = Path(folder, "frame.html"), size
        url = html.escape(page.resolve().as_uri() + place)
        frame.write_text(f'<body style="margin:0"><iframe src="{url}" style="display:block;border:0'
                         f';width:{width}px;height:{height}px"></iframe>')
        subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                        f"--user-data-dir={folder}/profile", f"--screenshot={picture}",
                        f"--window-size={max(500, width)},{height}", frame.as_uri()],
                       check=True, capture_output=True, timeout=120)


def page_png(run: Path) -> None:
    """The report with what one token's thoughts did: the first whose colour is full."""
    page = run / "report.html"
    if not page.is_file():
        raise InputError(f"{page} is missing: python -m nanoqstar.report {run}")
    token = re.search(r'class="t g" style="--a:1.00" id="(t\d+)"', page.read_text(encoding="utf-8"))
    photograph(page, HERE / "report.png", place=f"#{token[1]}" if token else "")


def main(args: list[str]) -> int:
    try:
        if args == ["mask"]:
            (HERE / "mask.svg").write_text(mask_svg(), encoding="utf-8")
        elif len(args) == 2 and args[0] == "curve":
            drawn = curve_svg(evaluations(Path(args[1])))
            (HERE / "demo.svg").write_text(drawn, encoding="utf-8")
        elif len(args) == 2 and args[0] == "page":
            page_png(Path(args[1]))
        else:
            raise InputError(f"say what to draw\n\n{__doc__}")
    except InputError as error:
        return cli.fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
