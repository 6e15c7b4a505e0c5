"""What `tools/distributions.py` says of wheels; `nox -s wheel` asks it about the real ones."""

import runpy
import zipfile
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools/distributions.py"))
MODULES = {"favor_np/__init__.py", "favor_np/cpu/code.py"}
GOOD = MODULES | TOOL["WHEEL"] | {"favor_np-1.dist-info/METADATA", "favor_np/cpu/libraries/a.so"}


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (set(), None),
        ({"favor_np/py.typed"}, "lacks favor_np/py.typed"),
        ({"favor_np/cpu/code.py"}, "lacks favor_np/cpu/code.py"),
        ({"tests/test_a.py"}, "should not have tests/test_a.py"),
        ({"favor_np/__pycache__/a.pyc"}, "should not have favor_np/__pycache__/a.pyc"),
    ],
)
def test_what_is_missing_or_too_much(changed, fault, tmp_path):
    path = tmp_path / "favor_np-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in GOOD ^ changed:
            archive.writestr(name, "")
    assert TOOL["faults"](path, MODULES) == ([f"{path.name} {fault}"] if fault else [])
