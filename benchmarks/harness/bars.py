"""Figures that a benchmark is to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A figure to reach.

    Attributes:
        figure: The measure's key in a record.
        sign: ``>=`` or ``<=``.
        bound: What it is held against.
        where: Which records it is about: by key the value, some values, or a function of it.
        must: Whether it is about being right, not fast: where it falls short, the benchmark fails.
    """

    figure: str
    sign: str
    bound: float
    where: Mapping[str, Any]
    must: bool = False

    def fits(self, record: Record) -> bool:
        """Return whether it is about a record."""
        return all(key in record and _is(record[key], value) for key, value in self.where.items())

    def met_by(self, value: float) -> bool:
        """Return whether a value reaches it."""
        return value >= self.bound if self.sign == ">=" else value <= self.bound


def at_least(figure: str, bound: float, *, must: bool = False, **where: Any) -> Bar:
    """Return a bar for a figure that should be large; see :class:`Bar`."""
    return Bar(figure, ">=", bound, where, must)


def at_most(figure: str, bound: float, *, must: bool = False, **where: Any) -> Bar:
    """Return a bar for a figure that should be small; see :class:`Bar`."""
    return Bar(figure, "<=", bound, where, must)


def _is(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Callable):  # type: ignore[arg-type]
        return bool(wanted(value))
    return value in wanted if isinstance(wanted, tuple | list | set) else bool(value == wanted)


def judge(bars: Sequence[Bar], records: Sequence[Record]) -> list[Record]:
    """Return a verdict for each bar and each record that it is about.

    A record that failed, and so lacks the figure, falls short of it.

    Returns:
        Each has ``case`` (what sets the record apart), ``figure``, ``value``, ``target``, whether
        it was ``met``, and whether it ``must`` be.
    """
    verdicts = []
    for bar in bars:
        for record in records:
            value = record.get(bar.figure)
            if bar.fits(record) and (value is not None or "failed" in record):
                keys = [key for key in ("group", "case", *bar.where) if key in record]
                names = [record[key] for key in dict.fromkeys(keys)] or [
                    each for each in record.values() if isinstance(each, str)
                ]
                verdicts.append(
                    {
                        "case": ", ".join(map(str, names)),
                        "figure": bar.figure,
                        "value": value,
                        "target": f"{bar.sign} {bar.bound:g}",
                        "met": value is not None and bar.met_by(value),
                        "must": bar.must,
                    }
                )
    return verdicts


def line_of(verdict: Record) -> str:
    """Return a verdict as a line of text."""
    value = verdict["value"]
    shown = "failed" if value is None else f"{value:.4g}"
    case = f"{verdict['case']}: " if verdict["case"] else ""
    result = "held" if verdict["met"] else "fell short"
    return f"{case}{verdict['figure']} {shown}, {verdict['target']}: {result}"
