"""Find what Horovod is built from: torch, MPI, compilers and, for GPUs, CUDA and NCCL."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import Error
from hpctrain.horovod_build import mpi
from hpctrain.horovod_build.patches import PATCHES
from hpctrain.process import NO_MPI_HINT, run, search_path, which

VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
# setuptools 81 dropped what Horovod's setup.py still imports.
BUILD_TOOLS = ("setuptools<81", "wheel", "packaging")
_OLDEST_CXX_STANDARD = 17  # that of the oldest torch which hpctrain takes


@dataclass(frozen=True)
class Toolchain:
    """The toolchain that a wheel depends on.

    Attributes:
        built_from: What was found, as JSON-able text; the wheel's cache key is its hash.
        environment: The environment that Horovod's own build reads.
    """

    built_from: Mapping[str, str]
    environment: Mapping[str, str]

    @property
    def key(self) -> str:
        """The name of the wheel in the cache: a hash of what it is built from."""
        text = json.dumps(self.built_from, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def find(*, gpu: bool) -> Toolchain:
    """Find what a build needs, on this machine.

    Args:
        gpu: Build the NCCL operations. CUDA is taken from ``CUDA_HOME`` or nvcc's place, NCCL from
            ``NCCL_HOME`` or the nvidia wheels beside torch.

    Raises:
        Error: Something is missing; the hint says how to get it.
    """
    import torch

    mpicxx = _need("mpicxx", NO_MPI_HINT)
    _need("mpirun", NO_MPI_HINT)
    standard = cxx_standard(Path(torch.__file__).parent)
    cxx = _need(os.environ.get("CXX", "c++"), f"install a C++{standard} compiler, e.g. g++ 11.")
    cmake = _need("cmake", "`pip install cmake`, or load your site's module.")
    _need_standard(cxx, standard)
    _need_headers()
    mpi_prefix = mpicxx.resolve().parent.parent
    built_from = {
        "horovod": f"{VERSION} {SDIST_SHA256}",
        "patches": json.dumps([[patch.file, patch.old, patch.new] for patch in PATCHES]),
        "build_tools": " ".join(BUILD_TOOLS),
        "python": f"{sys.implementation.cache_tag} {sysconfig.get_config_var('SOABI')}",
        "platform": f"{platform.machine()} {platform.libc_ver()[1]}",
        "torch": f"{torch.__version__} {torch.version.git_version} "
        f"cxx11abi={torch.compiled_with_cxx11_abi()}",
        "mpi": mpi.of_compiler(mpicxx),
        "compiler": _first_line(cxx, "--version"),
        "cxx_standard": str(standard),
        "cmake": _first_line(cmake, "--version"),
        "gpu": "none",
    }
    environment = {
        # Horovod's build reads many variables of its own; those that are left say nothing to it.
        **{name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")},
        "PATH": search_path(),
        "HOROVOD_CXX_STANDARD": str(standard),
        "HOROVOD_CMAKE": str(cmake),
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        # CMake 4 refuses the bundled Gloo's declared minimum otherwise.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "MAKEFLAGS": os.environ.get("MAKEFLAGS", f"-j{len(os.sched_getaffinity(0))}"),
    }
    linker = [os.environ.get("LDFLAGS", ""), "-Wl,--strip-debug"]
    if mpi_prefix == Path(sys.prefix).resolve():
        # The MPI came as a wheel: find it beside Horovod wherever the cached wheel is installed.
        linker.append("-Wl,-rpath,$ORIGIN/../../../..")
    else:
        built_from["mpi_prefix"] = str(mpi_prefix)
    environment["LDFLAGS"] = " ".join(linker).strip()
    if gpu:
        _add_gpu(built_from, environment)
    else:
        environment["HOROVOD_WITHOUT_NVTX"] = "1"
    return Toolchain(built_from, environment)


def cxx_standard(torch_folder: Path) -> int:
    """Return the oldest C++ standard that an installed torch's headers can be compiled with.

    They refuse an older one by a guard (``#if __cplusplus < 202002L``); should that ever be gone,
    torch's CMake package says what its users are compiled with.

    Args:
        torch_folder: Of the package ``torch``.
    """
    for file, pattern in (
        ("include/torch/csrc/api/include/torch/all.h", r"__cplusplus < 20(\d\d)\d\dL"),
        ("share/cmake/Torch/TorchConfig.cmake", r"CXX_STANDARD (\d\d)"),
    ):
        path = torch_folder / file
        found = re.search(pattern, path.read_text(errors="replace")) if path.exists() else None
        if found:
            return int(found[1])
    return _OLDEST_CXX_STANDARD


def _need_standard(cxx: Path, standard: int) -> None:
    command = [str(cxx), f"-std=c++{standard}", "-fsyntax-only", "-x", "c++", os.devnull]
    if run(command, timeout_seconds=30).returncode != 0:
        raise Error(
            f"{cxx} does not know C++{standard}, which torch's headers are written in.",
            hint="load a newer one, e.g. g++ 11, and set CXX to it; or install an older torch.",
        )


def _need_headers() -> None:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise Error(
            f"Python's headers are not there: {header}.",
            hint="install them (on Debian the package python3-dev), or use a Python that has them.",
        )


def _add_gpu(built_from: dict[str, str], environment: dict[str, str]) -> None:
    import torch

    if torch.version.cuda is None:
        raise Error(
            f"torch {torch.__version__} has no CUDA, so Horovod cannot be built with NCCL.",
            hint="install a CUDA build of torch first, or build without --gpu.",
        )
    cuda_home = _cuda_home()
    if cuda_home is None:
        raise Error(
            "the CUDA toolkit was not found: no folder with bin/nvcc and include/cuda_runtime.h.",
            hint=_cuda_hint(torch.version.cuda),
        )
    _need_kernels(cuda_home, _cuda_hint(torch.version.cuda))
    nccl_home = os.environ.get("NCCL_HOME") or _nccl_wheel()
    if not nccl_home or not (Path(nccl_home) / "include" / "nccl.h").exists():
        raise Error(
            f"NCCL's headers were not found (NCCL_HOME={nccl_home or 'unset'}).",
            hint="set NCCL_HOME to a folder with include/nccl.h, or install torch's nvidia wheels.",
        )
    architectures = os.environ.get("HOROVOD_BUILD_CUDA_CC_LIST")
    if architectures:
        environment["HOROVOD_BUILD_CUDA_CC_LIST"] = architectures
    environment |= {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_CUDA_HOME": str(cuda_home),
        "CUDAToolkit_ROOT": str(cuda_home),
        "CUDA_HOME": str(cuda_home),  # torch's own search is led astray by a wrapper of nvcc
        # For CMake's own trial of the compiler: its default may be older than nvcc still knows.
        "CUDAARCHS": os.environ.get("CUDAARCHS")
        or _first_line(cuda_home / "bin" / "nvcc", "--list-gpu-arch").removeprefix("compute_"),
        "HOROVOD_NCCL_HOME": nccl_home,
        "HOROVOD_NCCL_LINK": "SHARED",
    }
    built_from["gpu"] = " ".join(
        [
            f"cuda={_last_line(cuda_home / 'bin' / 'nvcc', '--version')}",
            f"nccl={nccl_home} {_nccl_version(Path(nccl_home))}",
            f"architectures={architectures or 'default'}",
        ]
    )


def _cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, or around nvcc (which may be a wrapper), pip's, the usual place.

    The wheels of CUDA 13 and newer (nvcc, nvvm, crt, runtime, cccl) share one folder, those before
    have no nvcc.
    """
    nvcc = which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME"),
        nvcc and nvcc.resolve().parent.parent,
        *(home for folder in _nvidia_wheels() for home in sorted(folder.glob("cu[0-9]*"))),
        "/usr/local/cuda",
    ]
    for home in homes:
        if home and all((Path(home) / f).exists() for f in ("bin/nvcc", "include/cuda_runtime.h")):
            return Path(home).resolve()
    return None


