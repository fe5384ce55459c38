"""Residuals of all ranks in one state, and back on any world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hpctrain.compression.compressor import Compressor
from hpctrain.world.broadcast import gather_trees
from hpctrain.world.world import Communicator


def gather_states(comm: Communicator, compressor: Compressor) -> list[dict[str, Any]]:
    """Return all ranks' states by rank, on rank 0; elsewhere nothing. Every rank calls this.

    Args:
        comm: Of the world.
        compressor: Of this rank.

    Raises:
        PeerLost: Another rank is gone.
    """
    return gather_trees(comm, compressor.state_dict())


def load_states(
    comm: Communicator, compressor: Compressor, states: Sequence[Mapping[str, Any]]
) -> None:
    """Go on from the states of all ranks of a world, in this one.

    On as many ranks, each has its own again, bit for bit. On another number, each has the mean over
    those ranks, so that what is still to be sent is neither lost nor sent twice: the mean over
    ranks is the same.

    Args:
        comm: Of the present world.
        compressor: Of this rank.
        states: As :func:`gather_states` returned them on rank 0; none: there is nothing to go on
            from.

    Raises:
        Error: They are of other parameters.
    """
    if not states:
        return
    kept = states[0]["kept"]
    if any(tensors for what, tensors in kept.items() if what not in compressor.memories):
        compressor.lost += len(states)
    if len(states) == comm.size:
        compressor.load_state_dict(dict(states[comm.rank]))
        return
    means = {
        what: {
            name: torch.stack([state["kept"][what][name] for state in states]).mean(0)
            for name in tensors
        }
        for what, tensors in kept.items()
    }
    compressor.load_state_dict({**states[0], "kept": means})
