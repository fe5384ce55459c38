"""Report time and samples to a target accuracy, and the curves on the way there."""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.report import cases
from hpctrain.report.benchmarks import Benchmark, Record
from hpctrain.report.figures import Plot, Section, Series, file_name, number
from hpctrain.report.variables import groups_of

AXES = {"samples": "samples", "seconds": "time (s)"}


def section(benchmark: Benchmark) -> Section:
    """Return the section of ``benchmarks.accuracy``: tables, bars, and curves of each group."""
    found = cases.section(benchmark)
    for group, records in groups_of(benchmark.records).items():
        for key in AXES:
            found.figures += _curves(group, records, key)
    return found


def _curves(group: str, records: Sequence[Record], key: str) -> list[Plot]:
    series = []
    for look, record in enumerate(records):
        points = [
            (float(each[key]), float(each["accuracy"]))
            for each in _points(record.get("curve"))
            if number(each.get(key)) is not None and number(each.get("accuracy")) is not None
        ]
        if points:
            star = "*" * (record.get("oversubscribed") is True)
            series.append(
                Series(
                    f"{record.get('strategy')}, {record.get('ranks')}{star}",
                    x=[x for x, _ in points],
                    y=[y for _, y in points],
                    look=look,
                )
            )
    if not series:
        return []
    notes = ["Medians over seeds."]
    target = next((t for r in records if (t := number(r.get("target"))) is not None), None)
    ends = (min(x for each in series for x in each.x), max(x for each in series for x in each.x))
    if target is not None:
        notes.append("Dashed: the target.")
    if any(record.get("oversubscribed") is True for record in records):
        notes.append("* more ranks than cores.")
    return [
        Plot(
            file_name("accuracy", group, "over", key),
            f"{group}: accuracy over {'time' if key == 'seconds' else key}",
            AXES[key],
            "validation accuracy",
            series,
            " ".join(notes),
            ideal=[] if target is None else [(end, target) for end in ends],
        )
    ]


def _points(curve: object) -> list[Record]:
    return [each for each in curve if isinstance(each, dict)] if isinstance(curve, list) else []
