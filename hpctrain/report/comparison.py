"""Compare runs in tables: how they ended, their configurations, and their versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpctrain.report.figures import Section, Table, short
from hpctrain.report.runs import Run

OVERSUBSCRIBED = "* more ranks than cores"


def section(runs: Sequence[Run]) -> Section:
    """Return the section that compares runs: all tables, and each configuration as a whole."""
    found = Section("Runs" if len(runs) > 1 else "Run")
    found.tables.append(results(runs))
    if len(runs) > 1:
        rows = differences(runs)
        if rows:
            head = ["key", *(run.label for run in runs)]
            found.tables.append(Table("What differs in the configurations", head, rows))
        else:
            found.text.append("The configurations do not differ.")
    versions = versions_of(runs)
    if versions:
        completed = [run.label for run in runs if run.result]
        head = ["package", *completed]
        if len(completed) > 1 and all(len(set(row[1:])) == 1 for row in versions):
            head, versions = ["package", "all runs"], [row[:2] for row in versions]
        missing = [run.label for run in runs if not run.result]
        note = f"Known of completed runs only: not of {', '.join(missing)}." if missing else ""
        found.tables.append(Table("Versions", head, versions, note))
    found.details += [(f"Configuration of {run.label}", run.toml) for run in runs if run.toml]
    return found


def results(runs: Sequence[Run]) -> Table:
    """Return a table of results, with a row for each run."""
    final = {run.label: _metrics(run, "final") or run.metrics for run in runs}
    best = {run.label: _best(run) for run in runs}
    finals = list(dict.fromkeys(name for each in final.values() for name in each))
    bests = list(dict.fromkeys(name for each in best.values() for name in each))
    head = ["run", "state", "task", "strategy", "ranks", "global batch", "steps", "epochs",
            "samples/s", *(f"last {name}" for name in finals),
            *(f"{name} at its best" for name in bests)]  # fmt: skip
    rows = []
    for run in runs:
        last = max(run.records, key=lambda record: float(record["step"]))
        epoch = next((r["epoch"] for r in reversed(run.records) if "epoch" in r), None)
        rows.append(
            [
                run.label, run.state, short(run.config.get("task")), run.strategy, run.ranks,
                short(run.config.get("train.batch_size")),
                short(run.result.get("steps", last["step"])),
                short(run.result.get("epochs", epoch)), short(run.speed),
                *(short(final[run.label].get(name)) for name in finals),
                *(short(best[run.label].get(name)) for name in bests),
            ]
        )  # fmt: skip
    starred = any(run.oversubscribed for run in runs)
    return Table("Results", head, rows, f"{OVERSUBSCRIBED}." if starred else "")


def _metrics(run: Run, which: str) -> dict[str, Any]:
    return _dict(_dict(run.result.get("metrics")).get(which))


def _best(run: Run) -> dict[str, Any]:
    return _dict(_metrics(run, "best").get("metrics"))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """List the keys whose values differ between runs, with their values; but for ``out``."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "out")
    rows = [[key, *(short(run.config.get(key)) for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def versions_of(runs: Sequence[Run]) -> list[list[str]]:
    """List the versions of packages, and the host, over runs that are completed."""
    found = [
        {**_dict(run.result.get("versions")), "host": run.result.get("host")}
        for run in runs
        if run.result
    ]
    names = dict.fromkeys(name for each in found for name in each)
    return [[name, *(short(each.get(name)) for each in found)] for name in names]
