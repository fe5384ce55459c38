"""A torch.distributed process group on mpi4py.

It carries what DistributedDataParallel, FSDP2, DTensor, pipeline schedules and distributed
checkpoints call, on CPU tensors, under ``mpirun`` or ``srun``. There is no port and no rendezvous:
MPI knows its ranks. Register it by importing this module, then::

    from hpctrain import distributed
    distributed.init_process_group()             # or, in a program that is not hpctrain's own,
    dist.init_process_group("mpi4py", init_method="mpi://")

Every wait is bounded by the group's timeout and raises :class:`hpctrain.errors.PeerLost` with the
ranks it waited for. Where torch renamed a method, both names are here.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch._C._distributed_c10d import HashStore
from torch.distributed.rendezvous import register_rendezvous_handler

from hpctrain.distributed.call import Call
from hpctrain.distributed.transport import added, by_rank, moved, operation, wide
from hpctrain.distributed.work import Exchange, Mover
from hpctrain.errors import Error

BACKEND = "mpi4py"

DEFAULT_SECONDS = 600.0

Tensors = list[torch.Tensor]

_base: list[MPI.Intracomm] = [MPI.COMM_WORLD]
"""Whose ranks torch's are; groups are made of it."""

_movers: list[Mover] = []

_start = threading.Lock()
"""Ranks must start their exchanges in one order, so a rank's threads start them one by one."""


_Group: Any = dist.ProcessGroup  # its methods are overloaded for C++, so types say little


