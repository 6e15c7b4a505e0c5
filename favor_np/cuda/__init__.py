"""Attention on CUDA devices: loaded when the first device array appears."""
