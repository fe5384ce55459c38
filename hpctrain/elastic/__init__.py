"""Fault tolerance: who is alive after a loss, and how the world is formed anew."""
