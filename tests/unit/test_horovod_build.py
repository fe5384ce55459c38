"""What a build of Horovod decides before anything is downloaded, and what it tells meanwhile."""

import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from hpctrain.errors import Error
from hpctrain.horovod_build import build, mpi, patches, pip, toolchain
from hpctrain.horovod_build.mpi import Seen
from hpctrain.horovod_build.pip import Log
from hpctrain.process import run
from tests.waiting import SECONDS

OPEN_MPI = "Open MPI v5.0.11, package: of the test"
GUARD = "include/torch/csrc/api/include/torch/all.h"
CONFIG = "share/cmake/Torch/TorchConfig.cmake"


@pytest.mark.parametrize(
    ("files", "standard"),
    [
        ({GUARD: "#if !defined(_MSC_VER) && __cplusplus < 201703L\n#error C++17\n"}, 17),
        ({GUARD: "#if !defined(_MSC_VER) && __cplusplus < 202002L\n#error C++20\n"}, 20),
        # What torch itself was compiled with is not what its headers ask for.
        ({GUARD: "#if __cplusplus < 201703L", CONFIG: "    CXX_STANDARD 20\n"}, 17),
        ({GUARD: "#if __cplusplus < 202302L", CONFIG: "    CXX_STANDARD 20\n"}, 23),
        ({GUARD: "#pragma once", CONFIG: "    CXX_STANDARD 20\n"}, 20),
        ({}, 17),
    ],
)
def test_the_cpp_standard_is_what_the_headers_ask_for(tmp_path, files, standard):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert toolchain.cxx_standard(tmp_path) == standard


def test_the_installed_torch_says_its_standard():
    folder = Path(torch.__file__).parent
    assert f"C++{toolchain.cxx_standard(folder)} or later" in (folder / GUARD).read_text()


def test_no_file_of_horovod_has_a_standard_of_its_own():
    """Each patch that mentions one takes it from the build's environment, but for the kernels."""
    for patch in patches.PATCHES:
        if "STANDARD" in patch.new or "-std=" in patch.new:
            assert "ENV{HOROVOD_CXX_STANDARD}" in patch.new or patch.name == "cxx-standard-cuda"


@pytest.fixture
def an_mpi(monkeypatch):
    """An MPI that needs no trial."""
    monkeypatch.setattr(mpi, "of_compiler", lambda mpicxx: OPEN_MPI)


def test_who_asks_for_no_gpu_gets_none(an_mpi, monkeypatch):
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    monkeypatch.setenv("HOROVOD_WITHOUT_GLOO", "1")
    chain = toolchain.find(gpu=False)
    assert "HOROVOD_GPU_OPERATIONS" not in chain.environment
    assert "HOROVOD_WITHOUT_GLOO" not in chain.environment
    assert chain.environment["HOROVOD_WITH_GLOO"] == "1"
    assert chain.environment["HOROVOD_CXX_STANDARD"] == chain.built_from["cxx_standard"]


def test_a_wheel_is_used_again_only_for_what_it_was_built_from(an_mpi, monkeypatch):
    keys = [toolchain.find(gpu=False).key, toolchain.find(gpu=False).key]
    assert keys[0] == keys[1]
    monkeypatch.setattr(mpi, "of_compiler", lambda mpicxx: "MPICH Version: 4.0.2")
    keys.append(toolchain.find(gpu=False).key)
    monkeypatch.setattr(toolchain, "cxx_standard", lambda folder: 23)
    monkeypatch.setattr(toolchain, "_need_standard", lambda cxx, standard: None)
    keys.append(toolchain.find(gpu=False).key)
    changed = patches.Patch("new", "", "CMakeLists.txt", "a", "b")
    monkeypatch.setattr(toolchain, "PATCHES", (*patches.PATCHES, changed))
    keys.append(toolchain.find(gpu=False).key)
    assert len(set(keys)) == 4


def test_a_compiler_that_is_too_old_is_refused_first(an_mpi, monkeypatch, tmp_path):
    old = tmp_path / "c++"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(Error, match=r"does not know C\+\+\d\d"):
        toolchain.find(gpu=False)


