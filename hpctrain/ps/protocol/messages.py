"""The messages between workers and servers. Payloads (slices) travel beside them, as raw bytes.

Messages are MessagePack of typed structs: reading one executes nothing and checks every type.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hpctrain.errors import Error, PeerLost
from hpctrain.ps.partition.layout import Flat
from hpctrain.tables.spec import TableSpec

AGAIN = "again"
"""The answer to a broadcast whose root is lost: when that is known everywhere, ask anew."""


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base of all messages: an array that begins with the message's name."""


class Open(Message):
    """The first worker tells a server what it will hold; payloads: weights, then state, by slice.

    Attributes:
        flats: Of the layout.
        slice_bytes: Of the layout.
        whole: Of the layout.
        rule: Name of the update rule.
        slices: Those that follow as payloads.
        steps: Updates that each of them has had.
        missed: For each of them, by part (see Slice.bounds), updates without a gradient of it.
        clip_norm: Largest norm of the aggregated gradient, or None.
    """

    flats: list[Flat]
    slice_bytes: int
    whole: bool
    rule: str
    slices: list[int]
    steps: list[int]
    missed: list[dict[int, int]]
    clip_norm: float | None


class Push(Message):
    """Gradients of some slices; payloads: one for each, unless they lie in shared memory.

    Attributes:
        clock: Steps the worker pushed before this one.
        round: Of the update this gradient is meant for, where updates go by rounds.
        weight: What the loss was multiplied by, so that means over samples can be taken.
        hyper: For each parameter group the update rule's numbers.
        slices: Whose gradients these are.
        reads: Version of each slice's weights that the gradient was computed with.
        sizes: Bytes of each payload; empty where the gradients lie in shared memory.
        pull: Whether weights are wanted in return.
        absent: By slice, the parts (see Slice.bounds) that have no gradient at this worker.
    """

    clock: int
    round: int
    weight: float
    hyper: list[list[float]]
    slices: list[int]
    reads: list[int]
    sizes: list[int]
    pull: bool
    absent: dict[int, list[int]] = {}


class Put(Message):
    """Weights that all workers have changed by themselves; the next update starts from them.

    Payloads: one for each slice. Where workers go in lockstep alone.
    """

    slices: list[int]
    sizes: list[int]


class Pull(Message):
    """Weights are wanted without a push."""

    slices: list[int]


class Weights(Message):
    """The answer to a push or a pull: it was applied; here are the weights, if they were wanted.

    Attributes:
        slices: Which.
        versions: Updates each has had.
        sizes: Bytes of each payload; empty where nothing follows.
        lead: Clocks by which the worker is now ahead of the slowest.
        norm: Of the aggregated gradient before clipping, where it is clipped.
        pulled: Whether weights were asked for; they may lie in shared memory.
        clock: The worker's, as the server counts it.
    """

    slices: list[int]
    versions: list[int]
    sizes: list[int]
    lead: int
    norm: float | None
    pulled: bool
    clock: int


class Norms(Message):
    """Squared norms of aggregated slices, from server to server."""

    round: int
    slices: list[int]
    squares: list[float]


class Replicate(Message):
    """An update for a replica; payload: the gradient as applied.

    Attributes:
        slice: Which.
        version: Updates before this one.
        hyper: The update rule's numbers.
        lr_factor: On the learning rate.
        pushes: Worker, clock and version read of each push in it.
        size: Bytes of the gradient; None: there is none, because nobody had samples.
        absent: Parts that no push has a gradient of.
    """

    slice: int
    version: int
    hyper: list[float]
    lr_factor: float
    pushes: list[tuple[int, int, int]]
    size: int | None
    absent: list[int] = []


class Copy(Message):
    """A whole slice for a new replica; payloads: weights, then state.

    Attributes:
        slice: Which.
        version: Updates it has had.
        steps: Updates its state has had.
        applied: Worker and clock after its last push.
        log: All pushes so far, for a record of their order.
        sizes: Of the payloads, in bytes.
        missed: By part, updates that had no gradient of it.
    """

    slice: int
    version: int
    steps: int
    applied: dict[int, int]
    log: list[tuple[int, int, int, int]]
    sizes: list[int]
    missed: dict[int, int] = {}


class Replicated(Message):
    """A replica has made the slice's update of that version."""

    slice: int
    version: int


class Freeze(Message):
    """The coordinator wants a snapshot: tell what you have begun, and begin nothing beyond it."""

    snapshot: int


class Frozen(Message):
    """What a server has begun: clock by worker, and the highest version."""

    snapshot: int
    clocks: dict[int, int]
    version: int


class Cut(Message):
    """Where the snapshot is: what every server has begun."""

    snapshot: int
    clocks: dict[int, int]
    version: int


class Kept(Message):
    """A server has the snapshot of all of its slices."""

    snapshot: int


class Fetch(Message):
    """A worker wants a server's part of a snapshot, and lets it go."""

    snapshot: int


class Part(Message):
    """A server's part of a snapshot; payloads: weights, then state, by slice."""

    snapshot: int
    slices: list[int]
    steps: list[int]
    missed: list[dict[int, int]]


