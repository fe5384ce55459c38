"""The parameter server: it holds slices of the parameters, and updates them."""

from __future__ import annotations

import os

from hpctrain.world.network import both_ways

# Open MPI reads this when mpi4py is imported. Its UCX component for windows prints an error a rank
# where there is no such network, and is of no use for memory shared within a host.
os.environ.setdefault("OMPI_MCA_osc", "^ucx")

# Over TCP a slice goes at once, without asking whether it may: the question and its answer would
# wait behind other slices.
both_ways()
for name in ("eager_limit", "max_send_size"):
    os.environ.setdefault(f"OMPI_MCA_btl_tcp_{name}", str(2**21 + 2**12))
