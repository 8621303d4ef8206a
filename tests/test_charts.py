"""Charts: what lies where, what is escaped, and odd data."""

import re

import pytest

from nanoqstar.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Axes,
    Line,
    bars,
    clean,
    histogram,
    lines,
    rounded,
    scatter,
    signed,
    ticks,
)


def test_nothing_of_a_text_is_markup_or_hidden():
    assert clean("<script>alert('1')</script> & \"x\"") == (
        "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt; &amp; &quot;x&quot;")
    assert clean("a\nb\x00\u202e\ud800é") == "a\\nb\\x00\\u202e\\ud800é"
    assert clean("x" * 2000, 3) == "xxx .."


@pytest.mark.parametrize(("x", "said"), [(0.1234, "+0.12"), (-0.1234, "−0.12"), (-0.001, "+0.00")])
def test_signs(x, said):
    assert signed(x, 2) == said


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 160, [0, 50, 100, 150]), (-1.2, 3.1, [-1, 0, 1, 2, 3]),
    (1.0381, 1.2391, [1.05, 1.1, 1.15, 1.2]), (0, 3e-20, [0, 1e-20, 2e-20, 3e-20]),
    (998, 1002, [998, 999, 1000, 1001, 1002])])
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high, 4) == pytest.approx(expected, rel=1e-9, abs=0)


def test_numbers_of_an_axis_are_short():
    assert [rounded(x) for x in (0, -0.02, 1400, 20000, 1.5e8)] == [
        "0", "−0.02", "1,400", "20k", "150M"]


def test_axes_end_at_the_margins():
    axes = Axes([3, 11], [0, 4])
    assert (axes.x(3), axes.x(11)) == (LEFT, WIDTH - RIGHT)
    assert axes.y(0) == HEIGHT - BOTTOM and TOP < axes.y(4) < TOP + 12 < axes.y(2)
    one = Axes([5], [2.0])  # a single point
    assert LEFT < one.x(5) < WIDTH - RIGHT and TOP < one.y(2.0) < HEIGHT - BOTTOM
    assert Axes([0, 1], [0, 0]).y(0) == HEIGHT - BOTTOM


def test_a_line_passes_through_its_points_and_says_them():
    line = Line("held-out", "mixed", [(0, 0.0), (40, 2.0)], [0.5, 1.0])
    drawn, axes = lines("Gain", "nats", [line, Line("none", "train", [])]), Axes([0, 40], [-0.5, 3])
    path = f"M{axes.x(0):g} {axes.y(0):g} {axes.x(40):g} {axes.y(2):g}"
    assert f'class="line mixed" d="{path}"' in drawn
    assert f"M{axes.x(0):g} {axes.y(0.5):g} {axes.x(40):g} {axes.y(3):g}" in drawn  # the band
    assert 'aria-label="Gain, nats: held-out 0 at update 0, 2.00 at update 40"' in drawn
    assert drawn.count("<circle") == 2 and "none" not in drawn
    assert lines("Gain", "nats", [Line("a", "base", [])]) == ""


def test_many_points_are_thinned_to_means():
    line = Line("training", "train", [(n, float(n % 2)) for n in range(10 * MOST_POINTS)])
    assert len(line.thinned()) == MOST_POINTS
    assert line.thinned()[0] == (4.5, 0.5)


def test_bars_by_sign_with_whiskers():
    drawn, axes = bars("G", "nats", [1.0, -0.5], [0.25, None]), Axes([0, 2], [0, 1.25, 0.75, -0.5])
    rects = re.findall(r'class="(\w+)" x="[^"]+" y="([^"]+)" width="[^"]+" height="([^"]+)"', drawn)
    assert [kind for kind, _, _ in rects] == ["gain", "loss"]
    assert float(rects[0][1]) == axes.y(1) and float(rects[1][1]) == axes.y(0)
    assert float(rects[0][2]) == pytest.approx(axes.y(0) - axes.y(1), abs=0.11)
    assert drawn.count("whisker") == 1 and f"{axes.y(0.75):g}V{axes.y(1.25):g}" in drawn


def test_histogram_counts_everything_once():
    values = [-1.0] * 3 + [0.0] * 50 + [1.0] * 7 + [9.0]
    drawn = histogram("Gains", "tokens", values)
    counts = re.findall(r'class="(\w+)" x="[^"]+" y="[^"]+" width="[^"]+" height="[^"]+">'
                        r"<title>([\d,]+)<", drawn)
    assert counts == [("loss", "3"), ("middle", "50"), ("gain", "8")]
    assert "13% of 61 gains are above zero" in drawn
    assert histogram("Gains", "tokens", [0.0]).count("<title>1<") == 1


def test_points_by_sign():
    drawn = scatter("G", "nats", [(1, 0.5), (2, -1.0), (3, 0.0)], [(2, -0.1)])
    dots = {kind: path.count("h0") for kind, path in
            re.findall(r'class="dots (\w+)" d="([^"]*)"', drawn)}
    assert dots == {"gain": 1, "loss": 2}
