"""What a new worker and the servers say to each other before there are links between them."""

from __future__ import annotations

from typing import NamedTuple

# Tags of the few messages before there are links.
GREETING, PORT, NUMBER = 40, 41, 42


class Greeting(NamedTuple):
    """What a new worker is told first.

    Attributes:
        number: Its own.
        workers: Who works.
        servers: Who served at the beginning.
        lost: Servers lost since, in order.
    """

    number: int
    workers: list[int]
    servers: list[int]
    lost: list[int]
