"""The root cause of a failed job, from what its ranks noted and what the launcher said."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

from hpctrain.world.failure_record import Failure, read_notes

Match = re.Match[str]


def _signalled(name: str, **where: str | int | None) -> Failure:
    found = {"killed": "KILL", "segmentation fault": "SEGV", "terminated": "TERM",
             "aborted": "ABRT", "bus error": "BUS", "user defined signal 1": "USR1"}  # fmt: skip
    short = found.get(name.lower(), name.upper().removeprefix("SIG"))
    number = int(short) if short.isdigit() else int(signal.Signals[f"SIG{short}"])
    told = signal.Signals(number).name
    hint = " (out of memory?)" if told == "SIGKILL" else ""
    rank, host = where.get("rank"), where.get("host")
    return Failure(
        told, f"the process was killed{hint}", int(rank) if rank is not None else None,
        str(host) if host is not None else None, 128 + number,
    )  # fmt: skip


_DEATHS = r"Killed|Segmentation fault|Terminated|Aborted|Bus error|User defined signal 1"
_PATTERNS: list[tuple[str, Callable[[Match], Failure]]] = [
    (  # Slurm with cgroups
        r"error: Detected \d+ oom.kill event",
        lambda m: Failure("out of memory", "Slurm killed a process; ask for more --mem", None,
                          None, 137),
    ),
    (
        r"srun: error: (?P<host>\S+): tasks? (?P<rank>\d+)\S*: Out Of Memory",
        lambda m: Failure("out of memory", "Slurm killed the process; ask for more --mem",
                          int(m["rank"]), m["host"], 137),
    ),
    (  # such as with --export=NONE, which leaves no PATH
        r"slurmstepd\S*: error: execve\(\): (?P<words>[^\n]+)",
        lambda m: Failure("cannot start", f"{m['words']}. HINT: it is to be on PATH there; after "
                          "--export=NONE, `unset SLURM_EXPORT_ENV`.", None, None, 2),
    ),
    (
        r"srun: error: Node failure on (?P<host>\S+)",
        lambda m: Failure("node lost", f"Slurm lost node {m['host']}", None, m["host"], 1),
    ),
    (
        rf"srun: error: (?P<host>\S+): tasks? (?P<rank>\d+)\S*: (?P<how>{_DEATHS})",
        lambda m: _signalled(m["how"], rank=m["rank"], host=m["host"]),
    ),
    (
        r"srun: error: (?P<host>\S+): tasks? (?P<rank>\d+)\S*: Exited with exit code (?P<code>\d+)",
        lambda m: Failure("exit code", "", int(m["rank"]), m["host"], int(m["code"])),
    ),
    (  # Open MPI 4 and 5
        r"noticed that process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+) exited on "
        r"signal (?P<number>\d+)",
        lambda m: _signalled(m["number"], rank=m["rank"], host=m["host"]),
    ),
    (
        r"(?:lost communication|lost connection|daemon .* unexpectedly|unable to reach) .*?"
        r"(?:node|host|to) (?P<host>[\w.-]+)",
        lambda m: Failure("node lost", f"mpirun lost {m['host']}", None, m["host"], 1),
    ),
    (
        r"Process name: \[?[^\],]*?,?(?P<rank>\d+)\]?\s+Exit code: (?P<code>\d+)",
        lambda m: Failure("exit code", "", int(m["rank"]), None, int(m["code"])),
    ),
    (  # Open MPI 5, when a rank is gone before mpirun has noticed
        r"peer process has unexpectedly disconnected.{1,900}?Peer host: (?P<host>\S+)",
        lambda m: Failure("rank lost", "a rank there was killed (out of memory?)", None, m["host"],
                          137),
    ),
    (  # horovodrun
        r"Process (?P<rank>\d+) exit with status code (?P<code>\d+)",
        lambda m: _code(int(m["code"]), int(m["rank"])),
    ),
]  # fmt: skip
# Launchers break their lines anywhere.
_COMPILED = [
    (re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE | re.DOTALL), make)
    for pattern, make in _PATTERNS
]


def _code(code: int, rank: int | None) -> Failure:
    if code > 128 and code - 128 in set(signal.Signals):
        return _signalled(str(code - 128), rank=rank)
    return Failure("exit code", "", rank, None, code)


def said(output: str) -> Failure | None:
    """Return the first cause of a failure found in a launcher's output; None if there is none."""
    found = [
        (match.start(), order, make(match))
        for order, (pattern, make) in enumerate(_COMPILED)
        if (match := pattern.search(output))
    ]
    # What killed a process counts before that it is gone, and this before exit codes, which may be
    # its consequences.
    ranks = {"rank lost": 1, "exit code": 2}
    found.sort(key=lambda each: (ranks.get(each[2].what, 0), each[0]))
    return found[0][2] if found else None


_SRUN = re.compile(r"^srun: (?:error|fatal): (?!\S+: tasks? \d)(.+)$", re.MULTILINE)


def _refused(output: str, returncode: int) -> Failure | None:
    """Return srun's own error, if it refused to start anything; None if it reported none."""
    said = list(dict.fromkeys(_SRUN.findall(output)))
    if not said or returncode <= 0:
        return None
    hint = "HINT: what a job inherits as SLURM_* are options of srun; unset what does not fit."
    return Failure("srun", f"{'; '.join(said[:3]).rstrip('.')}. {hint}", None, None, returncode)


def root_cause(folder: Path, output: str, returncode: int, launcher: str) -> Failure:
    """Determine the root cause of a failed launch.

    Args:
        folder: The folder with the failure notes that ranks leave.
        output: The end of what the launcher and the ranks printed.
        returncode: The launcher's exit code; negative if a signal ended it.
        launcher: The launcher's name.
    """
    notes = read_notes(folder)
    own = [each for each in notes if not each.consequence]
    told = said(output)
    if own:
        return own[0]
    if told is not None and told.what != "exit code":
        return told
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return Failure(name, f"{launcher} was killed", None, None, 128 - returncode)
    if notes:
        return notes[0]
    if told is not None:
        return told
    if (refused := _refused(output, returncode)) is not None:
        return refused
    if returncode == 0:
        return Failure(
            "no result", f"{launcher} ended with exit code 0, but there is no result.json", None,
            None, 1,
        )  # fmt: skip
    return Failure("exit code", f"of {launcher}", None, None, returncode)
