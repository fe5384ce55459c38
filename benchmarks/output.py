"""What the benchmarks of the model print and write."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpctrain.process import cores

SCHEMA = 1
PACKAGES = ("hpctrain", "numpy", "scipy")


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
