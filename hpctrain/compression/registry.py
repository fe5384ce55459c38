"""Compressors by name."""

from __future__ import annotations

from hpctrain.compression.compressor import Compressor, Options, refuse_options
from hpctrain.compression.dense import Dense
from hpctrain.compression.half import Bf16, Fp16
from hpctrain.compression.int8 import Int8
from hpctrain.compression.powersgd import PowerSgd
from hpctrain.compression.topk import TopK
from hpctrain.errors import Error, nearest

COMPRESSORS: dict[str, type[Compressor]] = {
    kind.name: kind for kind in (Dense, Fp16, Bf16, Int8, TopK, PowerSgd)
}


def make_compressor(spec: str, options: Options | None = None) -> Compressor:
    """Make the compressor of that name.

    Args:
        spec: ``none``, ``fp16``, ``bf16``, ``int8``, ``topk:`` and the fraction of the values that
            is sent, or ``powersgd:`` and the rank.
        options: Besides the name; else all at their defaults.

    Raises:
        Error: There is none of that name, or an option means nothing to it.
    """
    name, _, argument = spec.partition(":")
    kind = COMPRESSORS.get(name)
    if kind is None:
        known = [*COMPRESSORS, "topk:0.01", "powersgd:4"]
        raise Error(f"there is no compression '{spec}'.", hint=nearest(spec, known))
    options = options or Options()
    refuse_options(spec, kind.takes, options)
    return kind.make(argument, options)
