"""A chart of lines with error bars, as an SVG that stands alone and follows light and dark mode."""

from collections.abc import Mapping, Sequence
from html import escape

from nanoqstar.charts import ticks

Point = tuple[float, float]  # a value, and half of its interval
WIDTH, AREA, LEFT, RIGHT, BOTTOM = 580, 250, 66, 20, 56
LIGHT = ("#0067a5", "#a85400", "#00775a", "#98407c", "#59636e", "#1f2328")
DARK = ("#58a6ff", "#f0a04b", "#3fc79a", "#e58fc9", "#9198a1", "#f0f6fc")
MARKS = ("", "8 4", "2 3", "10 3 2 3", "5 5", "1 4")  # dashes: colours alone do not tell lines
STYLE = """svg{background:var(--card)} text{font:14px sans-serif;fill:var(--ink)}
.mid{text-anchor:middle} .end{text-anchor:end} .grid{stroke:var(--grid)} .zero{stroke:var(--ink)}
path,.bar{fill:none;stroke-width:2}"""


def chart(title: str, x_label: str, y_label: str, names: Sequence[str],
          lines: Mapping[str, Sequence[Point]]) -> str:
    """One line for each name in `lines`, its points above the `names` on the x axis."""
    top = 44 + 20 * -(-len(lines) // 2)  # the legend has two columns
    height = top + AREA + BOTTOM
    ends = [y + s * e for points in lines.values() for y, e in points for s in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    pad = 0.05 * (high - low) or 1e-3
    low, high = low - pad, high + pad

    def x(n: float) -> float:
        return LEFT + (n + 0.5) * (WIDTH - LEFT - RIGHT) / len(names)

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * AREA

    def palette(colours: Sequence[str], card: str, grid: str) -> str:
        own = "".join(f"--c{n}:{c};" for n, c in enumerate(colours))
        return f":root{{{own}--card:{card};--ink:{colours[-1]};--grid:{grid}}}"

    body, marks = [], ticks(low, high, 5)
    for value in marks:
        kind = "zero" if value == 0 else "grid"
        body += [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
                 f'class="{kind}"/>',
                 f'<text x="{LEFT - 8}" y="{y(value) + 5:.1f}" class="end">{value:g}</text>']
    body += [f'<text x="{x(n):.1f}" y="{height - 34}" class="mid">{escape(name)}</text>'
             for n, name in enumerate(names)]
    for n, (name, points) in enumerate(lines.items()):
        colour, shift = f"var(--c{n % len(LIGHT)})", (n - (len(lines) - 1) / 2) * 5
        at = [(x(i) + shift, y(value), y(value - e), y(value + e))
              for i, (value, e) in enumerate(points)]
        path = "M" + " L".join(f"{a:.1f} {b:.1f}" for a, b, _, _ in at)
        body += [f'<path d="{path}" style="stroke:{colour}" '
                 f'stroke-dasharray="{MARKS[n % len(MARKS)]}"/>',
                 *(f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{lo:.1f}" y2="{hi:.1f}" class="bar" '
                   f'style="stroke:{colour}"/><circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" '
                   f'style="fill:{colour}"/>' for a, b, lo, hi in at)]
        left, middle = LEFT + n % 2 * (WIDTH - LEFT) / 2, 42 + n // 2 * 20
        body += [f'<line x1="{left:g}" x2="{left + 28:g}" y1="{middle}" y2="{middle}" class="bar" '
                 f'style="stroke:{colour}" stroke-dasharray="{MARKS[n % len(MARKS)]}"/>',
                 f'<text x="{left + 34:g}" y="{middle + 5}">{escape(name)}</text>']
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{palette(LIGHT, '#ffffff', '#d1d9e0')}",
        f"@media (prefers-color-scheme:dark){{{palette(DARK, '#0d1117', '#3d444d')}}}",
        f"{STYLE}</style>",
        f'<text x="{WIDTH / 2}" y="22" class="mid">{escape(title)}</text>', *body,
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 10}" class="mid">{escape(x_label)}'
        '</text>',
        f'<text transform="translate(16 {top + AREA / 2}) rotate(-90)" class="mid">'
        f"{escape(y_label)}</text>", "</svg>\n"])
