"""Optimizers and learning-rate schedules of hpctrain's own."""
