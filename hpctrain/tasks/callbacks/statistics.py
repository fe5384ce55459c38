"""Norms of gradients and weights, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpctrain.tasks.callbacks.base import Callback, Run


@dataclass
class Statistics(Callback):
    """Records the 2-norm of each parameter and of its gradient.

    Gradients are those that the step used on rank 0, as the strategy left them: the world's mean
    with ``horovod``, clipped if clipping is on; the rank's own with ``ps`` and ``averaging``; with
    ``sharded`` the rank's part. Records are of the kind ``statistics``.

    Args:
        every_steps: Steps between records; None: at each log line.
    """

    every_steps: int | None = None

    def on_step(self, run: Run) -> None:
        """Record, if it is time to.

        Args:
            run: The run.
        """
        if run.step % (self.every_steps or run.config.log.every_steps) == 0:
            run.record(norms(run.model), kind="statistics")


@torch.no_grad()
def norms(model: torch.nn.Module) -> dict[str, float]:
    """Return the 2-norms of parameters and gradients, by name; waits for the device.

    Args:
        model: Whose parameters.

    Example:
        >>> linear = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(linear.weight, -3.0)
        >>> norms(linear)
        {'weight_norm/weight': 3.0}
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight_norm/{name}"] = parameter
        gradient = parameter.grad
        if gradient is not None:
            dense = gradient.coalesce().values() if gradient.is_sparse else gradient
            tensors[f"grad_norm/{name}"] = dense
    # One transfer for all.
    found = [torch.linalg.vector_norm(tensor).double() for tensor in tensors.values()]
    return dict(zip(tensors, torch.stack(found).tolist() if found else [], strict=True))
