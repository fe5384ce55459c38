import pytest

from hpctrain.world.launcher import ALONE, Launch, detect, tasks_per_node
from hpctrain.world.world import threads_per_rank

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM_STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        (OPEN_MPI, Launch("mpirun", 1, 4, 1, 2)),
        (
            {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
            Launch("mpirun", 2, 3, 0, 1),
        ),
        (
            # horovodrun over Gloo on Slurm: the driver's SLURM_* leak to every rank.
            {
                **SLURM_STEP,
                "HOROVOD_RANK": "1",
                "HOROVOD_SIZE": "2",
                "HOROVOD_LOCAL_RANK": "0",
                "HOROVOD_LOCAL_SIZE": "1",
            },
            Launch("horovodrun", 1, 2, 0, 1),
        ),
        # mpirun inside a Slurm job: SLURM_PROCID is that of mpirun's daemon.
        ({**SLURM_STEP, **OPEN_MPI}, Launch("mpirun", 1, 4, 1, 2)),
        (SLURM_STEP, Launch("srun", 4, 5, 0, 1)),
        ({**SLURM_STEP, "PMIX_RANK": "4"}, Launch("srun", 4, 5, 0, 1)),
        ({**SLURM_STEP, "PMI_RANK": "4", "PMI_SIZE": "5"}, Launch("srun", 4, 5, 0, 1)),
        # Rank 5 of 8 on the second of two hosts, by launchers that set PMI's variables, too.
        *(
            ({"PMI_RANK": "5", "PMI_SIZE": "8", **variables}, Launch(name, 5, 8, 1, 4))
            for name, variables in (
                (
                    "mpiexec",
                    {"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PMI_LOCAL_SIZE": "4"},
                ),
                (
                    "mpirun",
                    {
                        "MV2_COMM_WORLD_RANK": "5",
                        "MV2_COMM_WORLD_SIZE": "8",
                        "MV2_COMM_WORLD_LOCAL_RANK": "1",
                        "MV2_COMM_WORLD_LOCAL_SIZE": "4",
                    },
                ),
                (
                    "flux run",
                    {
                        "FLUX_TASK_RANK": "5",
                        "FLUX_JOB_SIZE": "8",
                        "FLUX_TASK_LOCAL_ID": "1",
                        "FLUX_JOB_NNODES": "2",
                    },
                ),
                ("mpirun", {"PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"}),
                # MPICH's mpirun starts its daemons by srun.
                ("mpirun", {**SLURM_STEP, "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}),
            )
        ),
        # The batch shell is no rank.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "5"}, ALONE),
    ],
)
def test_detect(environment, expected):
    assert detect(environment) == expected


def test_tasks_per_node():
    assert tasks_per_node("2(x2),1") == [2, 2, 1]
    assert tasks_per_node("4") == [4]
    assert tasks_per_node("1,3(x3)") == [1, 3, 3, 3]


@pytest.mark.parametrize(
    ("launch", "allowed", "present", "threads"),
    [
        (ALONE, 8, 8, 8),
        (Launch("mpirun", 0, 2, 0, 2), 8, 8, 4),
        (Launch("mpirun", 0, 2, 0, 2), 1, 8, 1),  # bound to a core of its own
        (Launch("mpirun", 0, 8, 0, 8), 2, 2, 1),
    ],
)
def test_threads(launch, allowed, present, threads):
    assert threads_per_rank(launch, allowed, present) == threads
