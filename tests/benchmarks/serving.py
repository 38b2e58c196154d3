"""The usage request over HTTP: real servers on the loopback interface, in processes of their own, loaded by wrk."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from calling import USAGE_PATH
from comparing import Result, in_turn
from loading import DONE, TELLS_PROCESSOR_TIME, Running, ask, gunicorn, running
from peers import BARE_WSGI, DJANGO, FASTAPI, FASTAPI_ASYNC, FLASK, FLASK_SQLALCHEMY, OURS, Peer, present
from scaling import Load, load_table, processor_time_table
from tokens_database import filled_database, random_keys

SERVERS = ("granian", "gunicorn")
_TITLES = {
    "granian": "granian with 1 worker and its own choice of threads",
    "gunicorn": "gunicorn with 1 gthread worker, {threads} threads",
}

_ASKED = 10_000  # keys whose usage is asked for, over and over

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

{DONE}"""


def over_http(servers: Sequence[str], tokens: int, most_connections: int, rounds: int) -> Iterator[Result]:
    """Measure requests per second and latencies, with one connection and with many."""
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
                            loads[name].append(ask(processes[name], connections, script, keys))
                    number = "1 connection" if connections == 1 else f"{connections} connections"
                    title = f"Over HTTP, {number}: {_TITLES[server].format(threads=most_connections)}"
                    yield load_table(title, loads)
                    if TELLS_PROCESSOR_TIME:
                        yield processor_time_table(f"{title}; the servers' processor time of a request", loads)


def _served(server: str, peer: Peer, path: Path, workers: int, threads: int) -> AbstractContextManager[Running]:
    """Run a server with a peer's application."""

    def command(port: int) -> list[str]:
        if server == "granian":
            interface = "asgi" if peer.is_asgi else "wsgi"
            options = ["--interface", interface, "--host", "127.0.0.1", "--port", str(port), "--factory", "--no-ws"]
            return [*granian, *options, "--workers", str(workers), "--log-level", "warning", "peers:application"]
        return gunicorn(port, "peers:application()", workers=workers, threads=threads)

    granian = [sys.executable, "-m", "granian"]
    environment = {"PEER": peer.name, "TOKENS_DATABASE": str(path)}
    return running(f"{server} with {peer.name}", command, environment)
