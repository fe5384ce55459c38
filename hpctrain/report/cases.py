"""Show a benchmark: a table of each group of its records, and plots of its measures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

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
from hpctrain.report.variables import (
    axis,
    companions,
    groups_of,
    line_of,
    measured,
    measures_of,
    variables_of,
    varied,
)

FOOTNOTE = "* more ranks than cores"
UNPLOTTED = ("error", "rounds", "batch", "seed")
FIRST_PLOTTED = ("_per_second", "_ms", "_us", "_seconds", "seconds", "Bps", "bps")
MOST_PLOTS, MOST_BARS = 6, 40
LOG_X, LOG_Y = 20, 50


def section(benchmark: Benchmark) -> Section:
    """Return the section of a benchmark: all its tables and plots."""
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


def table(title: str, records: Sequence[Record], variables: Sequence[str]) -> Table:
    """Return a table with a row for each record.

    Args:
        title: Above it.
        records: Of a group.
        variables: The independent ones, by their keys.
    """
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


def figures(title: str, records: Sequence[Record], variables: Sequence[str]) -> list[Figure]:
    """Plot each measure that differs between records; where some have a spread, those alone.

    Args:
        title: Above each.
        records: Of a group.
        variables: The independent ones, by their keys.
    """
    measures = measures_of(records, variables)
    differ = [
        key
        for key in measures
        if key not in UNPLOTTED
        and not (key.startswith("best_") and f"median_{key.removeprefix('best_')}" in measures)
        and len({number(record.get(key)) for record in records} - {None}) > 1
    ]
    kept = [k for k in differ if any(companions(record, k) for record in records)] or differ
    kept.sort(key=lambda key: not key.endswith(FIRST_PLOTTED))
    axes = axis(records, variables)
    drawn = (
        bars(title, key, records, variables)
        if axes is None
        else over_axis(title, key, records, *axes)
        for key in kept
    )
    return [figure for figure in drawn if figure is not None]


def over_axis(
    title: str, key: str, records: Sequence[Record], x: str, lines: Sequence[str]
) -> Plot | None:
    """Plot a measure over a variable, with a line for each combination of the others.

    Args:
        title: Above it.
        key: Of the measure.
        records: Of a group.
        x: The variable of the x axis.
        lines: The others.
    """
    series = []
    ordered = sorted(
        (record for record in records if number(record.get(key)) is not None),
        key=lambda record: (line_of(record, lines), record[x]),
    )
    for look, (line, members) in enumerate(groupby(ordered, key=lambda r: line_of(r, lines))):
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
    low = [y for each in series for y in each.low]
    high = [y for each in series for y in each.high]
    log_y = wide(low, LOG_Y)
    return Plot(
        name=file_name(title, key),
        title=f"{title}: {words(key)}",
        x_label=words(x),
        y_label=words(key),
        series=series,
        caption=_caption(low, high, any(any(each.hollow) for each in series), "Hollow points"),
        log_x=wide([value for each in series for value in each.x], LOG_X),
        log_y=log_y,
        from_zero=not log_y and min(low) >= 0,
    )


def _named(line: Sequence[str], lines: Sequence[str], records: Sequence[Record]) -> str:
    parts = []
    for key, value in zip(lines, line, strict=True):
        text = any(isinstance(record.get(key), str) for record in records)
        if value:
            parts.append(value if text else f"{words(key)} {value}")
    return ", ".join(parts) or "all"


def bars(title: str, key: str, records: Sequence[Record], variables: Sequence[str]) -> Bars | None:
    """Return a bar of a measure for every record; None: they are too many, or too few.

    Args:
        title: Above it.
        key: Of the measure.
        records: Of a group.
        variables: The independent ones, by their keys.
    """
    vary = varied(records, variables) or list(variables[:1])
    names = next(
        (vary[:n] for n in range(1, len(vary)) if _distinguish(vary[:n], records)), vary
    )  # fmt: skip
    shown = [(record, each) for record in records if (each := measured([record], key)) is not None]
    if not 1 < len(shown) <= MOST_BARS:
        return None
    starred = [record.get("oversubscribed") is True for record, _ in shown]
    low, high = [each.low for _, each in shown], [each.high for _, each in shown]
    log_x = wide(low, LOG_Y)
    return Bars(
        name=file_name(title, key),
        title=f"{title}: {words(key)}",
        x_label=words(key),
        labels=[_named(line_of(record, names), names, records) for record, _ in shown],
        values=[each.value for _, each in shown],
        low=low,
        high=high,
        hatched=starred,
        caption=_caption(low, high, any(starred), "Hollow points" if log_x else "Hatched bars"),
        log_x=log_x,
    )


def _distinguish(names: Sequence[str], records: Sequence[Record]) -> bool:
    return len({line_of(record, names) for record in records}) == len(records)


def _caption(low: Sequence[float], high: Sequence[float], starred: bool, what: str) -> str:
    about = "Median, and from the least to the largest." if list(low) != list(high) else ""
    return f"{about} {what}: more ranks than cores.".strip() if starred else about
