"""A worker's end of embedding tables: rows pulled for a batch, and their gradients pushed."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from hpctrain.config import PsConfig
from hpctrain.errors import Error, PeerLost
from hpctrain.ps.partition.row_placement import RowPlacement
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link
from hpctrain.tables.spec import TableSpec
from hpctrain.tables.table import Touched

Answer = messages.Rows | messages.RowsPushed | messages.RowsKept


class _Request:
    """What servers were asked for, until all have answered.

    Attributes:
        event: Set then.
        questions: By group and server, what was asked and is not answered yet.
        rows: By group, where its rows go.
        trains: Whether what is read is trained with.
        failure: Why a server could not do it.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.questions: dict[tuple[int, int], tuple[messages.Message, list[torch.Tensor]]] = {}
        self.rows: dict[int, torch.Tensor] = {}
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
        statistics: By group, what its rows are, table by table.
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
        self._versions: dict[int, int] = {}  # of groups, as they were last heard of
        self._reads: dict[int, int] = {}  # the oldest of this step's pulls
        self._numbers = itertools.count(1)
        self._requests: dict[int, _Request] = {}
        self._pushed: _Request | None = None
        self._failed = False

    @property
    def busy(self) -> bool:
        """Whether an answer is waited for."""
        return bool(self._requests or (self._pushed and self._pushed.questions))

    # For the caller's thread.

    def open(self, specs: Sequence[TableSpec], servers: Sequence[int]) -> None:
        """Tell the servers which tables there are.

        Args:
            specs: The same on every worker.
            servers: All that there were at the beginning.
        """
        self._specs = list(specs)
        self._placement = RowPlacement(servers, self._config.placement, self._config.replicas)
        self._versions = dict.fromkeys(servers, 0)
        message = messages.OpenTables(self._specs)

        def tell() -> None:
            self.opened = True
            for server in set(servers) - self._servers.keys():
                self._moved(server, "it was lost before tables were opened")
            for link in self._servers.values():
                link.send(message)

        self._do(tell)

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
        asked: dict[int, tuple[messages.Message, list[torch.Tensor]]] = {}
        for group, where in parts.items():
            asked[group] = (messages.PullRows(number, group, table, len(where)), [ids[where]])
            request.rows[group] = torch.empty(len(where), spec.dim, dtype=spec.torch_dtype)
        self._ask(number, request, asked)
        for group, where in parts.items():
            out[where] = request.rows[group]
        return out

    def push(self, weight: float, lr_factor: float, touched: Sequence[Touched]) -> None:
        """Push a step's gradients; :meth:`settle` waits until the next step may begin.

        Args:
            weight: What the loss was multiplied by.
            lr_factor: On the learning rates of the tables' optimizers.
            touched: Of each table, rows or none.
        """
        parts: dict[int, tuple[list[int], list[torch.Tensor]]] = {
            group: ([], []) for group in self._placement.groups
        }
        for table, (spec, given) in enumerate(zip(self._specs, touched, strict=True)):
            for group, where in self._divided(spec, given.ids).items():
                tables, payloads = parts[group]
                tables.append(table)
                payloads += [part[where].contiguous() for part in given]
        reads, self._reads = self._versions | self._reads, {}
        asked: dict[int, tuple[messages.Message, list[torch.Tensor]]] = {}
        for group, (tables, payloads) in parts.items():
            message = messages.PushRows(
                group, self._clock, reads[group], weight, lr_factor, tables,
                [payload.nbytes for payload in payloads],
            )  # fmt: skip
            asked[group] = (message, payloads)
        request = self._pushed = _Request()
        self._clock += 1
        self._do(lambda: self._send(request, asked))

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
        """Have servers write their rows into a folder, or read them from there.

        Args:
            folder: Which; all servers see it.
            files: How many files are to be read; None: write.

        Returns:
            How many files there are.

        Raises:
            Error: A server could not.
            PeerLost: The servers are gone, or went on without this worker.
        """
        request, number = _Request(), next(self._numbers)
        where = str(folder.resolve())
        asked: dict[int, tuple[messages.Message, list[torch.Tensor]]] = {
            group: (messages.KeepRows(number, group, where, files), [])
            for group in self._placement.groups
        }
        self._ask(number, request, asked, copies=files is not None)
        if request.failure is not None:
            raise request.failure
        return len(self._placement.groups)

    def _ask(
        self,
        number: int,
        request: _Request,
        asked: dict[int, tuple[messages.Message, list[torch.Tensor]]],
        *,
        copies: bool = False,
    ) -> None:
        """Ask about groups, and wait for all answers."""

        def start() -> None:
            self._requests[number] = request
            self._send(request, asked, copies=copies)
            if request.event.is_set():
                del self._requests[number]

        if asked:
            self._do(start)
            self._wait(request.event)

    def _divided(self, spec: TableSpec, ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """Divide ids by group: return the places of each group's among them."""
        groups = self._placement.groups_of(spec, ids.numpy())
        return {
            group: torch.from_numpy(np.flatnonzero(groups == group))
            for group in np.unique(groups).tolist()
        }

    # For the polling thread.

    def _send(
        self,
        request: _Request,
        asked: dict[int, tuple[messages.Message, list[torch.Tensor]]],
        *,
        copies: bool = False,
    ) -> None:
        if self._failed:
            request.event.set()
            return
        for group, (message, payloads) in asked.items():
            for server in self._placement.holders[group][: 1 + copies]:
                request.questions[group, server] = (message, payloads)
                self._servers[server].send(message, payloads)

    def buffers(self, link: Link, message: messages.Rows) -> list[torch.Tensor]:
        """Return memory for rows that come.

        Args:
            link: Where they come from.
            message: What is announced.
        """
        return [self._requests[message.number].rows[message.group]]

    def message(self, link: Link, message: Answer) -> None:
        """Take in an answer.

        Args:
            link: Where it comes from.
            message: What has come.
        """
        group = message.group
        if isinstance(message, messages.RowsPushed):
            self._versions[group] = message.version
            self.statistics[group] = message.statistics
            assert self._pushed is not None
            self._answered(self._pushed, group, link.peer)
            return
        request = self._requests[message.number]
        if isinstance(message, messages.Rows):
            if request.trains:
                known = self._reads.get(group, message.version)
                self._reads[group] = min(known, message.version)
        elif message.failure is not None:
            request.failure = Error(message.failure, hint=message.hint or "")
        self._answered(request, group, link.peer)
        if not request.questions:
            del self._requests[message.number]

    @staticmethod
    def _answered(request: _Request, group: int, server: int) -> None:
        request.questions.pop((group, server), None)
        if not request.questions:
            request.event.set()

    def lose(self, server: int, reason: str) -> None:
        """Go on without a server: ask those that have its groups now.

        Args:
            server: The one that is lost.
            reason: How that was noticed.

        Raises:
            PeerLost: Nobody has them.
        """
        if not self.opened:
            return
        self._moved(server, reason)
        for number, request in list(self._requests.items()):
            self._ask_again(request, server)
            if not request.questions:
                del self._requests[number]
        if self._pushed is not None:
            self._ask_again(self._pushed, server)

    def _moved(self, server: int, reason: str) -> None:
        for group in self._placement.lose(server):
            if not self._placement.holders[group]:
                raise PeerLost(
                    f"server {server} is lost, and with it the only copy of rows of tables: "
                    f"{reason}.",
                    hint="ps.replicas=1 survives the first loss; now, go on from a checkpoint.",
                )

    def _ask_again(self, request: _Request, lost: int) -> None:
        for (group, server), question in list(request.questions.items()):
            if server != lost:
                continue
            del request.questions[group, server]
            heir = self._placement.holders[group][0]
            if (group, heir) not in request.questions:
                request.questions[group, heir] = question
                self._servers[heir].send(*question)
        if not request.questions:
            request.event.set()

    def fail(self) -> None:
        """Wake whoever waits, and have it fail: there will be no answers."""
        self._failed = True
        waiting: Iterable[_Request] = [
            *self._requests.values(), *([self._pushed] if self._pushed else [])
        ]  # fmt: skip
        for request in waiting:
            request.event.set()
