"""Check the installed Horovod: what it was built with, and what is wrong with it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from hpctrain.horovod_build.toolchain import VERSION, installed_version
from hpctrain.process import run, which
from hpctrain.world.check_result import CheckResult

BUILD_HINT = "run `hpctrain horovod build`."


def check() -> list[CheckResult]:
    """Look at the installed Horovod without starting a world."""
    version = installed_version()
    if version is None:
        return [CheckResult("problem", "horovod", "not installed", BUILD_HINT)]
    findings = [
        CheckResult("ok", "horovod", version)
        if version == VERSION
        else CheckResult("note", "horovod", f"{version}; hpctrain is tried with {VERSION}")
    ]
    spec = importlib.util.find_spec("horovod")
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or [])))
    libraries = sorted((folder / "torch").glob("mpi_lib_v2*.so"))
    if not libraries:
        return [*findings, CheckResult("problem", "torch extension", "not built", BUILD_HINT)]
    findings.append(_torch(folder))
    findings += _linked(libraries[0])
    findings += _features()
    return findings


def _torch(folder: Path) -> CheckResult:
    import torch

    try:
        built = str(json.loads((folder / "metadata.json").read_text())["pytorch"])
    except (OSError, ValueError, KeyError):
        return CheckResult("note", "built against torch", "unknown (no metadata.json)")
    if built == torch.__version__:
        return CheckResult("ok", "built against torch", built)
    return CheckResult(
        "problem",
        "built against torch",
        f"{built}, but torch {torch.__version__} is installed",
        BUILD_HINT,
    )


def _linked(library: Path) -> list[CheckResult]:
    """Compare the MPI library that the extension finds with the one that mpirun belongs to."""
    listing = run(["ldd", str(library)], timeout_seconds=30).stdout
    match = re.search(r"(libmpi\w*\.so\S*) => (\S+|not found)", listing)
    if match is None:
        return [CheckResult("problem", "MPI library", "the extension links none", BUILD_HINT)]
    if match[2] in ("not", "not found"):
        return [
            CheckResult(
                "problem",
                "MPI library",
                f"{match[1]} is not found at run time",
                "load the MPI module that Horovod was built with, or " + BUILD_HINT,
            )
        ]
    linked = Path(match[2]).resolve()
    findings = [CheckResult("ok", "MPI library", str(linked))]
    launcher = which("mpirun")
    if launcher is None:
        findings.append(CheckResult("note", "mpirun", "not on PATH; srun must start the ranks"))
    elif launcher.resolve().parent.parent not in linked.parents:
        findings.append(
            CheckResult(
                "note",
                "mpirun",
                f"{launcher} is not in the MPI library's own prefix",
                "if ranks say size 1, this is why: use that MPI's mpirun, or rebuild.",
            )
        )
    else:
        findings.append(CheckResult("ok", "mpirun", str(launcher)))
    return findings


def _features() -> list[CheckResult]:
    try:
        import horovod.torch as hvd
    except Exception as error:  # whatever the extension's loading raises is the finding
        return [CheckResult("problem", "import horovod.torch", str(error), BUILD_HINT)]
    built = {
        "MPI": hvd.mpi_built(),
        "Gloo": hvd.gloo_built(),
        "NCCL": bool(hvd.nccl_built()),
        "CUDA": hvd.cuda_built(),
    }
    there = ", ".join(name for name, value in built.items() if value)
    missing = ", ".join(name for name, value in built.items() if not value)
    findings = [CheckResult("ok", "built in", there + (f" (not: {missing})" if missing else ""))]
    import torch

    if torch.cuda.is_available() and not built["NCCL"]:
        findings.append(
            CheckResult(
                "problem",
                "NCCL",
                "there are GPUs, but Horovod was built without them",
                "run `hpctrain horovod build --gpu`.",
            )
        )
    return findings
