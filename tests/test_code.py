"""Code that is compiled here: kept for the next process, never in its way, never stale."""

import ast
import compileall
import importlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from support import libraries
from support.child import FORK, HANG, environment, python

from favor_np.cpu import code, sources
from favor_np.cpu.kernels import pack

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

#: The kernel that is compiled fastest, for one type, and where its code came from.
CALL = """
import sys
import numpy as np
from favor_np.cpu import code, scaling

rows = np.ones((3, 4), (sys.argv[1:] or ["f4"])[0])
assert not scaling.holds_large(rows)
rows[1, 2] = np.finfo(rows.dtype).max
assert scaling.holds_large(rows)
print(code.kernel("holds_large", rows.dtype).origin)
"""


@pytest.fixture(autouse=True)
def compiled_here(monkeypatch):
    monkeypatch.setenv("FAVOR_NP_PREBUILT", "0")


def call(folder, code=CALL, cwd=None, **environ):
    environ = {"FAVOR_NP_CACHE": "1", "NUMBA_CACHE_DIR": str(folder)} | environ
    return python(code, "-W", "error", cwd=cwd, **environ)


def files(folder):
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache that one process has filled."""
    folder = tmp_path_factory.mktemp("filled")
    assert call(folder, FAVOR_NP_PREBUILT="0") == "compiled\n"
    return folder


@pytest.fixture
def warm(filled, tmp_path):
    return Path(shutil.copytree(filled, tmp_path / "warm"))


@pytest.fixture
def copied(tmp_path):
    """The package copied to a place of its own, to be edited."""
    return libraries.copy(tmp_path / "copy")


# ----------------------------------------------------------------------------------------
# Kept
# ----------------------------------------------------------------------------------------


def test_second_process_loads(warm):
    (path,) = files(warm)
    before = path.stat().st_mtime_ns
    loaded = call(
        warm, CALL + "print([name for name in ('numba', 'scipy') if name in sys.modules])"
    )
    assert loaded == "stored\n[]\n"
    assert files(warm) == [path]
    assert path.stat().st_mtime_ns == before


def test_nothing_is_read_or_written_without_the_cache(warm):
    before = files(warm)
    assert call(warm, FAVOR_NP_CACHE="0") == "compiled\n"
    assert files(warm) == before


def test_damaged_files_are_replaced(warm):
    (path,) = files(warm)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert call(warm) == "compiled\n"
    assert files(warm) == [path]
    assert call(warm) == "stored\n"


@posix
def test_full_disk(tmp_path):
    """Files may not pass 1 kB: writing more raises OSError, as on a full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    assert call(tmp_path, limit + CALL) == "compiled\n"
    assert files(tmp_path) == []


