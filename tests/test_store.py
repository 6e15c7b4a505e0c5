"""Files of machine code: whose folders are trusted, and what of a file is."""

import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from support import libraries
from support.child import python

from favor_np import store
from favor_np.cpu import code, sources

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="root gives up its privileges as on Linux"
)
root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")

SYMBOL = "favor_np_kernel_float32"
HEADER = {"sources": "0123456789abcdef", "target": "a processor", "compiler": "one"}
CODE = bytes(range(256)) * 100

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


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The folder that is written to."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FAVOR_NP_CACHE", "1")
    (folder,) = store.folders()
    return folder


@pytest.fixture
def path(place):
    """A file with code."""
    store.save(SYMBOL, HEADER, CODE)
    (found,) = place.iterdir()
    return found


def load():
    return store.load(SYMBOL, HEADER)


def files(folder):
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def process(script, *options, **environ):
    """What a process prints whose store is that of this test."""
    names = f"SYMBOL, HEADER, CODE = {SYMBOL!r}, {HEADER!r}, bytes(range(256)) * 100\n"
    return python("from favor_np import store\n" + names + script, *options, **environ)


# ----------------------------------------------------------------------------------------
# It works
# ----------------------------------------------------------------------------------------


def test_what_is_kept_is_found(path):
    before = path.stat().st_mtime_ns
    assert path.name.startswith(f"{SYMBOL}-{HEADER['sources']}-")
    assert load() == CODE
    assert path.stat().st_mtime_ns == before
    assert process("print(store.load(SYMBOL, HEADER) == CODE)") == "True\n"


def test_no_file_has_a_python_object():
    """Code is checked and run, and nothing is unpickled."""
    for module in (store, code):
        assert "pickle" not in Path(module.__file__).read_text()


def test_nothing_is_read_or_written_without_the_cache(path, monkeypatch):
    monkeypatch.setenv("FAVOR_NP_CACHE", "0")
    assert store.cache_path() is None
    assert load() is None
    path.unlink()
    store.save(SYMBOL, HEADER, CODE)
    assert files(path.parent) == []


@pytest.mark.parametrize("key", HEADER)
def test_code_of_others_is_not_found(key, path):
    other = HEADER | {key: "0" * 16}
    assert store.load(SYMBOL, other) is None
    store.save(SYMBOL, other, b"other code")
    assert load() == CODE
    assert store.load(SYMBOL, other) == b"other code"


def test_each_kernel_has_a_file_of_its_own():
    kernels = list(code.every_kernel())
    assert len({store._name(k.symbol, k.header) for k in kernels}) == len(kernels)


def test_old_versions_are_forgotten(path):
    """Of each kernel: all but those whose code was written last.  Drafts of a killed process go too."""
    others = [path.with_name(path.name.replace(HEADER["sources"], f"{n:016x}")) for n in range(7)]
    for age, other in enumerate(others):
        other.write_bytes(b"code")
        os.utime(other, (1e9 - age, 1e9 - age))
    draft = path.with_name(f"{others[6].name}.0123")
    draft.write_bytes(b"half")
    os.utime(draft, (0, 0))
    kin = path.with_name(path.name.replace("kernel_", "kernel_pipeline_"))
    kin.write_bytes(b"another kernel")
    store.save(SYMBOL, HEADER, CODE)
    assert files(path.parent) == sorted([path, kin, *others[: store._VERSIONS - 1]])


# ----------------------------------------------------------------------------------------
# Files that are not what they should be
# ----------------------------------------------------------------------------------------


def sealed(header, code=CODE):
    """A file with this header, whatever it says."""
    return (
        store._MAGIC
        + (header if isinstance(header, bytes) else json.dumps(header).encode())
        + (b"\n" + code)
    )


def seal(content):
    return json.loads(content.splitlines()[1])


