"""The digest of all sources that the GPU's compiled code depends on."""

from __future__ import annotations

from favor_np import numerics
from favor_np.sources import Sources


def digest() -> str:
    """Return the digest; "" if the sources cannot be read."""
    return Sources("favor_np.cuda.kernels", (), (numerics,)).digest()


#: Now, before an editor changes what is being imported.
SOURCES = digest()
