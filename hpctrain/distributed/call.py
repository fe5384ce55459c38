"""One call of a process group on its way to MPI: its memory, its requests, what is left to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mpi4py import MPI

from hpctrain.distributed.transport import wide


class Call:
    """Gathers the requests of a call, and what must live and be done until they have ended."""

    def __init__(self) -> None:
        self.requests: list[MPI.Request] = []
        self.kept: list[Any] = []
        self._finish: list[Callable[[], None]] = []

    def begin(self, request: MPI.Request) -> None:
        """Take a started request of MPI."""
        self.requests.append(request)

    def afterwards(self, action: Callable[[], None]) -> None:
        """Run an action when all requests have ended, after those given before."""
        self._finish.append(action)

    def finish(self) -> None:
        """Do what was left for the end."""
        with torch.no_grad():
            for action in self._finish:
                action()

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor's data, contiguous, to be read by MPI."""
        data = tensor.detach().contiguous()
        self.kept.append(data)
        return data

    def joined(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensors' data end to end, in that type, to be read by MPI.

        Args:
            tensors: Of any shapes.
            dtype: Of what is returned.
        """
        return self.source(torch.cat([each.detach().reshape(-1).to(dtype) for each in tensors]))

    def target(self, tensor: torch.Tensor, *, reads: bool = False) -> torch.Tensor:
        """Return memory that MPI may write, and have it copied back where it is not the tensor's.

        Args:
            tensor: What is to hold the outcome.
            reads: Whether MPI also reads it.
        """
        data = tensor.detach()
        if not data.is_contiguous():
            data = data.contiguous() if reads else torch.empty(data.shape, dtype=data.dtype)
        return self._copied_back(data, tensor, 1)

    def total(self, tensor: torch.Tensor, divisor: int = 1, *, reads: bool = True) -> torch.Tensor:
        """Return memory for a sum, of the type that it is made in; the tensor gets it in the end.

        Args:
            tensor: What is to hold the outcome.
            divisor: What the sum is divided by in the end.
            reads: Whether the tensor's own values are part of the sum.
        """
        dtype = wide(tensor.dtype)
        data = tensor.detach()
        if not data.is_contiguous() or data.dtype != dtype:
            fresh = torch.empty(data.shape, dtype=dtype)
            data = fresh.copy_(data) if reads else fresh
        return self._copied_back(data, tensor, divisor)

    def parts(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return memory for all of the tensors end to end; each gets its part in the end."""
        sizes = [each.numel() for each in tensors]
        flat = torch.empty(sum(sizes), dtype=tensors[0].dtype)

        def divide() -> None:
            for each, part in zip(tensors, flat.split(sizes), strict=True):
                each.detach().copy_(part.view(each.shape))

        self.kept.append(flat)
        self.afterwards(divide)
        return flat

    def _copied_back(self, data: torch.Tensor, tensor: torch.Tensor, divisor: int) -> torch.Tensor:
        def conclude() -> None:
            if divisor > 1:
                data.div_(divisor)
            if data.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(data)

        self.kept.append(data)
        self.afterwards(conclude)
        return data
