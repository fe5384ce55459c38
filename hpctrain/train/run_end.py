"""The end of a run: all ranks have the parameters that the world has come to."""

from __future__ import annotations

import torch

from hpctrain.strategies.base import Agreement, DistributedOptimizer, Strategy
from hpctrain.train.after_step import AfterStep
from hpctrain.train.callbacks import Callbacks
from hpctrain.train.checkpointing import Checkpointing
from hpctrain.train.evaluation import check_agreed
from hpctrain.train.extent import Extent
from hpctrain.train.nonfinite import Health
from hpctrain.train.state import TrainState


class RunEnd:
    """Brings ranks together after their last steps.

    Args:
        strategy: Connected.
        state: What is trained.
        extent: How long the run is.
        health: Whether all is finite.
        checkpointing: Saves.
        after_step: Validates, and knows how the run is asked to stop.
        callbacks: Are told.
    """

    def __init__(
        self,
        strategy: Strategy,
        state: TrainState,
        extent: Extent,
        health: Health,
        checkpointing: Checkpointing,
        after_step: AfterStep,
        callbacks: Callbacks,
    ) -> None:
        self._strategy = strategy
        self._world = strategy.world
        self._state = state
        self._extent = extent
        self._health = health
        self._checkpointing = checkpointing
        self._after_step = after_step
        self._callbacks = callbacks

    def finish(self, optimizer: DistributedOptimizer) -> None:
        """Finish after this rank's last step: have the world's parameters, validated and saved.

        Args:
            optimizer: The wrapped one.

        Raises:
            PeerLost: Another rank is gone.
            Error: Ranks differ, the parameters are no numbers, or a checkpoint cannot be written.
        """
        agreement = self._strategy.agreement
        if agreement is Agreement.AT_ROUNDS and not self._extent.interrupted:
            optimizer.finish()
            check_agreed(self._strategy, self._state)
        if not agreement.in_step:
            optimizer.finish()
            self._agree_on_why()
            self._world.once(lambda: self._conclude(optimizer))
        self._after_step.tell(optimizer)
        if not self._extent.interrupted:
            self._health.check_end()
        self._callbacks.tell("on_end")
        self._checkpointing.wait()

    def _agree_on_why(self) -> None:
        """Whether the run ended early, or was asked to stop and did so before its last step."""
        counters = self._state.counters
        heard, left = self._after_step.interruption.heard(), not self._extent.complete
        told = torch.tensor([float(heard), float(left), float(counters.stopped_early)])
        self._world.comm.all_reduce(told)
        counters.stopped_early = bool(told[2] > 0)
        self._extent.interrupted = bool((told[:2] > 0).all()) and not counters.stopped_early

    def _conclude(self, optimizer: DistributedOptimizer) -> None:
        """Validate and save at the end, on rank 0, where it has done so alone."""
        self._after_step.tell(optimizer)
        best = not self._extent.interrupted and self._after_step.validate(optimizer)
        self._checkpointing.save(optimizer, best=best)
        self._checkpointing.wait()
