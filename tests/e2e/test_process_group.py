"""A plain torch.distributed program over MPI, and what it hears when a rank hangs or dies."""

import sys

import pytest

from hpctrain.process import mpirun, run
from tests.waiting import SECONDS

PROGRAM = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
import hpctrain.distributed
from hpctrain.errors import PeerLost

fault, timeout = sys.argv[1], timedelta(seconds=float(sys.argv[2]))
dist.init_process_group("mpi4py", init_method="mpi://", timeout=timeout)
me = dist.get_rank()
for step in range(10):
    if step == 5 and me == 1:
        if fault == "hangs":
            time.sleep(1000)
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
    tensor = torch.ones(100_000)
    try:
        dist.all_reduce(tensor)
    except PeerLost as error:
        print(f"rank {me}, step {step}: {error}", flush=True)
        os._exit(3)
    assert tensor[0].item() == dist.get_world_size()
dist.destroy_process_group()
print(f"rank {me} ended well", flush=True)
"""


@pytest.fixture
def launch(tmp_path):
    def start(ranks, fault, *options, seconds=SECONDS):
        (tmp_path / "program.py").write_text(PROGRAM)
        program = ["program.py", fault, str(seconds)]
        command = [*mpirun(ranks), *options, sys.executable, *program]
        return run(command, timeout_seconds=SECONDS, cwd=tmp_path)

    return start


def test_a_program_needs_no_port_and_no_rendezvous(launch):
    result = launch(3, "none")
    assert result.returncode == 0, result.stdout
    assert sorted(line for line in result.stdout.splitlines() if "ended well" in line) == [
        f"rank {rank} ended well" for rank in range(3)
    ]


def test_a_rank_that_hangs_is_named(launch):
    result = launch(2, "hangs", seconds=10)
    assert result.returncode != 0
    assert "rank 0, step 5: rank 0 on" in result.stdout, result.stdout
    assert "all-reduce with ranks 1 did not end within 10 s. HINT:" in result.stdout


def test_a_rank_that_dies_is_noticed_by_all_others(launch):
    """With MPI's fault tolerance they learn it in that very step, and live."""
    result = launch(3, "dies", "--with-ft", "ulfm")
    if "unrecognized" in result.stdout or "not built with" in result.stdout:
        pytest.skip("this MPI has no fault tolerance")
    for rank in (0, 2):
        assert f"rank {rank}, step 5: rank {rank} on" in result.stdout, result.stdout
    assert "HINT: look for the first error of another rank." in result.stdout
