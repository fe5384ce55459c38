"""Slurm's own commands: called without a shell, bounded in time, their complaints passed on."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpctrain import process
from hpctrain.errors import Error
from hpctrain.slurm import options

TIMEOUT_SECONDS = 60.0
RUNNING = frozenset({"CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED"})
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
NO_SLURM = "log in to the cluster, or load its module; `hpctrain submit --dry-run` needs none."
_JOB = re.compile(r"\d{1,18}(?:_\d{1,18})?(?:;[\w.-]{1,255})?", re.ASCII)
# Slurm's words for that no answer came, as in its src/common/slurm_errno.c.
_SILENCE = re.compile(
    "unable to contact slurm controller|socket timed out|zero bytes were transmitted"
    "|connection refused|connection timed out|connection reset|no route to host"
    "|transport endpoint is not connected|(?:communication|message) [a-z]+ failure"
    "|unexpected message received|controller in standby mode|temporarily unable to accept"
    "|resource temporarily unavailable",
    re.IGNORECASE,
)


class Unanswered(Error):  # noqa: N818 - of what was asked for, nobody knows whether it was done
    """Slurm gave no answer, or none that came: what was asked for may be done, now or later."""


@dataclass(frozen=True)
class State:
    """What Slurm says of a job.

    Attributes:
        name: ``RUNNING``, ``PENDING``, ``COMPLETED``, ``NODE_FAIL``, ...
        reason: Why it waits, or the nodes it has.
        left: Of its time limit, as Slurm writes it.
        restarts: How often Slurm has started it again, where that was asked for.
    """

    name: str
    reason: str = ""
    left: str = ""
    restarts: int = 0

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

    Args:
        program: Which one.
        arguments: For it.
        timeout_seconds: So long it may take.
        environment: Instead of this process's.

    Raises:
        Unanswered: It cannot tell whether it was heard.
        Error: It is not there, or it fails; with what it says.
    """
    if process.which(program) is None:
        raise Error(f"{program} is not on PATH: no Slurm here.", hint=NO_SLURM)
    result = process.run([program, *arguments], timeout_seconds=timeout_seconds, env=environment)
    if result.returncode == 0:
        return result.stdout
    said = [line for line in result.stdout.splitlines() if line.strip()]
    # sbatch ends its complaints with the one that says least.
    text = "; ".join(line.removeprefix(f"{program}: ") for line in said[:3]) or "no word"
    if result.returncode == 124:
        text = f"no answer within {timeout_seconds:.0f} s"
    elif result.returncode < 0:
        text = f"it was ended by signal {-result.returncode}"
    elif not _SILENCE.search(result.stdout):
        raise Error(
            f"{program} refuses: {text} (exit code {result.returncode}).",
            hint="`sinfo` shows what the cluster has; an administrator knows its limits.",
        )
    raise Unanswered(f"{program}: Slurm does not answer: {text}.", hint="it may in a while.")


def not_started(words: str) -> bool:
    """Whether srun has started nothing because Slurm did not answer, by what it says."""
    began = re.search("unable to (confirm allocation|allocate|create step)", words, re.IGNORECASE)
    return began is not None and _SILENCE.search(words) is not None


def checked(job: str) -> str:
    """A job's number, as ``12``, ``12_3`` or ``12;cluster``; it may come from anybody's file.

    Raises:
        Error: It is not one.
    """
    if not _JOB.fullmatch(job):
        raise Error(f"{job[:40]!r} is no number of a job.", hint="such as 1234, or 1234_5.")
    return job


def _aimed(job: str) -> tuple[str, list[str]]:
    """A job's number, and the option that says on which cluster."""
    number, _, cluster = checked(job).partition(";")
    return number, [f"--clusters={cluster}"] if cluster else []


