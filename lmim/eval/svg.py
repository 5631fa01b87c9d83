"""Charts as SVG that stands inside an HTML page: sharp at any size, small, and coloured by the page's style sheet.

Owns geometry and ticks. The invariant: every text is escaped, and a drawing holds no colours of its own, but classes
(`c0` … `c5` of curves, `level`, `grid`), so that it follows the page from light to dark.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from lmim.eval.curves import Chart, Series

WIDTH, HEIGHT = 400, 232
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 34
Y_TICKS, X_TICKS = 5, 6
DIGITS = 4  # of values that are shown under the pointer


class Drawing(NamedTuple):
    """A chart's SVG, and the numbers that a pointer over it shows."""

    svg: Markup
    hover: dict[str, object]


class Frame(NamedTuple):
    """Where a chart's values lie in the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    logarithmic: bool

    def x(self, values: np.ndarray) -> np.ndarray:
        span = self.x_high - self.x_low or 1.0
        return LEFT + (values - self.x_low) / span * (WIDTH - LEFT - RIGHT)

    def y(self, values: np.ndarray) -> np.ndarray:
        low, high = self.y_low, self.y_high
        if self.logarithmic:
            values, low, high = np.log10(np.maximum(values, 1e-300)), math.log10(low), math.log10(high)
        return HEIGHT - BOTTOM - (values - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def draw(chart: Chart) -> Drawing:
    """Draw a chart."""
    frame = _frame(chart)
    parts = [*_grid(frame), f'<g clip-path="url(#clip-{escape(chart.name)})">']
    for n, level in enumerate(chart.levels):
        y = float(frame.y(np.array([level.value]))[0])
        parts.append(f'<path class="level n{n}" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    for series in chart.series:
        parts += _curve(series, frame)
    clip = (f'<clipPath id="clip-{escape(chart.name)}"><rect x="{LEFT}" y="{TOP - 3}" width="{WIDTH - LEFT - RIGHT}" '
            f'height="{HEIGHT - TOP - BOTTOM + 6}"/></clipPath>')  # fmt: skip
    svg = (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken(chart))}"><defs>{clip}</defs>'
           f'{"".join(parts)}</g><path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/></svg>')  # fmt: skip
    return Drawing(Markup(svg), _hover(chart, frame))


def spoken(chart: Chart) -> str:
    """Return what a chart shows, in words for those who cannot see it."""
    curves = (
        f"{one.label} from {number(one.mean[0])} to {number(one.last)}{chart.unit}, "
        f"between {number(float(one.low.min()))} and {number(float(one.high.max()))}"
        for one in chart.series
    )
    levels = (f"{level.label} at {number(level.value)}{chart.unit}" for level in chart.levels)
    return f"{chart.title} over epochs: {'; '.join([*curves, *levels])}"


def number(value: float) -> str:
    """Return a value in a few digits, as people write it."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = max(DIGITS - 1 - math.floor(math.log10(abs(value))), 0)
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float, digits: int = 1) -> str:
    """Return a share as "64.5 %"."""
    return f"{100 * share:.{digits}f} %"


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about so many round numbers from low to high: steps of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from low to high, and twice and five times those where they would be few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(decades) // Y_TICKS)
    found = [10.0**n for n in decades[::every] if low <= 10.0**n <= high]
    if len(found) < 3:
        found = [f * 10.0**n for n in decades for f in (1, 2, 5) if low <= f * 10.0**n <= high]
    return found if len(found) >= 2 else ticks(low, high, Y_TICKS)


def tick_words(values: list[float]) -> list[str]:
    """Return ticks with as many digits as tell them apart."""
    largest = max(map(abs, values))
    if largest >= 1e6 or 0 < largest < 1e-2:
        return [_scientific(value) for value in values]
    digits = next((d for d in range(7) if all(abs(round(v, d) - v) < 1e-9 for v in values)), 9)
    return [f"{value:,.{digits}f}" for value in values]


def _scientific(value: float) -> str:
    """Return a value as 2.5e-4, with the digits that it has, nine at most."""
    texts = (f"{value:.{digits}e}" for digits in range(9))
    text = next((text for text in texts if abs(float(text) - value) <= 1e-9 * abs(value)), f"{value:.9e}")
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


# --- parts -----------------------------------------------------------------------------------------------------------


def _frame(chart: Chart) -> Frame:
    low = min(float(one.x[0]) for one in chart.series)
    high = max(float(one.x[-1]) for one in chart.series)
    return Frame(min(low, 0.0), high if high > min(low, 0.0) else low + 1.0, *chart.limits, chart.logarithmic)


def _grid(frame: Frame) -> list[str]:
    rows = log_ticks(frame.y_low, frame.y_high) if frame.logarithmic else ticks(frame.y_low, frame.y_high, Y_TICKS)
    columns = ticks(frame.x_low, frame.x_high, X_TICKS)
    parts = []
    words = [number(v) for v in rows] if frame.logarithmic else tick_words(rows)
    for y, word in zip(frame.y(np.array(rows)), words, strict=True):
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{word}</text>')
    for x, word in zip(frame.x(np.array(columns)), tick_words(columns), strict=True):
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{word}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">epochs</text>')
    return parts


def _curve(series: Series, frame: Frame) -> list[str]:
    x, parts = frame.x(series.x), []
    if (series.high > series.low).any():
        upper, lower = _points(x, frame.y(series.high)), _points(x, frame.y(series.low))
        parts.append(f'<path class="band c{series.colour}" d="M{"L".join([*upper, *lower[::-1]])}Z"/>')
    points = _points(x, frame.y(series.mean))
    dashed = " dashed" if series.dashed else ""
    parts.append(f'<path class="curve c{series.colour}{dashed}" d="M{"L".join(points)}"/>')
    if series.dots or len(points) == 1:
        marks = "".join(f"M{point}h0" for point in points)
        parts.append(f'<path class="dots c{series.colour}" d="{marks}"/>')
    return parts


def _points(x: np.ndarray, y: np.ndarray) -> list[str]:
    y = np.clip(y, -HEIGHT, 2 * HEIGHT)  # far beyond what is shown
    return [f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True)]


def _hover(chart: Chart, frame: Frame) -> dict[str, object]:
    """Return positions in the drawing and values in words' digits; null where a curve has no value near."""
    series = [
        dict(label=one.label, colour=one.colour, x=[round(float(v), 1) for v in frame.x(one.x)],
             y=[float(f"{v:.{DIGITS}g}") for v in one.mean])
        for one in chart.series
    ]  # fmt: skip
    return dict(left=LEFT, right=WIDTH - RIGHT, top=TOP, bottom=HEIGHT - BOTTOM, width=WIDTH, unit=chart.unit,
                low=frame.x_low, high=frame.x_high, series=series)  # fmt: skip
