"""The parameter server: it holds slices of the parameters, and updates them."""
