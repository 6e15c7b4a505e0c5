#!/usr/bin/env -S uv run --script

# /// script
# dependencies = ["nox>=2025.5"]
# ///

import re
import shutil
import time
from pathlib import Path

import nox
import nox.command

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|virtualenv"

PROJECT = nox.project.load_toml()


def install(session: nox.Session, *groups: str) -> None:
    session.install("-e", ".", *nox.project.dependency_groups(PROJECT, *groups))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests and the doctests."""
    install(session, "test")
    session.run("pytest", *session.posargs)


@nox.session(default=False)
def interop(session: nox.Session) -> None:
    """Test the bridges to JAX and PyTorch, which take minutes to install."""
    install(session, "interop")
    files = session.posargs or ["tests/interop"]
    session.run("pytest", *files, env={"FAVOR_NP_TEST_INTEROP": "require"})


#: The oldest onnxruntime that each form claims, and which of its tests that passes.
OLD_ONNXRUNTIMES = {
    "1.19.2": "(chunk or whole) and not (gated or float64 or opset)",
    "1.25.1": "gated and not (float64 or opset or no_positions or export)",
}


@nox.session(default=False, python="3.11")
def onnx(session: nox.Session) -> None:
    """Test ONNX models in old versions of onnxruntime, OpenVINO, and onnxruntime-web under Node."""
    if not shutil.which("npm"):
        session.error("onnxruntime-web needs Node.js and npm")
    session.install(
        "-e", ".[onnx]", "openvino>=2026.4", *nox.project.dependency_groups(PROJECT, "test")
    )
    folder = Path(session.create_tmp()).absolute()
    packages = ("onnxruntime-web@1.30.0",)
    session.run("npm", "install", f"--prefix={folder}", "--no-audit", *packages, external=True)
    environ = {"FAVOR_NP_TEST_INTEROP": "require", "FAVOR_NP_TEST_NODE": str(folder)}
    session.run("pytest", "tests/interop/test_onnx_runtimes.py", env=environ)
    for version, tests in OLD_ONNXRUNTIMES.items():
        session.install(f"onnxruntime=={version}")
        files = (f"tests/interop/test_onnx{of}.py" for of in ("", "_models", "_forecasters"))
        session.run("pytest", *files, "-k", tests, env=environ)


@nox.session(default=False)
def cuda(session: nox.Session) -> None:
    """Test the kernels for GPUs where there is none, and the tools that compile and execute them."""
    install(session, "cuda")
    files = session.posargs or ["tests/cuda", "tools/cuda_on_cpu"]
    kept = Path(session.create_tmp(), "ptxrun").absolute()  # compiled once for all workers and runs
    environ = {"FAVOR_NP_TEST_CUDA": "require", "PTXRUN_CACHE": str(kept)}
    session.run("pytest", *files, env=environ)


#: What `arm64` tests.  An emulated compiler takes up to two minutes a kernel, so there are few: of
#: those for float64 only attention and steps.
ON_ARM64 = [
    "tests/test_projection.py",  # the same bits on every machine
    "tests/test_golden.py",
    "tests/test_storage.py::test_files_of_older_versions_go_on",  # written on x86-64
    "tests/test_state.py::test_steps_are_causal_attention",
    "tests/test_attention.py::test_every_length_around_the_tiles",
    "tests/test_exact.py::test_every_length_around_the_tiles[True-float32]",
    "tests/test_exact_vjp.py::test_every_length_around_the_tiles_and_blocks[True-float32]",
    "tests/test_exact.py::test_threads_change_no_bit[lead0-200-True-float32]",
    "-k=not f64 or not (vjp or exact)",
]

#: What apt reads after the machine's own settings: packages for arm64, and its own folder.
APT = """
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; "amd64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
Dir::State "{0}";
Dir::State::status "{0}/status";
Dir::Cache "{0}";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


