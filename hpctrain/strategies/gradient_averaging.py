"""Average gradients over ranks before ``backward()`` returns, as DistributedDataParallel does.

A *pass* is what one call of ``backward()`` does. In a *round* all ranks average their gradients:
at the end of a pass, or in ``step()`` where a rank has had none (it has no samples). A round begins
with a header, so that ranks that are not about the same thing find out before a gradient is used.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward

from hpctrain.compression.compressor import Collectives, Compressor, Exchange, Flat, Piece
from hpctrain.errors import Error
from hpctrain.strategies.views import adopt, dense_view

WRAP_BITS, DIGEST_BITS = 12, 20

_REENTRANT_HINT = "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."

_numbers = itertools.count()  # of wrapped optimizers: all ranks wrap in the same order


@dataclass(eq=False)
class _Bucket:
    """Gradients of one type and device, laid end to end in one flat tensor.

    ``flat`` is what the parameters' ``.grad`` are views of, once there are any. ``wire`` is what is
    exchanged: the same memory, or a float32 copy where its type cannot be reduced. ``exchange`` is
    under way, and waits for ``handle``.
    """

    name: str
    parameters: list[nn.Parameter]
    names: list[str]
    flat: torch.Tensor | None = None
    views: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)
    pending: set[nn.Parameter] = field(default_factory=set)
    exchange: Exchange | None = None
    handle: Any = None
    wire: Flat | None = None

    def view(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the parameter's part of the flat."""
        if self.flat is None:
            first = self.parameters[0]
            size = sum(p.numel() for p in self.parameters)
            self.flat = torch.zeros(size, dtype=first.dtype, device=first.device)
            start = 0
            for each in self.parameters:
                self.views[each] = dense_view(self.flat, start, each)
                start += each.numel()
        return self.views[parameter]

    @property
    def trained(self) -> bool:
        """Whether any of its parameters has gradients at present."""
        return any(p.requires_grad for p in self.parameters)

    def fill(self) -> torch.Tensor:
        """Return the flat with every gradient in its place, and zeros where there is none."""
        for parameter in self.parameters:
            view = self.view(parameter)
            if parameter.grad is None:
                view.zero_()
            else:
                adopt(view, parameter)
        assert self.flat is not None
        return self.flat

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """Where its parameters lie in what is exchanged; a complex number is two real ones."""
        width = 2 if self.parameters[0].is_complex() else 1
        sizes = [width * p.numel() for p in self.parameters]
        starts = itertools.accumulate(sizes, initial=0)
        parts = zip(self.names, starts, sizes, self.parameters, strict=False)
        return [Piece(name, start, start + size, _rows_of(p)) for name, start, size, p in parts]


