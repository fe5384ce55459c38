"""Giving every rank one rank's state, or each rank's, as bytes that cannot carry code."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load, save

from hpctrain import tree
from hpctrain.world import Communicator

PIECE_BYTES = 2**28
"""MPI counts in 32-bit integers, so a large state goes in several pieces."""


def broadcast_bytes(comm: Communicator, data: bytes, root: int = 0) -> bytes:
    """The root's bytes on every rank; what the others pass is ignored."""
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
    """The root's JSON-able value on every rank."""
    return json.loads(broadcast_bytes(comm, json.dumps(value).encode(), root))


def gather_numbers(comm: Communicator, numbers: Sequence[float]) -> list[list[float]]:
    """Every rank's numbers, by rank; each rank gives as many.

    A sum of vectors in which each rank has its own place: one small all-reduce.
    """
    rank, size = comm.rank, comm.size
    table = torch.zeros(size, len(numbers), dtype=torch.float64)
    table[rank] = torch.tensor(numbers, dtype=torch.float64)
    comm.all_reduce(table)
    rows: list[list[float]] = table.tolist()
    return rows


def gather_json(comm: Communicator, value: Any) -> list[Any]:
    """Every rank's JSON-able value, by rank."""
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
    """The root's tree of tensors and plain values on every rank, tensors on the CPU.

    What the others pass is ignored: they may hold nothing yet. Tensors travel in the safetensors
    format with their names, shapes and types, and nothing that a peer sends is executed.
    """
    tensors, rest = tree.split(state if comm.rank == root else {})
    # Copies, because safetensors refuses tensors that share memory (tied weights do).
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    received = load(broadcast_bytes(comm, save(whole), root))
    return tree.join(received, broadcast_json(comm, rest, root))
