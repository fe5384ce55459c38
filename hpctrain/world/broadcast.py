"""Broadcast and gather state, JSON and tensors over ranks, as bytes that cannot carry code."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hpctrain.checkpoint import state_tree
from hpctrain.errors import Error
from hpctrain.world.communicator import Communicator

PIECE_BYTES = 2**28
"""MPI counts in 32-bit integers, so a large state goes in several pieces."""

_WORD = 8  # bytes of an integer that is summed


def broadcast_bytes(comm: Communicator, data: bytes, root: int = 0) -> bytes:
    """Return the root's bytes on every rank.

    Args:
        comm: Of the world; every rank calls this.
        data: What the root sends; what other ranks pass is ignored.
        root: The rank that sends.
    """
    if comm.size == 1:
        return data
    length = torch.tensor([len(data)], dtype=torch.int64)
    comm.broadcast(length, root)
    if not length:
        return b""
    buffer = torch.empty(int(length), dtype=torch.uint8)
    if comm.rank == root:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    for piece in buffer.split(PIECE_BYTES):
        comm.broadcast(piece, root)
    return buffer.numpy().tobytes()


def broadcast_json(comm: Communicator, value: Any, root: int = 0) -> Any:
    """Return the root's JSON-able value on every rank.

    Args:
        comm: Of the world; every rank calls this.
        value: What the root sends; other ranks' need only be JSON-able.
        root: The rank that sends.
    """
    return json.loads(broadcast_bytes(comm, json.dumps(value).encode(), root))


def gather_numbers(comm: Communicator, numbers: Sequence[float]) -> list[list[float]]:
    """All-gather numbers: return every rank's, by rank, on every rank.

    It is one small all-reduce, of vectors in which each rank has a place of its own.

    Args:
        comm: Of the world; every rank calls this.
        numbers: This rank's, as many as every other rank's.
    """
    rank, size = comm.rank, comm.size
    table = torch.zeros(size, len(numbers), dtype=torch.float64)
    table[rank] = torch.tensor(numbers, dtype=torch.float64)
    comm.all_reduce(table)
    rows: list[list[float]] = table.tolist()
    return rows


def gather_json(comm: Communicator, value: Any) -> list[Any]:
    """All-gather JSON-able values: return every rank's, by rank, on every rank.

    Args:
        comm: Of the world; every rank calls this.
        value: This rank's; they may differ in size.

    Example:
        >>> from hpctrain.world.communicator import Alone
        >>> gather_json(Alone(), {"samples": 3})
        [{'samples': 3}]
    """
    data = json.dumps(value).encode()
    sizes = [int(row[0]) for row in gather_numbers(comm, [len(data)])]
    ends = list(itertools.accumulate(sizes))
    flat = torch.zeros(max(ends[-1], 1), dtype=torch.float32)  # holds a byte exactly
    start = ends[comm.rank] - len(data)
    flat[start : start + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    comm.all_reduce(flat)
    whole = flat.to(torch.uint8).numpy().tobytes()
    return [json.loads(whole[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def broadcast_tree(comm: Communicator, state: Any, root: int = 0) -> Any:
    """Return the root's tree of tensors and plain values on every rank, its tensors on the CPU.

    What the others pass is ignored: they may hold nothing yet. Tensors travel as the bytes of their
    elements in C's order, with shapes and types, and nothing that a peer sends is executed. Where
    there is one rank, its state is returned as it is, not copied.

    Args:
        comm: Of the world; every rank calls this.
        state: As ``state_dict()`` methods return it.
        root: The rank that sends.

    Raises:
        Error: The root's holds what cannot be sent; all ranks raise it.

    Example:
        >>> from hpctrain.world.communicator import Alone
        >>> broadcast_tree(Alone(), {"weight": torch.ones(2), "step": 7})
        {'weight': tensor([1., 1.]), 'step': 7}
    """
    kept: dict[str, torch.Tensor] = {}
    told: dict[str, Any] = {}
    if comm.rank == root:
        try:
            kept, rest = state_tree.split(state)
            told = {"rest": rest, "tensors": {name: _kind(name, t) for name, t in kept.items()}}
        except Error as error:
            told = {"error": [error.message, error.hint]}
    told = broadcast_json(comm, told, root)
    if "error" in told:
        raise Error(told["error"][0], hint=told["error"][1])
    if comm.size == 1:
        return state
    data = broadcast_bytes(comm, b"".join(_data(tensor) for tensor in kept.values()), root)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    tensors, start = {}, 0
    for name, (dtype, shape, size) in told["tensors"].items():
        piece = buffer[start : start + size]
        tensors[name] = _tensor(piece, getattr(torch, dtype), shape)
        start += size
    return state_tree.join(tensors, told["rest"])


def gather_trees(comm: Communicator, state: Any) -> list[Any]:
    """Return every rank's tree of tensors and plain values, by rank, on rank 0; elsewhere nothing.

    One after the other, so that other ranks hold no more than one of them besides their own.

    Args:
        comm: Of the world; every rank calls this.
        state: This rank's.

    Raises:
        Error: One holds what cannot be sent; all ranks raise it.
    """
    trees = (broadcast_tree(comm, state, root) for root in range(comm.size))
    return [tree for tree in trees if comm.rank == 0]


def gather_tensors(
    comm: Communicator, tensors: Mapping[str, torch.Tensor]
) -> list[dict[str, torch.Tensor]]:
    """Return every rank's tensors by name, by rank, on the CPU, bit for bit.

    Names, shapes and types may differ from rank to rank. The bytes are summed as integers, each
    rank's in a place of its own.

    Args:
        comm: Of the world; every rank calls this.
        tensors: This rank's.

    Raises:
        Error: One is of a kind that cannot be sent.
    """
    kinds = {name: _kind(name, tensor) for name, tensor in tensors.items()}
    if comm.size == 1:
        return [{name: tensor.detach().cpu() for name, tensor in tensors.items()}]
    told = gather_json(comm, kinds)
    sizes = [sum(size for _, _, size in each.values()) for each in told]
    ends = list(itertools.accumulate(-(-size // _WORD) for size in sizes))
    words = torch.zeros(ends[-1], dtype=torch.int64)
    starts = [_WORD * start for start in (0, *ends)]
    flat = words.view(torch.uint8)
    if sizes[comm.rank]:
        mine = b"".join(_data(tensor) for tensor in tensors.values())
        start = starts[comm.rank]
        flat[start : start + len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    for piece in words.split(PIECE_BYTES // _WORD):
        if len(piece):
            comm.all_reduce(piece)
    gathered = []
    for each, start in zip(told, starts, strict=False):
        found = {}
        for name, (dtype, shape, size) in each.items():
            found[name] = _tensor(flat[start : start + size], getattr(torch, dtype), shape)
            start += size
        gathered.append(found)
    return gathered


def _kind(name: str, tensor: torch.Tensor) -> tuple[str, list[int], int]:
    """A tensor's type, shape and bytes."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        what = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise Error(
            f"'{name}' is a {what} tensor, which cannot be sent to other ranks or saved.",
            hint="keep it as dense tensors, such as indices and values, and build it in forward().",
        )
    size = tensor.numel() * tensor.element_size()
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size


def _data(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    data: bytes = flat.contiguous().view(torch.uint8).numpy().tobytes()
    return data


def _tensor(data: torch.Tensor, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).copy_(data)
    return tensor