def submit(script: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Submit a batch script.

    Args:
        script: Which one.
        arguments: More of sbatch's.
        environment: Of the job, instead of this process's.

    Returns:
        The job's number, with ``;cluster`` where it was sent to another one.

    Raises:
        Unanswered: It may be submitted.
        Error: Slurm refuses it.
    """
    said = call("sbatch", "--parsable", *arguments, str(script), environment=environment)
    return checked(said.strip().splitlines()[-1].strip())


def would_start(script: Path, environment: Mapping[str, str] | None = None) -> str:
    """When Slurm would start a batch script.

    Args:
        script: Which one.
        environment: Of the job, instead of this process's.

    Raises:
        Error: Never, and why.
    """
    said = call("sbatch", "--test-only", str(script), environment=environment).strip()
    return said.splitlines()[-1].removeprefix("sbatch: ") if said else "Slurm would take it"


def requeue(job: str) -> None:
    """Put a running job back into the queue.

    Raises:
        Unanswered: That may be done.
        Error: Slurm refuses it.
    """
    number, where = _aimed(job)
    call("scontrol", *where, "--", "requeue", number)


def cancel(job: str) -> None:
    """End a job.

    Raises:
        Error: That cannot be done, or it is no job's number.
    """
    number, where = _aimed(job)
    call("scancel", *where, "--", number)


def look(job: str) -> State | None:
    """What scontrol says of one job; None where Slurm knows none of that number.

    Raises:
        Error: Slurm does not answer, or not to this.
    """
    number, where = _aimed(job)
    try:
        said = call("scontrol", *where, "--oneliner", "--", "show", "job", number)
    except Unanswered:
        raise
    except Error as error:
        if "invalid job id" in error.message.lower():
            return None
        raise
    for line in said.splitlines():
        fields = _fields(line)
        if "JobState" in fields:
            restarts = fields.get("Restarts", "0")
            return State(fields["JobState"], fields.get("NodeList", ""), "",
                         int(restarts) if restarts.isdigit() else 0)  # fmt: skip
    return None


def depending_on(job: str) -> list[str]:
    """This user's jobs that wait for the end of one.

    Raises:
        Error: Slurm does not answer.
    """
    lines = call(
        "squeue", "--noheader", f"--user={getpass.getuser()}", "--states=all",
        "--Format=JobID:|,Dependency:",
    ).splitlines()  # fmt: skip
    wanted = re.compile(rf"\bafterany:{re.escape(job)}(?![\d_])")
    found = [line.split("|", 1) for line in lines if line.count("|") == 1]
    return [number.strip() for number, after in found if wanted.search(after)]


def partitions() -> list[str]:
    """Names of the partitions, hidden ones too.

    Raises:
        Error: Slurm does not answer.
    """
    return sorted(set(call("sinfo", "--all", "--noheader", "--format=%R").split()))


def fits(asked: options.Options) -> None:
    """Check nodes and time against the partition: Slurm would let such a job wait for ever.

    What sinfo does not show (other clusters, partitions that are kept from it) is sbatch's to
    refuse.

    Raises:
        Error: The partition has less than is asked for.
    """
    if {"clusters", "cluster-constraint"} & asked.keys():
        return
    lines = call("sinfo", "--all", "--noheader", "--format=%R|%D|%l|%P").split("\n")
    rows = [line.split("|") for line in lines if line.count("|") == 3]
    found: dict[str, tuple[int, str]] = {}
    for name, count, limit, _ in rows:  # a line for each kind of nodes
        found[name] = (found.get(name, (0, ""))[0] + int(count), limit)
    default = next((name for name, _, _, shown in rows if shown.endswith("*")), None)
    wanted = asked.get("partition", default)
    if wanted not in found:
        return
    present, limit = found[wanted]
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
        Unanswered: None of these answers now.
        Error: There is none of these.
    """
    wanted = {checked(job) for job in jobs if job}
    found: dict[str, State] = {}
    for cluster in sorted({job.partition(";")[2] for job in wanted}):
        here = {job.partition(";")[0] for job in wanted if job.partition(";")[2] == cluster}
        where = [f"--clusters={cluster}"] if cluster else []
        end = f";{cluster}" if cluster else ""
        found |= {job + end: state for job, state in _states(here, where).items()}
    return found


def _states(wanted: set[str], where: list[str]) -> dict[str, State]:
    found: dict[str, State] = {}
    asked, silent = False, None
    for ask in (_squeue, _sacct, _scontrol):
        if wanted <= set(found):
            break
        try:
            answer = ask(wanted - set(found), where)
            asked = True
        except Unanswered as error:
            silent = error
            continue
        except Error:
            continue
        found |= {job: state for job, state in answer.items() if job in wanted}
    if not asked and silent is not None:
        raise Unanswered(
            f"neither squeue nor sacct nor scontrol answers: {silent.message}", hint=silent.hint
        )
    if not asked:
        raise Error("neither squeue nor sacct nor scontrol answers.", hint=NO_SLURM)
    return found


def _squeue(jobs: set[str], where: list[str]) -> dict[str, State]:
    user = getpass.getuser()
    form = "--Format=JobID:|,ArrayJobID:|,ArrayTaskID:|,State:|,Reason:|,NodeList:|,TimeLeft:"
    found = {}
    for line in call(
        "squeue", *where, "--noheader", "--array", "--states=all", f"--user={user}", form
    ).splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) == 7:
            number, array, task, name, reason, nodes, left = fields
            state = State(name, nodes or reason, left)
            found[number] = state
            if task.isdigit():
                found[f"{array}_{task}"] = state
    return found


def _sacct(jobs: set[str], where: list[str]) -> dict[str, State]:
    lines = call(
        "sacct", *where, "--noheader", "--parsable2", "--allocations",
        "--format=JobID,State,NodeList", "--jobs", ",".join(sorted(jobs)),
    ).splitlines()  # fmt: skip
    found = {}
    for line in lines:
        number, name, nodes = [*line.split("|"), "", ""][:3]
        found[number] = State(name.partition(" ")[0].rstrip("+"), nodes)  # CANCELLED by 1000
    return found


def _scontrol(jobs: set[str], where: list[str]) -> dict[str, State]:
    found = {}
    for line in call("scontrol", *where, "--oneliner", "show", "job").splitlines():
        fields = _fields(line)
        if "JobId" in fields:
            state = State(fields.get("JobState", ""), fields.get("NodeList", ""))
            found[fields["JobId"]] = state
            if "ArrayTaskId" in fields:
                found[f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"] = state
    return found


def _fields(line: str) -> dict[str, str]:
    """The fields of a line of ``scontrol show``; the first of a name, for values may hold more."""
    found: dict[str, str] = {}
    for part in line.split():
        name, equals, value = part.partition("=")
        if equals:
            found.setdefault(name, value)
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