DAMAGE = {
    "empty": lambda content: b"",
    "short": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "long": lambda content: content + b"\0",
    "a byte of the code": lambda content: content[:-9] + b"?" + content[-8:],
    "a byte of the header": lambda content: content.replace(b"processor", b"Processor"),
    "another format": lambda content: content.replace(b"code 1\n", b"code 2\n"),
    "no magic": lambda content: content.removeprefix(store._MAGIC),
    "a pickle": lambda content: b"\x80\x04N.",
    "magic alone": lambda content: store._MAGIC,
    "no header": lambda content: sealed(b""),
    "no JSON": lambda content: sealed(b"{"),
    "no text": lambda content: sealed(b"\xff\xfe"),
    "deep JSON": lambda content: sealed(b"[" * 100_000),
    "a list": lambda content: sealed([seal(content)]),
    "no SHA-256": lambda content: sealed({**seal(content), "sha256": None}),
    "more in the header": lambda content: sealed({**seal(content), "more": ""}),
    **{
        f"another {key}": lambda content, key=key: sealed({**seal(content), key: "0" * 16})
        for key in ("symbol", *HEADER, "sha256")
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed_and_mended(damage, path):
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    assert load() is None
    store.save(SYMBOL, HEADER, CODE)
    assert load() == CODE
    assert files(path.parent) == [path]


def test_what_these_tests_damage_is_whole(path):
    """So each of them is refused for its damage, and nothing else."""
    content = path.read_bytes()
    assert sealed(seal(content)) == content


def test_a_file_under_the_name_of_another_is_not_read(path):
    other = HEADER | {"target": "another processor"}
    path.rename(path.with_name(store._name(SYMBOL, other)))
    assert store.load(SYMBOL, other) is None


@posix
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_only_files_are_read(kind, path):
    path.unlink()
    (os.mkfifo if kind == "fifo" else os.mkdir)(path)
    before = os.listdir("/proc/self/fd") if sys.platform == "linux" else None
    assert load() is None
    if before is not None:
        assert os.listdir("/proc/self/fd") == before


# ----------------------------------------------------------------------------------------
# Faults of the disk
# ----------------------------------------------------------------------------------------


@posix
def test_full_disk(place):
    """Files may not pass 10 kB: writing more raises OSError, as on a full disk."""
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
    script += (
        "store.save(SYMBOL, HEADER, CODE); print(store.cache_path(), store.load(SYMBOL, HEADER))"
    )
    assert process(script) == f"{place} None\n"
    assert files(place) == []


@pytest.mark.parametrize("where", ["a file", "below a file", "no such device"])
def test_no_folder_to_write_to(where, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("in the way")
    folders = {"a file": file, "below a file": file / "x", "no such device": "/proc/1/x"}
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folders[where]))
    assert store.cache_path() is None
    store.save(SYMBOL, HEADER, CODE)
    assert load() is None
    assert files(tmp_path) == [file]


@posix
@linux
def test_read_only_cache_is_used(path):
    """As in a container: filled when its image was built, read-only when it runs."""
    path.chmod(0o444)
    path.parent.chmod(0o555)
    script = UNPRIVILEGED + "print(store.load(SYMBOL, HEADER) == CODE, store.cache_path())"
    try:
        assert process(script) == "True None\n"
    finally:
        path.parent.chmod(0o755)


@posix
@linux
def test_read_only_package_uses_the_home_folder(tmp_path):
    folder = libraries.copy(tmp_path / "copy")
    inside = folder / "favor_np"
    inside.chmod(0o555)
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / "cache")}
    script = UNPRIVILEGED + "from favor_np import store\nprint(store.cache_path())"
    try:
        found = python(script, "-B", cwd=folder, unset=["NUMBA_CACHE_DIR"], **home)
    finally:
        inside.chmod(0o755)
    assert found.startswith(str(tmp_path / "home"))


# ----------------------------------------------------------------------------------------
# Trust: an entry is code, it can do anything
# ----------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775, 0o1777, 0o770])
def test_folder_that_others_can_write_is_not_used(mode, path):
    path.parent.chmod(mode)
    assert load() is None
    assert store.cache_path() is None
    with pytest.raises(PermissionError, match="others can write to"):
        store._write(path.parent, "new", b"code")
    assert files(path.parent) == [path]
    path.parent.chmod(0o755)
    assert load() == CODE


@posix
@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646, 0o620])
def test_file_that_others_can_write_is_not_used(mode, path):
    path.chmod(mode)
    assert load() is None
    store.save(SYMBOL, HEADER, CODE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert load() == CODE
    assert files(path.parent) == [path]


@posix
@root
def test_what_somebody_else_owns_is_not_used(path):
    os.chown(path, 12345, 12345)
    assert load() is None
    os.chown(path, 0, 0)
    assert load() == CODE
    os.chown(path.parent, 12345, 12345)
    assert load() is None
    assert store.cache_path() is None


@posix
def test_links_are_not_followed(path):
    """To the file, or to the folder: who made the link may change what it leads to."""
    real = path.rename(path.with_name("elsewhere"))
    path.symlink_to(real)
    assert load() is None
    path.unlink()
    real.rename(path)
    assert load() == CODE
    folder = path.parent.rename(path.parents[1] / "elsewhere")
    path.parent.symlink_to(folder)
    assert load() is None
    assert store.cache_path() is None


@posix
@pytest.mark.parametrize("umask", [0, 0o002, 0o077])
def test_nothing_is_open_to_others_whatever_the_umask(umask, place):
    before = os.umask(umask)
    try:
        store.save(SYMBOL, HEADER, CODE)
    finally:
        os.umask(before)
    (path,) = files(place)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    for made in (place, place.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o755 & ~umask
    assert load() == CODE


@posix
def test_the_package_s_own_folder_is_as_safe_as_the_package(tmp_path):
    """Whoever may write to the package need not write to its cache; but nobody else may."""
    folder = libraries.copy(tmp_path / "copy")
    package = folder / "favor_np"
    inside = package / "__pycache__"
    inside.mkdir()
    for mode, cache, used in [(0o755, 0o755, True), (0o775, 0o775, True), (0o755, 0o775, False)]:
        package.chmod(mode)
        inside.chmod(cache)
        found = python(
            "from favor_np import store\nprint(store.cache_path())",
            cwd=folder,
            unset=["NUMBA_CACHE_DIR"],
        )
        assert (found.strip() == str(inside)) == used


def test_default_folders(monkeypatch):
    """Beside the package or at home, and not in a folder that all share."""
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("HOME", "/somewhere/home")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    inside, home = store.folders()
    assert inside == libraries.PACKAGE / "__pycache__"
    if sys.platform.startswith("linux"):
        assert home.parent == Path("/somewhere/home/.cache/favor_np")
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert store.folders() == [inside]


def test_a_relative_folder_is_that_of_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUMBA_CACHE_DIR", "here")
    (folder,) = store.folders()
    assert folder.parent == tmp_path / "here"


def test_the_sources_are_those_of_this_process():
    kernel = code.kernel("holds_large", np.dtype(np.float32))
    assert kernel.header["sources"] == sources.SOURCES == sources.digest() != ""
