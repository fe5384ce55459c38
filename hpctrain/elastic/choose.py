"""Choose the engine that outlives losses here, and say why."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Literal, NamedTuple

from hpctrain.elastic.driver_protocol import ADDRESS
from hpctrain.errors import Error
from hpctrain.process import loaded

Mode = Literal["off", "auto", "ulfm", "gloo", "restart"]


class Choice(NamedTuple):
    """An engine, and the reason.

    Attributes:
        mode: ``ulfm``, ``gloo``: the others go on in the same processes. ``restart``: the run ends,
            and is to be started again from its last checkpoint.
        why: In a line, and how the run grows again.
    """

    mode: Literal["off", "ulfm", "gloo", "restart"]
    why: str


def choose(mode: Mode, environment: Mapping[str, str] = os.environ) -> Choice:
    """Choose an engine by what the launcher told this rank.

    Args:
        mode: What is asked for; ``auto``: the best there is.
        environment: Of this process.

    Raises:
        Error: What is asked for cannot be had.
    """
    if ADDRESS in environment:
        if mode in ("auto", "gloo"):
            return Choice("gloo", "`hpctrain launch` started the ranks; new ones join as they come")
        raise Error(
            f"--elastic {mode}: `hpctrain launch` has Gloo alone.",
            hint="drop --elastic, or start the ranks by mpirun or srun.",
        )
    if mode == "off":
        return Choice("off", "")
    if mode == "restart":
        return Choice("restart", "as asked for")
    if mode == "gloo":
        raise Error(
            "--elastic gloo: nobody drives these ranks.",
            hint="start them by `hpctrain launch -np 4 -- hpctrain train ...`.",
        )
    lacking = _lacking(environment)
    if lacking is None:
        return Choice("ulfm", f"the launcher lets the others live; {_growing(environment)}")
    if mode == "ulfm":
        raise Error(f"--elastic ulfm: {lacking[0]}.", hint=lacking[1])
    return Choice("restart", f"{lacking[0]}; all nodes there are take part then")


def _growing(environment: Mapping[str, str]) -> str:
    """How a world that has shrunk grows again, with ULFM."""
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return "elastic.workers ranks are kept up by MPI spawn, where it is set"
    return "a node that comes back takes part when the job is started again"


def _lacking(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """What is missing for ULFM, and what to do about it; None: nothing."""
    if environment.get("HOROVOD_CONTROLLER", "mpi") != "mpi":
        return "horovodrun --gloo does without MPI", "use mpirun --with-ft ulfm."
    if "OMPI_COMM_WORLD_SIZE" in environment:
        if environment.get("OMPI_MCA_mpi_ft_enable", "0") in ("0", "false"):
            return (
                "mpirun ends all ranks when one dies",
                "start it as mpirun --with-ft ulfm (Open MPI 5).",
            )
        return None
    if "SLURM_STEP_ID" in environment:
        if "PMIX_RANK" not in environment:
            return "srun was started without --mpi=pmix", "use srun --mpi=pmix --no-kill."
        if loaded("hpctrain-notify") is None:
            return (
                "Slurm would cancel the step when a rank dies",
                "submit with `hpctrain submit --elastic`, which preloads what prevents that.",
            )
        return None
    return "the ranks were not started by mpirun or srun", "use mpirun --with-ft ulfm."


def set_parameters(environment: MutableMapping[str, str], hang_seconds: float) -> None:
    """Set what Open MPI reads when it starts; values that are there already are left alone.

    Args:
        environment: Of this process, before MPI starts.
        hang_seconds: Silence after which a process is lost.
    """
    settings = {
        "mpi_ft_enable": "1",
        # Heartbeats: a process that is stopped, or cut off, gives no other sign.
        "mpi_ft_detector": "1",
        "mpi_ft_detector_period": str(hang_seconds / 4),
        "mpi_ft_detector_timeout": str(hang_seconds),
        "mpi_ft_propagator_with_rbcast": "1",
        # What stands failures, as in Open MPI's own set of parameters for it, ft-mpi.
        "pml": "ob1",
        "btl": "self,sm,tcp",
        "coll": "^hcoll,portals4,han",
        "btl_base_warn_peer_error": "0",
    }
    for name, value in settings.items():
        environment.setdefault(f"OMPI_MCA_{name}", value)
