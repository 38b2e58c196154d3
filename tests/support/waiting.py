"""Wait for something that happens soon. Each wait fails at a deadline, which even a busy machine does not reach."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

DEADLINE = 60  # seconds, for what takes a moment on an idle machine

T = TypeVar("T")


def until(
    condition: Callable[[], T],
    *,
    process: subprocess.Popen[bytes] | subprocess.Popen[str] | None = None,
    log: Path | None = None,
) -> T:
    """Return the value of the condition once it is true.

    :param process: fails at once if it ends meanwhile.
    :param log: shown if it fails.
    """
    deadline = time.monotonic() + DEADLINE
    while not (met := condition()):
        said = log.read_text(errors="replace") if log is not None else ""
        assert process is None or process.poll() is None, f"the process has ended\n{said}"
        assert time.monotonic() < deadline, f"still not so after {DEADLINE} s\n{said}"
        time.sleep(0.005)
    return met


def until_logged(pattern: str, log: Path, process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> re.Match[str]:
    """Return the first match of a pattern in what a process writes to its log."""
    return until(lambda: re.search(pattern, log.read_text(errors="replace")), process=process, log=log)


def until_listening(
    port: int, process: subprocess.Popen[bytes] | subprocess.Popen[str], log: Path | None = None
) -> None:
    """Return once a process accepts connections on a port."""
    until(lambda: _accepts(port), process=process, log=log)


def _accepts(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
