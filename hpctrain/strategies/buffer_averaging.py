"""Average buffers, such as BatchNorm's running statistics, which each rank's batches changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hpctrain.world.broadcast import gather_numbers
from hpctrain.world.world import Communicator

_AVERAGED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.complex128)  # fmt: skip


def average_buffers(comm: Communicator, modules: Sequence[nn.Module], samples: float) -> None:
    """Make buffers the same on every rank; every rank calls this.

    Running statistics become means over ranks, each weighted by the samples it had; a rank that had
    none counts nothing. What is alike on all ranks keeps its bits. Integers and the like, such as
    counts of batches, become those of the rank that had most samples (the first of them).

    Args:
        comm: Of the world.
        modules: Whose buffers they are; alike on every rank.
        samples: That this rank's buffers have seen since they were last alike.
    """
    buffers = list({id(b): b for module in modules for b in module.buffers()}.values())
    dense = [b.detach() for b in buffers if b.layout == torch.strided and not b.is_quantized]
    if comm.size == 1 or not dense:
        return
    weights = [row[0] for row in gather_numbers(comm, [float(samples)])]
    root = weights.index(max(weights))
    averaged = [b for b in dense if b.dtype in _AVERAGED and b.numel()]
    others = [b for b in dense if b.dtype not in _AVERAGED and b.numel()]
    with torch.no_grad():
        if averaged:
            flat = torch.cat([_flat(buffer) for buffer in averaged])
            base = flat.clone()
            comm.broadcast(base, root)
            # Differences from one rank's: those of a constant are exactly zero.
            same = (flat == base) | (flat.isnan() & base.isnan())
            change = torch.where(same, torch.zeros_like(flat), (flat - base) * weights[comm.rank])
            comm.all_reduce(change)
            base += torch.where(change == 0, change, change / max(sum(weights), 1.0))
            _put(base, averaged)
        if others:
            # As bytes of one type, because engines do not know all types.
            flat = torch.cat([b.contiguous().view(-1).view(torch.uint8) for b in others])
            comm.broadcast(flat, root)
            for buffer, piece in zip(others, flat.split([b.nbytes for b in others]), strict=True):
                buffer.copy_(piece.clone().view(buffer.dtype).view(buffer.shape))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.double().reshape(-1)


def _put(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    sizes = [b.numel() * (2 if b.is_complex() else 1) for b in tensors]
    for tensor, piece in zip(tensors, flat.split(sizes), strict=True):
        if tensor.is_complex():
            tensor.copy_(torch.view_as_complex(piece.view(-1, 2)).view(tensor.shape))
        else:
            tensor.copy_(piece.view(tensor.shape))
