"""Strategies that hpctrain does not know of, each in one file."""
