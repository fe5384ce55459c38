"""What workers of a parameter server ask of each other, by way of the coordinator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hpctrain import process
from hpctrain.errors import PeerLost
from hpctrain.ps.client.client import Client, dtype_name
from hpctrain.ps.endpoint import Endpoint
from hpctrain.ps.protocol.messages import AGAIN
from hpctrain.world.broadcast import broadcast_bytes
from hpctrain.world.world import Part, part_of


class PsCommunicator:
    """The communicator of a worker: the workers that live, and sums by way of a server."""

    def __init__(self, ends: Endpoint, local_rank: int, local_size: int) -> None:
        assert ends.client is not None
        self._ends = ends
        self._client: Client = ends.client
        self.local_rank = local_rank
        self.local_size = local_size
        self._divisions: dict[tuple[int, int], Part] = {}
        # Parts of global batches, and seconds that they took; what is longer ago counts for less.
        self._computed = (0.0, 0.0)

    def _workers(self) -> list[int]:
        client = self._client
        came = {worker for worker, since in client.joined.items() if since <= client.clock}
        return sorted({*self._ends.roles.workers, *came} - client.lost.keys())

    @property
    def rank(self) -> int:
        """This worker among those that live, 0 to ``size - 1``."""
        return self._workers().index(self._client.me)

    @property
    def size(self) -> int:
        """How many workers live."""
        return len(self._workers())

    def part(self, epoch: int, batch: int) -> Part:
        """Return the part that falls to this worker; decided anew every ``share_steps`` batches.

        Args:
            epoch: The epoch, counted from 0.
            batch: The number of the global batch within it, counted from 0.
        """
        key = (epoch, batch // self._ends.config.share_steps)
        if key not in self._divisions:
            done, seconds = self._computed
            self._computed = (done / 2, seconds / 2)
            speed = done / seconds if seconds > 0 else None
            workers, shares, stop = self._client.ask("division", [*key, speed]).value
            self._client.stopped |= stop
            if self._client.me in workers:
                part = part_of(shares, workers.index(self._client.me))
            else:
                part = Part(len(workers), len(workers), 1, 1, 1)
            self._divisions = {key: part}
        return self._divisions[key]

    def computed(self, weight: float, seconds: float) -> None:
        """Note how long a step took that was ``weight`` times an equal share of its batch.

        Args:
            weight: The worker's share of the batch, as a multiple of an equal one.
            seconds: What the step took to compute.
        """
        size = next((part.size for part in self._divisions.values()), self.size)
        done, before = self._computed
        self._computed = (done + weight / size, before + seconds)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over all workers, in place."""
        number = self._client.next_collective()
        data = _bytes(tensor)
        answer = self._client.ask("reduce", [number, dtype_name(tensor.dtype)], data)
        _fill(tensor, answer.data)

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Overwrite a contiguous tensor on every worker with the root's, in place.

        Args:
            tensor: Of the same shape and type on every worker.
            root: The worker whose values all take, among those that live.
        """
        while True:
            number = self._client.next_collective()
            owner = self._workers()[root]
            mine = owner == self._client.me
            data = _bytes(tensor) if mine else b""
            answer = self._client.ask("broadcast", [number, owner], data)
            if answer.value != AGAIN:
                break
        if not mine:
            _fill(tensor, answer.data)

    def barrier(self) -> None:
        """Wait until every worker has come to this call."""
        self.all_reduce(torch.zeros(1))

    def give(self, pool: str, values: dict[str, float]) -> dict[str, float]:
        """Add values to a pool, waiting for nobody; rank 0 takes what has come together.

        Args:
            pool: The pool's name.
            values: What to add, by name.

        Returns:
            On rank 0 the sums that had come together; elsewhere nothing.
        """
        sums, stop = self._client.ask("give", [pool, values]).value
        self._client.stopped |= stop
        return {str(name): float(value) for name, value in sums.items()}

    def remember(self, value: Any) -> None:
        """Keep a plain value for workers that join later."""
        self._client.ask("note", value)

    def stop(self) -> None:
        """End the training on every worker."""
        self._client.ask("stop")

    def abort(self, reason: str, code: int = 1) -> None:
        """Tell the servers that this worker has failed, and they tell the others.

        Args:
            reason: The error, in one line.
            code: The exit code of the run.
        """
        self._ends.abort(reason, code)

    def close(self) -> None:
        """Leave; servers end when the last worker has left."""
        self._ends.close()
        process.mpi_is_whole = not self._ends.lost


class Sums:
    """Averages gradients over workers by sums through a server, one after the other."""

    def __init__(self, comm: PsCommunicator) -> None:
        self._comm = comm

    @property
    def rank(self) -> int:
        """This worker among those that live."""
        return self._comm.rank

    @property
    def size(self) -> int:
        """How many workers take part."""
        return self._comm.size

    def start_sum(self, tensor: torch.Tensor, name: str) -> Callable[[], torch.Tensor]:
        """Return a function that sums the tensor over workers, in place, when waited for.

        Args:
            tensor: Contiguous.
            name: Makes no difference: exchanges are numbered.
        """

        def add() -> torch.Tensor:
            self._comm.all_reduce(tensor)
            return tensor

        return add

    def start_average(self, tensor: torch.Tensor, name: str) -> Callable[[], torch.Tensor]:
        """Return a function that averages the tensor over workers, in place, when waited for.

        Args:
            tensor: Contiguous.
            name: Makes no difference.
        """
        add = self.start_sum(tensor, name)
        return lambda: add().div_(self._comm.size)

    def start_gather(self, tensor: torch.Tensor, name: str) -> Callable[[], torch.Tensor]:
        """Return a function that collects all workers' rows, in order, when it is waited for.

        Args:
            tensor: Of shape (rows, ...); workers may have other numbers of rows.
            name: Makes no difference.
        """

        def collect() -> torch.Tensor:
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            parts = [broadcast_bytes(self._comm, data, root) for root in range(self._comm.size)]
            whole = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
            return whole.view(tensor.dtype).view(-1, *tensor.shape[1:])

        return collect

    def start_all_to_all(self, tensor: torch.Tensor, name: str) -> Callable[[], torch.Tensor]:
        """Return a function that gives each worker its part, when it is waited for.

        Args:
            tensor: Of shape (n,); n is a multiple of the workers, and the same on each.
            name: Makes no difference.
        """
        collect = self.start_gather(tensor.view(1, self.size, -1), name)
        return lambda: collect()[:, self.rank].reshape(-1)

    def ready(self, handle: Callable[[], torch.Tensor]) -> bool:
        """Return False: an exchange begins only when it is waited for."""
        return False

    def wait(self, handle: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Do the sum, and return the tensor."""
        return handle()


def _bytes(tensor: torch.Tensor) -> bytes:
    data: bytes = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data


def _fill(tensor: torch.Tensor, data: bytes) -> None:
    if data:
        if len(data) != tensor.nbytes:
            raise PeerLost("a worker was lost while it told the others what to do.")
        received = torch.frombuffer(bytearray(data), dtype=tensor.dtype)
        tensor.copy_(received.view(tensor.shape))
