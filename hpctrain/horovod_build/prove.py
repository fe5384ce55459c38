"""Prove Horovod on each rank of a small launch: all-reduce something, and check the outcome."""

from __future__ import annotations

import sys

import horovod.torch as hvd
import mpi4py
import torch

from hpctrain.errors import Error
from hpctrain.horovod_build import mpi
from hpctrain.world.launcher import detect


def main() -> int:
    """Return exit code 0 where Horovod's world is the launcher's and its sums are right."""
    launch = detect()
    hvd.init()
    if hvd.size() != launch.size:
        print(f"{launch.name} started {launch.size} ranks, but Horovod sees {hvd.size()}")
        return 2
    total = hvd.allreduce(torch.tensor([float(hvd.rank() + 1)] * 3), op=hvd.Sum, name="prove")
    expected = hvd.size() * (hvd.size() + 1) / 2
    if total.tolist() != [expected] * 3:
        print(f"rank {hvd.rank()}: the sum is {total.tolist()}, not {expected}")
        return 2
    if launch.name == "mpirun":
        mpi4py.rc.initialize = False  # the trial is whether it loads Horovod's MPI
        try:
            mpi.require()
        except Error as error:
            print(error)
            return 2
    print(f"all-reduce over {hvd.size()} ranks is right")
    hvd.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