class Ask(Message):
    """A worker's question to the coordinator.

    Attributes:
        number: Of the worker's questions.
        what: Is asked; see Coordinator.
        value: More about it.
        data: Likewise, as bytes.
        clock: The worker's.
    """

    number: int
    what: str
    value: Any
    data: bytes = b""
    clock: int = 0


class Answer(Message):
    """The coordinator's answer."""

    number: int
    value: Any
    data: bytes = b""


class Decided(Message):
    """How samples are divided in a round of an epoch, from the coordinator to its successors."""

    epoch: int
    round: int
    workers: list[int]
    shares: list[int]


class Heartbeat(Message):
    """I live; from the coordinator also: whether training is to stop."""

    stop: bool = False


class Lost(Message):
    """A peer is gone; believe it."""

    peer: int
    reason: str


class NewWorker(Message):
    """A new worker waits to be connected with; from the coordinator to the other servers."""

    worker: int
    port: str


class Over(Message):
    """The run is over: to workers that came too late, and to servers: nobody else will come."""


class Join(Message):
    """A new worker is ready to take part; wants all weights."""


class Joined(Message):
    """A worker takes part: from itself, before its first push, and on to the other workers.

    Attributes:
        worker: Who.
        since: The clock of the first collectives that it comes to.
    """

    worker: int
    since: int


class Rest(Message):
    """A worker pushes nothing more, but may still ask and pull."""


class Leave(Message):
    """A worker has done all of its steps, with so many threads."""

    threads: int = 1


class Evicted(Message):
    """To a worker that was silent for too long: the others went on without it."""

    reason: str


class Abort(Message):
    """An error that ends the run for everybody.

    Attributes:
        peer: Whose.
        reason: Its message.
        hint: Where the caller can put it right: how.
    """

    peer: int
    reason: str
    hint: str | None = None

    def error(self) -> Error:
        """Return the peer's error, to be raised here."""
        if self.hint is None:
            return PeerLost(self.reason, hint="the log of that process says more.")
        return Error(self.reason, hint=self.hint)


class OpenTables(Message):
    """A worker tells a server which embedding tables there are, before anything else of them."""

    tables: list[TableSpec]


class PullRows(Message):
    """Rows of a table are wanted; payload: their ids.

    Attributes:
        number: Of the worker's requests.
        group: Whose rows.
        table: Its place among the tables.
        count: How many rows.
    """

    number: int
    group: int
    table: int
    count: int


class Rows(Message):
    """The answer to PullRows; payload: the rows.

    Attributes:
        number: Of the request.
        group: Whose rows.
        version: Updates that the group had had.
    """

    number: int
    group: int
    version: int


class PushRows(Message):
    """A step's gradients of a group's rows; payloads for each table: ids, gradients, sights.

    Attributes:
        group: Whose rows.
        clock: Steps the worker pushed before this one.
        read: Updates that the rows had had which the gradients were computed with.
        weight: What the loss was multiplied by.
        lr_factor: On the learning rates of the tables' optimizers.
        tables: The tables with any rows.
        sizes: Bytes of each payload.
    """

    group: int
    clock: int
    read: int
    weight: float
    lr_factor: float
    tables: list[int]
    sizes: list[int]


class RowsPushed(Message):
    """The answer to PushRows: the worker may go on.

    Attributes:
        group: Whose rows.
        version: Updates that the group has had.
        statistics: What its rows are, by name, table by table.
    """

    group: int
    version: int
    statistics: list[dict[str, int]]


class CopyRows(Message):
    """An update for the copy of a group; payloads as in PushRows: the gradients as applied.

    Attributes:
        group: Whose rows.
        version: Updates before this one.
        lr_factor: On the learning rates of the tables' optimizers.
        pushes: Worker and clock of each push in it.
        tables: The tables with any rows.
        sizes: Bytes of each payload.
    """

    group: int
    version: int
    lr_factor: float
    pushes: list[tuple[int, int]]
    tables: list[int]
    sizes: list[int]


class RowsCopied(Message):
    """A copy has made the group's update of that version."""

    group: int
    version: int


class KeepRows(Message):
    """A server is to write a group's rows into a folder, or to read them from there.

    Attributes:
        number: Of the worker's requests.
        group: Whose rows.
        folder: Which.
        files: How many groups' rows are there to be read; None: write.
    """

    number: int
    group: int
    folder: str
    files: int | None


class RowsKept(Message):
    """The answer to KeepRows.

    Attributes:
        number: Of the request.
        group: Whose rows.
        failure: Why it was not done, or None.
        hint: What to do about that.
    """

    number: int
    group: int
    failure: str | None = None
    hint: str | None = None


class Long(Message):
    """A message too long for a header follows as a payload of so many bytes."""

    size: int


Known = (
    Open | Push | Put | Pull | Weights | Norms | Replicate | Copy | Replicated | Freeze | Frozen
    | Cut | Kept | Fetch | Part | Ask | Answer | Decided | Heartbeat | Lost | Joined | Rest | Leave
    | Evicted | Abort | Long | NewWorker | Over | Join | OpenTables | PullRows | Rows | PushRows
    | RowsPushed | CopyRows | RowsCopied | KeepRows | RowsKept
)  # fmt: skip

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Known).decode
