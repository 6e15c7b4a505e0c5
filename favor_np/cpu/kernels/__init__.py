"""Numba kernels: all loops over positions.  Nothing here checks its input or allocates a result."""
