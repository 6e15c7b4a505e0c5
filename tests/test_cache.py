"""The cache of compiled kernels: used when it can be, never in the way, never wrong."""

import ast
import compileall
import hashlib
import importlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.child import HANG, python

import favor_np
from favor_np import exact_attention
from favor_np.cpu.kernels import exact, favor, jit

PACKAGE = Path(favor_np.__file__).parent
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")

#: One kernel for one type, and whether it came from the cache.
CALL = """
import sys
import numpy as np
import favor_np
from favor_np.cpu.kernels import exact

q, k, v = np.random.default_rng(0).standard_normal((3, 20, 4)).astype((sys.argv[1:] or ["f4"])[0])
result = favor_np.exact_attention(q, k, v)
weights = np.exp(q @ k.T / 2)
assert np.allclose(result, weights @ v / weights.sum(-1, keepdims=True), rtol=1e-5, atol=1e-6)
stats = exact.attend_exact.stats
print("loaded" if stats.cache_hits else "compiled")
"""

#: Root without its privilege to write everywhere.
UNPRIVILEGED = """
import ctypes, os
if os.geteuid() == 0:
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, data) == 0
    for n in (0, 1):  # effective, permitted
        data[n] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, data) == 0
"""


def call(folder, code=CALL, **environ):
    environ = {"FAVOR_NP_CACHE": "1", "NUMBA_CACHE_DIR": str(folder)} | environ
    return python(code, "-W", "error", **environ)


def files(folder):
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache that one process has filled."""
    folder = tmp_path_factory.mktemp("filled")
    assert call(folder) == "compiled\n"
    return folder


@pytest.fixture
def warm(filled, tmp_path):
    return Path(shutil.copytree(filled, tmp_path / "warm"))


def load(path):
    """What the store of this process makes of an entry: None is "compile"."""
    store = exact.attend_exact._cache
    store = jit._Store("attend_exact", store._flags[:1])
    store._folders = [path.parent]
    store.entry = lambda signature, codegen: path.name
    return store.load_overload((), exact.attend_exact.targetctx)


# ----------------------------------------------------------------------------------------
# It works
# ----------------------------------------------------------------------------------------


def test_second_process_loads(warm):
    (path,) = files(warm)
    assert path.name.startswith(f"attend_exact-{sys.implementation.cache_tag}-{jit.SOURCES}-")
    before = path.stat().st_mtime_ns
    assert call(warm) == "loaded\n"
    assert files(warm) == [path]
    assert path.stat().st_mtime_ns == before
    assert load(path).signature is not None


def test_first_call_from_the_cache_imports_little(warm):
    """Numba alone would import scipy.linalg, for a third of the time."""
    code = CALL + "print([name for name in ('scipy.linalg', 'numpy.f2py') if name in sys.modules])"
    assert call(warm, code) == "loaded\n[]\n"


def test_users_can_still_compile_matrix_products():
    out = python(
        """
import numpy as np, numba
import favor_np.cpu.kernels.jit
@numba.njit
def product(a, b):
    return np.dot(a, b)
print(product(np.eye(2), np.ones((2, 2))).sum())
"""
    )
    assert out == "4.0\n"


#: A function that kernels call has no machine code of its own: to call it would crash.
PART = """
assert exact.longest_of.overloads
try:
    exact.longest_of(np.ones(3), 1.0)
except TypeError as error:
    print(error)
"""


def test_nothing_is_read_or_written_without_the_cache(warm):
    before = files(warm)
    compiled, refused = call(warm, CALL + PART, FAVOR_NP_CACHE="0").splitlines()
    assert compiled == "compiled"
    assert "only kernels can call it" in refused
    assert files(warm) == before


@pytest.mark.parametrize(
    "environ",
    [
        {"NUMBA_BOUNDSCHECK": "1"},
        {"NUMBA_OPT": "1"},
        {"NUMBA_CPU_NAME": "haswell"},
        {"NUMBA_CPU_FEATURES": "+sse2"},
    ],
    ids=lambda environ: next(iter(environ)),
)
def test_entries_tell_the_ways_to_compile_apart(environ):
    code = """
from favor_np.cpu.kernels import exact
print(exact.attend_exact._cache.entry((), exact.attend_exact.targetctx.codegen()))
"""
    assert python(code) != python(code, **environ)


def test_entries_tell_types_and_kernels_apart():
    codegen = exact.attend_exact.targetctx.codegen()
    x = np.ones((1, 3))
    for dtype in (np.float32, np.float64):
        exact_attention(x.astype(dtype), x.astype(dtype), x.astype(dtype))
    signatures = list(exact.attend_exact.overloads)
    names = {exact.attend_exact._cache.entry(s, codegen) for s in signatures}
    assert len(names) == len(signatures) >= 2
    assert favor.attend._cache.entry(signatures[0], codegen) not in names


# ----------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path):
    """The package copied to a place of its own, to be edited."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "copy" / "favor_np", ignore=ignored)
    return tmp_path / "copy"


