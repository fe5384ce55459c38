"""New workers for a run under way, by MPI spawn.

The coordinator starts a process that runs this very command. It imports and builds its model while
the others go on, and asks to join when it is ready. Spawning and connecting block, so they are done
on threads of their own.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from hpctrain.errors import PeerLost
from hpctrain.ps.protocol import messages
from hpctrain.ps.server.server import Server
from hpctrain.world import pmix
from hpctrain.world.spawn import START_SECONDS, disconnect, fault_tolerant, receive_json, send_json

# Tags of the few messages before there are links.
WELCOME, PORT, NUMBER = 40, 41, 42


class Welcome(NamedTuple):
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


class Recruiter:
    """A server's part in starting workers: the coordinator spawns, the others connect.

    Args:
        server: Whose.
        wanted: Workers to have.
        link: Makes a link with a worker: its communicator and number.

    Attributes:
        over: Whether the server has no worker left, and none to expect.
    """

    def __init__(self, server: Server, wanted: int, link: Callable[[MPI.Comm, int], None]) -> None:
        self._server = server
        self._wanted = wanted
        self._link = link
        self._ready: queue.SimpleQueue[tuple[int, MPI.Intercomm, str]] = queue.SimpleQueue()
        self._next = max([*server.workers, server.me, *server.servers]) + 1
        self._awaited: dict[int, float] = {}
        self._comms: list[MPI.Intercomm] = []
        self._threads: list[threading.Thread] = []
        self._dismissed: set[int] = set()
        self._ended: float | None = None
        self.over = False

    def poll(self) -> bool:
        """Move on; True where something happened."""
        server = self._server
        for number in list(self._awaited):
            late = time.monotonic() - self._awaited[number] > START_SECONDS
            if number in server.workers or late:
                del self._awaited[number]
        missing = self._wanted - len(server.workers) - len(server.newcomers)
        if missing > 0 and server.coordinates and server.growable and not self._awaited:
            self._begin(self._next, partial(self._spawn, self._next))
        moved = False
        while server.ports:
            number, port = server.ports.pop(0)
            self._begin(number, partial(self._connect, number, port))
            moved = True
        while not self._ready.empty():
            number, comm, port = self._ready.get()
            self._comms.append(comm)
            self._link(comm, number)
            for link in server.servers.values() if port else ():
                link.send(messages.Recruited(number, port))
            moved = True
        if server.done and not self.over:
            self._end()
        return moved

    def _end(self) -> None:
        """The run is over: who was about to join is told so, and parted from in good order."""
        server = self._server
        self._ended = self._ended or time.monotonic()
        busy = any(thread.is_alive() for thread in self._threads) or not self._ready.empty()
        if server.coordinates and not busy:
            for number, link in server.newcomers.items():
                if number not in self._dismissed:
                    link.send(messages.Over())
                    self._dismissed.add(number)
            if not server.over:
                server.over = True
                for link in server.servers.values():
                    link.send(messages.Over())
        late = time.monotonic() - self._ended > START_SECONDS
        self.over = late or (server.over and not busy and not server.newcomers)

    def _begin(self, number: int, action: Callable[[], None]) -> None:
        self._next = max(self._next, number + 1)
        self._awaited[number] = time.monotonic()
        thread = threading.Thread(target=action, name="hpctrain-recruit", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _spawn(self, number: int) -> None:
        server = self._server
        comm = MPI.COMM_SELF.Spawn(sys.executable, sys.argv, 1)
        welcome = Welcome(
            number, sorted(server.workers), server.initial_servers, server.lost_servers
        )
        send_json(comm, welcome, WELCOME)
        others = len(server.initial_servers) - len(server.lost_servers) > 1
        port = str(receive_json(comm, PORT)) if others else ""
        self._ready.put((number, comm, port))

    def _connect(self, number: int, port: str) -> None:
        comm = MPI.COMM_SELF.Connect(port)
        comm.Send(np.array([self._server.me], np.int64), 0, NUMBER)
        self._ready.put((number, comm, ""))

    def close(self) -> None:
        """Part from the workers that were started, as they do from us."""
        disconnect(self._comms)


class Recruit:
    """A worker that was started by :class:`Recruiter`: how it finds the servers.

    Attributes:
        welcome: What it was told.
        comms: Communicators with the live servers, by number; its peer has rank 0 in each.
    """

    def __init__(self) -> None:
        watchdog = threading.Timer(START_SECONDS, lambda: os._exit(PeerLost.exit_code))
        watchdog.daemon = True
        watchdog.start()
        parent = MPI.Comm.Get_parent()
        self.welcome = Welcome(*receive_json(parent, WELCOME))
        servers = [s for s in self.welcome.servers if s not in self.welcome.lost]
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