class AveragedGradients:
    """Averages the gradients of a wrapped optimizer's parameters, in buckets, while backward runs.

    Buckets follow the order in which gradients become ready (Li et al., "PyTorch Distributed", VLDB
    2020), and are exchanged while ``backward()`` still computes earlier layers. A parameter without
    a gradient on any rank is left without one.

    Args:
        parameters: All of the optimizer's, trained at present or not; the first to be ready first.
        names: Of those.
        world: The other ranks.
        compressor: How they are sent.
        bucket_bytes: A bucket is no larger, unless one parameter is.
        rows: Parameters whose gradients are sparse: their rows are exchanged.
        mark: Told when computing, and when exchanging has ended.
        alone: Whether gradients are averages as they are: there is no other rank, at present.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        names: Sequence[str],
        world: Collectives,
        compressor: Compressor,
        bucket_bytes: int,
        rows: Collection[nn.Parameter],
        mark: Callable[[str], None],
        alone: Callable[[], bool] = lambda: False,
    ) -> None:
        self._world = world
        self._compressor = compressor
        self._begun = False  # in the present world
        self._mark = mark
        self._is_alone = alone
        self._number = next(_numbers)
        self._prefix = f"hpctrain.{self._number}"
        self._parameters = list(parameters)
        sparse = set(rows)
        self._rows = [p for p in parameters if p in sparse]
        dense = [p for p in parameters if p not in sparse]
        # What is frozen lies apart: it takes no memory, nor part in a round, until it is trained.
        groups = [
            group
            for trained in (True, False)
            for group in _grouped([p for p in dense if p.requires_grad is trained], bucket_bytes)
        ]
        name_of = dict(zip(parameters, names, strict=True))
        self._buckets = [
            _Bucket(f"{self._prefix}.bucket.{n}", group, [name_of[p] for p in group])
            for n, group in enumerate(groups)
        ]
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._local_only = False
        self._alone = False  # in the present pass
        self._warm = False  # whether a pass has been seen
        self._reentrant = False  # whether passes have been seen within others
        self._steps = 0
        self._averaged = False  # since the last step
        self._waited_for = False  # whether some ranks were in step() when the others averaged
        self._forget()

    def _forget(self) -> None:
        self._tasks: set[int] = set()
        self._complete: list[_Bucket] = []
        self._fired: set[nn.Parameter] = set()
        self._owed = False  # whether there are gradients of this rank that have not been averaged
        self._left: dict[nn.Parameter, tuple[torch.Tensor | None, int]] = {}  # as they were then

    @property
    def buckets(self) -> list[list[nn.Parameter]]:
        """Parameters by bucket, in the order in which they lie in it."""
        return [bucket.parameters for bucket in self._buckets]

    def restart(self) -> None:
        """Forget the step, and the exchanges that were under way: the world was formed anew."""
        for bucket in self._buckets:
            bucket.exchange = bucket.handle = bucket.wire = None
        self._begun = False
        self._steps = 0
        self._averaged = self._waited_for = False
        self._forget()

    # During a pass.

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients locally within this context: ``backward()`` starts no exchange."""
        before, self._local_only = self._local_only, True
        try:
            yield
        finally:
            self._local_only = before

    def ready(self, parameter: nn.Parameter) -> None:
        """Take a parameter's gradient of one pass; autograd calls this when it is whole."""
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._enter(task)
        self._fired.add(parameter)
        self._owed = True
        if not self._alone:
            self._take(parameter)

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter) -> None:
        """Put a gradient into its bucket, and begin to exchange those that are whole."""
        bucket = self._bucket_of.get(parameter)
        if bucket is None:
            return
        if self._local_only:
            adopt(bucket.view(parameter), parameter)
            return
        if bucket.exchange is not None:
            raise Error(
                "a parameter's gradient came twice in one backward pass, as with reentrant "
                "activation checkpointing, when the first was with the other ranks already.",
                hint=_REENTRANT_HINT,
            )
        # Only now those of earlier parameters: hooks of the user's may have come after this one.
        self._start_complete()
        self._move_on()
        adopt(bucket.view(parameter), parameter)
        bucket.pending.discard(parameter)
        if not bucket.pending and self._warm and not self._reentrant:
            self._complete.append(bucket)

    def _enter(self, task: int) -> None:
        self._alone = self._is_alone()
        within = is_within_another_pass()
        if not within and self._tasks:
            self._abandon()
        if not self._tasks:
            self._fired.clear()
            for bucket in self._buckets:
                bucket.pending = {p for p in bucket.parameters if p.requires_grad}
        self._reentrant |= within
        self._tasks.add(task)
        ended = weakref.WeakMethod(self._pass_ended)
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: (call := ended()) and call(task, within)
        )

    def _abandon(self) -> None:
        """Abandon a backward pass that failed in its midst, where the caller went on."""
        for bucket in self._buckets:
            if bucket.exchange is not None:
                self._finish(bucket)
        self._tasks.clear()
        self._complete.clear()

    def _start_complete(self) -> None:
        for bucket in self._complete:
            self._start(bucket)
        self._complete.clear()

    def _move_on(self) -> None:
        """Have exchanges that take several collectives begin with the next one, if they can."""
        if not self._compressor.staged:
            return
        for bucket in self._buckets:
            if bucket.handle is not None and self._world.ready(bucket.handle):
                self._advance(bucket)

    @torch.no_grad()
    def _pass_ended(self, task: int, within: bool) -> None:
        self._tasks.discard(task)
        waits = within and any(p.requires_grad and p not in self._fired for p in self._parameters)
        if self._local_only or waits:
            # Also earlier passes': gradients of a bucket count their changes together.
            self._left = {p: (p.grad, _version(p.grad)) for p in [*self._left, *self._fired]}
            return
        if self._owed:
            self._mark("compute")
            self._round(in_step=False)
            self._warm = True
            self._mark("exchange")

    # Rounds.

    def forget_average(self) -> None:
        """Forget the average: the gradients were thrown away."""
        self._averaged = self._averaged and self._waited_for
        self._compressor.rollback()
        self._owed = False
        self._left = {}

    @torch.no_grad()
    def synchronize(self) -> None:
        """Wait until every gradient is the world's average.

        Raises:
            PeerLost: Another rank is gone.
            Error: Gradients were changed before, or other ranks are about something else.
        """
        if not self._averaged:
            for parameter, (gradient, version) in self._left.items():
                if parameter.grad is not gradient or _version(gradient) != version:
                    raise Error(
                        "a gradient was changed that is yet to be averaged over ranks: its "
                        "backward() ran within no_sync(), or in reentrant activation "
                        "checkpointing.",
                        hint="call optimizer.synchronize() before you change gradients.",
                    )
            self._round(in_step=True)
        while self._waited_for:
            self._round(in_step=True)

    def stepped(self) -> None:
        """Take note that the optimizer has made its step."""
        self._steps += 1
        self._averaged = False
        self._compressor.commit()

    def _round(self, *, in_step: bool) -> None:
        """Average all gradients; or, in ``step()``, find that all have come there."""
        if self._is_alone():
            self._settle()
            return
        buckets = [bucket for bucket in self._buckets if bucket.trained]
        closing = in_step and self._waited_for
        self._begin()
        if not closing:
            self._start_all(buckets)
        ranks, in_steps, lacking = self._agree(in_step)
        self._waited_for = 0 < in_steps < ranks
        if closing and in_steps == ranks:
            return
        if closing:
            self._start_all(buckets)
        unused = self._unused() if lacking else set()
        for bucket in buckets:
            wire = self._finish(bucket)
            for parameter, piece in zip(bucket.parameters, wire.pieces, strict=True):
                if parameter.requires_grad and parameter not in unused:
                    parameter.grad = bucket.view(parameter)
                else:
                    self._compressor.left_out(wire, piece)
        for number, parameter in enumerate(self._rows):
            if parameter.requires_grad and parameter not in unused:
                self._gather(parameter, f"{self._prefix}.rows.{number}")
        self._settle()

    def _settle(self) -> None:
        self._averaged = True
        tasks = self._tasks
        self._forget()
        self._tasks = tasks

    def _begin(self) -> None:
        """Begin the compressor's work, before the first exchange in a world."""
        if not self._begun:
            self._compressor.begin(self._world)
            self._begun = True

    def _start_all(self, buckets: list[_Bucket]) -> None:
        self._complete.clear()
        for bucket in buckets:
            if bucket.exchange is None:
                self._start(bucket)

    def _agree(self, in_step: bool) -> tuple[int, int, bool]:
        """Exchange headers with the other ranks, and refuse to go on where they differ.

        Returns:
            How many ranks there are, how many are in step(), and whether any lacks a gradient.

        Raises:
            Error: The ranks are not about the same thing.
        """
        flags = bytes(p.requires_grad for p in self._parameters)
        same = [
            *_bits(self._number, WRAP_BITS),
            *_bits(self._steps, 1),
            *_bits(zlib.crc32(flags), DIGEST_BITS),
        ]
        lacks = any(p.requires_grad and p.grad is None for p in self._parameters)
        header = torch.tensor([1, in_step, lacks, *same], dtype=torch.float32)
        self._world.wait(self._world.start_sum(header, "hpctrain.round"))
        ranks, in_steps, lacking, *sums = (round(value) for value in header.tolist())
        differ = [0 < total < ranks for total in sums]
        if any(differ[:WRAP_BITS]):
            raise Error(
                "the ranks are in the passes or steps of different wrapped optimizers.",
                hint="wrap optimizers, call backward() and step in the same order on all ranks.",
            )
        if differ[WRAP_BITS]:
            raise Error(
                "some ranks made more backward passes between two steps than others, or left out "
                "a step that others made.",
                hint="run all but the last pass of a step within `with optimizer.no_sync():`, and "
                "decide by averaged gradients or a sum over ranks what is left out.",
            )
        if any(differ[WRAP_BITS + 1 :]):
            raise Error(
                "the ranks train different parameters: their requires_grad differs.",
                hint="freeze and unfreeze by what is the same on all ranks, such as the step.",
            )
        return ranks, in_steps, bool(lacking)

    def _unused(self) -> set[nn.Parameter]:
        """Return the parameters that have no gradient on any rank."""
        used = torch.tensor([float(p.grad is not None) for p in self._parameters])
        self._world.wait(self._world.start_sum(used, f"{self._prefix}.used"))
        return {p for p, n in zip(self._parameters, used.tolist(), strict=True) if not n}

    def _start(self, bucket: _Bucket) -> None:
        self._begin()
        values = bucket.fill()
        if values.dtype.is_complex:
            values = torch.view_as_real(values).view(-1)
        if values.dtype not in self._compressor.dtypes:
            # Horovod cannot reduce bfloat16 (horovod issue 4047), and residuals need the bits.
            values = values.to(torch.float32)
        bucket.wire = Flat(bucket.name, values, bucket.pieces)
        bucket.exchange = self._compressor.average(bucket.wire, self._world)
        bucket.handle = next(bucket.exchange, None)

    def _advance(self, bucket: _Bucket) -> bool:
        """Wait for a bucket's collective and begin with its next one; False: it was the last."""
        assert bucket.exchange is not None
        if bucket.handle is None:
            return False
        try:
            bucket.handle = bucket.exchange.send(self._world.wait(bucket.handle))
        except StopIteration:
            bucket.handle = None
        return bucket.handle is not None

    def _finish(self, bucket: _Bucket) -> Flat:
        while self._advance(bucket):
            pass
        wire, flat = bucket.wire, bucket.flat
        assert wire is not None and flat is not None
        if wire.values.data_ptr() != flat.data_ptr():
            flat.copy_(wire.values)
        bucket.exchange = bucket.handle = bucket.wire = None
        return wire

    def _gather(self, parameter: nn.Parameter, name: str) -> None:
        """Average the rows of a sparse gradient."""
        indices, values = _rows(parameter)
        data = torch.cat([_as_bytes(indices), _as_bytes(values)], dim=1)
        found = self._world.wait(self._world.start_gather(data, name))
        self._compressor.count((self._world.size - 1) * found.nbytes)
        width = indices.element_size()
        indices = found[:, :width].contiguous().view(torch.int64).view(-1).to(parameter.device)
        values = found[:, width:].contiguous().view(-1).view(parameter.dtype)
        values = values.view(-1, *parameter.shape[1:]).to(parameter.device)
        parameter.grad = None
        dense, ranks = bool((indices == -1).any()), int((indices < 0).sum())
        indices, values = indices[indices >= 0], values[indices >= 0]
        gradient = torch.sparse_coo_tensor(
            indices[None], values / ranks, parameter.shape, check_invariants=False
        ).coalesce()
        parameter.grad = gradient.to_dense() if dense else gradient


