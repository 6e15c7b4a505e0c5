"""What a step asks of the driver: as little as a CUDA graph may hold, on the caller's stream."""

import ptxrun
import stub_driver
from support import child

ptxrun.require()

CODE = """
driver = stub_driver.install()
from numba import cuda
from favor_np import AttentionState, feature_map

fm, stream = feature_map("positive", 8, 64), cuda.stream()
tokens = np.random.default_rng(0).standard_normal((4, 3, 2, 8)).astype(np.float32)
for decay in (None, 0.9):
    there = AttentionState(fm, 8, 2, decay=decay, device="cuda")
    here = AttentionState(fm, 8, 2, decay=decay)
    for i, token in enumerate(tokens):
        q, k, v = (cuda.to_device(x, stream) for x in token)
        before = len(driver.launches)
        driver.calls()
        found = there.step(q, k, v)
        calls = driver.calls()
        launches = driver.launches[before:]
        assert {launch.stream for launch in launches} == {int(stream.handle)}
        assert len(launches) == (1 if decay is None else 2)
        if decay is None and i > 0:  # the first copies tables and the map
            assert (calls.allocations, calls.copies, calls.waits) == (1, 0, 0)
        assert np.allclose(found.copy_to_host(stream=stream), here.step(*token), atol=1e-5)
print("done")
"""


def test_a_step_allocates_its_result_and_launches_one_kernel():
    """It copies nothing and waits for nothing; and states that fade stay on the caller's stream."""
    assert child.python(stub_driver.CHILD + CODE) == "done\n"