def test_a_python_without_headers_is_refused_first(an_mpi, monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(Error, match="headers are not there"):
        toolchain.find(gpu=False)


@pytest.fixture
def pips_cuda(monkeypatch, tmp_path):
    """A machine whose only CUDA toolkit is pip's, with an nvcc on PATH that is only a wrapper."""
    wrapper = tmp_path / "usr" / "bin" / "nvcc"
    home = tmp_path / "nvidia" / "cu13"
    for path in (
        *("bin/nvcc", "include/cuda_runtime.h", "nvvm/bin/cicc", "lib/libcudart_static.a"),
        *("lib/libcudart.so.13", "lib/cmake/cccl/cccl-config.cmake"),
    ):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).touch()
    wrapper.parent.mkdir(parents=True)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(toolchain, "which", lambda program: wrapper)
    monkeypatch.setattr(toolchain, "_nvidia_wheels", lambda: [home.parent])
    return home


def test_pips_cuda_is_a_toolkit(pips_cuda, tmp_path):
    assert toolchain._cuda_home() == pips_cuda
    names = ("HOROVOD_CUDA_HOME", "CUDAToolkit_ROOT", "CUDA_HOME")
    chain = toolchain.Toolchain({}, dict.fromkeys(names, str(pips_cuda)))
    links = tmp_path / "work" / "cuda"
    assert build._gpu_links(chain, links.parent) == dict.fromkeys(names, str(links))
    assert (links / "lib64" / "libcudart.so").resolve() == pips_cuda / "lib" / "libcudart.so.13"
    assert (links / "lib64" / "libcudart_static.a").exists()
    assert (links / "bin" / "nvcc").exists() and (links / "nvvm" / "bin" / "cicc").exists()


def test_a_whole_toolkit_is_taken_as_it_is(pips_cuda, tmp_path):
    (pips_cuda / "lib" / "libcudart.so").touch()
    chain = toolchain.Toolchain({}, {"HOROVOD_CUDA_HOME": str(pips_cuda)})
    assert build._gpu_links(chain, tmp_path / "work") == {}


def test_what_to_install_for_gpus_is_said_by_torchs_cuda():
    hint = toolchain._cuda_hint("13.0")
    for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl"):
        assert f"'nvidia-{name}==13.0.*'" in hint
    assert "pip install" not in toolchain._cuda_hint("12.6")  # its wheels hold no nvcc


def test_an_nvcc_that_cannot_compile_is_refused_first(pips_cuda):
    nvcc = pips_cuda / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho trial.ptx, line 9 fatal: Unsupported .version 9.5\nexit 255\n")
    nvcc.chmod(0o755)
    with pytest.raises(Error, match="small kernel: .*Unsupported .version") as refused:
        toolchain._need_kernels(pips_cuda, "install it")
    assert refused.value.hint == "install it"


@pytest.mark.parametrize(
    ("code", "output", "seen"),
    [
        (0, f"MPI size 2: {OPEN_MPI}\nMPI size 2: {OPEN_MPI}  \n", Seen(2, OPEN_MPI, "")),
        (0, f"a notice\nMPI size 1: {OPEN_MPI}\nMPI size 1: {OPEN_MPI}\n", Seen(1, OPEN_MPI, "")),
        (0, "MPI size 1: A\nMPI size 2: B\n", Seen(0, "", "exit code 0: MPI size 2: B")),
        (
            1,
            "Traceback\nRuntimeError: cannot load MPI library\nlibmpi.so.12: cannot open\n----\n",
            Seen(0, "", "exit code 1: libmpi.so.12: cannot open"),
        ),
        (124, "", Seen(0, "", "exit code 124: no output")),
    ],
)
def test_what_two_ranks_saw(code, output, seen):
    assert mpi._read(subprocess.CompletedProcess([], code, output)) == seen


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """pip as it is asked; it leaves a wheel where one was to be built."""
    asked = []

    def answer(*arguments, environment=None, log=None, hint=""):
        asked.append((arguments, environment))
        if arguments[0] == "wheel":
            folder = Path(arguments[arguments.index("--wheel-dir") + 1])
            log.line("Building wheel for mpi4py\n")
            assert "Building" in (folder / "log").read_text()
            (folder / "mpi4py-4-cp3-linux.whl").touch()

    monkeypatch.setattr(mpi, "pip", answer)
    monkeypatch.setenv("HPCTRAIN_CACHE", str(tmp_path))
    return asked


def seeing(monkeypatch, *seen):
    left = list(seen)
    monkeypatch.setattr(mpi, "of_mpi4py", lambda: left.pop(0))


def test_an_mpi4py_that_fits_is_left_alone(monkeypatch, asked):
    seeing(monkeypatch, Seen(2, OPEN_MPI, ""))
    mpi.match_mpi4py(OPEN_MPI)
    assert not asked


