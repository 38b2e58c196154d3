"""The command ``usage-middleware``, called in this process or started as a script."""

import contextlib
import http.client
import io
import json
import re

import pytest
from places import SCRIPTS

from usage_middleware.cli import main

SCRIPT = str(SCRIPTS / "usage-middleware")


KEY = re.compile("sk-[0-9A-Za-z]{48}")


NOW = 1_800_000_000  # 2027-01-15 08:00:00 UTC


def run(*args, status=0):
    """Run the command in this process, and return what it prints on standard output and on standard error."""
    # Standard output is a text file over a binary one.
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline=""), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    assert end.value.code == status, err.getvalue()
    out.flush()
    return out.buffer.getvalue().decode(), err.getvalue()


def run_json(*args):
    return json.loads(run(*args, "--json")[0])


def get(url, path="/api/usage/token", method="GET", **headers):
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


URL = r"(http://127\.0\.0\.1:\d+)"