def test_edited_callee_is_compiled_anew(copied):
    """Stock Numba goes on running the old code: it looks at the kernel's own file only."""
    code = """
import sys
import numpy as np
import favor_np
from favor_np.cpu.kernels import exact
x = np.ones((2, 3), np.float32)
print(favor_np.exact_attention(x, x, x)[0, 0], len(exact.attend_exact.stats.cache_hits))
"""
    inside = copied / "favor_np" / "cpu" / "kernels" / "__pycache__"

    def run():
        return python(code, cwd=copied, unset=["NUMBA_CACHE_DIR"], PYTHONPATH=str(copied))

    def entries():
        return sorted(inside.glob("attend_exact-*"))

    assert run() == "1.0 0\n"
    (first,) = entries()  # by default it lies beside the sources
    assert run() == "1.0 1\n"
    path = copied / "favor_np" / "cpu" / "kernels" / "pack.py"
    text = path.read_text()
    assert text.count("one / inverse") == 1
    path.write_text(text.replace("one / inverse", "(one + one) / inverse"))
    assert run() == "2.0 0\n"
    assert run() == "2.0 1\n"
    (second,) = set(entries()) - {first}
    path.write_text(text)
    assert run() == "1.0 1\n"  # code of both versions is kept, for programs that share the folder
    assert entries() == sorted([first, second])


@pytest.mark.parametrize("shared", [name.__name__.rpartition(".")[2] for name in jit._SHARED])
@pytest.mark.parametrize("zipped", [False, True])
def test_constants_that_engines_share_are_part_of_the_sources(shared, zipped, copied, tmp_path):
    """As they were when they were loaded: that is what kernels freeze.  No comment of theirs matters."""
    path = copied / "favor_np" / f"{shared}.py"
    text = path.read_text()
    name = min(filter(str.isupper, vars(importlib.import_module(f"favor_np.{shared}"))))
    versions = text, f"{text}\n{name} = 99\n", f"# A comment.\n{text}"
    found = []
    for version in versions:
        path.write_text(version)
        place = shutil.make_archive(str(tmp_path / "new"), "zip", copied) if zipped else copied
        code = f"""
import sys
sys.path.insert(0, {str(place)!r})
import favor_np.{shared}
open({str(path)!r}, "a").write("EDITED_SINCE = 1")
from favor_np.cpu.kernels.jit import SOURCES
print(SOURCES, favor_np.{shared}.__file__)
"""
        found.append(python(code, "-B", cwd=tmp_path).split())
    sources, files = zip(*found, strict=True)
    assert all(file.startswith(str(place)) for file in files)
    assert sources[0] == sources[2] != sources[1]


