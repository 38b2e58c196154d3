"""An HTTP service behind proxies: what Proxy adds, compared with nginx and werkzeug's ProxyMiddleware."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from statistics import median

from comparing import Result, in_turn, table_of
from loading import DONE, TELLS_PROCESSOR_TIME, Running, ask, gunicorn, running
from proxied_service import EVENTS, PAUSE
from scaling import Load, load_table, processor_time_table

_NGINX = "nginx"
_OURS = "Proxy, on gunicorn"
_WERKZEUG = "werkzeug ProxyMiddleware, on gunicorn"
_BARE = "a bare WSGI function, on gunicorn, no service"
_DIRECT = "the service itself"
_PROXIES = {_OURS: "Proxy", _WERKZEUG: "ProxyMiddleware", _BARE: "none"}

_FIRST_EVENTS = 20  # in a round

# A connection to the service for each request, like Proxy, and one worker, like gunicorn here.
_NGINX_CONFIGURATION = """\
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{service};
            proxy_http_version 1.1;
            proxy_set_header Connection close;
            proxy_buffering off;
        }}
    }}
}}
"""


def through_proxies(most_connections: int, rounds: int) -> Iterator[Result]:
    """Measure requests per second, latencies and processor time of JSON and of event streams, and the first event."""
    nginx = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
    for program, found in (("nginx", nginx), ("wrk", shutil.which("wrk"))):
        if found is None:
            yield f"Proxies: left out, {program} is not installed"
            return
    if importlib.util.find_spec("gunicorn") is None:
        yield "Proxies: left out, gunicorn is not installed"
        return
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="usage-middleware-")))
        script = directory / "done.lua"
        script.write_text(DONE)
        service = stack.enter_context(running("the service", _service))
        servers = {_NGINX: stack.enter_context(_nginx(str(nginx), directory, service))}
        for name in _PROXIES:
            servers[name] = stack.enter_context(_gunicorn(name, service, most_connections))
        servers[_DIRECT] = service
        for path, what in (("/json/", "JSON of 1 kB"), ("/stream/", f"Event streams of {EVENTS} events")):
            for connections in sorted({1, most_connections}):
                loads: dict[str, list[Load]] = {name: [] for name in servers}
                for turn in range(rounds):
                    for name in in_turn(list(servers), turn):
                        loads[name].append(ask(servers[name], connections, script, path=path))
                number = "1 connection" if connections == 1 else f"{connections} connections"
                title = f"{what} through a proxy, {number}"
                yield load_table(title, loads)
                if TELLS_PROCESSOR_TIME:
                    yield processor_time_table(f"{title}; the proxy's processor time of a request", loads)
        yield _first_event({name: servers[name] for name in servers if name != _BARE}, rounds)


def _service(port: int) -> list[str]:
    return [sys.executable, "proxied_service.py", str(port)]


def _nginx(program: str, directory: Path, service: Running) -> AbstractContextManager[Running]:
    def command(port: int) -> list[str]:
        configuration = directory / "nginx.conf"
        configuration.write_text(_NGINX_CONFIGURATION.format(directory=directory, port=port, service=service.port))
        return [program, "-c", str(configuration), "-p", str(directory), "-e", "stderr"]

    return running("nginx", command)


def _gunicorn(name: str, service: Running, threads: int) -> AbstractContextManager[Running]:
    environment = {"PROXY": _PROXIES[name], "UPSTREAM": f"http://127.0.0.1:{service.port}"}
    return running(
        name, lambda port: gunicorn(port, "proxied_service:application()", workers=1, threads=threads), environment
    )


def _first_event(servers: dict[str, Running], rounds: int) -> Result:
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(rounds):
        for name in in_turn(list(servers), turn):
            seconds[name].append(median(_wait_for_first_event(servers[name].port) for _ in range(_FIRST_EVENTS)))
    return table_of(
        f"Until a client has the first event of a stream that pauses {PAUSE * 1e3:g} ms after it",
        [(name, waited, None) for name, waited in seconds.items()],
    )


def _wait_for_first_event(port: int) -> float:
    begun = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"GET /pause/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = b""
        while b"\n\n" not in received:
            piece = client.recv(65536)
            if not piece:
                raise SystemExit(f"no event came from port {port}: {received!r}")
            received += piece
        waited = time.perf_counter() - begun
        while client.recv(65536):
            pass
    return waited
