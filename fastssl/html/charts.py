"""Line charts, bars and scatter plots as inline SVG.

Everything inside is placed in percent and text has a fixed size, so one drawing fits a phone, a wide screen and paper.
What is drawn is data alone; how it looks (colours for light and dark, widths) is `page.STYLE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fastssl.html.page import NUM_COLOURS, Html, element, number

MOST_POINTS = 1000  # of a line: more than a screen is wide
MOST_BARS = 32  # with a name each

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """Points (x, y) joined in order; where y is not finite there is a gap."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    note: str = ""  # in place of the value


@dataclass(frozen=True)
class Marked:
    """What else a line chart shows: `at`, an upright line with a short name at each x; `spans`, shaded (from, to)."""

    at: Mapping[float, str] = field(default_factory=dict)
    spans: Sequence[tuple[float, float]] = ()


def line_chart(
    title: object,
    lines: Sequence[Line],
    *,
    x_name: str,
    y_format: Format | None = None,
    from_zero: bool = False,
    wide: bool = False,
    dots: bool = False,
    marked: Marked | None = None,
) -> Html:
    """A figure with `title` above it; lines are named where there are several. `from_zero`: the y axis begins there.
    The x axis begins at 0. A value that is not finite is a gap, a lone point a dot."""
    marked = marked or Marked()
    finite = [(x, y) for line in lines for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    if not finite:
        return element("figure", element("figcaption", title, element("span", ": no value to show", class_="quiet")))
    ys = [y for _, y in finite] + [0.0] * from_zero
    y_ticks = ticks(min(ys), max(ys))
    low, high = y_ticks[0], y_ticks[-1]
    left = min(0.0, *(x for x, _ in finite))
    right = max(x for x, _ in finite)
    right = right if right > left else left + 1

    def across(x: float) -> float:
        return 100 * (x - left) / (right - left)

    def down(y: float) -> float:
        return 100 * (high - y) / (high - low)

    grid = [
        element("line", x1="0", x2="100%", y1=_pc(down(y)), y2=_pc(down(y)), class_="grid zero" if y == 0 else "grid")
        for y in y_ticks
    ]
    spans = [
        element("rect", x=_pc(across(a)), width=_pc(max(0.4, across(b) - across(a))), height="100%", class_="span")
        for a, b in marked.spans
    ]
    marks = [
        element("line", x1=_pc(across(x)), x2=_pc(across(x)), y1="0", y2="100%", class_="mark") for x in marked.at
    ] + [
        element("text", text, x=_pc(across(x)), y="0", dy="-3", class_="mark-name",
                text_anchor="end" if across(x) > 75 else "start")
        for x, text in marked.at.items()
    ]  # fmt: skip
    paths, points = [], []
    for line in lines:
        runs = _runs(*thinned(line.xs, line.ys))
        d = " ".join("M" + " ".join(f"{10 * across(x):.4g} {10 * down(y):.4g}" for x, y in run) for run in runs)
        paths.append(element("path", d=d, class_=_look(line)))
        for run in runs:
            for x, y in run if dots or len(run) == 1 else ():
                said = element("title", f"{line.name} {(y_format or number)(y)} at {x_name} {number(x)}")
                place = {"cx": _pc(across(x)), "cy": _pc(down(y)), "r": "3"}
                points.append(element("circle", said, class_=f"f{line.colour}", **place))
    inner = element("svg", *paths, viewBox="0 0 1000 1000", preserveAspectRatio="none")
    y_axis = [element("text", (y_format or _tick_format(y_ticks))(y), x="100%", y=_pc(down(y)), dx="-6", dy="4",
                      text_anchor="end") for y in y_ticks]  # fmt: skip
    x_ticks = [x for x in ticks(left, right, 8 if wide else 4) if left <= x <= right]
    written = _tick_format(x_ticks)
    if len(x_ticks) > 2 and across(x_ticks[-1]) - across(x_ticks[-2]) < (25 if wide else 35):
        del x_ticks[-2]  # the last one says the unit too, and needs the room
    x_axis = [element("text", written(x) + (f" {x_name}" if i == len(x_ticks) - 1 else ""), x=_pc(across(x)), y="1.1em",
                      dy="2", text_anchor="end" if across(x) > 88 else "middle" if across(x) > 4 else "start")
              for i, x in enumerate(x_ticks)]  # fmt: skip
    plot = element(
        "div",
        element("svg", *y_axis, aria_hidden="true"),
        element("svg", *grid, *spans, inner, *points, *marks, role="img", aria_label=_spoken(lines, x_name)),
        element("svg", *x_axis, class_="x", aria_hidden="true"),
        class_="chart",
    )
    names = key(lines) if len(lines) > 1 else None
    return element("figure", element("figcaption", title), names, plot, class_="wide" if wide else None)


def bar_chart(title: object, bars: Sequence[Bar], *, colour: int = 0) -> Html:
    """Bars from zero to the right, each with its name and value; beyond MOST_BARS as columns without names."""
    most = max((bar.value for bar in bars), default=0.0) or 1.0
    if len(bars) > MOST_BARS:
        return _columns(title, bars, most, colour)
    rows = [
        part
        for bar in bars
        for part in (
            element("span", bar.name),
            element("svg", element("rect", width=_pc(100 * bar.value / most), height="100%", class_=f"f{colour}"),
                    aria_hidden="true"),
            element("span", bar.note or number(bar.value), class_="num"),
        )
    ]  # fmt: skip
    return element("figure", element("figcaption", title), element("div", *rows, class_="bars"))


def _columns(title: object, bars: Sequence[Bar], most: float, colour: int) -> Html:
    step = 1000 / len(bars)
    tops = [1000 - 1000 * bar.value / most for bar in bars]
    d = " ".join(f"M{i * step:.5g} 1000V{top:.5g}h{step * 0.9:.4g}V1000z" for i, top in enumerate(tops))
    drawn = element("svg", element("path", d=d, class_=f"f{colour}"), viewBox="0 0 1000 1000",
                    preserveAspectRatio="none")  # fmt: skip
    axis = [element("text", number(v), x="100%", y=_pc(y), dx="-6", dy="4", text_anchor="end")
            for v, y in ((most, 0.0), (0, 100.0))]  # fmt: skip
    ends = [element("text", bars[0].name, x="0", y="1.1em", dy="2"),
            element("text", bars[-1].name, x="100%", y="1.1em", dy="2", text_anchor="end")]  # fmt: skip
    plot = element("div", element("svg", *axis, aria_hidden="true"), drawn, element("svg", *ends, class_="x"),
                   class_="chart")  # fmt: skip
    return element("figure", element("figcaption", title), plot)


def scatter(points: Sequence[tuple[float, float]], groups: Sequence[int], names: Sequence[str], alt: str) -> Html:
    """Points by group, coloured and shaped; the groups are named above, and at their middles where there is room. Axes
    mean nothing."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    wide, high = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    placed = [(3 + 94 * (x - min(xs)) / wide, 3 + 94 * (max(ys) - y) / high) for x, y in points]
    drawn, labels, named = [], [], []
    taken: list[tuple[float, float]] = []
    for group, name in enumerate(names):
        own = [p for p, g in zip(placed, groups, strict=True) if g == group]
        if own:
            x, y = (sorted(values)[len(own) // 2] for values in zip(*own, strict=True))
            if all(abs(x - x2) > 16 or abs(y - y2) > 6 for x2, y2 in taken):
                taken.append((x, y))
                labels.append(element("text", name, x=_pc(x), y=_pc(y), dy="4"))
            sample = element("svg", _dot(group, 50, 50), width="10", height="10")
            named.append(element("span", sample, name))
            drawn.append(element("g", element("title", name), *(_dot(group, x, y) for x, y in own)))
    shape = f"aspect-ratio:{min(max(wide / high, 0.7), 1.8):.3f}"
    map_ = element("svg", *drawn, *labels, class_="scatter", style=shape, role="img", aria_label=alt)
    return element("figure", element("div", *named, class_="key"), map_)


def _dot(group: int, x: float, y: float) -> Html:
    """A filled circle, a square, a ring: with the colours enough for 24 groups."""
    colour, shape = group % NUM_COLOURS, group // NUM_COLOURS % 3
    if shape == 1:
        return element("rect", x=_pc(x), y=_pc(y), width="5", height="5", transform="translate(-2.5 -2.5)",
                       class_=f"f{colour}")  # fmt: skip
    return element("circle", cx=_pc(x), cy=_pc(y), r="2.8", class_=f"hollow s{colour}" if shape == 2 else f"f{colour}")


def key(lines: Sequence[Line]) -> Html:
    """What each line is."""
    named = []
    for line in lines:
        sample = element("line", x2="22", y1="5", y2="5", class_=_look(line))
        named.append(element("span", element("svg", sample, width="22", height="10"), line.name))
    return element("div", *named, class_="key")


def _look(line: Line) -> str:
    return f"line s{line.colour}" + (" dashed" if line.dashed else "")


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers, a step of 1, 2 or 5 times a power of ten apart, from at or below `low` to at or above `high`."""
    if low == high:
        low, high = low - abs(low) / 2 - 0.5, high + abs(high) / 2 + 0.5
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    decimals = 2 - math.floor(math.log10(step))  # i * step is off in its last bits
    return [round(i * step, decimals) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def thinned(xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most about `most` points; of each stretch its least and largest y, so that no spike is lost, and whatever is
    not finite."""
    if len(xs) <= most:
        return list(xs), list(ys)
    keep = {0, len(xs) - 1} | {i for i, y in enumerate(ys) if not math.isfinite(y)}
    stretch = 2 * len(xs) / most
    for k in range(most // 2):
        inside = [i for i in range(int(k * stretch), int((k + 1) * stretch)) if math.isfinite(ys[i])]
        if inside:
            keep |= {min(inside, key=ys.__getitem__), max(inside, key=ys.__getitem__)}
    return [xs[i] for i in sorted(keep)], [ys[i] for i in sorted(keep)]


def _runs(xs: Sequence[float], ys: Sequence[float]) -> list[list[tuple[float, float]]]:
    """The stretches of finite points."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _tick_format(values: Sequence[float]) -> Format:
    """As many decimals as the smallest step between `values` needs; thousands as k, millions as M."""
    largest = max(map(abs, values), default=0.0)
    scale, unit = next(((s, u) for s, u in ((1e6, "M"), (1e4, "k")) if largest >= s), (1.0, ""))
    scale = 1e3 if unit == "k" else scale
    step = min((abs(b - a) for a, b in zip(values, values[1:], strict=False)), default=1.0) / scale
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    if decimals > 4:
        return lambda v: f"{v:.0e}".replace("e-0", "e-").replace("-", "−") if v else "0"
    return lambda v: f"{v / scale:,.{decimals}f}{unit if v else ''}".replace("-", "−")


def _pc(value: float) -> str:
    return f"{value:.2f}%"


def _spoken(lines: Sequence[Line], x_name: str) -> str:
    ends = [f"{line.name}: {number(line.ys[0])} to {number(line.ys[-1])}" for line in lines if len(line.ys)]
    return f"over {x_name}; " + "; ".join(ends)