def test_kernels_take_nothing_else_from_outside():
    """Of the package: constants of modules that the digest of the sources includes."""
    for path in sorted((PACKAGE / "cpu" / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("favor_np"):
                assert not isinstance(node, ast.Import) or "favor_np" not in node.names[0].name
            elif not node.module.startswith("favor_np.cpu.kernels"):
                names = {name.name for name in node.names}
                if node.module == "favor_np":
                    assert names <= {module.__name__.rpartition(".")[2] for module in jit._SHARED}
                    assert path.name == "jit.py"
                else:
                    assert node.module in {module.__name__ for module in jit._SHARED}
                    assert all(map(str.isupper, names))


def test_old_versions_are_forgotten(warm):
    """Of each kernel: all but those whose code was written last.  Drafts of a killed process go with them."""
    (path,) = files(warm)
    others = [path.with_name(path.name.replace(jit.SOURCES, f"{n:016x}")) for n in range(7)]
    for age, other in enumerate(others):
        other.write_bytes(b"code")
        os.utime(other, (1e9 - age, 1e9 - age))
    draft = others[6].with_suffix(".0123")
    draft.write_bytes(b"half")
    os.utime(draft, (0, 0))
    kin = path.with_name(path.name.replace("attend_exact-", "attend_exact_bf16-"))
    kin.write_bytes(b"another kernel")
    path.unlink()
    assert call(warm) == "compiled\n"
    assert files(warm) == sorted([path, kin, *others[: jit._VERSIONS - 1]])


@pytest.mark.parametrize("kept", ["sources", "bytecode"])
def test_a_zip_file_keeps_its_code_between_processes(copied, tmp_path, kept):
    """As zipapp makes them, with sources or with bytecode alone; another archive is other code."""

    def zipped(name):
        if kept == "bytecode":
            compileall.compile_dir(copied, quiet=2, legacy=True, force=True)
            for source in copied.rglob("*.py"):
                source.rename(source.with_suffix(".was"))
        archive = shutil.make_archive(str(tmp_path / name), "zip", copied)
        for source in copied.rglob("*.was"):
            source.rename(source.with_suffix(".py"))
        return archive

    def sources(archive):
        code = f"import sys; sys.path.insert(0, {archive!r})\n"
        return python(
            code + "from favor_np.cpu.kernels.jit import SOURCES as s; print(s); assert s"
        )

    def run(archive):
        code = f"import sys; sys.path.insert(0, {archive!r})\n" + CALL
        code += "from favor_np.cpu.kernels import jit; assert '.zip' in jit.__file__\n"
        code += "from favor_np.forecast import read_prices; assert len(read_prices()) > 9000\n"
        return call(tmp_path / "cache", code, PYTHONHASHSEED="random")

    archive = zipped("package")
    assert run(archive) == "compiled\n"
    assert run(archive) == "loaded\n"
    before = sources(archive)
    pack = copied / "favor_np" / "cpu" / "kernels" / "pack.py"
    pack.write_text(pack.read_text().replace("one / inverse", "(one * one) / inverse"))
    assert zipped("package") == archive
    assert sources(archive) != before


def test_code_that_nobody_can_tell_to_be_stale_is_not_kept(copied, tmp_path):
    """From a place that does not list its modules."""
    code = f"""
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("favor_np"):
            return importlib.util.spec_from_loader(name, self, is_package=self.is_package(name))
    def is_package(self, name):
        return name in ("favor_np", "favor_np.cpu", "favor_np.cpu.kernels")
    def get_source(self, name):
        tail = "/__init__.py" if self.is_package(name) else ".py"
        return open({str(copied)!r} + "/" + name.replace(".", "/") + tail).read()
    def exec_module(self, module):
        module.__file__ = "nowhere/" + module.__name__ + ".py"
        super().exec_module(module)

sys.meta_path.insert(0, Finder())
from favor_np.cpu.kernels import exact, jit
print(repr(jit.SOURCES), type(exact.attend_exact._cache).__name__)
"""
    assert python(code, cwd=tmp_path) == "'' NullCache\n"


# ----------------------------------------------------------------------------------------
# Faults of the disk
# ----------------------------------------------------------------------------------------


def test_damaged_files_are_replaced(warm):
    (path,) = files(warm)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert call(warm) == "compiled\n"
    assert files(warm) == [path]
    assert call(warm) == "loaded\n"


@pytest.mark.parametrize("damage", ["short", "empty", "flipped", "sealed nonsense", "a folder"])
def test_damage_is_noticed(damage, warm):
    (path,) = files(warm)
    content = path.read_bytes()
    if damage == "short":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "sealed nonsense":
        path.write_bytes(hashlib.sha256(b"nonsense").digest() + b"nonsense")
    else:
        path.unlink()
        path.mkdir()
    assert load(path) is None


@posix
def test_full_disk(tmp_path):
    """Files may not pass 10 kB: writing more raises OSError, as on a full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
    assert call(tmp_path, limit + CALL) == "compiled\n"
    assert files(tmp_path) == []


@pytest.mark.parametrize("place", ["a file", "below a file", "no such device"])
def test_no_folder_to_write_to(place, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    folder = {"a file": file, "below a file": file / "x", "no such device": Path("/proc/1/x")}[
        place
    ]
    # The call itself is the same for all of them: it finds no entry.
    code = (
        CALL if place == "a file" else "from favor_np.cpu.kernels import exact; print('compiled')\n"
    )
    code += "from favor_np.cpu.kernels import exact; print(exact.attend_exact.stats.cache_path)"
    assert call(folder, code) == "compiled\nNone\n"
    assert files(tmp_path) == [file]


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="root gives up its privileges as on Linux")
def test_read_only_cache_is_used(warm):
    """As in a container: filled when its image was built, read-only when it runs."""
    (path,) = files(warm)
    path.chmod(0o444)
    path.parent.chmod(0o555)
    code = UNPRIVILEGED + CALL + "print(stats.cache_path)"
    try:
        assert call(warm, code) == "loaded\nNone\n"
    finally:
        path.parent.chmod(0o755)


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="root gives up its privileges as on Linux")
def test_read_only_package_uses_the_home_folder(copied, tmp_path):
    inside = copied / "favor_np" / "cpu" / "kernels"
    inside.chmod(0o555)
    code = (
        UNPRIVILEGED
        + "from favor_np.cpu.kernels import exact\nprint(exact.attend_exact._cache.cache_path)"
    )
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / "cache")}
    try:
        path = python(
            code, "-B", cwd=copied, unset=["NUMBA_CACHE_DIR"], PYTHONPATH=str(copied), **home
        )
    finally:
        inside.chmod(0o755)
    assert path.startswith(str(tmp_path / "home"))


@posix
def test_two_processes_fill_a_cache_at_once(tmp_path):
    """Of two types: Numba's index can mix them up."""
    environ = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "FAVOR_NP_CACHE": "1"}
    team = [
        subprocess.Popen(
            [sys.executable, "-c", CALL, dtype], env=environ, stdout=subprocess.PIPE, text=True
        )
        for dtype in ("f4", "f8")
    ]
    for process in team:
        assert process.communicate(timeout=HANG)[0] == "compiled\n"
        assert process.returncode == 0
    assert len(files(tmp_path)) == 2
    for dtype in ("f4", "f8"):
        assert call(tmp_path, f"import sys; sys.argv[1:] = [{dtype!r}]\n" + CALL) == "loaded\n"


# ----------------------------------------------------------------------------------------
# Trust: an entry is a pickle, it can run anything
# ----------------------------------------------------------------------------------------


root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")


@posix
@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775, 0o1777, 0o770])
def test_folder_that_others_can_write_is_not_used(mode, warm):
    (path,) = files(warm)
    assert load(path) is not None
    path.parent.chmod(mode)
    assert load(path) is None
    assert not jit._writable(path.parent)
    with pytest.raises(PermissionError, match="others can write to"):
        jit._write(path.parent, "new", b"code")
    assert files(warm) == [path]


