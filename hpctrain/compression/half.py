"""Half precision on the wire (fp16, bf16): numbers of 16 bits, summed in 32."""

from __future__ import annotations

import torch

from hpctrain.compression.compressor import Collectives, Compressor, Exchange, Flat, Options
from hpctrain.errors import Error


class Half(Compressor):
    """Rounds to 16 bits once before the sum and once after it, and sums in float32.

    A reduce-scatter and an all-gather, as a ring all-reduce does them, with 16 bits in place of 32
    on both legs: each rank is given everybody's 16 bits of its n-th part (an all-to-all), sums them
    in the order of ranks, and gives the rounded mean to all, itself included. So replicas have the
    same bits, and a rank sends 2 (n - 1) / n times two bytes a value, half of what float32 takes.
    float64 is summed in float64. What float16 cannot hold, above 65504, becomes infinite and is
    seen; below 6e-8 it becomes zero.
    """

    dtype: torch.dtype

    @classmethod
    def make(cls, argument: str, options: Options) -> Half:
        """Make one; nothing follows the name.

        Args:
            argument: Must be empty.
            options: Make no difference.
        """
        if argument:
            raise Error(
                f"compression '{cls.name}:{argument}': nothing follows '{cls.name}'.",
                hint=f"use {cls.name}.",
            )
        return cls()

    def _average(self, flat: Flat, world: Collectives) -> Exchange:
        values, size = flat.values, world.size
        part = -(-values.numel() // size)
        mine = torch.zeros(size * part, dtype=self.dtype, device=values.device)
        mine[: values.numel()] = values
        self.sent_bytes += (size - 1) * mine.nbytes
        found = yield world.start_all_to_all(_bits(mine), f"{flat.name}.scatter")
        total = torch.zeros(part, dtype=values.dtype, device=values.device)
        for row in found.view(self.dtype).view(size, part):
            total += row
        mean = total.div_(size).to(self.dtype)
        found = yield self._gather(_bits(mean), f"{flat.name}.gather", world)
        values.copy_(found.view(self.dtype)[: values.numel()])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same bits as a type that engines know; nobody calculates with them."""
    return tensor.view(torch.float16)


class Fp16(Half):
    """IEEE half precision: 11 bits of precision, from 6e-8 to 65504."""

    name = "fp16"
    dtype = torch.float16


class Bf16(Half):
    """bfloat16: 8 bits of precision, the range of float32."""

    name = "bf16"
    dtype = torch.bfloat16
