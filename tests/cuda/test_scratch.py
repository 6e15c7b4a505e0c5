"""The memory that calls use one after the other, under numba-cuda's own runtime."""

import ptxrun
import stub_driver
from support import child

ptxrun.require()

CODE = r"""
stub_driver.install()
import threading
import numpy as np
from numba import cuda
from favor_np.cuda import runtime
from favor_np.cuda.runtime import Scratch, scratch

MB = 1 << 20


def span(array):
    return range(array.address, array.address + array.size * array.dtype.itemsize)


def apart(arrays):
    spans = sorted((span(x).start, span(x).stop) for x in arrays)
    return all(stop <= start for (_, stop), (start, _) in zip(spans, spans[1:]))


mine = Scratch(0)
with mine.call():
    first = [mine.empty((3, 5), np.float32), mine.empty(7, np.int32), mine.empty(1, np.float32)]
    assert apart(first) and all(x.address % 256 == 0 for x in first)
    assert first[0].shape == (3, 5) and first[1].dtype == np.int32
with mine.call():  # the same memory again
    assert [mine.empty(x.shape, x.dtype).address for x in first] == [x.address for x in first]
    before = mine.empty(10, np.float32)
    with mine.part():
        inner = mine.empty(10, np.float32)
    assert mine.empty(10, np.float32).address == inner.address != before.address
    with mine.part():  # which does not fit
        large = [mine.empty(MB, np.float32) for _ in range(2)]
        assert apart([*large, before])
    after = mine.empty(MB // 2, np.float32)
    assert apart([after, before])
    assert len(mine._blocks) > 1
(block,) = mine._blocks  # one that has room for all of it
with mine.call():
    mine.empty(2 * MB, np.float32)
    assert mine._blocks == [block]
mine.KEPT = MB
with mine.call():
    mine.empty(4 * MB, np.float32)
assert not mine._blocks  # not held for ever
single = Scratch(0)
single.KEPT = MB
with single.call():
    single.empty(4 * MB, np.float32)
assert not single._blocks  # one block is too large as well
with mine.call():
    assert mine.empty(0, np.float32).size == 0
try:
    with mine.call():
        mine.empty(10, np.float32)
        raise KeyError
except KeyError:
    pass
with mine.call():
    again = mine.empty(10, np.float32)

streams = [cuda.stream() for _ in range(4)]
own = [scratch(0, stream) for stream in (0, *streams[:3])]
assert len({id(x) for x in own}) == 4
assert [scratch(0, stream) for stream in (0, *streams[:3])] == own
other = []
thread = threading.Thread(target=lambda: other.append(scratch(0, 0)))
thread.start()
thread.join()
assert other[0] is not own[0]
scratch(0, streams[3])
assert scratch(0, 0) is not own[0]  # used longest ago
print("done")
"""


def test_scratch_memory():
    assert child.python(stub_driver.CHILD + CODE) == "done\n"
