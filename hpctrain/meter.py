"""Means over samples, of this rank's batches and then of the whole world's."""

from __future__ import annotations

import torch

from hpctrain.strategies.broadcast import broadcast_json
from hpctrain.world import Communicator


class Meter:
    """Adds up batch means, each weighted by its samples; costs no transfer until it is read."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._samples: dict[str, int] = {}
        self._names: list[str] = []

    def add(self, means: dict[str, torch.Tensor], samples: int) -> None:
        """Count a batch in."""
        for name, mean in means.items():
            value = mean.detach().to(torch.float64) * samples
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._samples[name] = self._samples.get(name, 0) + samples

    def read(self, comm: Communicator) -> dict[str, float]:
        """The world's means since the last reading. Every rank calls this; every rank gets them.

        A rank that had no samples takes part: what the metrics are called it learns from the first
        rank that had some. That is rank 0, unless the shards it reads are lost.
        """
        for root in range(comm.size):
            if not self._names:
                self._names = broadcast_json(comm, sorted(self._sums), root)
        if not self._names:
            return {}
        totals = torch.tensor(
            [
                [float(self._sums.get(name, 0.0)) for name in self._names],
                [float(self._samples.get(name, 0)) for name in self._names],
            ],
            dtype=torch.float64,
        )
        comm.all_reduce(totals)
        self._sums.clear()
        self._samples.clear()
        sums, samples = totals.tolist()
        return {
            name: total / count
            for name, total, count in zip(self._names, sums, samples, strict=True)
            if count
        }
