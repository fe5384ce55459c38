"""The nodes of a job, and the network between them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from hpctrain.errors import Error
from hpctrain.world.launcher import tasks_per_node
from hpctrain.world.network import address_towards, interface_of


class Node(NamedTuple):
    """A node of this job, and the number of tasks on it."""

    name: str
    tasks: int


def expand(text: str) -> list[str]:
    """Expand a host list: ``n[1-3,7],gpu-a[01-02]`` is n1, n2, n3, n7, gpu-a01, gpu-a02.

    Raises:
        Error: The text is not a host list.
    """
    names: list[str] = []
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(parts) != text:
        raise Error(f"{text!r} is no host list.", hint="such as n[1-3,7].")
    for part in parts:
        pieces = re.split(r"\[([^\]]*)\]", part)
        choices = [[piece] if n % 2 == 0 else _numbers(piece) for n, piece in enumerate(pieces)]
        names += ["".join(name) for name in itertools.product(*choices)]
    return names


def _numbers(text: str) -> list[str]:
    found = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None:
            raise Error(f"[{text}] is no range of hosts.", hint="such as [1-3,7].")
        first, last = match[1], match[2] or match[1]
        found += [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return found


def nodes(environment: Mapping[str, str] = os.environ) -> list[Node]:
    """Return the nodes of the job that this process belongs to, with the tasks on each.

    Raises:
        Error: This process is not part of a Slurm job.
    """
    names = expand(environment.get("SLURM_JOB_NODELIST", ""))
    if not names:
        raise Error("this is no Slurm job.", hint="submit it by sbatch, or `hpctrain submit`.")
    counts = tasks_per_node(environment.get("SLURM_TASKS_PER_NODE", ""))
    return [Node(name, counts[n] if n < len(counts) else 1) for n, name in enumerate(names)]


def interface(others: list[str]) -> str | None:
    """Return the network interface towards the first reachable one of other hosts, or None."""
    for other in others:
        try:
            mine = address_towards(other)
        except OSError:
            continue
        if (name := interface_of(mine)) is not None:
            return name
    return None
