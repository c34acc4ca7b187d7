"""`nox -s tests` runs the suite on every supported torch, `nox -s nightly` thousands of random programs, `nox -s lint`
the linters. See CONTRIBUTING.md.
"""

import nox

TORCH = ["2.11.0", "2.13.0", "2.15.0"]

nox.options.default_venv_backend = "venv"


@nox.session
@nox.parametrize("torch", TORCH)
def tests(session: nox.Session, torch: str) -> None:
    """The whole suite on one torch version."""
    # Triton 3.6, which torch 2.11 brings, cannot run its interpreter on newer NumPy.
    older = ["numpy<2.4"] if torch == "2.11.0" else []
    session.install(f"torch=={torch}", "-e", ".[test]", *older)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def nightly(session: nox.Session) -> None:
    """Thousands of random programs, other ones every time; a failure prints the program."""
    session.install("torch==2.13.0", "-e", ".[test]")
    session.run("python", "-m", "pytest", "tests/fuzz", "--fuzz-examples", "4000", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff (format and lint) and mypy."""
    session.install("torch==2.13.0", "-e", ".[test,dev]")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
