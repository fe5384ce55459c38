"""A worker's end of the parameter server: it pushes gradients and pulls weights."""
