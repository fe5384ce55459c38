"""Listen where strangers can connect, too: a proof first, and bounds on all until it is shown.

Whoever can reach a port can open connections to it, and say nothing, or too much. So until somebody
has shown what only this run's processes know, a connection is a bare socket of which some kilobytes
are read within a short time. There are so many of them at most that descriptors are left for the
run; where all are taken, the address that has the most makes room. The log tells of strangers once
a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

PROOF_SECONDS = 10.0
"""So long somebody may take to show proof."""

GRACE_SECONDS = 0.25
"""So long nobody has to make room for others: many ranks may come at once."""

MOST_UNKNOWN = 512
DESCRIPTORS_PART = 4
"""One in so many of the descriptors that this process may have is for the unknown."""

FULL_SECONDS = 0.01
QUIET_SECONDS = 60.0
BACKLOG = 1024
LINE_BYTES = 4096
"""Longest line of somebody unknown."""

Greet = Callable[[socket.socket], Awaitable[bool]]
"""Has somebody show proof; True: the connection is kept, and closed by whoever keeps it."""


class Strangers:
    """Counts those who were turned away, and tells of them once a minute at most.

    Args:
        say: Tells the person who watches.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._count = 0
        self._said = -QUIET_SECONDS

    def turned_away(self, address: str) -> None:
        """Count somebody at this address who had no proof."""
        self._count += 1
        now = time.monotonic()
        if now - self._said >= QUIET_SECONDS:
            plural = "s" if self._count > 1 else ""
            self._say(
                f"{self._count} connection{plural} without the run's key turned away, the last "
                f"from {address} (told once a minute at most)"
            )
            self._count, self._said = 0, now


@dataclass
class _Unknown:
    address: str
    since: float


def listening(address: str) -> socket.socket:
    """Return a socket that listens at an address of this host, at a port that is free.

    Raises:
        OSError: This host does not have the address, or no descriptor is left.
    """
    server = socket.create_server((address, 0), backlog=BACKLOG)
    server.setblocking(False)
    return server


async def admit(server: socket.socket, greet: Greet, strangers: Strangers) -> None:
    """Accept connections until this is cancelled.

    Args:
        server: As :func:`listening` gives it.
        greet: Called with each connection, which does not block.
        strangers: Told of those that had no proof.
    """
    loop = asyncio.get_running_loop()
    unknown: dict[asyncio.Task[None], _Unknown] = {}
    most = _most_unknown()
    try:
        while True:
            while len(unknown) >= most:
                _make_room(unknown)
                await asyncio.sleep(FULL_SECONDS)
            try:
                connection, peer = await loop.sock_accept(server)
            except OSError:  # it is gone already; or no descriptor is left
                _make_room(unknown)
                await asyncio.sleep(FULL_SECONDS)
                continue
            address = str(peer[0])
            task = asyncio.ensure_future(_greeted(connection, address, greet, strangers))
            unknown[task] = _Unknown(address, time.monotonic())
            task.add_done_callback(lambda done: unknown.pop(done, None) and None)
            await asyncio.sleep(0)  # where many wait, accepting does not
    finally:
        for task in list(unknown):
            task.cancel()


def _most_unknown() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_UNKNOWN
    return min(MOST_UNKNOWN, max(1, soft // DESCRIPTORS_PART))


def _make_room(unknown: dict[asyncio.Task[None], _Unknown]) -> None:
    """End those of the address that has the most, but for who came just now."""
    if not unknown:
        return
    crowd = Counter(each.address for each in unknown.values()).most_common(1)[0][0]
    late = time.monotonic() - GRACE_SECONDS
    for task, each in unknown.items():
        if each.address == crowd and each.since < late:
            task.cancel()


async def _greeted(
    connection: socket.socket, address: str, greet: Greet, strangers: Strangers
) -> None:
    known = False
    try:
        # Whatever somebody unknown sends, and however it ends, is no more than a proof that fails.
        with contextlib.suppress(Exception):
            known = await asyncio.wait_for(greet(connection), PROOF_SECONDS)
    finally:
        if not known:
            connection.close()
            strangers.turned_away(address)


async def read_until(connection: socket.socket, end: bytes, most: int = LINE_BYTES) -> bytearray:
    """Read what comes up to an end, and what has come with it.

    Args:
        connection: That does not block.
        end: What to wait for.
        most: Bytes to read before giving up, about.

    Raises:
        OSError: The connection is at its end.
        ValueError: There is no end within so many bytes.
    """
    loop = asyncio.get_running_loop()
    found = bytearray()
    while end not in found:
        if len(found) > most:
            raise ValueError(f"more than {most} bytes without an end")
        block = await loop.sock_recv(connection, LINE_BYTES)
        if not block:
            raise ConnectionResetError("the connection was closed")
        found += block
    return found
