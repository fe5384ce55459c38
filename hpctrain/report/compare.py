"""Compare runs side by side: ranks, speed, efficiency, and how they ended."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpctrain.errors import Error
from hpctrain.files import json_lines

Record = dict[str, Any]


class Row(NamedTuple):
    """A run, as `hpctrain compare` shows it.

    Attributes:
        run: Its folder, or what else it was called.
        ranks: How many computed.
        samples_per_second: Of all together: the median over its lines, but for the first.
        efficiency: Speed of a rank, by that of a rank of the smallest run, or by the median of
            these where several are as small.
        metrics: The last ones.
    """

    run: str
    ranks: int
    samples_per_second: float
    efficiency: float
    metrics: dict[str, float]


def compare(runs: Sequence[Path]) -> list[Row]:
    """Compare runs, in the order of their number of ranks.

    Raises:
        Error: One has no metrics.
    """
    return side_by_side({str(run): records_of(run) for run in runs})


def side_by_side(runs: Mapping[str, Sequence[Record]]) -> list[Row]:
    """Compare runs by the records of their ``metrics.jsonl``.

    Raises:
        Error: One has no metrics.
    """
    found = []
    for run, records in runs.items():
        speeds = speeds_of(records)
        sizes = [r["size"] for r in records if r.get("kind") == "event" and _is_size(r.get("size"))]
        if not speeds or not sizes:
            raise Error(f"{run} has no metrics.", hint="name run folders of `hpctrain train`.")
        last = next((r for r in reversed(records) if r.get("kind") == "validation"), records[-1])
        metrics = {k: v for k, v in last.items() if k in ("loss", "accuracy")}
        speed = statistics.median(speeds[1:] or speeds)
        found.append(Row(str(run), sizes[-1], float(speed), 1.0, metrics))
    found.sort(key=lambda row: row.ranks)
    alone = statistics.median(
        row.samples_per_second / row.ranks for row in found if row.ranks == found[0].ranks
    )
    return [row._replace(efficiency=row.samples_per_second / row.ranks / alone) for row in found]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value > 0


def speeds_of(records: Sequence[Record]) -> list[float]:
    """Return samples per second, of each line of training that says it."""
    speeds = [r.get("samples_per_second") for r in records if r.get("kind") == "train"]
    most = sys.float_info.max
    return [float(s) for s in speeds if isinstance(s, (int, float)) and 0 < s <= most]


def records_of(run: Path) -> list[Record]:
    """Read the lines of a run's ``metrics.jsonl``, but for those that were cut off."""
    with contextlib.suppress(OSError):
        return list(json_lines(run / "metrics.jsonl"))
    return []
