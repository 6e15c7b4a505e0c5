"""CUDA kernels: plain functions for each kind of map, which `cuda.launch` compiles."""
