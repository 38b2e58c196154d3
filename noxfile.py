"""Everything that must hold before a change lands, on each Python that the package claims: ``nox``.

``nox --list`` names the sessions; ``nox --session 'tests(3.12)' -- tests/wsgi`` runs some tests on one Python. The
newest Python runs all tests, the others the quick ones: all of them on each would take an hour. Each session works in a
copy of the files that git does not ignore, and runs the commands that README.md prints.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nox

ROOT = Path(__file__).parent
QUICK = "not servers and not slow"
STARTS_WITHIN = 180  # seconds, the installation included
USAGE = '{"code":true,"message":"ok","data":{"object":"token_usage",'

nox.needs_version = ">= 2024.10"
nox.options.default_venv_backend = "venv"


def claimed() -> list[str]:
    """Return the Pythons that the package's classifiers name, the oldest first."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return re.findall(r"Python :: (3\.\d+)$", settings["metadata"]["classifiers"], re.MULTILINE)


def interpreter(version: str) -> str | None:
    """Return a Python of that version that can make environments: from the path, the system, or pyenv."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python3"))
    for candidate in (shutil.which(f"python{version}"), f"/usr/bin/python{version}", *map(str, reversed(pyenv))):
        if candidate and os.path.exists(candidate):
            # A shim of pyenv runs only if its version is switched on, and Debian's Python may lack its venv.
            program = f"import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
            if subprocess.run([candidate, "-c", program], stderr=subprocess.DEVNULL).returncode == 0:
                return candidate
    return None


CLAIMED = claimed()
each_python = nox.parametrize("version", CLAIMED, ids=CLAIMED)


def python_of(session: nox.Session, version: str) -> str:
    found = interpreter(version)
    if found is None:
        message = f"Python {version}, which the package claims, is not on this machine"
        session.error(message) if os.environ.get("CI") else session.skip(message)
    return found


def own_folder(session: nox.Session) -> Path:
    """Return the folder of a session for files of its own."""
    folder = Path(session.create_tmp()).resolve()
    # Session.create_tmp names it as TMPDIR. It lies in one of .ci/run's that only its owner may enter, and the database
    # servers of the tests run as another user where root runs the tests.
    session.env.pop("TMPDIR", None)
    return folder


def checkout(session: nox.Session) -> Path:
    """Copy the files that git does not ignore to a new folder."""
    folder = own_folder(session) / "checkout"
    shutil.rmtree(folder, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def environment(session: nox.Session, python: str) -> dict[str, str]:
    """Return an environment in which ``python3`` is that Python."""
    shims = own_folder(session) / "shims"
    shims.mkdir(exist_ok=True)
    # Not a link: an environment that is made by way of a link would look for its library beside it.
    (shims / "python3").write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
    (shims / "python3").chmod(0o755)
    return {"PATH": f"{shims}{os.pathsep}{os.environ['PATH']}"}


def command_of_readme(part: str) -> str:
    """Return the command of README.md that contains a text, as it is printed there."""
    return re.findall(rf"^\$ (.*{part}.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[0]


@nox.session(python=False)
@each_python
def tests(session: nox.Session, version: str) -> None:
    """Run the tests by the README's command, and the linters."""
    environ = environment(session, python_of(session, version))
    command = command_of_readme("pytest")
    if session.posargs:
        command += " " + " ".join(session.posargs)
    elif version != CLAIMED[-1]:
        command += f" -m '{QUICK}'"
    with session.chdir(checkout(session)):
        session.run("bash", "-c", command, env=environ, external=True)
        for check in ("pip check", "ruff check .", "ruff format --check .", "mypy"):
            session.run(*f".venv/bin/{check}".split(), external=True)


@nox.session
def package(session: nox.Session) -> None:
    """Build the package, and show the wheel at work in an empty environment of each Python."""
    session.install("build")
    folder = checkout(session)
    session.run("python", "-m", "build", "--outdir", str(folder / "dist"), str(folder), silent=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    (_,) = (folder / "dist").glob("*.tar.gz")
    for version in CLAIMED:
        made = folder / f"wheel-{version}"
        session.run(python_of(session, version), "-m", "venv", str(made), external=True)
        session.run(str(made / "bin" / "pip"), "install", str(wheel), external=True)
        with serving(session, f"'{made}/bin/usage-middleware' demo", folder, {}) as line:
            ask(session, line)


@nox.session(python=False)
@each_python
def demo(session: nox.Session, version: str) -> None:
    """Run the README's first command, and the line that it prints."""
    environ = environment(session, python_of(session, version))
    with serving(session, command_of_readme("usage-middleware demo"), checkout(session), environ) as line:
        ask(session, line)


@contextmanager
def serving(session: nox.Session, command: str, folder: Path, environ: dict[str, str]) -> Iterator[str]:
    """Run a command that ends in a demonstration; give the curl line that it prints. All of it is ended at the end."""
    session.log(command)
    log = own_folder(session) / "demo.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + STARTS_WITHIN
        while not (line := re.search(r"curl -H .*/api/usage/token$", log.read_text(), re.MULTILINE)):
            if process.poll() is not None or time.monotonic() > until:
                session.error(f"the demonstration did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield line[0]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def ask(session: nox.Session, line: str) -> None:
    """Run a curl line; its answer is the usage of a token."""
    answer = session.run("bash", "-c", f"{line} --silent --show-error --fail", external=True, silent=True)
    if not str(answer).startswith(USAGE):
        session.error(f"not the usage of a token: {answer}")
    session.log(answer)
