"""Runs side by side: ranks, speed, efficiency, and how they ended."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpctrain.errors import Error


class Row(NamedTuple):
    """A run.

    Attributes:
        run: Its folder.
        ranks: How many computed.
        samples_per_second: Of all together: the median over its lines, but for the first.
        efficiency: Speed of a rank, by that of a rank of the smallest run.
        metrics: The last ones.
    """

    run: str
    ranks: int
    samples_per_second: float
    efficiency: float
    metrics: dict[str, float]


def compare(runs: Sequence[Path]) -> list[Row]:
    """Runs by their number of ranks.

    Raises:
        Error: One has no metrics.
    """
    found = []
    for run in runs:
        records = _read(run / "metrics.jsonl")
        speeds = [r["samples_per_second"] for r in records if r.get("kind") == "train"]
        sizes = [r["size"] for r in records if r.get("kind") == "event" and "size" in r]
        if not speeds or not sizes:
            raise Error(f"{run} has no metrics.", hint="name run folders of `hpctrain train`.")
        last = next((r for r in reversed(records) if r.get("kind") == "validation"), records[-1])
        metrics = {k: v for k, v in last.items() if k in ("loss", "accuracy")}
        speed = statistics.median(speeds[1:] or speeds)
        found.append(Row(str(run), int(sizes[-1]), float(speed), 1.0, metrics))
    found.sort(key=lambda row: row.ranks)
    alone = found[0].samples_per_second / found[0].ranks
    return [row._replace(efficiency=row.samples_per_second / row.ranks / alone) for row in found]


def _read(path: Path) -> list[dict[str, Any]]:
    records = []
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records
