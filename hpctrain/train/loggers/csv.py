"""Records as CSV: one line a number."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpctrain.train.loggers.base import Logger

COLUMNS = ("kind", "step", "time", "name", "value")


class Csv(Logger):
    """Writes ``metrics.csv`` in the run folder: a line a number, under :data:`COLUMNS`.

    New names need no new column, so a run that goes on adds lines to what is there.
    ``pandas.read_csv(path).pivot_table(index="step", columns=["kind", "name"], values="value")``
    makes columns of names.
    """

    def open(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Open the file, and write the heading if it is new.

        Args:
            folder: The run folder.
            config: Not used.
        """
        # Line by line, so that a killed run keeps all but the line it was writing.
        self._file = (folder / "metrics.csv").open("a", buffering=1, encoding="utf-8", newline="")
        self._lines = csv.writer(self._file)
        if self._file.tell() == 0:
            self._lines.writerow(COLUMNS)

    def write(self, kind: str, step: int, seconds: float, values: Mapping[str, Any]) -> None:
        """Write a line for each number.

        Args:
            kind: Of the record.
            step: Of the record.
            seconds: When.
            values: Texts among them are left out.
        """
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._lines.writerow((kind, step, f"{seconds:.3f}", name, float(value)))

    def close(self) -> None:
        """Close the CSV file; nothing is written afterwards."""
        self._file.close()
