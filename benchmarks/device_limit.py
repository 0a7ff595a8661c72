"""Memory of a GPU that a stage of `make gpu` may take."""

# A device of 80 GB has about 78 GiB for use; context, cuBLAS's workspaces and neighbours lie outside of what torch counts.
LIMIT_GIB = 70.0
