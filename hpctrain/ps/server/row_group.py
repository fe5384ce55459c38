"""A group of rows: what one server has of all tables, with one order of updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from hpctrain.config import PsConfig
from hpctrain.errors import Error
from hpctrain.ps.consistency import consistency_of
from hpctrain.ps.consistency.base import Apply, Schedule
from hpctrain.ps.partition.row_placement import RowPlacement
from hpctrain.ps.protocol import messages
from hpctrain.ps.server.peers import Peers
from hpctrain.tables import files
from hpctrain.tables.row_store import RowStore
from hpctrain.tables.spec import TableSpec
from hpctrain.tables.table import Touched, summed

TURN_SECONDS = 5e-3
"""How long rows are written or read before a server looks for messages again."""


class RowGroup:
    """The rows of a group on a server that owns it, or has its copy.

    A worker pushes once a step to each group, rows or none, and is answered when its consistency
    mode lets it go on, and the copy has what it is answered with. So a pull waits for the copy
    alone.

    Args:
        number: Of the group.
        specs: Of the tables.
        placement: As all ranks have it.
        peers: This server's number, and who takes part.
        config: The same on every rank.

    Attributes:
        stores: Rows by table.
        version: Updates so far.
        schedule: Of a group that is this server's own; None: it is a copy.
    """

    def __init__(
        self,
        number: int,
        specs: Iterable[TableSpec],
        placement: RowPlacement,
        peers: Peers,
        config: PsConfig,
    ) -> None:
        self.number = number
        self.stores = [RowStore(spec) for spec in specs]
        self.version = 0
        self.schedule: Schedule | None = None
        self._placement = placement
        self._peers = peers
        self._consistency = consistency_of(config)
        by_default = self._consistency.lr_by_delay
        self._lr_by_delay = by_default if config.lr_by_delay is None else config.lr_by_delay
        self._applied: dict[int, int] = {}  # of a copy: workers' clocks
        self._pushes: dict[int, tuple[messages.PushRows, dict[int, Touched]]] = {}
        self._copied = 0  # version that the copy has
        self._delayed: list[Callable[[], None]] = []
        self._job: Iterator[None] | None = None
        self._asked: tuple[int, int] = (0, 0)  # who wants the job done, and the request's number

    @property
    def _copy(self) -> int | None:
        """The server with a copy of what is this server's own."""
        holders = self._placement.holders[self.number]
        return holders[1] if len(holders) > 1 else None

    def own(self, workers: Iterable[int]) -> None:
        """Become the owner, at the beginning or when the owner is lost.

        Args:
            workers: Those that push.
        """
        self.schedule = self._consistency.schedule(workers)
        self.schedule.version = self.version
        for worker in self.schedule.applied:
            self.schedule.applied[worker] = self._applied.get(worker, 0)

    def leave(self, worker: int) -> None:
        """Wait no longer for a worker that pushes nothing more: it is done, or lost."""
        self._pushes.pop(worker, None)
        if self.schedule is not None:
            self.schedule.leave(worker)
            self._run()

    # What workers want.

    def pull(self, worker: int, message: messages.PullRows, ids: torch.Tensor) -> None:
        """Answer a pull with rows, as soon as no loss can take back what is read.

        Args:
            worker: Who wants them.
            message: What it asked.
            ids: Of the rows.
        """
        if self._waits_for_copy:
            self._delayed.append(lambda: self.pull(worker, message, ids))
        elif worker in self._peers.workers:
            rows = self.stores[message.table].read(ids)
            answer = messages.Rows(message.number, self.number, self.version)
            self._peers.workers[worker].send(answer, [rows])

    def push(self, worker: int, message: messages.PushRows, touched: dict[int, Touched]) -> None:
        """Take in a worker's push.

        Args:
            worker: Whose.
            message: What it said.
            touched: By table.
        """
        assert self.schedule is not None
        if message.clock < self.schedule.applied.get(worker, 0):  # sent again, after a loss
            self.schedule.pull(worker)
        else:
            self._pushes[worker] = (message, touched)
            self.schedule.push(worker, message.clock, message.clock)
        self._run()

    # Updates.

    def _run(self) -> None:
        """Do what the schedule says, until it says to wait; rows that are being kept stay."""
        assert self.schedule is not None
        while self._job is None:
            action = self.schedule.next()
            if action is None:
                return
            if isinstance(action, Apply):
                self._update([(worker, *self._pushes.pop(worker)) for worker in action.workers])
            else:
                self._grant(action.worker)

    def _update(self, pushes: list[tuple[int, messages.PushRows, dict[int, Touched]]]) -> None:
        lr_factor, wholes = 1.0, {}
        if pushes:
            lr_factor = self._lr_factor(pushes[0][1])
            weight = sum(push.weight for _, push, _ in pushes)
            averages = self._consistency.rounds and (len(pushes) > 1 or weight not in (0.0, 1.0))
            for table in range(len(self.stores)):
                if parts := [touched[table] for _, _, touched in pushes if table in touched]:
                    wholes[table] = summed(parts)
                    if averages and weight > 0:
                        wholes[table].gradient.div_(weight)
        clocks = [(worker, push.clock) for worker, push, _ in pushes]
        if self._copy is not None:
            payloads = [part for whole in wholes.values() for part in whole]
            message = messages.CopyRows(
                self.number, self.version, lr_factor, clocks, list(wholes),
                [payload.nbytes for payload in payloads],
            )  # fmt: skip
            self._peers.servers[self._copy].send(message, payloads)
        self._apply(lr_factor, bool(pushes), wholes)

    def _lr_factor(self, first: messages.PushRows) -> float:
        delay = self.version - first.read
        return first.lr_factor / (delay if self._lr_by_delay and delay > 1 else 1)

    def _apply(self, lr_factor: float, made: bool, wholes: dict[int, Touched]) -> None:
        self.version += 1
        for table, store in enumerate(self.stores) if made else ():
            if table in wholes:
                store.update(*wholes[table], lr_factor)
            else:
                store.pass_over()

    def _grant(self, worker: int) -> None:
        if self._waits_for_copy:
            self._delayed.append(lambda: self._grant(worker))
        elif worker in self._peers.workers:
            statistics = [store.statistics() for store in self.stores]
            answer = messages.RowsPushed(self.number, self.version, statistics)
            self._peers.workers[worker].send(answer)

    # Copies.

    @property
    def _waits_for_copy(self) -> bool:
        return self._copy is not None and self._copied < self.version

    def copy(self, message: messages.CopyRows, touched: dict[int, Touched]) -> None:
        """Make an update of the owner's.

        Args:
            message: What it said.
            touched: By table.
        """
        self._apply(message.lr_factor, bool(message.pushes), touched)
        self._applied |= {worker: clock + 1 for worker, clock in message.pushes}

    def copied(self, version: int) -> None:
        """Note that the copy has the update of that version, and answer what waited for it."""
        self._copied = version
        self.answer_delayed()

    def answer_delayed(self) -> None:
        """Answer what waited for a copy, where there is nothing more to wait for."""
        delayed, self._delayed = self._delayed, []
        for answer in delayed:
            answer()

    # Files.

    def keep(self, worker: int, message: messages.KeepRows) -> None:
        """Begin to write the rows, or to read them.

        Args:
            worker: Who wants it.
            message: What it said.
        """
        self._asked = (worker, message.number)
        folder, place = Path(message.folder), self._placement.groups.index(self.number)
        if message.files is None:
            stores = {store.spec.name: store for store in self.stores}
            self._job = files.write(folder, place, stores)
        else:
            self.stores = [RowStore(store.spec) for store in self.stores]
            stores = {store.spec.name: store for store in self.stores}
            self._job = files.read(folder, message.files, stores, self._has)

    def _has(self, spec: TableSpec, ids: np.ndarray) -> np.ndarray:
        mine: np.ndarray = self._placement.groups_of(spec, ids) == self.number
        return mine

    def poll(self) -> int | None:
        """Write or read on for a moment; return the worker that waits for it, if any."""
        if self._job is None:
            return None
        deadline = time.monotonic() + TURN_SECONDS
        failure: str | None = None
        hint = ""
        try:
            for _ in self._job:
                if time.monotonic() > deadline:
                    return self._asked[0]
        except OSError as error:
            failure = f"server {self._peers.me} cannot write rows of tables: {error}"
        except Error as error:
            failure, hint = f"server {self._peers.me}: {error.message}", error.hint
        self._job = None
        worker, number = self._asked
        if worker in self._peers.workers:
            answer = messages.RowsKept(number, self.number, failure, hint)
            self._peers.workers[worker].send(answer)
        if self.schedule is not None:
            self._run()
        return worker
