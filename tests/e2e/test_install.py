"""What does not fit together is said in a line, before anything is downloaded or trained."""

import pytest

NO_LIBRARY = "libmpi.so.12: cannot open shared object file: No such file or directory"


@pytest.fixture
def a_foreign_mpi4py(tmp_path):
    """An environment with the mpi4py of a wheel that does not find this machine's MPI."""
    folder = tmp_path / "foreign" / "mpi4py"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("__version__ = '4.1.2'\n")
    (folder / "MPI.py").write_text(
        f"raise RuntimeError('cannot load MPI library\\n{NO_LIBRARY}')\n"
    )
    return {"PYTHONPATH": str(folder.parent)}


def test_a_parameter_server_without_its_mpi(hpctrain, a_foreign_mpi4py):
    result = hpctrain(
        *("train", "digits", "--strategy", "ps", "--out", "run"), ranks=2, env=a_foreign_mpi4py
    )
    assert result.returncode == 2
    said = [line for line in result.stdout.splitlines() if "error:" in line]
    assert len(said) == 1 and f"mpi4py does not find its MPI: {NO_LIBRARY}." in said[0]
    assert "HINT: have one MPI first on PATH, and run `hpctrain horovod build`." in said[0]
    assert "Traceback" not in result.stdout
    assert not (hpctrain.folder / "run").exists()


@pytest.fixture
def an_old_compiler(tmp_path):
    """An environment whose C++ compiler knows no standard by name."""
    old = tmp_path / "old-c++"
    old.write_text('#!/bin/sh\ncase "$*" in *-std=c++*) exit 1;; esac\nexec c++ "$@"\n')
    old.chmod(0o755)
    return {"CXX": str(old)}


def test_doctor_sees_what_does_not_fit(hpctrain, a_foreign_mpi4py, an_old_compiler):
    result = hpctrain("doctor", env={**a_foreign_mpi4py, **an_old_compiler})
    assert result.returncode == 2
    lines = result.stdout.splitlines()
    (number,) = (n for n, line in enumerate(lines) if "mpirun -np 2, mpi4py: " in line)
    assert lines[number].startswith("problem") and "libmpi.so.12" in lines[number]
    assert "run `hpctrain horovod build`" in lines[number + 1]
    assert "note    building Horovod: " in result.stdout and "does not know C++" in result.stdout


def test_a_compiler_that_is_too_old_for_torch(hpctrain, an_old_compiler):
    cache = hpctrain.folder / "cache"
    result = hpctrain("horovod", "build", env={**an_old_compiler, "HPCTRAIN_CACHE": str(cache)})
    assert result.returncode == 2
    (line,) = result.stdout.splitlines()
    assert "old-c++ does not know C++" in line and "HINT: " in line
    assert not cache.exists()
