"""A world whose ranks are threads of this process, for what needs no more of a world than sums."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from hpctrain.world import Alone

T = TypeVar("T")
WAIT_SECONDS = 60.0


class ThreadCommunicator(Alone):
    """One rank's end."""

    def __init__(self, rank: int, size: int, meet: threading.Barrier, given: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._meet, self._given = meet, given

    def _exchange(self, value: Any) -> list[Any]:
        self._given[self.rank] = value
        self._meet.wait(WAIT_SECONDS)
        taken = list(self._given)
        self._meet.wait(WAIT_SECONDS)
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


def on_ranks(size: int, action: Callable[[ThreadCommunicator], T]) -> list[T | BaseException]:
    """What each rank's call returned, or raised."""
    meet, given = threading.Barrier(size), [None] * size
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = action(ThreadCommunicator(rank, size, meet, given))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_SECONDS)
    return results
