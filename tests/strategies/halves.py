"""Each rank keeps the optimizer's state of its own share of the parameters, and updates those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hpctrain.strategies.horovod import Horovod, HorovodOptimizer
from hpctrain.strategies.single import SingleOptimizer
from hpctrain.world.broadcast import broadcast_tree


class HalvesOptimizer(HorovodOptimizer):
    """Gradients are averaged; parameters are updated by the rank whose they are, and sent."""

    def own(self, comm: Any) -> None:
        """Keep the state of every ``size``-th parameter alone."""
        self._comm_ = comm
        self._owner = {p: n % comm.size for n, p in enumerate(self._parameters())}
        for parameter, owner in self._owner.items():
            if owner != comm.rank:
                self.inner.state.pop(parameter, None)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update what is this rank's, and take the rest from the others."""
        self.synchronize()
        self._clip()
        gradients = {p: p.grad for p in self._owner}
        for parameter, owner in self._owner.items():
            if owner != self._comm_.rank:
                parameter.grad = None
        self.inner.step()
        for parameter, owner in self._owner.items():
            parameter.grad = gradients[parameter]
            self._comm_.broadcast(parameter.data, owner)
        self._gradients.stepped()
        return None

    def world_state(self) -> dict[str, Any]:
        """Return the whole state, which no rank has."""
        whole: dict[str, Any] = {}
        for root in range(self._comm_.size):
            part = broadcast_tree(self._comm_, self.inner.state_dict(), root)
            whole = {**part, "state": {**whole.get("state", {}), **part["state"]}}
        return whole


class Halves(Horovod):
    """Optimizer state in halves over ranks."""

    name = "halves"
    recovers = False
    optimizer_class = HalvesOptimizer

    def wrap(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
    ) -> HalvesOptimizer:
        """As Horovod does, but each rank keeps a part of the state."""
        wrapped = super().wrap(model, optimizer, clip_norm=clip_norm)
        assert isinstance(wrapped, HalvesOptimizer)
        wrapped.own(self.world.comm)
        return wrapped


class Alone(Halves):
    """Says that ranks agree after each step, and has each go its own way."""

    name = "alone"

    def wrap(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
    ) -> Any:
        """Nothing is averaged."""
        return SingleOptimizer(optimizer, clip_norm)
