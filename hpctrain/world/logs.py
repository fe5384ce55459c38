"""Python's logging, with this process's rank in each record.

hpctrain's commands tell people what they have to know. A program of one's own hears of it by the
loggers below ``hpctrain``, which are silent unless it asks for them. Formats may use ``rank`` and
``world_size``::

    import logging

    logging.basicConfig(format="%(asctime)s rank %(rank)s: %(message)s")
    logging.getLogger("hpctrain").setLevel(logging.INFO)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import Any

_place: list[Callable[[], tuple[int, int]]] = [lambda: (0, 1)]


class _WithRank(logging.LoggerAdapter):  # type: ignore[type-arg]
    """Adds the rank to what is logged."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the message as it is, and the rank as a field of the record.

        Args:
            msg: The message.
            kwargs: Of the call.
        """
        rank, size = _place[0]()
        kwargs["extra"] = {**(kwargs.get("extra") or {}), "rank": rank, "world_size": size}
        return msg, kwargs


def logger(name: str) -> logging.LoggerAdapter[logging.Logger]:
    """Return the logger of a module, whose records have ``rank`` and ``world_size``.

    Args:
        name: The module's.

    Example:
        >>> logger("hpctrain.example").process("said", {})
        ('said', {'extra': {'rank': 0, 'world_size': 1}})
    """
    return _WithRank(logging.getLogger(name), {})


def follow(place: Callable[[], tuple[int, int]]) -> None:
    """Set where log records take this process's rank and the world's size from.

    Args:
        place: Returns its rank and the world's size, which may change.
    """
    _place[0] = place
