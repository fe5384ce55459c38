"""A worker's end of embedding tables: rows pulled for a batch, and their gradients pushed."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from hpctrain.config import PsConfig
from hpctrain.errors import Error
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link
from hpctrain.ps.tables.placement import RowPlacement
from hpctrain.tables.spec import TableSpec
from hpctrain.tables.table import Touched


class _Request:
    """What several servers were asked for."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.rows: dict[int, torch.Tensor] = {}  # by server, where its rows go
        self.sent: list[torch.Tensor] = []  # must stay until it is answered
        self.waits: set[int] = set()
        self.trains = torch.is_grad_enabled()
        self.failure: Error | None = None


class TableClient:
    """A worker's tables.

    Args:
        servers: Links with the servers that are left.
        config: The same on every rank.
        do: Has the polling thread call something.
        wait: Waits for an event, and raises what has gone wrong.

    Attributes:
        opened: Whether the model has tables.
        statistics: By server, what its rows are, table by table.
    """

    def __init__(
        self,
        servers: dict[int, Link],
        config: PsConfig,
        do: Callable[[Callable[[], None]], None],
        wait: Callable[[threading.Event], None],
    ) -> None:
        self.opened = False
        self.statistics: dict[int, list[dict[str, int]]] = {}
        self._servers = servers
        self._config = config
        self._do = do
        self._wait = wait
        self._specs: list[TableSpec] = []
        self._clock = 0
        self._versions: dict[int, int] = {}  # of servers' rows, as they were last heard of
        self._reads: dict[int, int] = {}  # the oldest of this step's pulls
        self._numbers = itertools.count(1)
        self._requests: dict[int, _Request] = {}
        self._pushed: _Request | None = None
        self._failed = False

    @property
    def busy(self) -> bool:
        """Whether an answer is waited for."""
        return bool(self._requests or self._pushed)

    # For the caller's thread.

    def open(self, specs: Sequence[TableSpec]) -> None:
        """Tell the servers which tables there are.

        Args:
            specs: The same on every worker.
        """
        self._specs = list(specs)
        self._all = sorted(self._servers)
        self._placement = RowPlacement(self._all, self._config.placement)
        self._versions = dict.fromkeys(self._all, 0)
        self.opened = True
        message = messages.OpenTables(self._specs)
        self._do(lambda: self._tell(message))

    def pull(self, table: int, ids: torch.Tensor) -> torch.Tensor:
        """Return rows, ``[n, dim]``.

        Args:
            table: Its place among the tables.
            ids: All distinct, ``[n]``.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
        """
        spec, request, number = self._specs[table], _Request(), next(self._numbers)
        out = torch.empty(len(ids), spec.dim, dtype=spec.torch_dtype)
        parts = self._divided(spec, ids)
        asked = {}
        for server, where in parts.items():
            asked[server] = ids[where]
            request.rows[server] = torch.empty(len(where), spec.dim, dtype=spec.torch_dtype)

        def send() -> None:
            for server, some in asked.items():
                message = messages.PullRows(number, table, len(some))
                self._servers[server].send(message, [some])

        if parts:
            self._ask(number, request, set(parts), send)
        for server, where in parts.items():
            out[where] = request.rows[server]
        return out

    def push(self, weight: float, lr_factor: float, touched: Sequence[Touched]) -> None:
        """Push a step's gradients; :meth:`settle` waits until the next step may begin.

        Args:
            weight: What the loss was multiplied by.
            lr_factor: On the learning rates of the tables' optimizers.
            touched: Of each table, rows or none.
        """
        parts: dict[int, tuple[list[int], list[int], list[torch.Tensor]]] = {
            server: ([], [], []) for server in self._all
        }
        for table, (spec, given) in enumerate(zip(self._specs, touched, strict=True)):
            for server, where in self._divided(spec, given.ids).items():
                tables, counts, payloads = parts[server]
                tables.append(table)
                counts.append(len(where))
                payloads += [part[where].contiguous() for part in given]
        request = self._pushed = _Request()
        request.waits = set(self._all)
        reads, self._reads = self._versions | self._reads, {}
        clock = self._clock
        self._clock += 1

        def send() -> None:
            if self._failed:
                request.event.set()
                return
            for server, (tables, counts, payloads) in parts.items():
                request.sent += payloads
                message = messages.PushRows(clock, reads[server], weight, lr_factor, tables, counts)
                self._servers[server].send(message, payloads)

        self._do(send)

    def settle(self) -> None:
        """Wait until servers let this worker begin its next step.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
        """
        if self._pushed is not None:
            self._wait(self._pushed.event)
            self._pushed = None

    def summary(self) -> dict[str, dict[str, int]]:
        """Return what the rows of all servers are, by table, as of this worker's last push."""
        sums: dict[str, Counter[str]] = {spec.name: Counter() for spec in self._specs}
        for given in self.statistics.values():
            for spec, counts in zip(self._specs, given, strict=True):
                sums[spec.name].update(counts)
        return {name: dict(counts) for name, counts in sums.items()}

    def keep(self, folder: Path, files: int | None = None) -> int:
        """Have each server write its rows into a folder, or read them from there.

        Args:
            folder: Which; all servers see it.
            files: How many servers wrote what is to be read; None: write.

        Returns:
            How many servers there are.

        Raises:
            Error: A server could not.
            PeerLost: The servers are gone, or went on without this worker.
        """
        request, number = _Request(), next(self._numbers)
        message = messages.KeepRows(number, str(folder.resolve()), files)
        self._ask(number, request, set(self._all), lambda: self._tell(message))
        if request.failure is not None:
            raise request.failure
        return len(self._all)

    def _ask(
        self, number: int, request: _Request, servers: set[int], send: Callable[[], None]
    ) -> None:
        request.waits = servers

        def start() -> None:
            if self._failed:
                request.event.set()
                return
            self._requests[number] = request
            send()

        self._do(start)
        self._wait(request.event)

    def _divided(self, spec: TableSpec, ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """By server, the places of its rows."""
        owners = self._placement.owners(spec, ids.numpy())
        return {
            server: torch.from_numpy(np.flatnonzero(owners == server))
            for server in np.unique(owners).tolist()
        }

    # For the polling thread.

    def _tell(self, message: messages.Message) -> None:
        for link in self._servers.values():
            link.send(message)

    def buffers(self, link: Link, message: messages.Rows) -> list[torch.Tensor]:
        """Return memory for rows that come.

        Args:
            link: Where they come from.
            message: What is announced.
        """
        return [self._requests[message.number].rows[link.peer]]

    def message(
        self, link: Link, message: messages.Rows | messages.RowsPushed | messages.RowsKept
    ) -> None:
        """Take in an answer.

        Args:
            link: Where it comes from.
            message: What has come.
        """
        server = link.peer
        if isinstance(message, messages.RowsPushed):
            self._versions[server] = message.version
            self.statistics[server] = message.statistics
            assert self._pushed is not None
            request = self._pushed
        else:
            request = self._requests[message.number]
            if isinstance(message, messages.Rows) and request.trains:
                known = self._reads.get(server, message.version)
                self._reads[server] = min(known, message.version)
            elif isinstance(message, messages.RowsKept) and message.failure is not None:
                request.failure = Error(message.failure, hint=message.hint or "")
        request.waits.discard(server)
        if not request.waits:
            if not isinstance(message, messages.RowsPushed):
                del self._requests[message.number]
            request.event.set()

    def fail(self) -> None:
        """Wake whoever waits: there will be no answers."""
        self._failed = True
        waiting = [*self._requests.values(), *([self._pushed] if self._pushed else [])]
        for request in waiting:
            request.event.set()
