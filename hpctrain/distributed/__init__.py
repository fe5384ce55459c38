"""torch.distributed over MPI: one launcher, no port, no rendezvous."""

from __future__ import annotations

from hpctrain.distributed.process_group import (
    BACKEND,
    MpiProcessGroup,
    init_process_group,
)

__all__ = ["BACKEND", "MpiProcessGroup", "init_process_group"]
