#!/usr/bin/env -S uv run --script

# /// script
# dependencies = ["nox>=2025.5"]
# ///

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
    session.run(
        "pytest", "tests/interop", *session.posargs, env={"FAVOR_NP_TEST_INTEROP": "require"}
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
    """Build the documentation; warnings are errors, the examples are run."""
    install(session, "docs")
    session.run("sphinx-build", "-W", "-n", "-b", "html", "docs", "docs/_build/html")


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Run the benchmark suite once, quickly, without recording it."""
    install(session, "bench")
    session.chdir("asv_benchmarks")
    session.run("asv", "machine", "--yes")
    quick = ("--quick", "--dry-run", "--show-stderr", "--launch-method", "forkserver")
    session.run("asv", "run", "-E", "existing", *quick, *session.posargs)


if __name__ == "__main__":
    nox.main()