def call_when_ready(
    parameters: Iterable[nn.Parameter], method: Callable[[nn.Parameter], None]
) -> None:
    """Call a method after each gradient of some parameters is whole, while its object lives.

    Args:
        parameters: Trained at present or not.
        method: Bound to an object.
    """
    function = weakref.WeakMethod(method)
    for parameter in parameters:
        if parameter.is_floating_point() or parameter.is_complex():
            trained = parameter.requires_grad
            parameter.requires_grad_(True)  # else torch takes no hook
            parameter.register_post_accumulate_grad_hook(lambda p: (call := function()) and call(p))
            parameter.requires_grad_(trained)


def is_within_another_pass() -> bool:
    """Whether the present pass was started within another, as reentrant checkpointing does.

    The stack tells: autograd runs Python functions, and the passes they start, on one thread.
    """
    runs = 0
    frame = sys._getframe(1)
    while frame is not None:
        runs += frame.f_code is _engine_run_backward.__code__
        if frame.f_code is BackwardCFunction.apply.__code__ or runs > 1:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _grouped(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    groups: list[list[nn.Parameter]] = []
    open_groups: dict[tuple[torch.dtype, torch.device], tuple[list[nn.Parameter], int]] = {}
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        group, size = open_groups.get(kind, ([], bucket_bytes))
        if not group or size + parameter.nbytes > bucket_bytes:
            group, size = [], 0
            groups.append(group)
        group.append(parameter)
        open_groups[kind] = group, size + parameter.nbytes
    return groups


def _rows_of(parameter: nn.Parameter) -> int:
    """Return the rows of a gradient seen as a matrix; 1 where it is not to be seen so."""
    if parameter.dim() < 2 or parameter.is_complex() or not parameter.numel():
        return 1
    # As a view of a flat has them: of the dimension with the longest stride.
    strides = torch.empty_like(parameter, device="meta").stride()
    return parameter.shape[strides.index(max(strides))]


def _version(gradient: torch.Tensor | None) -> int:
    return -1 if gradient is None else gradient._version


def _bits(number: int, count: int) -> list[int]:
    return [number >> place & 1 for place in range(count)]


def _rows(parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a gradient's rows behind a first that says its kind: -1 dense, -2 sparse or absent."""
    gradient = parameter.grad
    row = parameter.shape[1:]
    if gradient is None:
        indices, values = torch.empty(0, dtype=torch.int64), torch.empty(0, *row)
    elif gradient.is_sparse:
        gradient = gradient.coalesce()
        indices, values = gradient.indices()[0], gradient.values()
    else:
        indices, values = torch.arange(len(parameter)), gradient
    kind = -1 if gradient is not None and not gradient.is_sparse else -2
    return (
        torch.cat([torch.tensor([kind]), indices.cpu()]),
        torch.cat([torch.zeros(1, *row, dtype=parameter.dtype), values.cpu().to(parameter.dtype)]),
    )


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(len(tensor), -1).view(torch.uint8)
