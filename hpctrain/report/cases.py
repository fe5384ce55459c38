"""What is shown of a benchmark's records: which are variables, which are measures, which plots.

By the project's conventions a record begins with its independent variables, a measure's key ends in
its unit, and beside ``KEY`` stand ``KEY_min`` and ``KEY_max``, or ``KEY_spread``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from hpctrain.report.benchmarks import Benchmark, Record
from hpctrain.report.figures import (
    Bars,
    Figure,
    Plot,
    Section,
    Series,
    Table,
    file_name,
    number,
    short,
    spread,
    wide,
    words,
)

FOOTNOTE = "* more ranks than cores"
AFTER_VARIABLES = ("oversubscribed", "rounds", "failed", "skipped")
UNPLOTTED = ("error", "rounds", "batch", "seed")
FIRST_PLOTTED = ("_per_second", "_ms", "_us", "_seconds", "seconds", "Bps", "bps")
MOST_PLOTS, MOST_BARS = 6, 40
LOG_X, LOG_Y = 20, 50


class Measured(NamedTuple):
    """A measure of one or more records: the median and from where to where it goes."""

    value: float
    low: float
    high: float


def section(benchmark: Benchmark) -> Section:
    """All of a benchmark."""
    found = Section(f"Benchmark: {benchmark.name}")
    found.text.append(f"{benchmark.path.name}, {len(benchmark.records)} records")
    if benchmark.targets:
        head = list(dict.fromkeys(key for each in benchmark.targets for key in each))
        rows = [[short(each.get(key)) for key in head] for each in benchmark.targets]
        found.tables.append(Table("Targets", [words(key) for key in head], rows))
    for group, records in groups_of(benchmark.records).items():
        title = f"{benchmark.name} {group}".strip()
        variables = variables_of(records)
        found.tables.append(table(title, records, variables))
        plots = figures(title, records, variables)
        if len(plots) > MOST_PLOTS:
            found.text.append(
                f"{title}: plots of {MOST_PLOTS} of {len(plots)} measures; all are in the table."
            )
        found.figures += plots[:MOST_PLOTS]
    about = "\n".join(
        f"{key}: {'' if value is None else value}" for key, value in benchmark.about.items()
    )
    found.details.append(("Versions, machine and settings", about))
    return found


def groups_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by their ``group``, which is then left out of them."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        kept = {key: value for key, value in record.items() if key != "group"}
        groups.setdefault(short(record.get("group")), []).append(kept)
    return groups


def variables_of(records: Sequence[Record]) -> list[str]:
    """The independent variables: the keys that records begin with.

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
    """The keys beside a key that hold its spread: two for its ends, or one for both."""
    if {f"{key}_min", f"{key}_max"} <= set(record):
        return [f"{key}_min", f"{key}_max"]
    stem = key.removesuffix("_median")
    names = [f"{key}_spread", f"{stem}_spread", f"{stem}_quartiles"]
    keys = list(record)
    if keys[keys.index(key) + 1 :][:1] == ["spread"] if key in record else False:
        names.append("spread")
    return [name for name in names if isinstance(record.get(name), list)][:1]


def measures_of(records: Sequence[Record], variables: Sequence[str]) -> list[str]:
    """The numbers that are neither variables nor ends of a spread."""
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
    """Of one record with its spread, or the median over several that differ in nothing else."""
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
    """The variables that are not the same in all records."""
    return [key for key in variables if len({short(each.get(key)) for each in records}) > 1]


def table(title: str, records: Sequence[Record], variables: Sequence[str]) -> Table:
    """A row a record."""
    vary = varied(records, variables) or list(variables[:1])
    constant = [
        f"{words(key)} {short(records[0].get(key))}" for key in variables if key not in vary
    ]
    measures = measures_of(records, variables)
    beside = {name for record in records for key in record for name in companions(record, key)}
    others = [
        key
        for key in dict.fromkeys(key for record in records for key in record)
        if key not in (*variables, *measures, *beside, "oversubscribed")
        and any(isinstance(record.get(key), (str, bool)) or key == "failed" for record in records)
    ]
    rows = []
    for record in records:
        row = [short(record.get(key)) for key in vary] or [""]
        row[0] += "*" * (record.get("oversubscribed") is True)
        for key in measures:
            each = measured([record], key)
            row.append("" if each is None else spread(*each))
        rows.append([*row, *(_text(record.get(key)) for key in others)])
    starred = any(record.get("oversubscribed") is True for record in records)
    notes = [
        f"In all: {', '.join(constant)}." if constant else "", f"{FOOTNOTE}." if starred else ""
    ]  # fmt: skip
    head = [words(key) for key in (*(vary or [""]), *measures, *others)]
    return Table(f"{title}: median (least..largest)", head, rows, " ".join(filter(None, notes)))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return short(value[0]) if value else ""
    return short(value)


