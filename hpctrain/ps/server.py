"""A server: holds slices, updates them with what workers push, and answers."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hpctrain.config import PsConfig
from hpctrain.errors import Error, PeerLost
from hpctrain.ps import wire
from hpctrain.ps.codec import decode_rows, encode_rows, make_codec, rows_capacity, sum_rows
from hpctrain.ps.consistency import Apply, Replayed, Schedule, consistency_of
from hpctrain.ps.coordinator import Coordinator
from hpctrain.ps.layout import Layout, Slice
from hpctrain.ps.link import STARTING_SECONDS, Link
from hpctrain.ps.order_log import Entry, OrderLog
from hpctrain.ps.placement import Placement, place, without
from hpctrain.ps.rules import Rule, rule_named
from hpctrain.ps.shared import Regions
from hpctrain.ps.snapshot import Recalled, Snapshots

ANSWER_BYTES = 2**21
"""Answers are sent as soon as so many bytes of weights are ready for a worker."""

HOUSEKEEPING_SECONDS = 0.02


@dataclass(eq=False)
class Pushed:
    """A worker's push of one slice, until it is applied."""

    worker: int
    clock: int
    read: int
    weight: float
    hyper: list[float]
    gradient: torch.Tensor
    rows: torch.Tensor | None = None
    near: bool = False  # the gradient lies in the worker's own memory


@dataclass(eq=False)
class Held:
    """A slice that a server holds.

    Attributes:
        piece: Which.
        group: Its parameter group.
        weights: 1-D.
        state: Of the update rule.
        schedule: What happens to it, and when.
        replicas: Servers that hold it besides.
        steps: Updates that the rule's state has had, through resumes too.
        pushes: Not applied yet, by worker.
        acknowledged: By replica, the updates it is known to have made.
        delayed: Workers to be answered once replicas have acknowledged.
        sent: What each worker was last sent, where that must outlive further updates.
        row_versions: Where gradients come as rows: the version that last changed each row.
        reads: Version that each worker has.
        blocked: An update is under way that waits for other servers.
    """

    piece: Slice
    group: int
    weights: torch.Tensor
    state: dict[str, torch.Tensor]
    schedule: Schedule
    replicas: list[int] = field(default_factory=list)
    steps: int = 0
    pushes: dict[int, Pushed] = field(default_factory=dict)
    wants: dict[int, bool] = field(default_factory=dict)
    acknowledged: dict[int, int] = field(default_factory=dict)
    delayed: list[int] = field(default_factory=list)
    sent: dict[int, torch.Tensor] = field(default_factory=dict)
    log: list[Entry] = field(default_factory=list)
    blocked: bool = False
    norm: float | None = None
    row_versions: torch.Tensor | None = None
    reads: dict[int, int] = field(default_factory=dict)

    def changed(self, rows: torch.Tensor | None, version: int) -> None:
        """Note which rows an update changed."""
        if rows is not None and self.row_versions is not None:
            self.row_versions[rows] = version

    def news(self, worker: int, width: int) -> torch.Tensor:
        """The rows that changed since a worker read them, encoded."""
        assert self.row_versions is not None
        rows = (self.row_versions > self.reads.get(worker, -1)).nonzero().view(-1)
        return _encoded(rows, self.weights.view(-1, width)[rows])


