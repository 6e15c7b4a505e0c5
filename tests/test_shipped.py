"""Machine code that came with the package: run without a compiler, and only if it is what it says."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from support import libraries
from support.child import BEGIN, python

from favor_np.cpu import processor
from favor_np.cpu.processor import TARGET

PREBUILD = libraries.PREBUILD
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="builds a library for Linux"
)

#: The smallest kernel, where its code came from, and why.
CALL = """
import numpy as np
from favor_np.cpu import code, scaling

rows = np.ones((3, 4), np.float32)
assert not scaling.holds_large(rows)
rows[1, 2] = 3e38
assert scaling.holds_large(rows)
print(code.kernel("holds_large", rows.dtype).origin)
print(code.described())
"""

#: What a process would get, whatever it needs then: asked, and not run.
ASK = """
import numpy as np
from favor_np.cpu import code, shipped

found = code.kernel("holds_large", np.dtype("f4"))._shipped()
print(found is not None, shipped.features() is not None)
print(code.described())
"""

#: Who imports what compiles gets an error.
ALONE = "import sys\nsys.modules['numba'] = sys.modules['llvmlite'] = None\n"

SHIPPED = f"shipped for {TARGET.level}\n"
NOTHING = f"compiled here for {TARGET.level}: this installation came without machine code\n"
OTHERS = (
    f"compiled here for {TARGET.level}: the sources are not those of the code that came along\n"
)
DAMAGED = f"compiled here for {TARGET.level}: what came along has none for it, or is damaged\n"


def run(script, package, *options, **environ):
    """What a process prints whose package is this copy."""
    environ = {"FAVOR_NP_PREBUILT": "1"} | environ
    return python(script, "-W", "error", *options, cwd=package, **environ)


@pytest.fixture
def package(shipped_package, tmp_path):
    """A copy with libraries, to be spoilt."""
    return shutil.copytree(shipped_package, tmp_path / "copy")


def manifest(package):
    return json.loads((libraries.folder(package) / "manifest.json").read_text())


def set_manifest(package, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (libraries.folder(package) / "manifest.json").write_text(text)


def library(package, name=TARGET.level):
    return libraries.folder(package) / f"{name}.{PREBUILD['SUFFIX']}"


# ----------------------------------------------------------------------------------------
# It works
# ----------------------------------------------------------------------------------------


def test_all_that_is_shipped_runs_without_a_compiler(shipped_package):
    script = """
from favor_np.cpu import code
print({kernel.origin for kernel in code.every_kernel() if kernel.origin})
print(len([kernel for kernel in code.every_kernel() if kernel.origin]))
"""
    count = sum(map(len, libraries.KERNELS.values()))
    found = run(ALONE + libraries.CALLS + script, shipped_package)
    assert found == f"{{'shipped'}}\n{count}\n"


def test_nothing_that_compiles_is_imported(shipped_package):
    script = "import sys\nprint([n for n in ('numba', 'llvmlite', 'scipy') if n in sys.modules])"
    assert run(libraries.CALLS + script, shipped_package) == "[]\n"


def test_both_ways_compute_the_same_bits(shipped_package):
    script = """
import hashlib
print([hashlib.sha256(np.ascontiguousarray(x)).hexdigest() for x in results])
"""
    here = python(libraries.CALLS + script, FAVOR_NP_PREBUILT="0")
    assert run(libraries.CALLS + script, shipped_package) == here


def test_it_can_be_turned_off(shipped_package):
    origin, described = run(CALL, shipped_package, FAVOR_NP_PREBUILT="0").splitlines()
    assert origin in ("compiled", "stored")
    assert described == f"compiled here for {TARGET.level}: FAVOR_NP_PREBUILT=0"
    assert run(ALONE + CALL, shipped_package) == "shipped\n" + SHIPPED


def test_neither_read_nor_written_is_what_is_kept(shipped_package, tmp_path):
    """What was compiled here before does not matter, and nothing is added to it."""
    found = run(CALL, shipped_package, NUMBA_CACHE_DIR=str(tmp_path), FAVOR_NP_CACHE="1")
    assert found == "shipped\n" + SHIPPED
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_is_not_shipped_is_compiled(shipped_package):
    """Beside those that are."""
    script = CALL + "assert not scaling.holds_large(rows.astype(np.float64) / 1e38)\n"
    script += "print(code.kernel('holds_large', np.dtype('f8')).origin)"
    found = run(script, shipped_package, FAVOR_NP_CACHE="0")
    assert found == "shipped\n" + SHIPPED + "compiled\n"


def test_a_read_only_package_is_enough(package):
    """With no home, and nothing that can be written."""
    folders = [path for path in (package, *package.rglob("*")) if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        found = run(ALONE + CALL, package, "-B", HOME="/nowhere", XDG_CACHE_HOME="/nowhere")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert found == "shipped\n" + SHIPPED


def test_threads_and_forks_need_no_compiler(shipped_package):
    script = """
