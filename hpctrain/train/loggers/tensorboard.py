"""Records for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpctrain.train.loggers.base import Logger


class TensorBoard(Logger):
    """Writes event files to ``tensorboard/`` in the run folder: scalars called ``KIND/NAME``."""

    def open(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin an event file.

        Args:
            folder: The run folder.
            config: Not used.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, kind: str, step: int, seconds: float, values: Mapping[str, Any]) -> None:
        """Write a record's numbers as scalars, named ``kind/name``.

        Args:
            kind: Of the record.
            step: Of the record.
            seconds: When.
            values: Texts among them are left out.
        """
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step, walltime=seconds)

    def close(self) -> None:
        """Close the event file; nothing is written afterwards."""
        self._board.close()