class Server:
    """One server of a parameter server.

    It is moved on by ``poll``, which never blocks, until ``done``.

    Args:
        me: This server's number.
        workers: Links with the workers, by number.
        servers: Links with the other servers, by number.
        config: The same on every rank.
        regions: Memory shared with the workers of this host.
        timeout_seconds: Longest wait of a collective of the workers.
        on_lost: Called with the number of each peer that is lost.

    Attributes:
        done: Whether every worker has left.
        newcomers: Links with workers that are getting ready to join.
        ports: New workers to connect with, and where.
        over: Whether no other new workers will come.
        lost: Whether any worker or server was lost.
        delays: How many pushes were applied to weights so many updates newer than those they were
            computed with.
    """

    def __init__(
        self,
        me: int,
        workers: dict[int, Link],
        servers: dict[int, Link],
        config: PsConfig,
        *,
        regions: Regions | None = None,
        timeout_seconds: float = 600.0,
        on_lost: Callable[[int], None] = lambda peer: None,
    ) -> None:
        self.me = me
        self.workers = workers
        self.servers = servers
        self.config = config
        self.consistency = consistency_of(config)
        self.regions = regions or Regions()
        self.done = False
        self.delays: Counter[int] = Counter()
        self.coordinator = Coordinator(
            workers,
            self._shares(),
            self._reply,
            timeout_seconds,
        )
        self.newcomers: dict[int, Link] = {}
        self.ports: list[tuple[int, str]] = []
        self.over = False
        self.held: dict[int, Held] = {}
        self.layout: Layout | None = None
        self.sizes: list[int] = []
        self._initial_workers = sorted(workers)
        self.order = OrderLog(
            config.record_order, config.replay, me, self._initial_workers, config.consistency
        )
        self.snapshots = Snapshots(self) if self.order.replayed is None else Recalled(self)
        for epoch, round_, shares in self.order.divisions():
            self.coordinator.divisions[epoch, round_] = (self._initial_workers, shares)
        self._codec = make_codec(config.compression)
        self._lr_by_delay = (
            config.lr_by_delay if config.lr_by_delay is not None else not self.consistency.rounds
        )
        self._pool: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._outbox: defaultdict[int, list[tuple[Held, int, bool]]] = defaultdict(list)
        self._outbox_bytes: Counter[int] = Counter()
        self._norms: defaultdict[int, dict[int, float]] = defaultdict(dict)
        self._aggregated: dict[int, list[Pushed]] = {}
        self._copies: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._deferred: list[Callable[[], None]] = []
        self._forgotten: dict[int, tuple[Link, str]] = {}
        self._housekept = 0.0
        self._beaten = 0.0
        self.lost = False
        self._on_lost = on_lost
        self._begun: set[int] = set()  # workers that have asked for weights
        self._resting: set[int] = set()  # workers that push nothing more, lost ones too
        self._opened = False
        self._completed = False  # whether a worker has done all of its steps
        self.lost_servers: list[int] = []
        self.initial_servers = sorted([me, *servers])

    def _shares(self) -> list[int] | None:
        if isinstance(self.config.shares, list):
            return self.config.shares
        return None if self.config.shares == "speed" else [1] * len(self.workers)

    # What moves it on.

    def poll(self) -> bool:
        """Move on; True where something happened.

        Raises:
            PeerLost: A slice is lost with all of its replicas, or a worker ended the run.
            Error: The recorded run cannot be replayed, or this one not be recorded.
        """
        try:
            return self._poll()
        except Error as error:
            hint = None if isinstance(error, PeerLost) else error.hint
            self._tell(wire.Abort(self.me, error.message, hint))
            raise

    def _poll(self) -> bool:
        moved = False
        for peers in (self.workers, self.servers, self.newcomers):
            for peer, link in list(peers.items()):
                if peers.get(peer) is not link:
                    continue  # lost or moved just now: what a lost one sent counts no more
                moved |= link.poll(self)
                if link.failed is not None:
                    self._lose(peer, link.failed)
        self._flush_all()
        now = time.monotonic()
        if now - self._housekept > HOUSEKEEPING_SECONDS:
            self._housekept = now
            self._keep_house(now)
        return moved

    def idle(self) -> bool:
        """Whether everything sent is on its way."""
        return all(link.idle() for link in [*self.workers.values(), *self.servers.values()])

    def _keep_house(self, now: float) -> None:
        silence = self.config.silence_seconds
        if now - self._beaten > silence / 5:
            self._beaten = now
            beat = wire.Beat(self.coordinator.stop)
            self._tell(beat)
        for link in [*self.workers.values(), *self.servers.values(), *self.newcomers.values()]:
            begun = link.peer in self._begun or (link.peer in self.servers and self._opened)
            if now - link.heard > (silence if begun else max(silence, STARTING_SECONDS)):
                self._lose(link.peer, f"it was silent for {now - link.heard:.1f} s")
        for peer, (link, reason) in list(self._forgotten.items()):
            if link.poll(_Deaf()):
                link.send(wire.Forgotten(reason))
            if link.failed is not None:
                del self._forgotten[peer]
        if overdue := self.coordinator.overdue():
            self.abort(f"the other workers waited too long for worker {overdue}")

    # What comes.

    def buffers(self, link: Link, message: wire.Message) -> Sequence[torch.Tensor]:
        """Memory for a message's payloads."""
        if isinstance(message, wire.Push):
            return [self._buffer(size) for size in message.sizes]
        if isinstance(message, wire.Replicate):
            return [] if message.size is None else [self._buffer(message.size)]
        if isinstance(message, wire.Open):
            return self._open(message)
        if isinstance(message, wire.Copy):
            return [self._buffer(size) for size in message.sizes]
        return []

    def payload(self, link: Link, message: wire.Message, number: int, buffer: torch.Tensor) -> None:
        """A payload has come: a push's are worked on one by one."""
        if isinstance(message, wire.Push):
            self._pushed(link.peer, message, number, buffer)
        elif isinstance(message, wire.Replicate):
            held = self.held[message.slice]
            push = Pushed(0, 0, 0, 1.0, message.hyper, *self._dense_or_rows(held, buffer))
            self._make(held, push, message.lr_factor)
            held.changed(push.rows, message.version + 1)
            if push.rows is None:
                self._recycle(buffer)
        elif isinstance(message, wire.Copy):
            self._copies[message.slice].append(buffer)

    def message(self, link: Link, message: wire.Message) -> None:
        """A message has come whole."""
        match message:
            case wire.Push():
                if not message.sizes:
                    for number in range(len(message.slices)):
                        self._pushed(link.peer, message, number, None)
            case wire.Pull():
                self._pulled(link.peer, message)
            case wire.Ask():
                self._asked(link.peer, message)
            case wire.Norms():
                self._norms[message.round].update(zip(message.slices, message.squares, strict=True))
                self._clip(message.round)
            case wire.Replicate():
                self._replicated(link, message)
            case wire.Replicated():
                held = self.held[message.slice]
                held.acknowledged[link.peer] = message.version
                self._answer_delayed(held)
            case wire.Copy():
                self._copied(link, message, self._copies.pop(message.slice))
            case wire.Open() if not self._opened:
                self._opened = True
                for lost in self.lost_servers:
                    self._inherit(lost)
                self._do_deferred()
            case wire.Open():
                pass
            case wire.Decided():
                self.coordinator.decided(message)
            case wire.Lost():
                self._lose(message.peer, message.reason)
            case wire.Rest():
                self._rest(link.peer)
            case wire.Leave():
                self._leave(link.peer, message.threads)
            case wire.Recruited():
                self.ports.append((message.worker, message.port))
            case wire.Over():
                self.over = True
            case wire.Join():
                self._join(link)
            case wire.Abort():
                raise message.error()
            case wire.Freeze() | wire.Frozen() | wire.Cut() | wire.Kept() | wire.Fetch():
                self.snapshots.message(link, message)
            case wire.Beat():
                self.coordinator.stop |= message.stop
            case _:
                raise Error(f"server {self.me} got a {type(message).__name__} by mistake.")

    def _open(self, message: wire.Open) -> list[torch.Tensor]:
        if self._opened:  # the worker before this one was lost, but had told us
            sizes = [
                size
                for index, steps in zip(message.slices, message.steps, strict=True)
                for size in [self.sizes[index]] * (1 + (len(self.rule.state_names) if steps else 0))
            ]
            return [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self.layout = Layout(message.flats, message.slice_bytes, whole=message.whole)
        self.rule: Rule = rule_named(message.rule)
        self.clip_norm = message.clip_norm
        self.sizes = self.layout.sizes()
        self.placement: Placement = place(
            self.sizes, self.initial_servers, method=self.config.placement,
            replicas=self.config.replicas,
        )  # fmt: skip
        self.order.open(self.layout)
        self.regions.lay_out(self.layout)
        buffers = []
        for index, steps in zip(message.slices, message.steps, strict=True):
            held = self._hold(index, 0)
            held.steps = steps
            if self.placement[index][0] == self.me:
                held.replicas = list(self.placement[index][1:])
                held.acknowledged = dict.fromkeys(held.replicas, 0)
            buffers += [held.weights, *(held.state.values() if steps else ())]
        return buffers

    def _hold(self, index: int, version: int) -> Held:
        assert self.layout is not None
        piece = self.layout.slices[index]
        flat = self.layout.flats[piece.flat]
        weights = None
        if self.consistency.lockstep and self.placement[index][0] == self.me:
            weights = self.regions.common(piece)
        if weights is None:
            weights = torch.zeros(piece.elements, dtype=flat.torch_dtype)
        state = self.rule.new_state(weights)
        schedule: Schedule
        recorded = self.order.recorded(index)
        if recorded is not None:
            schedule = Replayed(self.workers, recorded.pushes, recorded.answers)
        else:
            schedule = self.consistency.schedule(self.workers)
        schedule.version = version
        held = Held(piece, flat.group, weights, state, schedule)
        if flat.width:
            # Whoever read an older version than a copy's gets every row.
            held.row_versions = torch.full((piece.elements // flat.width,), version)
        self.held[index] = held
        return held

    def _copied(self, link: Link, message: wire.Copy, buffers: list[torch.Tensor]) -> None:
        if not self._opened:  # nobody has told this server yet what is trained
            self._deferred.append(lambda: self._copied(link, message, buffers))
            return
        held = self._hold(message.slice, message.version)
        held.steps = message.steps
        held.log = list(message.log)
        held.schedule.applied = dict(message.applied)
        for tensor, buffer in zip([held.weights, *held.state.values()], buffers, strict=True):
            tensor.copy_(buffer.view(tensor.dtype))
            self._recycle(buffer)
        link.send(wire.Replicated(message.slice, message.version))

    def primary(self, index: int) -> bool:
        """Whether this server is the one that updates a slice."""
        return index in self.held and self.placement[index][0] == self.me

    def _pulled(self, worker: int, message: wire.Pull) -> None:
        if not self._opened:
            self._deferred.append(lambda: self._pulled(worker, message))
            return
        if worker not in self.workers:
            return
        self._begun.add(worker)
        for index in message.slices:
            if not self.primary(index):
                # The worker found out before this server that their primary is gone.
                part = wire.Pull([index])
                self._deferred.append(lambda part=part: self._pulled(worker, part))  # type: ignore[misc]
                continue
            held = self.held[index]
            held.wants[worker] = True
            held.reads.pop(worker, None)
            held.schedule.pull(worker)
            self.run(held)

    def _asked(self, worker: int, question: wire.Ask) -> None:
        if not self.coordinates:
            # The worker found out before this server that the coordinator is gone.
            self._deferred.append(lambda: self._asked(worker, question))
        elif worker not in self.workers and worker not in self.newcomers:
            return
        elif question.what == "known":
            self.coordinator.known(question)
        elif question.what == "snapshot":
            self.order.asked(worker, question.clock)
            self.snapshots.ask(worker, question)
        else:
            if question.what == "give":
                counts = {f"delay.{delay}": count for delay, count in self.delays.items()}
                self.coordinator.add("statistics", counts)
                self.delays.clear()
            before = len(self.coordinator.divisions)
            self.coordinator.ask(worker, question)
            if len(self.coordinator.divisions) > before:
                (epoch, round_), (workers, shares) = list(self.coordinator.divisions.items())[-1]
                for link in self.servers.values():
                    link.send(wire.Decided(epoch, round_, workers, shares))

    def _reply(self, worker: int, answer: wire.Answer) -> None:
        link = self.workers.get(worker) or self.newcomers.get(worker)
        if link is not None:
            link.send(answer)

    # Pushes.

    def _pushed(
        self, worker: int, push: wire.Push, number: int, buffer: torch.Tensor | None
    ) -> None:
        index = push.slices[number]
        if worker not in self.workers:
            return
        if not self.primary(index):
            # The worker found out before this server that the slice's primary is gone.
            self._deferred.append(lambda: self._pushed(worker, push, number, buffer))
            return
        held = self.held[index]
        self.coordinator.postpone(worker)
        held.wants[worker] = push.pull
        held.reads[worker] = push.reads[number]
        if push.clock < held.schedule.applied[worker]:
            held.schedule.pull(worker)
            self._recycle(buffer)
        else:
            gradient, rows = self._gradient(held, worker, buffer)
            held.pushes[worker] = Pushed(
                worker, push.clock, push.reads[number], push.weight, push.hyper[held.group],
                gradient, rows, buffer is None,
            )  # fmt: skip
            self._schedule(held, worker, push)
            return
        self.run(held)

    def _schedule(self, held: Held, worker: int, push: wire.Push) -> None:
        if worker not in self.workers:
            return
        if self.snapshots.holds_back(held, worker, push.clock):
            self.snapshots.later(lambda: self._schedule(held, worker, push))
        else:
            held.schedule.push(worker, push.clock, push.round)
            self.run(held)

    def _gradient(
        self, held: Held, worker: int, buffer: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if buffer is None:
            return self.regions.gradient(worker, held.piece), None
        if self._codec is None or held.row_versions is not None:
            return self._dense_or_rows(held, buffer)
        gradient = self._buffer(held.weights.nbytes).view(held.weights.dtype)
        self._codec.decode(buffer, gradient)
        self._recycle(buffer)
        return gradient, None

    def _dense_or_rows(
        self, held: Held, buffer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.layout is not None
        width = self.layout.flats[held.piece.flat].width
        if not width:
            return buffer.view(held.weights.dtype), None
        height = held.weights.numel() // width
        rows, values = decode_rows(buffer, width, held.weights.dtype, height=height)
        return values, rows

    def run(self, held: Held) -> None:
        """Do with a slice what its schedule says, until it says to wait."""
        snapshots, schedule = self.snapshots, held.schedule
        if snapshots.active:
            snapshots.moved(held)
        while not held.blocked and not (snapshots.active and snapshots.keeps_still(held)):
            action = schedule.next()
            if action is None:
                break
            if isinstance(action, Apply):
                if action.workers:
                    self._apply(held, [held.pushes.pop(worker) for worker in action.workers])
                else:
                    self._pass_over(held)
                if snapshots.active:
                    snapshots.moved(held)
            else:
                if action.late and (dropped := held.pushes.pop(action.worker, None)):
                    self._free(held, dropped)
                self._grant(held, action.worker)

    def _apply(self, held: Held, pushes: list[Pushed]) -> None:
        if held.replicas:
            self._own(held, pushes[0])
        if self.consistency.rounds:
            self._aggregate(held, pushes)
            if self.clip_norm is not None:
                held.blocked = True
                self._aggregated[held.piece.number] = pushes
                self._tell_norm(held, float(pushes[0].gradient.double().square().sum()))
                return
        self._update(held, pushes)

    def _pass_over(self, held: Held) -> None:
        """A round goes by without an update of this slice."""
        message = wire.Replicate(held.piece.number, held.schedule.version - 1, [], 1.0, [], None)
        for replica in held.replicas:
            self.servers[replica].send(message)
        if self.clip_norm is not None:
            self._tell_norm(held, 0.0)

    def _tell_norm(self, held: Held, square: float) -> None:
        index, round_ = held.piece.number, held.schedule.version - 1
        self._norms[round_][index] = square
        for link in self.servers.values():
            link.send(wire.Norms(round_, [index], [square]))
        self._clip(round_)

    def _drop_orphans(self) -> None:
        """Lost workers' pushes that wait for the norms of a round that nobody else takes part in.

        Its other slices will not be pushed, so it goes by without an update.
        """
        for index, pushes in list(self._aggregated.items()):
            if all(push.worker not in self.workers for push in pushes):
                held = self.held[index]
                del self._aggregated[index]
                held.blocked = False
                for push in pushes:
                    self._free(held, push)
                self._pass_over(held)

    def _aggregate(self, held: Held, pushes: list[Pushed]) -> None:
        """The mean over samples of a round's gradients, in the first of their buffers."""
        first = pushes[0]
        if len(pushes) == 1 and first.weight in (0.0, 1.0):
            return
        weight = sum(push.weight for push in pushes)
        self._own(held, first)
        if first.rows is not None:
            parts = [(p.rows, p.gradient) for p in pushes if p.rows is not None]
            first.rows, first.gradient = sum_rows(parts)
        else:
            for push in pushes[1:]:
                first.gradient += push.gradient
        if weight > 0:
            first.gradient /= weight

    def _own(self, held: Held, push: Pushed) -> None:
        """Leave it as it is in its worker's memory: the worker may have to push it again."""
        if push.near:
            copy = self._buffer(held.weights.nbytes).view(held.weights.dtype)
            push.gradient, push.near = copy.copy_(push.gradient), False

    def _clip(self, round_: int) -> None:
        assert self.layout is not None and self.clip_norm is not None
        squares = self._norms[round_]
        if len(squares) < len(self.layout.slices):
            return
        # Added up by slice, so that the norm does not depend on who holds which.
        norm = sum(squares[index] for index in sorted(squares)) ** 0.5
        scale = min(1.0, self.clip_norm / (norm + 1e-6))
        ready = [i for i in self._aggregated if self.held[i].schedule.version - 1 == round_]
        for index in ready:
            held, pushes = self.held[index], self._aggregated.pop(index)
            pushes[0].gradient *= scale
            held.norm = norm
            self._update(held, pushes)
            held.blocked = False
            self.run(held)
        self._norms.pop(round_ - 2, None)

    def _update(self, held: Held, pushes: list[Pushed]) -> None:
        version = held.schedule.version - 1
        first = pushes[0]
        lr_factor = 1.0
        for push in pushes:
            delay = version - push.read
            self.delays[delay] += 1
            if self.order.keeps:
                held.log.append((version, push.worker, push.clock, push.read))
            if self._lr_by_delay and delay > 1:
                lr_factor = 1.0 / delay
        if self.config.delay_compensation and first.rows is None and first.worker in held.sent:
            drift = held.weights - held.sent[first.worker]
            first.gradient += self.config.delay_compensation * first.gradient.square() * drift
        made = any(push.weight > 0 for push in pushes)  # else nobody had a sample
        if held.replicas:
            self._send_replicas(held, version, first, lr_factor, pushes, made)
        if made:
            if self.order.watches:
                rows = [first.rows] if first.rows is not None else []
                tensors = [held.weights, first.gradient, *rows]
                self.order.updated(held.piece.number, [*first.hyper, lr_factor], tensors)
            self._make(held, first, lr_factor)
            held.changed(first.rows, version + 1)
        for push in pushes:
            self._free(held, push)

    def _make(self, held: Held, push: Pushed, lr_factor: float) -> None:
        held.steps += 1
        if push.rows is not None:
            assert self.layout is not None
            width = self.layout.flats[held.piece.flat].width
            state = {name: tensor.view(-1, width) for name, tensor in held.state.items()}
            self.rule.apply_rows(
                held.weights.view(-1, width), push.rows, push.gradient, state, push.hyper,
                held.steps, lr_factor=lr_factor,
            )  # fmt: skip
            return
        self.rule.apply(
            held.weights, push.gradient, held.state, push.hyper, held.steps,
            lr_factor=lr_factor, bounds=held.piece.bounds,
        )  # fmt: skip

    # Answers.

    def _grant(self, held: Held, worker: int) -> None:
        newest = held.schedule.version
        if not held.replicas or all(done >= newest for done in held.acknowledged.values()):
            if worker in held.schedule.applied:
                clock = held.schedule.applied[worker] - 1
                self.order.answered(held.piece.number, newest, worker, clock)
            self._answer(held, worker)
        else:
            held.delayed.append(worker)

    def _answer_delayed(self, held: Held) -> None:
        delayed, held.delayed = held.delayed, []
        for worker in delayed:
            self._grant(held, worker)

    def _answer(self, held: Held, worker: int) -> None:
        if worker not in self.workers:
            return
        pull = held.wants[worker]
        # The version of now: there may be updates before the answer is sent.
        self._outbox[worker].append((held, held.schedule.version, pull))
        self._outbox_bytes[worker] += held.weights.nbytes
        near = self.regions.has(worker)
        if pull and near:
            self.regions.put(worker, held.piece, held.weights)
        if pull and (not near or self.config.delay_compensation):
            self._keep_for(held, worker)
        if self._outbox_bytes[worker] >= ANSWER_BYTES:
            self._flush(worker)

    def _keep_for(self, held: Held, worker: int) -> None:
        """Copy the weights where the next update would change them while they are being sent."""
        assert self.layout is not None
        width = self.layout.flats[held.piece.flat].width
        if width:
            held.sent[worker] = held.news(worker, width)
        elif self.consistency.lockstep:
            held.sent[worker] = held.weights
        elif worker in held.sent:
            held.sent[worker].copy_(held.weights)
        else:
            held.sent[worker] = held.weights.clone()

    def _flush_all(self) -> None:
        for worker in [worker for worker, answers in self._outbox.items() if answers]:
            self._flush(worker)

    def _flush(self, worker: int) -> None:
        answers = self._outbox.pop(worker)
        del self._outbox_bytes[worker]
        for pull in (True, False):
            some = [(held, version) for held, version, wanted in answers if wanted == pull]
            if not some:
                continue
            first = some[0][0]
            lead = first.schedule.applied.get(worker, 0) - first.schedule.slowest
            payloads = []
            if pull and not self.regions.has(worker):
                payloads = [held.sent[worker] for held, _ in some]
            self.workers[worker].send(
                wire.Weights(
                    [held.piece.number for held, _ in some],
                    [version for _, version in some],
                    [payload.nbytes for payload in payloads],
                    lead,
                    first.norm,
                    pull,
                    first.schedule.applied.get(worker, 0),
                ),
                payloads,
            )

    # Replicas.

    def _send_replicas(
        self,
        held: Held,
        version: int,
        push: Pushed,
        lr_factor: float,
        pushes: list[Pushed],
        made: bool,
    ) -> None:
        # A copy: the update may use the gradient's memory.
        payloads = []
        if made and push.rows is not None:
            payloads = [_encoded(push.rows, push.gradient)]
        elif made:
            payloads = [push.gradient.clone()]
        message = wire.Replicate(
            held.piece.number, version, push.hyper, lr_factor,
            [(p.worker, p.clock, p.read) for p in pushes],
            payloads[0].nbytes if payloads else None,
        )  # fmt: skip
        for replica in held.replicas:
            self.servers[replica].send(message, payloads)

    def _replicated(self, link: Link, message: wire.Replicate) -> None:
        held = self.held[message.slice]
        held.schedule.version = message.version + 1
        for worker, clock, read in message.pushes:
            if self.order.keeps:
                held.log.append((message.version, worker, clock, read))
            if worker in held.schedule.applied:
                held.schedule.applied[worker] = clock + 1
        link.send(wire.Replicated(message.slice, message.version + 1))

    # Who comes and goes.

    @property
    def coordinates(self) -> bool:
        """Whether this server is the coordinator."""
        return self.me == min([self.me, *self.servers])

    @property
    def growable(self) -> bool:
        """Whether a new worker would find something to do."""
        return bool(self.layout and self.workers and not self._completed)

    def greet(self, link: Link) -> None:
        """A new worker can be talked with; it will ask to join when it is ready."""
        self.newcomers[link.peer] = link

    def _join(self, link: Link) -> None:
        worker = link.peer
        self.newcomers.pop(worker, None)
        self.workers[worker] = link
        self._begun.add(worker)
        for index, held in self.held.items():
            held.schedule.join(worker)
            if self.primary(index):
                held.wants[worker] = True
                self._answer(held, worker)
        for other in self.workers.values():
            other.send(wire.Joined(worker))

    def _leave(self, worker: int, threads: int) -> None:
        if self.newcomers.pop(worker, None) is not None:
            return
        self._completed = True
        self.order.left(worker, threads)
        self._forget_worker(worker)
        if not self.workers:
            self._end()

    def _end(self) -> None:
        mine = {index: held.log for index, held in self.held.items() if self.primary(index)}
        divisions = [(*when, shares) for when, (_, shares) in self.coordinator.divisions.items()]
        self.order.write(mine, divisions, whole=not self.lost)
        self.done = True

    def _forget_worker(self, worker: int) -> Link:
        self._outbox.pop(worker, None)
        link = self.workers.pop(worker)
        self.coordinator.leave(worker)
        self._rest(worker)
        return link

    def _rest(self, worker: int) -> None:
        """Nothing more will be pushed by this worker: nobody waits for it."""
        self._resting.add(worker)
        clocks = [held.schedule.applied.get(worker, 0) for held in self.held.values()]
        self.order.rested(worker, max(clocks, default=0))
        for held in self.held.values():
            held.schedule.leave(worker)
            held.pushes.pop(worker, None)
            held.delayed = [other for other in held.delayed if other != worker]
        self._drop_orphans()
        self.snapshots.left(worker)
        for held in list(self.held.values()):
            if self.primary(held.piece.number):
                self.run(held)

    def _lose(self, peer: int, reason: str) -> None:
        """A peer is gone: tell everybody, and go on without it."""
        if self.order.replayed is not None and (peer in self.workers or peer in self.servers):
            self.abort(f"rank {peer} is lost, and a replay needs all of them: {reason}")
        self.lost = True
        self._on_lost(peer)
        self.newcomers.pop(peer, None)
        if peer in self.workers:
            link = self._forget_worker(peer)
            if link.failed is None:
                self._forgotten[peer] = (link, reason)
            self._tell(wire.Lost(peer, reason))
            if not self.workers and self._completed:
                self._end()
            elif not self.workers:
                raise PeerLost(
                    f"server {self.me}: the last worker is gone: worker {peer}: {reason}.",
                    hint="its own log says more; `--resume auto` goes on from the last checkpoint.",
                )
        if peer in self.servers:
            self._lose_server(peer, reason)

    def _lose_server(self, peer: int, reason: str) -> None:
        del self.servers[peer]
        self.lost_servers.append(peer)
        self._tell(wire.Lost(peer, reason))
        if self._opened:
            self._inherit(peer)
        self.snapshots.server_lost()
        self._do_deferred()

    def _do_deferred(self) -> None:
        deferred, self._deferred = self._deferred, []
        for action in deferred:
            action()

    def _inherit(self, lost: int) -> None:
        """Take over those of a lost server's slices that fall to this one.

        Raises:
            PeerLost: The slices, or one of them, are lost.
        """
        before = self.placement
        gone = self.lost_servers[: self.lost_servers.index(lost) + 1]
        survivors = [server for server in self.initial_servers if server not in gone]
        self.placement = without(before, self.sizes, lost, survivors)
        mine = {index for index, holders in enumerate(self.placement) if holders[0] == self.me}
        if missing := mine - set(
            self.held
        ):  # another server was lost just before, and they were yet to be copied
            raise PeerLost(
                f"server {lost} is lost, and with it the only whole copy of {len(missing)} "
                "slices of the parameters.",
                hint="more ps.replicas survive more losses at a time; now, go on from a "
                "checkpoint.",
            )
        for held in self.held.values():
            self._promote(held, before)
        # Who has made an update has all norms of its round; others may wait for lost ones.
        for round_, squares in self._norms.items():
            for link in self.servers.values():
                link.send(wire.Norms(round_, list(squares), list(squares.values())))

    def _promote(self, held: Held, before: Placement) -> None:
        index = held.piece.number
        if self.placement[index][0] != self.me:
            return
        for worker in list(held.schedule.applied):
            if worker in self._resting:
                held.schedule.leave(worker)
        held.replicas = list(self.placement[index][1:])
        common = self.regions.common(held.piece) if self.consistency.lockstep else None
        if common is not None:  # which may hold an update that the lost server had just begun
            held.weights = common.copy_(held.weights)
        known = held.acknowledged
        held.acknowledged = {}
        for replica in held.replicas:
            if replica in before[index] and replica in known:
                held.acknowledged[replica] = known[replica]
            elif replica in self.servers:
                held.acknowledged[replica] = 0
                copies = [tensor.clone() for tensor in (held.weights, *held.state.values())]
                self.servers[replica].send(
                    wire.Copy(
                        index, held.schedule.version, held.steps, dict(held.schedule.applied),
                        held.log, [tensor.nbytes for tensor in copies],
                    ),
                    copies,
                )  # fmt: skip
        self._answer_delayed(held)
        self.run(held)

    def _tell(self, message: wire.Message) -> None:
        for peers in (self.workers, self.servers, self.newcomers):
            for link in peers.values():
                link.send(message)

    def abort(self, reason: str) -> None:
        """End the run for everybody.

        Raises:
            PeerLost: Always.
        """
        raise PeerLost(f"server {self.me} ends the run: {reason}.", hint="its log says more.")

    # Memory.

    def _buffer(self, size: int) -> torch.Tensor:
        free = self._pool[size]
        return free.pop() if free else torch.empty(size, dtype=torch.uint8)

    def _recycle(self, buffer: torch.Tensor | None) -> None:
        if buffer is not None:
            raw = buffer.view(torch.uint8)
            self._pool[raw.nbytes].append(raw)

    def _free(self, held: Held, push: Pushed) -> None:
        if push.rows is None and not push.near:
            self._recycle(push.gradient)


def _encoded(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    capacity = rows_capacity(len(rows), values.shape[1], values.itemsize)
    out = torch.empty(capacity, dtype=torch.uint8)
    return out[: encode_rows(rows, values, out)]


class _Deaf:
    """Hears that something comes from a worker that is forgotten, and nothing else."""

    def buffers(self, link: Link, message: wire.Message) -> Sequence[torch.Tensor]:
        sizes = getattr(message, "sizes", ())
        return [torch.empty(size, dtype=torch.uint8) for size in sizes]

    def payload(self, link: Link, message: wire.Message, number: int, buffer: torch.Tensor) -> None:
        pass

    def message(self, link: Link, message: wire.Message) -> None:
        pass
