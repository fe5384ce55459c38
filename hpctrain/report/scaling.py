"""Plot throughput and efficiency over ranks, of runs that are otherwise as fast."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from hpctrain.report import cases
from hpctrain.report.benchmarks import Benchmark, Record
from hpctrain.report.compare import Row, side_by_side, speeds_of
from hpctrain.report.comparison import differences
from hpctrain.report.figures import (
    Figure,
    Plot,
    Section,
    Series,
    Stacks,
    Table,
    file_name,
    number,
    short,
    spread,
)
from hpctrain.report.runs import Run
from hpctrain.report.variables import groups_of, measured
from hpctrain.train.step_timer import PARTS

WITHOUT_WEIGHT = (
    "out", "resume", "seed", "world_size", "timeout_seconds", "train.epochs", "train.steps",
    "train.patience", "train.batch_size", "optimizer.lr",
)  # fmt: skip
"""Keys of the configuration that do not decide the speed of a rank, or that scaling changes."""
SECTIONS_WITHOUT_WEIGHT = ("schedule.", "checkpoint.", "interrupt.", "log.")


def families(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that differ in their number of ranks, and in nothing else that decides speed.

    A run whose world changed has no speed of one number of ranks, and is in none.
    """
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        if len({size for _, size in run.sizes}) == 1 and speeds_of(run.records):
            key = tuple(
                (name, str(value)) for name, value in sorted(run.config.items()) if _weighs(name)
            )
            found.setdefault(key, []).append(run)
    return [family for family in found.values() if len({run.ranks for run in family}) > 1]


def kind_of(family: Sequence[Run]) -> str:
    """Tell weak from strong scaling, by the global batches."""
    batches = [(run.config.get("train.batch_size"), int(run.ranks)) for run in family]
    if len({batch for batch, _ in batches}) == 1:
        return f"strong scaling, global batch {short(batches[0][0])}"
    if len({batch / ranks for batch, ranks in batches if isinstance(batch, int)}) == 1:
        return "weak scaling, the same batch a rank"
    return "global batches differ"


def section(runs: Sequence[Run]) -> Section | None:
    """Return the section on scaling of every task; None where no runs scale."""
    found = Section("Scaling")
    tasks: dict[str, list[list[Run]]] = {}
    for family in families(runs):
        tasks.setdefault(str(family[0].config.get("task")), []).append(family)
    for task, members in tasks.items():
        _add(found, task, members)
    left_out = [run.label for run in runs if len({size for _, size in run.sizes}) > 1]
    if left_out and tasks:
        found.text.append(f"Left out, because their ranks changed: {', '.join(left_out)}.")
    return found if tasks else None


def _add(found: Section, task: str, members: Sequence[Sequence[Run]]) -> None:
    table, speed, efficiency, ideal = [], [], [], []
    for look, (name, family) in enumerate(zip(_names(members), members, strict=True)):
        rows = side_by_side({str(place): run.records for place, run in enumerate(family)})
        starred = {int(run.ranks) for run in family if run.oversubscribed}
        speed.append(_series(name, rows, "samples_per_second", look, starred))
        efficiency.append(_series(name, rows, "efficiency", look, starred))
        ideal.append((rows[0].ranks, speed[-1].y[0], max(row.ranks for row in rows)))
        for place, ranks in enumerate(speed[-1].x):
            cells = [
                spread(each.y[place], each.low[place], each.high[place])
                for each in (speed[-1], efficiency[-1])
            ]
            star = "*" * (int(ranks) in starred)
            count = sum(row.ranks == ranks for row in rows)
            table.append([name, short(ranks) + star, *cells, str(count)])
    stars = any(any(each.hollow) for each in speed)
    note = "* more ranks than cores" if stars else ""
    caption = "Hollow points: more ranks than cores." if stars else ""
    found.tables.append(
        Table(
            f"{task}: efficiency is the speed of a rank, by that of a rank of the smallest run",
            ["runs", "ranks", "samples/s", "efficiency", "how many"],
            table,
            note,
        )
    )
    ranks, alone, most = max(ideal, key=lambda each: each[2])
    ends = [(ranks, alone), (most, alone / ranks * most)]
    found.figures += _plots(task, speed, efficiency, ends, "in the smallest run", caption)


