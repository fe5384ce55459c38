"""Plot runs: metrics, learning rate, throughput, waiting, staleness, ranks, and events."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hpctrain.report.compare import Record
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
    thin,
    wide,
    words,
)
from hpctrain.report.runs import Run, metrics_of
from hpctrain.train.step_timer import PARTS

LOG_LOSS = 200
MOST_GAPS = 100  # values of a histogram up to which those that never came are shown as 0
Value = Callable[[Record], Any]


def learning(runs: Sequence[Run]) -> Section:
    """Return plots of metrics over steps and, of several runs, over time; and the learning rate."""
    found = Section("Learning")
    kinds = ("train", "validation")
    names = dict.fromkeys(
        name for run in runs for kind in kinds for r in run.of(kind) for name in metrics_of(r)
    )
    for name in sorted(names, key=lambda name: (name != "loss", name != "accuracy")):
        for x in ("step", "seconds") if len(runs) > 1 else ("step",):
            found.figures += _metric(runs, name, x)
    found.figures += _plot(runs, "train", "lr", "learning rate")
    found.figures += _plot(runs, "train", "grad_norm", "norm of gradients")
    return found


def _metric(runs: Sequence[Run], name: str, x: str) -> list[Plot]:
    series = []
    for look, run in enumerate(runs):
        both = [_series(run, look, kind, name, x=x) for kind in ("train", "validation")]
        if all(both):
            alone = len(runs) == 1
            train, validation = ((each[0].x, each[0].y) for each in both)
            label = "training" if alone else ""
            series.append(Series(label, *train, look=look, faint=True))
            series.append(Series("validation" if alone else run.label, *validation, look=look))
        else:
            series += [line for each in both for line in each]
    values = [y for each in series for y in each.y]
    return _of(
        series,
        file_name(name, "over", x),
        f"{words(name)} over {'time' if x == 'seconds' else 'steps'}",
        words(name),
        x_label="time (s)" if x == "seconds" else "step",
        caption="Thin: training. Thick, with markers: validation."
        if any(each.faint for each in series)
        else "",
        log_y=name.endswith("loss") and wide(values, LOG_LOSS),
    )


def speed(runs: Sequence[Run]) -> Section:
    """Return the plots of throughput, waiting for input, and the exchange of gradients."""
    found = Section("Speed")
    marks = _marks(runs)
    about = (
        {"caption": "Vertical lines: the ranks changed, or the run was resumed."} if marks else {}
    )
    found.figures += _plot(
        runs, "train", "samples_per_second", "throughput", from_zero=True, marks=marks, **about
    )
    found.figures += parts(runs)
    found.figures += _plot(
        runs, "train", "input_wait_ms", "waiting for input", "ms a step", from_zero=True
    )
    found.figures += _plot(
        runs, "train", "input_wait_share", "waiting for input, as a share of the time",
        "share of the time", from_zero=True,
    )  # fmt: skip
    return found


def parts(runs: Sequence[Run]) -> list[Figure]:
    """Plot where the time of a step goes: the median over a run's lines, but for the first."""
    found = {}
    for run in runs:
        lines = run.of("timing")
        values = [
            [each for line in lines[1:] or lines if (each := number(line.get(f"{part}_ms")))]
            for part in PARTS
        ]
        if lines:
            found[run.label] = [statistics.median(each) if each else 0.0 for each in values]
    if not found:
        return []
    lengths = dict(zip(PARTS, zip(*found.values(), strict=True), strict=True))
    caption = "Exchange: what is left of it when backward is done, waiting for others included."
    return [
        Stacks(
            file_name("parts-of-a-step"), "Where the time of a step goes", "ms", list(found),
            lengths, caption,
        )
    ]  # fmt: skip


def exchange(runs: Sequence[Run]) -> Section:
    """Return the plots of bytes exchanged; of a parameter server also staleness and delay."""
    found = Section("Exchange")
    found.text.append("Bytes of all ranks together, with headers left out.")
    if any("staleness_mean" in record for run in runs for record in run.of("exchange")):
        found.text.append(
            "Staleness: a worker's clock minus the slowest worker's. Delay: updates that a push "
            "missed."
        )
    for name in ("staleness", "delay"):
        unit = "clocks" if name == "staleness" else "updates"
        found.figures += _plot(
            runs, "exchange", f"{name}_mean", f"{name}, mean over workers", f"{name} ({unit})",
            from_zero=True,
        )  # fmt: skip
        found.figures += _plot(
            runs, "exchange", partial(_largest, key=f"{name}_histogram"),
            f"largest {name}", f"{name} ({unit})", from_zero=True,
        )  # fmt: skip
        found.figures += _histogram(runs, name, unit)
    found.figures += _plot(
        runs, "exchange", lambda r: (number(r.get("moved_bytes")) or 0) / 1e6,
        "bytes moved between lines of the log", "MB", from_zero=True,
    )  # fmt: skip
    found.figures += _plot(
        runs, "exchange", lambda r: (number(r.get("dense_bytes")) or 0) / 1e6,
        "the same bytes without compression", "MB", from_zero=True,
    )  # fmt: skip
    found.figures += _plot(
        runs, "exchange", "compression", "compression", "dense bytes / moved bytes"
    )
    return found


