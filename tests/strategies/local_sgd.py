"""Local SGD: ranks take steps by themselves, and average their parameters every so many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import nn

from hpctrain.config import Section
from hpctrain.strategies.base import Agreement, DistributedOptimizer, check_trainable
from hpctrain.strategies.horovod import HorovodEngine
from hpctrain.strategies.start import check_alike, share


class LocalSgdConfig(Section):
    """The knobs of local SGD."""

    every: int = Field(4, ge=1, description="Steps between averages of the parameters.")


class LocalSgdOptimizer(DistributedOptimizer):
    """Steps locally; every so many steps, parameters become their mean over ranks."""

    def __init__(self, inner: torch.optim.Optimizer, comm: Any, every: int, clip: float | None):
        super().__init__(inner, clip)
        self._comm, self._every, self._steps = comm, every, 0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update by this rank's gradient; average, if a round is over."""
        self._clip()
        self.inner.step()
        self._steps += 1
        if self._steps % self._every == 0:
            self.finish()
        return None

    @torch.no_grad()
    def world_parameters(self) -> dict[nn.Parameter, torch.Tensor]:
        """Return the means over ranks."""
        means = {parameter: parameter.detach().clone() for parameter in self._parameters()}
        for mean in means.values():
            self._comm.all_reduce(mean)
            mean /= self._comm.size
        return means

    @torch.no_grad()
    def finish(self) -> None:
        """Take the means."""
        for parameter, mean in self.world_parameters().items():
            parameter.copy_(mean)

    def strategy_state(self) -> dict[str, Any]:
        """Return where in a round this is."""
        return {"steps": self._steps}

    def load_strategy_state(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self._steps = state["steps"]


class LocalSgd(HorovodEngine):
    """Local SGD over Horovod."""

    name = "local-sgd"
    Config = LocalSgdConfig
    agreement = Agreement.AT_ROUNDS
    averages_gradients = False

    def wrap(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
    ) -> LocalSgdOptimizer:
        """Start every rank from rank 0's."""
        check_trainable(optimizer)
        check_alike(self.world.comm, model, optimizer)
        share(self.world.comm, model, optimizer)
        return LocalSgdOptimizer(optimizer, self.world.comm, self.config.every, clip_norm)
