"""New workers for a run under way, by MPI spawn.

The coordinator starts a process that runs this very command. It imports and builds its model while
the others go on, and asks to join when it is ready. Spawning and connecting block, so they are done
on threads of their own.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from mpi4py import MPI

from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.handshake import GREETING, NUMBER, PORT, Greeting
from hpctrain.ps.server.server import Server
from hpctrain.world.spawn import START_SECONDS, disconnect, receive_json, send_json


class WorkerSpawner:
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
        self._next = max([*server.peers.workers, server.me, *server.peers.servers]) + 1
        self._awaited: dict[int, float] = {}
        self._comms: list[MPI.Intercomm] = []
        self._threads: list[threading.Thread] = []
        self._dismissed: set[int] = set()
        self._ended: float | None = None
        self.over = False

    def poll(self) -> bool:
        """Start and connect missing workers without blocking; return whether something happened."""
        server = self._server
        for number in list(self._awaited):
            late = time.monotonic() - self._awaited[number] > START_SECONDS
            if number in server.peers.workers or late:
                del self._awaited[number]
        missing = self._wanted - len(server.peers.workers) - len(server.peers.newcomers)
        if missing > 0 and server.peers.coordinates and server.growable and not self._awaited:
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
            for link in server.peers.servers.values() if port else ():
                link.send(messages.NewWorker(number, port))
            moved = True
        if server.done and not self.over:
            self._end()
        return moved

    def _end(self) -> None:
        """The run is over: who was about to join is told so, and parted from in good order."""
        server = self._server
        self._ended = self._ended or time.monotonic()
        busy = any(thread.is_alive() for thread in self._threads) or not self._ready.empty()
        if server.peers.coordinates and not busy:
            for number, link in server.peers.newcomers.items():
                if number not in self._dismissed:
                    link.send(messages.Over())
                    self._dismissed.add(number)
            if not server.over:
                server.over = True
                for link in server.peers.servers.values():
                    link.send(messages.Over())
        late = time.monotonic() - self._ended > START_SECONDS
        self.over = late or (server.over and not busy and not server.peers.newcomers)

    def _begin(self, number: int, action: Callable[[], None]) -> None:
        self._next = max(self._next, number + 1)
        self._awaited[number] = time.monotonic()
        thread = threading.Thread(target=action, name="hpctrain-spawn", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _spawn(self, number: int) -> None:
        server = self._server
        comm = MPI.COMM_SELF.Spawn(sys.executable, sys.argv, 1)
        peers = server.peers
        greeting = Greeting(
            number, sorted(peers.workers), peers.initial_servers, peers.lost_servers
        )
        send_json(comm, greeting, GREETING)
        others = len(peers.initial_servers) - len(peers.lost_servers) > 1
        port = str(receive_json(comm, PORT)) if others else ""
        self._ready.put((number, comm, port))

    def _connect(self, number: int, port: str) -> None:
        comm = MPI.COMM_SELF.Connect(port)
        comm.Send(np.array([self._server.me], np.int64), 0, NUMBER)
        self._ready.put((number, comm, ""))

    def close(self) -> None:
        """Part from the workers that were started, as they do from us."""
        disconnect(self._comms)
