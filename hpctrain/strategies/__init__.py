"""How replicas agree on parameters."""

from __future__ import annotations

from hpctrain.config import ElasticConfig, HorovodConfig, PsConfig
from hpctrain.errors import Error, nearest
from hpctrain.strategies.base import Strategy
from hpctrain.world.world import World

NAMES = ("single", "horovod", "ps")


def strategy(
    name: str,
    world: World,
    *,
    horovod: HorovodConfig | None = None,
    ps: PsConfig | None = None,
    elastic: ElasticConfig | None = None,
    timeout_seconds: float = 600.0,
) -> Strategy:
    """Connect the world by the strategy of that name.

    Args:
        name: ``single``, ``horovod``, ``ps``, or ``auto``: horovod on several ranks, else single.
        world: From :func:`hpctrain.init`.
        horovod: Knobs of the Horovod strategy.
        ps: Knobs of the parameter server.
        elastic: Whether to outlive losses, with horovod.
        timeout_seconds: Longest wait for another rank.

    Raises:
        Error: No such strategy, its engine is not installed, or the world is not what was launched.
    """
    if name == "auto":
        name = "horovod" if world.size > 1 else "single"
    if name == "single":
        from hpctrain.strategies.single import Single

        return Single(world)
    if name == "horovod":
        from hpctrain.strategies.horovod import Horovod

        return Horovod(world, horovod, timeout_seconds, elastic)
    if name == "ps":
        from hpctrain import ps as _ps  # noqa: F401 - it sets what MPI reads at its start
        from hpctrain.horovod_build import mpi

        mpi.require()
        from hpctrain.strategies.parameter_server import ParameterServer

        return ParameterServer(world, ps, timeout_seconds)
    raise Error(f"there is no strategy '{name}'.", hint=nearest(name, NAMES))
