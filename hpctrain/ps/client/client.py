"""A worker's end: pushes gradients to the servers and brings weights back, in the background."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from hpctrain.config import PsConfig
from hpctrain.errors import Dismissed, Error, PeerLost
from hpctrain.ps.client.coordinator_client import CoordinatorClient
from hpctrain.ps.client.exchange import Exchange, Step
from hpctrain.ps.client.init_message import InitMessage
from hpctrain.ps.client.snapshot_fetch import ServerSnapshot, SnapshotFetch
from hpctrain.ps.client.table_client import TableClient
from hpctrain.ps.consistency import consistency_of
from hpctrain.ps.partition.layout import DTYPES, Layout
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import STARTING_SECONDS, Link
from hpctrain.ps.update_rules import Rule
from hpctrain.tables.spec import TableSpec

FIRST_WORDS_SECONDS = 1.0
"""Where another rank has failed, that one speaks before this one does."""


class Future:
    """Stands for an exchange under way."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def done(self) -> bool:
        """Return whether the exchange is over."""
        return self._client.settled()

    def wait(self) -> None:
        """Wait until the exchange is over.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
        """
        self._client.wait()


class Client:
    """One worker of a parameter server.

    The caller's thread says what is to be done; ``poll``, on a thread of its own
    (:class:`hpctrain.ps.protocol.polling.Loop`), does it. Only that thread uses MPI.

    Args:
        me: This worker's number.
        servers: Links with the servers, by number.
        config: The same on every rank.
        near: Servers that reach this worker's memory.
        wake: Called when there is something to do.
        on_lost: Called with the number of each peer that is lost.

    Attributes:
        place: Among the workers; this worker's number unless it is set.
        clock: Steps pushed.
        exchange: Of gradients and weights.
        tables: Of the model's embedding tables.
        norm: Of the last aggregated gradient before clipping, if the servers clip.
        leads: How often this worker was so many clocks ahead of the slowest.
        stopped: Whether training is to end early.
        awaited: Whether the caller's thread waits for the polling thread.
        counted: Its clock, as the servers count it.
        joined: Workers that came later, and the clocks of their first collectives.
        behind: Rounds that went by without this worker at its last step.
    """

    def __init__(
        self,
        me: int,
        servers: dict[int, Link],
        config: PsConfig,
        *,
        near: Iterable[int] = (),
        wake: Callable[[], None] = lambda: None,
        on_lost: Callable[[int], None] = lambda peer: None,
    ) -> None:
        self.me = me
        self.place = me
        self.servers = servers
        self.config = config
        self.near = set(near)
        self.clock = 0
        self.exchange = Exchange(servers, config)
        self.norm: float | None = None
        self.leads: Counter[int] = Counter()
        self.stopped = False
        self.behind = 0
        self.lost: dict[int, str] = {}
        self._wake = wake
        self._on_lost = on_lost
        self._consistency = consistency_of(config)
        self._questions = CoordinatorClient(servers)
        self._fetching = SnapshotFetch(servers)
        self._commands: deque[Callable[[], None]] = deque()
        self.tables = TableClient(servers, config, self._do, self._await)
        self._settled = threading.Event()
        self._settled.set()
        self.awaited = False
        self._error: Error | None = None
        self._aborted = False
        self._initial_servers = sorted(servers)
        # What tells the servers what is trained, and which workers do so unless they are lost.
        self._opening: InitMessage | None = None
        self._before: set[int] = set()
        self._begun = False
        self._asked = 0
        self._collective = (0, 0)
        self._last_heartbeat = 0.0
        self._lead = 0
        self.counted = 0
        self.joined: dict[int, int] = {}
        self.left = False

    # For the caller's thread.

    def open(
        self,
        layout: Layout,
        rule: Rule,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        *,
        before: Iterable[int] = (),
        start: Sequence[torch.Tensor] | None = None,
        state: Mapping[str, Sequence[torch.Tensor]] | None = None,
        steps: Sequence[int] | None = None,
        missed: Sequence[Mapping[int, int]] | None = None,
        clip_norm: float | None = None,
        join: bool = False,
    ) -> Future:
        """Say what is to be trained; one worker's weights are what everybody starts from.

        Args:
            layout: The same on every worker.
            rule: What the servers do with gradients.
            weights: The flats, in host memory; new weights are put there.
            gradients: The flats that are pushed.
            before: Workers that tell the servers; this one does where they are lost.
            start: Flats to start from; None: ``weights``.
            state: Of the update rule, by name, as flats; None: as at the very start.
            steps: Updates the state has had, by slice.
            missed: Likewise, by part of the slice, those without a gradient of it.
            clip_norm: Largest norm of the aggregated gradient.
            join: Whether the others are under way.
        """
        self.layout = layout
        self.weights, self.gradients = list(weights), list(gradients)
        self.exchange.open(layout, self.weights, self.gradients, self.near)
        self._fetching.open(layout, rule)
        self._questions.open()
        self._before = set(before)
        if not join:
            flats = [*(weights if start is None else start)]
            self._opening = InitMessage(layout, rule, flats, state, steps, missed, clip_norm)
        self._settled.clear()
        self._do(lambda: self._start(join))
        return Future(self)

    def open_tables(self, specs: Sequence[TableSpec]) -> None:
        """Say which embedding tables there are besides.

        Args:
            specs: The same on every worker.
        """
        self.tables.open(specs, self._initial_servers)

    def begin_late(self, servers: Sequence[int], lost: Sequence[int]) -> None:
        """Say which servers there were at the beginning, and which have been lost since.

        Args:
            servers: All that there were at the beginning.
            lost: Those lost since, in order.
        """
        self._initial_servers = sorted(servers)
        self.lost = dict.fromkeys(lost, "it was lost before this worker came")

    def take_part(self) -> list[int]:
        """Be one of the workers from now on, at the clock of the slowest; return who they are.

        Where all take each step together, the others may be about the collectives of the step
        before: this worker's first are those after its own first step.
        """
        self.clock = self.counted
        since = self.clock + 1 if self._consistency.same_weights else 0
        members = dict(self.ask("joined", since).value)
        # Before this worker's pushes: who ends the step that they are part of has heard of it.
        self._do(lambda: self._tell(messages.Joined(self.me, since)))
        self.joined |= {other: first for other, first in members.items() if first > since}
        return [worker for worker in members if worker not in self.joined]

    def begin(self, weight: float, hyper: list[list[float]]) -> None:
        """Begin a step.

        Args:
            weight: What the loss is multiplied by.
            hyper: For each parameter group the update rule's numbers.
        """
        every = self.config.pull_every
        interval = every if isinstance(every, int) else every[self.place % len(every)]
        pull = (self.clock + 1) % interval == 0
        step = Step(self.clock, self.exchange.newest, weight, hyper, pull)
        self.exchange.begin()
        self._settled.clear()
        self._do(lambda: self.exchange.set_step(step))

    def put(self, weights: Sequence[torch.Tensor]) -> None:
        """Have the update of the present step start from these flats: all workers changed them.

        Args:
            weights: The flats; the servers find out where workers' differ.
        """
        flats = [flat.clone() for flat in weights]
        self._do(lambda: self.exchange.put(flats))

    def push(
        self,
        slices: Iterable[int],
        rows: dict[int, torch.Tensor] | None = None,
        absent: dict[int, list[int]] | None = None,
    ) -> None:
        """Push slices whose gradients are ready in the flats; they must stay as they are.

        Args:
            slices: Their numbers.
            rows: By flat whose gradients come as rows: those that this step has touched.
            absent: By slice, its parts without a gradient.
        """
        indices = list(slices)
        if rows:
            self.exchange.touch(rows)
        if absent:
            self.exchange.lack(absent)
        self._do(lambda: self.exchange.push(indices))

    def push_pull(self, weight: float, hyper: list[list[float]]) -> Future:
        """Take a whole step: push all gradients, and pull the new weights.

        Args:
            weight: What the loss is multiplied by.
            hyper: For each parameter group the update rule's numbers.
        """
        self.begin(weight, hyper)
        self.push(range(len(self.layout.slices)))
        return Future(self)

    def pull(self) -> Future:
        """Pull all weights."""
        self._settled.clear()
        self._do(lambda: self._pull_all(None))
        return Future(self)

    def settled(self) -> bool:
        """Return whether no exchange is under way."""
        return self._settled.is_set()

    def wait(self) -> None:
        """Wait until every push of the step is answered.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
        """
        self._await(self._settled)

    def end(self) -> None:
        """End the step when its answers are here."""
        self.wait()
        self.leads[self._lead] += 1
        self._lead = 0
        if self._consistency.rounds:
            self.behind = max(0, self.exchange.newest - self.clock - 1)
        self.clock += 1 + self.behind

    def ask(self, what: str, value: Any = None, data: bytes = b"") -> messages.Answer:
        """Ask the coordinator, and wait for its answer.

        The wait is bounded: the coordinator gives up on whoever is waited for, and this worker on
        servers without a heartbeat.

        Args:
            what: Is asked; see :class:`hpctrain.ps.server.coordinator.Coordinator`.
            value: More about it.
            data: Likewise, as bytes.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
        """
        event = threading.Event()
        self._asked += 1
        question = messages.Ask(self._asked, what, value, data, self.clock)
        self._do(lambda: self._questions.ask(question, event))
        self._await(event)
        return self._questions.answers.pop(question.number)

    def next_collective(self) -> str:
        """Return the name of the next collective: the same, in the same order, on all workers.

        Where all take each step together the step is part of it, so that a worker may join.
        """
        clock = self.clock if self._consistency.same_weights else 0
        if clock != self._collective[0]:
            self._collective = (clock, 0)
        self._collective = (clock, self._collective[1] + 1)
        return "{}.{}".format(*self._collective)

    def snapshot(self) -> ServerSnapshot:
        """Fetch all slices as they were at one point, with the state of the update rule.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
        """
        while True:
            number = int(self.ask("snapshot").value)
            event = threading.Event()
            self._do(lambda number=number, event=event: self._fetching.fetch(number, event))  # type: ignore[misc]
            self._await(event)
            if self._fetching.complete:
                assert self._fetching.snapshot is not None
                return self._fetching.snapshot

    def rest(self) -> None:
        """Tell the servers that this worker pushes nothing more: nobody needs to wait for it."""
        self._do(lambda: self._tell(messages.Rest()))

    def leave(self) -> None:
        """Tell the servers that this worker has done all of its steps."""
        event = threading.Event()
        threads = torch.get_num_threads()
        self._do(lambda: self._leave(event, threads))
        event.wait()
        if self._error is not None and not isinstance(self._error, Dismissed):
            raise self._error

    def abort(self, reason: str, code: int = 1) -> None:
        """Tell the servers that this worker failed, so that the run ends for everybody.

        Args:
            reason: Why.
            code: 2 where the caller can put it right.
        """
        hint = "the log of that process says more." if code == Error.exit_code else None
        self._do(lambda: self._tell(messages.Abort(self.me, reason, hint)))

    @property
    def told(self) -> bool:
        """Whether all commands have begun, and what was sent is on its way."""
        return not self._commands and self.idle()

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake()

    def _await(self, event: threading.Event) -> None:
        # Bounded: the polling thread sets the event when servers are silent for too long.
        self.awaited = True
        event.wait()
        self.awaited = False
        if self._error is not None:
            if self._aborted:
                time.sleep(FIRST_WORDS_SECONDS)
            raise self._error

    # For the polling thread.

    @property
    def busy(self) -> bool:
        """Whether an exchange, a question or a snapshot is under way."""
        return bool(
            self._commands
            or self.exchange.busy
            or self._questions.busy
            or self._fetching.busy
            or self.tables.busy
        )

    def poll(self) -> bool:
        """Move all exchanges on without blocking; return whether something happened."""
        moved = bool(self._commands)
        try:
            while self._commands:
                self._commands.popleft()()
            if not self.failed:  # else slices may be without a server; only the news is to go out
                self.exchange.send_ready()
            for link in list(self.servers.values()):
                if self.servers.get(link.peer) is not link:
                    continue  # lost just now: what it sent counts no more
                moved |= link.poll(self)
                if link.failed is not None:
                    self._lose(link.peer, link.failed)
            self._keep_house()
        except Error as error:
            self.fail(error)
        return moved

    @property
    def failed(self) -> bool:
        """Whether the run is over for this worker, by an error."""
        return self._error is not None

    def idle(self) -> bool:
        """Return whether everything sent is on its way."""
        return all(link.idle() for link in self.servers.values())

    def fail(self, error: Error) -> None:
        """Give up with an error, and wake whoever waits."""
        if self._error is None:
            self._error = error
        self._settled.set()
        self._questions.fail()
        self._fetching.fail()
        self.tables.fail()

    def _keep_house(self) -> None:
        """Send heartbeats, and give up servers that have been silent for too long."""
        now = time.monotonic()
        if now - self._last_heartbeat < self.config.silence_seconds / 5:
            return
        before, self._last_heartbeat = self._last_heartbeat, now
        paused = now - before > self.config.silence_seconds / 2 and before > 0
        self._tell(messages.Heartbeat())
        silence = self.config.silence_seconds
        limit = silence if self._begun else max(silence, STARTING_SECONDS)
        for link in list(self.servers.values()):
            if paused:  # this process was stopped: what the others sent is yet to be read
                link.heard = now
            elif now - link.heard > limit:
                self._lose(link.peer, f"it was silent for {now - link.heard:.1f} s")

    def _tell(self, message: messages.Message) -> None:
        for link in self.servers.values():
            link.send(message)

    def _start(self, join: bool) -> None:
        self.exchange.place(self._initial_servers, self.lost)
        self._open_in_turn()
        self._pull_all(messages.Join() if join else None)

    def _open_in_turn(self) -> None:
        placement = self.exchange.placement
        if self._opening is not None and placement and self._before <= set(self.lost):
            opening, self._opening = self._opening, None
            opening.send(self.servers, placement)

    def _pull_all(self, message: messages.Join | None) -> None:
        if not self.exchange.pull_all(message):
            self._settled.set()

    def _leave(self, event: threading.Event, threads: int = 1) -> None:
        self._tell(messages.Leave(threads))
        self.left = True
        event.set()

    # What comes.

    def buffers(self, link: Link, message: messages.Message) -> Sequence[torch.Tensor]:
        """Return memory for a message's payloads: weights go where the model reads them.

        Args:
            link: Where the message comes from.
            message: What is announced.
        """
        if isinstance(message, messages.Weights):
            return self.exchange.buffers(message)
        if isinstance(message, messages.Part):
            return self._fetching.buffers(message)
        if isinstance(message, messages.Rows):
            return self.tables.buffers(link, message)
        return []

    def payload(
        self, link: Link, message: messages.Message, number: int, buffer: torch.Tensor
    ) -> None:
        """Take in a payload that has come, to where it belongs.

        Args:
            link: Where it comes from.
            message: Whose payload it is.
            number: Its place among the message's payloads.
            buffer: What has come.
        """
        if isinstance(message, messages.Weights):
            self.exchange.payload(message, number, buffer)

    def message(self, link: Link, message: messages.Message) -> None:
        """Take in a message that has come whole.

        Args:
            link: Where it comes from.
            message: What has come.
        """
        match message:
            case messages.Weights():
                self._answered(message)
            case messages.Answer():
                self._questions.answered(message)
            case messages.Part():
                self._fetching.part(link.peer, message)
            case messages.Rows() | messages.RowsPushed() | messages.RowsKept():
                self.tables.message(link, message)
            case messages.Heartbeat():
                self.stopped |= message.stop
            case messages.Lost():
                self._lose(message.peer, message.reason)
            case messages.Joined():
                self.joined[message.worker] = message.since
            case messages.Evicted():
                raise PeerLost(
                    f"the servers went on without worker {self.me}: {message.reason}.",
                    hint="was this process stopped, or its host? A longer ps.silence_seconds "
                    "allows for more.",
                )
            case messages.Over():
                raise Dismissed(f"worker {self.me}: the run was over before it could take part.")
            case messages.Abort():
                self._aborted = True
                raise message.error()
            case _:
                raise Error(f"worker {self.me} got a {type(message).__name__} by mistake.")

    def _answered(self, message: messages.Weights) -> None:
        self.exchange.answered(message)
        self._lead = max(self._lead, message.lead)
        self.counted = max(self.counted, message.clock)
        self.norm = message.norm
        if self.exchange.over:
            self._opening, self._begun = None, True
            self._settled.set()

    def _lose(self, peer: int, reason: str) -> None:
        """Go on without a lost rank; where it is a server, fail over to the next."""
        if peer not in self.lost:
            self.lost[peer] = reason
            self._on_lost(peer)
            if peer in self._before:
                self._open_in_turn()
        if peer not in self.servers:
            return
        coordinator = min(self.servers)
        del self.servers[peer]
        if not self.servers:
            raise PeerLost(
                f"worker {self.me}: the last server is gone: server {peer}: {reason}.",
                hint="its own log says more; `--resume auto` goes on from the last checkpoint.",
            )
        if self.left:
            return
        for link in self.servers.values():
            link.send(messages.Lost(peer, reason))
        self.exchange.lose(peer)
        self.tables.lose(peer, reason)
        if peer == coordinator:
            self._questions.ask_again()
        self._fetching.count()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name by which messages call a type."""
    return {value: name for name, value in DTYPES.items()}.get(dtype, str(dtype).split(".")[-1])
