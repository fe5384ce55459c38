"""A worker's end: pushes gradients to the servers and brings weights back, in the background."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hpctrain.config import PsConfig
from hpctrain.errors import Dismissed, Error, PeerLost
from hpctrain.ps import wire
from hpctrain.ps.codec import (
    ErrorFeedback,
    decode_rows,
    encode_rows,
    make_codec,
    rows_capacity,
)
from hpctrain.ps.consistency import consistency_of
from hpctrain.ps.layout import DTYPES, Layout
from hpctrain.ps.link import STARTING_SECONDS, Link
from hpctrain.ps.placement import Placement, place, without
from hpctrain.ps.rules import Rule

WINDOW_BYTES = 16 * 2**20
"""Gradients on their way to a server at a time: what becomes ready later but is needed sooner
overtakes the rest."""

GROUP_BYTES = 2**18
"""Small slices for the same server travel in one message up to about this size."""


class Step(NamedTuple):
    """What a worker says of a step's pushes."""

    clock: int
    round: int
    weight: float
    hyper: list[list[float]]
    pull: bool


@dataclass
class Snapshot:
    """All slices at one point of the training.

    Attributes:
        weights: The flats.
        state: The flats of each tensor of the update rule, by name.
        steps: Updates the state has had, by slice.
    """

    weights: list[torch.Tensor]
    state: dict[str, list[torch.Tensor]]
    steps: list[int]


