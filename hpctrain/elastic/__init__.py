"""Outliving the loss of a process or node: who is alive, and how the world is formed anew."""
