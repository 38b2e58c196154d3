"""The usage request over HTTP: real servers on the loopback interface, each in processes of its own, asked by wrk."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from calling import USAGE_PATH
from comparing import PERCENTILES, Result, in_turn
from peers import BARE_WSGI, DJANGO, FASTAPI, FASTAPI_ASYNC, FLASK, FLASK_SQLALCHEMY, OURS, Peer, present
from scaling import Load, load_table, processor_time_table
from tokens_database import filled_database, random_keys

SERVERS = ("granian", "gunicorn")
_TITLES = {
    "granian": "granian with 1 worker and its own choice of threads",
    "gunicorn": "gunicorn with 1 gthread worker, {threads} threads",
}

_ASKED = 10_000  # keys that are asked for, again and again
_SECONDS = 1  # in a turn; wrk takes whole seconds
_START_TIMEOUT = 30.0  # seconds
_TELLS_PROCESSOR_TIME = Path("/proc/self/stat").exists()

# wrk calls `init` once in each of its threads, `request` for each request and `done` at the end.
_SCRIPT = f"""\
local requests, number = {{}}, 0

function init(arguments)
    for key in io.lines(arguments[1]) do
        requests[#requests + 1] = wrk.format("GET", "{USAGE_PATH}", {{ Authorization = "Bearer sk-" .. key }})
    end
end

function request()
    number = number % #requests + 1
    return requests[number]
end

function done(summary, latency)
    local errors = summary.errors
    print("errors", errors.connect + errors.read + errors.write + errors.status + errors.timeout)
    print("requests", summary.requests)
    print("per_second", summary.requests / summary.duration * 1e6)
    print("latencies", {", ".join(f"latency:percentile({percentile})" for percentile in PERCENTILES)})
end
"""


def over_http(servers: Sequence[str], tokens: int, most_connections: int, rounds: int) -> Iterator[Result]:
    """Requests per second and latencies, with one connection and with many."""
    if shutil.which("wrk") is None:
        yield "HTTP: left out, wrk is not installed"
        return
    make_key = random_keys(tokens)
    with filled_database(tokens) as path, tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory:
        keys, script = Path(directory, "keys"), Path(directory, "usage.lua")
        keys.write_text("".join(f"{make_key()}\n" for _ in range(_ASKED)))
        script.write_text(_SCRIPT)
        for server in servers:
            if importlib.util.find_spec(server) is None:
                yield f"{server}: left out, {server} is not installed"
                continue
            peers = (BARE_WSGI, OURS, FLASK, FLASK_SQLALCHEMY, DJANGO)
            if server == "granian":
                peers += (FASTAPI, FASTAPI_ASYNC)
            installed, lines = present(peers)
            yield from lines
            contenders = [(peer.name, peer, 1) for peer in installed]
            contenders.append((f"{OURS.name}, 2 workers", OURS, 2))
            with ExitStack() as stack:
                processes = {
                    name: stack.enter_context(_served(server, peer, path, workers, most_connections))
                    for name, peer, workers in contenders
                }
                for connections in sorted({1, most_connections}):
                    loads: dict[str, list[Load]] = {name: [] for name in processes}
                    for turn in range(rounds):
                        for name in in_turn(list(processes), turn):
                            loads[name].append(_ask(*processes[name], connections, script, keys))
                    number = "1 connection" if connections == 1 else f"{connections} connections"
                    title = f"Over HTTP, {number}: {_TITLES[server].format(threads=most_connections)}"
                    yield load_table(title, loads)
                    if _TELLS_PROCESSOR_TIME:
                        yield processor_time_table(f"{title}; the servers' processor time of a request", loads)


def _command(server: str, peer: Peer, port: int, workers: int, threads: int) -> list[str]:
    if server == "granian":
        interface = "asgi" if peer.is_asgi else "wsgi"
        options = ["--interface", interface, "--host", "127.0.0.1", "--port", str(port), "--factory", "--no-ws"]
        return [server, *options, "--workers", str(workers), "--log-level", "warning", "peers:application"]
    options = ["--no-control-socket", "--worker-class", "gthread", "--workers", str(workers), "--threads", str(threads)]
    return [server, *options, "--bind", f"127.0.0.1:{port}", "--log-level", "warning", "peers:application()"]


@contextmanager
def _served(server: str, peer: Peer, path: Path, workers: int, threads: int) -> Iterator[tuple[int, int]]:
    """Runs a server with a peer's application until the end, and gives its process id and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *_command(server, peer, port, workers, threads)],
            cwd=Path(__file__).parent,
            env={**os.environ, "PEER": peer.name, "TOKENS_DATABASE": str(path)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # by which its workers are found
        )
        try:
            deadline = time.monotonic() + _START_TIMEOUT
            while not _accepts(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{server} did not start with {peer.name}:\n{log.read().decode()}")
                time.sleep(0.05)
            yield process.pid, port
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _ask(process_id: int, port: int, connections: int, script: Path, keys: Path) -> Load:
    options = ["--threads", "1", "--connections", str(connections), "--duration", f"{_SECONDS}s", "--timeout", "30s"]
    command = ["wrk", *options, "--script", script, f"http://127.0.0.1:{port}", "--", keys]
    processor_time = _processor_time(process_id)
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    processor_time = _processor_time(process_id) - processor_time
    told = {name: values for name, *values in map(str.split, filter(None, output.splitlines()))}
    if told["errors"] != ["0"]:
        raise SystemExit(f"not all requests to port {port} were answered: {output}")
    latencies = [float(latency) / 1e6 for latency in told["latencies"]]
    return Load(float(told["per_second"][0]), latencies, processor_time / float(told["requests"][0]))


def _processor_time(session: int) -> float:
    """The seconds that the processes of a session have run, where the system tells it (proc_pid_stat(5))."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(") ")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
