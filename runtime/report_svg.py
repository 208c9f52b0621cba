"""Charts as SVG text: no script, colours from the page's style sheet, so that light and dark both work.

Each chart is a picture with a name (role "img"); its numbers stand beside it as text, which the page adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH = 720
_CURVES = 460  # narrow: to be read on a phone as it is
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 30
Point = tuple[float, float]


def number(value: float) -> str:
    """Short: three digits or so."""
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.0f}"


def lines(
    name: str, series: Mapping[str, Sequence[Point]], x_name: str, y_name: str, height: int = 240
) -> str:
    """One line a series, on common axes from the data's least to its most."""
    points = [p for of_series in series.values() for p in of_series]
    if not points:
        return ""
    (x0, x1), (y0, y1) = _range([x for x, _ in points]), _range([y for _, y in points])

    def place(point: Point) -> str:
        x = _LEFT + (point[0] - x0) / (x1 - x0) * (_CURVES - _LEFT - _RIGHT)
        y = height - _BOTTOM - (point[1] - y0) / (y1 - y0) * (height - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    body = _axes((x0, x1), (y0, y1), x_name, y_name, height)
    for index, (label, of_series) in enumerate(series.items()):
        path = " ".join(place(p) for p in thinned(of_series))
        mark = "" if len(of_series) > 1 else ' stroke-linecap="round"'
        twice = path if len(of_series) > 1 else f"{path} {path}"
        body += f'<polyline class="line c{index % 8}"{mark} points="{twice}"><title>{escape(label)}</title></polyline>'
    return _svg(name, body, height, _CURVES)


def bars(
    name: str, rows: Sequence[tuple[str, Mapping[str, float]]], unit: str, colours: Mapping[str, str]
) -> str:
    """One horizontal bar a row, its parts one after another; colours: classes by part."""
    most = max((sum(parts.values()) for _, parts in rows), default=0.0) or 1.0
    height, left = 24 * len(rows) + 30, 120
    body = ""
    for index, (label, parts) in enumerate(rows):
        x, y = float(left), 24 * index + 4
        body += f'<text class="label" x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
        for part, value in parts.items():
            width = max(value, 0.0) / most * (WIDTH - left - _RIGHT)
            if width > 0.2:
                title = escape(f"{label}, {part}: {number(value)} {unit}")
                body += (
                    f'<rect class="{colours[part]}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="18">'
                    f"<title>{title}</title></rect>"
                )
            x += width
    for tick in _ticks(0.0, most):
        x = left + tick / most * (WIDTH - left - _RIGHT)
        body += f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{number(tick)} {unit}</text>'
    return _svg(name, body, height)


def timeline(
    name: str, rows: Sequence[tuple[str, Sequence[tuple[str, str, float, float]]]], total: float
) -> str:
    """One row a rank; (class, words, start, seconds) are drawn in order, later ones above."""
    row_height, left = 30, 64
    height = row_height * len(rows) + 30
    scale = (WIDTH - left - _RIGHT) / total if total > 0 else 0.0
    body = ""
    for index, (label, spans) in enumerate(rows):
        y = row_height * index + 4
        body += f'<text class="label" x="{left - 6}" y="{y + 16}" text-anchor="end">{escape(label)}</text>'
        for kind, words, start, seconds in spans:
            width = seconds * scale
            if width >= 0.15:
                body += (
                    f'<rect class="{kind}" x="{left + start * scale:.2f}" y="{y}" width="{width:.2f}" height="24">'
                    f"<title>{escape(words)}</title></rect>"
                )
    for tick in _ticks(0.0, total):
        body += (
            f'<text class="tick" x="{left + tick * scale:.1f}" y="{height - 8}" text-anchor="middle">'
            f"{number(1e3 * tick)} ms</text>"
        )
    return _svg(name, body, height)


def thinned(points: Sequence[Point], most: int = 600) -> list[Point]:
    """Every k-th point, and the last."""
    step = max(1, -(-len(points) // most))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _svg(name: str, body: str, height: int, width: int = WIDTH) -> str:
    kind = ' class="small"' if width < WIDTH else ""
    label = escape(name, quote=True)
    return f'<svg{kind} role="img" aria-label="{label}" viewBox="0 0 {width} {height}">{body}</svg>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, num: int = 5) -> list[float]:
    """Round numbers in the range."""
    rough = (high - low) / num if high > low else 1.0
    power = 10.0 ** (
        len(str(int(rough))) - 1 if rough >= 1 else -next(i for i in range(1, 20) if rough * 10**i >= 1)
    )
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first = -(-low // step)
    return [step * (first + i) for i in range(num + 2) if low <= step * (first + i) <= high]


def _axes(x: Point, y: Point, x_name: str, y_name: str, height: int) -> str:
    body = ""
    for tick in _ticks(*x):
        at = _LEFT + (tick - x[0]) / (x[1] - x[0]) * (_CURVES - _LEFT - _RIGHT)
        body += (
            f'<text class="tick" x="{at:.1f}" y="{height - 14}" text-anchor="middle">{number(tick)}</text>'
        )
    for tick in _ticks(*y):
        at = height - _BOTTOM - (tick - y[0]) / (y[1] - y[0]) * (height - _TOP - _BOTTOM)
        body += f'<line class="grid" x1="{_LEFT}" x2="{_CURVES - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        body += f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>'
    body += f'<text class="tick" x="{_CURVES - _RIGHT}" y="{height - 2}" text-anchor="end">{escape(x_name)}</text>'
    return body + (f'<text class="tick" x="4" y="{_TOP}">{escape(y_name)}</text>' if y_name else "")


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Means of `window` neighbours, to see a noisy curve."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    ends = [(max(0, i - window + 1), i + 1) for i in range(len(points))]
    return [(points[b - 1][0], (sums[b] - sums[a]) / (b - a)) for a, b in ends]
