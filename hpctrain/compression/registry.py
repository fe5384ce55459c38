"""Compressors by name, and how to add one."""

from __future__ import annotations

from hpctrain.compression.compressor import Compressor, Options, refuse_options
from hpctrain.errors import Error
from hpctrain.registry import Registry

_ROOM = "hpctrain.compression"

COMPRESSORS = Registry(
    "compression",
    "hpctrain.compressors",
    {
        "none": f"{_ROOM}.dense:Dense",
        "fp16": f"{_ROOM}.half:Fp16",
        "bf16": f"{_ROOM}.half:Bf16",
        "int8": f"{_ROOM}.int8:Int8",
        "topk": f"{_ROOM}.topk:TopK",
        "powersgd": f"{_ROOM}.powersgd:PowerSgd",
    },
)
"""What ``horovod.compression`` may name."""


def make_compressor(spec: str, options: Options | None = None) -> Compressor:
    """Make the compressor of that name.

    Args:
        spec: ``none``, ``fp16``, ``bf16``, ``int8``, ``topk:`` and the fraction of the values that
            is sent, ``powersgd:`` and the rank; or a :class:`Compressor` of one's own, as
            ``package.module:Class`` and, if it takes one, ``:`` and an argument.
        options: Besides the name; else all at their defaults.

    Raises:
        Error: There is none of that name, or an option means nothing to it.

    Example:
        >>> make_compressor("powersgd:4").rank
        4
    """
    name, _, argument = spec.partition(":")
    if "." in name:
        kind, _, argument = argument.partition(":")
        name = f"{name}:{kind}"
    found = COMPRESSORS.get(name)
    if not (isinstance(found, type) and issubclass(found, Compressor)):
        raise Error(
            f"compression '{name}' is no Compressor.",
            hint="name a subclass of hpctrain.compression.compressor.Compressor.",
        )
    options = options or Options()
    refuse_options(spec, found.takes, options)
    return found.make(argument, options)
