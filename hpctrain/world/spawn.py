"""Processes that a run starts by MPI spawn, and the few words exchanged with them at first."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

from mpi4py import MPI

from hpctrain.errors import PeerLost

START_SECONDS = 60.0
DISCONNECT_SECONDS = 5.0
WORDS_BYTES = 4096


def spawned() -> bool:
    """Whether this process was started by a running job."""
    return bool(MPI.Comm.Get_parent() != MPI.COMM_NULL)


def send_json(comm: MPI.Comm, value: object, tag: int) -> None:
    """Send a JSON-able value to rank 0 of the other side.

    Args:
        comm: The intercommunicator that MPI spawn has made.
        value: What to send.
        tag: The message's MPI tag.
    """
    comm.Send([json.dumps(value).encode(), MPI.BYTE], 0, tag)


def receive_json(comm: MPI.Comm, tag: int, seconds: float = START_SECONDS) -> Any:
    """Receive what ``send_json`` has sent.

    Args:
        comm: The intercommunicator that MPI spawn has made.
        tag: The message's MPI tag.
        seconds: Longest wait.

    Raises:
        PeerLost: It does not come.
    """
    buffer = bytearray(WORDS_BYTES)
    request = comm.Irecv([buffer, MPI.BYTE], 0, tag)
    deadline = time.monotonic() + seconds
    status = MPI.Status()
    while not request.Test(status):
        if time.monotonic() > deadline:
            raise PeerLost("a worker that was to join does not answer.", hint="see its own log.")
        time.sleep(1e-3)
    return json.loads(bytes(buffer[: status.Get_count(MPI.BYTE)]))


def disconnect(comms: list[MPI.Intercomm]) -> None:
    """Disconnect from communicators, in a bounded time: the other side may be gone."""

    def part() -> None:
        for comm in comms:
            comm.Disconnect()

    thread = threading.Thread(target=part, daemon=True)
    thread.start()
    thread.join(DISCONNECT_SECONDS)


def fault_tolerant() -> bool:
    """Whether MPI was started to outlive lost ranks."""
    return "OMPI_MCA_mpi_ft_enable" in os.environ
