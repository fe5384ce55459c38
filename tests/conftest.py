"""Within a world of several ranks the `mpi` tests run, and otherwise all the others."""

from hpctrain.launcher import detect

collect_ignore = ["unit", "e2e"] if detect().size > 1 else ["mpi"]
