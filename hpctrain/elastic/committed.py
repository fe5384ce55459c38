"""The train state after the last step, as far as the next one changes it before it ends."""

from __future__ import annotations

from dataclasses import replace

import torch

from hpctrain.state import Counters, TrainState


class Committed:
    """Remembers what a step, or what is done after one, would have to undo when a rank is lost.

    Parameters and the optimizer's state are not among it: they change only when a step ends.

    Args:
        state: Of the run.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._place = (0, 0, 0)
        self._counters = Counters()
        self._buffers: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []

    def keep(self) -> None:
        """Remember things as they are now."""
        self._place = self._state.loader.place
        counters = self._state.counters
        self._counters = replace(
            counters, metrics=dict(counters.metrics), world=list(counters.world)
        )
        self.keep_buffers()

    def keep_buffers(self) -> None:
        """Remember the model's buffers alone, such as running statistics."""
        if not self._kept:
            self._buffers = [buffer.detach() for buffer in self._state.model.buffers()]
            self._kept = [buffer.clone() for buffer in self._buffers]
        elif self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def undo(self, *, counters: bool) -> None:
        """Go back to what was remembered.

        Args:
            counters: Also undo what was done after the step, such as judging a validation.
        """
        self._state.loader.place = self._place
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        if counters:
            kept = self._counters
            self._state.counters = replace(kept, metrics=dict(kept.metrics), world=list(kept.world))
