"""Charts as SVG text: no script, colours from the page's style sheet, so that light and dark both work.

Positions along x are shares of the width and heights are pixels: letters and bars keep their size on any screen.

    names │ svg: bars by row, in per cent          a chart's numbers stand beside it as text, which the page adds
          │ 0 ms      50 ms      100 ms
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

_LINES = 200  # height of a chart of curves
_AXIS = 24  # height below the rows, for the ticks
Point = tuple[float, float]
Bar = tuple[str, str, float, float]
"""(class, words, start, length), in the unit of the chart's scale."""


def number(value: float | None) -> str:
    """Short: three digits or so. None: as metrics have a number that is not finite."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def lines(name: str, series: Mapping[str, Sequence[Point]], colours: Sequence[str], x_name: str) -> str:
    """One line a series, of its class in `colours`, on common axes from the data's least to its most."""
    points = [p for of_series in series.values() for p in of_series]
    if not points:
        return ""
    (x0, x1), (y0, y1) = _range([x for x, _ in points]), _range([y for _, y in points])

    def place(point: Point) -> str:
        return f"{100 * (point[0] - x0) / (x1 - x0):.2f},{_LINES * (y1 - point[1]) / (y1 - y0):.1f}"

    heights = [(tick, _LINES * (y1 - tick) / (y1 - y0)) for tick in ticks(y0, y1)]
    body = "".join(f'<line class="grid" x1="0" x2="100%" y1="{at:.1f}" y2="{at:.1f}"/>' for _, at in heights)
    curves = ""
    for colour, (label, of_series) in zip(colours, series.items(), strict=True):
        path = " ".join(place(p) for p in thinned(of_series))
        twice = path if len(of_series) > 1 else f"{path} {path}"  # a line of one point is a dot
        curves += (
            f'<polyline class="line {colour}" points="{twice}"><title>{escape(label)}</title></polyline>'
        )
    body += f'<svg width="100%" height="{_LINES}" viewBox="0 0 100 {_LINES}" preserveAspectRatio="none">{curves}</svg>'
    body += _axis([(tick, (tick - x0) / (x1 - x0)) for tick in ticks(x0, x1)], _LINES, "", grid=False)
    body += f'<text class="tick" x="100%" y="{_LINES + 34}" text-anchor="end">{escape(x_name)}</text>'
    names = "".join(f'<span style="top:{at - 9:.0f}px">{number(tick)}</span>' for tick, at in heights)
    return _plot(name, f'<div class="names heights" aria-hidden="true">{names}</div>', body, _LINES + 38)


def rows(
    name: str,
    named: Sequence[tuple[str, Sequence[Sequence[Bar]]]],
    unit: str,
    total: float = 0.0,
    *,
    height: int = 22,
) -> str:
    """Horizontal bars: (label, its lanes) a row, lanes one below another, later bars of a lane above earlier ones.

    total: what the whole width is, in the bars' unit; default: as far as they reach. height: of a row, in pixels.
    """
    bars = [bar for _, lanes in named for lane in lanes for bar in lane]
    total = max(total, max((start + length for *_, start, length in bars), default=0.0)) or 1.0
    body = ""
    for index, (_, lanes) in enumerate(named):
        lane_height = (height - 4 - (len(lanes) - 1)) / len(lanes)
        for number_of_lane, lane in enumerate(lanes):
            y = index * height + 2 + number_of_lane * (lane_height + 1)
            for kind, words, start, length in lane:
                if length > total / 5000:
                    body += (
                        f'<rect class="{kind}" x="{100 * start / total:.2f}%" y="{y:.4g}" '
                        f'width="{100 * length / total:.2f}%" height="{lane_height:.4g}">'
                        f"<title>{escape(words)}</title></rect>"
                    )
    below = height * len(named)
    axis = _axis([(tick, tick / total) for tick in ticks(0.0, total, 4)], below, f" {unit}")
    names = "".join(f'<span style="height:{height}px">{escape(label)}</span>' for label, _ in named)
    return _plot(name, f'<div class="names" aria-hidden="true">{names}</div>', axis + body, below + _AXIS)


def stacked(label: str, parts: Iterable[tuple[str, str, float]], unit: str) -> list[Bar]:
    """(class, part, value) one after another, as one lane."""
    bars, start = [], 0.0
    for kind, part, value in parts:
        bars.append((kind, f"{label}, {part}: {number(value)} {unit}", start, max(value, 0.0)))
        start += max(value, 0.0)
    return bars


def thinned(points: Sequence[Point], most: int = 600) -> list[Point]:
    """Every k-th point, and the last."""
    step = max(1, -(-len(points) // most))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Means of `window` neighbours, to see a noisy curve."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    ends = [(max(0, i - window + 1), i + 1) for i in range(len(points))]
    return [(points[b - 1][0], (sums[b] - sums[a]) / (b - a)) for a, b in ends]


def _plot(name: str, names: str, body: str, height: int) -> str:
    label = escape(name, quote=True)
    chart = f'<svg role="img" aria-label="{label}" width="100%" height="{height}">{body}</svg>'
    return f'<div class="plot">{names}<div class="canvas">{chart}</div></div>'


def _axis(marks: Sequence[tuple[float, float]], below: int, unit: str, *, grid: bool = True) -> str:
    """(value, share of the width) as text below `below` pixels, with a line over the rows.

    Every other text has the class `odd`: where there is no room for all, the page hides it.
    """
    found = ""
    for index, (value, share) in enumerate(marks):
        kind = "tick odd" if index % 2 else "tick"
        anchor = "start" if share < 0.03 else "end" if share > 0.94 else "middle"
        at = f"{100 * share:.2f}%"
        if grid:
            found += f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="{below}"/>'
        found += f'<text class="{kind}" x="{at}" y="{below + 17}" text-anchor="{anchor}">{number(value)}{unit}</text>'
    return found


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ticks(low: float, high: float, num: int = 5) -> list[float]:
    """Round numbers in the range."""
    rough = (high - low) / num if high > low else 1.0
    power = 10.0 ** (
        len(str(int(rough))) - 1 if rough >= 1 else -next(i for i in range(1, 20) if rough * 10**i >= 1)
    )
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first = -(-low // step)
    return [step * (first + i) for i in range(num + 2) if low <= step * (first + i) <= high]
