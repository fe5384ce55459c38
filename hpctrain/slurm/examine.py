"""The part of `hpctrain doctor` that compares the site's profile with this cluster."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from hpctrain.errors import Error, nearest
from hpctrain.process import run, which
from hpctrain.slurm import commands, options
from hpctrain.slurm.site import Site, load
from hpctrain.world.check_result import CheckResult

LIST_SECONDS = 30.0


def examine(environment: Mapping[str, str] = os.environ) -> list[CheckResult]:
    """Check the profile that ``HPCTRAIN_SITE`` or ``default.toml`` gives against this machine.

    Returns:
        One note for each difference, or a single ``ok``; empty without a profile.

    Raises:
        Error: The profile cannot be read, or is invalid.
    """
    site = load(None, environment)
    if site == Site():
        return []
    notes = [*_options(site), *_launcher(site)]
    if site.scheduler == "slurm" and which("sinfo") is not None:
        notes += _cluster(site)
    name = environment.get("HPCTRAIN_SITE", "default")
    if not notes:
        return [CheckResult("ok", "site", f"{name}: as this machine has it")]
    return [CheckResult("note", "site", f"{name}: {text}", hint) for text, hint in notes]


def _options(site: Site) -> list[tuple[str, str]]:
    return [
        (f"--{name} is no option of sbatch that is known here", options.misspelt([name]))
        for name in site.sbatch()
        if not options.known(name)
    ]


def _launcher(site: Site) -> list[tuple[str, str]]:
    program = shlex.split(site.launcher)[0]
    if which(program) is not None or site.modules:  # which may bring it
        return []
    return [(f"its launcher {program} is not on PATH", "name the module that brings it.")]


def _cluster(site: Site) -> list[tuple[str, str]]:
    found = []
    try:
        there = commands.partitions()
    except Error:
        return []  # whether Slurm answers is another question
    asked = site.sbatch().get("partition", "")
    for name in filter(None, asked.split(",")):
        if name not in there:
            found.append((f"there is no partition {name!r} here", nearest(name, there)))
    if site.launcher == "srun":
        kinds = run(["srun", "--mpi=list"], timeout_seconds=LIST_SECONDS).stdout.split()
        if site.mpi not in kinds:
            shown = ", ".join(kind for kind in kinds if kind.isidentifier())
            found.append((f"srun has no --mpi={site.mpi}", f"srun --mpi=list says: {shown}."))
    return found
