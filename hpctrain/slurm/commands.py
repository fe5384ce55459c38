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
    """The state of a job, as Slurm reports it.

    Attributes:
        name: ``RUNNING``, ``PENDING``, ``COMPLETED``, ``NODE_FAIL``, ...
        reason: Why the job is pending, or the nodes it runs on.
        left: What is left of its time limit, in Slurm's notation.
        restarts: How often Slurm has restarted the job; only :func:`look` asks for this.
    """

    name: str
    reason: str = ""
    left: str = ""
    restarts: int = 0

    @property
    def over(self) -> bool:
        """Whether the job has ended for good."""
        return self.name not in RUNNING | WAITING


def call(
    program: str,
    *arguments: str,
    timeout_seconds: float = TIMEOUT_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run one of Slurm's commands and return what it prints.

    Args:
        program: The command, such as ``squeue``.
        arguments: Its arguments.
        timeout_seconds: The longest the command may take.
        environment: The command's environment; None: this process's.

    Returns:
        Its standard output and standard error.

    Raises:
        Unanswered: Slurm did not answer, so the request may or may not have been carried out.
        Error: The command is not installed, or it fails; the message quotes what it says.
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
    """Return whether srun's output shows that Slurm did not answer and so nothing was started."""
    began = re.search("unable to (confirm allocation|allocate|create step)", words, re.IGNORECASE)
    return began is not None and _SILENCE.search(words) is not None


def expired(words: str) -> bool:
    """Return whether srun's output shows that a node took a step's credential for expired.

    They are valid for a time that the site sets (``cred_expire``), and a busy node may take longer.
    """
    return re.search("credential expired", words, re.IGNORECASE) is not None


def checked(job: str) -> str:
    """Return a job ID unchanged if it is valid: ``12``, ``12_3`` or ``12;cluster``.

    Job IDs may come from files that others wrote, and end up in Slurm's command lines.

    Raises:
        Error: It is not a job ID.
    """
    if not _JOB.fullmatch(job):
        raise Error(f"{job[:40]!r} is no number of a job.", hint="such as 1234, or 1234_5.")
    return job


def _aimed(job: str) -> tuple[str, list[str]]:
    """Split a job ID into its number and the option that selects its cluster."""
    number, _, cluster = checked(job).partition(";")
    return number, [f"--clusters={cluster}"] if cluster else []


def submit(script: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Submit a batch script.

    Args:
        script: The script's path.
        arguments: Further arguments of sbatch.
        environment: The job's environment; None: this process's.

    Returns:
        The job ID, followed by ``;cluster`` if the job went to another cluster.

    Raises:
        Unanswered: Slurm did not answer; the job may have been submitted.
        Error: Slurm refuses the job.
    """
    said = call("sbatch", "--parsable", *arguments, str(script), environment=environment)
    return checked(said.strip().splitlines()[-1].strip())


def would_start(script: Path, environment: Mapping[str, str] | None = None) -> str:
    """Ask Slurm when it would start a batch script, without submitting it.

    Args:
        script: The script's path.
        environment: The job's environment; None: this process's.

    Returns:
        Slurm's estimate, as one line.

    Raises:
        Error: Slurm would not accept the job; the message says why.
    """
    said = call("sbatch", "--test-only", str(script), environment=environment).strip()
    return said.splitlines()[-1].removeprefix("sbatch: ") if said else "Slurm would take it"


def requeue(job: str) -> None:
    """Put a running job back into the queue.

    Raises:
        Unanswered: Slurm did not answer; the job may be requeued now or later.
        Error: Slurm refuses to requeue the job.
    """
    number, where = _aimed(job)
    call("scontrol", *where, "--", "requeue", number)


def cancel(job: str) -> None:
    """Cancel a job.

    Raises:
        Error: The job cannot be cancelled, or this is not a job ID.
    """
    number, where = _aimed(job)
    call("scancel", *where, "--", number)


def look(job: str) -> State | None:
    """Return the state of one job according to scontrol; None if Slurm does not know the job.

    Raises:
        Error: Slurm does not answer, or refuses this question.
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
    """Return the IDs of this user's jobs that depend on the end of a job (``afterany``).

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
    """Return the names of all partitions, hidden ones included.

    Raises:
        Error: Slurm does not answer.
    """
    return sorted(set(call("sinfo", "--all", "--noheader", "--format=%R").split()))


def fits(asked: options.Options) -> None:
    """Check the requested nodes and time against the partition's limits.

    Slurm accepts jobs that exceed them and leaves them pending for ever. What sinfo does not show
    (other clusters, partitions that this user may not see) is left to sbatch to refuse.

    Raises:
        Error: The partition has fewer nodes, or a shorter time limit, than requested.
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
    """Return the states of jobs, by job ID, with one query for all of them.

    squeue is asked first; sacct and then scontrol are asked about the jobs that squeue does not
    know or no longer remembers. Jobs that none of them knows are left out.

    Raises:
        Unanswered: None of these commands gets an answer at the moment.
        Error: None of these commands is installed.
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
    """Return the fields of a line of ``scontrol show``.

    Where a name occurs twice the first one counts: later ones may be part of a value.
    """
    found: dict[str, str] = {}
    for part in line.split():
        name, equals, value = part.partition("=")
        if equals:
            found.setdefault(name, value)
    return found


def node_is_up(name: str) -> bool:
    """Return whether Slurm considers a node usable; True if Slurm cannot be asked."""
    try:
        state = call("sinfo", "--noheader", f"--nodes={name}", "--format=%T").split()
    except Error:
        return True
    return not any(re.search(r"down|drain|fail|\*$", each) for each in state)


def this_job() -> str:
    """Return the ID of the job that this process belongs to, as requeue and cancel take it.

    Raises:
        Error: This process is not part of a Slurm job.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise Error("this is no Slurm job.", hint="submit it by sbatch, or `hpctrain submit`.")
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
