"""Quantization to eight bits a value."""

from __future__ import annotations

from hpctrain.compression.codec import Codec, make_codec
from hpctrain.compression.compressor import Options
from hpctrain.compression.gathered import Gathered
from hpctrain.errors import Error


class Int8(Gathered):
    """Blocks of 256 values, each by a scale of its own: 1.016 bytes a value, sent n - 1 times."""

    name = "int8"
    takes = frozenset({"feedback"})

    @classmethod
    def make(cls, argument: str, options: Options) -> Int8:
        """Make one; nothing follows the name.

        Args:
            argument: Must be empty.
            options: Their ``feedback`` counts.
        """
        if argument:
            raise Error(f"compression 'int8:{argument}': nothing follows 'int8'.", hint="use int8.")
        return cls(feedback=options.feedback)

    def _codec(self) -> Codec:
        codec = make_codec("int8")
        assert codec is not None
        return codec
