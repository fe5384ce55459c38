"""Consistency modes: when a push is applied, and when a worker may go on.

A mode is one class in one file: see :class:`hpctrain.ps.consistency.base.Consistency`. It is found
by name (hpctrain's own, or an entry point of the group ``hpctrain.consistency``), or as
``package.module:Class``. An argument follows after a colon: ``ssp:3``, ``package.module:Class:3``.
"""

from __future__ import annotations

from hpctrain.config import PsConfig
from hpctrain.errors import Error, nearest
from hpctrain.ps.consistency.base import Consistency
from hpctrain.registry import Registry

MODES = Registry(
    "consistency",
    "hpctrain.consistency",
    {
        "sync": "hpctrain.ps.consistency.sync:Sync",
        "ssp": "hpctrain.ps.consistency.ssp:BoundedStaleness",
        "async": "hpctrain.ps.consistency.asynchronous:Asynchronous",
        "backup": "hpctrain.ps.consistency.backup:BackupWorkers",
    },
)


def consistency_of(config: PsConfig) -> Consistency:
    """Return the consistency that a parameter server is configured with.

    Raises:
        Error: There is no such consistency.
    """
    every = config.pull_every if isinstance(config.pull_every, list) else [config.pull_every]
    return parse(config.consistency, fresh=max(every) == 1)


def parse(text: str, *, fresh: bool = True) -> Consistency:
    """Return the consistency of that name, with the argument after the name's colon.

    Args:
        text: ``sync``, ``async``, ``ssp:S`` (workers at most S clocks ahead of the slowest),
            ``backup:B`` (B stragglers are not waited for), the name that an installed package
            declares, or ``package.module:Class``; these too with ``:ARGUMENT`` where they have one.
        fresh: Whether workers pull new weights for every step.

    Raises:
        Error: There is no such consistency, or not with such an argument.

    Example:
        >>> parse("ssp:3").staleness
        3
        >>> parse("ssp").staleness
        Traceback (most recent call last):
        hpctrain.errors.Error: there is no consistency 'ssp'. HINT: did you mean 'ssp:3'?
    """
    name, _, argument = text.partition(":")
    if name not in MODES.names():
        attribute, _, rest = argument.partition(":")
        if not attribute.isidentifier():
            raise Error(f"there is no consistency '{text}'.", hint=nearest(text, _examples()))
        name, argument = f"{name}:{attribute}", rest
    mode = MODES.get(name)
    if not (isinstance(mode, type) and issubclass(mode, Consistency)):
        raise Error(
            f"consistency '{text}' is no consistency mode.",
            hint="name a subclass of hpctrain.ps.consistency.base.Consistency.",
        )
    return mode(argument, fresh=fresh)


def relaxed() -> list[str]:
    """Return an example of each mode that trades exactness for time, as users would type it."""
    modes = [MODES.get(name) for name in MODES.names()]
    return [mode.example for mode in modes if mode.advised]


def _examples() -> list[str]:
    return [MODES.get(name).example for name in MODES.names()]
