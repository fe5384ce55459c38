"""What benchmarks write: records as JSON and CSV, and plots of them."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.harness.tables import say
from hpctrain.errors import Error
from hpctrain.process import cores
from hpctrain.report import drawing
from hpctrain.report.figures import Figure
from hpctrain.report.page import figures_of

SCHEMA = 1
PACKAGES = ("hpctrain", "torch", "horovod", "mpi4py", "numpy", "scipy")


def environment(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return where a record comes from: versions of what is installed, and the machine.

    Args:
        packages: Besides those that all benchmarks name.
    """
    versions = {}
    for name in (*PACKAGES, *packages):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    return {**versions, **machine, "cores": cores(), "load": round(os.getloadavg()[0], 2)}


def write(folder: Path, name: str, records: Sequence[dict[str, Any]], **more: Any) -> None:
    """Write NAME.json and NAME.csv.

    Args:
        folder: Made where it is missing.
        name: Of the benchmark.
        records: One a case. A line of the CSV file has what in them is no list or table.
        more: What else the JSON file is to hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = {"schema": SCHEMA, "benchmark": name, "environment": environment()}
    document = {**head, **more, "records": list(records)}
    text = json.dumps(document, indent=2, default=str)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    flat = [{k: v for k, v in each.items() if not isinstance(v, list | dict)} for each in records]
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for each in flat for key in each)))
        writer.writeheader()
        writer.writerows(flat)


def plots(folder: Path, name: str, figures: Sequence[Figure] = ()) -> None:
    """Draw what `hpctrain report` shows of NAME.json, as PNG and SVG, if matplotlib is installed.

    Args:
        folder: Where the file is, and the plots go.
        name: Of the benchmark.
        figures: Those to draw instead.
    """
    try:
        drawing.require_matplotlib()
    except Error as error:
        say(f"no plots: {error}")
        return
    found = {figure.name: figure for figure in figures} or figures_of(folder / f"{name}.json")
    for stem, figure in found.items():
        drawing.save(figure, folder / stem)
