"""The digest of all sources that the processor's compiled code depends on."""

from __future__ import annotations

from favor_np import jobs, numerics
from favor_np.sources import Sources

_SHARED = (
    "favor_np.cpu.processor",
    "favor_np.cpu.record",
    "favor_np.cpu.records",
    "favor_np.cpu.tiles",
)
_EARLIER = (jobs, numerics)


def digest() -> str:
    """Return the digest; "" if the sources cannot be read."""
    return Sources("favor_np.cpu.kernels", _SHARED, _EARLIER).digest()


#: Now, before an editor changes what is being imported.
SOURCES = digest()
