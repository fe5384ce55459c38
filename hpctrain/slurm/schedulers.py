"""Batch scripts for schedulers other than Slurm: their equivalents of sbatch's options.

From the manuals of PBS Professional (qsub), LSF (bsub) and Flux (flux-batch). Only scripts are
made: in such a job nobody starts the run again, and `hpctrain jobs` does not know it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hpctrain.errors import Error
from hpctrain.slurm import options
from hpctrain.slurm.options import Options

TEMPLATE = "unattended.sh"


@dataclass(frozen=True)
class Size:
    """The size of a job.

    Attributes:
        nodes: Number of nodes.
        tasks: Ranks per node.
        cores: Cores per rank; 0: the scheduler's default.
        gpus: GPUs per node.
    """

    nodes: int
    tasks: int
    cores: int
    gpus: int

    @property
    def places(self) -> dict[str, str]:
        """The placeholders of a site's launcher, with their values for this job."""
        return {
            "{nodes}": str(self.nodes),
            "{ranks}": str(self.nodes * self.tasks),
            "{ranks_per_node}": str(self.tasks),
            "{cores}": str(self.cores or 1),
        }


@dataclass(frozen=True)
class Scheduler:
    """The directives and the command of a scheduler.

    Attributes:
        prefix: The start of its directives in a script, such as ``#PBS``.
        names: Its options, by sbatch's name; ``{}`` stands for the value.
        time: Formats its option for a time limit in seconds.
        size: Formats its options for nodes, ranks, cores and GPUs.
        start: Lines of shell that come first in the script.
        submit: The command that submits a script.
    """

    prefix: str
    names: dict[str, str]
    time: Callable[[int], str]
    size: Callable[[Size], list[str]]
    start: str
    submit: str


def _clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _pbs(size: Size) -> list[str]:
    parts = [f"select={size.nodes}", f"mpiprocs={size.tasks}"]
    if size.cores:
        parts += [f"ncpus={size.tasks * size.cores}", f"ompthreads={size.cores}"]
    if size.gpus:
        parts.append(f"ngpus={size.gpus}")
    return ["-l " + ":".join(parts)]


def _lsf(size: Size) -> list[str]:
    lines = [f"-n {size.nodes * size.tasks}", f'-R "span[ptile={size.tasks}]"']
    return [*lines, f'-gpu "num={size.gpus}"'] if size.gpus else lines


def _flux(size: Size) -> list[str]:
    lines = [f"--nodes={size.nodes}", f"--nslots={size.nodes * size.tasks}"]
    if size.cores:
        lines.append(f"--cores-per-slot={size.cores}")
    if size.gpus:
        lines.append(f"--gpus-per-slot={max(1, size.gpus // size.tasks)}")
    return lines


SCHEDULERS = {
    "pbs": Scheduler(
        "#PBS",
        {"job-name": "-N {}", "partition": "-q {}", "account": "-A {}", "output": "-j oe -o {}"},
        lambda seconds: f"-l walltime={_clock(seconds)}",
        _pbs,
        'cd "$PBS_O_WORKDIR"',
        "qsub",
    ),
    "lsf": Scheduler(
        "#BSUB",
        {"job-name": "-J {}", "partition": "-q {}", "account": "-P {}", "output": "-o {}"},
        lambda seconds: f"-W {seconds // 3600}:{seconds // 60 % 60:02}",
        _lsf,
        'cd "$LS_SUBCWD"',
        "bsub <",
    ),
    "flux": Scheduler(
        "#flux:",
        {
            "job-name": "--job-name={}",
            "partition": "--queue={}",
            "account": "--bank={}",
            "output": "--output={}",
        },
        lambda seconds: f"--time-limit={-(-seconds // 60)}m",
        _flux,
        ":",
        "flux batch",
    ),
}


def size_of(asked: Options) -> Size:
    """Return the size of the job that these options of sbatch ask for.

    Raises:
        Error: They do not give a whole number of ranks per node.
    """
    nodes = asked.get("nodes", "1")
    tasks = asked.get("ntasks-per-node")
    if tasks is None and nodes.isdigit() and asked.get("ntasks", "").isdigit():
        whole, left = divmod(int(asked["ntasks"]), int(nodes))
        tasks = str(whole) if left == 0 else None
    if tasks is None or not (nodes.isdigit() and tasks.isdigit()):
        raise Error("how many ranks there are on each node is not said.",
                    hint="--nodes 2 --tasks-per-node 4.")  # fmt: skip
    gpus = asked.get("gpus-per-node", "").rpartition(":")[2]
    on_node = int(gpus) if gpus.isdigit() else options.gpus_of(asked.get("gres", ""))
    return Size(int(nodes), int(tasks), int(asked.get("cpus-per-task", "0")), on_node)


def directives(name: str, asked: Options, more: list[str]) -> list[str]:
    """Translate sbatch's options to the directives of another scheduler.

    Args:
        name: The scheduler's name in :data:`SCHEDULERS`.
        asked: The options of sbatch.
        more: Further directives in the scheduler's own notation. If one of them gives the job's
            size (``select=``, ``--nodes``, ...), the options do not.

    Returns:
        The lines of the script.

    Raises:
        Error: An option has no counterpart in that scheduler.
    """
    scheduler = SCHEDULERS[name]
    size = size_of(asked)
    lines = [scheduler.time(options.seconds(asked["time"]))] if "time" in asked else []
    own = ("select=", "--nodes", "-N ", "-nnodes", "span[")
    if not any(word in line for line in more for word in own):
        lines += scheduler.size(size)
    said = ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "gres", "time")
    for option, value in asked.items():
        if option in scheduler.names:
            options.directive(option, value)  # nothing that could end the line
            lines.append(scheduler.names[option].format(value))
        elif option not in said:
            raise Error(f"--{option} has no counterpart in {name}.", hint="say it in the site's "
                        "`directives`, as the scheduler has it.")  # fmt: skip
    for line in more:
        for place, text in size.places.items():
            line = line.replace(place, text)
        lines.append(line)
    return [f"{scheduler.prefix} {line}" for line in lines]
