"""`hpctrain doctor`: what this machine has, what is wrong with it for training, and what to do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from hpctrain.elastic import selftest
from hpctrain.errors import Error
from hpctrain.horovod_build import mpi, toolchain
from hpctrain.horovod_build.check import check as check_horovod
from hpctrain.process import NO_MPI_HINT, cores, mpirun, run, which
from hpctrain.slurm.examine import examine as examine_site
from hpctrain.world.check_result import CheckResult, Level

LAUNCH_TIMEOUT_SECONDS = 90


def examine() -> list[CheckResult]:
    """Look at everything; nothing that goes wrong in one check stops the others."""
    checks: list[Callable[[], list[CheckResult]]] = [
        _versions,
        _cores,
        _mpi,
        _build,
        check_horovod,
        _launch_mpi,
        _launch_horovod,
        _elastic,
        _gpus,
        _hdf5,
        _shared_memory,
        _slurm,
        _site,
    ]
    findings: list[CheckResult] = []
    for one in checks:
        try:
            findings += one()
        except Error as error:
            name = one.__name__.strip("_").replace("_", " ")
            findings.append(CheckResult("problem", name, error.message, error.hint))
    return findings


def _versions() -> list[CheckResult]:
    packages = ("hpctrain", "torch", "numpy", "mpi4py", "h5py", "safetensors")
    versions = " ".join(f"{name} {metadata.version(name)}" for name in packages)
    return [CheckResult("ok", "versions", f"python {platform.python_version()} {versions}")]


def _cores() -> list[CheckResult]:
    allowed, present = cores(), os.cpu_count() or 1
    detail = f"{allowed} of {present} usable"
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) > allowed:
        return [
            CheckResult(
                "note",
                "cores",
                f"{detail}, but OMP_NUM_THREADS={threads}",
                "unset it: hpctrain divides a host's cores among its ranks.",
            )
        ]
    return [CheckResult("ok", "cores", detail)]


def _mpi() -> list[CheckResult]:
    program = which("mpirun")
    if program is None:
        return [CheckResult("problem", "MPI", "no mpirun on PATH", NO_MPI_HINT)]
    said = run([str(program), "--version"], timeout_seconds=30).stdout
    # MPICH's says no more than "HYDRA build details" in its first line.
    version = " ".join(" ".join(said.splitlines()[: 2 if "HYDRA" in said else 1]).split())
    findings = [CheckResult("ok", "MPI", f"{version or '?'} ({program})")]
    if which("mpicxx") is None:
        findings.append(
            CheckResult(
                "note",
                "mpicxx",
                "not on PATH, so Horovod cannot be built here",
                "load the MPI module's development part.",
            )
        )
    open_mpi = "Open MPI" in said
    if open_mpi and os.geteuid() == 0 and "OMPI_ALLOW_RUN_AS_ROOT" not in os.environ:
        findings.append(
            CheckResult(
                "note",
                "root",
                "Open MPI's mpirun refuses to run as root",
                "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.",
            )
        )
    return findings


def _build() -> list[CheckResult]:
    """Could Horovod be built here, for this torch and this MPI?"""
    if which("mpicxx") is None:
        return []  # said already
    try:
        built_from = toolchain.find(gpu=False).built_from
    except Error as error:
        level: Level = "problem" if toolchain.installed_version() is None else "note"
        return [CheckResult(level, "building Horovod", error.message, error.hint)]
    detail = f"C++{built_from['cxx_standard']}, {built_from['compiler']}, {built_from['cmake']}"
    return [CheckResult("ok", "building Horovod", detail)]


def _launch_mpi() -> list[CheckResult]:
    """Two real ranks with mpi4py: do they see each other?"""
    seen = mpi.of_mpi4py()
    what = "mpirun -np 2, mpi4py"
    if seen.size == 2:
        return [CheckResult("ok", what, "both ranks see a world of 2")]
    detail = seen.said
    if seen.size == 1:
        detail = f"each rank sees a world of its own: mpi4py uses {seen.library[:40]}"
    return [CheckResult("problem", what, detail, mpi.HINT)]


def _launch_horovod() -> list[CheckResult]:
    """Two real ranks with every controller: do Horovod and the launcher agree?"""
    from hpctrain.horovod_build import build

    if toolchain.installed_version() is None:
        return []
    findings = []
    for name, command in build.launches().items():
        result = run(command, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)
        what = f"Horovod over {name}, 2 ranks"
        if build.proved(result):
            findings.append(CheckResult("ok", what, "the all-reduce is right"))
        else:
            findings.append(
                CheckResult(
                    "problem",
                    what,
                    f"exit code {result.returncode}: {_last(result.stdout)}",
                    "if ranks say size 1, Horovod was built on another MPI than mpirun's: run "
                    "`hpctrain horovod build`.",
                )
            )
    return findings


def _elastic() -> list[CheckResult]:
    """What `--elastic auto` would choose here, under mpirun."""
    works, seen = selftest.works([*mpirun(2), "--with-ft", "ulfm"], os.environ)
    if works:
        return [CheckResult("ok", "elastic", f"ulfm, with mpirun --with-ft ulfm: {seen}")]
    return [
        CheckResult(
            "note",
            "elastic",
            f"restart: {seen}",
            "outliving lost ranks in place needs Open MPI 5, or `hpctrain launch`.",
        )
    ]


def _gpus() -> list[CheckResult]:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        detail = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, NCCL {nccl}"
        return [CheckResult("ok", "GPUs", detail)]
    if shutil.which("nvidia-smi"):
        return [
            CheckResult(
                "problem",
                "GPUs",
                f"nvidia-smi is here, but torch {torch.__version__} sees none",
                "install a CUDA build of torch that fits the driver.",
            )
        ]
    return [CheckResult("ok", "GPUs", "none; training runs on the CPU")]


def _hdf5() -> list[CheckResult]:
    """Can files here be opened while another process holds HDF5's lock on them?"""
    import h5py

    version = f"{h5py.version.hdf5_version}"
    with tempfile.NamedTemporaryFile(dir=Path.cwd(), suffix=".h5") as file:
        try:
            with h5py.File(file.name, "w"):
                pass
        except OSError as error:
            return [
                CheckResult(
                    "note",
                    "HDF5 locking",
                    f"{version}: this file system refuses locks ({error})",
                    "export HDF5_USE_FILE_LOCKING=FALSE where you write; reading here needs none.",
                )
            ]
    return [CheckResult("ok", "HDF5 locking", f"{version}: locks work here; reading takes none")]


