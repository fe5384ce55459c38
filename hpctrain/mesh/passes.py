"""What a strategy is given to compute a step with: the task's loss in the run's arithmetic."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from hpctrain.data.batch import Batch


class Computed(NamedTuple):
    """What a pass has computed.

    Attributes:
        means: By name, the loss among them.
        samples: Of this rank, in the pass.
        weight: What the means count for: the samples, or as the task says.
    """

    means: dict[str, Any]
    samples: int
    weight: float


class Passes(Protocol):
    """The task's side of forward passes."""

    def loss(
        self, model: nn.Module, batch: Batch, *, training: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the task's loss of a batch, and means over its samples by name.

        Args:
            model: What is called for its outputs.
            batch: On the CPU.
            training: Whether the loss has to have a gradient.
        """

    def weight(self, batch: Batch) -> float:
        """Return what a batch counts for: its samples, or as the task says."""

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which layers compute in the run's arithmetic (autocast)."""