def test_no_folder_to_write_to(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    assert call(file) == "compiled\n"
    assert files(tmp_path) == [file]


def test_a_processor_that_llvm_does_not_know(tmp_path):
    """It passes over the name, and says so on standard error."""
    environ = environment(NUMBA_CPU_NAME="nobody", NUMBA_CACHE_DIR=str(tmp_path))
    command = [sys.executable, "-c", CALL]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == "compiled\n"


@pytest.mark.parametrize(
    "name",
    ["BOUNDSCHECK", "CPU_NAME", "CPU_FEATURES", "DEBUGINFO", "LOOP_VECTORIZE", "OPT",
     "SLP_VECTORIZE"],
)  # fmt: skip
def test_the_header_tells_the_ways_to_compile_apart(name):
    values = {"CPU_NAME": "x86-64", "CPU_FEATURES": "+sse2"}
    script = """
import numpy as np
from favor_np.cpu import code
print(code.kernel("holds_large", np.dtype("f4")).header)
"""
    plain = {f"NUMBA_{n}" for n in ("CPU_NAME", "CPU_FEATURES")}
    assert python(script, unset=plain) != python(script, **{f"NUMBA_{name}": values.get(name, "1")})


def test_the_header_names_what_compiles():
    import llvmlite
    import numba

    compiler = code.kernel("holds_large", np.dtype(np.float32)).header["compiler"]
    assert f"llvmlite={llvmlite.__version__} numba={numba.__version__} " in compiler


def test_a_kernel_is_one_object():
    """However it is asked for: it is loaded once."""
    kind = np.dtype(np.float64)
    kernel = code.kernel("pull", kind)
    assert kernel is code.kernel("pull", np.dtype("f8"), frozenset())
    assert kernel in set(code.every_kernel())
    assert kernel is not code.kernel("pull", np.dtype(np.float32))
    another = code.Kernel("holds_large", kind, frozenset())
    assert another.load() != code.kernel("holds_large", kind).load()  # and both are there


def test_what_kernels_call_has_no_machine_code_of_its_own():
    """To call it would crash."""
    code.Kernel("holds_large", np.dtype(np.float32), frozenset()).compile()
    assert pack.count_large.overloads
    with pytest.raises(TypeError, match="only kernels can call it"):
        pack.count_large(np.ones((2, 2), np.float32), 0, 2)


@posix
def test_two_processes_fill_a_cache_at_once(tmp_path):
    team = [
        subprocess.Popen(
            [sys.executable, "-c", CALL, dtype],
            env=environment(NUMBA_CACHE_DIR=str(tmp_path), FAVOR_NP_CACHE="1"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for dtype in ("f4", "f8", "f4", "f8")
    ]
    for process in team:
        assert process.communicate(timeout=HANG)[0] in ("compiled\n", "stored\n")
        assert process.returncode == 0
    assert len(files(tmp_path)) == 2
    for dtype in ("f4", "f8"):
        assert call(tmp_path, f"import sys; sys.argv[1:] = [{dtype!r}]\n" + CALL) == "stored\n"


def test_disabled_compiler_is_named():
    script = """
import numpy as np
import favor_np
try:
    favor_np.exact_attention(np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2)))
except RuntimeError as error:
    print(error)
"""
    found = python(script, NUMBA_DISABLE_JIT="1", FAVOR_NP_CACHE="0")
    assert "unset NUMBA_DISABLE_JIT" in found


# ----------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------


def test_edited_callee_is_compiled_anew(copied):
    """Stock Numba goes on running the old code: it looks at the kernel's own file only."""
    inside = copied / "favor_np" / "__pycache__"
    script = """
import numpy as np
from favor_np.cpu import code, scaling
large = scaling.holds_large(np.full((2, 3), 2**33, "f4"))
print(int(large), code.kernel("holds_large", np.dtype("f4")).origin)
"""

    def run():
        return python(script, cwd=copied, unset=["NUMBA_CACHE_DIR"])

    def entries():
        return sorted(inside.glob("*.code"))

    assert run() == "1 compiled\n"
    (first,) = entries()  # by default it lies beside the sources
    assert run() == "1 stored\n"
    path = copied / "favor_np" / "cpu" / "kernels" / "pack.py"
    text = path.read_text()
    assert text.count("SINGLE, DOUBLE = 2.0**32") == 1
    path.write_text(text.replace("SINGLE, DOUBLE = 2.0**32", "SINGLE, DOUBLE = 2.0**34"))
    assert run() == "0 compiled\n"
    assert run() == "0 stored\n"
    (second,) = set(entries()) - {first}
    path.write_text(text)
    assert run() == "1 stored\n"  # both versions are kept, for programs that share the folder
    assert entries() == sorted([first, second])


@pytest.mark.parametrize("name", sources._SHARED)
def test_sources_that_change_while_they_are_imported_are_not_kept(name, copied, tmp_path):
    """Nobody could tell whose code it is."""
    path = copied.joinpath(*name.split(".")).with_suffix(".py")
    edit = f"with open({str(path)!r}, 'a') as file: file.write('# edited')\n"
    script = "import favor_np.cpu.code\n" + edit + CALL
    assert call(tmp_path / "cache", script, cwd=copied) == "compiled\n"
    assert files(tmp_path / "cache") == []


@pytest.mark.parametrize("name", sources._SHARED)
def test_modules_that_kernels_use_are_part_of_the_sources(name, copied):
    path = copied.joinpath(*name.split(".")).with_suffix(".py")

    def digest():
        return python("from favor_np.cpu.sources import SOURCES; print(SOURCES)", cwd=copied)

    before = digest()
    path.write_text(path.read_text() + "MORE = 1\n")
    assert digest() != before


@pytest.mark.parametrize("name", [module.__name__ for module in sources._EARLIER])
@pytest.mark.parametrize("zipped", [False, True])
def test_constants_that_engines_share_are_part_of_the_sources(name, zipped, copied, tmp_path):
    """As they were when they were loaded: that is what kernels freeze.  No comment of theirs matters."""
    path = copied.joinpath(*name.split(".")).with_suffix(".py")
    text = path.read_text()
    constant = min(n for n in vars(importlib.import_module(name)) if n.isupper() and n[0] != "_")
    versions = text, f"{text}\n{constant} = 99\n", f"# A comment.\n{text}"
    found = []
    for version in versions:
        path.write_text(version)
        place = shutil.make_archive(str(tmp_path / "new"), "zip", copied) if zipped else copied
        script = f"""
import sys
sys.path.insert(0, {str(place)!r})
import {name}
open({str(path)!r}, "a").write("EDITED_SINCE = 1")
from favor_np.cpu.sources import SOURCES
print(SOURCES, {name}.__file__)
"""
        found.append(python(script, "-B", cwd=tmp_path).split())
    digests, places = zip(*found, strict=True)
    assert all(file.startswith(str(place)) for file in places)
    assert digests[0] == digests[2] != digests[1]


def test_kernels_take_nothing_else_from_outside():
    """Of the package: modules that the digest of the sources includes."""
    whole, constants = set(sources._SHARED), {module.__name__ for module in sources._EARLIER}
    for path in sorted((libraries.PACKAGE / "cpu" / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("favor_np") for name in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("favor_np"):
                names = {f"{node.module}.{name.name}" for name in node.names}
                if node.module.startswith("favor_np.cpu.kernels") or node.module in whole:
                    continue
                if node.module in constants:
                    assert all(name.rpartition(".")[2].isupper() for name in names), path
                else:
                    kernels = {name for name in names if name.startswith("favor_np.cpu.kernels.")}
                    assert names <= whole | kernels, path


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

    def digest(archive):
        script = f"import sys; sys.path.insert(0, {archive!r})\n"
        return python(script + "from favor_np.cpu.sources import SOURCES as s; print(s); assert s")

    def run(archive):
        script = f"import sys; sys.path.insert(0, {archive!r})\n" + CALL
        script += "assert '.zip' in code.__file__\n"
        script += "from favor_np.forecast import read_prices; assert len(read_prices()) > 9000\n"
        return call(tmp_path / "cache", script, PYTHONHASHSEED="random")

    archive = zipped("package")
    assert run(archive) == "compiled\n"
    assert run(archive) == "stored\n"
    before = digest(archive)
    path = copied / "favor_np" / "cpu" / "kernels" / "pack.py"
    path.write_text(
        path.read_text().replace("SINGLE, DOUBLE = 2.0**32", "SINGLE, DOUBLE = 2.0**34")
    )
    assert zipped("package") == archive
    assert digest(archive) != before


def test_code_that_nobody_can_tell_to_be_stale_is_not_kept(copied, tmp_path):
    """From a place that does not list its modules."""
    script = f"""
import importlib.abc, importlib.util, pathlib, sys

class Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("favor_np"):
            return importlib.util.spec_from_loader(name, self, is_package=self.is_package(name))
    def is_package(self, name):
        return name in ("favor_np", "favor_np.cpu", "favor_np.cpu.kernels")
    def get_source(self, name):
        tail = "/__init__.py" if self.is_package(name) else ".py"
        return pathlib.Path({str(copied)!r}, name.replace(".", "/") + tail).read_text()
    def exec_module(self, module):
        module.__file__ = "nowhere/" + module.__name__ + ".py"
        super().exec_module(module)

sys.meta_path.insert(0, Finder())
from favor_np.cpu.sources import SOURCES
print(repr(SOURCES))
"""
    assert call(tmp_path / "cache", script + CALL, cwd=tmp_path) == "''\ncompiled\n"
    assert files(tmp_path / "cache") == []


# ----------------------------------------------------------------------------------------
# Interrupts, threads and forks while something is compiled
# ----------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("when", ["before", "in Numba"])
def test_keyboard_interrupt_while_compiling(when, tmp_path):
    script = f"""
import os, signal, sys, threading
import numpy as np
import favor_np
from favor_np.cpu import code

signal.signal(signal.SIGINT, signal.default_int_handler)
kernel = code.kernel("attend_exact", np.dtype("f4"))

def interrupt(*anything):
    os.kill(os.getpid(), signal.SIGINT)

if {when!r} == "before":
    code.LISTENERS.append(interrupt)
else:
    import numba.core.event as event
    class Begun(event.Listener):
        on_start = on_end = interrupt
    begun = Begun()
    event.register("numba:compile", begun)
x = np.ones((4, 2048, 16), np.float32)
try:
    favor_np.exact_attention(x, x, x, num_threads=2)
except KeyboardInterrupt:
    pass
else:
    raise AssertionError("not interrupted")
assert kernel.origin == "", "a helper went on compiling"
if {when!r} == "before":
    code.LISTENERS.clear()
else:
    event.unregister("numba:compile", begun)
assert (favor_np.exact_attention(x, x, x, num_threads=2) == 1).all()
assert kernel.origin == "compiled"
"""
    call(tmp_path, script, FAVOR_NP_CACHE="0")


def test_first_calls_of_many_threads_compile_once(tmp_path):
    script = """
import threading
import numpy as np
from favor_np.cpu import code, scaling

compiled, results, barrier = [], [], threading.Barrier(8)
code.LISTENERS.append(compiled.append)

def work():
    barrier.wait()
    results.append(scaling.holds_large(np.ones((3, 4), np.float32)))

team = [threading.Thread(target=work) for _ in range(8)]
for thread in team: thread.start()
for thread in team: thread.join()
print(results == 8 * [False], len(compiled))
"""
    assert call(tmp_path, script, FAVOR_NP_CACHE="0") == "True 1\n"


#: A child that calls while another thread of its parent compiled.
COMPILING = (
    FORK
    + """
import os, signal, sys, threading, time
import numpy as np
import favor_np
from favor_np.cpu import code

x = np.ones((2, 3, 4), np.float32)
fm = favor_np.feature_map("positive", 4, 8)

def exact():
    assert (favor_np.exact_attention(x, x, x) == 1).all()

def large():
    favor_np.cpu.scaling.holds_large(x[0])
"""
)


@forks
@pytest.mark.parametrize("use", ["exact", "large"])
@pytest.mark.parametrize("when", ["begun", "in Numba"])
def test_fork_while_another_thread_compiles(use, when, tmp_path):
    """The first call of all may be one that the pool knows nothing of."""
    python(
        COMPILING
        + f"""
from favor_np.cpu import launch
begun = threading.Event()
if {when!r} == "begun":
    code.LISTENERS.append(lambda kernel: begun.set())
else:
    import numba.core.event as event
    class Begun(event.Listener):
        def on_start(self, event): begun.set()
        def on_end(self, event): pass
    event.register("numba:compile", Begun())
other = threading.Thread(target={use})
other.start()
begun.wait()
fork({use})
other.join()
{use}()
""",
        "-W",
        "ignore:This process:DeprecationWarning",
        FAVOR_NP_CACHE="0",
        NUMBA_CACHE_DIR=str(tmp_path),
    )


@forks
def test_a_fork_that_waits_for_a_compilation_does_not_hold_logging(tmp_path):
    """Numba logs while it compiles: each would wait for the other."""
    python(
        COMPILING
        + """
from favor_np.cpu import launch
assert "logging" not in sys.modules
begun = threading.Event()

def log(kernel):
    begun.set()
    time.sleep(0.3)  # until the other thread is in its hooks
    import logging
    logging.getLogger("new").info("this takes the lock of logging")

code.LISTENERS.append(log)
other = threading.Thread(target=large)
other.start()
begun.wait()
fork(large)
other.join()
""",
        "-W",
        "ignore:This process:DeprecationWarning",
        FAVOR_NP_CACHE="0",
        NUMBA_CACHE_DIR=str(tmp_path),
    )


@forks
def test_locks_are_free_after_a_fork():
    code._hold()
    code._hold()
    other = []
    thread = threading.Thread(target=lambda: other.append(code.LOCK.acquire(blocking=False)))
    thread.start()
    thread.join()
    assert other == [False]
    code._let_go()
    code._let_go()

    def take():
        other.append(code.LOCK.acquire(blocking=False))
        code.LOCK.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert other == [False, True]
