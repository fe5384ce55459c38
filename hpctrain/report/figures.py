"""Figures of a report: plots and tables as plain data, before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

UNITS = {
    "ms": "ms", "us": "us", "seconds": "s", "bytes": "bytes", "MB": "MB", "GB": "GB",
    "Mbps": "Mbit/s", "Gbps": "Gbit/s", "MBps": "MB/s", "GBps": "GB/s",
}  # fmt: skip
BUCKETS = 250


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        label: In the legend.
        x: As many as of ``y``.
        y: Finite values.
        low: Lower ends of the spread, if there is one.
        high: Upper ends.
        look: Which of the colours, markers and dashes; the same for the same run in all plots.
        faint: Thin and without markers: training, beside validation.
        hollow: Which points were measured with more ranks than cores.
        stepped: The value holds until the next point.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    look: int = 0
    faint: bool = False
    hollow: Sequence[bool] = ()
    stepped: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot of lines over an axis.

    Attributes:
        name: Of its files, without a suffix.
        title: Above it.
        x_label: With the unit.
        y_label: With the unit.
        series: The lines.
        caption: What else to know.
        marks: Events: where on the x axis, and the look of the run.
        ideal: Two points of a straight line to compare with.
        log_x: Logarithmic axis.
        log_y: Logarithmic axis.
        from_zero: The y axis begins at 0.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    caption: str = ""
    marks: Sequence[tuple[float, int]] = ()
    ideal: Sequence[tuple[float, float]] = ()
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False

    def __str__(self) -> str:
        """In words, for those who cannot see it."""
        lines = [f"Lines of {self.y_label} over {self.x_label}."]
        for each in self.series:
            what = f"{each.label}{' (training)' * each.faint}" if each.label else "training"
            ends = f"from {short(each.y[0])} to {short(each.y[-1])}"
            lines.append(
                f"{what}: {ends}, least {short(min(each.y))}, largest {short(max(each.y))}."
            )
        if self.marks:
            lines.append("Events at " + ", ".join(short(x) for x, _ in self.marks) + ".")
        return " ".join(lines)


@dataclass(frozen=True)
class Bars:
    """A plot with a bar for each case; a point, where the axis is logarithmic.

    Attributes:
        name: Of its files, without a suffix.
        title: Above it.
        x_label: What the lengths are, with the unit.
        labels: Of the bars.
        values: Their lengths.
        low: Lower ends of the spread, as many as bars.
        high: Upper ends.
        hatched: Which were measured with more ranks than cores.
        caption: What else to know.
        log_x: Logarithmic axis.
    """

    name: str
    title: str
    x_label: str
    labels: Sequence[str]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    hatched: Sequence[bool]
    caption: str = ""
    log_x: bool = False

    def __str__(self) -> str:
        """In words, for those who cannot see it."""
        ends = zip(self.labels, self.values, self.low, self.high, strict=True)
        bars = (f"{label} {spread(value, low, high)}" for label, value, low, high in ends)
        return f"Bars of {self.x_label}: " + "; ".join(bars) + "."


@dataclass(frozen=True)
class Stacks:
    """A plot with a bar for each case, of parts one after the other.

    Attributes:
        name: Of its files, without a suffix.
        title: Above it.
        x_label: What the lengths are, with the unit.
        labels: Of the bars.
        parts: By name, the lengths of the part in every bar.
        caption: What else to know.
    """

    name: str
    title: str
    x_label: str
    labels: Sequence[str]
    parts: Mapping[str, Sequence[float]]
    caption: str = ""

    def __str__(self) -> str:
        """In words, for those who cannot see it."""
        bars = (
            f"{label}: " + ", ".join(f"{part} {short(v[place])}" for part, v in self.parts.items())
            for place, label in enumerate(self.labels)
        )
        return f"Parts of {self.x_label}: " + "; ".join(bars) + "."


Figure = Plot | Bars | Stacks


@dataclass(frozen=True)
class Table:
    """A table of rows under a head; the first cell of a row says what the row is.

    Attributes:
        caption: What it shows.
        head: Names of the columns.
        rows: Texts.
        note: Below it.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass
class Section:
    """A section of the page: text, tables and plots.

    Attributes:
        title: Its heading.
        text: Sentences below that.
        tables: Before the plots.
        figures: Plots.
        details: Title and text of what is folded away.
    """

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)


def thin(
    x: Sequence[float], y: Sequence[float], buckets: int = BUCKETS
) -> tuple[list[float], list[float]]:
    """Thin a curve so that it looks the same: keep first, last, and the extremes in between.

    Of each of ``buckets`` stretches the least and the largest value are kept, where they are, as a
    drawing of that many pixels would show them (M4 without the ends of each stretch: Jugel et al.,
    "M4: A Visualization-Oriented Time Series Data Aggregation", VLDB 2014).

    Args:
        x: Of each point.
        y: As many values.
        buckets: Stretches into which the curve is cut.
    """
    if len(y) <= 2 * buckets + 2:
        return list(x), list(y)
    kept = {0, len(y) - 1}
    for bucket in range(buckets):
        stretch = range(bucket * len(y) // buckets, (bucket + 1) * len(y) // buckets)
        kept |= {min(stretch, key=y.__getitem__), max(stretch, key=y.__getitem__)}
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else that a file may hold in its place."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def short(value: Any) -> str:
    """Return a value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 10_000:
        return str(int(value))
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e12 else f"{value:.4g}"


def spread(value: float, low: float, high: float) -> str:
    """Return a median with the ends of its spread, where it has one.

    Args:
        value: The median.
        low: The lower end.
        high: The upper end.
    """
    middle, *ends = map(short, (value, low, high))
    return middle if {*ends} == {middle} else f"{middle} ({ends[0]}..{ends[1]})"


def words(key: str) -> str:
    """Return a key as an axis is labelled: ``median_ms`` is "median (ms)"."""
    if key.endswith("_per_second"):
        return f"{key.removesuffix('_per_second').replace('_', ' ')}/s"
    stem, _, unit = key.rpartition("_")
    if unit in UNITS:
        return f"{stem.replace('_', ' ')} ({UNITS[unit]})" if stem else UNITS[unit]
    return key.replace("_", " ")


def file_name(*parts: str) -> str:
    """Join parts to the name of a file: letters, digits and hyphens."""
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in "-".join(parts))
    return "-".join(filter(None, kept.lower().split("-")))[:80] or "plot"


def wide(values: Sequence[float], ratio: float) -> bool:
    """Whether values range so far that an axis should be logarithmic.

    Args:
        values: To be drawn.
        ratio: Of the largest to the least, from which on they do.
    """
    return bool(values) and min(values) > 0 and max(values) / min(values) > ratio
