"""A task's model made ready: its types, its modes, its average, and what of it is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hpctrain.world.world import Communicator

_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_AVERAGED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.complex128)  # fmt: skip


def prepared(model: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    """Return the model on a device, in the arithmetic that was asked for.

    With ``float64``, float32 becomes float64 and complex64 becomes complex128. All other types are
    the task's own choice and stay: tables in float64, weights in bfloat16, whatever is complex.
    Buffers that are expanded from fewer values get memory of their own, to be written to.

    Args:
        model: As the task made it.
        device: This rank's.
        dtype: ``float32``, ``float64``, ``bf16`` or ``fp16``.
    """
    model = model.to(device)
    if dtype == "float64":
        model = model._apply(lambda tensor: tensor.to(_WIDER.get(tensor.dtype, tensor.dtype)))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and _overlaps(buffer):
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)
    return model


def _overlaps(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in sizes)


def begin_training(model: nn.Module) -> None:
    """Put a model into training mode, but the parts that the task has put into evaluation mode.

    Such are frozen BatchNorm layers, or a teacher. A model that is in evaluation mode as a whole,
    as pretrained ones come, is trained as a whole.
    """
    left = [module for module in model.modules() if not module.training] if model.training else []
    model.train()
    for module in left:
        module.training = False


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode; afterwards each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for module, mode in modes:
            module.training = mode


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of the model that follows it as an exponential moving average.

    Running statistics are averaged, too. Integers, sparse and quantized buffers are copied.

    Args:
        model: To follow.
        decay: Of the average.
    """
    average: Callable[[Any, Any, Any], None] = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(means: Any, values: Any, count: Any) -> None:
        pairs = list(zip(means, values, strict=True))
        follow = [(m, v) for m, v in pairs if m.dtype in _AVERAGED and m.layout == torch.strided]
        if follow:
            average([mean for mean, _ in follow], [value for _, value in follow], count)
        followed = {id(mean) for mean, _ in follow}
        for mean, value in pairs:
            if id(mean) not in followed:
                mean.copy_(value)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


class UnusedParameters:
    """Which trained parameters get no gradient, from now until it is asked.

    Args:
        model: Whose they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._used: set[nn.Parameter] = set()
        self._named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(self._used.add) for _, p in self._named]

    def warning(self, comm: Communicator | None) -> str:
        """Return what is to be said of those that no rank used; nothing: all were.

        Args:
            comm: Of the ranks that ask together; None: this one alone.
        """
        names = self.names(comm)
        if not names:
            return ""
        shown = ", ".join(f"'{name}'" for name in names[:4]) + (", ..." if len(names) > 4 else "")
        return f"no gradient came to {shown} in the first step; is that meant?"

    def names(self, comm: Communicator | None) -> list[str]:
        """Return the names of the parameters that no rank used.

        Args:
            comm: Of the ranks that ask together; None: this one alone.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        used = torch.tensor([float(p in self._used) for _, p in self._named], dtype=torch.float64)
        if comm is not None:
            comm.all_reduce(used)
        return [
            name for (name, _), count in zip(self._named, used.tolist(), strict=True) if not count
        ]
