"""How parameters are cut into slices, and which rank has which slice and which role."""
