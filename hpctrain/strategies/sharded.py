"""ZeRO-1: each rank keeps the optimizer's state of its own part of the parameters.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020.
Gradients are reduce-scattered, each rank updates its part, and parameters are gathered: as many
bytes as an all-reduce moves. Parts are cut by element, so that they differ by one element a bucket
at most. To the optimizer each piece of a parameter is a parameter of its own, which is why it has
to treat every element by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, cast

import torch
from pydantic import Field
from torch import nn

from hpctrain.compression.compressor import Collectives, Exchange, Flat
from hpctrain.compression.dense import Dense
from hpctrain.config import Section
from hpctrain.errors import Error
from hpctrain.strategies.base import check_shareable, check_trainable
from hpctrain.strategies.horovod import HorovodEngine, HorovodOptimizer
from hpctrain.strategies.horovod_communicator import HorovodCommunicator
from hpctrain.strategies.start import check_alike, share
from hpctrain.world.broadcast import gather_json

ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adadelta,
)
"""Optimizers that treat every element of a parameter by itself."""


class ShardedConfig(Section):
    """Sharded optimizer state."""

    bucket_bytes: int = Field(
        25 * 2**20,
        ge=1,
        description="Gradients are reduce-scattered, and parameters gathered, in flat buckets of "
        "about this size.",
    )


class ScatterCollectives(Collectives, Protocol):
    """Collectives that can give each rank its part of a sum."""

    def start_scatter(self, tensor: torch.Tensor, name: str) -> Any:
        """Begin to sum a tensor, of which each rank gets its rows; return what to wait for.

        Args:
            tensor: Contiguous; its first dimension is divided among ranks.
            name: The same on every rank, and of no other collective under way.
        """


class Scattered(Dense):
    """Reduce-scatters a bucket: leaves the *sum* in this rank's part, and zeros elsewhere.

    Sums rather than averages, so that a bucket to which another pass has added can be exchanged
    again.

    Attributes:
        pairs: Names of complex parameters, whose numbers are not to be cut in halves.
    """

    def __init__(self, pairs: Iterable[str] = ()) -> None:
        super().__init__()
        self.pairs = frozenset(pairs)

    def _average(self, flat: Flat, world: Collectives) -> Exchange:
        rows = flat.values.view(-1, 2 if flat.pieces[0].name in self.pairs else 1)
        self.sent_bytes += (world.size - 1) * rows.nbytes
        part = yield cast(ScatterCollectives, world).start_scatter(rows, flat.name)
        start, stop = part_of(len(rows), world.rank, world.size)
        rows[:start] = 0
        rows[start:stop] = part
        rows[stop:] = 0


class _Piece(NamedTuple):
    """What of a parameter is this rank's: these elements of its memory."""

    start: int
    stop: int
    parameter: nn.Parameter


