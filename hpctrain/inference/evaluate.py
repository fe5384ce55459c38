"""Metrics of a trained model on a split, each sample taken once."""

from __future__ import annotations

from hpctrain.inference.passes import Passes
from hpctrain.tasks.checks import checked_loss, checked_weight
from hpctrain.train.metrics import Meter
from hpctrain.train.set_metrics import SetMetrics
from hpctrain.train.step import applied


def evaluate(passes: Passes) -> dict[str, float]:
    """Return the loss, further means and metrics of the whole set; the same on every rank.

    Args:
        passes: Over the samples.

    Raises:
        Error: The task's ``loss()``, ``predictions()`` or ``metrics()`` give what they must not.
        PeerLost: Another rank is gone.
    """
    task, model, device = passes.task, passes.model, passes.world.device
    meter, of_set = Meter(), SetMetrics(task, device, passes.dtype)
    of_set.reset()
    for batch in passes.rounds():
        if batch is not None:
            result = applied(task.loss, model, batch, device, passes.dtype)
            loss, means = checked_loss(task, result, training=False)
            meter.add({"loss": loss, **means}, checked_weight(task, batch))
            of_set.add(model, batch)
        of_set.gather(passes.world.comm)
    return of_set.join(meter.read(passes.world.comm))
