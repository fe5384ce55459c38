"""No compression: gradients are all-reduced as they are."""

from __future__ import annotations

import torch

from hpctrain.compression.compressor import Collectives, Compressor, Exchange, Flat, Options
from hpctrain.errors import Error


class Dense(Compressor):
    """Sends gradients as they are: 2 (n - 1) / n of their bytes a rank."""

    name = "none"
    dtypes = (torch.float16, torch.float32, torch.float64)
    staged = False

    @classmethod
    def make(cls, argument: str, options: Options) -> Dense:
        """Make one; nothing follows the name.

        Args:
            argument: Must be empty.
            options: Make no difference.
        """
        if argument:
            raise Error(f"compression 'none:{argument}': nothing follows 'none'.", hint="use none.")
        return cls()

    def _average(self, flat: Flat, world: Collectives) -> Exchange:
        yield self._all_reduce(flat.values, flat.name, world)