def _cuda_hint(version: str) -> str:
    """How to have a CUDA toolkit for a torch of that CUDA."""
    hint = "load your site's cuda module, or set CUDA_HOME"
    if int(version.split(".")[0]) < 13:
        return f"{hint}."
    # All of them of one version: nvcc lets pip take newer ones, whose output its ptxas refuses.
    parts = ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
    wheels = " ".join(f"'nvidia-{part}=={version}.*'" for part in parts)
    return f"{hint}, or `pip install {wheels}`."


def _need_kernels(cuda_home: Path, hint: str) -> None:
    """See that nvcc compiles what Horovod's kernels begin with.

    Raises:
        Error: It does not: headers are missing, or the host's compiler is one it does not take.
    """
    with tempfile.TemporaryDirectory(prefix="hpctrain-nvcc-") as name:
        source = Path(name) / "trial.cu"
        source.write_text("#include <cuda_fp16.h>\n__global__ void f(__half* x) { *x += *x; }\n")
        command = [str(cuda_home / "bin" / "nvcc"), "-std=c++17", "-c", str(source)]
        done = run([*command, "-o", f"{name}/trial.o"], timeout_seconds=120)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if re.search("error|fatal", line)]
        said = (lines or [done.stdout])[0][:200]
        raise Error(f"{command[0]} does not compile a small kernel: {said}.", hint=hint)


def _nvidia_wheels() -> list[Path]:
    """The folders of the package ``nvidia``, which pip's wheels of CUDA and NCCL share."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]


def _nccl_wheel() -> str | None:
    """Return the nvidia-nccl wheel's folder, or None."""
    return next((str(f / "nccl") for f in _nvidia_wheels() if (f / "nccl").exists()), None)


def _nccl_version(home: Path) -> str:
    header = (home / "include" / "nccl.h").read_text(errors="replace")
    return " ".join(
        line.split()[-1]
        for line in header.splitlines()
        if line.startswith(("#define NCCL_MAJOR", "#define NCCL_MINOR", "#define NCCL_PATCH"))
    )


def _need(program: str, hint: str) -> Path:
    found = which(program)
    if found is None:
        raise Error(f"{program} was not found on PATH.", hint=hint)
    return found


def _first_line(program: Path, *arguments: str) -> str:
    output = run([str(program), *arguments], timeout_seconds=30).stdout.strip()
    return output.splitlines()[0] if output else ""


def _last_line(program: Path, *arguments: str) -> str:
    output = run([str(program), *arguments], timeout_seconds=30).stdout.strip()
    return output.splitlines()[-1] if output else ""


def installed_version() -> str | None:
    """Return the installed Horovod's version, or None."""
    try:
        return importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        return None
