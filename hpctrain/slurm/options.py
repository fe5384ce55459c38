"""The options of sbatch by their own long names, and how they are written.

From ``man sbatch`` of Slurm 24.05 (https://slurm.schedmd.com/sbatch.html).
"""

from __future__ import annotations

from collections.abc import Iterable

from hpctrain.errors import Error, nearest

FLAGS = frozenset(
    """
    contiguous exclusive get-user-env hold no-kill no-requeue overcommit oversubscribe reboot
    requeue spread-job use-min-nodes
    """.split()  # noqa: SIM905 - a list of them would be a page long
)
"""Those that need no value."""

VALUED = frozenset(
    """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment
    constraint container container-id core-spec cores-per-socket cpu-freq cpus-per-gpu
    cpus-per-task deadline delay-boot dependency distribution error exclude exclusive export
    export-file extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node
    gpus-per-socket gpus-per-task gres gres-flags hint job-name kill-on-invalid-dep licenses
    mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice
    no-kill nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node
    ntasks-per-socket open-mode output partition power prefer priority profile propagate qos
    reservation resv-ports signal sockets-per-node switches thread-spec threads-per-core time
    time-min tmp tres-bind tres-per-task uid wait-all-nodes wckey
    """.split()  # noqa: SIM905 - a list of them would be a page long
)
"""Those that take one; some of the flags may."""

Options = dict[str, str]
"""Of sbatch: long name -> value; a flag's is empty."""


def check(name: str) -> str:
    """The name of an option, if there is one.

    Raises:
        Error: There is not.
    """
    if name not in FLAGS and name not in VALUED:
        raise Error(
            f"sbatch has no option --{name}, and `hpctrain train` neither.",
            hint=nearest(name, FLAGS | VALUED, "`man sbatch`"),
        )
    return name


def parse(arguments: Iterable[str]) -> Options:
    """Options as they are typed: ``--name=value``, ``--name value``, ``--flag``.

    Raises:
        Error: One is unknown, lacks its value, or has none to take.
    """
    found: Options = {}
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("--"):
            raise Error(
                f"{argument!r} is not an option.", hint="give one TASK, and long options only."
            )
        name, equals, value = argument.removeprefix("--").partition("=")
        check(name)
        if not equals and name in VALUED and left and not left[0].startswith("--"):
            value = left.pop(0)
        elif not equals and name not in FLAGS:
            raise Error(f"sbatch's option --{name} needs a value.", hint=f"--{name}=VALUE.")
        elif equals and name not in VALUED:
            raise Error(f"sbatch's option --{name} takes no value.", hint=f"write --{name}.")
        found[name] = value
    return found


def directive(name: str, value: str) -> str:
    """The line of a batch script that gives an option.

    Raises:
        Error: The value cannot be written there.
    """
    if any(character in value for character in "\n\r\0\"'\\"):
        raise Error(f"--{name} = {value!r} cannot stand in a batch script.", hint="no quotes.")
    if not value:
        return f"#SBATCH --{name}"
    return (
        f'#SBATCH --{name}="{value}"'
        if " " in value or "#" in value
        else (f"#SBATCH --{name}={value}")
    )


def seconds(text: str) -> int:
    """A time limit in seconds.

    Args:
        text: ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, or ``days-hours[:...]``.

    Raises:
        Error: It is not one.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise Error(f"{text!r} is no time limit.", hint="1:30:00 is an hour and a half.")
    numbers = [int(part) for part in parts]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, secs = [*numbers, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + secs
    if len(numbers) == 1:
        return numbers[0] * 60
    if len(numbers) == 2:
        return numbers[0] * 60 + numbers[1]
    return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
