"""The optimizer of a model that is divided over a mesh of ranks.

To the user's optimizer a parameter is the part that this rank holds: it keeps the object, with
other memory. So nothing of the optimizer changes, but that its tensors are smaller; and it has to
treat every element by itself where parameters are divided.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hpctrain.data.batch import Batch
from hpctrain.errors import Error
from hpctrain.mesh.division import (
    Division,
    Held,
    Sharding,
    local_of,
    sharded_modules,
    take_local,
)
from hpctrain.mesh.passes import Computed, Passes
from hpctrain.mesh.pipeline import Pipeline
from hpctrain.mesh.shape import Shape
from hpctrain.mesh.shares import Share, shares_of
from hpctrain.strategies.base import DistributedOptimizer
from hpctrain.world.agreement import checksum
from hpctrain.world.broadcast import gather_json
from hpctrain.world.communicator import Communicator

FLAT_BYTES = 25 * 2**20
"""Gradients are summed over ranks in pieces of about this size."""


class MeshOptimizer(DistributedOptimizer):
    """Updates what this rank holds of the parameters.

    ``state_dict()`` is of this rank's part; :meth:`world_state` is the whole.

    Args:
        inner: The user's optimizer, whose parameters have become this rank's parts; its state, if
            it has one, is still that of whole parameters.
        division: What this rank computes and holds.
        pipeline: That its stages are part of; None: it has the whole model.
        comm: Of all ranks.
        shape: How they are arranged.
        replicas: torch's group of the ranks that hold the same part of other replicas.
        shard: What is divided over those.
        timeout: Longest wait for another rank.
        clip_norm: Largest 2-norm of the whole gradient, or None.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        division: Division,
        pipeline: Pipeline | None,
        comm: Communicator,
        shape: Shape,
        replicas: Any,
        shard: Sharding,
        timeout: timedelta,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(inner, clip_norm)
        self._pipeline = pipeline
        self._comm = comm
        self._shape = shape
        self._place = shape.place(comm.rank)
        self._replicas = replicas
        self._shard = shard
        self._held = division.held
        self._agreed = False  # whether gradients are the world's already
        self._numbers = {held.local: n for n, held in enumerate(self._held)}
        self._modules = sharded_modules(division.chunks)
        regions = [held.region for held in self._held]
        self._shares = shares_of(self._comm, [held.name for held in self._held], regions)
        self._tied = self._tied_groups(timeout)
        for held in self._held:
            self._cut_state(held)

    def _cut_state(self, held: Held) -> None:
        """Keep of the optimizer's state what is of this rank's part."""
        state = self.inner.state.pop(held.local, None)
        if state and held.region is not None:
            self.inner.state[held.local] = {
                name: held.region.take(value) if _is_elements(value, held.region.shape) else value
                for name, value in state.items()
            }

    def _tied_groups(self, timeout: timedelta) -> list[tuple[Any, list[nn.Parameter]]]:
        """Make groups of stages that share a parameter; return this rank's, and the parameters."""
        tied: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for held, shares in zip(self._held, self._shares, strict=True):
            for ranks in _stages_of(shares, self._shape) if held.local.requires_grad else []:
                tied.setdefault(ranks, []).append(held.local)
        # Every rank takes part in making every group.
        groups = [(each, dist.new_group(list(each), timeout=timeout)) for each in sorted(tied)]
        return [(group, tied[ranks]) for ranks, group in groups if self._comm.rank in ranks]

    # Passes.

    @property
    def _reports(self) -> bool:
        """Whether this rank's means count: those of one rank of each replica do."""
        last = self._pipeline is None or self._pipeline.reports
        return last and self._place.tp == 0

    def forward_backward(
        self, passes: Passes, model: nn.Module, batch: Batch, factor: float
    ) -> list[Computed]:
        """Compute a pass's gradients; means are of one rank of each replica.

        Args:
            passes: Gives the loss.
            model: What is trained; with a pipeline, this rank's stages are used in its place.
            batch: This rank's samples; a pipeline cuts them into micro-batches.
            factor: What the loss is multiplied by.

        Returns:
            Means to be recorded; none on a rank that does not report for its replica.
        """
        if self._pipeline is None:
            computed = super().forward_backward(passes, model, batch, factor)
        else:
            computed = self._pipeline.forward_backward(passes, batch, factor)
        return computed if self._reports else []

    def evaluate(self, passes: Passes, model: nn.Module, batch: Batch) -> list[Computed]:
        """Compute means over a batch; they are of one rank of each replica.

        Args:
            passes: Gives the loss.
            model: In evaluation mode; with a pipeline, this rank's stages are used in its place.
            batch: This rank's samples; a pipeline cuts them into micro-batches.
        """
        if self._pipeline is None:
            computed = super().evaluate(passes, model, batch)
        else:
            computed = self._pipeline.evaluate(passes, batch)
        return computed if self._reports else []

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients within this context; sharded ones are reduced all the same."""
        modules = self._modules if self._shard == "optimizer" else []
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)

    # A step.

    @torch.no_grad()
    def synchronize(self) -> None:
        """Make the gradient of each part that this rank holds the world's.

        Raises:
            PeerLost: Another rank is gone.
        """
        if self._agreed:
            return
        self._agreed = True
        for held in self._held:
            take_local(held)
            gradient = held.live.grad
            if held.live is not held.local and gradient is not None:
                held.local.grad = local_of(gradient, held.live)
                held.live.grad = None
        if self._shard == "none" and self._shape.dp > 1:
            mine = [h.local for h in self._held if h.region is not None and h.local.requires_grad]
            _sum_gradients(mine, self._replicas, self._shape.dp)
        for group, parameters in self._tied:
            _sum_gradients(parameters, group, 1)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make gradients the world's, clip them, and update what this rank holds.

        Raises:
            PeerLost: Another rank is gone.
            Error: A closure was given.
        """
        result = super().step(closure)
        self._agreed = False
        return result

    @torch.no_grad()
    def _clip(self) -> None:
        if self.clip_norm is None:
            return
        square = torch.zeros(1, dtype=torch.float64)
        for parameter in self._parameters():
            if parameter.grad is not None and parameter.grad.numel():
                norm = torch.linalg.vector_norm(parameter.grad).double()
                square += norm.square() / self._copies(parameter)
        self._comm.all_reduce(square)
        self.grad_norm = square.sqrt()[0]
        # As torch.nn.utils.clip_grad_norm_ has it.
        scale = min(1.0, self.clip_norm / (float(self.grad_norm) + 1e-6))
        for parameter in self._parameters():
            if parameter.grad is not None and scale != 1.0:
                parameter.grad.mul_(scale)

    def _copies(self, parameter: nn.Parameter) -> int:
        """Count the ranks that hold the very part of a parameter that this one holds."""
        shares = self._shares[self._numbers[parameter]]
        return next(len(share.ranks) for share in shares if self._comm.rank in share.ranks)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the whole parameters, and of this rank's parts."""
        super().zero_grad(set_to_none)
        for held in self._held:
            held.live.grad = None
        self._agreed = False

    def gradients(self, model: nn.Module) -> list[torch.Tensor]:
        """Return the gradients of what this rank holds, after :meth:`synchronize`."""
        return [h.local.grad for h in self._held if h.local.grad is not None]

    def on_all_ranks(self, holds: bool) -> bool:
        """Whether it holds on every rank, each of which knows a part of the gradient."""
        failing = torch.tensor([float(not holds)])
        self._comm.all_reduce(failing)
        return not failing.item()

    def check_parameters(self) -> None:
        """Refuse ranks that hold other values of the same part of a parameter.

        Raises:
            Error: The first parameter that differs, and whose it is.
        """
        pairs = zip(self._held, self._shares, strict=True)
        shared = [(h, s) for h, s in pairs if any(len(share.ranks) > 1 for share in s)]
        with torch.no_grad():
            mine = [0 if held.region is None else checksum(held.local) for held, _ in shared]
        table = gather_json(self._comm, mine)
        for column, (held, shares) in enumerate(shared):
            for first, *others in (share.ranks for share in shares):
                for other in others:
                    if table[other][column] != table[first][column]:
                        raise Error(
                            f"the ranks hold different values of parameter '{held.name}': rank "
                            f"{other} has not those of rank {first}.",
                            hint="something changes it on each rank by that rank's own samples, "
                            "such as forward() or a hook; it must do the same on every rank.",
                        )

    # What is saved.

    @torch.no_grad()
    def world_parameters(self) -> dict[nn.Parameter, torch.Tensor]:
        """Return the whole parameters on rank 0; other ranks get nothing; every rank calls this.

        They travel one by one, so that no rank but the first ever holds more than its part.
        """
        for module in self._modules:
            module.reshard()
        found = {}
        for number, held in enumerate(self._held):
            everywhere = [held.local.dtype] * self._comm.size
            whole = self._collect(number, held.local.detach(), everywhere)
            if whole is not None:
                found[held.live] = whole
        return found

    @torch.no_grad()
    def world_state(self) -> dict[str, Any]:
        """Return the whole state, as one process would have it, on rank 0; every rank calls this.

        It travels tensor by tensor.
        """
        kinds = gather_json(self._comm, [self._kinds(held) for held in self._held])
        state = {}
        for place, parameter in enumerate(self._parameters()):
            number = self._numbers[parameter]
            if found := self._whole_state(number, [rank[number] for rank in kinds]):
                state[place] = found
        return {"state": state, "param_groups": self.inner.state_dict()["param_groups"]}

    def _kinds(self, held: Held) -> dict[str, Any]:
        """Describe this rank's state of a parameter: elements by type, others by type and value."""
        kinds: dict[str, Any] = {}
        for name, value in self.inner.state.get(held.local, {}).items():
            if not isinstance(value, torch.Tensor):
                kinds[name] = [None, value]
            elif _is_elements(value, held.local.shape):
                kinds[name] = [_name(value.dtype)]
            else:
                kinds[name] = [_name(value.dtype), value.tolist()]
        return kinds

    def _whole_state(self, number: int, kinds: list[dict[str, Any]]) -> dict[str, Any]:
        """Put a parameter's state together on rank 0.

        Args:
            number: Of the parameter.
            kinds: What each rank has of it.
        """
        mine = self.inner.state.get(self._held[number].local, {})
        found: dict[str, Any] = {}
        for name, kind in {name: kind for each in kinds for name, kind in each.items()}.items():
            if len(kind) == 1:
                have = [_type(each[name][0]) if name in each else None for each in kinds]
                whole = self._collect(number, mine.get(name), have)
                if whole is not None:
                    found[name] = whole
            else:
                dtype, value = kind
                found[name] = value if dtype is None else torch.tensor(value, dtype=_type(dtype))
        return found

    def _collect(
        self, number: int, mine: torch.Tensor | None, have: Sequence[torch.dtype | None]
    ) -> torch.Tensor | None:
        """Put a tensor of a parameter's shape together on rank 0; every rank calls this.

        Args:
            number: Of the parameter.
            mine: This rank's part, if it has one.
            have: Of what type each rank's part is; None: it has none.
        """
        shares = [s for s in self._shares[number] if s.region.elements and have[s.ranks[0]]]
        if self._comm.rank != 0:
            if mine is not None and any(share.ranks[0] == self._comm.rank for share in shares):
                dist.send(mine.contiguous(), 0)
            return None
        whole = torch.zeros(self._shares[number][0].region.shape, dtype=next(filter(None, have)))
        for share in shares:
            part = mine
            if share.ranks[0] != 0:
                part = torch.empty(share.region.sizes, dtype=whole.dtype)
                dist.recv(part, share.ranks[0])
            assert part is not None
            share.region.put(whole, part)
        return whole

    def statistics(self) -> dict[str, Any]:
        """Return the bytes that this rank holds: of parameters, and of the optimizer's state."""
        tensors = [value for state in self.inner.state.values() for value in state.values()]
        return {
            "parameter_bytes": sum(held.local.nbytes for held in self._held),
            "state_bytes": sum(v.nbytes for v in tensors if isinstance(v, torch.Tensor)),
        }