class MpiProcessGroup(_Group):  # type: ignore[misc]
    """A process group whose ranks are those of an MPI communicator.

    Args:
        comm: Of the group's ranks; its own, not to be used otherwise.
        name: What torch calls the group.
        timeout: Longest wait for an exchange.
        ranks: What errors call the group's ranks: their numbers in the world.

    Example:
        >>> import torch.distributed as dist
        >>> init_process_group(MPI.COMM_SELF)
        >>> group = dist.new_group([0])
        >>> type(group).__name__, group.size()
        ('MpiProcessGroup', 1)
        >>> dist.destroy_process_group()
    """

    def __init__(
        self, comm: MPI.Intracomm, name: str, timeout: timedelta, ranks: Sequence[int]
    ) -> None:
        super().__init__(comm.rank, comm.size)
        self._comm = comm
        self._name = name
        self._seconds = timeout.total_seconds()
        self._ranks = list(ranks)

    # What torch asks about a group.

    def size(self) -> int:
        """Return how many ranks the group has."""
        return int(self._comm.size)

    def rank(self) -> int:
        """Return this process's rank in the group."""
        return int(self._comm.rank)

    def name(self) -> str:
        """Return the backend's name."""
        return BACKEND

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """Return the backend's name."""
        return BACKEND

    @property
    def pg_name(self) -> str:
        """What torch calls the group."""
        return self._name

    @property
    def group_name(self) -> str:
        """What torch calls the group."""
        return self._name

    def set_timeout(self, timeout: timedelta) -> None:
        """Set the longest wait of exchanges that are started from now on."""
        self._seconds = timeout.total_seconds()

    def shutdown(self) -> None:
        """Leave the group; nothing is waited for."""

    def abort(self) -> None:
        """Leave the group at once."""

    # Reductions.

    def allreduce(self, tensors: Tensors, opts: Any = None) -> Exchange:
        """Reduce each tensor over all ranks, in place.

        Args:
            tensors: One or several, of the same shapes on every rank.
            opts: torch's, of which ``reduceOp`` counts; None: the sum.
        """
        call, tensors = Call(), _listed(tensors)
        with _start:
            for tensor in tensors:
                op, divisor = self._operation(opts, tensor)
                data = added(call.total(tensor, divisor))
                call.begin(self._comm.Iallreduce(MPI.IN_PLACE, data, op))
        return self._exchange(call, tensors, "all-reduce")

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Tensors, opts: Any) -> Exchange:
        """Reduce each tensor over all ranks into the root's, in place; others keep theirs.

        Args:
            tensors: One or several, of the same shapes on every rank.
            opts: torch's, of which ``reduceOp`` and ``rootRank`` count.
        """
        call, root = Call(), opts.rootRank
        with _start:
            for tensor in tensors:
                op, divisor = self._operation(opts, tensor)
                if self.rank() == root:
                    data = added(call.total(tensor, divisor))
                    call.begin(self._comm.Ireduce(MPI.IN_PLACE, data, op, root))
                else:
                    data = added(call.joined([tensor], wide(tensor.dtype)))
                    call.begin(self._comm.Ireduce(data, None, op, root))
        return self._exchange(call, tensors, "reduce")

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> Exchange:
        """Reduce the n-th tensor of every rank's list over all ranks; rank n gets the outcome.

        Args:
            outputs: Where this rank's outcome goes.
            inputs: For each output, a tensor for each rank.
            opts: torch's, of which ``reduceOp`` counts; None: the sum.
        """
        call = Call()
        with _start:
            for output, pieces in zip(outputs, inputs, strict=True):
                op, divisor = self._operation(opts, output)
                counts = [piece.numel() for piece in pieces]
                self._require(counts[self.rank()] == output.numel(), output, *pieces)
                source = added(call.joined(pieces, wide(output.dtype)))
                target = added(call.total(output, divisor, reads=False))
                call.begin(self._comm.Ireduce_scatter(source, target, counts, op))
        return self._exchange(call, outputs, "reduce-scatter")

    def reduce_scatter_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> Exchange:
        """Reduce equal pieces of each input over all ranks; each rank gets its own piece.

        Args:
            outputs: Where this rank's pieces go.
            inputs: For each output, a tensor of ``size`` times as many elements.
            opts: As of :meth:`reduce_scatter`.
        """
        for output, whole in zip(outputs, inputs, strict=True):
            self._require(whole.numel() == output.numel() * self.size(), output, whole)
        pieces = [list(whole.reshape(self.size(), -1)) for whole in inputs]
        return self.reduce_scatter(outputs, pieces, opts)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce_scatter_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: Any = None
    ) -> Exchange:
        """Reduce equal pieces of the input over all ranks; each rank gets its own piece.

        Args:
            output: Where this rank's piece goes.
            input: A tensor of ``size`` times as many elements.
            opts: As of :meth:`reduce_scatter`.
        """
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    _reduce_scatter_base = reduce_scatter_single

    # Movements.

    def broadcast(self, tensors: Tensors, opts: Any = None) -> Exchange:
        """Overwrite each tensor with the root's, in place.

        Args:
            tensors: One or several, of the same shapes on every rank.
            opts: torch's, of which ``rootRank`` counts; None: rank 0.
        """
        call, root = Call(), opts.rootRank if opts is not None else 0
        with _start:
            for tensor in tensors:
                data = call.target(tensor, reads=self.rank() == root)
                call.begin(self._comm.Ibcast(moved(data), root))
        return self._exchange(call, tensors, "broadcast")

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Exchange:
        """Give every rank every rank's tensor; their sizes may differ.

        Args:
            outputs: For each input, a tensor for each rank.
            inputs: This rank's.
            opts: Make no difference.
        """
        call = Call()
        with _start:
            for into, mine in zip(outputs, inputs, strict=True):
                self._require(into[self.rank()].numel() == mine.numel(), mine, *into)
                target = by_rank(call.parts(into), [each.numel() for each in into])
                call.begin(self._comm.Iallgatherv(moved(call.source(mine)), target))
        return self._exchange(call, outputs, "all-gather")

    def allgather_coalesced(
        self, outputs: list[Tensors], inputs: Tensors, opts: Any = None
    ) -> Exchange:
        """Give every rank every rank's tensors; outputs are listed by rank.

        Args:
            outputs: For each rank, a tensor for each input.
            inputs: This rank's.
            opts: Make no difference.
        """
        return self.allgather([list(each) for each in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> Exchange:
        """Lay all ranks' tensors of one size end to end, for each pair of tensors.

        Args:
            outputs: For each input, a tensor of ``size`` times as many elements.
            inputs: This rank's.
            opts: Make no difference.
        """
        call = Call()
        with _start:
            for output, mine in zip(outputs, inputs, strict=True):
                self._require(output.numel() == mine.numel() * self.size(), output, mine)
                # The input is often the very part of the output that is this rank's.
                source = moved(call.source(mine.clone()))
                memory, _, kind = moved(call.target(output))
                call.begin(self._comm.Iallgather(source, (memory, mine.numel(), kind)))
        return self._exchange(call, outputs, "all-gather")

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def all_gather_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: Any = None
    ) -> Exchange:
        """Lay all ranks' tensors of one size end to end.

        Args:
            output: A tensor of ``size`` times as many elements.
            input: This rank's.
            opts: Make no difference.
        """
        return self.all_gather_single_coalesced([output], [input], opts)

    _allgather_base = all_gather_single

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Exchange:
        """Give the root every rank's tensor; their sizes may differ.

        Args:
            outputs: On the root, one list with a tensor for each rank; elsewhere empty.
            inputs: One tensor, this rank's.
            opts: torch's, of which ``rootRank`` counts.
        """
        call, root = Call(), opts.rootRank
        source, target = moved(call.source(inputs[0])), None
        if self.rank() == root:
            target = by_rank(call.parts(outputs[0]), [each.numel() for each in outputs[0]])
        with _start:
            call.begin(self._comm.Igatherv(source, target, root))
        return self._exchange(call, outputs, "gather")

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Exchange:
        """Give every rank its tensor of the root's list.

        Args:
            outputs: One tensor, this rank's.
            inputs: On the root, one list with a tensor for each rank; elsewhere empty.
            opts: torch's, of which ``rootRank`` counts.
        """
        call, root = Call(), opts.rootRank
        source, target = None, moved(call.target(outputs[0]))
        if self.rank() == root:
            counts = [each.numel() for each in inputs[0]]
            source = by_rank(call.joined(inputs[0], outputs[0].dtype), counts)
        with _start:
            call.begin(self._comm.Iscatterv(source, target, root))
        return self._exchange(call, outputs, "scatter")

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
    ) -> Exchange:
        """Send rank n the n-th run of rows; runs are equal where no sizes are given.

        Args:
            output: Its rows come from all ranks, in their order.
            input: Its rows go to all ranks, in their order.
            output_split_sizes: Rows from each rank; empty: as many from each.
            input_split_sizes: Rows for each rank; empty: as many for each.
            opts: Make no difference.
        """
        call = Call()
        sent = self._rows(input, input_split_sizes)
        received = self._rows(output, output_split_sizes)
        source = by_rank(call.source(input), sent)
        target = by_rank(call.target(output), received)
        with _start:
            call.begin(self._comm.Ialltoallv(source, target))
        return self._exchange(call, [output], "all-to-all")

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Exchange:
        """Send rank n the n-th tensor.

        Args:
            outputs: A tensor for what each rank sends.
            inputs: A tensor for each rank.
            opts: Make no difference.
        """
        call = Call()
        source = by_rank(call.joined(inputs, inputs[0].dtype), [each.numel() for each in inputs])
        target = by_rank(call.parts(outputs), [each.numel() for each in outputs])
        with _start:
            call.begin(self._comm.Ialltoallv(source, target))
        return self._exchange(call, outputs, "all-to-all")

    def barrier(self, opts: Any = None) -> Exchange:
        """End when every rank has come here."""
        call = Call()
        with _start:
            call.begin(self._comm.Ibarrier())
        return self._exchange(call, [], "barrier")

    # Messages.

    def send(self, tensors: Tensors, dstRank: int, tag: int = 0) -> Exchange:  # noqa: N803
        """Send a tensor to a rank of the group.

        Args:
            tensors: One tensor.
            dstRank: The receiver, in the group.
            tag: Of the message.
        """
        call = Call()
        call.begin(self._comm.Isend(moved(call.source(tensors[0])), dstRank, tag))
        return self._exchange(call, tensors, "message", [dstRank])

    def recv(self, tensors: Tensors, srcRank: int, tag: int = 0) -> Exchange:  # noqa: N803
        """Receive a tensor from a rank of the group.

        Args:
            tensors: One tensor, of the message's shape and type.
            srcRank: The sender, in the group.
            tag: Of the message.
        """
        call = Call()
        call.begin(self._comm.Irecv(moved(call.target(tensors[0])), srcRank, tag))
        return self._exchange(call, tensors, "message", [srcRank])

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Exchange:
        """Receive a tensor from whichever rank of the group sends one.

        Args:
            tensors: One tensor, of the message's shape and type.
            tag: Of the message.
        """
        call = Call()
        call.begin(self._comm.Irecv(moved(call.target(tensors[0])), MPI.ANY_SOURCE, tag))
        return self._exchange(call, tensors, "message")

    # What these are made of.

    def _operation(self, opts: Any, tensor: torch.Tensor) -> tuple[MPI.Op, int]:
        op = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
        found, averages = operation(op, tensor.dtype)
        return found, self.size() if averages else 1

    def _rows(self, tensor: torch.Tensor, sizes: Sequence[int]) -> list[int]:
        """Return how many elements each rank's run of rows has."""
        rows = tensor.shape[0] if tensor.ndim else 0
        width = tensor.numel() // rows if rows else 0
        equal = [rows // self.size()] * self.size()
        counts = list(sizes) or equal
        self._require(len(counts) == self.size() and sum(counts) == rows, tensor)
        return [count * width for count in counts]

    def _require(self, fits: bool, *tensors: torch.Tensor) -> None:
        if not fits:
            shapes = ", ".join(str(tuple(each.shape)) for each in tensors)
            raise Error(
                f"tensors of shapes {shapes} do not fit {self.size()} ranks.",
                hint="a rank's part has as many elements on the side that sends as on the other.",
            )

    def _exchange(
        self, call: Call, result: Any, what: str, peers: Sequence[int] | None = None
    ) -> Exchange:
        def about() -> str:
            ranks = self._ranks if peers is None else [self._ranks[peer] for peer in peers]
            others = ", ".join(str(rank) for rank in ranks if rank != self._ranks[self.rank()])
            host = os.uname().nodename
            return f"rank {self._ranks[self.rank()]} on {host}: {what} with ranks {others}"

        exchange = Exchange(call, result, about, self._seconds)
        mover().take(exchange)
        return exchange


def init_process_group(
    comm: MPI.Intracomm | None = None, *, timeout_seconds: float = DEFAULT_SECONDS
) -> None:
    """Start torch.distributed over MPI on a communicator's ranks.

    Args:
        comm: Of all ranks that take part; by default all that were launched.
        timeout_seconds: Longest wait for another rank.

    Raises:
        Error: torch.distributed was started already.

    Example:
        >>> import torch.distributed as dist
        >>> init_process_group(MPI.COMM_SELF)
        >>> total = torch.ones(2)
        >>> dist.all_reduce(total)
        >>> total, dist.get_backend()
        (tensor([1., 1.]), 'mpi4py')
        >>> dist.destroy_process_group()
    """
    if dist.is_initialized():
        raise Error(
            "torch.distributed has a process group already.",
            hint="use it, or torch.distributed.destroy_process_group() first.",
        )
    _base[:] = [comm if comm is not None else MPI.COMM_WORLD]
    dist.init_process_group(
        BACKEND,
        store=HashStore(),
        rank=_base[0].rank,
        world_size=_base[0].size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def mover() -> Mover:
    """Return what moves this process's exchanges on."""
    if not _movers:
        _movers.append(Mover())
    return _movers[0]


def _make(options: Any, backend_options: Any) -> MpiProcessGroup:
    """Make a group's communicator: torch calls this on the group's ranks alone."""
    base = _base[0]
    size = options.group_size
    ranks = list(options.global_ranks_in_group) or list(range(size))
    if options.group_rank != ranks.index(base.rank) or max(ranks) >= base.size:
        raise Error(
            f"torch calls this process rank {options.group_rank} of ranks {ranks}, MPI calls it "
            f"rank {base.rank} of {base.size}.",
            hint="give init_process_group MPI's own rank and size, or init_method='mpi://'.",
        )
    tag = zlib.crc32(str(options.group_id).encode()) % 32_000  # MPI promises 32,767
    with _start:
        comm = base.Create_group(base.group.Incl(ranks), tag)
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    return MpiProcessGroup(comm, str(options.group_id), options.timeout, ranks)


def _rendezvous(url: str, timeout: timedelta, **kwargs: Any) -> Iterator[tuple[Any, int, int]]:
    """Answer torch's ``init_method="mpi://"``: MPI knows its ranks, so nobody has to meet."""
    yield HashStore(), _base[0].rank, _base[0].size


def _listed(tensors: Tensors | torch.Tensor) -> Tensors:
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors


dist.Backend.register_backend(BACKEND, _make, extended_api=True, devices=["cpu"])
register_rendezvous_handler("mpi", _rendezvous)
