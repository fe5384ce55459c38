"""Slurm clusters of hosts in namespaces of this machine, for benchmarks; see tests/slurm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from benchmarks.harness.command import NotHereError
from tests.slurm.cluster import Cluster, can_have_hosts, missing


@contextlib.contextmanager
def slurm_cluster(hosts: int, *, slurmd_timeout: int = 10) -> Iterator[Cluster]:
    """Give a cluster that is up, and take it down whatever happens.

    Args:
        hosts: How many it has.
        slurmd_timeout: Seconds after which Slurm sets down a node that is silent.

    Raises:
        NotHereError: Slurm is not installed, or this user cannot have namespaces.
    """
    if lacking := missing() or ("" if can_have_hosts() else "root, or namespaces"):
        raise NotHereError(
            f"no Slurm cluster can be had here: no {lacking}.", hint="see CONTRIBUTING.md."
        )
    cluster = Cluster(hosts, slurmd_timeout=slurmd_timeout)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
