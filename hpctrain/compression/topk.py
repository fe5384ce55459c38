"""Sparsification: of a gradient the largest values alone."""

from __future__ import annotations

import torch

from hpctrain.compression.codec import Codec, make_codec
from hpctrain.compression.compressor import Flat, Options
from hpctrain.compression.gathered import Gathered, decoded
from hpctrain.compression.memory import Memory
from hpctrain.errors import Error

_WARMUP_START = 0.25
"""Of the values, sent in the first step of a warm-up."""


class TopK(Gathered):
    """Sends of each flat the values that are largest without their sign, and where they are.

    Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017. A warm-up
    begins with a fourth of the values, and sends fewer by the same factor in each step. Momentum
    correction keeps the momentum by rank, before values are chosen: u <- m u + g, v <- v + u; the
    largest of v are sent, and both are zero there from then on. Both are of Lin et al., "Deep
    Gradient Compression", ICLR 2018. The optimizer has no momentum of its own then.

    Args:
        fraction: Of the values, that is sent.
        options: Feedback, warm-up and momentum.
    """

    name = "topk"
    takes = frozenset({"feedback", "warmup_steps", "momentum"})

    def __init__(self, fraction: float, options: Options) -> None:
        super().__init__(feedback=options.feedback)
        self.fraction = fraction
        self.warmup_steps = options.warmup_steps
        self.momentum = options.momentum
        if self.momentum:
            self.memories["momentum"] = Memory()

    @classmethod
    def make(cls, argument: str, options: Options) -> TopK:
        """Make a compressor of the fraction that follows the name.

        Args:
            argument: The fraction of values that is sent, above 0 and up to 1.
            options: Error feedback, and momentum correction.

        Raises:
            Error: The argument is no fraction, or there is momentum without feedback.
        """
        make_codec(f"topk:{argument}")
        if options.momentum and not options.feedback:
            raise Error(
                "horovod.compression_momentum needs compression_feedback.",
                hint="momentum correction is about what was left out: set both, or neither.",
            )
        return cls(float(argument), options)

    def _codec(self) -> Codec:
        fraction = self.fraction
        if self.steps < self.warmup_steps and fraction < _WARMUP_START:
            fallen = (fraction / _WARMUP_START) ** (self.steps / self.warmup_steps)
            fraction = _WARMUP_START * fallen
        codec = make_codec(f"topk:{fraction}")
        assert codec is not None
        return codec

    def _encode(self, codec: Codec, flat: Flat, values: torch.Tensor, out: torch.Tensor) -> None:
        if not self.momentum:
            super()._encode(codec, flat, values, out)
            return
        residual, momentum = self.memories["residual"], self.memories["momentum"]
        if momentum.began(flat.name):
            raise Error(
                "gradients are averaged twice in a step, which momentum correction cannot be.",
                hint="run all but the last pass of a step within `with optimizer.no_sync():`.",
            )
        before = momentum.now(flat.name, values, flat.pieces)
        u = torch.add(values, before, alpha=self.momentum, out=momentum.next(flat.name))
        before = residual.now(flat.name, values, flat.pieces)
        v = torch.add(before, u, out=residual.next(flat.name))
        codec.encode(v, out)
        sent = decoded(codec, out, v)
        v.sub_(sent)
        u.masked_fill_(sent != 0, 0.0)
