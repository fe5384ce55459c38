"""Build Horovod 0.28.1 against the torch and the MPI that are installed, and check the result."""
