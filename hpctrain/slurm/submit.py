"""Submitting a run: its batch script is rendered, checked, kept in the run folder, and queued."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain import __version__
from hpctrain.errors import Error, nearest
from hpctrain.files import write_text
from hpctrain.slurm import commands, jobs, options, schedulers
from hpctrain.slurm.options import Options, directive
from hpctrain.slurm.render import render
from hpctrain.slurm.requeue import CONTINUES
from hpctrain.slurm.site import Site
from hpctrain.slurm.supervise import SUBMISSION, catchable

SCRIPT = "job.sbatch"
RELAUNCHES = 10
KEPT = frozenset(
    """
    CONDA_DEFAULT_ENV CONDA_PREFIX CUDA_HOME CUDA_VISIBLE_DEVICES FI_PROVIDER GLOO_SOCKET_IFNAME
    HIP_VISIBLE_DEVICES HOSTNAME HPCTRAIN_CACHE HPCTRAIN_DATA HPCTRAIN_INTERFACE HPCTRAIN_SITE
    LD_LIBRARY_PATH LD_PRELOAD LOADEDMODULES MODULEPATH MPICH_GPU_SUPPORT_ENABLED NCCL_ALGO
    NCCL_DEBUG NCCL_IB_DISABLE NCCL_IB_HCA NCCL_NET_GDR_LEVEL NCCL_P2P_DISABLE NCCL_PROTO
    NCCL_SOCKET_IFNAME OMPI_MCA_btl OMPI_MCA_mpi_yield_when_idle OMPI_MCA_pml OMP_NUM_THREADS
    OMP_PLACES OMP_PROC_BIND PATH PMIX_MCA_psec PYTHONPATH ROCR_VISIBLE_DEVICES SLURM_CONF
    UCX_NET_DEVICES UCX_TLS USER VIRTUAL_ENV
    """.split()  # noqa: SIM905 - a list of them would be a page long
)
"""Environment variables that are recorded with a run; none of them holds secrets."""

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|PWD|CREDENTIAL|AUTH", re.IGNORECASE)
_GIVEN = re.compile(rf"(.*?(?:{_SECRET.pattern})[\w.-]*=).", re.IGNORECASE | re.DOTALL)
_SIGNAL = re.compile(r"(?:(?:[RB]+):)?(\w+)(?:@(\d{1,5}))?", re.ASCII)


@dataclass(frozen=True)
class Warn:
    """How Slurm warns a job that its time limit is near.

    Attributes:
        signal: The signal's name, without ``SIG``.
        seconds: How long before the limit it is sent.
    """

    signal: str = "USR1"
    seconds: int = 120

    @classmethod
    def parse(cls, text: str) -> Warn:
        """Parse a value of sbatch's ``--signal``: ``USR1``, ``USR1@300``, ``B:USR1@300``.

        Raises:
            Error: The value is invalid, or the signal cannot be caught.
        """
        found = _SIGNAL.fullmatch(text)
        if found is None:
            raise Error(f"--signal {text} is no signal.", hint="USR1@300: 300 s before the end.")
        name = catchable(found[1]).name.removeprefix("SIG")
        return cls(name, int(found[2]) if found[2] else cls.seconds)


@dataclass
class Request:
    """A run that is to be submitted.

    Attributes:
        name: The job's name.
        train: The command of each rank, without ``--out``, ``--resume`` and ``--world-size``.
        options: Options of sbatch; they win over the site's.
        site: The profile of the cluster.
        template: The name of the batch script's template.
        run: The run folder.
        launcher: A launcher to use instead of the site's.
        max_requeues: How often the job may be restarted.
        warn: The warning before the time limit; None: as the options or the site say.
        blocks: Further blocks of the template.
    """

    name: str
    train: list[str]
    options: Options
    site: Site
    template: str
    run: Path
    launcher: str | None = None
    max_requeues: int = 20
    warn: Warn | None = None
    blocks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        asked = options.merge(self.site.sbatch(), self.options)
        if self.warn is None:
            self.warn = Warn.parse(asked["signal"]) if "signal" in asked else Warn()
        if "chdir" in asked:  # the run folder and the log are where the command was given
            self.run = self.run.absolute()

    def resolved(self) -> Options:
        """Return all options of sbatch: hpctrain's defaults, the site's, and the user's.

        Raises:
            Error: They do not determine the number of ranks, or ask for a job array.
        """
        array = self.template == "array"
        folder = str(self.run).replace("%", "%%")
        own: Options = {
            "job-name": self.name,
            "output": f"{folder}/{'%x-%A_%a.out' if array else '%x-%j.out'}",
            "open-mode": "append",
            "nodes": "1",
            "ntasks-per-node": "1",
            "time": "01:00:00",
        }
        if self.template == "scaling":
            own["no-requeue"] = ""
        else:
            own["requeue"] = ""
        if self.template == "elastic":
            own["no-kill"] = ""
        site = self.site.sbatch()
        if options.merge({}, self.options).keys() & {*options.FAMILIES[1]} or options.gpus_of(
            self.options.get("gres", "")
        ):  # a rank for each of those GPUs then
            site = {name: value for name, value in site.items() if name not in options.FAMILIES[0]}
        asked = options.merge(site, self.options)
        if "array" in asked and not array:
            raise Error("each task of an --array would train in the same folder.",
                        hint="`hpctrain sweep` is for many runs.")  # fmt: skip
        asked.pop("signal", None)
        more = options.ranks(asked)
        if (
            "ntasks" in {**asked, **more}
            and "ntasks-per-node" not in asked
            and "nodes" not in asked
        ):
            del own["nodes"]
        found = options.merge(own, asked, more)
        if self.template != "scaling" and self.warn is not None:
            found["signal"] = f"B:{self.warn.signal}@{self.warn.seconds}"
        if self.site.gpus_by == "gres" and (count := found.pop("gpus-per-node", None)):
            found["gres"] = ",".join(filter(None, [f"gpu:{count}", found.get("gres")]))
        if "export" in found:
            found["export"] = _names(found["export"])
        return found

    def environment(self) -> dict[str, str]:
        """Return the environment of sbatch.

        The values that ``--export`` gives are in it, as nobody else can read them there.
        """
        given = options.merge(self.site.sbatch(), self.options).get("export", "")
        values = [each.partition("=")[::2] for each in given.split(",") if "=" in each]
        gone = (CONTINUES, "HPCTRAIN_RUN", "SLURM_RESTART_COUNT", "SBATCH_ARRAY_INX")
        kept = {name: value for name, value in os.environ.items() if name not in gone}
        return {**kept, **dict(values)}

    def script(self, made: str) -> str:
        """Render the batch script.

        Args:
            made: The command line to name as the script's origin.

        Raises:
            Error: A value cannot be written in a batch script.
        """
        if self.site.scheduler != "slurm":
            return self._unattended(made)
        asked = self.resolved()
        order = ("job-name", "output", "open-mode", "partition", "account", "nodes")
        first = {name: asked.pop(name) for name in order if name in asked}
        lines = [directive(name, value) for name, value in {**first, **asked}.items()]
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
        if self.template != "scaling":
            looks_after = "trial" if self.template == "array" else "job --run"
            job = f'hpctrain {looks_after} "$run" --max-requeues {self.max_requeues}'
            if self.warn is not None and self.warn.signal != "USR1":
                job += f" --signal {self.warn.signal}"
            more = f" --elastic --relaunches {RELAUNCHES}" if self.template == "elastic" else ""
            blocks["job"] = f"job=({job}{more})"
            if self.warn is not None:
                blocks["signal"] = f"trap '' {self.warn.signal}"
        return render(self.template, blocks)

    def _unattended(self, made: str) -> str:
        """Render the batch script for a scheduler other than Slurm."""
        if self.template not in ("train", "stage", "parameter-server"):
            raise Error(f"{self.template} jobs are for Slurm alone.", hint="this site has another.")
        asked = self.resolved()
        for name in ("open-mode", "requeue", "no-requeue", "signal"):
            asked.pop(name, None)
        asked["output"] = f"{self.run.name}.out"  # nobody makes the run folder before the run
        size = schedulers.size_of(asked)
        lines = schedulers.directives(self.site.scheduler, asked, self.site.directives)
        start = schedulers.SCHEDULERS[self.site.scheduler].start
        world = str(size.nodes * size.tasks)
        blocks = {
            "made": f"# Made by hpctrain {__version__}: {' '.join(made.split())}",
            "options": "\n".join(lines),
            "site": "\n".join(filter(None, [start, self.site.prepare()])),
            "run": f"run={shlex.quote(str(self.run))}",
            "launch": f"launch=({self.site.launch(self.launcher, places=size.places)})",
            "command": f"command=({shlex.join([*self.train, '--world-size', world])})",
        }
        return render(schedulers.TEMPLATE, blocks)


def check(request: Request, made: str) -> str:
    """Check that the cluster could run a job, without submitting it.

    Args:
        request: The run.
        made: The command line that was given.

    Returns:
        When Slurm would start the job, in its words.

    Raises:
        Error: Slurm would refuse the job or leave it pending for ever, or is not the scheduler.
    """
    scheduler = request.site.scheduler
    if scheduler != "slurm":
        command = schedulers.SCHEDULERS[scheduler].submit
        raise Error(f"this site's scheduler is {scheduler}, not Slurm.",
                    hint=f"--dry-run prints the script, for `{command} FILE`.")  # fmt: skip
    asked = request.resolved()
    commands.fits(asked)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / SCRIPT
        write_text(script, request.script(made), private=True)
        try:
            return commands.would_start(script, request.environment())
        except commands.Unanswered:
            raise
        except Error as error:
            wanted, there = asked.get("partition"), commands.partitions()
            if wanted and "partition" in error.message and wanted not in there:
                raise Error(
                    f"there is no partition {wanted!r}.", hint=nearest(wanted, there)
                ) from error
            raise


def submit(request: Request, made: str, config: str, *, keep_diff: bool = False) -> str:
    """Write the script and the configuration to the run folder, and queue the job.

    Args:
        request: The run.
        made: The command line that was given.
        config: The resolved configuration, as TOML.
        keep_diff: Whether to record uncommitted changes, as a diff.

    Returns:
        The job ID.

    Raises:
        Error: The folder cannot be written or belongs to another job, or Slurm refuses the job.
    """
    _free(request.run)
    check(request, made)
    run = request.run
    script = run / SCRIPT
    try:
        log = _log(request)
        run.mkdir(parents=True, exist_ok=True)
        write_text(script, request.script(made), private=True)
        write_text(run / "config.toml", config)
    except OSError as error:
        raise Error(
            f"cannot write {error.filename or run}: {error.strerror}.", hint="choose another --out."
        ) from error
    try:
        number = commands.submit(script, environment=request.environment())
    except commands.Unanswered as error:
        raise Error(f"{error.message} The job may have been submitted, or not.",
                    hint="`squeue --me` shows it in a while.") from error  # fmt: skip
    about = {
        "job": number,
        "name": request.name,
        "made": made,
        "time": round(time.time(), 3),
        "folder": str(Path.cwd()),
        "log": str(log),
        "git": git_state(keep_diff),
        "environment": environment(os.environ),
    }
    write_text(run / SUBMISSION, json.dumps(about, indent=2) + "\n", private=True)
    return number


def _free(run: Path) -> None:
    """Check that no job that is not over owns a run folder; else raise an error."""
    for before in jobs.find(run):
        if before.run == run:
            state = commands.states([before.job]).get(before.job)
            if state is not None and not state.over:
                raise Error(f"{run} is that of job {before.job}, which is {state.name}.",
                            hint="choose another --out, or `hpctrain jobs cancel` it.")  # fmt: skip


def _log(request: Request) -> Path:
    """Return the path of a job's log, with Slurm's patterns, and make its folder.

    Slurm itself makes no folders.

    Raises:
        Error: The folder's name contains a pattern, or ``--chdir`` names no folder.
        OSError: The folder cannot be made.
    """
    asked = request.resolved()
    here = Path(asked.get("chdir", ".")).expanduser()
    if not here.is_dir():
        raise Error(f"--chdir {here}: there is no such folder.", hint="make it first.")
    for name in ("output", "error"):
        if name not in asked or asked[name] in ("none", "/dev/null"):
            continue
        path = here / asked[name]
        parent = str(path.parent)
        if "%" in parent.replace("%%", ""):
            raise Error(f"--{name} {asked[name]}: Slurm makes no folders.",
                        hint="patterns such as %j can stand in the file's name.")  # fmt: skip
        Path(parent.replace("%%", "%")).mkdir(parents=True, exist_ok=True)
    return (here / asked["output"]).absolute()


def git_state(keep_diff: bool = False) -> dict[str, Any]:
    """Return the git commit of the current folder, and whether there are uncommitted changes.

    Args:
        keep_diff: Whether to add the changes themselves.

    Returns:
        ``commit``, ``changed`` and perhaps ``changes``; empty outside a repository.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=30, check=True,
            errors="replace",
        )  # fmt: skip
        return done.stdout.strip()

    try:
        changes = git("diff", "--no-ext-diff", "--no-textconv", "HEAD").splitlines()
        about = {"commit": git("rev-parse", "HEAD"), "changed": bool(changes)}
        return {**about, "changes": changes} if keep_diff else about
    except (OSError, subprocess.SubprocessError):
        return {}


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Select the variables that are recorded with a run: those in :data:`KEPT`."""
    return {name: value for name, value in sorted(variables.items()) if name in KEPT}


def _names(export: str) -> str:
    """Strip the values from an ``--export``; they are passed in sbatch's environment."""
    return ",".join(each.partition("=")[0] for each in export.split(","))


def command_line(arguments: Iterable[str] | None = None) -> str:
    """Return a command line of hpctrain, quoted for a shell, with secrets left out.

    Args:
        arguments: Its arguments; None: those of this process.
    """
    words = ["hpctrain"]
    exported = False
    for word in sys.argv[1:] if arguments is None else arguments:
        name, equals, value = word.partition("=")
        if exported or name == "--export":
            word = _names(word) if exported else "=".join([name, _names(value)][: 1 + len(equals)])
        elif found := _GIVEN.match(word):
            word = f"{found[1]}..."
        exported = name == "--export" and not equals
        words.append(word)
    return shlex.join(words)
