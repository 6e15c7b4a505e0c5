"""Checks of the project as a whole: what its files promise, and the habits of its code."""

import ast
import contextlib
import importlib
import importlib.metadata
import inspect
import io
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from support import tuning

import favor_np

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "favor_np"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = [path for part in ("tests", "tools") for path in sorted((ROOT / part).rglob("*.py"))]
TESTS.remove(Path(__file__))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def uses_of_numba(path):
    """The names that the code of ``path`` takes from numba: ``numba.x``, ``from numba import x``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names |= {node.attr} if node.value.id == "numba" else set()
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numba":
            names |= {name.name for name in node.names}
    return names


def fenced(text, mark):
    """The blocks of code under the lines ``mark``."""
    blocks = re.findall(re.escape(mark) + r"\s+```\w*\n(.*?)```", text, re.DOTALL)
    assert blocks, f"no block under {mark}"
    return blocks


def test_version_is_the_installed_one():
    assert favor_np.__version__ == importlib.metadata.version("favor_np")


def test_changelog_begins_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE).group(1) == favor_np.__version__


def test_one_module_alone_compiles():
    users = [relative(p) for p in MODULES if uses_of_numba(p) & {"njit", "jit"}]
    assert users == ["favor_np/cpu/kernels/jit.py"]


@pytest.mark.parametrize("word", ["prange", "vectorize", "guvectorize", "stencil"])
def test_other_ways_to_compile_are_not_used(word):
    assert [relative(p) for p in MODULES if word in uses_of_numba(p)] == []


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_stay_readable(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 800
    assert "fastmath=True" not in "\n".join(lines)


def test_lines_stay_short_and_laid_out_by_the_formatter():
    lines = [
        (relative(path), number, line)
        for path in MODULES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    ]
    assert [f"{name}:{number}" for name, number, line in lines if len(line) > 100] == []
    assert sum("fmt: skip" in line for _, _, line in lines) <= 20


#: Why functions that are neither public nor kernels take more than `MOST_PARAMETERS`.
MOST_PARAMETERS = 7
MANY_PARAMETERS = {
    "attention.check": "the arguments of favor_attention as they came: it makes the Call of them",
    "exact._check": "the same of exact_attention",
    "state.update": "public: what weights of keys may be made of, and options",
    "call.check_call": "the options of all attention functions: a dictionary of them costs a step more",
}


def parameters(path):
    """The functions of a module, by dotted name, and how many parameters each takes."""
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            a = node.args
            names = [
                x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if x
            ]
            yield f"{module}.{node.name}", len([n for n in names if n not in ("self", "cls")])


def test_functions_take_few_parameters():
    """What belongs together travels as one object; public functions and kernels are excepted."""
    public = {
        *favor_np.__all__,
        "from_projection",
        "zeros",
        "forecast",
        "compare",
        "train",
        "backtest",
        "__init__",
        "favor_attention",
        "export_attention",
    }
    many = {
        name
        for path in PACKAGE.rglob("*.py")
        if "kernels" not in path.parts
        for name, count in parameters(path)
        if count > MOST_PARAMETERS and name.rpartition(".")[2] not in public
    }
    assert many == set(MANY_PARAMETERS)


def imported(code):
    """The modules that code imports, that of processes in its strings too."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^\s*(?:from|import) ([\w.]+)", node.value, re.MULTILINE)