def _plots(
    title: str,
    speed: Sequence[Series],
    efficiency: Sequence[Series],
    ideal: Sequence[tuple[float, float]],
    standard: str,
    caption: str,
) -> list[Plot]:
    """Throughput and efficiency over ranks."""
    return [
        Plot(
            file_name("scaling", title, "throughput"),
            f"{title}: throughput over ranks",
            "ranks",
            "samples/s",
            speed,
            f"Dashed: as fast a rank as {standard}. {caption}".strip(),
            ideal=ideal,
            from_zero=True,
        ),
        Plot(
            file_name("scaling", title, "efficiency"),
            f"{title}: efficiency over ranks",
            "ranks",
            "efficiency",
            efficiency,
            f"Dashed: 1. {caption}".strip(),
            ideal=[(ranks, 1.0) for ranks, _ in ideal],
            from_zero=True,
        ),
    ]


def of_benchmark(benchmark: Benchmark) -> Section:
    """Return the section of ``benchmarks.scaling``: its tables, and plots of each group."""
    found = cases.section(benchmark)
    found.figures.clear()
    for group, records in groups_of(benchmark.records).items():
        found.figures += _of_group(group, records)
    return found


def _of_group(group: str, records: Sequence[Record]) -> list[Figure]:
    speed = _lines(records, "samples_per_second")
    efficiency = _lines(records, "efficiency")
    if not speed or not efficiency:
        return []
    stars = any(any(each.hollow) for each in speed)
    caption = "Hollow points: more ranks than cores." if stars else ""
    # Of whatever efficiency is measured by: its speed of a rank is the same in all records.
    share = speed[0].y[0] / speed[0].x[0] / efficiency[0].y[0] if efficiency[0].y[0] else 0.0
    least, most = (pick(x for each in speed for x in each.x) for pick in (min, max))
    ends = [(least, share * least), (most, share * most)]
    figures: list[Figure] = [
        *_plots(group, speed, efficiency, ends, "by which efficiency is measured", caption)
    ]
    whole = [r for r in records if all(number(r.get(f"{p}_ms")) is not None for p in PARTS)]
    if whole:
        labels = [
            f"{r.get('strategy')}, {r.get('ranks')}{'*' * (r.get('oversubscribed') is True)}"
            for r in whole
        ]
        parts = {part: [float(r[f"{part}_ms"]) for r in whole] for part in PARTS}
        figures.append(
            Stacks(
                file_name("scaling", group, "parts"),
                f"{group}: where the time of a step goes",
                "ms of a step, mean over ranks",
                labels,
                parts,
                "* more ranks than cores" if stars else "",
            )
        )
    return figures


def _lines(records: Sequence[Record], key: str) -> list[Series]:
    """A line for each strategy."""
    found = []
    for look, strategy in enumerate(dict.fromkeys(str(r.get("strategy")) for r in records)):
        points = [
            (ranks, each, r.get("oversubscribed") is True)
            for r in records
            if str(r.get("strategy")) == strategy
            and (ranks := number(r.get("ranks")) or 0.0) > 0
            and (each := measured([r], key)) is not None
        ]
        if points:
            found.append(
                Series(
                    strategy,
                    x=[ranks for ranks, _, _ in points],
                    y=[each.value for _, each, _ in points],
                    low=[each.low for _, each, _ in points],
                    high=[each.high for _, each, _ in points],
                    look=look,
                    hollow=[starred for _, _, starred in points],
                )
            )
    return found


def _names(members: Sequence[Sequence[Run]]) -> list[str]:
    """Strategy and kind of scaling, and what else tells families from each other."""
    largest = [max(family, key=lambda run: int(run.ranks)) for family in members]
    rows = [
        row
        for row in differences(largest)
        if _weighs(row[0]) and row[0] not in ("strategy", "ps.consistency")
    ]
    return [
        ", ".join([run.strategy, kind_of(family), *(f"{row[0]} {row[1 + place]}" for row in rows)])
        for place, (run, family) in enumerate(zip(largest, members, strict=True))
    ]


def _weighs(key: str) -> bool:
    return key not in WITHOUT_WEIGHT and not key.startswith(SECTIONS_WITHOUT_WEIGHT)


def _series(name: str, rows: Sequence[Row], field: str, look: int, starred: set[int]) -> Series:
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(row.ranks, []).append(getattr(row, field))
    return Series(
        name,
        x=list(map(float, values)),
        y=[statistics.median(each) for each in values.values()],
        low=[min(each) for each in values.values()],
        high=[max(each) for each in values.values()],
        look=look,
        hollow=[ranks in starred for ranks in values],
    )
