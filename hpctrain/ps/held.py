"""A slice as a server holds it, and what workers push of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hpctrain.ps.codec import decode_rows, encode_rows, rows_capacity
from hpctrain.ps.consistency import Schedule
from hpctrain.ps.layout import Slice
from hpctrain.ps.order_log import Entry
from hpctrain.ps.rules import Rule


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
        width: Of a row, where gradients come as rows; else 0.
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
    width: int
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

    def read(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A gradient as it was sent, without a codec: its values, and their rows if not all."""
        if not self.width:
            return buffer.view(self.weights.dtype), None
        height = self.weights.numel() // self.width
        rows, values = decode_rows(buffer, self.width, self.weights.dtype, height=height)
        return values, rows

    def update(self, rule: Rule, push: Pushed, lr_factor: float, version: int) -> None:
        """Make an update, which leads to this version."""
        self.steps += 1
        if push.rows is None:
            rule.apply(
                self.weights, push.gradient, self.state, push.hyper, self.steps,
                lr_factor=lr_factor, bounds=self.piece.bounds,
            )  # fmt: skip
            return
        state = {name: tensor.view(-1, self.width) for name, tensor in self.state.items()}
        rule.apply_rows(
            self.weights.view(-1, self.width), push.rows, push.gradient, state, push.hyper,
            self.steps, lr_factor=lr_factor,
        )  # fmt: skip
        if self.row_versions is not None:
            self.row_versions[push.rows] = version

    def news(self, worker: int) -> torch.Tensor:
        """The rows that changed since a worker read them, encoded."""
        assert self.row_versions is not None
        rows = (self.row_versions > self.reads.get(worker, -1)).nonzero().view(-1)
        return encoded_rows(rows, self.weights.view(-1, self.width)[rows])


def encoded_rows(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Rows as they are sent."""
    capacity = rows_capacity(len(rows), values.shape[1], values.itemsize)
    out = torch.empty(capacity, dtype=torch.uint8)
    return out[: encode_rows(rows, values, out)]