def _counts(record: Record, key: str) -> dict[int, float]:
    histogram = record.get(key)
    if not isinstance(histogram, dict):
        return {}
    return {int(k): n for k, v in histogram.items() if k.isdecimal() and (n := number(v))}


def _largest(record: Record, key: str) -> int | None:
    return max(_counts(record, key), default=None)


def _histogram(runs: Sequence[Run], name: str, unit: str) -> list[Plot]:
    series = []
    for look, run in enumerate(runs):
        counts: Counter[int] = Counter()
        for record in run.of("exchange"):
            counts.update(_counts(record, f"{name}_histogram"))
        if total := sum(counts.values()):
            x = sorted(counts.keys() | range(min(max(counts), MOST_GAPS)))
            y = [counts[value] / total for value in x]
            series.append(Series(run.label, *thin([float(v) for v in x], y), look=look))
    title = f"distribution of {name}"
    return _of(
        series, file_name(name, "histogram"), title, "share of all", x_label=f"{name} ({unit})",
        from_zero=True,
    )  # fmt: skip


def changes(runs: Sequence[Run]) -> Section:
    """Return the plots of ranks over steps, and each change with how long its step took."""
    found = Section("Ranks lost and joined")
    rows = []
    for run in runs:
        for record in _events(run):
            lost, took = record.get("lost"), number(record.get("step_ms"))
            what = "lost" if lost is not None else "joined" if "joined" in record else "resumed"
            rows.append(
                [
                    run.label, what, short(record["step"]), f"{record['seconds']:.1f}",
                    short(record.get("size")), short(took), short(run.step_ms),
                    str(record.get("reason", "")),
                ]
            )  # fmt: skip
    head = ["run", "event", "step", "time (s)", "ranks after", "that step took (ms)",
            "a step usually takes (ms)", "what happened"]  # fmt: skip
    found.tables.append(Table("Changes of the world, with the time to recover", head, rows))
    series = []
    for look, run in enumerate(runs):
        last = max(float(record["step"]) for record in run.records)
        steps = [step for step, _ in run.sizes]
        sizes = [float(size) for _, size in run.sizes]
        if steps:
            series.append(
                Series(run.label, [*steps, max(last, steps[-1])], [*sizes, sizes[-1]], look=look,
                       stepped=True)
            )  # fmt: skip
    found.figures += _of(
        series, "ranks", "ranks that compute", "ranks", marks=_marks(runs), from_zero=True,
        caption="Vertical lines: a rank was lost or joined, or the run was resumed.",
    )  # fmt: skip
    return found


def _events(run: Run) -> list[Record]:
    """All but the start."""
    return run.of("event")[1:]


def changed(run: Run) -> bool:
    """Whether there is any event but the start."""
    return bool(_events(run))


def _marks(runs: Sequence[Run]) -> list[tuple[float, int]]:
    return [
        (float(record["step"]), look) for look, run in enumerate(runs) for record in _events(run)
    ]


def _series(run: Run, look: int, kind: str, value: str | Value, x: str = "step") -> list[Series]:
    get: Value = (lambda record: record.get(value)) if isinstance(value, str) else value
    points = [
        (float(record[x]), found)
        for record in run.of(kind)
        if (found := number(get(record))) is not None
    ]
    if not points:
        return []
    xs, ys = zip(*points, strict=True)
    return [Series(run.label, *thin(xs, ys), look=look)]


def _plot(
    runs: Sequence[Run], kind: str, value: str | Value, title: str, y_label: str = "", **about: Any
) -> list[Plot]:
    """Plot a key over steps, of runs that have it; no plot where none has, or nothing but zeros."""
    series = [s for look, run in enumerate(runs) for s in _series(run, look, kind, value)]
    if not isinstance(value, str) and not any(y for each in series for y in each.y):
        return []
    label = y_label or (words(value) if isinstance(value, str) else title)
    return _of(series, file_name(title), title, label, **about)


def _of(
    series: Sequence[Series],
    name: str,
    title: str,
    y_label: str,
    x_label: str = "step",
    **about: Any,
) -> list[Plot]:
    if not series:
        return []
    return [Plot(name, title[0].upper() + title[1:], x_label, y_label, series, **about)]
