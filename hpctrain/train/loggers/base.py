"""The base class of loggers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Logger(ABC):
    """Takes the records of a run, on rank 0. Subclass it, and name it in ``log.loggers``.

    Make the subclass a dataclass to give it options: ``log.loggers = ["NAME,option=value"]``. What
    it raises is said once; it is left out from then on, and the run goes on. A
    :class:`hpctrain.Error` that :meth:`open` raises ends the run before its first step.

    Example:
        >>> class Printed(Logger):
        ...     def write(self, kind, step, seconds, values):
        ...         print(kind, step, values)
        >>> Printed().write("train", 1, 0.0, {"loss": 0.5})
        train 1 {'loss': 0.5}
    """

    def open(self, folder: Path, config: Mapping[str, Any]) -> None:  # noqa: B027 - may be left out
        """Begin, before the first record; a run that goes on in its folder begins anew there.

        Args:
            folder: The run folder.
            config: The configuration as resolved: sections, keys and plain values.

        Raises:
            Error: It cannot be used here, such as a package that is not installed.
        """

    @abstractmethod
    def write(self, kind: str, step: int, seconds: float, values: Mapping[str, Any]) -> None:
        """Write one record of the run.

        Args:
            kind: ``train``, ``timing``, ``validation``, ``exchange``, ``event``, or a callback's.
            step: Optimizer steps done.
            seconds: When, since 1970.
            values: Numbers and texts by name; numbers may be infinite or NaN.
        """

    def close(self) -> None:  # noqa: B027 - may be left out
        """Write out whatever is still held."""
