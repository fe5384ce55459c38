"""A worker that joins a run under way: its handshake with the servers.

It was started by :class:`hpctrain.ps.server.worker_spawner.WorkerSpawner`, and finds all servers
before it builds its model.
"""

from __future__ import annotations

import os
import threading

import numpy as np
from mpi4py import MPI

from hpctrain.errors import PeerLost
from hpctrain.ps.protocol.handshake import GREETING, NUMBER, PORT, Greeting
from hpctrain.world import pmix
from hpctrain.world.spawn import START_SECONDS, disconnect, fault_tolerant, receive_json, send_json


class LateWorker:
    """Finds the servers that a worker started late is to work with: its handshake.

    Attributes:
        greeting: What it was told.
        comms: Communicators with the live servers, by number; its peer has rank 0 in each.
    """

    def __init__(self) -> None:
        watchdog = threading.Timer(START_SECONDS, lambda: os._exit(PeerLost.exit_code))
        watchdog.daemon = True
        watchdog.start()
        parent = MPI.Comm.Get_parent()
        self.greeting = Greeting(*receive_json(parent, GREETING))
        servers = [s for s in self.greeting.servers if s not in self.greeting.lost]
        self.comms: dict[int, MPI.Intercomm] = {min(servers): parent}
        if len(servers) > 1:
            port = MPI.Open_port()
            send_json(parent, port, PORT)
            for _ in servers[1:]:
                comm = MPI.COMM_SELF.Accept(port)
                number = np.zeros(1, np.int64)
                comm.Recv(number, 0, NUMBER)
                self.comms[int(number[0])] = comm
            MPI.Close_port(port)
        watchdog.cancel()

    def close(self) -> None:
        """Part from the servers, so that this process may end when it likes."""
        disconnect(list(self.comms.values()))
        if fault_tolerant():
            pmix.leave()