check(2)
assert helpers() == 1
other = threading.Thread(target=check)
other.start()
other.join()
if hasattr(os, "fork"):
    pid = os.fork()
    if pid == 0:
        try:
            check(2)
        finally:
            os._exit(0 if helpers() == 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0
print("fine")
"""
    warn = "-Wignore:This process:DeprecationWarning"  # of any fork beside threads
    assert run(ALONE + BEGIN + script, shipped_package, warn) == "fine\n"


def test_first_calls_of_many_threads_and_forks(shipped_package):
    """A child whose parent was about to load a library loads it itself."""
    script = """
import os, signal, threading
import numpy as np
from favor_np.cpu import scaling

rows = np.ones((3, 4), np.float32)
barrier, results = threading.Barrier(5), []

def work():
    barrier.wait()
    results.append(scaling.holds_large(rows))

team = [threading.Thread(target=work) for _ in range(4)]
for thread in team: thread.start()
barrier.wait()
for _ in range(4):
    pid = os.fork() if hasattr(os, "fork") else None
    if pid == 0:
        signal.alarm(600)
        os._exit(int(scaling.holds_large(rows)))
    assert pid is None or os.waitpid(pid, 0)[1] == 0
for thread in team: thread.join()
print(results)
"""
    warn = "-Wignore:This process:DeprecationWarning"
    assert run(ALONE + script, shipped_package, warn) == f"{4 * [False]}\n"


# ----------------------------------------------------------------------------------------
# Manifests and libraries that are not what they should be
# ----------------------------------------------------------------------------------------


def in_manifest(change):
    """Spoil the manifest: `change` gets it, and its entry of the library that is needed."""

    def spoil(package):
        content = manifest(package)
        content = change(content, content["libraries"][TARGET.level]) or content
        set_manifest(package, content)

    return spoil


def in_library(change):
    """Spoil the content of the library."""

    def spoil(package):
        path = library(package)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def outside(name):
    """Put the library where no library belongs, and its true SHA-256 into the manifest."""

    def spoil(package):
        target = (libraries.folder(package) / name.format(package)).resolve()
        target.parent.mkdir(exist_ok=True)
        library(package).rename(target)
        content = manifest(package)
        content["libraries"][TARGET.level]["file"] = name.format(package)
        set_manifest(package, content)

    return spoil


def no_library(package):
    library(package).unlink()


def no_manifest(package):
    (libraries.folder(package) / "manifest.json").unlink()


def a_folder(package):
    library(package).unlink()
    library(package).mkdir()


SPOILT = {
    # the manifest as a whole: no library is touched, that which asks the processor neither
    "no manifest": (no_manifest, NOTHING),
    "empty": (in_manifest(lambda all, mine: " "), NOTHING),
    "half": (in_manifest(lambda all, mine: json.dumps(all)[:50]), NOTHING),
    "no text": (lambda package: (libraries.folder(package) / "manifest.json").write_bytes(b"\xff"),
                NOTHING),
    "a list": (in_manifest(lambda all, mine: [all]), NOTHING),
    "no sources": (in_manifest(lambda all, mine: all.pop("sources") and None), OTHERS),
    "other sources": (in_manifest(lambda all, mine: all.update(sources=16 * "0")), OTHERS),
    "sources of another kind": (in_manifest(lambda all, mine: all.update(sources=[1])), OTHERS),
    # what it says of libraries
    "no libraries": (in_manifest(lambda all, mine: all.pop("libraries") and None), DAMAGED),
    "libraries are a list": (in_manifest(lambda all, mine: all.update(libraries=[])), DAMAGED),
    "libraries are nothing": (in_manifest(lambda all, mine: all.update(libraries=None)), DAMAGED),
    "another level": (in_manifest(lambda all, mine: all["libraries"].pop(TARGET.level) and None),
                      DAMAGED),
    "an entry is a name": (in_manifest(lambda all, mine: all["libraries"].update({TARGET.level: "x"})),
                           DAMAGED),
    "no file": (in_manifest(lambda all, mine: mine.pop("file") and None), DAMAGED),
    "file is a number": (in_manifest(lambda all, mine: mine.update(file=1)), DAMAGED),
    "file is no path": (in_manifest(lambda all, mine: mine.update(file="a\0b")), DAMAGED),
    "file is the folder": (in_manifest(lambda all, mine: mine.update(file=".")), DAMAGED),
    "file is the folder above": (in_manifest(lambda all, mine: mine.update(file="..")), DAMAGED),
    "no SHA-256": (in_manifest(lambda all, mine: mine.pop("sha256") and None), DAMAGED),
    "SHA-256 is nothing": (in_manifest(lambda all, mine: mine.update(sha256=None)), DAMAGED),
    "another SHA-256": (in_manifest(lambda all, mine: mine.update(sha256=64 * "0")), DAMAGED),
    # where a library lies
    "file above": (outside("../spare.so"), DAMAGED),
    "file below": (outside("below/spare.so"), DAMAGED),
    "file elsewhere": (outside("{}/spare.so"), DAMAGED),
    # the library
    "no library": (no_library, DAMAGED),
    "a folder": (a_folder, DAMAGED),
    "empty library": (in_library(lambda content: b""), DAMAGED),
    "half a library": (in_library(lambda content: content[: len(content) // 2]), DAMAGED),
    "a byte less": (in_library(lambda content: content[:-1]), DAMAGED),
    "a byte more": (in_library(lambda content: content + b"\0"), DAMAGED),
    "another byte": (in_library(lambda content: content[:5000] + bytes([content[5000] ^ 1])
                                + content[5001:]), DAMAGED),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "described"), SPOILT.values(), ids=SPOILT)
def test_what_is_not_whole_is_not_loaded(spoil, described, package):
    spoil(package)
    found, said = run(ASK, package).split("\n", 1)
    assert said == described
    assert found.startswith("False ")


def test_what_these_tests_spoil_is_whole(package):
    assert run(ASK, package) == f"True {PREBUILD['X86']}\n" + SHIPPED


@pytest.mark.parametrize("name", ["no manifest", "other sources", "another byte", "no library"])
def test_what_is_not_loaded_is_compiled(name, package):
    spoil, described = SPOILT[name]
    spoil(package)
    assert run(CALL, package, FAVOR_NP_CACHE="0") == "compiled\n" + described


@linux
@pytest.mark.parametrize("whole", [False, True])
def test_a_library_is_checked_before_it_is_loaded(whole, package, tmp_path):
    """What is loaded runs at once: this one leaves a mark."""
    mark = tmp_path / "mark"
    source = tmp_path / "library.c"
    source.write_text(
        "#include <fcntl.h>\n"
        f'__attribute__((constructor)) void f(void) {{ open("{mark}", O_CREAT, 0600); }}\n'
    )
    command = [
        *PREBUILD["compiler"](),
        "-shared",
        "-fPIC",
        "-o",
        str(library(package)),
        str(source),
    ]
    subprocess.run(command, check=True)
    content = manifest(package)
    if whole:
        digest = hashlib.sha256(library(package).read_bytes()).hexdigest()
        content["libraries"][TARGET.level]["sha256"] = digest
        set_manifest(package, content)
    found = run(ASK, package)
    assert mark.exists() == whole
    assert found.startswith("False ")  # it has no kernels


@pytest.mark.skipif(not PREBUILD["X86"], reason="asks an x86-64 processor")
def test_a_damaged_library_asks_no_processor(package):
    """LLVM is asked then, and finds the same."""
    path = library(package, "processor")
    path.write_bytes(path.read_bytes()[:-1])
    found, said = run(ASK, package).split("\n", 1)
    assert (found, said) == ("True False", SHIPPED)


@pytest.mark.skipif(not PREBUILD["X86"], reason="asks an x86-64 processor")
def test_the_processor_is_what_llvm_says(shipped_package):
    script = """
import llvmlite.binding as llvm
from favor_np.cpu import shipped

found, vendor = shipped.features()
llvm = llvm.get_host_cpu_features(), llvm.get_host_cpu_name()
print(found ^ {name for name in shipped._BITS if llvm[0].get(name)})
print((vendor == "AuthenticAMD") - llvm[1].startswith("znver"))
"""
    assert run(script, shipped_package) == "frozenset()\n0\n"


@pytest.mark.skipif(not PREBUILD["X86"], reason="names x86-64 processors")
def test_code_for_a_level_that_is_named(shipped_package):
    """The libraries have no other than this machine's."""
    level = next(name for name in processor._LEVELS if name != TARGET.level)
    _, described = run(ASK, shipped_package, NUMBA_CPU_NAME=level).split("\n", 1)
    assert described == DAMAGED.replace(TARGET.level, level)


def test_libraries_need_nothing_but_what_every_process_has(shipped_package):
    """So they run wherever Python does."""
    if shutil.which("readelf") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs readelf")
    for path in libraries.folder(shipped_package).glob("*.so"):
        command = ["readelf", "--wide", "--dynamic", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "(NEEDED)" not in said
        assert "TEXTREL" not in said


def test_no_path_of_who_built_them_is_in_the_libraries(shipped_package):
    for path in libraries.folder(shipped_package).iterdir():
        content = path.read_bytes()
        assert os.fsencode(libraries.PACKAGE.parent) not in content
        assert os.fsencode(shipped_package) not in content
