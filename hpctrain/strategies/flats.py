"""Lay tensors of any types end to end, in a type that can be summed over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Flats:
    """A layout of tensors in flat ones, one for each type and device.

    Elements are in C's order, complex ones as pairs. Flats are float64 where the tensors are of 64
    bits, else float32: Horovod cannot sum bfloat16, and the mean of float16 would be rounded twice.

    Args:
        tensors: Floating-point or complex, dense, of any strides.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        # Complex ones apart: pairs would else begin at odd places.
        groups: dict[tuple[torch.dtype, torch.device, bool], list[int]] = {}
        for number, tensor in enumerate(self._tensors):
            double = tensor.dtype in (torch.float64, torch.complex128)
            kind = torch.float64 if double else torch.float32
            groups.setdefault((kind, tensor.device, tensor.is_complex()), []).append(number)
        self._groups = list(groups.items())

    def read(self) -> list[torch.Tensor]:
        """Return copies of the tensors' values."""
        return [
            torch.cat([_real(self._tensors[n]).reshape(-1).to(kind) for n in members])
            for (kind, _, _), members in self._groups
        ]

    def write(self, flats: Sequence[torch.Tensor]) -> None:
        """Overwrite the tensors with the values of flats.

        Args:
            flats: As :meth:`read` returns them.
        """
        for tensor, value in zip(self._tensors, self.split(flats), strict=True):
            tensor.copy_(value)

    def split(self, flats: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return each tensor's part of the flats, a view of its shape, in the tensors' order.

        Args:
            flats: As :meth:`read` returns them.
        """
        parts: dict[int, torch.Tensor] = {}
        for (_, members), flat in zip(self._groups, flats, strict=True):
            shapes = [_real(self._tensors[n]).shape for n in members]
            pieces = flat.split([shape.numel() for shape in shapes])
            for n, piece, shape in zip(members, pieces, shapes, strict=True):
                shaped = piece.view(shape)
                parts[n] = (
                    torch.view_as_complex(shaped) if self._tensors[n].is_complex() else shaped
                )
        return [parts[n] for n in range(len(self._tensors))]

    def fill(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return flats of other values.

        Args:
            values: Of the tensors' shapes, in their order.
        """
        flats = [torch.empty_like(flat) for flat in self.read()]
        for part, value in zip(self.split(flats), values, strict=True):
            part.copy_(value)
        return flats

    def each(self, numbers: Sequence[float]) -> list[float | torch.Tensor]:
        """Return for each flat a number of its elements, or the one that all of them have.

        Args:
            numbers: One a tensor.
        """
        found: list[float | torch.Tensor] = []
        for (kind, device, _), members in self._groups:
            if len({numbers[n] for n in members}) == 1:
                found.append(numbers[members[0]])
                continue
            sizes = [_real(self._tensors[n]).numel() for n in members]
            given = torch.tensor([numbers[n] for n in members], dtype=kind, device=device)
            found.append(given.repeat_interleave(torch.tensor(sizes, device=device)))
        return found


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
