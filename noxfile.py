"""The commands of a contributor: ``nox -s lint types tests slow docs``; arguments after ``--`` go to the tool."""

import nox

nox.needs_version = ">=2025.5.1"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests", "docs"]

EXTRAS: dict[str, list[str]] = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's checks and formatting. Installs ruff alone, in the version of the extra ``test``."""
    session.install(next(requirement for requirement in EXTRAS["test"] if requirement.startswith("ruff")))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Pyright."""
    session.install("-e", ".[test]")
    session.run("pyright", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The fast tests."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that train real models, kill processes or start Ray."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, without warnings; ``nox -s docs -- serve`` shows it."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]))
