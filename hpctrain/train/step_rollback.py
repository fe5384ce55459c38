"""The train state after the last step, as far as the next one changes it before it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from hpctrain.strategies.start import repeats
from hpctrain.train.state import Counters, TrainState


class _Buffer(NamedTuple):
    """A buffer, whose it is, and its values at a step's end."""

    module: nn.Module
    name: str
    buffer: torch.Tensor
    value: torch.Tensor


class StepRollback:
    """Remembers what a step, or what is done after one, would have to undo when a rank is lost.

    Parameters and the optimizer's state are not among it: they change only when a step ends.

    Args:
        state: Of the run.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._place = (0, 0, 0)
        self._counters = Counters()
        self._buffers: list[_Buffer] = []

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
        found = [
            (module, name, buffer)
            for module in self._state.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        kept = self._buffers
        if not found:
            return
        if len(kept) == len(found) and all(
            each.buffer is buffer and each.module is module
            for each, (module, _, buffer) in zip(kept, found, strict=True)
        ):
            torch._foreach_copy_([b.value for b in kept], [b.buffer.detach() for b in kept])
            return
        # The first time, or forward() has replaced some.
        self._buffers = [_Buffer(*each, each[2].detach().clone()) for each in found]

    def undo(self, *, counters: bool) -> None:
        """Go back to what was remembered.

        Args:
            counters: Also undo what was done after the step, such as judging a validation.
        """
        self._state.loader.place = self._place
        for module, name, buffer, value in self._buffers:
            if repeats(buffer):  # and cannot be written to
                module._buffers[name] = value.clone()
            else:
                module._buffers[name] = buffer
                buffer.detach().copy_(value)
        if counters:
            kept = self._counters
            self._state.counters = replace(kept, metrics=dict(kept.metrics), world=list(kept.world))
