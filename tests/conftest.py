"""Settings of the whole suite."""

import hypothesis

# The same examples in every run, and no deadline: a first call compiles.
hypothesis.settings.register_profile(
    "favor_np", deadline=None, derandomize=True, max_examples=60, print_blob=True
)
hypothesis.settings.load_profile("favor_np")
