"""Periodic averaging: ranks take steps by themselves, and agree on parameters once a round."""

from __future__ import annotations

import torch
from torch import nn

from hpctrain.config import ElasticConfig, Section
from hpctrain.strategies.averaging_knobs import AveragingConfig, check_knobs, outer_optimizer
from hpctrain.strategies.averaging_optimizer import AveragingOptimizer
from hpctrain.strategies.base import (
    Agreement,
    check_shareable,
    check_trainable,
)
from hpctrain.strategies.horovod import HorovodEngine
from hpctrain.strategies.start import check_alike, share
from hpctrain.world.world import World

FEW_ROUNDS = 50
"""In fewer rounds than this, momentum from round to round has cost more than it brought."""


class Averaging(HorovodEngine):
    """Periodic averaging: ranks step alone, and agree every so many steps (local SGD, DiLoCo)."""

    name = "averaging"
    Config = AveragingConfig
    agreement = Agreement.AT_ROUNDS
    averages_gradients = False

    def __init__(
        self,
        world: World,
        config: Section | None = None,
        *,
        elastic: ElasticConfig | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        check_knobs(config if isinstance(config, AveragingConfig) else AveragingConfig())
        super().__init__(world, config, elastic=elastic, timeout_seconds=timeout_seconds)

    def warnings(self, steps: int) -> list[str]:
        """Warn of momentum from round to round where there are few rounds.

        Args:
            steps: Of the whole run.
        """
        config: AveragingConfig = self.config
        outer = outer_optimizer(config, self.world.size)
        rounds = max(steps - config.start, 0) // config.every
        if outer.momentum == 0 or rounds >= FEW_ROUNDS:
            return []
        return [
            f"averaging.outer={config.outer} has momentum {outer.momentum:.3g} and the run only "
            f"{rounds} rounds, fewer than the {FEW_ROUNDS} it takes to be worth it; outer=mean, or "
            "a smaller averaging.every, will likely end at a lower loss."
        ]

    def wrap(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
    ) -> AveragingOptimizer:
        """Start every rank from rank 0's model and optimizer state, and wrap the optimizer.

        Args:
            model: To be trained; overwritten by rank 0's.
            optimizer: Of its parameters; its state is overwritten by rank 0's.
            clip_norm: Largest norm of this rank's own gradient; None: no clipping.
        """
        check_trainable(optimizer)
        check_shareable(model, optimizer)
        check_alike(self.world.comm, model, optimizer)
        share(self.world.comm, model, optimizer)
        return AveragingOptimizer(model, optimizer, self._comm, self.config, clip_norm)
