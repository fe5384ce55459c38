"""All-gather rows of all ranks into one tensor, differentiably."""

from __future__ import annotations

from typing import Any

import torch

from hpctrain.errors import Error
from hpctrain.world.broadcast import gather_tensors
from hpctrain.world.communicator import Communicator


def gather_rows(comm: Communicator, tensor: torch.Tensor) -> torch.Tensor:
    """Return all ranks' rows, one rank's after another's, differentiably.

    Args:
        comm: Of the world; every rank calls this.
        tensor: This rank's, of shape (rows, ...).

    Raises:
        Error: Rows of two ranks are of different shapes or types.

    Example:
        >>> from hpctrain.world.communicator import Alone
        >>> gather_rows(Alone(), torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    gathered: torch.Tensor = _Gather.apply(tensor, comm)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, comm: Communicator) -> torch.Tensor:
        parts = [each["rows"] for each in gather_tensors(comm, {"rows": tensor})]
        kinds = [(part.dtype, tuple(part.shape[1:]), part.ndim > 0) for part in parts]
        for rank, kind in enumerate(kinds):
            if kind != kinds[0] or not kind[2]:
                raise Error(
                    f"all_gather() takes rows of one shape and type: rank 0 gives "
                    f"{_described(parts[0])}, rank {rank} {_described(parts[rank])}.",
                    hint="only the first dimension may differ, and there must be one.",
                )
        ctx.comm, ctx.rows = comm, [len(part) for part in parts]
        return torch.cat(parts).to(tensor.device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        narrow = gradient.dtype in (torch.float16, torch.bfloat16)
        total = gradient.to(torch.float32 if narrow else gradient.dtype, copy=True).contiguous()
        if total.numel():
            ctx.comm.all_reduce(total)
        mine = total.split(ctx.rows)[ctx.comm.rank]
        return mine.to(gradient.dtype), None


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
