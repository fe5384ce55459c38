"""Means over samples, of this rank's batches and then of the whole world's."""

from __future__ import annotations

import torch

from hpctrain.strategies.broadcast import broadcast_json
from hpctrain.world import Communicator


class Meter:
    """Adds up batch means, each weighted by its samples; costs no transfer until it is read.

    Attributes:
        names: What the metrics are called; empty until they were first read.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._samples: dict[str, int] = {}
        self._read = False
        self.names: list[str] = []

    def add(self, means: dict[str, torch.Tensor], samples: int) -> None:
        """Count a batch in."""
        for name, mean in means.items():
            value = mean.detach().to(torch.float64) * samples
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._samples[name] = self._samples.get(name, 0) + samples

    def read(self, comm: Communicator, *, lockstep: bool = True) -> dict[str, float]:
        """The world's means.

        Every rank calls this. In lockstep every rank gets them; a rank that had no samples takes
        part: what the metrics are called it learns from the first rank that had some. That is
        rank 0, unless the shards it reads are lost. Otherwise rank 0 gets what has come together.

        In lockstep what was read counts until :meth:`settle`: it is read again if a rank is lost
        meanwhile.
        """
        if not lockstep:
            return self._read_pool(comm)
        for root in range(comm.size):
            if not self.names:
                self.names = broadcast_json(comm, sorted(self._sums), root)
        if not self.names:
            return {}
        totals = torch.tensor(
            [
                [float(self._sums.get(name, 0.0)) for name in self.names],
                [float(self._samples.get(name, 0)) for name in self.names],
            ],
            dtype=torch.float64,
        )
        comm.all_reduce(totals)
        self._read = True
        sums, samples = totals.tolist()
        return {
            name: total / count
            for name, total, count in zip(self.names, sums, samples, strict=True)
            if count
        }

    def settle(self) -> None:
        """Begin anew, if what was added has been read."""
        if self._read:
            self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._sums.clear()
        self._samples.clear()
        self._read = False

    def _read_pool(self, comm: Communicator) -> dict[str, float]:
        given = {f"sum.{name}": float(value) for name, value in self._sums.items()}
        given |= {f"count.{name}": float(count) for name, count in self._samples.items()}
        self.clear()
        totals = comm.give("metrics", given)
        names = sorted(key.removeprefix("sum.") for key in totals if key.startswith("sum."))
        counts = {name: totals[f"count.{name}"] for name in names}
        return {name: totals[f"sum.{name}"] / count for name, count in counts.items() if count}


def total(comm: Communicator, values: dict[str, float], *, lockstep: bool) -> dict[str, float]:
    """The sums of values over ranks; where they do not go in lockstep, rank 0 alone gets them.

    Args:
        comm: Of the world.
        values: The same names on every rank.
        lockstep: Whether all ranks call this at the same step.
    """
    if not lockstep:
        return comm.give("totals", values)
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    comm.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))
