"""What the launcher told this process: rank and size from environment variables, without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A process's place among those its launcher started.

    Attributes:
        name: ``hpctrain launch``, ``horovodrun``, ``mpirun``, ``srun`` or ``alone``.
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

# Launcher, and its variables for rank, size, local rank, local size. The first set that is whole
# wins: under mpirun inside a Slurm job SLURM_PROCID is mpirun's own, and wrong for its children.
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
        "mpirun",
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
    ),
    ("mpirun", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
)


def detect(environment: Mapping[str, str] = os.environ) -> Launch:
    """Find out who started this process.

    Precedence: those of `hpctrain launch`, Horovod's, Open MPI's, PMI's, Slurm's. Slurm's count
    only inside a step (``SLURM_STEP_ID``), because the batch shell has ``SLURM_PROCID=0`` too.
    """
    if "SLURM_STEP_ID" in environment and "OMPI_COMM_WORLD_RANK" not in environment:
        in_step = _slurm(environment)
    else:
        in_step = None
    for name, variables in _CONVENTIONS:
        if in_step is not None and "PMI_RANK" in variables:
            continue  # srun --mpi=pmi2 sets PMI_RANK, but srun it is
        values = [environment.get(variable, "") for variable in variables]
        if values[0].isdigit() and values[1].isdigit():
            rank, size = int(values[0]), int(values[1])
            local_rank = int(values[2]) if values[2].isdigit() else rank
            local_size = int(values[3]) if values[3].isdigit() else size
            return Launch(name, rank, size, local_rank, local_size)
    return in_step or ALONE


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
    """Slurm's run-length form of tasks per node: ``2(x2),1`` is ``[2, 2, 1]``."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    return counts
