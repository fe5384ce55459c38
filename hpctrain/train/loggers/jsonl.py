"""Records as JSON, one object a line: what the project's own tools read."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpctrain.errors import Error
from hpctrain.train.loggers.base import Logger


class JsonLines(Logger):
    """Writes ``metrics.jsonl``: kind, step, time, and values. A run is not without it."""

    def open(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Open the file, to add to what is there.

        Args:
            folder: The run folder.
            config: Not used.
        """
        # Line by line, so that a killed run keeps all but the line it was writing.
        self._lines = (folder / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")

    def write(self, kind: str, step: int, seconds: float, values: Mapping[str, Any]) -> None:
        """Append a record as one line of JSON.

        Args:
            kind: Of the record.
            step: Of the record.
            seconds: When.
            values: By name.

        Raises:
            Error: The disk is full, or the like.
        """
        line = {"kind": kind, "step": step, "time": round(seconds, 3), **plain(values)}
        try:
            self._lines.write(json.dumps(line) + "\n")
        except OSError as error:
            raise Error(
                f"cannot write {self._lines.name}: {error.strerror}.",
                hint="make room, then go on with --resume auto.",
            ) from error

    def close(self) -> None:
        """Close the file, and pass over an error that :meth:`write` has reported."""
        with contextlib.suppress(OSError):  # said by write() already
            self._lines.close()


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON can hold them: infinities and NaN become null.

    Args:
        values: By name.

    Example:
        >>> plain({"loss": float("nan"), "step": 1})
        {'loss': None, 'step': 1}
    """
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
