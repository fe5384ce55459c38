"""A worker's steps: gradients are pushed as they come, and weights pulled."""

from __future__ import annotations

import bisect
import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpctrain.compression.dense import Dense
from hpctrain.errors import Error
from hpctrain.ps.client.client import Client
from hpctrain.ps.client.snapshot_fetch import ServerSnapshot
from hpctrain.ps.consistency import consistency_of
from hpctrain.ps.endpoint import Endpoint
from hpctrain.ps.partition.layout import Layout, Parameter, Slice, slice_bytes_for
from hpctrain.ps.update_rules import rule_of
from hpctrain.strategies.base import (
    Change,
    DistributedOptimizer,
    Snapshot,
    names_of,
    ordered,
    sparse_tables,
)
from hpctrain.strategies.gradient_averaging import (
    AveragedGradients,
    call_when_ready,
    is_within_another_pass,
)
from hpctrain.strategies.ps_communicator import PsCommunicator, Sums
from hpctrain.strategies.views import adopt, dense_view
from hpctrain.tables.table import tables_of

AVERAGE_BYTES = 2**24
"""How much is averaged at a time where gradients are averaged before they are pushed."""


class PsOptimizer(DistributedOptimizer):
    """Pushes gradients to the servers, and pulls parameters.

    Slices travel from and into flat tensors, which the parameters and their gradients are views of,
    or are copied to. The servers update; the inner optimizer only says how: its groups, rates and
    decays are sent along with every step, and hooks of its step are called.

    Where the loop says that it ``overlaps``, gradients are pushed while ``backward()`` still
    computes earlier layers. Else they are pushed in ``step()``, with all that was done to them:
    where workers go in lockstep ``.grad`` is their average before, and with ``async`` and ``ssp``
    it is this worker's own, as its push is. With ``backup``, and where not all steps pull, it is
    the worker's own, but what is pushed is averaged: changing it is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: torch.optim.Optimizer,
        ends: Endpoint,
        comm: PsCommunicator,
        clip_norm: float | None,
    ) -> None:
        super().__init__(inner, clip_norm)
        self._ends = ends
        self._comm = comm
        self._rule = rule_of(inner)
        self._consistency = consistency_of(ends.config)
        self._local_only = False
        self._begun = False
        self.tables = tables_of(model)
        self._warm = False  # whether a step has been made
        self._reentrant = False  # whether passes have been seen within others
        self._clip_here = clip_norm is not None and not self._consistency.rounds
        self._ordered = ordered(model, inner)
        self._names = names_of(model, self._ordered)
        self._tables = sparse_tables(model)
        group_of = {p: n for n, group in enumerate(inner.param_groups) for p in group["params"]}
        config = ends.config
        if ends.record is not None:
            slice_bytes = ends.record.about.slice_bytes
        else:
            total = sum(p.nbytes for p in self._ordered)
            slice_bytes = config.slice_bytes or slice_bytes_for(total, config.servers)
        if self._rule.per_tensor and any(p in self._tables for p in self._ordered):
            raise Error(
                f"{self._rule.name} needs dense gradients, and this model has embeddings with "
                "sparse=True.",
                hint="make them with sparse=False, or use another optimizer.",
            )
        self._layout, self._places = Layout.of(
            [
                Parameter(p.dtype, group_of[p], p.numel(), self._tables.get(p, 0))
                for p in self._ordered
            ],
            slice_bytes,
            whole=self._rule.per_tensor,
        )
        if ends.record is not None:
            ends.record.check_layout(self._layout)
        self._number = {parameter: n for n, parameter in enumerate(self._ordered)}
        self._slices_of, self._parts_of = self._find_slices()
        self._client = self._open(clip_norm)
        if self.tables:
            self._client.open_tables([table.spec for table in self.tables])
        for number, table in enumerate(self.tables):
            table.attach(functools.partial(self._client.tables.pull, number))
        self._told = 0 if ends.recruit is None else len(self._client.lost)
        self._met: set[int] = set()  # of those that joined later
        # The model's own: a change of them is seen, and is not made to what others compute with.
        self._own = [torch.zeros_like(flat) for flat in self._client.weights]
        self._host_gradients = self._views(self._client.gradients)
        # On a GPU, parameters and gradients stay there; the flats are where they are sent from.
        self._on_host = all(p.device.type == "cpu" for p in self._ordered)
        self._weights = self._views(self._own)
        for parameter, weights in zip(self._ordered, self._weights, strict=True):
            if self._on_host:
                parameter.data = weights
        call_when_ready(self._ordered, self._ready)
        self._average: AveragedGradients | None = None
        self._missing: list[int] = []
        self._absent: dict[int, list[int]] = {}
        self._pending: set[nn.Parameter] = set()
        self._last: nn.Parameter | None = None  # ready to be pushed
        self._rows: dict[int, torch.Tensor] = {}
        # Of passes: those under way, what has had a gradient, and how that was at their end.
        self._tasks: set[int] = set()
        self._fired: set[nn.Parameter] = set()
        self._seen: dict[nn.Parameter, tuple[torch.Tensor | None, int]] = {}
        self._expect()
        self._show()
        self.missed = self._client.clock
        self._ended = time.perf_counter()

    def _views(self, flats: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            dense_view(flats[flat], start, parameter)
            for parameter, (flat, start) in zip(self._ordered, self._places, strict=True)
        ]

    def _open(self, clip_norm: float | None) -> Client:
        def flats() -> list[torch.Tensor]:
            return [torch.zeros(f.elements, dtype=f.torch_dtype) for f in self._layout.flats]

        weights = flats()
        for view, parameter in zip(self._views(weights), self._ordered, strict=True):
            view.copy_(parameter.detach())
        state = {name: flats() for name in self._rule.state_names}
        updates = [0] * len(self._ordered)
        for name, kind in state.items():
            for number, (view, parameter) in enumerate(
                zip(self._views(kind), self._ordered, strict=True)
            ):
                saved = self.inner.state.get(parameter, {})
                if saved.get(name) is not None:
                    view.copy_(saved[name])
                    updates[number] = int(saved.get("step", 1))
        steps = [0] * len(self._layout.slices)
        for parts, done in zip(self._parts_of, updates, strict=True):
            for slice_, _ in parts:
                steps[slice_] = max(steps[slice_], done)
        missed: list[dict[int, int]] = [{} for _ in steps]
        for parts, done in zip(self._parts_of, updates, strict=True):
            for slice_, part in parts:
                if done < steps[slice_]:
                    missed[slice_][part] = steps[slice_] - done
        return self._ends.open(
            self._layout,
            self._rule,
            weights=weights,
            state=state if any(steps) else None,
            steps=steps,
            missed=missed,
            clip_norm=None if self._clip_here else clip_norm,
        )

    def _find_slices(self) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Find, for each parameter, the slices it lies in, and which part of each it is."""
        of_flat: dict[int, list[Slice]] = {}
        for piece in self._layout.slices:
            of_flat.setdefault(piece.flat, []).append(piece)
        for pieces in of_flat.values():
            pieces.sort(key=lambda piece: piece.start)
        slices: list[list[int]] = []
        parts: list[list[tuple[int, int]]] = []
        for parameter, (flat, start) in zip(self._ordered, self._places, strict=True):
            pieces, stop = of_flat.get(flat, []), start + parameter.numel()
            slices.append([])
            parts.append([])
            place = bisect.bisect_right(pieces, start, key=lambda piece: piece.stop)
            while place < len(pieces) and pieces[place].start < stop:
                piece = pieces[place]
                begin = max(start - piece.start, 0)
                slices[-1].append(piece.number)
                if parameter.numel():
                    part = bisect.bisect_right(piece.bounds, begin) - 1
                    parts[-1].append((piece.number, part))
                place += 1
        return slices, parts

    def _expect(self) -> None:
        """Begin a step's count: every slice misses the gradients of its parameters."""
        self._missing = [0] * len(self._layout.slices)
        for slices in self._slices_of:
            for number in slices:
                self._missing[number] += 1
        self._pending = set(self._ordered)
        self._last = None
        self._rows, self._absent = {}, {}
        self._begun = False
        self._fired, self._seen = set(), {}

    @property
    def _early(self) -> bool:
        """Whether gradients are pushed before ``step()``."""
        looks = self._clip_here or self.inner._optimizer_step_pre_hooks
        return self.overlaps and self._warm and not self._reentrant and not looks

    @property
    def _averages(self) -> bool:
        """Whether gradients are averaged over workers before they are pushed."""
        looks = not self.overlaps or bool(self.inner._optimizer_step_pre_hooks)
        return looks and self._consistency.same_weights and self._comm.size > 1

    def _averaging(self) -> AveragedGradients:
        if self._average is None:
            this = weakref.proxy(self)
            self._average = AveragedGradients(
                self._ordered[::-1], self._names[::-1],
                Sums(self._comm), Dense(), AVERAGE_BYTES, self._tables,
                lambda part: this.mark(part),
            )  # fmt: skip
        return self._average

    def _begin(self) -> None:
        hyper = [self._rule.hyper(group) for group in self.inner.param_groups]
        self._client.begin(1.0 if self._averages else self.weight, hyper)
        self._begun = True
        self._put()

    @torch.no_grad()
    def _ready(self, parameter: nn.Parameter) -> None:
        """Take a parameter's gradient of one pass; autograd calls this when it is whole."""
        if self._averages:
            with self._averaging().no_sync() if self._local_only else contextlib.nullcontext():
                self._averaging().ready(parameter)
            return
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            self._reentrant = self._reentrant or is_within_another_pass()
            ended = weakref.WeakMethod(self._pass_ended)
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: (call := ended()) and call(task)
            )
        if self._on_host and not self._sparse(parameter):
            adopt(self._host_gradients[self._number[parameter]], parameter)
        self._fired.add(parameter)
        if self._local_only or not (self._early or self._begun):
            return
        if parameter not in self._pending or parameter is self._last:
            raise Error(
                "a gradient came twice in a step, when the first was with the servers already: "
                "backward() ran twice, or reentrant activation checkpointing did.",
                hint="run all but the last pass within `with optimizer.no_sync():`, and use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False).",
            )
        # Only now those before: hooks of the user's may have come after this one.
        last, self._last = self._last, parameter
        if last is not None:
            if not self._begun:
                self._begin()
            self._push([last])

    def _pass_ended(self, task: int) -> None:
        self._tasks.discard(task)
        for parameter in self._fired:
            gradient = parameter.grad
            self._seen[parameter] = (gradient, -1 if gradient is None else gradient._version)

    def _sparse(self, parameter: nn.Parameter) -> bool:
        return parameter.grad is not None and parameter.grad.is_sparse

    def _push(self, parameters: list[nn.Parameter]) -> None:
        ready = []
        for parameter in parameters:
            self._pending.discard(parameter)
            number = self._number[parameter]
            target = self._host_gradients[number]
            if self._sparse(parameter):
                self._push_rows(number, parameter.grad.coalesce())  # type: ignore[union-attr]
            elif parameter.grad is None:
                target.zero_()
                for slice_, part in self._parts_of[number]:
                    self._absent.setdefault(slice_, []).append(part)
            else:
                if parameter.grad is not target:
                    target.copy_(parameter.grad)
                self._touch(number, torch.arange(target.shape[0] if target.ndim else 0))
            for slice_ in self._slices_of[number]:
                self._missing[slice_] -= 1
                if self._missing[slice_] == 0:
                    ready.append(slice_)
        if ready:
            self._client.push(ready, self._rows, self._absent)

    def _push_rows(self, number: int, gradient: torch.Tensor) -> None:
        target = self._host_gradients[number]
        rows = gradient.indices()[0].cpu()
        if not self._touch(number, rows):  # all of it is pushed
            target.zero_()
        target[rows] = gradient.values().cpu()

    def _touch(self, number: int, rows: torch.Tensor) -> bool:
        """Note rows that have a gradient; False where they are not pushed row by row."""
        flat, start = self._places[number]
        width = self._layout.flats[flat].width
        if width:
            before = self._rows.get(flat, rows[:0])
            self._rows[flat] = torch.cat([before, rows + start // width])
        return width > 0

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients locally within this context: ``backward()`` pushes nothing."""
        before, self._local_only = self._local_only, True
        try:
            yield
        finally:
            self._local_only = before

    def synchronize(self) -> None:
        """Wait until every gradient is the workers' average, where they go in lockstep.

        Elsewhere a worker's gradients are its own, and there is nothing to wait for.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
            Error: The other workers are about something else.
        """
        if self._averages:
            self._averaging().synchronize()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Push what is left, and wait until new parameters may be used, and are here.

        Raises:
            PeerLost: The servers are gone, or went on without this worker.
            Error: A closure was given, or what was changed cannot be pushed so.
        """
        if closure is not None:
            return super().step(closure)
        averages = self._averages
        self.synchronize()
        if self._clip_here:
            assert self.clip_norm is not None
            self.grad_norm = nn.utils.clip_grad_norm_(self._ordered, self.clip_norm)
        # With the hooks that the user's optimizer has for its steps.
        torch.optim.Optimizer.profile_hook_step(self._exchange)(self.inner)
        if averages:
            self._averaging().stepped()
        return None

    @torch.no_grad()
    def _exchange(self, inner: torch.optim.Optimizer) -> None:
        if self._consistency.rounds and not self._averages and not self._clip_here:
            self._check_unchanged()
        if not self._begun:
            self._begin()
        self._push([parameter for parameter in self._ordered if parameter in self._pending])
        if self.tables:
            weight = 1.0 if self._averages else self.weight
            touched = [table.take() for table in self.tables]
            self._client.tables.push(weight, self.rate_factor, touched)
        self._comm.computed(self.weight, time.perf_counter() - self._ended)
        self._client.wait()
        self._client.tables.settle()
        self._client.end()
        self.missed = self._client.behind
        if self._client.norm is not None:
            self.grad_norm = torch.tensor(self._client.norm)
        self._expect()
        self._show()
        self._warm = True
        self._ended = time.perf_counter()
        self.mark("exchange")

    def _check_unchanged(self) -> None:
        """Refuse a worker's own gradients that were changed, where the average would not be so."""
        if self._comm.size == 1:
            return
        for parameter, (gradient, version) in self._seen.items():
            now = parameter.grad
            if now is not gradient or (now is not None and now._version != version):
                raise Error(
                    "a worker's own gradient was changed, but what is changed should be the "
                    "average over workers.",
                    hint="to clip, use wrap(..., clip_norm=); for other changes use consistency "
                    "sync with every step pulled, and do not set optimizer.overlaps.",
                )

    def _show(self) -> None:
        """Take over the parameters that have come."""
        with torch.no_grad():
            for own, weights in zip(self._own, self._client.weights, strict=True):
                own.copy_(weights)
            if not self._on_host:
                for parameter, mine in zip(self._ordered, self._weights, strict=True):
                    parameter.copy_(mine, non_blocking=True)
        self._versions = [p._version for p in self._ordered]

    def _put(self) -> None:
        """Have the servers take over parameters that were changed outside of the optimizer.

        Raises:
            Error: Workers do not go in lockstep, or servers have replicas.
        """
        if not self._on_host:
            if self._versions == [p._version for p in self._ordered]:
                return
            for parameter, mine in zip(self._ordered, self._weights, strict=True):
                mine.copy_(parameter)
        pairs = zip(self._own, self._client.weights, strict=True)
        if all(_same_bits(own, weights) for own, weights in pairs):
            return
        if not self._consistency.same_weights or self._ends.config.replicas:
            raise Error(
                "parameters were changed outside of the optimizer, which the servers cannot take "
                "over unless all workers do so in the same step, and servers have no replicas.",
                hint="use --consistency sync without ps.replicas, or another strategy.",
            )
        self._client.put(self._own)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; the next ones are put into their places as they come."""
        if self._average is not None:
            self._average.forget_average()
        self._fired, self._seen = set(), {}
        super().zero_grad(set_to_none)

    def finish(self) -> None:
        """Wait for the others' last steps after this worker's, and take the servers' parameters."""
        self._client.rest()
        self._comm.barrier()
        self._client.pull().wait()
        self._show()

    def world_parameters(self) -> dict[nn.Parameter, torch.Tensor]:
        """Return the servers' parameters of one point, while training goes on."""
        found = self.snapshot().parameters
        assert found is not None
        return found

    def snapshot(self) -> Snapshot:
        """Return parameters and state of all slices at one point, while training goes on."""
        if self._comm.rank != 0:  # nobody else needs them
            return Snapshot(None, {}, {})
        found: ServerSnapshot = self._client.snapshot()
        # In lockstep nobody else changes them, and what this worker has changed it is yet to push.
        values = self._weights if self._consistency.same_weights else self._views(found.weights)
        weights = dict(zip(self._ordered, values, strict=True))
        state: dict[int, dict[str, Any]] = {}
        kinds = {name: self._views(flats) for name, flats in found.state.items()}
        numbers = {p: n for n, p in enumerate(
            p for group in self.inner.param_groups for p in group["params"])}  # fmt: skip
        for number, parameter in enumerate(self._ordered):
            steps = max(
                (
                    found.steps[n] - found.missed[n].get(part, 0)
                    for n, part in self._parts_of[number]
                ),
                default=0,
            )
            if steps:
                entry: dict[str, Any] = {name: kind[number] for name, kind in kinds.items()}
                if "exp_avg" in entry:
                    entry["step"] = torch.tensor(float(steps))
                state[numbers[parameter]] = entry
        return Snapshot(weights, {**self.inner.state_dict(), "state": state}, {})

    def keep_tables(self, folder: Path) -> int:
        """Have each server write its rows into a folder; return how many files there are."""
        return self._client.tables.keep(folder)

    def restore_tables(self, folder: Path, count: int) -> None:
        """Have each server take over its rows of a checkpoint; every worker calls this.

        Args:
            folder: Of the checkpoint; every server has to see it.
            count: How many files of rows it has.
        """
        if self._comm.rank == 0:
            self._client.tables.keep(folder, count)
        self._comm.barrier()

    def changes(self) -> list[Change]:
        """Return who was lost, and who joined, since the last time."""
        client, roles = self._client, self._ends.roles
        came = [rank for rank, since in client.joined.items() if since <= client.clock]
        news: list[tuple[int, str | None]] = [(r, None) for r in came if r not in self._met]
        self._met.update(came)
        lost = list(client.lost.items())[self._told :]
        self._told += len(lost)
        found = []
        for rank, reason in [*news, *lost]:
            # Whoever came later works.
            works = rank in roles.workers or rank not in roles.servers
            counts = {"worker": self._comm.size} if works else {}
            counts |= {"server": len(client.servers)} if rank in roles.servers else {}
            found.append(
                Change(
                    rank,
                    " and ".join(counts),
                    self._ends.host(rank),
                    None if reason is None else reason.removeprefix("it was "),
                    " and ".join(f"{n} {role}{'s' * (n != 1)}" for role, n in counts.items()),
                )
            )
        return found

    def statistics(self) -> dict[str, Any]:
        """Return bytes moved, and histograms of delay and staleness over workers, since last time.

        ``delay``: updates that a push missed. ``staleness``: a worker's clock minus the slowest's.
        """
        client = self._client
        mine = {f"staleness.{lead}": float(count) for lead, count in client.leads.items()}
        mine |= {"moved_bytes": float(client.exchange.moved_bytes)}
        mine |= {"dense_bytes": float(client.exchange.dense_bytes)}
        client.leads.clear()
        client.exchange.moved_bytes = client.exchange.dense_bytes = 0
        sums = self._comm.give("statistics", mine)
        values: dict[str, Any] = {}
        for name in ("delay", "staleness"):
            counts = {
                int(key.partition(".")[2]): int(count)
                for key, count in sums.items()
                if key.startswith(f"{name}.")
            }
            if total := sum(counts.values()):
                values[f"{name}_mean"] = sum(k * n for k, n in counts.items()) / total
                values[f"{name}_histogram"] = dict(sorted(counts.items()))
        if sums.get("dense_bytes"):
            values["moved_bytes"] = int(sums["moved_bytes"])
        if self.tables:
            values["tables"] = self._client.tables.summary()
        if sums.get("moved_bytes"):  # else all is exchanged through shared memory
            values["compression"] = sums["dense_bytes"] / sums["moved_bytes"]
        return values


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[one.element_size()]
    return torch.equal(one.view(kind), other.view(kind))
