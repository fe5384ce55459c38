"""Batch normalisation over the global batch: every rank's samples, with the exact gradient.

Ioffe and Szegedy, "Batch normalization", ICML 2015. Statistics are sums over ranks of this rank's
samples, however many there are, so parts may be uneven, and a rank may have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpctrain.errors import Error
from hpctrain.world.world import World


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a module takes statistics of a batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def synchronize_batchnorm(model: nn.Module, world: World) -> None:
    """Have the model's BatchNorm modules take their statistics over all ranks, from now on.

    They stay the same objects, with the same parameters and state.

    Args:
        model: Whose they are.
        world: Whose ranks; each runs the same modules in the same order.

    Raises:
        Error: One has a forward pass of its own.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, _OverRanks):
            continue
        kind = _KINDS.get(type(module))
        if kind is None:
            raise Error(
                f"train.sync_batchnorm does not know '{name}', a {type(module).__name__}.",
                hint="use torch's BatchNorm1d, 2d or 3d.",
            )
        module.__class__ = kind
        vars(module)["_ranks"] = _Ranks(world)


class _Ranks:
    """The world, which copies of a module share."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __deepcopy__(self, memo: Any) -> _Ranks:
        return self

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.world.comm.all_reduce(tensor)
        return tensor


class _OverRanks(_BatchNorm):
    _ranks: _Ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        takes = self.training or (self.running_mean is None and self.running_var is None)
        if not takes:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        output, mean, variance, count = _Normalize.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self.eps, self._ranks
        )
        if self.training and self.track_running_stats:
            self._track(mean, variance, count)
        return output  # type: ignore[no-any-return]

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        counts = count > 0  # no rank may have had a sample
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += counts
        if self.running_mean is None or self.running_var is None:
            return
        momentum: Any = self.momentum
        if momentum is None:  # the mean of all batches
            assert self.num_batches_tracked is not None
            momentum = 1.0 / self.num_batches_tracked.clamp(min=1).double()
        unbiased = variance * (count / (count - 1).clamp(min=1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running += counts.double() * momentum * (new.to(running.dtype) - running)


class _OverRanks1d(_OverRanks, nn.BatchNorm1d):
    pass


class _OverRanks2d(_OverRanks, nn.BatchNorm2d):
    pass


class _OverRanks3d(_OverRanks, nn.BatchNorm3d):
    pass


_KINDS: dict[type, type[_OverRanks]] = {
    nn.BatchNorm1d: _OverRanks1d,
    nn.BatchNorm2d: _OverRanks2d,
    nn.BatchNorm3d: _OverRanks3d,
}


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        ranks: _Ranks,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        over = [dim for dim in range(x.ndim) if dim != 1]
        channels = x.shape[1]
        # Twice, first for the mean: sums of squares would lose half of the digits.
        sums = torch.zeros(channels + 1, dtype=torch.float64, device=x.device)
        sums[:-1] = wide.sum(over, dtype=torch.float64)
        sums[-1] = x.numel() // channels if channels else 0
        ranks.sum(sums)
        count = sums[-1].clamp(min=1)
        mean = sums[:-1] / count
        shape = [1, channels, *[1] * (x.ndim - 2)]
        centred = wide - mean.to(wide.dtype).view(shape)
        squares = centred.square().sum(over, dtype=torch.float64)
        variance = ranks.sum(squares) / count
        scale = (variance + eps).rsqrt().to(wide.dtype)
        normal = centred * scale.view(shape)
        ctx.save_for_backward(normal, scale, weight, count)
        ctx.ranks, ctx.kinds = ranks, (x.dtype, bias is not None)
        output = normal if weight is None else normal * weight.to(wide.dtype).view(shape)
        if bias is not None:
            output = output + bias.to(wide.dtype).view(shape)
        seen = sums[-1].clone()
        ctx.mark_non_differentiable(mean, variance, seen)
        return output.to(x.dtype), mean, variance, seen

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *rest: Any) -> Any:
        normal, scale, weight, count = ctx.saved_tensors
        dtype, has_bias = ctx.kinds
        gradient = gradient.to(normal.dtype)
        over = [dim for dim in range(normal.ndim) if dim != 1]
        shape = [1, len(scale), *[1] * (normal.ndim - 2)]
        of_bias = gradient.sum(over, dtype=torch.float64)
        of_weight = (gradient * normal).sum(over, dtype=torch.float64)
        sums = torch.cat([of_bias, of_weight])
        ctx.ranks.sum(sums)
        means = (sums / count).to(normal.dtype)
        mean, along = means.view(2, -1)
        change = gradient - mean.view(shape) - normal * along.view(shape)
        factor = scale if weight is None else scale * weight.to(normal.dtype)
        return (
            (change * factor.view(shape)).to(dtype),
            None if weight is None else of_weight.to(weight.dtype),
            of_bias.to(weight.dtype if weight is not None else dtype) if has_bias else None,
            None,
            None,
        )
