"""Servers in processes of their own on the loopback interface, and wrk, which loads them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from comparing import PERCENTILES
from scaling import Load

_SECONDS = 1  # of a turn; wrk accepts only whole seconds
_START_TIMEOUT = 30.0  # seconds
TELLS_PROCESSOR_TIME = Path("/proc/self/stat").exists()

#: The last function of a script for wrk, which wrk calls at the end.
DONE = f"""\
function done(summary, latency)
    local errors = summary.errors
    print("errors", errors.connect + errors.read + errors.write + errors.status + errors.timeout)
    print("requests", summary.requests)
    print("per_second", summary.requests / summary.duration * 1e6)
    print("latencies", {", ".join(f"latency:percentile({percentile})" for percentile in PERCENTILES)})
end
"""


class Running(NamedTuple):
    """A server: the id of its process, which is also that of its session, and its port."""

    process_id: int
    port: int


@contextmanager
def running(
    name: str, command: Callable[[int], Sequence[str]], environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Run a server within the context.

    :param name: its name in the error if it does not start.
    :param command: returns the command that starts it on a port.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command(port),
            cwd=Path(__file__).parent,
            env={**os.environ, **(environment or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its workers are found by their session
        )
        try:
            deadline = time.monotonic() + _START_TIMEOUT
            while not _accepts(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{name} did not start:\n{log.read().decode()}")
                time.sleep(0.05)
            yield Running(process.pid, port)
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def gunicorn(port: int, application: str, *, workers: int, threads: int) -> list[str]:
    """Return the command that starts gunicorn with an application that is in a module of this folder."""
    options = ["--no-control-socket", "--worker-class", "gthread", "--workers", str(workers), "--threads", str(threads)]
    address = ["--bind", f"127.0.0.1:{port}", "--log-level", "warning"]
    return [sys.executable, "-m", "gunicorn", *options, *address, application]


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def ask(server: Running, connections: int, script: Path, *arguments: Path, path: str = "") -> Load:
    """Load a server with requests for one turn, and return the result."""
    options = ["--threads", "1", "--connections", str(connections), "--duration", f"{_SECONDS}s", "--timeout", "30s"]
    command = ["wrk", *options, "--script", script, f"http://127.0.0.1:{server.port}{path}", "--", *arguments]
    processor_time = _processor_time(server.process_id)
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    processor_time = _processor_time(server.process_id) - processor_time
    told = {name: values for name, *values in map(str.split, filter(None, output.splitlines()))}
    if told["errors"] != ["0"]:
        raise SystemExit(f"not all requests to port {server.port} were answered: {output}")
    latencies = [float(latency) / 1e6 for latency in told["latencies"]]
    return Load(float(told["per_second"][0]), latencies, processor_time / float(told["requests"][0]))


def _processor_time(session: int) -> float:
    """Return the seconds that the processes of a session have run, if the system reports it (proc_pid_stat(5))."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(") ")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
