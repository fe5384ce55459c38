"""The cost model fitted to measurements: parameters, intervals, and errors where it was not fitted.

    python -m benchmarks.fit RECORDS.json --out results

RECORDS.json is a list of measurements (keys: docs/model.md). Strategies that exchange in the same
way are fitted together, and each of these families for itself; --together fits one set to all. The
error of a prediction is that for a place (ranks, nodes, rate of the links) of which the fit saw
nothing.

Prints tables; --out gets fit.json, which `hpctrain advise --fit` takes, and fit.csv.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.command import Add, Arguments, Benchmark, Report
from benchmarks.harness.tables import table
from hpctrain.costmodel.fit import Record, fit, held_out, read_records
from hpctrain.errors import Error


def groups_of(records: Sequence[Record], together: bool) -> dict[str, list[Record]]:
    """Return records by family of strategies."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        name = "all" if together else record.known_strategy.family
        groups.setdefault(name, []).append(record)
    return groups


def fitted(
    name: str, records: Sequence[Record], known: dict[str, float], confidence: float
) -> dict[str, Any]:
    """Return the record of a family's fit, with its errors where it was not fitted.

    Args:
        name: Of the family.
        records: Measurements.
        known: Parameters that are not fitted.
        confidence: Of the intervals.
    """
    found = fit(records, known, confidence)
    errors = held_out(records, known)
    sizes = [abs(error) for error in errors]
    intervals = {key: each._asdict() for key, each in found.intervals().items()}
    return {
        "strategy": name,
        "measurements": len(records),
        "places": len({record.place for record in records}),
        "scatter": found.scatter,
        "held_out_median_error": statistics.median(sizes),
        "held_out_largest_error": max(sizes),
        "parameters": intervals,
        "known": found.known,
    }


def known_of(texts: Sequence[str]) -> dict[str, float]:
    """Return parameters that are given as NAME=VALUE.

    Raises:
        Error: One is not so.
    """
    known = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            known[name] = float(value)
        except ValueError as error:
            hint = "for example --known contention=0."
            raise Error(f"--known {text} is not NAME=VALUE.", hint=hint) from error
    return known


def shown(records: Sequence[dict[str, Any]], confidence: float) -> str:
    """Return the tables of parameters and of errors."""
    rows = [["strategy", "parameter", "estimate", f"{confidence:.0%} interval"]]
    for each in records:
        for name, interval in each["parameters"].items():
            span = f"{interval['low']:.3g}..{interval['high']:.3g}"
            rows.append([each["strategy"], name, f"{interval['value']:.3g}", span])
    errors = [["strategy", "measurements", "places", "median error, held out", "largest"]]
    for each in records:
        sizes = [f"{each[f'held_out_{which}_error']:.1%}" for which in ("median", "largest")]
        errors.append([each["strategy"], str(each["measurements"]), str(each["places"]), *sizes])
    return f"{table(rows)}\n\n{table(errors)}"


def measure(arguments: Arguments) -> Report:
    """Fit each family of strategies."""
    known, confidence = known_of(arguments.known), arguments.confidence
    groups = groups_of(read_records(arguments.records), arguments.together)
    records = [fitted(name, group, known, confidence) for name, group in groups.items()]
    return Report(records, shown(records, confidence), {"confidence": confidence})


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("records", type=Path, help="JSON file of measurements")
    add("--together", action="store_true", help="one fit for all strategies")
    add("--known", action="append", default=[], help="NAME=VALUE, not fitted")
    add("--confidence", type=share, default=0.95, help="of the intervals")


def share(text: str) -> float:
    """Return an option's number between 0 and 1."""
    if not 0 < (found := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return found


BENCHMARK = Benchmark("fit", __doc__, measure, options=options, plots=False)

if __name__ == "__main__":
    BENCHMARK.run()
