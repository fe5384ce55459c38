"""See that mpicxx, mpirun, mpi4py and Horovod are of one MPI.

``python -m hpctrain.horovod_build.mpi`` is what a rank of a trial with mpi4py runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click

from hpctrain.errors import Error
from hpctrain.files import cache_folder
from hpctrain.horovod_build.pip import Log, pip
from hpctrain.process import loaded_files, mpirun, run, which

TRIAL_SECONDS = 120
HINT = "have one MPI first on PATH, and run `hpctrain horovod build`."
# Their C libraries: of Open MPI, MPICH and its kin, and MPICH as Debian names it.
_LIBRARY = re.compile(r"lib(mpi|mpich)\.so")

_PROGRAM = r"""
#include <mpi.h>
#include <cstdio>
int main(int argc, char** argv) {
  char version[MPI_MAX_LIBRARY_VERSION_STRING];
  int size, length;
  MPI_Init(&argc, &argv);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Get_library_version(version, &length);
  for (char* c = version; *c != 0; ++c) {
    if (*c < ' ') *c = ' ';
  }
  std::printf("MPI size %d: %s\n", size, version);
  MPI_Finalize();
}
"""


class Seen(NamedTuple):
    """What two ranks of a trial launch saw.

    Attributes:
        size: How large each found the world; 0: they did not get that far.
        library: What their MPI library calls itself.
        said: What they printed instead, in a line.
    """

    size: int
    library: str
    said: str


def of_compiler(mpicxx: Path) -> str:
    """Return what the MPI of a compiler wrapper calls itself, once two ranks have met under mpirun.

    Raises:
        Error: A program of that compiler does not run under mpirun, or each of its ranks is alone.
    """
    with tempfile.TemporaryDirectory(prefix="hpctrain-mpi-") as name:
        source, program = Path(name, "size.cc"), Path(name, "size")
        source.write_text(_PROGRAM)
        done = run([str(mpicxx), str(source), "-o", str(program)], timeout_seconds=TRIAL_SECONDS)
        if done.returncode != 0:
            raise Error(
                f"{mpicxx} cannot compile a small MPI program: {_last(done.stdout)}.",
                hint="is the MPI module whole, with its development part?",
            )
        seen = _read(run([*mpirun(2), str(program)], timeout_seconds=TRIAL_SECONDS))
    if seen.size != 2:
        saw = "each rank is alone in its world" if seen.size else seen.said
        raise Error(
            f"what {mpicxx} compiles does not run on two ranks under {which('mpirun')}: {saw}.",
            hint="have mpicxx and mpirun of one MPI first on PATH; load one MPI module only.",
        )
    return seen.library


def of_mpi4py() -> Seen:
    """Launch two ranks with mpi4py under mpirun, and return what they see."""
    command = [*mpirun(2), sys.executable, "-m", "hpctrain.horovod_build.mpi"]
    return _read(run(command, timeout_seconds=TRIAL_SECONDS))


def match_mpi4py(library: str, say: Callable[[str], None] = click.echo) -> None:
    """Install an mpi4py that uses this MPI, unless it is there: built from source against it.

    Args:
        library: What the MPI calls itself.
        say: Is told what is done.

    Raises:
        Error: It cannot be built, or is of another MPI even then.
    """
    seen = of_mpi4py()
    if seen == Seen(2, library, ""):
        return
    say(f"mpi4py does not use the MPI on PATH ({_what_else(seen)}), so it is built from source.")
    pip("install", "--force-reinstall", "--no-deps", str(_wheel_of_mpi4py(library, say)))
    seen = of_mpi4py()
    if seen != Seen(2, library, ""):
        raise Error(
            f"mpi4py was built from source, and still does not use the MPI on PATH: "
            f"{_what_else(seen)}.",
            hint="load one MPI module only, and try again.",
        )


def _wheel_of_mpi4py(library: str, say: Callable[[str], None]) -> Path:
    """A wheel of the installed version, built against the MPI on PATH, or kept from then."""
    version = importlib.metadata.version("mpi4py")
    built_from = f"{version} {sysconfig.get_config_var('SOABI')} {which('mpicc')} {library}"
    key = hashlib.sha256(built_from.encode()).hexdigest()[:16]
    folder = cache_folder() / "mpi4py" / key
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        folder.mkdir(parents=True, exist_ok=True)
        say(f"This takes some minutes. Log: {folder}/log")
        with Log(folder / "log") as log:
            pip(
                *["wheel", "--no-deps", "--no-cache-dir", "--no-binary", "mpi4py", "-v"],
                *["--wheel-dir", str(folder), f"mpi4py=={version}"],
                environment={**os.environ, "MPICC": str(which("mpicc"))},
                log=log,
                hint=f"it takes mpicc and Python's headers; its log is {folder}/log.",
            )
        wheel = next(folder.glob("*.whl"))
    return wheel


def require() -> None:
    """Refuse to go on with an mpi4py that cannot work here.

    Raises:
        Error: It does not find its MPI, or that is another one than Horovod has loaded.
    """
    try:
        from mpi4py import MPI  # noqa: F401 - the import is the trial
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[-1]
        raise Error(f"mpi4py does not find its MPI: {reason}.", hint=HINT) from error
    libraries = loaded_files(_LIBRARY)
    if len(libraries) > 1:
        raise Error(f"mpi4py and Horovod use different MPIs: {', '.join(libraries)}.", hint=HINT)


def _read(done: subprocess.CompletedProcess[str]) -> Seen:
    found = {(int(size), text.strip()) for size, text in re.findall(_SIZE, done.stdout)}
    if done.returncode != 0 or len(found) != 1:
        return Seen(0, "", f"exit code {done.returncode}: {_last(done.stdout)}")
    return Seen(*found.pop(), "")


_SIZE = re.compile(r"MPI size (\d+): (.*)")


def _what_else(seen: Seen) -> str:
    if not seen.size:
        return seen.said
    return f"it is of {' '.join(seen.library.split()[:4])}" + (
        ", each rank alone" if seen.size == 1 else ""
    )


def _last(output: str) -> str:
    """Return the line of an output that tells most."""
    lines = [line.strip() for line in output.splitlines() if line.strip(" -=\t")]
    telling = [line for line in lines if re.search(r"[Ee]rror\b.*:|cannot|not found", line)]
    return (telling or lines or ["no output"])[-1][:300]


def main() -> None:
    """Run as one rank of a trial."""
    from mpi4py import MPI

    version = "".join(c if c >= " " else " " for c in MPI.Get_library_version())
    print(f"MPI size {MPI.COMM_WORLD.size}: {version}", flush=True)


if __name__ == "__main__":
    main()
