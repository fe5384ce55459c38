"""Bringing workers and servers together over MPI: roles, links and shared memory."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from mpi4py import MPI

from hpctrain.config import PsConfig
from hpctrain.errors import Error, PeerLost
from hpctrain.ps.client.client import Client, Future
from hpctrain.ps.client.late_worker import LateWorker
from hpctrain.ps.consistency import consistency_of
from hpctrain.ps.huge_pages import zeros
from hpctrain.ps.partition.layout import Layout
from hpctrain.ps.partition.roles import Roles, assign
from hpctrain.ps.protocol.cipher import Cipher, read_key
from hpctrain.ps.protocol.link import Link, LocalLink, MPILink
from hpctrain.ps.protocol.polling import Loop, Waiter
from hpctrain.ps.protocol.regions import Regions, region_bytes
from hpctrain.ps.protocol.shared_memory import Sharing
from hpctrain.ps.server.order_log import Record, check_unused
from hpctrain.ps.server.server import Server
from hpctrain.ps.server.worker_spawner import WorkerSpawner
from hpctrain.ps.update_rules import Rule
from hpctrain.world import pmix
from hpctrain.world.process_reaper import IDENTITY_WORDS, ProcessReaper, identity
from hpctrain.world.spawn import fault_tolerant, spawned

# Tags of messages from workers to servers, back, and among servers; the next one is for payloads.
TO_SERVER, TO_WORKER, AMONG_SERVERS = 10, 20, 30
LAST_WORDS_SECONDS = 3.0
"""A worker that has failed says why before this rank ends, and the launcher ends all."""

CLOSING_SECONDS = 10.0
ENDING_LOOK_SECONDS = 2e-3
NAME_BYTES = 64


class Endpoint:
    """What this rank is to the parameter server: a worker, a server, or both.

    Every rank makes one at the same time.

    Args:
        config: The same on every rank.
        launched: How many ranks there must be; None: as many as MPI sees.
        timeout_seconds: Longest wait for the other ranks.

    Attributes:
        me: This rank.
        roles: Who works and who serves.
        client: Of a worker; else None.
        server: Of a server; else None.
        recruit: Of a worker that joins a run under way; else None.
        record: What is replayed; else None.

    Raises:
        Error: The ranks or the MPI do not fit.
        PeerLost: Not all ranks came.
    """

    def __init__(
        self,
        config: PsConfig,
        *,
        launched: int | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.record = Record(config.replay) if config.replay is not None else None
        # A replay ends where any rank is lost: there is nothing to keep copies for.
        self.config = config if self.record is None else config.model_copy(update={"replicas": 0})
        self._timeout_seconds = timeout_seconds
        key = read_key(Path(config.key_file) if config.key_file else None, os.environ)
        self._cipher = Cipher(key) if key is not None else None
        self.client: Client | None = None
        self.server: Server | None = None
        self._loop: Loop | None = None
        self._sharing: Sharing | None = None
        self._spawner: WorkerSpawner | None = None
        self._parted = False  # whether a rank was lost after all had done their work
        self.recruit = LateWorker() if spawned() else None
        if self.recruit is not None:
            self._join(self.recruit)
        else:
            self._meet_all(launched)

    def _join(self, late: LateWorker) -> None:
        """Become a worker of a run that is under way."""
        greeting = late.greeting
        self.me = greeting.number
        self._hosts: list[int] = []
        self._names: list[str] = []
        workers = (*greeting.workers, self.me)
        self.roles = Roles(workers, tuple(greeting.servers))
        links: dict[int, Link] = {
            number: MPILink(comm, 0, self.me, number, (TO_SERVER, TO_WORKER), self._cipher)
            for number, comm in late.comms.items()
        }
        self.client = Client(self.me, links, self.config, wake=self._wake)
        self.client.begin_late(greeting.servers, greeting.lost)

    def _meet_all(self, launched: int | None) -> None:
        world = MPI.COMM_WORLD
        if launched is not None and world.size != launched:
            raise Error(
                f"{launched} ranks were started, but MPI sees {world.size}.",
                hint="start them by mpirun of the MPI that mpi4py uses, or by srun --mpi=pmix "
                "(Open MPI) or pmi2 (MPICH); `hpctrain doctor` tells more.",
            )
        self.me = world.rank
        try:
            self._gather(world)
        except MPI.Exception as error:
            raise PeerLost(
                f"rank {self.me} on {os.uname().nodename}: another rank was lost before all had "
                f"met: {' '.join(str(error).split())}.",
                hint="its own log says more.",
            ) from error
        self.roles = assign(self._hosts, self.config.servers, colocate=self.config.colocate)
        self._check()
        self._make()
        self._sharing = self._share()

    def _gather(self, world: MPI.Intracomm) -> None:
        """Find out where all ranks are."""
        pmix.fence(self._timeout_seconds)
        self._meet(world, "all ranks")
        self._comm: MPI.Intracomm = world.Dup()
        self._node = cast(MPI.Intracomm, self._comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.me))
        hosts = np.zeros(world.size, np.int64)
        leader = np.array([self.me], np.int64)
        self._node.Bcast(leader, root=0)
        self._comm.Allgather(leader, hosts)
        self._hosts = hosts.tolist()
        names = np.zeros((world.size, NAME_BYTES), np.uint8)
        name = os.uname().nodename.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
        self._comm.Allgather(np.frombuffer(name, np.uint8), names)
        self._names = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in names]
        identities = np.zeros((world.size, IDENTITY_WORDS), np.int64)
        self._comm.Allgather(np.array(identity(), np.int64), identities)
        self._fence = ProcessReaper(dict(enumerate(identities.tolist())))

    def host(self, rank: int) -> str:
        """Return the name of a rank's host; empty where it is not known: a rank came later."""
        return self._names[rank] if rank < len(self._names) else ""

    def _check(self) -> None:
        works, serves = len(self.roles.workers), len(self.roles.servers)
        if self.config.replicas >= serves:
            raise Error(
                f"{self.config.replicas} replicas need more than {serves} servers.",
                hint="use more --servers, or fewer ps.replicas.",
            )
        if self.config.workers is not None and (self.config.record_order or self.config.replay):
            raise Error(
                "the order of pushes cannot be recorded or replayed where workers join.",
                hint="drop ps.workers.",
            )
        if self.record is not None:
            self.record.check(works, self.config.consistency)
        if self.config.record_order is not None:
            check_unused(self.config.record_order)
        consistency_of(self.config).check(works)
        shares = self.config.shares
        if isinstance(shares, list) and (len(shares) != works or not any(shares)):
            raise Error(
                f"ps.shares = {shares} does not divide batches among {works} workers.",
                hint="give one number a worker, and not only zeros.",
            )
        if self.config.colocate and MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise Error(
                "co-located servers need an MPI that lets threads take turns.",
                hint="unset MPI4PY_RC_THREAD_LEVEL, or use servers of their own.",
            )

    def _make(self) -> None:
        local = LocalLink.pair(self.me, self.me)
        if self.me in self.roles.servers:
            workers: dict[int, Link] = {
                worker: local[1] if worker == self.me else self._link(worker, TO_WORKER, TO_SERVER)
                for worker in self.roles.workers
            }
            servers: dict[int, Link] = {
                server: self._link(server, AMONG_SERVERS, AMONG_SERVERS)
                for server in self.roles.servers
                if server != self.me
            }
            self.server = Server(
                self.me,
                workers,
                servers,
                self.config,
                timeout_seconds=self._timeout_seconds,
                on_lost=self._fence.cut_off,
            )
            if self.config.workers is not None:
                self._spawner = WorkerSpawner(self.server, self.config.workers, self._greet)
        if self.me in self.roles.workers:
            links: dict[int, Link] = {
                server: local[0] if server == self.me else self._link(server, TO_SERVER, TO_WORKER)
                for server in self.roles.servers
            }
            self.client = Client(
                self.me, links, self.config, wake=self._wake, on_lost=self._fence.cut_off
            )
            self.client.place = self.roles.workers.index(self.me)

    def _greet(self, comm: MPI.Comm, number: int) -> None:
        assert self.server is not None
        tags = (TO_WORKER, TO_SERVER)
        self.server.greet(MPILink(comm, 0, self.me, number, tags, self._cipher))

    def _link(self, peer: int, to: int, from_: int) -> MPILink:
        return MPILink(self._comm, peer, self.me, peer, (to, from_), self._cipher)

    # A worker's.

    def open(
        self,
        layout: Layout,
        rule: Rule,
        *,
        weights: Sequence[torch.Tensor] | None,
        state: Mapping[str, Sequence[torch.Tensor]] | None = None,
        steps: Sequence[int] | None = None,
        missed: Sequence[Mapping[int, int]] | None = None,
        clip_norm: float | None = None,
    ) -> Client:
        """Say what is to be trained, and begin to exchange.

        Args:
            layout: The same on every worker.
            rule: What the servers do with gradients.
            weights: Flats to start from; the first worker's are everybody's, the next one's where
                that is lost.
            state: Of the rule, by name, as flats.
            steps: Updates the state has had, by slice.
            missed: Likewise, by part of the slice, those without a gradient of it.
            clip_norm: Largest norm of the aggregated gradient.

        Returns:
            The client; its ``weights`` and ``gradients`` are the flats to work with.

        Raises:
            PeerLost: The servers are gone.
        """
        assert self.client is not None
        self.start()
        regions = self._memory(layout)
        regions.lay_out(layout)
        own_weights, own_gradients = regions.flats(self.me)
        if self.server is not None:
            self.server.share(regions)
        self.client.near = self._near()
        future: Future = self.client.open(
            layout, rule, own_weights, own_gradients,
            before=[worker for worker in self.roles.workers if worker < self.me], start=weights,
            state=state, steps=steps, missed=missed, clip_norm=clip_norm,
            join=self.recruit is not None,
        )  # fmt: skip
        future.wait()
        if self.recruit is not None:
            self.roles = self.roles._replace(workers=tuple(self.client.take_part()))
        return self.client

    def start(self) -> None:
        """Begin to exchange questions and answers, before there is anything to train."""
        client = self.client
        if self._loop is not None or client is None:
            return
        serves = self.server is not None
        parts: list[Any] = [
            p for p in (client, self.server, self._sharing, self._spawner) if p is not None
        ]
        self._loop = Loop(
            parts, lambda: serves or client.busy, lambda: serves or client.awaited, client.fail
        )
        self._loop.start()

    def _wake(self) -> None:
        if self._loop is not None:
            self._loop.wake()

    def _near(self) -> set[int]:
        if self._only_messages:
            return set()
        if self._sharing is None or not self._sharing.regions.has(self.me):
            return {self.me} & set(self.roles.servers)
        here = self._hosts[self.me]
        return {server for server in self.roles.servers if self._hosts[server] == here}

    # Everybody's.

    @property
    def _only_messages(self) -> bool:
        """Whether nothing may pass beside messages: what does is not compressed.

        Which servers are near would make a difference to what is recorded then.
        """
        repeatable = self.config.record_order is not None or self.record is not None
        return repeatable and self.config.compression != "none"

    def _share(self) -> Sharing | None:
        """Where this host has workers and servers: the memory that they will share."""
        here = [rank for rank, host in enumerate(self._hosts) if host == self._hosts[self.me]]
        workers = {rank: place for place, rank in enumerate(here) if rank in self.roles.workers}
        serving = any(rank in self.roles.servers for rank in here)
        if not (self.config.shared_memory and len(here) > 1 and workers and serving):
            return None
        if self._only_messages:
            return None
        seconds = self.config.silence_seconds
        same_weights = consistency_of(self.config).same_weights
        sharing = Sharing(self._node, workers, same_weights, lambda: self._fence.watch(seconds))
        if self.client is None:
            sharing.offer(0)
        return sharing

    def _memory(self, layout: Layout) -> Regions:
        """This worker's memory, where its host's servers can reach it if there are any."""
        size = region_bytes(layout)
        own = Regions({self.me: zeros(2 * size)})
        if self._sharing is None:
            return own
        borrows = self._sharing.common not in (None, self.me)
        self._sharing.offer(size if borrows else 2 * size)
        self._wake()
        deadline = time.monotonic() + self._timeout_seconds
        while not self._sharing.done.wait(0.1):
            if time.monotonic() > deadline or self._loop is None or not self._loop.is_alive():
                raise PeerLost(
                    f"rank {self.me} on {os.uname().nodename} waited for the other ranks of its "
                    "host to share memory.",
                    hint="did one of them fail? Its own log says more.",
                )
        return self._sharing.regions if self._sharing.regions.has(self.me) else own

    def serve(self) -> None:
        """Serve until every worker has left; for a rank that only serves.

        Raises:
            PeerLost: The run cannot go on.
        """
        assert self.server is not None
        server = self.server
        waiter = Waiter()
        try:
            with torch.no_grad():
                while not (server.done and self._nobody_comes):
                    if self._sharing is not None and self._sharing.poll():
                        server.share(self._sharing.regions)
                    if self._spawner is not None:
                        self._spawner.poll()
                    waiter.wait(server.poll())
        except Error:
            if server.aborted:  # whose fault it is speaks first
                time.sleep(LAST_WORDS_SECONDS)
            raise
        self._drain([server])
        self._part()
        self._end_together()

    @property
    def _nobody_comes(self) -> bool:
        return self._spawner is None or self._spawner.over

    def close(self) -> None:
        """Leave when a worker has done all of its steps; nothing may be called afterwards."""
        if self.client is not None and self._loop is not None:
            self.client.leave()
            if self.server is not None:
                server = self.server
                while not (server.done and self._nobody_comes) and self._loop.is_alive():
                    time.sleep(1e-3)
            self._loop.end()
            self._drain([part for part in (self.client, self.server) if part is not None])
            self._part()
            self._end_together()

    def _part(self) -> None:
        for end in (self.recruit, self._spawner):
            if end is not None:
                end.close()

    def abort(self, reason: str, code: int = 1) -> None:
        """End the run for everybody, because this worker has failed.

        Args:
            reason: Why.
            code: Of its exit, and the others'.
        """
        if self.client is not None and self._loop is not None and not self.client.failed:
            self.client.abort(reason, code)
            deadline = time.monotonic() + 1.0
            while not self.client.told and time.monotonic() < deadline:
                time.sleep(0.01)

    def _drain(self, parts: Sequence[Any]) -> None:
        """What was sent last must be on its way before this process ends."""
        deadline = time.monotonic() + CLOSING_SECONDS
        waiter = Waiter()
        while not all(part.idle() for part in parts) and time.monotonic() < deadline:
            for part in parts:
                part.poll()
            waiter.wait(False)

    def _end_together(self) -> None:
        """Wait until all ranks have come to their end: without one of them MPI cannot be ended."""
        if self.recruit is not None or self._lost_any:
            return
        try:
            request = self._comm.Ibarrier()
            deadline = time.monotonic() + self._timeout_seconds
            while not request.Test():
                if time.monotonic() > deadline:
                    raise MPI.Exception(MPI.ERR_PENDING)
                self._fence.cut_off_stopped(self.config.silence_seconds)
                time.sleep(ENDING_LOOK_SECONDS)
        except MPI.Exception:
            self._parted = True

    @property
    def _lost_any(self) -> bool:
        return any(part is not None and bool(part.lost) for part in (self.client, self.server))

    @property
    def lost(self) -> bool:
        """Whether a rank was lost, or may be yet: MPI's end would wait for it without a bound."""
        return self._lost_any or self._parted or fault_tolerant()

    def _meet(self, comm: MPI.Comm, whom: str) -> None:
        """A barrier that gives up: what follows blocks until all have come."""
        request = comm.Ibarrier()
        deadline = time.monotonic() + self._timeout_seconds
        waiter = Waiter()
        while not request.Test():
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"rank {self.me} on {os.uname().nodename} waited {self._timeout_seconds:.0f} s "
                    f"for {whom} to meet.",
                    hint="did all of them start? Their own logs say more.",
                )
            waiter.wait(False)
