"""A server's end of the parameter server: it holds slices, and updates them with pushes."""
