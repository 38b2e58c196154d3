"""Functions of a test module that run in processes of their own."""

import multiprocessing
import os
import subprocess
import sys

# A fresh interpreter for each process: it inherits nothing, as the processes of a service do not.
SPAWN = multiprocessing.get_context("spawn")


def environment(**variables):
    """Return the environment of a new interpreter that finds the modules of tests where this one finds them."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}


def process_of(function, *arguments):
    """Return the command to run a function of a test module in a new interpreter, where every warning is an error."""
    program = f"import sys, {function.__module__} as module; module.{function.__name__}(*sys.argv[1:])"
    return [sys.executable, "-X", "dev", "-W", "error", "-c", program, *map(str, arguments)]


def in_a_process(function, *arguments):
    """Run a function of a test module in a new interpreter, and return what it printed.

    Neither it nor a process that it forks may print an error: they share its standard error.
    """
    done = subprocess.run(
        process_of(function, *arguments), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def python(*arguments, **options):
    """Start a Python program that finds the modules of tests."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(PYTHONWARNINGS="default::ResourceWarning"),
        text=True,
        **options,
    )
