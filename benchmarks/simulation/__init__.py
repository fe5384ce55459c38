"""Thousands of ranks and nodes, simulated: steps with slow ranks, and runs with failures."""
