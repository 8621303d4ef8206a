"""Charts as inline SVG for a page that sets their colours: lines, bars, a histogram, points.

Classes: base, mixed, train (lines); gain, loss, middle (above, below, about zero); axis, rule,
band, whisker, dots, bound.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 360, 190  # of a chart, about a pixel a unit
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 12, 26  # margins, for the axes' numbers
MOST_POINTS = 200  # of a line, a point every other pixel

Point = tuple[float, float]


def clean(text: object, longest: int = 1000) -> str:
    """As HTML, harmless within an element or an attribute; what no font shows (controls, changes of
    direction, halves of characters) as Python writes it."""
    said = str(text)
    said = said if len(said) <= longest else said[:longest] + " .."
    return html.escape("".join(c if c.isprintable() else repr(c)[1:-1] for c in said))


def signed(x: float, digits: int = 3) -> str:
    said = f"{round(x, digits) + 0.0:+.{digits}f}"  # no -0.00
    return said.replace("-", "\u2212")  # a minus as wide as the plus


def number(x: float) -> str:
    """Three digits that matter."""
    said = f"{x:,.0f}" if abs(x) >= 100 else f"{x:#.3g}" if x else "0"
    return said.replace("-", "\u2212")


def rounded(x: float) -> str:
    """A round number, short enough for an axis."""
    size, unit = next(((s, u) for s, u in ((1e6, "M"), (1e3, "k")) if abs(x) >= 10 * s), (1, ""))
    return f"{x / size:,g}{unit}".replace("-", "\u2212")


def ticks(low: float, high: float, n: int) -> list[float]:
    """About n round numbers from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / n))
    step *= next(m for m in (1, 2, 5, 10) if high - low <= 1.25 * n * step * m)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


