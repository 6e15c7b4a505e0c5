"""Attention on the arrays of other libraries: one module each, imported when it is asked for.

``import favor_np.interop.dask`` needs ``pip install "favor_np[dask]"``; so do ``autograd``, ``jax``
and ``torch``, whose automatic differentiation can go through attention, and ``sklearn``.
``performer_pytorch`` loads models of that package.
"""