def retuned(code):
    """The names in modules or objects to which code gives a value of its own."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in SETTERS:
            texts = (x.value for x in node.args if isinstance(x, ast.Constant))
            yield from (text.rsplit(".")[-1] for text in texts if isinstance(text, str))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^\s*\w+\.([A-Z_]+)\b.* = ", node.value, re.MULTILINE)


SETTERS = {"setattr", "object", "patch", "__setattr__"}


def test_no_test_imports_another():
    names = {(relative(path), name) for path in TESTS for name in imported(path.read_text("utf-8"))}
    assert {pair for pair in names if re.search(r"\btest_", pair[1])} == set()


def test_no_test_changes_a_threshold_by_itself():
    names = {(path.name, name) for path in TESTS for name in retuned(path.read_text("utf-8"))}
    assert {pair for pair in names if pair[1].isupper() or pair[1] in tuning.HOME} == {
        ("test_scratch.py", "KEPT"),  # of one object
    }


@pytest.mark.parametrize(
    "code",
    [
        "import test_state",
        "from test_state import folded",
        "from tests.test_state import folded",
        "def later():\n    import test_state",
        'RUN = """\n    from test_state import folded\n"""',
    ],
)
def test_an_import_of_a_test_is_noticed(code):
    assert any(re.search(r"\btest_", name) for name in imported(code))


@pytest.mark.parametrize(
    "code",
    [
        "tuning.MIN_SHARED_LENGTH = 2",
        "tuning.MIN_PARALLEL_WORK, tuning.MIN_SHARED_LENGTH = 0, 2",
        'monkeypatch.setattr(tuning, "MIN_SHARED_LENGTH", 2)',
        'monkeypatch.setattr("favor_np.cpu.tuning.MIN_SHARED_LENGTH", 2)',
        'mock.patch.object(tuning, "MIN_SHARED_LENGTH", 2)',
        'RUN = """\n    tuning.MIN_SHARED_LENGTH = 2\n"""',
    ],
)
def test_a_changed_threshold_is_noticed(code):
    assert "MIN_SHARED_LENGTH" in set(retuned(code))


def documented(module):
    """The names that docs/reference.md lists for a module."""
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    sections = reference.split(".. currentmodule:: ")[1:]
    texts = [
        text for name, _, text in (part.partition("\n") for part in sections) if name == module
    ]
    return sorted(re.findall(r"^   (\w+)$", "".join(texts), re.MULTILINE))


@pytest.mark.parametrize(
    "name", ["favor_np", "favor_np.compare", "favor_np.forecast", "favor_np.nn"]
)
def test_public_names_are_the_documented_ones(name):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if not inspect.ismodule(value)
    ]
    assert documented(name) == sorted(public for public in exported if public[0].isalpha())


def test_every_public_function_has_a_docstring_with_an_example():
    functions = [getattr(favor_np, name) for name in favor_np.__all__ if name[0].islower()]
    assert functions
    for function in functions:
        for section in ("Parameters", "Raises", "Examples"):
            assert f"{section}\n" in function.__doc__, (function, section)


def test_package_is_typed_and_licensed():
    assert (PACKAGE / "py.typed").exists()
    metadata = importlib.metadata.metadata("favor_np")
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert "favor_np developers" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_public_dependencies_are_few():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.match(r"\w+", line).group() for line in project["dependencies"]}
    assert required <= {"numba", "numpy", "scipy"}


def test_import_loads_no_compiler():
    code = "import sys, favor_np; print([m for m in ('numba', 'scipy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_readme_examples_print_what_they_say(number):
    source = fenced(README, "<!-- example -->")[number]
    expected = re.findall(r"^print\(.*\)  # (.*)$", source, re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, "README.md", "exec"), {})
    assert expected
    assert out.getvalue().splitlines() == expected


def test_readme_shows_code_on_its_first_screen():
    first = README.splitlines().index("import numpy as np") + 1
    assert first <= 30


@pytest.mark.parametrize("name", ["forecast", "tests"])
def test_readme_commands_are_one_line_and_do_their_own_set_up(name):
    (block,) = fenced(README, f"<!-- command: {name} -->")
    (command,) = block.splitlines()
    assert command.startswith("python3 -m venv ")
    assert "pip install" in command


def test_table_of_variances_agrees_with_simulation():
    tables = runpy.run_path(str(ROOT / "tools" / "variance_tables.py"))
    d, features, draws, s = 4, 16, 4000, 0.25
    x = np.full((1, d), np.sqrt(s) / 2 / np.sqrt(d))  # |x + x|**2 = s
    for orthogonal, antithetic in tables["MAPS"].values():
        estimates = []
        for seed in range(draws):
            fm = favor_np.feature_map(
                "positive",
                d,
                features,
                projection="orthogonal" if orthogonal else "iid",
                antithetic=antithetic,
                scale=1.0,
                rng=seed,
            )
            estimates.append((fm.query_features(x) * fm.key_features(x)).sum())
        relative = np.var(estimates) / np.exp(2 * x @ x.T).item()
        expected = tables["relative_variance"](
            s, features, d, orthogonal=orthogonal, antithetic=antithetic
        )
        assert relative == pytest.approx(expected, rel=0.25)


def test_links_between_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pictures_of_the_docs_have_names():
    """Without a name the second picture of a page is the first again, which nothing notices."""
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert text.count(".. plot::\n") == text.count(".. plot::\n   :filename-prefix: "), (
            page.name
        )