@pytest.mark.parametrize(
    "first",
    [
        Seen(0, "", "exit code 1: libmpi.so.12: cannot open shared object file"),
        Seen(1, OPEN_MPI, ""),
        Seen(2, "MPICH Version: 4.3.0", ""),
    ],
)
def test_an_mpi4py_of_another_mpi_is_built_from_source_once(monkeypatch, asked, first):
    mpich = "MPICH Version: 4.0.2"
    said = []
    for _ in range(2):
        seeing(monkeypatch, first, Seen(2, mpich, ""))
        mpi.match_mpi4py(mpich, said.append)
    (wheel, environment), (install, _), (again, _) = asked
    assert wheel[0] == "wheel" and "--no-binary" in wheel
    assert environment["MPICC"].endswith("mpicc")
    assert install[0] == "install" and install == again
    assert len(said) == 3 and "mpi4py does not use the MPI on PATH" in said[0]


def test_an_mpi4py_that_does_not_fit_even_then(monkeypatch, asked):
    seeing(monkeypatch, Seen(1, OPEN_MPI, ""), Seen(1, OPEN_MPI, ""))
    with pytest.raises(Error, match="still does not use the MPI on PATH: it is of Open MPI"):
        mpi.match_mpi4py("MPICH Version: 4.0.2", lambda said: None)


def test_two_mpis_in_a_process_are_refused(monkeypatch):
    monkeypatch.setattr(mpi, "loaded_files", lambda name: ["/a/libmpi.so.40", "/b/libmpich.so.12"])
    with pytest.raises(Error, match=r"different MPIs: /a/libmpi\.so\.40, /b/libmpich\.so\.12"):
        mpi.require()


def test_mpicxx_and_mpirun_of_different_mpis(monkeypatch, tmp_path):
    """The ranks of a program that mpirun's MPI did not make are alone."""
    compiler, launcher = tmp_path / "mpicxx", tmp_path / "mpirun"
    compiler.write_text(
        f"#!{sys.executable}\nimport os, sys\nprogram = sys.argv[-1]\n"
        "open(program, 'w').write('#!/bin/sh\\necho MPI size 1: MPICH\\n')\n"
        "os.chmod(program, 0o755)\n"
    )
    launcher.write_text('#!/bin/sh\n"$1"; "$1"\n')
    for program in (compiler, launcher):
        program.chmod(0o755)
    monkeypatch.setattr(mpi, "mpirun", lambda ranks: [str(launcher)])
    with pytest.raises(Error, match="each rank is alone in its world"):
        mpi.of_compiler(compiler)


def test_the_log_is_there_while_a_build_goes_on_and_it_is_seen_to_move(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(pip, "SHOWN_EVERY_SECONDS", 0.01)
    seen = ""
    with Log(tmp_path / "log") as log:
        log.line("  [ 42%] Building CXX object horovod/CMakeFiles/x.dir/common/message.cc.o\n")
        log.line("/usr/include/x.h:1: warning: of which there are many\n")
        assert (tmp_path / "log").read_text().count("\n") == 2
        deadline = time.monotonic() + SECONDS
        while seen.count("s  [ 42%] message.cc\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
            seen += capsys.readouterr().out
    assert seen.count("s  [ 42%] message.cc\n") >= 2  # also where nothing new is printed


def test_a_programs_lines_come_one_by_one():
    began = []
    code = "import sys\nprint('one', flush=True)\nsys.stdin.read()\nprint('two', flush=True)"
    done = run([sys.executable, "-c", code], timeout_seconds=SECONDS, each=began.append)
    assert began == ["one\n", "two\n"] and done.stdout == "one\ntwo\n"


def test_a_program_and_what_it_started_end_at_the_time_limit():
    done = run(["sh", "-c", "echo on; sleep 600 & sleep 600"], timeout_seconds=2)
    assert done.returncode == 124 and done.stdout == "on\n"


def test_a_killed_program_has_its_signal_as_code():
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)"
    assert run([sys.executable, "-c", code], timeout_seconds=SECONDS).returncode == -signal.SIGTERM


def test_a_horovod_without_gpus_refuses_them():
    from hpctrain.strategies.horovod import _check_device

    cpu_only = types.SimpleNamespace(cuda_built=lambda: False, rocm_built=lambda: False)
    _check_device(cpu_only, torch.device("cpu"))
    _check_device(
        types.SimpleNamespace(cuda_built=lambda: True, rocm_built=lambda: False),
        torch.device("cuda", 1),
    )
    with pytest.raises(Error, match="without GPUs, and this rank trains on cuda:1") as refused:
        _check_device(cpu_only, torch.device("cuda", 1))
    assert "hpctrain horovod build --gpu" in refused.value.hint
