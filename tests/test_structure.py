"""The picture of the package in docs/architecture.md: that of its imports, and no other."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STRUCTURE = runpy.run_path(str(ROOT / "tools" / "structure.py"))
main, drawn = STRUCTURE["main"], STRUCTURE["drawn"]


@pytest.fixture
def package(tmp_path):
    """Write a package of four floors with this code in its modules; return the project's folder."""
    (tmp_path / "docs" / "_static").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(
        "[[tool.importlinter.contracts]]\ntype = 'independence'\n"
        "[[tool.importlinter.contracts]]\ntype = 'layers'\n"
        "layers = ['favor_np.top', 'favor_np.left | favor_np.right', 'favor_np.cpu.kernels', 'favor_np.base']\n"
    )

    def write(**code):
        for name in ("__init__", "top", "left", "right", "cpu/__init__", "cpu/kernels", "base"):
            path = tmp_path / "favor_np" / f"{name}.py"
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(code.get(name.replace("/", "_"), ""))
        return tmp_path

    return write


def arrows(root):
    """The lines of the picture that are arrows, by what they say."""
    lines = [line for line in drawn(root).splitlines() if "<title>" in line][1:]
    return {re.search("<title>(.*)</title>", line).group(1): line for line in lines}


def test_the_picture_is_that_of_the_imports(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_every_module_has_a_floor_but_packages_and_what_pyinstaller_runs():
    floors, box_of = STRUCTURE["floors_of"](ROOT), STRUCTURE["box_of"]
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "favor_np").rglob("*.py")]
    without = {path.as_posix() for path in paths if not box_of(".".join(path.parts), floors)}
    assert {path for path in without if "_pyinstaller" not in path} == {
        "favor_np/__init__",
        "favor_np/cpu/__init__",
        "favor_np/cuda/__init__",
    }


def test_a_changed_import_changes_the_picture(package):
    root = package(top="import favor_np.left\n")
    assert main([], root) == 0
    assert main(["--check"], root) == 0
    package(top="import favor_np.left, favor_np.right\n")
    assert main(["--check"], root) == 1


def test_a_changed_layer_changes_the_picture(package):
    root = package(top="import favor_np.left\n")
    main([], root)
    project = root / "pyproject.toml"
    project.write_text(
        project.read_text().replace("left | favor_np.right", "left', 'favor_np.right")
    )
    assert main(["--check"], root) == 1


@pytest.mark.parametrize(
    "code",
    [
        "import favor_np.left",
        "from favor_np import left",
        "from favor_np.left import something",
        "from . import left",
        "from .left import something",
        "from favor_np import Something",
        "try:\n    import favor_np.left\nexcept ImportError:\n    pass",
    ],
)
def test_all_ways_to_import_are_arrows(package, code):
    public = "if TYPE_CHECKING:\n    from favor_np.left import Something as Something\n"
    assert set(arrows(package(top=code, __init__=public))) == {"top imports left"}


def test_imports_for_type_checkers_and_of_others_are_no_arrows(package):
    code = (
        "if TYPE_CHECKING:\n    import favor_np.left\nimport other.left\nfrom other import right\n"
    )
    assert arrows(package(top=code)) == {}


def test_an_arrow_is_dashed_if_only_functions_import(package):
    late = "def later():\n    from favor_np import base\n"
    found = arrows(package(left=late, right=late + "import favor_np.base\n"))
    assert set(found) == {"left imports base", "right imports base"}
    assert [name for name, line in found.items() if 'class="late"' in line] == ["left imports base"]


def test_an_arrow_that_follows_from_others_is_left_out(package):
    code = "from favor_np import base, left\nfrom favor_np.cpu import kernels\n"
    found = arrows(
        package(top=code, left="import favor_np.cpu.kernels", cpu_kernels="from .. import base")
    )
    assert set(found) == {
        "top imports left",
        "left imports cpu.kernels",
        "cpu.kernels imports base",
    }


@pytest.mark.parametrize("name", ["left", "top"])
def test_an_import_that_does_not_go_down_is_refused(package, name):
    with pytest.raises(SystemExit, match=f"right imports {name}, which is not below it"):
        drawn(package(right=f"import favor_np.{name}"))


def test_boxes_stand_side_by_side_within_the_picture():
    rows = {}
    for box in re.findall(r'<rect x="(-?\d+)" y="(\d+)" width="(\d+)"', drawn(ROOT)):
        x, y, width = map(int, box)
        rows.setdefault(y, []).append((x, x + width))
    assert len(rows) == 1 + max(STRUCTURE["floors_of"](ROOT).values())
    for row in rows.values():
        edges = [0, *(x for box in sorted(row) for x in box), STRUCTURE["WIDTH"]]
        assert edges == sorted(set(edges))
