"""Kernels of numba.cuda without a GPU: compiled to PTX and executed on the CPU.

``ptxrun.run(function, grid, block, (array, ..., np.int32(n)), outputs=[3])`` compiles a plain Python
kernel by numba-cuda for the types of its arguments, executes the PTX in place on NumPy arrays, and
returns a report: ``assert report.ok, report``.  `simcheck.run` does the same without compiling.
"""