@nox.session(default=False, reuse_venv=True)
def arm64(session: nox.Session) -> None:
    """Test the kernels of 64-bit ARM by emulation, on x86-64 with Debian; -R downloads nothing."""
    folder = Path(session.create_tmp()).absolute()
    root, wheels = folder / "root", folder / "wheels"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        session.error("emulator and Python come from Debian's packages: there is no apt-get here")
    (folder / "archives/partial").mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    (folder / "apt.conf").write_text(APT.format(folder))
    apt = ("apt-get", "--quiet", f"--config-file={folder}/apt.conf")
    packages = ("python3", "libstdc++6", "qemu-user-static:amd64")
    try:
        session.run_install(*apt, "update", external=True)
        session.run_install(*apt, "autoclean", external=True)  # what is out of date
        session.run_install(*apt, "install", "--download-only", "--yes", *packages, external=True)
    except nox.command.CommandFailed:
        session.error(f"these packages could not be got from Debian: {', '.join(packages)}")
    for package in folder.glob("archives/*.deb"):
        session.run_install("dpkg-deb", "-x", str(package), str(root), log=False, external=True)
    python = (root / "usr/bin/python3").resolve()  # python3.11
    session.install("pip>=25.1")
    session.run_install(
        *("python", "-m", "pip", "install", "--quiet", "--upgrade", f"--target={wheels}"),
        *("--platform=manylinux_2_28_aarch64", "--only-binary=:all:"),
        f"--python-version={python.name.removeprefix('python')}",
        *PROJECT["project"]["dependencies"],
        *nox.project.dependency_groups(PROJECT, "arm64"),
    )
    processor = "neoverse-n1"
    session.run(
        *(f"{root}/usr/bin/qemu-aarch64-static", "-cpu", processor, "-L", str(root), str(python)),
        *("-m", "pytest", *(session.posargs or ON_ARM64)),
        external=True,
        env={
            "PYTHONPATH": f"{wheels}:{Path.cwd()}",
            "NUMBA_CACHE_DIR": f"{folder}/kernels",  # kept for the next time
            "NUMBA_CPU_NAME": processor,  # LLVM does not know an emulated one
        },
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, layers and the project's files."""
    install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("lint-imports")
    session.run("repo-review", ".")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; warnings are errors, examples and notebook are run."""
    install(session, "docs")
    session.run("jupyter", "execute", "docs/demo.ipynb")
    session.run("sphinx-build", "-W", "-n", "-b", "html", "docs", "docs/_build/html")


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Run the benchmark suite once, quickly, without recording it."""
    install(session, "bench")
    session.chdir("asv_benchmarks")
    home = {"HOME": str(session.create_tmp())}  # asv notes the machine there
    session.run("asv", "check", "-E", "existing")
    session.run("asv", "machine", "--yes", env=home)
    quick = ("--quick", "--dry-run", "--show-stderr", "--launch-method", "forkserver")
    session.run("asv", "run", "-E", "existing", *quick, *session.posargs, env=home)


@nox.session(default=False)
def frozen(session: nox.Session) -> None:
    """Freeze a program with PyInstaller, and run it twice: once it compiles, then it need not."""
    session.install(".", *nox.project.dependency_groups(PROJECT, "frozen"))
    folder = Path(session.create_tmp()).absolute()  # a relative $XDG_CACHE_HOME counts as none
    places = [f"--{name}path={folder}/{name}" for name in ("dist", "work", "spec")]
    session.run("pyinstaller", "--log-level=WARN", "--noconfirm", *places, "tests/frozen.py")
    environ = {"XDG_CACHE_HOME": f"{folder}/cache", "NUMBA_CACHE_DIR": ""}
    for expected in ("compiled", "stored"):
        session.run(f"{folder}/dist/frozen/frozen", expected, env=environ, external=True)


@nox.session(default=False)
def wheel(session: nox.Session) -> None:
    """Build a wheel with machine code for this processor, and use it where Numba is not."""
    folder = Path(session.create_tmp()).absolute() / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    build = ("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), ".")
    session.run(*build, env={"FAVOR_NP_PREBUILD": "here"})
    (path,) = folder.glob("*.whl")
    size = path.stat().st_size / 1e6
    if size > 15:
        session.error(f"{path.name} has {size:.1f} MB; it should stay below 15")
    session.log(f"{path.name}: {size:.1f} MB")
    session.install("hatchling>=1.27")
    session.run("python", "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder))
    session.run("python", "tools/distributions.py", *map(str, folder.iterdir()))
    session.install("numpy>=2.0", "scipy>=1.13")
    session.install("--no-deps", "--force-reinstall", str(path))
    program = str(Path("tests/shipped.py").absolute())
    session.chdir(session.create_tmp())  # not where the sources are
    session.run("python", program)


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """Make the files of a release in dist/, if the version, the changelog and they are in order."""
    version = re.search(r'= "(.+)"', Path("favor_np/_version.py").read_text())[1]
    newest = re.search(r"^## (.*)$", Path("CHANGELOG.md").read_text(), re.MULTILINE)[1]
    if not re.fullmatch(re.escape(version) + r" \(\d{4}-\d\d-\d\d\)", newest):
        session.error(f"CHANGELOG.md should begin with '## {version} (date)', got '## {newest}'")
    if f"version: {version}\n" not in Path("CITATION.cff").read_text():
        session.error(f"CITATION.cff should have version {version}")
    shutil.rmtree("dist", ignore_errors=True)
    session.install("build", "twine")
    session.run("python", "-m", "build")
    files = [str(path) for path in Path("dist").iterdir()]
    session.run("twine", "check", "--strict", *files)
    session.run("python", "tools/distributions.py", *files)
    session.install("--force-reinstall", *(name for name in files if name.endswith(".whl")))
    session.chdir(session.create_tmp())  # not where the sources are
    session.run("favor-np", "forecast")


@nox.session(default=False, python="3.11")
def oldest(session: nox.Session) -> None:
    """Test with the oldest NumPy, Numba and SciPy that are allowed."""
    oldest = [
        re.sub(r">=([\d.]+).*", r"==\1.*", name) for name in PROJECT["project"]["dependencies"]
    ]
    session.install(*oldest, "hypothesis>=6.130", "ml_dtypes>=0.5", "pytest>=9")
    session.install("--no-deps", "-e", ".")
    session.run("python", "-m", "pip", "list")
    session.run("pytest", *(session.posargs or ON_OLDEST))


#: What `oldest` tests: what touches other packages, and every kind of kernel once.
ON_OLDEST = [
    *(f"tests/test_{name}.py" for name in ("projection", "golden", "features", "state")),
    *(f"tests/test_{name}.py" for name in ("storage", "attention", "exact", "vjp")),
]


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Make 100,000 calls, and 1,000 in each of 16 threads; serve for a minute from forked workers."""
    session.install("-e", ".", "gunicorn>=23")
    session.run("python", "tools/soak.py")
    session.run("python", "tools/soak.py", "--calls=16000", "--threads=16")
    session.run("python", "tools/prefork.py")


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Read damaged files of every format, ten minutes each."""
    session.install("-e", ".[files,nn]")
    session.run("python", "tools/fuzz_files.py", *session.posargs)


@nox.session(default=False)
def properties(session: nox.Session) -> None:
    """Test each property on other examples each time, for ten minutes or the minutes given."""
    install(session, "test")
    minutes = float(session.posargs[0] if session.posargs else 10)
    collect = ("pytest", "-m", "hypothesis", "--collect-only", "-q", "tests")
    tests = session.run(*collect, silent=True) or ""
    for test in dict.fromkeys(re.findall(r"^tests/[^:]+::\w+", tests, re.MULTILINE)):
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            session.run("pytest", "--hypothesis-profile=random", test)


@nox.session(default=False)
def mutation(session: nox.Session) -> None:
    """Plant small faults in a copy of the package, and count those that the tests find."""
    install(session, "test")
    session.install("cosmic-ray>=8.7")
    session.run("python", "tools/mutation.py", *(session.posargs or ["--sample", "30"]))


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Say which lines of the package no test runs; those of kernels count as they are compiled."""
    install(session, "test")
    session.install("pytest-cov>=6")
    report = ("--cov=favor_np", "--cov-branch", "--cov-report=term-missing:skip-covered")
    session.run("pytest", *report, *session.posargs)


if __name__ == "__main__":
    nox.main()
