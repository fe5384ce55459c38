"""What benchmarks print, write and plot."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpctrain.process import cores
from hpctrain.report.benchmarks import read_benchmark
from hpctrain.report.cases import section
from hpctrain.report.drawing import save

SCHEMA = 1
PACKAGES = ("hpctrain", "torch", "mpi4py", "numpy", "scipy")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Where a record comes from."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    return {**versions, **machine, "cores": cores(), "load": round(os.getloadavg()[0], 2)}


def write(folder: Path, name: str, records: Sequence[dict[str, Any]], **more: Any) -> None:
    """The files NAME.json and NAME.csv; a line of the latter has what is no list or table."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {"schema": SCHEMA, "benchmark": name, "environment": environment()}
    document = {**head, **more, "records": list(records)}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    flat = [{k: v for k, v in each.items() if not isinstance(v, list | dict)} for each in records]
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for each in flat for key in each)))
        writer.writeheader()
        writer.writerows(flat)


def spread_of(key: str, values: Sequence[float]) -> dict[str, float]:
    """A measure of several rounds: the median, the least and the largest; nothing of none."""
    if not values:
        return {}
    ends = min(values), max(values)
    return {key: statistics.median(values), f"{key}_min": ends[0], f"{key}_max": ends[1]}


def spread(record: dict[str, Any], key: str) -> str:
    """What :func:`spread_of` made, as a cell of a table."""
    if key not in record:
        return "failed" if "failed" in record else ""
    return f"{record[key]:.3g} ({record[f'{key}_min']:.3g}..{record[f'{key}_max']:.3g})"


def plots(folder: Path, name: str) -> None:
    """Of NAME.json, as a report has them: PNG and SVG, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        for figure in section(read_benchmark(folder / f"{name}.json")).figures:
            save(figure, folder / figure.name)
