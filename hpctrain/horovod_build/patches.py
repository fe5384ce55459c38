"""What is changed in Horovod 0.28.1 before it is built, each change with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import Error


@dataclass(frozen=True)
class Patch:
    """One text replaced in one file of the source tree, wherever it stands there."""

    name: str
    reason: str
    file: str
    old: str
    new: str


_CXX17 = "torch's headers need C++17 since 2.1 (horovod issue 3996; mended upstream, not released)"

PATCHES = (
    Patch("cxx17", _CXX17, "CMakeLists.txt", "CMAKE_CXX_STANDARD 14", "CMAKE_CXX_STANDARD 17"),
    Patch(
        "cxx17-torch",
        _CXX17,
        "horovod/torch/CMakeLists.txt",
        "CMAKE_CXX_STANDARD 14",
        "CMAKE_CXX_STANDARD 17",
    ),
    Patch(
        "cxx17-cuda",
        _CXX17,
        "horovod/common/ops/cuda/CMakeLists.txt",
        "CMAKE_CUDA_STANDARD 11",
        "CMAKE_CUDA_STANDARD 17",
    ),
    Patch("cxx17-gloo", _CXX17, "third_party/gloo/CMakeLists.txt", "-std=c++11", "-std=c++17"),
    Patch(
        "double-dash-binding",
        "Open MPI 5 reads single-dash options as a program name ('unable to find ... none'); "
        "Open MPI 4 and 5 both understand the double dash",
        "horovod/runner/mpi_run.py",
        "_NO_BINDING_ARGS = ['-bind-to none', '-map-by slot']",
        "_NO_BINDING_ARGS = ['--bind-to none', '--map-by slot']",
    ),
    Patch(
        "gloo-exit-code",
        "horovodrun --gloo ended every failure with a traceback of its own and exit code 1; the "
        "code of the first rank that failed is the truth (128 + n for signal n)",
        "horovod/runner/launch.py",
        "getLevelName(args.log_level))\n\n    _run(args)\n",
        """getLevelName(args.log_level))

    try:
        _run(args)
    except RuntimeError as error:
        code = str(error).rpartition('Exit code: ')[2].strip()
        if not code.lstrip('-').isdigit():
            raise
        print(error, file=sys.stderr)
        sys.exit(int(code) if int(code) > 0 else 128 - int(code))
""",
    ),
    Patch(
        "gloo-stall-inspector",
        "reserve() leaves the vector empty, so the stall inspector loops over no ranks and never "
        "fires under the Gloo controller",
        "horovod/common/gloo/gloo_controller.cc",
        "global_ranks_.reserve(size_);",
        "global_ranks_.resize(size_);",
    ),
)


def apply(source: Path) -> None:
    """Apply every patch to an unpacked source tree.

    Raises:
        Error: A text to replace is not there, so this is not the release the patches are for.
    """
    for patch in PATCHES:
        file = source / patch.file
        text = file.read_text(encoding="utf-8")
        if patch.old not in text:
            raise Error(
                f"patch '{patch.name}' does not fit {patch.file}.",
                hint="the patches are for Horovod 0.28.1; is the source another version?",
            )
        file.write_text(text.replace(patch.old, patch.new), encoding="utf-8")
