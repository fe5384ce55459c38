"""Shut down this process's TCP connections, so that nothing goes on waiting at them.

An exchange of Gloo waits for a peer that is silent until its timeout. Where another one knows that
the peer is lost, the connections are shut down, and the exchange fails at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

STREAMS = (socket.AF_INET, socket.AF_INET6)


def connections() -> set[tuple[int, int]]:
    """List every socket of this process: its descriptor, and its number in the kernel.

    Descriptors are used again for other things; the numbers are not.
    """
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(link.readlink())
            if target.startswith("socket:["):
                found.add((int(link.name), int(target[8:-1])))
    return found


def shut_down(which: set[tuple[int, int]]) -> None:
    """Shut down those of these sockets that are TCP connections and still there."""
    for descriptor, _ in which & connections():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family in STREAMS and connection.type == socket.SOCK_STREAM:
                connection.shutdown(socket.SHUT_RDWR)
