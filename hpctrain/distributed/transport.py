"""Tensors as MPI sees them: what is moved, what is added up, and in which type.

Data that is only moved travels as integers of its element's width, so every type of tensor can be
sent, and counts stay small. Sums of 16-bit floats are made in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from hpctrain.errors import Error

Buffer = tuple[Any, int, MPI.Datatype]
"""What MPI is handed: memory, a count of elements, and their type."""

_MOVED_AS = {
    1: MPI.INT8_T,
    2: MPI.INT16_T,
    4: MPI.INT32_T,
    8: MPI.INT64_T,
    16: MPI.C_DOUBLE_COMPLEX,
}

_ADDED_AS = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
    torch.bool: MPI.UINT8_T,
}

_OPERATIONS = {
    "SUM": MPI.SUM,
    "AVG": MPI.SUM,
    "PRODUCT": MPI.PROD,
    "MIN": MPI.MIN,
    "MAX": MPI.MAX,
    "BAND": MPI.BAND,
    "BOR": MPI.BOR,
    "BXOR": MPI.BXOR,
}

# As torch's own backends have it for truth values: a sum is "any", a product is "all".
_OF_TRUTH = {
    "SUM": MPI.LOR,
    "MAX": MPI.LOR,
    "BOR": MPI.LOR,
    "PRODUCT": MPI.LAND,
    "MIN": MPI.LAND,
    "BAND": MPI.LAND,
    "BXOR": MPI.LXOR,
}


def moved(tensor: torch.Tensor) -> Buffer:
    """Return a contiguous tensor as a buffer to be sent or received as it is."""
    width = tensor.element_size()
    return _memory(tensor), tensor.numel(), _MOVED_AS[width]


def added(tensor: torch.Tensor) -> Buffer:
    """Return a contiguous tensor of :func:`wide` as a buffer to be reduced."""
    return _memory(tensor), tensor.numel(), _ADDED_AS[tensor.dtype]


def by_rank(tensor: torch.Tensor, counts: Sequence[int]) -> tuple[Any, Sequence[int], Any]:
    """Return a contiguous tensor as a buffer of which every rank has so many elements.

    Args:
        tensor: The parts of all ranks end to end.
        counts: Elements of each rank's part.
    """
    memory, _, kind = moved(tensor)
    return memory, counts, kind


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type that sums of this type are made in.

    Raises:
        Error: MPI cannot add up such numbers.
    """
    if dtype in _ADDED_AS:
        return dtype
    if dtype.is_floating_point:
        return torch.float32
    raise Error(
        f"tensors of {dtype} cannot be reduced over ranks.",
        hint="convert them to a type that MPI can add up, such as float32 or int64.",
    )


def operation(op: Any, dtype: torch.dtype) -> tuple[MPI.Op, bool]:
    """Return MPI's operation for one of torch's, and whether the sum is to be divided by ranks.

    Args:
        op: A ``torch.distributed.ReduceOp``.
        dtype: Of the tensors that are reduced.

    Raises:
        Error: There is no such operation for that type.
    """
    name = next((n for n in _OPERATIONS if op == getattr(dist.ReduceOp, n)), None)
    table = _OF_TRUTH if dtype == torch.bool else _OPERATIONS
    averages = name == "AVG"
    fits = name in table and not (averages and not (dtype.is_floating_point or dtype.is_complex))
    if fits and dtype.is_complex:
        fits = name in ("SUM", "AVG", "PRODUCT")
    if fits and dtype.is_floating_point:
        fits = name not in ("BAND", "BOR", "BXOR")
    if not fits:
        raise Error(
            f"{op} of {dtype} is not among the reductions over MPI.",
            hint="use SUM, AVG, PRODUCT, MIN or MAX of real numbers, and bitwise ones of integers.",
        )
    assert name is not None
    return table[name], averages


def _memory(tensor: torch.Tensor) -> Any:
    if tensor.device.type != "cpu":
        raise Error(
            f"a tensor on {tensor.device} was given to a process group over MPI.",
            hint="move it to the CPU, or use another backend for that device.",
        )
    assert tensor.is_contiguous()
    if tensor.numel() == 0:
        return None
    # By address: numpy knows fewer types of numbers than torch does.
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