class ShardedOptimizer(HorovodOptimizer):
    """Updates this rank's part of the parameters, and takes the rest from the others.

    After ``backward()`` a gradient is the world's sum where it is this rank's, and zero elsewhere.
    ``state_dict()`` is of this rank's part; :meth:`world_state` is the whole.

    Args:
        model: What is trained.
        inner: The user's optimizer, which is given pieces in place of its parameters.
        comm: Of the world.
        bucket_bytes: Of a bucket.
        clip_norm: Largest 2-norm of the world's gradient, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: torch.optim.Optimizer,
        comm: HorovodCommunicator,
        bucket_bytes: int,
        clip_norm: float | None = None,
    ) -> None:
        compressor = Scattered(n for n, p in model.named_parameters() if p.is_complex())
        super().__init__(model, inner, comm, compressor, bucket_bytes, clip_norm)
        self._groups = [list(group["params"]) for group in inner.param_groups]
        self._buckets = self._gradients.buckets
        self._pieces: dict[nn.Parameter, _Piece] = {}
        for bucket in self._buckets:
            self._cut(bucket)
        sparse = set(self._parameters()).difference(*self._buckets)
        self._whole = [p for p in self._parameters() if p in sparse]
        for group, members in zip(inner.param_groups, self._groups, strict=True):
            group["params"] = [
                p if p in sparse else self._pieces[p].parameter
                for p in members
                if p in sparse or p in self._pieces
            ]
        for parameter in self._parameters():
            if parameter not in sparse:
                self._cut_state(parameter)

    def _cut(self, bucket: list[nn.Parameter]) -> None:
        """Find this rank's pieces of a bucket."""
        first, last = part_of(sum(p.numel() for p in bucket), self._comm.rank, self._comm.size)
        begin = 0
        for parameter in bucket:
            start, stop = max(first - begin, 0), min(last - begin, parameter.numel())
            begin += parameter.numel()
            if parameter.stride() != torch.empty_like(parameter).stride():
                parameter.data = torch.empty_like(parameter).copy_(parameter)
            if start < stop:
                # An optimizer knows numbers from elements by their shape.
                shape = parameter.shape if parameter.dim() == 0 else (stop - start,)
                view = memory(parameter)[start:stop].view(shape)
                piece = nn.Parameter(view, requires_grad=parameter.requires_grad)
                self._pieces[parameter] = _Piece(start, stop, piece)

    def _cut_state(self, parameter: nn.Parameter) -> None:
        """Keep of the optimizer's state what is of this rank's piece."""
        state = self.inner.state.pop(parameter, None)
        if not state or parameter not in self._pieces:
            return
        start, stop, piece = self._pieces[parameter]
        self.inner.state[piece] = {
            name: like(value, parameter)[start:stop].clone()
            if _is_elements(value, parameter)
            else value
            for name, value in state.items()
        }

    def _parameters(self) -> list[nn.Parameter]:
        return [p for members in self._groups for p in members]

    # A step.

    @torch.no_grad()
    def synchronize(self) -> None:
        """Wait until every gradient of this rank's part is the world's.

        Raises:
            PeerLost: Another rank is gone.
            Error: The other ranks are about something else.
        """
        super().synchronize()
        for parameter, (start, stop, piece) in self._pieces.items():
            gradient = parameter.grad
            piece.grad = (
                None
                if gradient is None
                else like(gradient, parameter)[start:stop].view(piece.shape) / self._comm.size
            )

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Clip the world's gradient, update this rank's part, and take the others'."""
        result = super().step(closure)
        self._share_parameters()
        self.mark("exchange")
        return result

    @torch.no_grad()
    def _clip(self) -> None:
        if self.clip_norm is None:
            return
        gradients = [p.grad for group in self.inner.param_groups for p in group["params"]]
        own = [each.grad for _, _, each in self._pieces.values()]
        if self._comm.rank == 0:  # what is whole on every rank counts once
            own += [parameter.grad for parameter in self._whole]
        square = torch.zeros(1, dtype=torch.float64)
        for gradient in own:
            if gradient is not None:
                values = gradient.coalesce().values() if gradient.is_sparse else gradient
                square += torch.linalg.vector_norm(values).double().square().cpu()
        self._comm.all_reduce(square)
        self.grad_norm = square.sqrt()[0]
        # As torch.nn.utils.clip_grad_norm_ has it.
        scale = min(1.0, self.clip_norm / (float(self.grad_norm) + 1e-6))
        for gradient in gradients:
            if gradient is not None and scale != 1.0:
                gradient.mul_(scale)

    @torch.no_grad()
    def _share_parameters(self) -> None:
        """Take over what other ranks have updated."""
        trained = [b for b in self._buckets if any(p.requires_grad for p in b)]
        handles = []
        for number, bucket in enumerate(trained):
            own = [
                self._pieces[p].parameter.detach().reshape(-1) for p in bucket if p in self._pieces
            ]
            flat = torch.cat(own) if own else bucket[0].new_empty(0)
            name = f"hpctrain.sharded.parameters.{number}"
            handles.append(self._comm.start_gather(flat.view(torch.uint8), name))
        for bucket, handle in zip(trained, handles, strict=True):
            whole = self._comm.wait(handle).view(bucket[0].dtype)
            parts = whole.split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                memory(parameter).copy_(part)
            self.compressor.sent_bytes += (self._comm.size - 1) * whole.nbytes

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; the next ones are put into their buckets as they come."""
        super().zero_grad(set_to_none)
        for parameter in self._parameters():
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad = torch.zeros_like(parameter.grad)

    def on_all_ranks(self, holds: bool) -> bool:
        """Whether it holds on every rank, each of which knows a part of the gradient."""
        failing = torch.tensor([float(not holds)])
        self._comm.all_reduce(failing)
        return not failing.item()

    # What is saved.

    @torch.no_grad()
    def world_state(self) -> dict[str, Any]:
        """Return the whole state, as one process would have it, on rank 0; others return nothing.

        State travels bucket by bucket, so that no rank but the first ever holds more of it.
        """
        kinds = gather_json(self._comm, [self._kinds(p) for p in self._parameters()])
        order = {p: n for n, p in enumerate(self._parameters())}
        found: dict[int, dict[str, Any]] = {}
        for number, bucket in enumerate(self._buckets):
            mine = [
                self._state(p)[name].reshape(-1).contiguous().view(torch.uint8).cpu()
                for p in bucket
                for name in kinds[self._comm.rank][order[p]]["elements"]
            ]
            # At least one byte of each rank: no exchange is of nothing.
            data = torch.cat([*mine, torch.zeros(1, dtype=torch.uint8)])
            name = f"hpctrain.sharded.state.{number}"
            data = self._comm.wait(self._comm.start_gather(data, name))
            if self._comm.rank == 0:
                self._put_together(bucket, kinds, order, data, found)
        if self._comm.rank != 0:
            return {}
        for parameter in self._whole:
            if self.inner.state.get(parameter):
                found[order[parameter]] = self.inner.state[parameter]
        return {"state": dict(sorted(found.items())), "param_groups": self._packed_groups()}

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        piece = self._pieces.get(parameter)
        return {} if piece is None else self.inner.state.get(piece.parameter, {})

    def _kinds(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Describe this rank's state of a parameter: elements by type, and single numbers."""
        kinds: dict[str, Any] = {"elements": {}, "numbers": {}}
        piece = self._pieces.get(parameter)
        for name, value in self._state(parameter).items():
            assert piece is not None
            if _is_elements(value, piece.parameter):
                kinds["elements"][name] = str(value.dtype).removeprefix("torch.")
            elif isinstance(value, torch.Tensor):
                kinds["numbers"][name] = [
                    value.item(),
                    str(value.dtype).removeprefix("torch."),
                ]
            else:
                kinds["numbers"][name] = [value, None]
        return kinds

    def _put_together(
        self,
        bucket: list[nn.Parameter],
        kinds: list[list[dict[str, Any]]],
        order: dict[nn.Parameter, int],
        data: torch.Tensor,
        found: dict[int, dict[str, Any]],
    ) -> None:
        """Make whole states of what the ranks have sent of a bucket."""
        total, place = sum(p.numel() for p in bucket), 0
        for rank in range(self._comm.size):
            first, last = part_of(total, rank, self._comm.size)
            begin = 0
            for parameter in bucket:
                start, stop = max(first - begin, 0), min(last - begin, parameter.numel())
                begin += parameter.numel()
                mine = kinds[rank][order[parameter]]
                state = (
                    found.setdefault(order[parameter], {})
                    if mine["numbers"] or mine["elements"]
                    else {}
                )
                for name, dtype in mine["elements"].items():
                    if name not in state:
                        state[name] = torch.zeros_like(
                            parameter,
                            dtype=getattr(torch, dtype),
                            device="cpu",
                            requires_grad=False,
                        )
                    target = memory(state[name])[start:stop]
                    size = target.nbytes
                    # A copy: elements of several bytes begin at whole places.
                    target.copy_(data[place : place + size].clone().view(target.dtype))
                    place += size
                for name, (value, dtype) in mine["numbers"].items():
                    state.setdefault(
                        name,
                        value
                        if dtype is None
                        else torch.tensor(value, dtype=getattr(torch, dtype)),
                    )
            place += 1

    def _packed_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, with its parameters by number."""
        packed, start = [], 0
        for group, members in zip(self.inner.param_groups, self._groups, strict=True):
            options = {name: value for name, value in group.items() if name != "params"}
            packed.append({**options, "params": list(range(start, start + len(members)))})
            start += len(members)
        return packed

    def statistics(self) -> dict[str, Any]:
        """Return the bytes that all ranks sent since the last time, and of this rank's state."""
        values = {"moved_bytes": self.compressor.sent_bytes, "state_bytes": self.state_bytes}
        self.compressor.sent_bytes = self.compressor.dense_bytes = 0
        return values

    @property
    def state_bytes(self) -> int:
        """The bytes of the optimizer's state on this rank."""
        return sum(
            value.nbytes
            for state in self.inner.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )


