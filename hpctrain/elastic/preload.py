"""The small library that keeps Slurm from cancelling a step when one of its processes is lost."""

from __future__ import annotations

import hashlib
import os
from importlib import resources
from pathlib import Path

from hpctrain.errors import Error
from hpctrain.files import cache_folder
from hpctrain.process import run, which

NAME = "hpctrain-notify"


def library() -> Path:
    """Return the path of the library for ``LD_PRELOAD``; it is built if need be.

    Raises:
        Error: It cannot be.
    """
    source = resources.files("hpctrain.elastic").joinpath("notify.c").read_bytes()
    machine = os.uname().machine.encode()
    key = hashlib.sha256(source + machine).hexdigest()[:16]
    path = cache_folder() / "preload" / key / f"{NAME}.so"
    if path.exists():
        return path
    compiler = which("cc")
    if compiler is None:
        raise Error(
            "there is no C compiler to build what outliving losses under Slurm needs.",
            hint="load one, or run `hpctrain submit --elastic` once where there is one.",
        )
    made = path.with_name(f"{NAME}.{os.getpid()}")
    code = path.with_suffix(".c")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        code.write_bytes(source)
    except OSError as error:
        raise Error(
            f"cannot write {code}: {error.strerror}.", hint="HPCTRAIN_CACHE moves the cache."
        ) from error
    command = [str(compiler), "-shared", "-fPIC", "-O2", "-o", str(made), str(code), "-ldl"]
    done = run(command, timeout_seconds=60)
    if done.returncode != 0:
        raise Error(
            f"cc cannot build {code}: {done.stdout.strip()[-300:]}.",
            hint="without it a lost node restarts the run; try that command by hand.",
        )
    made.replace(path)
    return path
