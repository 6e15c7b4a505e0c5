"""The engine that computes on processors: Numba kernels, and what prepares their work."""
