"""The parameter server: it holds slices of the parameters, and updates them."""

from __future__ import annotations

import os

# Open MPI reads this when mpi4py is imported. Its UCX component for windows prints an error a rank
# where there is no such network, and is of no use for memory shared within a host.
os.environ.setdefault("OMPI_MCA_osc", "^ucx")