class Sharded(HorovodEngine):
    """Synchronous, with optimizer state sharded over ranks (ZeRO-1): 1/n of it on each."""

    name = "sharded"
    Config = ShardedConfig

    def wrap(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
    ) -> ShardedOptimizer:
        """Start every rank from rank 0's model and optimizer state, and shard that state.

        Args:
            model: To be trained; overwritten by rank 0's.
            optimizer: Of its parameters; its state is overwritten by rank 0's, and sharded.
            clip_norm: Largest norm of the world's gradient; None: no clipping.

        Raises:
            Error: The optimizer is not known to treat every element by itself.
        """
        check_elementwise(optimizer)
        check_trainable(optimizer)
        check_shareable(model, optimizer)
        check_alike(self.world.comm, model, optimizer)
        share(self.world.comm, model, optimizer)
        return ShardedOptimizer(model, optimizer, self._comm, self.config.bucket_bytes, clip_norm)


def check_elementwise(optimizer: torch.optim.Optimizer, strategy: str = "sharded") -> None:
    """Refuse an optimizer that may need whole tensors, such as for their norms.

    Args:
        optimizer: The user's.
        strategy: That divides tensors.

    Raises:
        Error: It is not one of :data:`ELEMENTWISE`.
    """
    if type(optimizer) not in ELEMENTWISE:
        names = ", ".join(each.__name__ for each in ELEMENTWISE)
        raise Error(
            f"strategy '{strategy}' cannot cut the state of {type(optimizer).__name__}: it may "
            "need whole tensors.",
            hint=f"use {names}; or --strategy horovod.",
        )


def part_of(elements: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return where a rank's part of a flat begins and ends, as Horovod scatters it.

    Args:
        elements: Of the flat.
        rank: Whose part.
        ranks: How many there are.
    """
    least, more = divmod(elements, ranks)
    start = rank * least + min(rank, more)
    return start, start + least + (rank < more)


def memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor's elements in the order of its memory, as a view of one dimension.

    Args:
        tensor: Without gaps or overlaps.
    """
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements in the order of a parameter's memory.

    Args:
        tensor: Of the parameter's shape.
        parameter: Dense.
    """
    if tensor.stride() == parameter.stride():
        return memory(tensor)
    return memory(torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor))


def _is_elements(value: Any, parameter: torch.Tensor) -> bool:
    """Whether a part of a parameter's state has an element for each of the parameter's."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == parameter.shape
