"""A cost model of data-parallel training: what a step would take on a cluster that is not here."""
