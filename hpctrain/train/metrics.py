"""Means over samples, of this rank's batches and then of the whole world's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hpctrain.world.broadcast import gather_json
from hpctrain.world.world import Communicator


class Meter:
    """Adds up batch means, each by what it counts for; costs no transfer until it is read.

    Attributes:
        names: What the metrics are called, as far as they were read.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor | float] = {}
        self._weights: dict[str, float] = {}
        self._read = False
        self.names: list[str] = []

    def add(self, means: Mapping[str, torch.Tensor | float], weight: float) -> None:
        """Count a batch in; it need not have all the means that others have.

        Args:
            means: By name.
            weight: What the batch counts for: its samples, or as its task says.
        """
        for name, mean in means.items():
            wide = mean.detach().to(torch.float64) if isinstance(mean, torch.Tensor) else mean
            self._sums[name] = self._sums.get(name, 0.0) + wide * weight
            self._weights[name] = self._weights.get(name, 0) + weight

    def read(self, comm: Communicator, *, in_step: bool = True) -> dict[str, float]:
        """Return the world's means, each over the samples of the batches that had it.

        Every rank calls this. In step every rank gets them; a rank that had no samples takes
        part. What the metrics are called ranks tell each other when one of them has a new one.
        Otherwise rank 0 gets what has come together.

        In step what was read counts until :meth:`settle`: it is read again if a rank is lost
        meanwhile.

        Args:
            comm: Of the world.
            in_step: Whether all ranks call this at the same step; else rank 0 alone gets means.
        """
        if not in_step:
            return self._read_pool(comm)
        sums, samples, news = self._totals(comm)
        if news:
            given = gather_json(comm, sorted(self._sums))
            self.names = sorted({*self.names, *(name for names in given for name in names)})
            sums, samples, _ = self._totals(comm)
        self._read = True
        return {
            name: total / count
            for name, total, count in zip(self.names, sums, samples, strict=True)
            if count
        }

    def _totals(self, comm: Communicator) -> tuple[list[float], list[float], bool]:
        """Sum the known names' values and samples over ranks, and tell whether others exist."""
        totals = torch.zeros(2, len(self.names) + 1, dtype=torch.float64)
        for place, name in enumerate(self.names):
            totals[0, place] = float(self._sums.get(name, 0.0))
            totals[1, place] = float(self._weights.get(name, 0))
        totals[0, -1] = float(not self._sums.keys() <= set(self.names))
        comm.all_reduce(totals)
        (*sums, news), (*samples, _) = totals.tolist()
        return sums, samples, news > 0

    def settle(self) -> None:
        """Begin anew, if what was added has been read."""
        if self._read:
            self.clear()

    def clear(self) -> None:
        """Forget all values, and begin anew."""
        self._sums.clear()
        self._weights.clear()
        self._read = False

    def _read_pool(self, comm: Communicator) -> dict[str, float]:
        given = {f"sum.{name}": float(value) for name, value in self._sums.items()}
        given |= {f"count.{name}": float(count) for name, count in self._weights.items()}
        self.clear()
        totals = comm.give("metrics", given)
        names = sorted(key.removeprefix("sum.") for key in totals if key.startswith("sum."))
        counts = {name: totals[f"count.{name}"] for name in names}
        return {name: totals[f"sum.{name}"] / count for name, count in counts.items() if count}


def total(comm: Communicator, values: dict[str, float], *, in_step: bool) -> dict[str, float]:
    """Sum values over ranks; where ranks do not go in step, rank 0 alone gets the sums.

    Args:
        comm: Of the world.
        values: The same names on every rank.
        in_step: Whether all ranks call this at the same step.
    """
    if not in_step:
        return comm.give("totals", values)
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    comm.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))
