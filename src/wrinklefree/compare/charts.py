"""Charts as SVG, for a page that needs nothing else: points of bytes against quality, and curves over time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 16, 48  # margins
# A page may give them other values on a dark background: its style wins over these attributes.
COLOURS = ("#0b6e99", "#b3541e", "#3a7d44", "#8a3ffc", "#a2191f", "#5c5f66")
GREY = "#9aa0a6"


@dataclass(frozen=True)
class Point:
    """A model in a chart. A dominated one is grey. `spread` is the height of its bar on each side."""

    label: str
    x: float
    y: float
    spread: float = 0.0
    grey: bool = False


@dataclass(frozen=True)
class Axis:
    """A range of values on a length of pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, is_log: bool = False) -> "Axis":
        """An axis that holds `values`, with a margin."""
        low, high = min(values), max(values)
        if is_log:
            room = max(math.log(high / low), 0.1) * 0.14
            return cls(low * math.exp(-room), high * math.exp(room), start, end, True)
        room = max(high - low, abs(high) * 0.1, 1e-9) * 0.08
        return cls(low - room, high + room, start, end)

    def place(self, value: float) -> float:
        share = (self._scaled(value) - self._scaled(self.low)) / (self._scaled(self.high) - self._scaled(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the range. A logarithmic axis that has less than three has even steps."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1) if self.is_log else ()
        found = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
        inside = [tick for tick in found if self.low <= tick <= self.high]
        if len(inside) >= 10:
            return [tick for tick in inside if math.log10(tick).is_integer()] or inside[::4]
        if len(inside) >= 3:
            return inside
        step = _round_step((self.high - self.low) / 5)
        return [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.is_log else value


def _round_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is no smaller than `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def scatter(points: Sequence[Point], x: str, y: str, title: str, aim: tuple[str, float] | None = None) -> str:
    """Points with labels, over a logarithmic y axis. A value to `aim` at is a line with its label."""
    if not points:
        return ""
    across = Axis.around([point.x for point in points], LEFT, WIDTH - RIGHT)
    lows = [max(point.y - point.spread, point.y / 2) for point in points]
    aims = [] if aim is None else [aim[1]]
    up = Axis.around([*lows, *aims, *(p.y + p.spread for p in points)], HEIGHT - BOTTOM, TOP, is_log=True)
    marks = []
    taken = [(across.place(p.x) - 6, across.place(p.x) + 6, up.place(p.y) + 4) for p in points]
    for point in sorted(points, key=lambda point: (point.grey, -point.x)):
        colour = GREY if point.grey else COLOURS[0]
        cx, cy = across.place(point.x), up.place(point.y)
        if point.spread:
            low = up.place(max(point.y - point.spread, up.low))
            marks.append(_line(cx, low, cx, up.place(point.y + point.spread), colour))
        marks.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{colour}"/>')
        marks.append(_label(point.label, cx, cy, colour, taken))
    if aim is not None:
        level = up.place(aim[1])
        marks.append(_line(LEFT, level, WIDTH - RIGHT, level, GREY))
        marks.append(_label(aim[0], LEFT - 3, level - 12, GREY, taken))
    return _framed(across, up, x, y, title, marks)


def _label(text: str, cx: float, cy: float, colour: str, taken: list[tuple[float, float, float]]) -> str:
    """A label right or left of its point, moved down or up until no other label and no point is in its place."""
    length = 7.0 * len(text)
    rows = (cy + 4 + 13 * shift for shift in sorted(range(-20, 21), key=lambda shift: (abs(shift), -shift)))
    inside = (y for y in rows if TOP + 8 < y < HEIGHT - BOTTOM - 4)
    lefts = [left for left in (cx + 9, cx - 9 - length) if LEFT < left < WIDTH - RIGHT - length]
    places = [(left, y) for y in inside for left in lefts]
    left, y = next((place for place in places if _is_free(*place, length, taken)), (cx + 9, cy + 4))
    taken.append((left, left + length, y))
    anchor, place = ("start", left) if left > cx else ("end", left + length)
    return f'<text x="{place:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'


def _is_free(left: float, y: float, length: float, taken: list[tuple[float, float, float]]) -> bool:
    return all(left > end or left + length < start or abs(y - other) >= 13 for start, end, other in taken)


def curves(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], x: str, y: str, title: str) -> str:
    """Lines with a legend, over a logarithmic y axis."""
    values = [pair for _, line in lines for pair in line if pair[1] > 0]
    if not values:
        return ""
    across = Axis.around([value for value, _ in values], LEFT, WIDTH - RIGHT)
    up = Axis.around([value for _, value in values], HEIGHT - BOTTOM, TOP, is_log=True)
    marks = []
    for number, (label, line) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        places = " ".join(f"{across.place(a):.1f},{up.place(b):.1f}" for a, b in line if b > 0)
        marks.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        place = f'x="{WIDTH - RIGHT - 6}" y="{TOP + 14 + 15 * number}"'
        marks.append(f'<text {place} fill="{colour}" text-anchor="end">{escape(label)}</text>')
    return _framed(across, up, x, y, title, marks)


def _framed(across: Axis, up: Axis, x: str, y: str, title: str, marks: Sequence[str]) -> str:
    """The chart with its axes, their ticks and their names."""
    bottom = HEIGHT - BOTTOM
    parts = [_line(LEFT, bottom, WIDTH - RIGHT, bottom, "currentColor"), _line(LEFT, TOP, LEFT, bottom, "currentColor")]
    for tick in across.ticks():
        parts.append(_text(across.place(tick), bottom + 18, f"{tick:.4g}", "middle"))
    for tick in up.ticks():
        parts.append(_text(LEFT - 8, up.place(tick) + 4, f"{tick:.4g}", "end"))
        parts.append(_line(LEFT, up.place(tick), WIDTH - RIGHT, up.place(tick), "currentColor", 0.12))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x, "middle"))
    middle = (TOP + bottom) / 2
    turned = f'x="14" y="{middle}" transform="rotate(-90 14 {middle})"'
    parts.append(f'<text {turned} text-anchor="middle" fill="currentColor">{escape(y)}</text>')
    inside = "".join([*parts, *marks])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{inside}</svg>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, opacity: float = 1.0) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-opacity="{opacity}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="currentColor" text-anchor="{anchor}">{escape(text)}</text>'
