"""How replicas agree on parameters: the strategies there are, by name."""

from __future__ import annotations

import inspect

from hpctrain.config import ElasticConfig, HorovodConfig, PsConfig, Section
from hpctrain.errors import Error
from hpctrain.registry import Registry
from hpctrain.strategies.base import Strategy
from hpctrain.world.logs import logger
from hpctrain.world.world import World

LOG = logger(__name__)

STRATEGIES = Registry(
    "strategy",
    "hpctrain.strategies",
    {
        "single": "hpctrain.strategies.single:Single",
        "horovod": "hpctrain.strategies.horovod:Horovod",
        "ps": "hpctrain.strategies.parameter_server:ParameterServer",
        "sharded": "hpctrain.strategies.sharded:Sharded",
        "averaging": "hpctrain.strategies.averaging:Averaging",
        "mesh": "hpctrain.strategies.mesh:Mesh",
    },
)


def strategy_class(name: str) -> type[Strategy]:
    """Return the strategy of a name, or at ``package.module:Class``.

    Args:
        name: One of ``STRATEGIES.names()``, or a place.

    Raises:
        Error: There is none, or what is there is no strategy.

    Example:
        >>> strategy_class("horovd")
        Traceback (most recent call last):
        hpctrain.errors.Error: there is no strategy 'horovd'. HINT: did you mean 'horovod'? ...
        >>> strategy_class("single").__name__
        'Single'
    """
    if name == "ps":
        from hpctrain import ps as _ps  # noqa: F401 - it sets what MPI reads at its start
        from hpctrain.horovod_build import mpi

        mpi.require()
    found = STRATEGIES.get(name)
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise Error(f"'{name}' is no strategy.", hint="derive it from hpctrain.Strategy.")
    if lacking := [a for a in ("name",) if not hasattr(found, a)] + sorted(
        found.__abstractmethods__
    ):
        raise Error(f"strategy '{name}' lacks {', '.join(lacking)}.", hint="give its class them.")
    return found


def summaries() -> dict[str, str]:
    """Return what each strategy is, in a line, by name; or why it cannot be had here.

    Example:
        >>> summaries()["single"]
        'One process: clipping alone.'
    """
    found = {}
    for name in STRATEGIES.names():
        try:
            text = inspect.getdoc(strategy_class(name)) or ""
        except Error as error:
            text = str(error)
        found[name] = text.splitlines()[0] if text else ""
    return found


def strategy(
    name: str,
    world: World,
    *,
    config: Section | None = None,
    horovod: HorovodConfig | None = None,
    ps: PsConfig | None = None,
    elastic: ElasticConfig | None = None,
    timeout_seconds: float = 600.0,
) -> Strategy:
    """Connect the world by the strategy of that name, and return the strategy.

    Args:
        name: A strategy's name, ``package.module:Class``, or ``auto``: horovod on several ranks,
            else single.
        world: From :func:`hpctrain.init`.
        config: Knobs of the strategy, of its class ``Config``.
        horovod: Knobs of ``horovod``.
        ps: Knobs of ``ps``.
        elastic: Whether to outlive losses, with strategies on Horovod that can.
        timeout_seconds: Longest wait for another rank, in seconds.

    Raises:
        Error: No such strategy, its engine is not installed, or the world is not what was launched.

    Example:
        >>> import hpctrain
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = strategy("single", hpctrain.init()).wrap(model, optimizer, clip_norm=1.0)
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> optimizer.step()
    """
    if name == "auto":
        name = "horovod" if world.size > 1 else "single"
    own = {"horovod": horovod, "ps": ps}.get(name)
    made = strategy_class(name)(
        world, config or own, elastic=elastic, timeout_seconds=timeout_seconds
    )
    LOG.debug("strategy %s on %s", made.name, world)
    return made
