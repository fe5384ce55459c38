"""Tell which keys of a benchmark's records are variables, which measures, and which the x axis.

By the project's conventions a record begins with its independent variables, a measure's key ends in
its unit, and beside ``KEY`` stand ``KEY_min`` and ``KEY_max``, or ``KEY_spread``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hpctrain.report.benchmarks import Record
from hpctrain.report.figures import number, short

AFTER_VARIABLES = ("oversubscribed", "rounds", "failed", "skipped")


class Measured(NamedTuple):
    """A measure of one or more records: the median, and the ends of its spread."""

    value: float
    low: float
    high: float


def groups_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group records by their ``group``, which is then left out of them."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        kept = {key: value for key, value in record.items() if key != "group"}
        groups.setdefault(short(record.get("group")), []).append(kept)
    return groups


def variables_of(records: Sequence[Record]) -> list[str]:
    """Return the independent variables: the keys that records begin with.

    They end at ``oversubscribed``, or at the first key that was measured, as its spread, its being
    a list, or its being no whole number tells.
    """
    found: dict[str, None] = {}
    for record in records:
        whole = "oversubscribed" in record
        for key, value in record.items():
            if key in AFTER_VARIABLES or value is None or isinstance(value, (list, dict)):
                break
            if companions(record, key) or (isinstance(value, float) and not whole):
                break
            found[key] = None
    return [key for key in found if all(not companions(record, key) for record in records)]


def companions(record: Record, key: str) -> list[str]:
    """Return the keys beside a key that hold its spread: two for its ends, or one for both.

    Args:
        record: Of a benchmark.
        key: Of a measure.
    """
    if {f"{key}_min", f"{key}_max"} <= set(record):
        return [f"{key}_min", f"{key}_max"]
    stem = key.removesuffix("_median")
    names = [f"{key}_spread", f"{stem}_spread", f"{stem}_quartiles"]
    keys = list(record)
    if keys[keys.index(key) + 1 :][:1] == ["spread"] if key in record else False:
        names.append("spread")
    return [name for name in names if isinstance(record.get(name), list)][:1]


def measures_of(records: Sequence[Record], variables: Sequence[str]) -> list[str]:
    """Return the keys of numbers that are neither variables nor ends of a spread.

    Args:
        records: Of a group.
        variables: The independent ones.
    """
    beside = {name for record in records for key in record for name in companions(record, key)}
    keys = dict.fromkeys(key for record in records for key in record)
    return [
        key
        for key in keys
        if key not in variables
        and key not in beside
        and any(number(record.get(key)) is not None for record in records)
    ]


def measured(records: Iterable[Record], key: str) -> Measured | None:
    """Return a record's value and spread, or the median over several that are otherwise alike.

    Args:
        records: Of the same case.
        key: Of the measure.
    """
    found = []
    for record in records:
        value = number(record.get(key))
        if value is None:
            continue
        ends: list[Any] = [record[name] for name in companions(record, key)]
        ends = ends[0] if len(ends) == 1 else ends
        numbers = [each for end in ends if (each := number(end)) is not None]
        found.append(Measured(value, min([value, *numbers]), max([value, *numbers])))
    if not found:
        return None
    middle = statistics.median(each.value for each in found)
    return Measured(middle, min(each.low for each in found), max(each.high for each in found))


def varied(records: Sequence[Record], variables: Sequence[str]) -> list[str]:
    """Return the variables that are not the same in all records.

    Args:
        records: Of a group.
        variables: The independent ones.
    """
    return [key for key in variables if len({short(each.get(key)) for each in records}) > 1]


def axis(records: Sequence[Record], variables: Sequence[str]) -> tuple[str, list[str]] | None:
    """Choose the variable for the x axis, and those of which every combination is a line.

    The x axis is the number with the most values, of those that leave a line with two points. What
    follows from the x axis, as a case's name may, makes no lines.

    Args:
        records: Of a group.
        variables: The independent ones.

    Returns:
        None where no variable does: then every record is a bar.
    """
    vary = varied(records, variables)
    best: tuple[int, str, list[str]] | None = None
    for x in vary:
        if any(number(record.get(x)) is None for record in records):
            continue
        values = {record[x] for record in records}
        lines = [
            key
            for key in vary
            if key != x
            and len({(record[x], short(record.get(key))) for record in records}) > len(values)
        ]
        points: dict[tuple[str, ...], set[float]] = {}
        for record in records:
            points.setdefault(line_of(record, lines), set()).add(record[x])
        in_lines = sum(len(each) for each in points.values() if len(each) > 1)
        most = sum(len(each) for each in points.values())
        if 2 * in_lines > most and (best is None or len(values) > best[0]):
            best = len(values), x, lines
    return None if best is None else best[1:]


def line_of(record: Record, lines: Sequence[str]) -> tuple[str, ...]:
    """Return the line that a record belongs to, by the values of these variables.

    Args:
        record: Of a benchmark.
        lines: Keys of the variables.
    """
    return tuple(short(record.get(key)) for key in lines)