def _stages_of(shares: Sequence[Share], shape: Shape) -> list[tuple[int, ...]]:
    """Group the ranks that hold the same part of a parameter and differ by their stage alone."""
    found = []
    for share in shares:
        columns: dict[tuple[int, int], list[int]] = {}
        for rank in share.ranks:
            place = shape.place(rank)
            columns.setdefault((place.dp, place.tp), []).append(rank)
        found += [tuple(ranks) for ranks in columns.values() if len(ranks) > 1]
    return found


def _sum_gradients(parameters: Sequence[nn.Parameter], group: Any, divisor: int) -> None:
    """Sum gradients over a group's ranks; what has none on any of them is left without one.

    Args:
        parameters: The same on every rank of the group.
        group: torch's.
        divisor: What sums are divided by.
    """
    if not parameters:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters])
    dist.all_reduce(present, group=group)
    used = [p for p, count in zip(parameters, present.tolist(), strict=True) if count]
    for members in _together(used):
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in members]
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=group)
        flat /= divisor
        for p, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
            p.grad = part.view(p.shape)


def _together(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters of one type, in groups of about ``FLAT_BYTES``."""
    by_type: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_type.setdefault(parameter.dtype, []).append(parameter)
    for members in by_type.values():
        group: list[nn.Parameter] = []
        size = 0
        for parameter in members:
            group.append(parameter)
            size += parameter.nbytes
            if size >= FLAT_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group


def _is_elements(value: Any, shape: Sequence[int]) -> bool:
    """Whether a part of a parameter's state has an element for each of the parameter's."""
    return (
        isinstance(value, torch.Tensor) and value.dim() > 0 and tuple(value.shape) == tuple(shape)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _type(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
