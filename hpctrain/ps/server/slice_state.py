"""A slice as a server holds it, and what workers push of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from hpctrain.compression.codec import decode_rows, encode_rows, rows_capacity
from hpctrain.errors import Error
from hpctrain.ps.consistency.base import Schedule
from hpctrain.ps.partition.layout import Slice
from hpctrain.ps.server.order_log import Entry
from hpctrain.ps.update_rules import Rule


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
    absent: frozenset[int] = frozenset()  # parts of the slice without a gradient


@dataclass(eq=False)
class SliceState:
    """A slice that a server holds.

    Attributes:
        piece: Which.
        group: Its parameter group.
        width: Of a row, where gradients come as rows; else 0.
        weights: 1-D.
        state: Of the update rule.
        schedule: What happens to it, and when.
        replicas: Servers that hold it besides.
        steps: Updates that the rule's state has had, through resumes too.
        missed: By part of the slice, those of them that had no gradient of it.
        put: By worker, weights to start the next update from.
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
    width: int
    weights: torch.Tensor
    state: dict[str, torch.Tensor]
    schedule: Schedule
    replicas: list[int] = field(default_factory=list)
    steps: int = 0
    missed: dict[int, int] = field(default_factory=dict)
    put: dict[int, torch.Tensor] = field(default_factory=dict)
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

    def read(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the values of an uncompressed gradient, and their rows if not all."""
        if not self.width:
            return buffer.view(self.weights.dtype), None
        height = self.weights.numel() // self.width
        rows, values = decode_rows(buffer, self.width, self.weights.dtype, height=height)
        return values, rows

    def update(self, rule: Rule, push: Pushed, lr_factor: float, version: int) -> None:
        """Make an update, which leads to this version; what has no gradient is left alone.

        Args:
            rule: What is done to the weights.
            push: The gradient, and the rule's numbers.
            lr_factor: On the learning rate.
            version: Updates of the slice, with this one.
        """
        self.steps += 1
        for part in push.absent:
            self.missed[part] = self.missed.get(part, 0) + 1
        for start, stop, steps, bounds in self._runs(push.absent):
            state = {name: tensor[start:stop] for name, tensor in self.state.items()}
            if push.rows is None:
                rule.apply(
                    self.weights[start:stop], push.gradient[start:stop], state, push.hyper, steps,
                    lr_factor=lr_factor, bounds=bounds,
                )  # fmt: skip
                continue
            first, width = start // self.width, self.width
            mine = (push.rows >= first) & (push.rows < stop // width)
            rule.apply_rows(
                self.weights[start:stop].view(-1, width), push.rows[mine] - first,
                push.gradient[mine], {name: t.view(-1, width) for name, t in state.items()},
                push.hyper, steps, lr_factor=lr_factor,
            )  # fmt: skip
        if push.rows is not None and self.row_versions is not None:
            self.row_versions[push.rows] = version

    def _runs(self, absent: frozenset[int]) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
        """Neighbouring parts that have a gradient, and have had as many before, as one.

        Yields:
            Where they start and stop, their updates with this one, and their own bounds.
        """
        bounds = self.piece.bounds
        if not self.missed:
            yield 0, self.piece.elements, self.steps, bounds
            return
        parts = [
            (None if part in absent else self.steps - self.missed.get(part, 0), part)
            for part in range(len(bounds) - 1)
        ]
        for steps, run in itertools.groupby(parts, key=lambda each: each[0]):
            numbers = [part for _, part in run]
            edges = bounds[numbers[0] : numbers[-1] + 2]
            if steps is not None and edges[-1] > edges[0]:
                yield edges[0], edges[-1], steps, tuple(edge - edges[0] for edge in edges)

    def forget(self, worker: int) -> None:
        """Wait no longer for a worker that is done, or lost."""
        self.schedule.leave(worker)
        self.pushes.pop(worker, None)
        self.delayed = [other for other in self.delayed if other != worker]

    def take_put(self, workers: Iterable[int]) -> None:
        """Start the next update from the weights that all of its workers have changed alike.

        Args:
            workers: Whose gradients it is made of.

        Raises:
            Error: They differ.
        """
        if not self.put:
            return
        found = [self.put.get(worker) for worker in workers]
        first = found[0]
        if first is None or any(each is None or not torch.equal(each, first) for each in found):
            raise Error(
                "workers hold different parameters: some were changed outside of the optimizer.",
                hint="change them on every worker alike, not by a worker's own samples "
                "(max_norm of embeddings, a start from the first batch).",
            )
        self.weights.view(torch.uint8).copy_(first)
        if self.row_versions is not None:
            self.row_versions.fill_(self.schedule.version)
        self.put.clear()

    def news(self, worker: int) -> torch.Tensor:
        """Return the rows that changed since a worker read them, encoded."""
        assert self.row_versions is not None
        rows = (self.row_versions > self.reads.get(worker, -1)).nonzero().view(-1)
        return encoded_rows(rows, self.weights.view(-1, self.width)[rows])


def encoded_rows(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return rows of a matrix as they are sent.

    Args:
        rows: Their numbers.
        values: One row each.
    """
    capacity = rows_capacity(len(rows), values.shape[1], values.itemsize)
    out = torch.empty(capacity, dtype=torch.uint8)
    return out[: encode_rows(rows, values, out)]
