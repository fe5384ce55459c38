"""A process's place in the world: rank, size, launcher, network, and the communicator."""