class Future:
    """An exchange under way."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def done(self) -> bool:
        """Whether it is over."""
        return self._client.settled()

    def wait(self) -> None:
        """Return when it is over.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
        """
        self._client.wait()


class Client:
    """One worker of a parameter server.

    The caller's thread says what is to be done; ``poll``, on a thread of its own
    (:class:`hpctrain.ps.loop.Loop`), does it. Only that thread uses MPI.

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
        versions: Of each slice's weights here.
        newest: The highest version a server has spoken of.
        norm: Of the last aggregated gradient before clipping, if the servers clip.
        leads: How often this worker was so many clocks ahead of the slowest.
        stopped: Whether training is to end early.
        counted: Its clock, as the servers count it.
        joined: Workers that came later.
        behind: Rounds that went by without this worker at its last step.
        moved_bytes: Payload bytes pushed and pulled; ``dense_bytes``: of the same as they are in
            memory, sent or not.
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
        self.versions: list[int] = []
        self.newest = 0
        self.norm: float | None = None
        self.leads: Counter[int] = Counter()
        self.stopped = False
        self.behind = 0
        self.moved_bytes = 0
        self.dense_bytes = 0
        self.lost: dict[int, str] = {}
        self._wake = wake
        self._on_lost = on_lost
        self._consistency = consistency_of(config)
        self._codec = make_codec(config.compression)
        self._feedback: dict[int, ErrorFeedback] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._settled = threading.Event()
        self._settled.set()
        self._error: Error | None = None
        self._initial_servers = sorted(servers)
        self._step = Step(0, 0, 1.0, [], True)
        self._sparse: dict[int, torch.Tensor] = {}
        self._row_slices: set[int] = set()
        # Slices ready to be pushed, by need; and those pushed, with their server.
        self._ready: list[int] = []
        self._left: set[int] = set()
        self._under_way: dict[int, int] = {}
        self._pulling = False  # what is under way is pulls, not pushes
        self._encoded: dict[int, torch.Tensor] = {}  # pushes that may have to be sent again
        # What tells the servers what is trained, and which workers do so unless they are lost.
        self._opening: Callable[[], None] | None = None
        self._before: set[int] = set()
        self._begun = False
        self._questions: dict[int, tuple[wire.Ask, Any]] = {}
        self._answers: dict[int, wire.Answer] = {}
        self._asked = 0
        self._collective = (0, 0)
        # Results of collectives that others may not have yet, for the coordinator's successor.
        self._results: dict[str, tuple[Any, bytes]] = {}
        self._parts: dict[int, wire.Part] = {}
        self._snapshot: Snapshot | None = None
        self._fetched: tuple[int, threading.Event] | None = None
        self._beaten = 0.0
        self._lead = 0
        self.counted = 0
        self.joined: list[int] = []
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
            clip_norm: Largest norm of the aggregated gradient.
            join: Whether the others are under way.
        """
        self.layout, self.rule = layout, rule
        self.weights, self.gradients = list(weights), list(gradients)
        self.sizes = layout.sizes()
        self.versions = [0] * len(layout.slices)
        self._results.clear()
        self._row_slices = {p.number for p in layout.slices if layout.flats[p.flat].width}
        if self._codec is not None and self._codec.feedback:
            self._feedback = {
                piece.number: ErrorFeedback(
                    self._codec, piece.elements, layout.flats[piece.flat].torch_dtype
                )
                for piece in layout.slices
                if piece.number not in self._row_slices
            }
        self._before = set(before)
        if not join:
            flats = [*(weights if start is None else start)]
            self._opening = lambda: self._open(flats, state, steps, clip_norm)
        self._settled.clear()
        self._do(lambda: self._start(join))
        return Future(self)

    def begin_late(self, servers: Sequence[int], lost: Sequence[int]) -> None:
        """Say which servers there were at the beginning, and which are lost."""
        self._initial_servers = sorted(servers)
        self.lost = dict.fromkeys(lost, "it was lost before this worker came")

    def begin(self, weight: float, hyper: list[list[float]]) -> None:
        """Begin a step.

        Args:
            weight: What the loss is multiplied by.
            hyper: For each parameter group the update rule's numbers.
        """
        every = self.config.pull_every
        interval = every if isinstance(every, int) else every[self.place % len(every)]
        pull = (self.clock + 1) % interval == 0
        step = Step(self.clock, self.newest, weight, hyper, pull)
        self._sparse = {}
        self._left = set(range(len(self.versions)))
        self._settled.clear()
        self._do(lambda: self._set_step(step))

    def push(self, slices: Iterable[int], rows: dict[int, torch.Tensor] | None = None) -> None:
        """These slices' gradients are ready, in the flats; they must stay as they are.

        Args:
            slices: Their numbers.
            rows: By flat whose gradients come as rows: those that this step has touched.
        """
        indices = list(slices)
        if rows:
            self._sparse.update(rows)
        self._do(lambda: self._push(indices))

    def push_pull(self, weight: float, hyper: list[list[float]]) -> Future:
        """A whole step: push all gradients, and bring the weights back."""
        self.begin(weight, hyper)
        self.push(range(len(self.versions)))
        return Future(self)

    def pull(self) -> Future:
        """Bring all weights here."""
        self._settled.clear()
        self._do(lambda: self._pull_all(None))
        return Future(self)

    def settled(self) -> bool:
        """Whether nothing is under way."""
        return self._settled.is_set()

    def wait(self) -> None:
        """Return when every push of the step is answered.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
        """
        self._await(self._settled)

    def end(self) -> None:
        """The step is over: its answers are here."""
        self.wait()
        self.leads[self._lead] += 1
        self._lead = 0
        if self._consistency.rounds:
            self.behind = max(0, self.newest - self.clock - 1)
        self.clock += 1 + self.behind

    def ask(self, what: str, value: Any = None, data: bytes = b"") -> wire.Answer:
        """Ask the coordinator, and wait for its answer; it gives up on who is waited for, or us.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
        """
        event = threading.Event()
        self._asked += 1
        question = wire.Ask(self._asked, what, value, data, self.clock)
        self._do(lambda: self._ask(question, event))
        self._await(event)
        return self._answers.pop(question.number)

    def next_collective(self) -> str:
        """What the next collective is called: all workers have the same ones in the same order.

        Where all take each step together the step is part of it, so that a worker may join.
        """
        clock = self.clock if self._consistency.lockstep else 0
        if clock != self._collective[0]:
            self._collective = (clock, 0)
        self._collective = (clock, self._collective[1] + 1)
        return "{}.{}".format(*self._collective)

    def snapshot(self) -> Snapshot:
        """All slices at one point, with the state of the update rule.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
        """
        while True:
            number = int(self.ask("snapshot").value)
            event = threading.Event()
            self._do(lambda number=number, event=event: self._fetch(number, event))  # type: ignore[misc]
            self._await(event)
            found = sum(len(part.slices) for part in self._parts.values())
            assert self._snapshot is not None
            if found == len(self.layout.slices):  # else a server was lost meanwhile
                return self._snapshot

    def rest(self) -> None:
        """Tell the servers that this worker pushes nothing more: nobody needs to wait for it."""
        self._do(lambda: self._tell(wire.Rest()))

    def leave(self) -> None:
        """Tell the servers that this worker has done all of its steps."""
        event = threading.Event()
        threads = torch.get_num_threads()
        self._do(lambda: self._leave(event, threads))
        event.wait()
        if self._error is not None and not isinstance(self._error, Dismissed):
            raise self._error

    def abort(self, reason: str) -> None:
        """Tell the servers that this worker failed, so that the run ends for everybody."""
        self._do(lambda: self._tell(wire.Abort(self.me, reason)))

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake()

    def _await(self, event: threading.Event) -> None:
        # Bounded: the polling thread sets the event when servers are silent for too long.
        event.wait()
        if self._error is not None:
            raise self._error

    # For the polling thread.

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return bool(
            self._commands or self._ready or self._under_way or self._questions or self._fetched
        )

    def poll(self) -> bool:
        """Move on; True where something happened."""
        moved = bool(self._commands)
        try:
            while self._commands:
                self._commands.popleft()()
            if self._ready:
                self._send_ready()
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
        """Whether everything sent is on its way."""
        return all(link.idle() for link in self.servers.values())

    def fail(self, error: Error) -> None:
        """Nothing more can be done: whoever waits is told."""
        if self._error is None:
            self._error = error
        self._settled.set()
        for _, event in self._questions.values():
            event.set()
        if self._fetched is not None:
            self._fetched[1].set()

    def _keep_house(self) -> None:
        now = time.monotonic()
        if now - self._beaten < self.config.silence_seconds / 5:
            return
        paused = now - self._beaten > self.config.silence_seconds / 2 and self._beaten > 0
        self._beaten = now
        self._tell(wire.Beat())
        silence = self.config.silence_seconds
        limit = silence if self._begun else max(silence, STARTING_SECONDS)
        for link in list(self.servers.values()):
            if paused:  # this process was stopped: what the others sent is yet to be read
                link.heard = now
            elif now - link.heard > limit:
                self._lose(link.peer, f"it was silent for {now - link.heard:.1f} s")

    def _tell(self, message: wire.Message) -> None:
        for link in self.servers.values():
            link.send(message)

    def _start(self, join: bool) -> None:
        everyone = list(self._initial_servers)
        self.placement: Placement = place(
            self.sizes, everyone, method=self.config.placement, replicas=self.config.replicas
        )
        for lost in [server for server in self.lost if server in everyone]:
            everyone.remove(lost)
            self.placement = without(self.placement, self.sizes, lost, everyone)
        self._open_in_turn()
        self._pull_all(wire.Join() if join else None)

    def _open_in_turn(self) -> None:
        if self._opening is not None and self._before <= set(self.lost):
            opening, self._opening = self._opening, None
            opening()

    def _open(
        self,
        weights: Sequence[torch.Tensor],
        state: Mapping[str, Sequence[torch.Tensor]] | None,
        steps: Sequence[int] | None,
        clip_norm: float | None,
    ) -> None:
        flats = [weights, *(state.values() if state else ())]
        for server, link in self.servers.items():
            indices = [i for i, holders in enumerate(self.placement) if server in holders]
            updates = [steps[i] if steps else 0 for i in indices]
            payloads = []
            for index, done in zip(indices, updates, strict=True):
                piece = self.layout.slices[index]
                for kind in flats if done else flats[:1]:
                    payloads.append(kind[piece.flat][piece.start : piece.stop].clone())
            layout = self.layout
            link.send(
                wire.Open(
                    list(layout.flats), layout.slice_bytes, layout.whole, self.rule.name,
                    indices, updates, clip_norm,
                ),
                payloads,
            )  # fmt: skip

    def _pull_all(self, message: wire.Join | None) -> None:
        self._pull(range(len(self.placement)), message)
        if not self._under_way:
            self._settled.set()

    def _pull(self, some: Iterable[int], message: wire.Join | None = None) -> None:
        self._pulling = True
        groups: dict[int, list[int]] = {}
        for index in some:
            groups.setdefault(self.placement[index][0], []).append(index)
        for server, link in self.servers.items():
            indices = groups.get(server, [])
            self._under_way.update(dict.fromkeys(indices, server))
            if indices or message:
                link.send(message or wire.Pull(indices))

    def _set_step(self, step: Step) -> None:
        self._step = step
        self._pulling = False

    def _push(self, indices: list[int]) -> None:
        for index in indices:
            heapq.heappush(self._ready, index)

    def _send_ready(self) -> None:
        waiting = []
        groups: dict[tuple[int, bool], list[int]] = {}
        while self._ready:
            index = heapq.heappop(self._ready)
            server = self.placement[index][0]
            if self.servers[server].unsent_bytes > WINDOW_BYTES:
                waiting.append(index)
                continue
            # Rows are sent to near servers too, which would have to look for them in the whole.
            sent = server not in self.near or index in self._row_slices
            group = groups.setdefault((server, sent), [])
            group.append(index)
            if sent and sum(self.sizes[i] for i in group) >= GROUP_BYTES:
                self._send_push(server, groups.pop((server, sent)), sent)
        for (server, sent), group in groups.items():
            self._send_push(server, group, sent)
        for index in waiting:
            heapq.heappush(self._ready, index)

    def _send_push(self, server: int, indices: list[int], sent: bool) -> None:
        payloads = [self._payload(index) for index in indices] if sent else []
        for index in indices:
            self._under_way[index] = server
            self._left.discard(index)
            self.dense_bytes += self.sizes[index]
        self.moved_bytes += sum(payload.nbytes for payload in payloads)
        step = self._step
        self.servers[server].send(
            wire.Push(
                step.clock, step.round, step.weight, step.hyper, indices,
                [self.versions[index] for index in indices],
                [payload.nbytes for payload in payloads], step.pull,
            ),
            payloads,
        )  # fmt: skip

    def _payload(self, index: int) -> torch.Tensor:
        piece = self.layout.slices[index]
        flat = self.layout.flats[piece.flat]
        gradient = self.gradients[piece.flat][piece.start : piece.stop]
        if flat.width:
            first = piece.start // flat.width
            rows = self._sparse.get(piece.flat, torch.empty(0, dtype=torch.int64))
            rows = rows[(rows >= first) & (rows < piece.stop // flat.width)] - first
            values = gradient.view(-1, flat.width)[rows]
            capacity = rows_capacity(len(rows), flat.width, values.itemsize)
            out = torch.empty(capacity, dtype=torch.uint8)
            return out[: encode_rows(rows, values, out)]
        if self._codec is None:
            return gradient
        if index in self._encoded:  # to encode it again would count what was left out twice
            return self._encoded[index]
        out = torch.empty(
            self._codec.capacity(piece.elements, gradient.itemsize), dtype=torch.uint8
        )
        encoder = self._feedback.get(index, self._codec)
        self._encoded[index] = out[: encoder.encode(gradient, out)]
        return self._encoded[index]

    def _ask(self, question: wire.Ask, event: threading.Event) -> None:
        self._questions[question.number] = (question, event)
        self.servers[min(self.servers)].send(question)

    def _fetch(self, number: int, event: threading.Event) -> None:
        self._parts = {}
        self._fetched = (len(self.servers), event)
        layout = self.layout
        kinds = [
            [torch.zeros(f.elements, dtype=f.torch_dtype) for f in layout.flats]
            for _ in range(1 + len(self.rule.state_names))
        ]
        state = dict(zip(self.rule.state_names, kinds[1:], strict=True))
        self._snapshot = Snapshot(kinds[0], state, [0] * len(layout.slices))
        self._tell(wire.Fetch(number))

    def _leave(self, event: threading.Event, threads: int = 1) -> None:
        self._tell(wire.Leave(threads))
        self.left = True
        event.set()

    # What comes.

    def buffers(self, link: Link, message: wire.Message) -> Sequence[torch.Tensor]:
        """Memory for a message's payloads: weights go where the model reads them."""
        if isinstance(message, wire.Weights) and message.sizes:
            return [
                self._target(index, size)
                for index, size in zip(message.slices, message.sizes, strict=True)
            ]
        if isinstance(message, wire.Part):
            assert self._snapshot is not None
            kinds = [self._snapshot.weights, *self._snapshot.state.values()]
            pieces = [self.layout.slices[index] for index in message.slices]
            return [kind[p.flat][p.start : p.stop] for p in pieces for kind in kinds]
        return []

    def payload(self, link: Link, message: wire.Message, number: int, buffer: torch.Tensor) -> None:
        """A payload has come, to where it belongs; changed rows are yet to be put there."""
        if not isinstance(message, wire.Weights):
            return
        self.moved_bytes += buffer.nbytes
        piece = self.layout.slices[message.slices[number]]
        flat = self.layout.flats[piece.flat]
        if flat.width:
            table = self.weights[piece.flat][piece.start : piece.stop].view(-1, flat.width)
            rows, values = decode_rows(buffer, flat.width, flat.torch_dtype, height=len(table))
            table[rows] = values

    def _target(self, index: int, size: int) -> torch.Tensor:
        piece = self.layout.slices[index]
        if self.layout.flats[piece.flat].width:
            return torch.empty(size, dtype=torch.uint8)
        return self.weights[piece.flat][piece.start : piece.stop]

    def message(self, link: Link, message: wire.Message) -> None:
        """A message has come whole."""
        match message:
            case wire.Weights():
                self._answered(link.peer, message)
            case wire.Answer():
                if question := self._questions.pop(message.number, None):
                    self._answers[message.number] = message
                    self._keep_result(question[0], message)
                    question[1].set()
            case wire.Part():
                self._part(link.peer, message)
            case wire.Beat():
                self.stopped |= message.stop
            case wire.Lost():
                self._lose(message.peer, message.reason)
            case wire.Joined() if message.worker not in self.joined:
                self.joined.append(message.worker)
            case wire.Joined():  # another server has said so before
                pass
            case wire.Forgotten():
                raise PeerLost(
                    f"the servers went on without worker {self.me}: {message.reason}.",
                    hint="was this process stopped, or its host? A longer ps.silence_seconds "
                    "allows for more.",
                )
            case wire.Over():
                raise Dismissed(f"worker {self.me}: the run was over before it could take part.")
            case wire.Abort():
                raise message.error()
            case _:
                raise Error(f"worker {self.me} got a {type(message).__name__} by mistake.")

    def _answered(self, server: int, message: wire.Weights) -> None:
        for index, version in zip(message.slices, message.versions, strict=True):
            if self._under_way.pop(index, None) is None:
                continue
            self._encoded.pop(index, None)
            self.newest = max(self.newest, version)
            if message.pulled:
                self.versions[index] = version
                self.dense_bytes += self.sizes[index]
        self._lead = max(self._lead, message.lead)
        self.counted = max(self.counted, message.clock)
        self.norm = message.norm
        if not self._under_way and not self._ready and not self._left:
            self._opening, self._begun = None, True
            self._settled.set()

    def _keep_result(self, question: wire.Ask, answer: wire.Answer) -> None:
        if question.what == "reduce":
            self._results = {question.value[0]: (answer.value, answer.data)}  # all had those before
        elif question.what == "broadcast":
            self._results[question.value[0]] = (answer.value, answer.data or question.data)

    def _part(self, server: int, message: wire.Part) -> None:
        assert self._snapshot is not None and self._fetched is not None
        for index, steps in zip(message.slices, message.steps, strict=True):
            self._snapshot.steps[index] = steps
        self._parts[server] = message
        self._count_parts()

    def _count_parts(self) -> None:
        if self._fetched is not None and set(self._parts) >= set(self.servers):
            event, self._fetched = self._fetched[1], None
            event.set()

    def _lose(self, peer: int, reason: str) -> None:
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
            link.send(wire.Lost(peer, reason))
        if hasattr(self, "placement"):
            self.placement = without(self.placement, self.sizes, peer, sorted(self.servers))
            again = [index for index, server in self._under_way.items() if server == peer]
            for index in again:
                del self._under_way[index]
            if self._pulling:
                self._pull(again)
            else:
                self._push(again)
        if peer == coordinator:
            successor = self.servers[min(self.servers)]
            for number, (value, data) in self._results.items():
                successor.send(wire.Ask(0, "known", [number, value], data))
            for question, _ in self._questions.values():
                successor.send(question)
        self._count_parts()


def dtype_name(dtype: torch.dtype) -> str:
    """How messages call a type."""
    return {value: name for name, value in DTYPES.items()}.get(dtype, str(dtype).split(".")[-1])
