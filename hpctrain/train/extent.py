"""How long a run is, and how far it has come."""

from __future__ import annotations

from hpctrain.config import TrainConfig
from hpctrain.strategies.base import Strategy
from hpctrain.train.state import TrainState


class Extent:
    """Knows the steps of the whole run, and whether it is over.

    Args:
        train: Says how long the run is to be.
        strategy: Connected; it may end the run.
        state: What is trained.

    Attributes:
        interrupted: Whether the run was asked to stop, and did before its end.
    """

    def __init__(self, train: TrainConfig, strategy: Strategy, state: TrainState) -> None:
        self._train = train
        self._strategy = strategy
        self._state = state
        self.interrupted = False

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        train, loader = self._train, self._state.loader
        if train.steps is not None:
            return train.steps
        left = -(-(loader.samples - loader.cursor) // loader.batch_size)
        left += (train.epochs - 1 - loader.epoch) * len(loader)
        return self._state.counters.step + max(left, 0)

    @property
    def complete(self) -> bool:
        """Whether the last step is done."""
        return self._state.counters.step >= self.steps

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        ended = self.complete or self._state.counters.stopped_early
        return ended or self._strategy.stopped or self.interrupted

    @property
    def epochs(self) -> float:
        """Passes over the data done so far; whole at the end of an epoch."""
        loader = self._state.loader
        return loader.epoch + loader.cursor / loader.samples

    def skip(self, steps: int) -> None:
        """Pass over batches that the other ranks have taken meanwhile; not beyond the run's end.

        Args:
            steps: How many.
        """
        counters, loader = self._state.counters, self._state.loader
        steps = max(0, min(steps, self.steps - counters.step))
        counters.step += steps
        for _ in range(steps):
            start = loader.cursor if loader.cursor < loader.samples else 0
            if loader.cursor >= loader.samples:
                loader.epoch += 1
            loader.cursor = min(start + loader.batch_size, loader.samples)
            counters.samples += loader.cursor - start
