"""Smaller gradients on the wire, for parameter servers and the all-reduce alike."""
