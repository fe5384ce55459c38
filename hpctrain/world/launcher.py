"""Detect the launcher: rank and size from environment variables, without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A process's place among those its launcher started.

    Attributes:
        name: ``hpctrain launch``, ``horovodrun``, ``mpirun``, ``mpiexec``, ``jsrun``,
            ``flux run``, ``srun`` or ``alone``.
        rank: This process, 0 to ``size - 1``.
        size: How many processes the launcher started.
        local_rank: This process among those of its host.
        local_size: How many processes run on this host.
    """

    name: str
    rank: int
    size: int
    local_rank: int
    local_size: int


ALONE = Launch("alone", rank=0, size=1, local_rank=0, local_size=1)

_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID PMI_LOCAL_RANK", "MPI_LOCALNRANKS PMI_LOCAL_SIZE")
# Launcher, and its variables for rank, size, local rank, local size; of several the first that is
# set. The first launcher that has rank and size wins: those further down are set by others, too, as
# PMI's are, and under mpirun inside a Slurm job SLURM_PROCID is mpirun's own.
_CONVENTIONS = (
    (
        "hpctrain launch",
        ("HPCTRAIN_RANK", "HPCTRAIN_SIZE", "HPCTRAIN_LOCAL_RANK", "HPCTRAIN_LOCAL_SIZE"),
    ),
    (
        "horovodrun",
        ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    ),
    (
        "mpirun",  # Open MPI
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
    ),
    (
        "mpirun",  # MVAPICH 2, and 3
        (
            "MV2_COMM_WORLD_RANK MVP_COMM_WORLD_RANK",
            "MV2_COMM_WORLD_SIZE MVP_COMM_WORLD_SIZE",
            "MV2_COMM_WORLD_LOCAL_RANK MVP_COMM_WORLD_LOCAL_RANK",
            "MV2_COMM_WORLD_LOCAL_SIZE MVP_COMM_WORLD_LOCAL_SIZE",
        ),
    ),
    ("mpiexec", ("PALS_RANKID", "PMI_SIZE PALS_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE "
                 "PMI_LOCAL_SIZE")),  # of Cray PALS
    (
        "jsrun",
        (
            "JSM_NAMESPACE_RANK",
            "JSM_NAMESPACE_SIZE",
            "JSM_NAMESPACE_LOCAL_RANK",
            "JSM_NAMESPACE_LOCAL_SIZE",
        ),
    ),
    ("flux run", ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "")),
    ("mpirun", _PMI),  # MPICH's, Intel's, Cray's
)  # fmt: skip


def detect(environment: Mapping[str, str] = os.environ) -> Launch:
    """Find out who started this process.

    Precedence: that of ``_CONVENTIONS``, then Slurm's. Slurm's count only inside a step
    (``SLURM_STEP_ID``), because the batch shell has ``SLURM_PROCID=0`` too.

    Example:
        >>> detect({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4"}).size
        4
    """
    in_step = _slurm(environment) if "SLURM_STEP_ID" in environment else None
    for name, variables in _CONVENTIONS:
        if in_step is not None and variables is _PMI and "MPI_LOCALRANKID" not in environment:
            continue  # srun --mpi=pmi2 sets PMI_RANK, but srun it is
        rank, size, local_rank, local_size = (_number(environment, each) for each in variables)
        if rank is None or size is None:
            continue
        if local_size is None and (nodes := _number(environment, "FLUX_JOB_NNODES")):
            local_size = -(-size // nodes)
        return Launch(
            name,
            rank,
            size,
            rank if local_rank is None else local_rank,
            size if local_size is None else local_size,
        )
    return in_step or ALONE


def _number(environment: Mapping[str, str], names: str) -> int | None:
    """Return the first of some variables that is a number."""
    values = (environment.get(name, "") for name in names.split())
    return next((int(value) for value in values if value.isdigit()), None)


def _slurm(environment: Mapping[str, str]) -> Launch | None:
    rank = environment.get("PMIX_RANK") or environment.get("SLURM_PROCID", "")
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "")
    if not rank.isdigit() or not size.isdigit():
        return None
    per_node = tasks_per_node(
        environment.get("SLURM_STEP_TASKS_PER_NODE")
        or environment.get("SLURM_TASKS_PER_NODE", size)
    )
    node = int(environment.get("SLURM_NODEID", "0"))
    local_size = per_node[node] if node < len(per_node) else int(size)
    return Launch(
        "srun", int(rank), int(size), int(environment.get("SLURM_LOCALID", "0")), local_size
    )


def tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's run-length form of tasks per node.

    Example:
        >>> tasks_per_node("2(x2),1")
        [2, 2, 1]
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    return counts