@posix
@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646, 0o620])
def test_file_that_others_can_write_is_not_used(mode, warm):
    (path,) = files(warm)
    content = path.read_bytes()
    path.chmod(mode)
    assert load(path) is None
    jit._write(path.parent, path.name, content)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert load(path) is not None
    assert files(warm) == [path]


@posix
@root
def test_what_somebody_else_owns_is_not_used(warm):
    (path,) = files(warm)
    os.chown(path, 12345, 12345)
    assert load(path) is None
    os.chown(path, 0, 0)
    assert load(path) is not None
    os.chown(path.parent, 12345, 12345)
    assert load(path) is None
    assert not jit._writable(path.parent)


@posix
def test_links_are_not_followed(warm):
    """To the file, or to the folder: who made the link may change what it leads to."""
    (path,) = files(warm)
    real = path.rename(path.with_name("elsewhere"))
    path.symlink_to(real)
    assert load(path) is None
    path.unlink()
    real.rename(path)
    assert load(path) is not None
    folder = path.parent.rename(warm / "elsewhere")
    path.parent.symlink_to(folder)
    assert load(path) is None
    assert not jit._writable(path.parent)


@posix
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_only_files_are_read(kind, warm):
    (path,) = files(warm)
    path.unlink()
    (os.mkfifo if kind == "fifo" else os.mkdir)(path)
    before = os.listdir("/proc/self/fd") if sys.platform == "linux" else None
    assert load(path) is None
    if before is not None:
        assert os.listdir("/proc/self/fd") == before


@posix
@pytest.mark.parametrize("umask", [0, 0o002, 0o077])
def test_nothing_is_open_to_others_whatever_the_umask(umask, tmp_path):
    folder, before = tmp_path / "one" / "two", os.umask(umask)
    try:
        assert jit._writable(folder)
        jit._write(folder, "entry", b"code")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "entry").stat().st_mode) == 0o644
    for made in (folder, folder.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o755 & ~umask
    assert jit._read(folder, "entry") == b"code"


@posix
def test_the_package_s_own_folder_is_as_safe_as_the_package(copied):
    """Whoever may write to the package need not write to its cache; but nobody else may."""
    code = """
from favor_np.cpu.kernels import exact
print(exact.attend_exact._cache.cache_path)
"""
    kernels = copied / "favor_np" / "cpu" / "kernels"
    inside = kernels / "__pycache__"
    inside.mkdir()
    for package, cache, used in [(0o755, 0o755, True), (0o775, 0o775, True), (0o755, 0o775, False)]:
        kernels.chmod(package)
        inside.chmod(cache)
        path = python(code, cwd=copied, unset=["NUMBA_CACHE_DIR"], PYTHONPATH=str(copied))
        assert (path.strip() == str(inside)) == used


def test_default_folders(monkeypatch):
    """Beside the package or at home, and not in a folder that all share."""
    monkeypatch.setattr(jit.numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", "/somewhere/home")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    inside, home = jit._folders()
    assert inside == PACKAGE / "cpu" / "kernels" / "__pycache__"
    if sys.platform.startswith("linux"):
        assert home.parent == Path("/somewhere/home/.cache/favor_np")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert jit._folders() == [inside]


def test_disabled_compiler_is_named():
    code = """
import numpy as np
import favor_np
try:
    favor_np.exact_attention(np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2)))
except RuntimeError as error:
    print(error)
"""
    assert "NUMBA_DISABLE_JIT" in python(code, NUMBA_DISABLE_JIT="1")
