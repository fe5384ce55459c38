"""A run's model applied to samples, each once, on any number of ranks."""
