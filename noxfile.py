#!/usr/bin/env -S uv run --script

# /// script
# dependencies = ["nox>=2025.5"]
# ///

from pathlib import Path

import nox

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


@nox.session(default=False)
def cuda(session: nox.Session) -> None:
    """Test the kernels for GPUs where there is none, and the tools that compile and execute them."""
    install(session, "cuda")
    files = session.posargs or ["tests/cuda", "tools/cuda_on_cpu"]
    session.run("pytest", *files, env={"FAVOR_NP_TEST_CUDA": "require"})


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
    """Build the documentation; warnings are errors, the examples are run."""
    install(session, "docs")
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


if __name__ == "__main__":
    nox.main()
