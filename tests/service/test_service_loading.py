"""A WSGI server loads the application from its options, before it forks, and serves an upstream with it."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
from raw_service import answering, serving
from web_servers import GUNICORN, KEY, Connection, message, started

from usage_middleware import SQLiteTokenStore

pytestmark = [pytest.mark.servers, pytest.mark.slow]

_UWSGI = (
    "import os, sys; os.execv(f'{{sys.prefix}}/bin/uwsgi', ['uwsgi', '--http-socket=127.0.0.1:{port}',"
    " f'--home={{sys.prefix}}', '--module=usage_middleware.wsgi:application()', '--need-app', '--master',"
    " '--processes=2', '--die-on-term'])"
)
CALL = "usage_middleware.wsgi:application('{options}')"
SERVERS = {
    "gunicorn": [*GUNICORN, "--workers=2", CALL],
    "gunicorn --preload": [*GUNICORN, "--workers=2", "--preload", CALL],
    # Neither server passes arguments, so the environment has the options.
    "granian": [
        *("-m", "granian", "--host=127.0.0.1", "--port={port}", "--workers-kill-timeout=3"),
        *("--interface=wsgi", "--factory", "usage_middleware.wsgi:application"),
    ],
    "uwsgi": ["-c", _UWSGI],
}


@pytest.mark.parametrize("name", list(SERVERS))
def test_a_server_loads_the_application(name, tmp_path):
    database = tmp_path / "tokens.db"
    with SQLiteTokenStore(database) as store, serving(answering(b"HTTP/1.1 200 OK\r\n\r\nfrom afar")) as service:
        store.create(key=KEY, total_available=100)
        options = f"--db {database} --upstream {service.url} --cost 7"
        command = [word.replace("{options}", options) for word in SERVERS[name]]
        environment = {"USAGE_MIDDLEWARE_SERVE": options} if CALL not in SERVERS[name] else {}
        with started(command, database, tmp_path / "log", **environment) as (_, port):
            for number in range(1, 5):
                assert ask(port, b"/work").body == b"from afar"
                service.result()
                assert json.loads(ask(port, b"/api/usage/token").body)["data"]["total_used"] == 7 * number
        log = (tmp_path / "log").read_text(errors="replace")
        assert "Traceback" not in log, log


def ask(port, path):
    with closing(Connection(port)) as connection:
        connection.send(message(b"GET", path, b"Authorization: Bearer " + KEY.encode(), b"Connection: close"))
        return connection.read(b"GET")
