"""Checkpoints: the format, and the store of a run."""
