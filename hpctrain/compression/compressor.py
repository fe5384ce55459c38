"""The interface of gradient compression for the all-reduce, and the collectives it may use.

An exchange is a generator: it begins a collective, yields what to wait for, and is sent what came
of it. So one that takes several collectives, the later ones of the results of the earlier, reads as
one function, and many of them can be under way at a time.
"""

from __future__ import annotations

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import torch

from hpctrain.compression.memory import Memory
from hpctrain.errors import Error

Exchange: TypeAlias = Generator[Any, torch.Tensor, None]
"""Yields handles, each once its collective has begun; is sent the result of each."""

_ROW = struct.Struct("<qq")  # steps, digest


class Collectives(Protocol):
    """The collectives by which gradients are exchanged; those under way have different names."""

    @property
    def rank(self) -> int:
        """This process, 0 to ``size - 1``."""

    @property
    def size(self) -> int:
        """How many processes take part."""

    def start_sum(self, tensor: torch.Tensor, name: str) -> Any:
        """Begin to sum a contiguous tensor over ranks, in place; return what to wait for.

        Args:
            tensor: Of the same shape and type on every rank.
            name: The same on every rank, and of no other collective under way.
        """

    def start_average(self, tensor: torch.Tensor, name: str) -> Any:
        """Begin to average a contiguous tensor over ranks, in place; return what to wait for.

        Args:
            tensor: Of the same shape and type on every rank.
            name: The same on every rank, and of no other collective under way.
        """

    def start_gather(self, tensor: torch.Tensor, name: str) -> Any:
        """Begin to collect all ranks' rows, in the order of ranks; return what to wait for.

        Args:
            tensor: This rank's rows, how many may differ from rank to rank.
            name: The same on every rank, and of no other collective under way.
        """

    def start_all_to_all(self, tensor: torch.Tensor, name: str) -> Any:
        """Begin to give each rank its part of equal parts; return what to wait for.

        Args:
            tensor: Its first dimension is a multiple of the ranks.
            name: The same on every rank, and of no other collective under way.
        """

    def ready(self, handle: Any) -> bool:
        """Whether waiting for it would take no time."""

    def wait(self, handle: Any) -> torch.Tensor:
        """Wait for one of them, and return what came of it."""


class Piece(NamedTuple):
    """A parameter's part of a flat.

    Attributes:
        name: Of the parameter.
        start: Its first element.
        stop: After its last element.
        rows: Of the gradient as a matrix, in the order of its memory; 1: it is none.
    """

    name: str
    start: int
    stop: int
    rows: int = 1


class Flat(NamedTuple):
    """Gradients laid end to end, which are exchanged together.

    Attributes:
        name: All ranks have the same one, and the same pieces.
        values: Shape (n,), of one of the compressor's ``dtypes``, contiguous; to be replaced by the
            mean over ranks.
        pieces: What lies in it.
    """

    name: str
    values: torch.Tensor
    pieces: list[Piece]


class Options(NamedTuple):
    """The options of a compressor besides its name and argument.

    Attributes:
        feedback: Whether what was left out is sent later (error feedback).
        warmup_steps: Steps in which it compresses less, or not at all.
        momentum: Of momentum correction; 0: none.
        warm_start: Whether PowerSGD goes on from the factors of the step before.
        min_rate: By how much a tensor has to become smaller, not to be sent as it is.
    """

    feedback: bool = True
    warmup_steps: int = 0
    momentum: float = 0.0
    warm_start: bool = True
    min_rate: float = 2.0


