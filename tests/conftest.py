"""Settings of the whole suite, and where the machine code of its processes comes from."""

import os
import shutil

import hypothesis
import pytest

# The same examples in every run, and no deadline: a first call compiles.
hypothesis.settings.register_profile(
    "favor_np", deadline=None, derandomize=True, max_examples=60, print_blob=True
)
# Other ones each time: `nox -s properties`.
hypothesis.settings.register_profile("random", deadline=None, max_examples=60, print_blob=True)
hypothesis.settings.load_profile("favor_np")


@pytest.fixture(scope="session", autouse=True)
def checked_records():
    """In every test, what kernels get is what their records say."""
    from support import records

    from favor_np.cpu.threads import TilePool

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TilePool, "call", records.checked(TilePool.call))
        yield


@pytest.fixture(scope="session")
def shipped_package(tmp_path_factory):
    """A copy of the package with libraries of machine code, in a folder that processes import from."""
    from support import libraries

    if shutil.which(libraries.PREBUILD["compiler"]()[0]) is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("shipped")
    return libraries.ship(libraries.copy(folder), tmp_path_factory.mktemp("work"))


@pytest.fixture(params=["compiled here", "shipped"])
def each_way(request, monkeypatch):
    """Processes that a test starts run code that was compiled here; and code that was shipped."""
    if request.param == "shipped":
        package = str(request.getfixturevalue("shipped_package"))
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.chdir(package)  # where a process looks first
        monkeypatch.delenv("FAVOR_NP_PREBUILT", raising=False)
    else:
        monkeypatch.setenv("FAVOR_NP_PREBUILT", "0")
    return request.param
