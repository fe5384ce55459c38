"""Slurm: jobs rendered, submitted, looked after, and asked about. Imports no torch."""