class Axes:
    """Maps values onto a chart and draws what they are read against."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        (self.left, self.right), (low, high) = ((min(v), max(v)) for v in (xs, ys))
        if self.left == self.right:
            self.left, self.right = self.left - 1, self.right + 1
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        self.low, self.high = low - room * (low != 0), high + room * (high != 0 or low == 0)

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

    def path(self, points: Sequence[Point]) -> str:
        return "M" + " ".join(f"{self.x(x):g} {self.y(y):g}" for x, y in points)

    def drawn(self, below: str = "", whole: bool = False,
              x_ticks: Sequence[tuple[float, str]] | None = None,
              y_ticks: Sequence[tuple[float, str]] | None = None) -> str:
        """below: what the horizontal axis is. whole: it has integers only. ticks: (value, name)."""
        body, bottom, end = [], HEIGHT - BOTTOM, WIDTH - RIGHT
        if y_ticks is None:
            y_ticks = [(t, rounded(t)) for t in ticks(self.low, self.high, 4)]
        if x_ticks is None:
            x_ticks = [(t, rounded(t)) for t in ticks(self.left, self.right, 4)
                       if not whole or t == round(t)]
        for t, name in y_ticks:
            y = self.y(t)
            body.append(f'<path class="{"axis" if t == 0 else "rule"}" d="M{LEFT} {y:g}H{end}"/>'
                        f'<text class="end" x="{LEFT - 6}" y="{y + 4:g}">{name}</text>')
        if below and x_ticks:  # its name stands before the first number
            name = f"{below} {x_ticks[0][1]}"
            x = max(0, self.x(x_ticks[0][0]) + 4 - 6.5 * len(name))
            body.append(f'<text x="{x:g}" y="{bottom + 17}">{name}</text>')
        for t, name in x_ticks[bool(below):]:
            x = min(self.x(t), WIDTH - 3.6 * len(name))
            body.append(f'<text class="mid" x="{x:g}" y="{bottom + 17}">{name}</text>')
        return "".join(body)


def figure(title: str, unit: str, alt: str, body: str, keys: Sequence[tuple[str, str]] = ()) -> str:
    """A card with a chart. alt: the chart in words. keys: (class, name) of its lines."""
    legend = "".join(f'<span class="key {kind}">{name}</span>' for kind, name in keys)
    return (f'<figure class="card"><figcaption><b>{title}</b> <span>{unit}</span>'
            f'<p class="keys">{legend}</p></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'role="img" aria-label="{clean(f"{title}, {unit}: {alt}")}">{body}</svg></figure>\n')


@dataclass
class Line:
    name: str
    kind: str  # its class
    points: Sequence[Point]
    spread: Sequence[float] = field(default_factory=list)  # to each side of every point, if known

    def thinned(self) -> list[Point]:
        """Means of neighbours, where there are more points than can be told apart."""
        n = -(-len(self.points) // MOST_POINTS)
        parts = [self.points[i:i + n] for i in range(0, len(self.points), n or 1)]
        return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def lines(title: str, unit: str, series: Sequence[Line]) -> str:
    """Lines over updates, dots where they are few; '' where there is not a point."""
    series = [line for line in series if line.points]
    if not series:
        return ""
    bands = [[(x, y + side * s) for (x, y), s in zip(line.points, line.spread)]
             for line in series for side in (1, -1)]
    every = [p for points in (*(line.points for line in series), *bands) for p in points]
    axes, body, said = Axes([x for x, _ in every], [y for _, y in every]), [], []
    for line, upper, lower in zip(series, bands[::2], bands[1::2]):
        points, (first, last) = line.thinned(), (line.points[0], line.points[-1])
        if upper:
            body.append(f'<path class="band {line.kind}" d="{axes.path(upper + lower[::-1])}Z"/>')
        body.append(f'<path class="line {line.kind}" d="{axes.path(points)}"/>')
        if line.kind != "train" and len(points) <= 40:
            body += [f'<circle class="{line.kind}" cx="{axes.x(x):g}" cy="{axes.y(y):g}" r="3">'
                     f"<title>update {x:g}: {number(y)}</title></circle>" for x, y in points]
        said.append(f"{line.name} {number(first[1])} at update {first[0]:g}, {number(last[1])} at "
                    f"update {last[0]:g}")
    keys = [(line.kind, f"{line.name} <b>{number(line.points[-1][1])}</b>") for line in series]
    return figure(title, unit, "; ".join(said), axes.drawn("update", whole=True) + "".join(body),
                  keys)


def bars(title: str, unit: str, values: Sequence[float], spreads: Sequence[float | None]) -> str:
    """A bar a tenth, easy to hard, with its interval."""
    ends = [v + side * (s or 0) for v, s in zip(values, spreads) for side in (1, -1)]
    axes, body = Axes([0, len(values)], [0, *ends]), []
    for n, (value, spread) in enumerate(zip(values, spreads)):
        x, top, zero = axes.x(n + 0.16), axes.y(max(value, 0)), axes.y(min(value, 0))
        about = f" ± {number(spread)}" if spread else ""
        body.append(f'<rect class="{"gain" if value >= 0 else "loss"}" x="{x:g}" y="{top:g}" '
                    f'width="{axes.x(n + 0.84) - x:.1f}" height="{max(0.5, zero - top):.1f}">'
                    f"<title>{n + 1}: {signed(value)}{about}</title></rect>")
        if spread:
            body.append(f'<path class="whisker" d="M{axes.x(n + 0.5):g} {axes.y(value - spread):g}V'
                        f'{axes.y(value + spread):g}"/>')
    named = [(n + 0.5, f"{n + 1}") for n in range(len(values))]
    alt = "easy to hard " + " ".join(signed(v) for v in values)
    return figure(title, unit, alt, axes.drawn(x_ticks=named) + "".join(body))


def histogram(title: str, unit: str, values: Sequence[float], n_bins: int = 41) -> str:
    """Counts on a logarithmic scale; what lies beyond the 99.5th percentile counts at the ends."""
    limit = sorted(map(abs, values))[int(0.995 * (len(values) - 1))] or 1e-3
    counts = [0] * n_bins
    for v in values:
        counts[round((min(max(v / limit, -1), 1) + 1) / 2 * (n_bins - 1))] += 1
    one = 0.15  # height of a single one, which has no logarithm to show
    heights = [math.log10(c) + one if c else 0.0 for c in counts]
    axes, width = Axes([-limit, limit], [0, *heights]), (WIDTH - LEFT - RIGHT) / n_bins
    body = [axes.drawn(x_ticks=[(t, rounded(t)) for t in ticks(-limit, limit, 4)],
                       y_ticks=[(power + one, f"{10**power:,}")
                                for power in range(int(max(heights)) + 1)])]
    for n, (count, height) in enumerate(zip(counts, heights)):
        kind = "middle" if n == n_bins // 2 else "gain" if n > n_bins // 2 else "loss"
        if count:
            body.append(f'<rect class="{kind}" x="{LEFT + n * width + 0.5:.1f}" '
                        f'y="{axes.y(height):g}" width="{width - 1:.1f}" '
                        f'height="{axes.y(0) - axes.y(height):.1f}"><title>{count:,}</title>'
                        "</rect>")
    above = sum(v > 0 for v in values) / len(values)
    alt = f"{above:.0%} of {len(values):,} gains are above zero, the largest {max(values):.2f}"
    return figure(title, unit, alt, "".join(body))


def scatter(title: str, unit: str, points: Sequence[Point], middle: Sequence[Point]) -> str:
    """Points by sign, and the line of their means (`middle`)."""
    axes = Axes([0, *(x for x, _ in points)], [y for _, y in points] + [0])
    body = [axes.drawn("NLL")]
    reach = min(axes.right, axes.high)
    if reach > 0.1 * axes.right:
        body.append(f'<path class="bound" d="{axes.path([(0, 0), (reach, reach)])}"/>')
    for kind, chosen in (("gain", [p for p in points if p[1] > 0]),
                         ("loss", [p for p in points if p[1] <= 0])):
        dots = "".join(f"M{axes.x(x):g} {axes.y(y):g}h0" for x, y in chosen)
        body.append(f'<path class="dots {kind}" d="{dots}"/>')
    body.append(f'<path class="line base" d="{axes.path(middle)}"/>')
    alt = "means by tenth: " + ", ".join(f"{signed(y)} at {x:.2f}" for x, y in middle)
    return figure(title, unit, alt, "".join(body), [("base", "mean of each tenth")])
