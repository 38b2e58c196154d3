"""The WSGI servers in front of a :class:`Proxy` or of the meter, each in a process of its own."""

from __future__ import annotations

from web_servers import GUNICORN

_STOP = 3  # seconds
_MAKE_SERVER = (
    "import {0} as module, sys; from {1} import make_server;"
    "make_server('127.0.0.1', int(sys.argv[1]), module.app{2}).serve_forever()"
)
_UVICORN = (
    "import {} as module, sys, uvicorn; from a2wsgi import WSGIMiddleware;"
    "uvicorn.run(WSGIMiddleware(module.app), port=int(sys.argv[1]), log_level='warning')"
)
_UWSGI = (
    "import os, sys; os.execv(sys.prefix + '/bin/uwsgi', ['uwsgi', '--http-socket=127.0.0.1:' + sys.argv[1],"
    " '--home=' + sys.prefix, '--module={}:app', '--need-app', '--master', '--threads=4', '--die-on-term'])"
)


def commands(module: str) -> dict[str, list[str]]:
    """Return the arguments of Python that serve ``app`` of a module, by the name of the server."""
    place = f"{module}:app"
    return {
        "wsgiref": ["-c", _MAKE_SERVER.format(module, "wsgiref.simple_server", ""), "{port}"],
        "werkzeug": ["-c", _MAKE_SERVER.format(module, "werkzeug.serving", ", threaded=True"), "{port}"],
        "gunicorn-sync": [*GUNICORN, place],
        "gunicorn-gthread": [*GUNICORN, "--worker-class=gthread", "--threads=4", place],
        "gunicorn-gevent": [*GUNICORN, "--worker-class=gevent", place],
        "waitress": ["-m", "waitress", "--listen=127.0.0.1:{port}", place],
        "cheroot": ["-m", "cheroot", "--bind=127.0.0.1:{port}", place],
        "granian": [
            *("-m", "granian", "--host=127.0.0.1", "--port={port}", f"--workers-kill-timeout={_STOP}"),
            *("--interface=wsgi", place),
        ],
        "uwsgi": ["-c", _UWSGI.format(module), "{port}"],
        "a2wsgi": ["-c", _UVICORN.format(module), "{port}"],
    }


COMMANDS = commands("proxied")
