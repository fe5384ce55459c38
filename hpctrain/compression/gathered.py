"""Gathered compression, for encodings that cannot be added up: each rank sums everybody's."""

from __future__ import annotations

import torch

from hpctrain.compression.codec import Codec
from hpctrain.compression.compressor import Collectives, Compressor, Exchange, Flat
from hpctrain.compression.memory import Memory

_ALIGNMENT = 8  # of an encoding, for its parts to be read as what they are


class Gathered(Compressor):
    """Sums encodings in the order of ranks, so that replicas have the same bits.

    A rank sends n - 1 encodings and decodes n. So against a ring all-reduce of the same values, an
    encoding of a part p of their bytes is less on the wire where p n < 2. What it leaves out is
    kept, and sent with later gradients (error feedback: Seide et al., Interspeech 2014; Karimireddy
    et al., ICML 2019). Encoding is done in host memory.

    Where a value of any rank is not finite, neither is the mean, which all ranks see alike; and all
    keep the residuals that they had.

    Args:
        feedback: Whether what was left out is sent later.
    """

    def __init__(self, *, feedback: bool) -> None:
        super().__init__()
        if feedback:
            self.memories["residual"] = Memory()

    def _codec(self) -> Codec:
        """How to encode at the present step: alike on all ranks."""
        raise NotImplementedError

    def _average(self, flat: Flat, world: Collectives) -> Exchange:
        codec = self._codec()
        values = flat.values.cpu()
        size = codec.capacity(values.numel(), values.itemsize)
        whole = -(-size // _ALIGNMENT) * _ALIGNMENT
        mine = torch.zeros(whole, dtype=torch.uint8)
        self._encode(codec, flat, values, mine[:size])
        found = yield self._gather(mine, flat.name, world)
        mean = torch.zeros_like(values)
        for row in found.view(world.size, whole):
            codec.add(row[:size], mean)
        mean.div_(world.size)
        if not bool(torch.isfinite(mean.sum())) and not bool(torch.isfinite(mean).all()):
            for memory in self.memories.values():
                memory.restore(flat.name, 0, values.numel())
        flat.values.copy_(mean)

    def _encode(self, codec: Codec, flat: Flat, values: torch.Tensor, out: torch.Tensor) -> None:
        """Encode values and the residual, and keep what that leaves out."""
        residual = self.memories.get("residual")
        if residual is None:
            codec.encode(values, out)
            return
        before = residual.now(flat.name, values, flat.pieces)
        wanted = torch.add(before, values, out=residual.next(flat.name))
        codec.encode(wanted, out)
        wanted.sub_(decoded(codec, out, wanted))


def decoded(codec: Codec, data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return what the other ranks make of an encoding.

    Args:
        codec: By which it was encoded.
        data: The encoding.
        like: A tensor of the gradient's shape and type.
    """
    out = torch.empty_like(like)
    codec.decode(data, out)
    return out
