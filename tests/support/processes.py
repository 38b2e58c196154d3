"""Functions of a test module that run in processes of their own."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress

# A fresh interpreter for each process: it inherits nothing, as the processes of a service do not.
SPAWN = multiprocessing.get_context("spawn")


def end_within(seconds):
    """Let this process, a child that was forked, say where it hangs and end. Whoever waits for it may be gone."""
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(seconds)


def environment(**variables):
    """Return the environment of a new interpreter that finds the modules of tests where this one finds them."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}


def process_of(function, *arguments):
    """Return the command to run a function of a test module in a new interpreter, where every warning is an error.

    It and what it forks end after half an hour of computing, also if the tests were killed.
    """
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (1800, 1800))"
    call = f"import {function.__module__} as module; module.{function.__name__}(*sys.argv[1:])"
    return [sys.executable, "-X", "dev", "-W", "error", "-c", f"{limit}; {call}", *map(str, arguments)]


def in_a_process(function, *arguments, timeout=600):
    """Run a function of a test module in a new interpreter, and return what it printed.

    Neither it nor a process that it forks may print an error: they share its standard error.
    """
    return to_its_end(process_of(function, *arguments), timeout=timeout)


def to_its_end(command, *, timeout=600):
    """Run a program that must print no error, and return what it printed.

    At the end, all processes that it forked are killed.
    """
    # A session of its own, so that all can be killed together.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), text=True, start_new_session=True, **pipes) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        finally:
            with suppress(ProcessLookupError):  # none is left
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, errors) == (0, ""), errors
    return printed


def python(*arguments, **options):
    """Start a Python program that finds the modules of tests."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(PYTHONWARNINGS="default::ResourceWarning"),
        text=True,
        **options,
    )
