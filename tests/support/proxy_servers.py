"""The WSGI servers in front of a :class:`Proxy`, each in a process of its own."""

from __future__ import annotations

from web_servers import GUNICORN

_STOP = 3  # seconds
_MAKE_SERVER = (
    "import proxied, sys; from {} import make_server;"
    "make_server('127.0.0.1', int(sys.argv[1]), proxied.app{}).serve_forever()"
)
_UVICORN = (
    "import proxied, sys, uvicorn; from a2wsgi import WSGIMiddleware;"
    "uvicorn.run(WSGIMiddleware(proxied.app), port=int(sys.argv[1]), log_level='warning')"
)
_UWSGI = (
    "import os, sys; os.execv(f'{sys.prefix}/bin/uwsgi', ['uwsgi', f'--http-socket=127.0.0.1:{sys.argv[1]}',"
    " f'--home={sys.prefix}', '--module=proxied:app', '--need-app', '--master', '--threads=4', '--die-on-term'])"
)
COMMANDS = {
    "wsgiref": ["-c", _MAKE_SERVER.format("wsgiref.simple_server", ""), "{port}"],
    "werkzeug": ["-c", _MAKE_SERVER.format("werkzeug.serving", ", threaded=True"), "{port}"],
    "gunicorn-sync": [*GUNICORN, "proxied:app"],
    "gunicorn-gthread": [*GUNICORN, "--worker-class=gthread", "--threads=4", "proxied:app"],
    "gunicorn-gevent": [*GUNICORN, "--worker-class=gevent", "proxied:app"],
    "waitress": ["-m", "waitress", "--listen=127.0.0.1:{port}", "proxied:app"],
    "cheroot": ["-m", "cheroot", "--bind=127.0.0.1:{port}", "proxied:app"],
    "granian": [
        *("-m", "granian", "--host=127.0.0.1", "--port={port}", f"--workers-kill-timeout={_STOP}"),
        *("--interface=wsgi", "proxied:app"),
    ],
    "uwsgi": ["-c", _UWSGI.replace("{", "{{").replace("}", "}}"), "{port}"],
    "a2wsgi": ["-c", _UVICORN, "{port}"],
}