def _shared_memory() -> list[CheckResult]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return [CheckResult("note", "shared memory", "no /dev/shm", "NCCL and MPI may be slow.")]
    free = shutil.disk_usage(folder).free
    if free < 2**28:
        return [
            CheckResult(
                "problem",
                "shared memory",
                f"/dev/shm has {free / 2**20:.0f} MiB free",
                "start the container with --shm-size=1g or more.",
            )
        ]
    return [CheckResult("ok", "shared memory", f"/dev/shm has {free / 2**30:.1f} GiB free")]


def _slurm() -> list[CheckResult]:
    if shutil.which("sinfo") is None:
        return [CheckResult("ok", "Slurm", "not on this machine")]
    result = run(["sinfo", "--noheader", "--format=%P %D %t"], timeout_seconds=30)
    if "configuration source" in result.stdout:
        detail = "its commands are here, but no cluster is configured"
        return [CheckResult("note", "Slurm", detail, "log in to a cluster to submit jobs.")]
    if result.returncode != 0:
        return [
            CheckResult(
                "problem",
                "Slurm",
                f"sinfo fails: {_last(result.stdout)}",
                "is the controller up, and are you on a login or compute node?",
            )
        ]
    kinds = run(["srun", "--mpi=list"], timeout_seconds=30).stdout
    if "pmix" in kinds:
        return [CheckResult("ok", "Slurm", "sinfo answers; srun --mpi=pmix is there")]
    return [
        CheckResult(
            "note",
            "Slurm",
            "sinfo answers, but srun has no pmix",
            "start Open MPI jobs by mpirun within sbatch: srun would give worlds of size 1.",
        )
    ]


def _site() -> list[CheckResult]:
    return examine_site()


def _last(output: str) -> str:
    lines = [line for line in output.strip().splitlines() if line.strip(" -")]
    return json.dumps(lines[-1][:200]) if lines else "no output"
