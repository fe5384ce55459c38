"""A world whose ranks are threads of this process, for what needs no more of a world than sums."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from hpctrain.strategies.base import DistributedOptimizer, Strategy
from hpctrain.strategies.sharded import part_of
from hpctrain.train.loop import Trainer
from hpctrain.train.recorder import Silent
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import Alone, World
from tests.waiting import SECONDS

T = TypeVar("T")


class ThreadCommunicator(Alone):
    """One rank's end."""

    def __init__(self, rank: int, size: int, meet: threading.Barrier, given: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._meet, self._given = meet, given

    def _exchange(self, value: Any) -> list[Any]:
        self._given[self.rank] = value
        self._meet.wait(SECONDS)
        taken = list(self._given)
        self._meet.wait(SECONDS)
        return taken

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in their order."""
        tensor.copy_(torch.stack(self._exchange(tensor.clone())).sum(0))

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """The root's."""
        tensor.copy_(self._exchange(tensor.clone())[root])

    def barrier(self) -> None:
        """All have come."""
        self._exchange(None)


class ThreadCollectives:
    """The collectives of compressed exchanges, each done when it is begun; what all ranks see."""

    def __init__(self, comm: ThreadCommunicator) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.sent = 0  # bytes of this rank on the wire, with a ring's all-reduce and all-gather

    def start_sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        self.sent += 2 * (self.size - 1) * tensor.nbytes // self.size
        self._comm.all_reduce(tensor)
        return tensor

    def start_average(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        return self.start_sum(tensor, name).div_(self.size)

    def start_gather(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        self.sent += (self.size - 1) * tensor.nbytes
        return torch.cat(self._comm._exchange(tensor.clone()))

    def start_scatter(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        whole = tensor.clone()
        self._comm.all_reduce(whole)
        start, stop = part_of(len(whole), self.rank, self.size)
        return whole[start:stop]

    def start_all_to_all(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        self.sent += (self.size - 1) * tensor.nbytes // self.size
        return torch.cat(
            [each.chunk(self.size)[self.rank] for each in self._comm._exchange(tensor)]
        )

    def ready(self, handle: torch.Tensor) -> bool:
        return True

    def wait(self, handle: torch.Tensor) -> torch.Tensor:
        return handle


class ThreadExchange(ThreadCommunicator, ThreadCollectives):
    """A communicator that begins collectives, and waits for them later, as Horovod's does."""

    def __init__(self, rank: int, size: int, meet: threading.Barrier, given: list[Any]) -> None:
        ThreadCommunicator.__init__(self, rank, size, meet, given)
        self._comm = self
        self.sent = 0


def on_ranks(
    size: int,
    action: Callable[[Any], T],
    kind: type[ThreadCommunicator] = ThreadCommunicator,
) -> list[T | BaseException]:
    """What each rank's call returned, or raised.

    Args:
        size: Of the world.
        action: Given a rank's communicator.
        kind: Of the communicator.
    """
    meet, given = threading.Barrier(size), [None] * size
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = action(kind(rank, size, meet, given))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)
    return results


class AveragingOptimizer(DistributedOptimizer):
    """Averages gradients when all have been computed."""

    def __init__(self, inner: Any, comm: ThreadCommunicator, clip_norm: float | None) -> None:
        super().__init__(inner, clip_norm)
        self._comm = comm
        self._done = False

    def synchronize(self) -> None:
        """Zeros where this rank has none."""
        if self._done:
            return
        for parameter in self._parameters():
            gradient = parameter.grad
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
            self._comm.all_reduce(parameter.grad)
            parameter.grad /= self._comm.size
        self._done = True

    def step(self, closure: Any = None) -> Any:
        """As any other."""
        result = super().step(closure)
        self._done = False
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any other."""
        super().zero_grad(set_to_none)
        self._done = False


class Averaging(Strategy):
    """A strategy in step, of threads."""

    name = "threads"

    def __init__(self) -> None:
        super().__init__(World(ALONE))

    def wrap(self, model: Any, optimizer: Any, *, clip_norm: float | None = None) -> Any:
        """Every rank has begun with the same model."""
        return AveragingOptimizer(optimizer, self.world.comm, clip_norm)  # type: ignore[arg-type]


def train_on_ranks(size: int, make: Callable[[Averaging, int], Trainer]) -> list[Any]:
    """Train on so many ranks; what each raised, or its trainer.

    Args:
        size: Of the world.
        make: A trainer, for a strategy and a rank; called one after the other, because random
            generators belong to the process.
    """
    strategies = [Averaging() for _ in range(size)]
    trainers = [make(strategy, rank) for rank, strategy in enumerate(strategies)]

    def run(comm: ThreadCommunicator) -> Trainer:
        trainer = trainers[comm.rank]
        strategies[comm.rank].world.comm = comm
        trainer.restore(None)
        trainer.run(Silent())
        return trainer

    return on_ranks(size, run)
