"""The commands `hpctrain horovod ...`."""

from __future__ import annotations

import sys

import click


@click.group("horovod")
def group() -> None:
    """Build Horovod for the torch and MPI installed here, and check it."""


@group.command("build")
@click.option("--gpu", is_flag=True, help="Build the NCCL operations (needs CUDA and NCCL).")
@click.option("--rebuild", is_flag=True, help="Build even where the cache holds this very wheel.")
def build_(gpu: bool, rebuild: bool) -> None:
    """Fetch Horovod 0.28.1, patch it, build it, install it, and prove it on 2 ranks.

    \b
    MPI is the one whose mpicxx comes first on PATH. For GPUs, CUDA is taken from CUDA_HOME or
    nvcc's place, and NCCL from NCCL_HOME or the nvidia wheels that came with torch.
    Wheels are cached by all they were built from (HPCTRAIN_CACHE moves the cache).
    """
    from hpctrain.horovod_build.build import build

    build(gpu=gpu, rebuild=rebuild)


@group.command("run", context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def run_(command: tuple[str, ...]) -> None:
    """Run horovodrun COMMAND in a Slurm job: on all of its nodes, through srun instead of ssh."""
    from hpctrain.slurm.horovodrun import become

    become(list(command))


@group.command("check")
def check_() -> None:
    """Say what is built into the installed Horovod, against which libraries, and what is wrong."""
    from hpctrain.horovod_build.check import check
    from hpctrain.world.check_result import report

    sys.exit(report(check()))