class Compressor(ABC):
    """A way to average gradients over ranks by an all-reduce with fewer bytes.

    Residuals change when a step ends (:meth:`commit`): one that is given up takes back what its
    exchanges made of them.

    Attributes:
        name: How it is asked for, before any colon.
        takes: The options that it knows.
        dtypes: Types of the flats that it takes.
        staged: Whether an exchange has several collectives, one after the other.
        steps: Optimizer steps made with it.
        sent_bytes: On the wire, over all ranks together, since they were last counted.
        dense_bytes: The same of an all-reduce that compresses nothing.
        lost: Ranks whose residuals were lost, with them or because they fell behind.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset()
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64)
    staged: ClassVar[bool] = True

    def __init__(self) -> None:
        self.steps = 0
        self.sent_bytes = 0
        self.dense_bytes = 0
        self.lost = 0
        self.memories: dict[str, Memory] = {}  # of this rank, by what is remembered
        self._met = 0  # ranks when it began

    @classmethod
    @abstractmethod
    def make(cls, argument: str, options: Options) -> Compressor:
        """Make one of what follows the colon of its name.

        Args:
            argument: What follows the colon; empty where there is none.
            options: The configuration's.

        Raises:
            Error: That says nothing to it.
        """

    def average(self, flat: Flat, world: Collectives) -> Exchange:
        """Replace a flat by its mean over ranks, as far as that is sent; every rank calls this.

        Args:
            flat: Its ``values`` are replaced.
            world: The ranks that take part.
        """
        if not flat.values.numel():
            return
        self.dense_bytes += 2 * (world.size - 1) * flat.values.nbytes
        yield from self._average(flat, world)

    @abstractmethod
    def _average(self, flat: Flat, world: Collectives) -> Exchange:
        """Average a flat, and count the bytes."""

    def _all_reduce(self, tensor: torch.Tensor, name: str, world: Collectives) -> Any:
        """Begin to average a tensor as it is, in place."""
        self.sent_bytes += 2 * (world.size - 1) * tensor.nbytes
        return world.start_average(tensor, name)

    def _gather(self, tensor: torch.Tensor, name: str, world: Collectives) -> Any:
        """Begin to give every rank everybody's tensor; they are of the same size."""
        self.sent_bytes += world.size * (world.size - 1) * tensor.nbytes
        return world.start_gather(tensor, name)

    def count(self, sent: int) -> None:
        """Count bytes that were sent as they are, such as the rows of sparse gradients."""
        self.sent_bytes += sent
        self.dense_bytes += sent

    def begin(self, world: Collectives) -> None:
        """Agree with the other ranks on where this stands; every rank calls this in a new world.

        Residuals stay with their ranks. A rank that has not made the last step, although others
        have, loses its residual, because part of it was sent; so does a rank that is gone.

        Raises:
            PeerLost: Another rank is gone.
        """
        self.rollback()
        if not self.takes:  # it remembers nothing
            return
        row = _ROW.pack(self.steps, self._digest())
        tensor = torch.frombuffer(bytearray(row), dtype=torch.uint8)[None]
        found = world.wait(world.start_gather(tensor, "hpctrain.compression"))
        rows = [_ROW.unpack(each.numpy().tobytes()) for each in found]
        newest = max(steps for steps, _ in rows)
        if len({digest for _, digest in rows}) > 1:
            self._forget_shared()
        if self._met:
            went_on = sum(steps > 0 for steps, _ in rows)
            self.lost += max(0, self._met - went_on) if newest else 0
        self.lost += sum(0 < steps < newest for steps, _ in rows)
        if self.steps < newest:
            for memory in self.memories.values():
                memory.clear()
        self.steps, self._met = newest, len(rows)

    def commit(self) -> None:
        """Take over what a step's exchanges made of the residuals: the step has ended."""
        for memory in self.memories.values():
            memory.commit()
        self.steps += 1

    def rollback(self) -> None:
        """Roll back: the step was given up, and the residuals are what they were before."""
        for memory in self.memories.values():
            memory.rollback()

    def left_out(self, flat: Flat, piece: Piece) -> None:
        """Restore the residual of a piece whose mean is not used.

        Args:
            flat: That was exchanged.
            piece: Of it, the parameter that is left out.
        """
        for memory in self.memories.values():
            memory.restore(flat.name, piece.start, piece.stop)

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank has to go on from: plain values, and tensors by parameter."""
        kept = {what: memory.state_dict() for what, memory in self.memories.items()}
        return {"name": self.name, "steps": self.steps, "kept": kept, "shared": self._shared()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. What it says of other parameters, or of other things, is left out.

        Args:
            state: As ``state_dict()`` of any compressor returned it. What that one has not sent
                yet is sent, unless this one has no residuals.

        Raises:
            Error: It is of tensors of another size.
        """
        self.steps = int(state["steps"])
        for what, memory in self.memories.items():
            memory.load_state_dict(state["kept"].get(what, {}))
        if state["name"] == self.name:
            self._load_shared(state["shared"])

    def _shared(self) -> dict[str, torch.Tensor]:
        """What all ranks have alike."""
        return {}

    def _load_shared(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what all ranks have alike."""
        return

    def _forget_shared(self) -> None:
        """Begin anew what all ranks have alike."""
        return

    def _digest(self) -> int:
        digest = 0
        for name, tensor in sorted(self._shared().items()):
            data = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digest = zlib.crc32(data, zlib.crc32(name.encode(), digest))
        return digest


def refuse_options(spec: str, takes: Iterable[str], options: Options) -> None:
    """Refuse options that a compressor does not know.

    Args:
        spec: As it was asked for.
        takes: Options that it knows.
        options: As they are set.

    Raises:
        Error: One differs from its default and is not known.
    """
    for name, value in options._asdict().items():
        if value != Options._field_defaults[name] and name not in takes:
            raise Error(
                f"horovod.compression_{name} = {value} means nothing to compression '{spec}'.",
                hint="leave it at its default; see docs/compression.md.",
            )
