"""Slurm's own commands: called without a shell, bounded in time, their complaints passed on."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpctrain import process
from hpctrain.errors import Error, nearest
from hpctrain.slurm import options

TIMEOUT_SECONDS = 60.0
RUNNING = frozenset({"CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED"})
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
NO_SLURM = "log in to the cluster, or load its module; `hpctrain submit --dry-run` needs none."


@dataclass(frozen=True)
class State:
    """What Slurm says of a job.

    Attributes:
        name: ``RUNNING``, ``PENDING``, ``COMPLETED``, ``NODE_FAIL``, ...
        reason: Why it waits, or the nodes it has.
        seconds_left: Of its time limit; None where that is not known.
    """

    name: str
    reason: str = ""
    left: str = ""

    @property
    def over(self) -> bool:
        """Whether it will not run any more."""
        return self.name not in RUNNING | WAITING


def call(
    program: str,
    *arguments: str,
    timeout_seconds: float = TIMEOUT_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What one of Slurm's commands prints.

    Raises:
        Error: It is not there, or it fails; with what it says.
    """
    if process.which(program) is None:
        raise Error(f"{program} is not on PATH: no Slurm here.", hint=NO_SLURM)
    result = process.run([program, *arguments], timeout_seconds=timeout_seconds, env=environment)
    if result.returncode != 0:
        said = [line for line in result.stdout.splitlines() if line.strip()]
        # sbatch ends its complaints with the one that says least.
        text = "; ".join(line.removeprefix(f"{program}: ") for line in said[:3]) or "no word"
        raise Error(
            f"{program} refuses: {text} (exit code {result.returncode}).",
            hint="`sinfo` shows what the cluster has; an administrator knows its limits.",
        )
    return result.stdout


def submit(script: Path) -> str:
    """Submit a batch script; the job's number."""
    return call("sbatch", "--parsable", str(script)).strip().splitlines()[-1].partition(";")[0]


def would_start(script: Path) -> str:
    """When Slurm would start a batch script.

    Raises:
        Error: Never, and why.
    """
    said = call("sbatch", "--test-only", str(script)).strip()
    return said.splitlines()[-1].removeprefix("sbatch: ")


def requeue(job: str) -> None:
    """Put a running job back into the queue."""
    call("scontrol", "requeue", job)


def cancel(job: str) -> None:
    """End a job."""
    call("scancel", job)


def fits(asked: options.Options) -> None:
    """Check nodes and time against the partition: Slurm would let such a job wait for ever.

    Raises:
        Error: The partition is unknown, or has less than is asked for.
    """
    lines = call("sinfo", "--noheader", "--format=%R|%D|%l|%P").split("\n")
    rows = [line.split("|") for line in lines if line.count("|") == 3]
    partitions: dict[str, tuple[int, str]] = {}
    for name, count, limit, _ in rows:  # a line for each kind of nodes
        partitions[name] = (partitions.get(name, (0, ""))[0] + int(count), limit)
    default = next((name for name, _, _, shown in rows if shown.endswith("*")), None)
    wanted = asked.get("partition", default)
    if wanted is None or "," in wanted:
        return
    if wanted not in partitions:
        raise Error(f"there is no partition {wanted!r}.", hint=nearest(wanted, partitions))
    present, limit = partitions[wanted]
    nodes = re.match(r"\d+", asked.get("nodes", "1"))
    if nodes and int(nodes[0]) > present:
        raise Error(
            f"{nodes[0]} nodes: partition {wanted} has {present}.",
            hint="ask for fewer --nodes, or another --partition.",
        )
    allowed = None if limit in ("infinite", "n/a") else options.seconds(limit)
    if "time" in asked and allowed is not None and options.seconds(asked["time"]) > allowed:
        raise Error(
            f"--time {asked['time']}: partition {wanted} allows {limit}.",
            hint="ask for less: a run that is not done then is gone on with by itself.",
        )


def states(jobs: Iterable[str]) -> dict[str, State]:
    """What Slurm says of jobs, in one question for all; those it has forgotten are left out.

    Asked is squeue, and of those that it does not know (any more) sacct; or scontrol alone.

    Raises:
        Error: There is none of these.
    """
    wanted = {job for job in jobs if job}
    if not wanted:
        return {}
    found: dict[str, State] = {}
    asked = False
    for ask in (_squeue, _sacct, _scontrol):
        if wanted <= set(found):
            break
        try:
            answer = ask(wanted - set(found))
            asked = True
        except Error:
            continue
        found |= {job: state for job, state in answer.items() if job in wanted}
    if not asked:
        raise Error("neither squeue nor sacct nor scontrol answers.", hint=NO_SLURM)
    return found


def _squeue(jobs: set[str]) -> dict[str, State]:
    user = getpass.getuser()
    form = "--Format=JobID:|,ArrayJobID:|,ArrayTaskID:|,State:|,Reason:|,NodeList:|,TimeLeft:"
    found = {}
    for line in call(
        "squeue", "--noheader", "--array", "--states=all", f"--user={user}", form
    ).splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) == 7:
            number, array, task, name, reason, nodes, left = fields
            state = State(name, nodes or reason, left)
            found[number] = state
            if task.isdigit():
                found[f"{array}_{task}"] = state
    return found


def _sacct(jobs: set[str]) -> dict[str, State]:
    lines = call(
        "sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,NodeList",
        "--jobs", ",".join(sorted(jobs)),
    ).splitlines()  # fmt: skip
    found = {}
    for line in lines:
        number, name, nodes = [*line.split("|"), "", ""][:3]
        found[number] = State(name.partition(" ")[0].rstrip("+"), nodes)  # CANCELLED by 1000
    return found


def _scontrol(jobs: set[str]) -> dict[str, State]:
    found = {}
    for line in call("scontrol", "--oneliner", "show", "job").splitlines():
        fields = dict(part.partition("=")[::2] for part in line.split())
        if "JobId" in fields:
            state = State(fields.get("JobState", ""), fields.get("NodeList", ""))
            found[fields["JobId"]] = state
            if "ArrayTaskId" in fields:
                found[f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"] = state
    return found


def node_is_up(name: str) -> bool:
    """Whether Slurm counts a node among those that work, as far as it can be asked."""
    try:
        state = call("sinfo", "--noheader", f"--nodes={name}", "--format=%T").split()
    except Error:
        return True
    return not any(re.search(r"down|drain|fail|\*$", each) for each in state)


def this_job() -> str:
    """The number of the job that this process is part of, as requeue and cancel take it.

    Raises:
        Error: There is none.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise Error("this is no Slurm job.", hint="submit it by sbatch, or `hpctrain submit`.")
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
