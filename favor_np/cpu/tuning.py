"""Thresholds of the processor's engine: measured, read at call time, and changed by tests alone.

No bit of a result depends on them, but on SEGMENT_LENGTH and on what is computed in bf16x3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

#: Multiply-adds below which a second thread costs more than it does (about 0.3 ms).
MIN_PARALLEL_WORK = 4_000_000

#: Positions that bidirectional attention folds, and reads, as one job.  Longer sequences are cut
#: into segments, whose states are merged in order, whatever the number of threads.
SEGMENT_LENGTH = 8192
#: Segments, and their sequences, that have states in memory at a time.
MAX_LIVE_STATES = 32

#: Causal sequences of at least this length may be shared out among threads, chunk by chunk.
MIN_SHARED_LENGTH = 1024
#: Chunks of a group for each thread that shares such a sequence; fewer if the states and features
#: of all groups in memory would need more than MAX_GROUP_BYTES.
CHUNKS_PER_THREAD, MAX_GROUP_BYTES = 2, 8 << 20

#: Jobs of exact attention, at least, unless they would have less than 256 queries.
MIN_EXACT_JOBS = 4
#: Jobs of the gradient of exact attention where there are few heads: each has a dq of its own.
EXACT_VJP_JOBS = 8

#: The smallest side of a matrix, and the smallest size, for which the matrix unit pays off, with
#: numbers split into three of bfloat16.  (After AMX use the vector units run up to 20% slower for
#: 0.1 ms: so time whole calls.)
MIN_BF16X3_SIDE, MIN_BF16X3_SIZE = 32, 64 * 32
#: True or False: compute all products of float32 that way, or none, whatever the processor.
USE_BF16X3: bool | None = None
#: The same of products of bfloat16, where a caller allows them.
USE_BFLOAT16: bool | None = None

#: Workspaces that each Python thread keeps for its next calls, if they take so many bytes at most.
MAX_SPARE, MAX_SPARE_BYTES = 4, 128 << 20

Function = TypeVar("Function")
_TABLES: list[Any] = []


def depends_on_tuning(function: Function) -> Function:
    """Mark a function that keeps results, which a change of a threshold makes it forget."""
    _TABLES.append(function)
    return function


@contextlib.contextmanager
def tuned(**values: Any) -> Iterator[None]:
    """Let thresholds have these values: for tests, in a single thread."""
    thresholds = globals()
    known = {name for name in thresholds if name.isupper() and name[0] != "_"}
    if values.keys() - known:
        raise AttributeError(f"no thresholds: {sorted(values.keys() - known)}")
    before = {name: thresholds[name] for name in values}

    def use(them: dict[str, Any]) -> None:
        thresholds.update(them)
        for table in _TABLES:
            table.cache_clear()

    use(values)
    try:
        yield
    finally:
        use(before)
