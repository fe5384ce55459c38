"""Submitting a run: a script from a template, checked, kept in the run folder, and queued."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain import __version__
from hpctrain.errors import Error
from hpctrain.files import write_text
from hpctrain.slurm import commands
from hpctrain.slurm.options import Options, directive
from hpctrain.slurm.render import render
from hpctrain.slurm.site import Launcher, Site
from hpctrain.slurm.supervise import SUBMISSION

SCRIPT = "job.sbatch"
LEAD_SECONDS = 120
RELAUNCHES = 10
_KEPT = re.compile(
    r"(SLURM|SBATCH|HPCTRAIN|HOROVOD|OMPI|PRTE|PMIX|NCCL|CUDA|ROCR?|HIP|OMP|MPI|UCX|FI|LMOD|MODULE|"
    r"CONDA|VIRTUAL_ENV|PYTHON|PATH|LD_LIBRARY_PATH|LOADEDMODULES|USER|HOSTNAME)"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)


@dataclass
class Request:
    """What is to be submitted.

    Attributes:
        name: The job's.
        train: The command of each rank, without ``--out`` and the like.
        options: Of sbatch; they win over the site's.
        site: Where.
        template: Its name.
        run: The run folder.
        launcher: Another than the site's.
        max_requeues: How often the job may be started again.
        signal: By which Slurm tells that time is up.
        blocks: More of the template's blocks.
    """

    name: str
    train: list[str]
    options: Options
    site: Site
    template: str
    run: Path
    launcher: Launcher | None = None
    max_requeues: int = 20
    signal: str = "USR1"
    blocks: dict[str, str] = field(default_factory=dict)

    def resolved(self) -> Options:
        """All options of sbatch: hpctrain's, the site's, and what was asked for."""
        array = self.template == "array"
        own: Options = {
            "job-name": self.name,
            "output": str(self.run / ("%x-%A_%a.out" if array else "%x-%j.out")),
            "open-mode": "append",
            "nodes": "1",
            "ntasks-per-node": "1",
            "time": "01:00:00",
        }
        if self.template == "scaling":
            own["no-requeue"] = ""
        else:
            own |= {"signal": f"B:{self.signal}@{LEAD_SECONDS}", "requeue": ""}
        if self.template == "elastic":
            own["no-kill"] = ""
        found = {**own, **self.site.sbatch(), **self.options}
        if "ntasks" in self.options and "ntasks-per-node" not in self.options:
            found.pop("ntasks-per-node")
        if self.site.gpus_by == "gres" and (count := found.pop("gpus-per-node", None)):
            found["gres"] = f"gpu:{count}"
        return found

    def script(self, made: str) -> str:
        """The batch script.

        Args:
            made: The command that makes it.

        Raises:
            Error: A value cannot stand in a script.
        """
        options = self.resolved()
        order = ("job-name", "output", "open-mode", "partition", "account", "nodes")
        first = {name: options.pop(name) for name in order if name in options}
        lines = [directive(name, value) for name, value in {**first, **options}.items()]
        made = " ".join(made.split())
        launch = self.site.launch(self.launcher, elastic=self.template == "elastic")
        blocks = {
            "made": f"# Made by hpctrain {__version__}: {made}",
            "options": "\n".join(lines),
            "site": self.site.prepare() or ":",
            "run": f"run={shlex.quote(str(self.run))}",
            "launch": f"launch=({launch})",
            "command": f"command=({shlex.join(self.train)})",
            **self.blocks,
        }
        if self.template not in ("array", "scaling"):
            job = f'hpctrain job --run "$run" --max-requeues {self.max_requeues}'
            more = f" --elastic --relaunches {RELAUNCHES}" if self.template == "elastic" else ""
            blocks["job"] = f"job=({job}{more})"
        return render(self.template, blocks)


def check(request: Request) -> None:
    """Refuse what the cluster could not run, or would let wait for ever.

    Raises:
        Error: So it is.
    """
    commands.fits(request.resolved())


def submit(request: Request, made: str, config: str) -> str:
    """Keep everything in the run folder, and queue the job.

    Args:
        request: What.
        made: The command given.
        config: The resolved configuration, as TOML.

    Returns:
        The job's number.

    Raises:
        Error: It cannot be written, or Slurm refuses it.
    """
    check(request)
    run = request.run
    script = run / SCRIPT
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_text(script, request.script(made))
        write_text(run / "config.toml", config)
    except OSError as error:
        raise Error(
            f"cannot write {run}: {error.strerror}.", hint="choose another --out."
        ) from error
    commands.would_start(script)
    number = commands.submit(script)
    about = {
        "job": number,
        "name": request.name,
        "made": made,
        "time": round(time.time(), 3),
        "folder": str(Path.cwd()),
        "git": git_state(),
        "environment": environment(os.environ),
    }
    write_text(run / SUBMISSION, json.dumps(about, indent=2) + "\n")
    return number


def git_state() -> dict[str, Any]:
    """The commit of the folder that the command was given in, and what was changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changes": git("diff", "HEAD").splitlines()}
    except (OSError, subprocess.SubprocessError):
        return {}


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter to a run; no secrets."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if _KEPT.match(name) and not _SECRET.search(name)
    }


def command_line(arguments: Iterable[str] | None = None) -> str:
    """The command that was given, as it could be typed."""
    return shlex.join(["hpctrain", *(sys.argv[1:] if arguments is None else arguments)])
