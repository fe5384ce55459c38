"""A server's end of embedding tables: its rows, read, updated and kept in files."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from hpctrain.config import PsConfig
from hpctrain.errors import Error
from hpctrain.ps.consistency import consistency_of
from hpctrain.ps.consistency.base import Apply, Schedule
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link
from hpctrain.ps.server.peers import Peers
from hpctrain.ps.tables.placement import RowPlacement
from hpctrain.tables import files
from hpctrain.tables.row_store import RowStore
from hpctrain.tables.spec import TableSpec
from hpctrain.tables.table import Touched, summed

TURN_SECONDS = 5e-3
"""How long rows are written or read before a server looks for messages again."""

TableMessage = messages.OpenTables | messages.PullRows | messages.PushRows | messages.KeepRows


class TableServer:
    """The rows that a server has, of all tables.

    All of them have one schedule: a worker pushes once a step to each server, rows or none, and is
    answered when its consistency mode lets it go on. So a pull needs to wait for nothing.

    Args:
        peers: This server's number, and who takes part.
        config: The same on every rank.

    Attributes:
        stores: Rows by table.
    """

    def __init__(self, peers: Peers, config: PsConfig) -> None:
        self.stores: list[RowStore] = []
        self._peers = peers
        self._config = config
        self._consistency = consistency_of(config)
        by_default = self._consistency.lr_by_delay
        self._lr_by_delay = by_default if config.lr_by_delay is None else config.lr_by_delay
        self._schedule: Schedule | None = None
        self._incoming: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._pushes: dict[int, tuple[messages.PushRows, dict[int, Touched]]] = {}
        self._job: Iterator[None] | None = None
        self._asked: tuple[int, int] = (0, 0)  # who wants the job done, and the request's number

    @property
    def opened(self) -> bool:
        """Whether the model has tables."""
        return self._schedule is not None

    def buffers(self, message: messages.Message) -> list[torch.Tensor]:
        """Return memory for a message's payloads.

        Args:
            message: What is announced.
        """
        if isinstance(message, messages.PullRows):
            return [torch.empty(message.count, dtype=torch.int64)]
        if isinstance(message, messages.PushRows):
            found = []
            for table, count in zip(message.tables, message.counts, strict=True):
                spec = self.stores[table].spec
                gradient = torch.empty(count, spec.dim, dtype=spec.torch_dtype)
                found += [
                    torch.empty(count, dtype=torch.int64), gradient,
                    torch.empty(count, dtype=torch.int64),
                ]  # fmt: skip
            return found
        return []

    def payload(self, link: Link, buffer: torch.Tensor) -> None:
        """Take in a payload; those of a message come before it has come whole.

        Args:
            link: Where it comes from.
            buffer: What has come.
        """
        self._incoming[link.peer].append(buffer)

    def message(self, link: Link, message: TableMessage) -> None:
        """Take in a message that has come whole.

        Args:
            link: Where it comes from.
            message: What has come.
        """
        payloads = self._incoming.pop(link.peer, [])
        if link.peer not in self._peers.workers:
            return
        if isinstance(message, messages.OpenTables):
            self._open(message)
        elif isinstance(message, messages.PullRows):
            rows = self.stores[message.table].read(payloads[0])
            link.send(messages.Rows(message.number, self._version), [rows])
        elif isinstance(message, messages.PushRows):
            touched = {
                table: Touched(*payloads[3 * place : 3 * place + 3])
                for place, table in enumerate(message.tables)
            }
            self._pushes[link.peer] = (message, touched)
            assert self._schedule is not None
            self._schedule.push(link.peer, message.clock, message.clock)
            self._run()
        else:
            self._begin(link.peer, message)

    @property
    def _version(self) -> int:
        assert self._schedule is not None
        return self._schedule.version

    def _open(self, message: messages.OpenTables) -> None:
        if self._schedule is None:
            self._schedule = self._consistency.schedule(self._peers.workers)
            self.stores = [RowStore(spec) for spec in message.tables]
            servers = self._peers.initial_servers
            self._placement = RowPlacement(servers, self._config.placement)

    def leave(self, worker: int) -> None:
        """Wait no longer for a worker that pushes nothing more: it is done, or lost."""
        self._incoming.pop(worker, None)
        self._pushes.pop(worker, None)
        if self._schedule is not None:
            self._schedule.leave(worker)
            self._run()

    # Updates.

    def _run(self) -> None:
        """Do what the schedule says, until it says to wait; rows that are being kept stay."""
        assert self._schedule is not None
        while self._job is None:
            action = self._schedule.next()
            if action is None:
                return
            if isinstance(action, Apply):
                self._update([self._pushes.pop(worker) for worker in action.workers])
            else:
                self._answer(action.worker)

    def _update(self, pushes: list[tuple[messages.PushRows, dict[int, Touched]]]) -> None:
        if not pushes:
            return
        first = pushes[0][0]
        lr_factor, weight = first.lr_factor, sum(push.weight for push, _ in pushes)
        averages = self._consistency.rounds and (len(pushes) > 1 or weight not in (0.0, 1.0))
        delay = self._version - 1 - first.read
        if self._lr_by_delay and delay > 1:
            lr_factor /= delay
        for table, store in enumerate(self.stores):
            parts = [touched[table] for _, touched in pushes if table in touched]
            if not parts:
                store.pass_over()
                continue
            whole = summed(parts)
            if averages and weight > 0:
                whole.gradient.div_(weight)
            store.update(*whole, lr_factor)

    def _answer(self, worker: int) -> None:
        assert self._schedule is not None
        if worker in self._peers.workers:
            applied = self._schedule.applied.get(worker, 0)
            statistics = [store.statistics() for store in self.stores]
            message = messages.RowsPushed(applied, self._version, statistics)
            self._peers.workers[worker].send(message)

    # Files.

    def _begin(self, worker: int, message: messages.KeepRows) -> None:
        stores = {store.spec.name: store for store in self.stores}
        me = self._peers.me
        self._asked = (worker, message.number)
        folder = Path(message.folder)
        if message.files is None:
            self._job = files.write(folder, self._peers.initial_servers.index(me), stores)
        else:

            def mine(spec: TableSpec, ids: np.ndarray) -> np.ndarray:
                owned: np.ndarray = self._placement.owners(spec, ids) == me
                return owned

            self._job = files.read(folder, message.files, stores, mine)

    def poll(self) -> bool:
        """Write or read on for a moment; return whether something happened."""
        if self._job is None:
            return False
        deadline = time.monotonic() + TURN_SECONDS
        failure: tuple[str, str | None] = ("", None)
        try:
            for _ in self._job:
                if time.monotonic() > deadline:
                    return True
        except OSError as error:
            failure = (f"server {self._peers.me} cannot write rows of tables: {error}", None)
        except Error as error:
            failure = (f"server {self._peers.me}: {error.message}", error.hint)
        self._job = None
        worker, number = self._asked
        if worker in self._peers.workers:
            self._peers.workers[worker].send(
                messages.RowsKept(number, failure[0] or None, failure[1])
            )
        self._run()
        return True