def axis(records: Sequence[Record], variables: Sequence[str]) -> tuple[str, list[str]] | None:
    """The variable for the x axis, and those of which every combination is a line.

    The x axis is the number with the most values, of those that leave a line with two points. What
    follows from the x axis, as a case's name may, makes no lines.

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
            points.setdefault(_line(record, lines), set()).add(record[x])
        in_lines = sum(len(each) for each in points.values() if len(each) > 1)
        most = sum(len(each) for each in points.values())
        if 2 * in_lines > most and (best is None or len(values) > best[0]):
            best = len(values), x, lines
    return None if best is None else best[1:]


def _line(record: Record, lines: Sequence[str]) -> tuple[str, ...]:
    return tuple(short(record.get(key)) for key in lines)


def figures(title: str, records: Sequence[Record], variables: Sequence[str]) -> list[Figure]:
    """A plot for each measure that differs between records, of those with a spread if any has."""
    measures = measures_of(records, variables)
    with_spread = [k for k in measures if any(companions(record, k) for record in records)]
    kept = [
        key
        for key in with_spread or measures
        if key not in UNPLOTTED
        and not (key.startswith("best_") and f"median_{key.removeprefix('best_')}" in measures)
        and len({number(record.get(key)) for record in records} - {None}) > 1
    ]
    kept.sort(key=lambda key: not key.endswith(FIRST_PLOTTED))
    axes = axis(records, variables)
    drawn = (
        bars(title, key, records, variables)
        if axes is None
        else lines_of(title, key, records, *axes)
        for key in kept
    )
    return [figure for figure in drawn if figure is not None]


def lines_of(
    title: str, key: str, records: Sequence[Record], x: str, lines: Sequence[str]
) -> Plot | None:
    """A measure over a variable, a line for each combination of the others."""
    series = []
    ordered = sorted(
        (record for record in records if number(record.get(key)) is not None),
        key=lambda record: (_line(record, lines), record[x]),
    )
    for look, (line, members) in enumerate(groupby(ordered, key=lambda r: _line(r, lines))):
        points = [
            (float(value), each, any(r.get("oversubscribed") is True for r in same))
            for value, group in groupby(members, key=lambda r: r[x])
            if (each := measured(same := list(group), key)) is not None
        ]
        series.append(
            Series(
                label=_named(line, lines, ordered),
                x=[value for value, _, _ in points],
                y=[each.value for _, each, _ in points],
                low=[each.low for _, each, _ in points],
                high=[each.high for _, each, _ in points],
                look=look,
                hollow=[starred for _, _, starred in points],
            )
        )
    if not series:
        return None
    log_y = wide([y for each in series for y in each.low], LOG_Y)
    return Plot(
        name=file_name(title, key),
        title=f"{title}: {words(key)}",
        x_label=words(x),
        y_label=words(key),
        series=series,
        caption=_caption(any(any(each.hollow) for each in series), "Hollow points"),
        log_x=wide([value for each in series for value in each.x], LOG_X),
        log_y=log_y,
        from_zero=not log_y and min(y for each in series for y in each.low) >= 0,
    )


def _named(line: Sequence[str], lines: Sequence[str], records: Sequence[Record]) -> str:
    parts = []
    for key, value in zip(lines, line, strict=True):
        text = any(isinstance(record.get(key), str) for record in records)
        if value:
            parts.append(value if text else f"{words(key)} {value}")
    return ", ".join(parts) or "all"


def bars(title: str, key: str, records: Sequence[Record], variables: Sequence[str]) -> Bars | None:
    """A measure of every record; of nothing if they are too many to be read."""
    vary = varied(records, variables) or list(variables[:1])
    names = next(
        (vary[:n] for n in range(1, len(vary)) if _distinguish(vary[:n], records)), vary
    )  # fmt: skip
    shown = [(record, each) for record in records if (each := measured([record], key)) is not None]
    if not 1 < len(shown) <= MOST_BARS:
        return None
    starred = [record.get("oversubscribed") is True for record, _ in shown]
    return Bars(
        name=file_name(title, key),
        title=f"{title}: {words(key)}",
        x_label=words(key),
        labels=[_named(_line(record, names), names, records) for record, _ in shown],
        values=[each.value for _, each in shown],
        low=[each.low for _, each in shown],
        high=[each.high for _, each in shown],
        hatched=starred,
        caption=_caption(any(starred), "Hatched bars"),
        log_x=wide([each.low for _, each in shown], LOG_Y),
    )


def _distinguish(names: Sequence[str], records: Sequence[Record]) -> bool:
    return len({_line(record, names) for record in records}) == len(records)


def _caption(starred: bool, what: str) -> str:
    about = "Median, and from the least to the largest."
    return f"{about} {what}: more ranks than cores." if starred else about
