"""The strategy of one replica: nothing to agree on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hpctrain.config import ElasticConfig, Section
from hpctrain.errors import Error
from hpctrain.strategies.base import DistributedOptimizer, Strategy, check_trainable
from hpctrain.tables.table import tables_of
from hpctrain.world.world import World


class SingleOptimizer(DistributedOptimizer):
    """Clips, where that is asked for; all else is the user's own optimizer."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Clip and update the parameters; a closure's gradients are clipped whenever it is called.

        Args:
            closure: Evaluates the model again, and returns the loss.

        Raises:
            Error: The optimizer needs a closure, and there is none; or there is one, and tables.
        """
        if closure is None:
            return super().step()
        if self.tables:
            raise Error(
                "optimizer.step(closure) is not supported for a model with tables.",
                hint="use an optimizer that steps once per gradient.",
            )
        given = closure

        def clipped() -> float:
            loss = given()
            self._clip()
            return loss

        result = self.inner.step(clipped)
        self.mark("update")
        return result


class Single(Strategy):
    """One process: clipping alone.

    Raises:
        Error: The launcher started several ranks; each would train and write for itself.
    """

    name = "single"
    takes_closures = True
    holds_tables = True

    def __init__(
        self,
        world: World,
        config: Section | None = None,
        *,
        elastic: ElasticConfig | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        if world.size != 1:
            raise Error(
                f"strategy 'single' on a world of {world.size} ranks: each would train alone.",
                hint="use --strategy horovod, or start one process.",
            )
        super().__init__(world, config, elastic=elastic, timeout_seconds=timeout_seconds)

    def wrap(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
    ) -> DistributedOptimizer:
        """Wrap the optimizer, for clipping alone.

        Args:
            model: To be trained.
            optimizer: Of its parameters.
            clip_norm: Largest norm of the gradient; None: no clipping.
        """
        check_trainable(optimizer)
        wrapped = SingleOptimizer(optimizer, clip_norm)
        wrapped.tables = tables_of(model)
        return wrapped
