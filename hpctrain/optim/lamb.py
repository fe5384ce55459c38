"""LAMB: Adam with a step for each tensor in proportion to the tensor's norm (You et al., 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hpctrain.errors import Error


class Lamb(torch.optim.Optimizer):
    """The LAMB optimizer, for very large batches.

    You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR
    2020, Algorithm 2, with bias correction and the norm itself as the scaling function φ.

    Args:
        params: Parameters, or groups of them.
        lr: How far a tensor moves in a step, as a share of its own norm.
        betas: Decay of the mean of gradients and of their squares.
        eps: Added to the root of the mean square.
        weight_decay: Share of the weights that is added to the update, before its norm is taken.

    Raises:
        Error: A number out of its range.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> optimizer = Lamb(model.parameters(), lr=0.01)
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> optimizer.step()
        >>> f"{(model.weight - before).norm() / before.norm():.4f}"  # lr, as a share of the norm
        '0.0100'
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if min(lr, eps, weight_decay, *betas) < 0 or max(betas) >= 1:
            raise Error(
                f"Lamb cannot use lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}.",
                hint="none may be negative, and betas have to be below 1.",
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient.

        Args:
            closure: Evaluates the model again, and returns the loss.

        Raises:
            Error: A gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse or p.grad.is_complex():
                    raise Error(
                        "Lamb needs gradients that are dense and real.",
                        hint="make embeddings with sparse=False, or give them another optimizer.",
                    )
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0, dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                lamb_update(
                    p,
                    p.grad.clone(),
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state["step"].item(),
                    float(group["lr"]),
                    beta1,
                    beta2,
                    group["eps"],
                    group["weight_decay"],
                )
        return loss


def lamb_update(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Move one whole tensor, in place. To be called without autograd.

    Args:
        weights: The tensor.
        gradient: Its gradient; becomes the update.
        exp_avg: Mean of its gradients.
        exp_avg_sq: Mean of their squares.
        step: Number of this update, from 1.
        lr: As in :class:`Lamb`, like the rest.
        beta1: The first of its betas.
        beta2: The second.
        eps: See there.
        weight_decay: See there.
    """
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    update = torch.sqrt(exp_avg_sq, out=gradient)
    update.div_(math.sqrt(1 - beta2**step)).add_(eps)
    torch.div(exp_avg, update, out=update).div_(1 - beta1**step)
    if weight_decay:
        update.add_(weights, alpha=weight_decay)
    size, length = torch.linalg.vector_norm(weights), torch.linalg.vector_norm(update)
    # A choice among tensors, not an `if`: a GPU would have to be waited for.
    update.mul_(torch.where((size > 0) & (length > 0), size / length, torch.ones_like(size)))
    weights.sub_(update, alpha=lr)
