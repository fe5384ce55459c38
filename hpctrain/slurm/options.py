"""The options of sbatch by their own names, and how they are written.

From ``man sbatch`` of Slurm 24.05 (https://slurm.schedmd.com/sbatch.html).
"""

from __future__ import annotations

import re
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

SHORT = {
    "A": "account", "a": "array", "B": "extra-node-info", "b": "begin", "C": "constraint",
    "c": "cpus-per-task", "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile",
    "G": "gpus", "H": "hold", "i": "input", "J": "job-name", "k": "no-kill", "L": "licenses",
    "M": "clusters", "m": "distribution", "N": "nodes", "n": "ntasks", "O": "overcommit",
    "o": "output", "p": "partition", "q": "qos", "S": "core-spec", "s": "oversubscribe",
    "t": "time", "w": "nodelist", "x": "exclude",
}  # fmt: skip
"""Long names of the short ones."""

FAMILIES = (
    ("ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-core", "ntasks-per-socket"),
    ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket"),
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("requeue", "no-requeue"),
)
"""Options that answer one question in several ways."""

Options = dict[str, str]
"""Options of sbatch: long name -> value; the value of a flag is empty."""


def known(name: str) -> bool:
    """Return whether this is a known option of sbatch; newer ones and plugins' may not be."""
    return name in FLAGS or name in VALUED


def misspelt(names: Iterable[str], more: Iterable[str] = ()) -> str:
    """Suggest what was meant by unknown options; empty if all of them are known.

    Args:
        names: The options' names.
        more: Further valid names that might have been meant.
    """
    valid = FLAGS | VALUED | {name.lstrip("-") for name in more}
    return " ".join(
        f"--{name}: {nearest(name, valid, '`man sbatch`')}" for name in names if not known(name)
    )


def long(word: str) -> str:
    """Rewrite a short option as its long form: ``-N2`` becomes ``--nodes=2``.

    Raises:
        Error: There is no such short option.
    """
    if word.startswith("--"):
        return word
    name = SHORT.get(word[1:2])
    if name is None:
        raise Error(f"neither sbatch nor `hpctrain train` has an option {word[:2]}.",
                    hint="`man sbatch` lists them.")  # fmt: skip
    value = word[2:].removeprefix("=")
    return f"--{name}={value}" if value else f"--{name}"


def parse(arguments: Iterable[str]) -> Options:
    """Parse options as typed: ``--name=value``, ``--name value``, ``--flag``, ``-N 2``.

    Unknown options are left to sbatch to judge; their values must follow an equals sign.

    Raises:
        Error: An option lacks its value, or a flag was given one.
    """
    found: Options = {}
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            raise Error(f"{argument!r} is not an option.", hint="give one TASK, and options only.")
        name, equals, value = long(argument).removeprefix("--").partition("=")
        if not equals and name in VALUED and left and not left[0].startswith("-"):
            value = left.pop(0)
        elif not equals and name in VALUED and name not in FLAGS:
            raise Error(f"sbatch's option --{name} needs a value.", hint=f"--{name}=VALUE.")
        elif not equals and not known(name) and left and not left[0].startswith("-"):
            raise Error(f"there is no option --{name} that is known here.",
                        hint=f"--{name}={left[0]} is for sbatch. {misspelt([name])}")  # fmt: skip
        elif equals and name in FLAGS and name not in VALUED:
            raise Error(f"sbatch's option --{name} takes no value.", hint=f"write --{name}.")
        found[name] = value
    return found


def merge(*layers: Options) -> Options:
    """Merge layers of options. Later ones win, also over different options for the same thing."""
    found: Options = {}
    for layer in layers:
        for family in FAMILIES:
            if any(name in layer for name in family):
                found = {name: value for name, value in found.items() if name not in family}
        if gpus_of(layer.get("gres", "")):
            found = {name: value for name, value in found.items() if name not in FAMILIES[1]}
        if any(name in layer for name in FAMILIES[1]) and gpus_of(found.get("gres", "")):
            found["gres"] = ",".join(
                each for each in found["gres"].split(",") if not each.startswith("gpu")
            )
            if not found["gres"]:
                del found["gres"]
        found |= layer
    return found


def gpus_of(gres: str) -> int:
    """Return the GPUs a node that a ``--gres`` asks for: ``gpu:4``, ``gpu:a100:4``, ``gpu``."""
    total = 0
    for each in gres.removeprefix("gres:").split(","):
        name, *rest = re.split(r"[:=/]", each.partition("(")[0])
        if name == "gpu":
            total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return total


def ranks(asked: Options) -> Options:
    """Derive the number of ranks from the number of GPUs: one rank for each GPU.

    Args:
        asked: All options of the job.

    Returns:
        The option that sets the number of ranks; empty if it is given already, or without GPUs.

    Raises:
        Error: The options do not determine the number of ranks.
    """
    if any(name in asked for name in FAMILIES[0]):
        return {}
    gpus = {name: _count(name, asked[name]) for name in FAMILIES[1] if name in asked}
    each = gpus.get("gpus-per-task", 1)
    on_node = gpus.get("gpus-per-node") or gpus_of(asked.get("gres", ""))
    if not on_node and "gpus-per-socket" in gpus and asked.get("sockets-per-node", "").isdigit():
        on_node = gpus["gpus-per-socket"] * int(asked["sockets-per-node"])
    if not on_node and (total := gpus.get("gpus")):
        nodes = asked.get("nodes", "1")
        if not nodes.isdigit() or total % int(nodes):
            return {"ntasks": str(max(1, total // each))}
        on_node = total // int(nodes)
    if on_node:
        return {"ntasks-per-node": str(max(1, on_node // each))}
    if gpus:
        raise Error(f"--{next(iter(gpus))} does not say how many ranks there are.",
                    hint="add --tasks-per-node, or --gpus-per-node.")  # fmt: skip
    return {}


def _count(name: str, text: str) -> int:
    """Return the total of an option's counts: ``4``, ``a100:4``, or ``a100:2,v100:2``."""
    numbers = [each.rpartition(":")[2] for each in text.split(",")]
    if not all(number.isdigit() for number in numbers):
        raise Error(f"--{name} {text} is no number of GPUs.", hint="such as 4, or a100:4.")
    return sum(map(int, numbers))


def directive(name: str, value: str) -> str:
    """Format an option as an ``#SBATCH`` line of a batch script.

    Raises:
        Error: The value contains characters that such a line cannot hold.
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
    """Convert one of Slurm's time limits to seconds.

    Args:
        text: ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, or ``days-hours[:...]``.

    Raises:
        Error: The text is not a time limit.
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
