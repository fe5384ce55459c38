"""Slurm clusters on this machine, for benchmarks; see tests/slurm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from benchmarks.harness.command import NotHereError
from tests.slurm.cluster import Cluster, can_have_hosts, missing


@contextlib.contextmanager
def slurm_cluster(nodes: int, *, own_hosts: bool = True, **options: Any) -> Iterator[Cluster]:
    """Give a cluster that is up, and take it down whatever happens.

    Args:
        nodes: How many it has.
        own_hosts: Whether each node has to be a host of its own, in namespaces.
        options: Of the cluster.

    Raises:
        NotHereError: Slurm is not installed, or this user cannot have namespaces.
    """
    lacking = missing()
    if own_hosts and not can_have_hosts():
        lacking = lacking or "root, or namespaces"
    if lacking:
        raise NotHereError(
            f"no Slurm cluster can be had here: no {lacking}.", hint="see CONTRIBUTING.md."
        )
    cluster = Cluster(nodes, **options)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
