"""A diagram of curves as SVG: readable without a script and on paper; ``page.js`` lets one zoom and read values off.

Coordinates are those of a picture of 480 x 300 that is scaled to the width it gets: on a phone 12 units of text are
still 9 pixels.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

from beit.visualization.curves import Curve
from beit.visualization.markup import Markup, element

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40  # margins; the left one holds numbers of 7 letters
TICKS = 8  # steps of an axis at most; there are three at least
COLOURS = 6  # of the page's style; with the markers, pairs repeat after 24 runs
MARKERS = 4
MOST_MARKERS = 40  # of a curve; more would be a band
HEADROOM = 0.06  # of the range of values, above and below
SIDEROOM = 0.02  # of the epochs, left and right, for half a marker
STYLES = ("train", "test", "frequent")  # solid, dashed, dotted
DIGITS = 6  # of a value that is read off


def diagram(title: str, curves: Sequence[Curve], *, x_label: str, number: int) -> Markup:
    """Returns a diagram with its title and legend.

    Args:
        title: What is drawn.
        curves: The lines; ``run`` chooses colour and marker, the label's last word the style.
        x_label: What the numbers below are.
        number: Number of the diagram on its page, from 0.
    """
    name = f"diagram-{number}"
    xs, ys = _x_limits(curves), _y_limits(curves)
    plot = element(
        "svg",
        element("title", _description(title, curves, x_label), id=f"{name}-text"),
        element("g", *_axis_x(xs), class_="x-axis"),
        element("g", *_axis_y(ys), class_="y-axis"),
        element("text", x_label, class_="label", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, text_anchor="middle"),
        element(
            "svg",
            *(_line(curve, xs, ys) for curve in curves),
            class_="lines",
            x=LEFT,
            y=TOP,
            width=WIDTH - LEFT - RIGHT,
            height=HEIGHT - TOP - BOTTOM,
        ),
        element("rect", class_="frame", x=LEFT, y=TOP, width=WIDTH - LEFT - RIGHT, height=HEIGHT - TOP - BOTTOM),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{name}-text",
        class_="plot",
    )
    legend = element("ul", *(_legend(curve) for curve in curves), class_="legend")
    caption = element("figcaption", element("h4", title), legend)
    data = [{"label": curve.label, "points": _points(curve)} for curve in curves]
    return element(
        "figure",
        caption,
        plot,
        class_="diagram",
        id=name,
        data_x=x_label,
        data_curves=json.dumps(data, allow_nan=False),
    )


def thinned(curve: Curve, most: int) -> Curve:
    """Returns a curve of at most so many points, at least two, that keeps its first and its last one."""
    count, most = len(curve.epochs), max(most, 2)
    if count <= most:
        return curve
    chosen = [round(step * (count - 1) / (most - 1)) for step in range(most)]
    return replace(curve, epochs=[curve.epochs[i] for i in chosen], values=[curve.values[i] for i in chosen])


def short(value: float, digits: int = 4) -> str:
    """Returns a number for readers: ``0.2847``, ``1,249,552``, ``1.63e-05``."""
    if isinstance(value, bool) or not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def round_steps(low: float, high: float) -> list[float]:
    """Returns round numbers between two limits, three to nine: 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= TICKS)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _x_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    first, last = min(min(curve.epochs) for curve in curves), max(max(curve.epochs) for curve in curves)
    room = (last - first) * SIDEROOM or 0.5
    return first - room, last + room


def _y_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    low, high = min(min(curve.values) for curve in curves), max(max(curve.values) for curve in curves)
    room = (high - low) * HEADROOM or abs(high) * HEADROOM or 1.0
    return low - room, high + room


def _across(x: float, limits: tuple[float, float]) -> float:
    return round((x - limits[0]) / (limits[1] - limits[0]) * (WIDTH - LEFT - RIGHT), 1)


def _down(y: float, limits: tuple[float, float]) -> float:
    return round((limits[1] - y) / (limits[1] - limits[0]) * (HEIGHT - TOP - BOTTOM), 1)


def _axis_x(limits: tuple[float, float]) -> list[Markup]:
    marks = [tick for tick in round_steps(*limits) if float(tick).is_integer()]  # epochs and steps are counted
    return [
        element("text", f"{tick:,.0f}", x=LEFT + _across(tick, limits), y=HEIGHT - BOTTOM + 17, text_anchor="middle")
        for tick in marks
    ]


def _axis_y(limits: tuple[float, float]) -> list[Markup]:
    parts, ticks = [], round_steps(*limits)
    for tick in ticks:
        y = TOP + _down(tick, limits)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", tick_text(tick, ticks[1] - ticks[0]), x=LEFT - 7, y=y + 4.5, text_anchor="end"))
    return parts


def tick_text(value: float, step: float) -> str:
    """Returns a number of an axis with as many decimals as its steps have: ``0.50``, ``2e-05``, ``25,000``."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}" if decimals <= 4 and abs(value) < 1e6 else f"{round(value, 12):.3g}"


def style_of(curve: Curve) -> str:
    """Returns whether a curve is of training, of test, or of the most frequent token."""
    last = curve.label.rpartition(" ")[2]
    return "test" if last == "test" else "frequent" if last == "token" else "train"


def _classes(curve: Curve) -> str:
    return f"c{curve.run % COLOURS} {style_of(curve)}"


def _marker(curve: Curve) -> str:
    return f"#marker-{(curve.run + curve.run // COLOURS) % MARKERS}"  # a colour comes back with another marker


def _line(curve: Curve, xs: tuple[float, float], ys: tuple[float, float]) -> Markup:
    points = [(_across(x, xs), _down(y, ys)) for x, y in zip(curve.epochs, curve.values, strict=True)]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    marks = points if len(points) <= MOST_MARKERS else []
    return element(
        "g",
        element("path", d=path),
        *(element("use", href=_marker(curve), x=x, y=y) for x, y in marks),
        class_=_classes(curve),
    )


def _legend(curve: Curve) -> Markup:
    sample = element(
        "svg",
        element(
            "g", element("path", d="M1 6H27"), element("use", href=_marker(curve), x=14, y=6), class_=_classes(curve)
        ),
        viewBox="0 0 28 12",
        class_="sample",
        aria_hidden="true",
    )
    return element("li", sample, f"{curve.label} ", element("b", short(curve.values[-1])))


def _points(curve: Curve) -> list[list[float]]:
    return [[x, float(f"{y:.{DIGITS}g}")] for x, y in zip(curve.epochs, curve.values, strict=True)]


def _description(title: str, curves: Sequence[Curve], x_label: str) -> str:
    parts = [
        f"{curve.label}: {short(curve.values[0])} at {x_label} {curve.epochs[0]:,}, "
        f"{short(curve.values[-1])} at {x_label} {curve.epochs[-1]:,}"
        for curve in curves
    ]
    return f"{title}. {'; '.join(parts)}"
