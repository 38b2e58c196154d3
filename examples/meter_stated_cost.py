"""A WSGI application that states what each request costs, by a function that it finds in `environ`.

    pip install .
    python examples/meter_stated_cost.py [PORT]

Then run the curl commands that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db.

The application also runs without the meter. Then nothing is charged.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from werkzeug.serving import run_simple

from usage_middleware import SQLiteTokenStore, UsageMeter, UsageMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

MOST_LETTERS = 1000


def shout(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer with the request's body in capitals. Each letter costs a unit."""
    size = min(int(environ.get("CONTENT_LENGTH") or 0), MOST_LETTERS)
    answer = environ["wsgi.input"].read(size).decode("utf-8", "replace").upper()
    if "usage_middleware.charge" in environ:
        environ["usage_middleware.charge"](sum(map(str.isalpha, answer)))
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [answer.encode()]


store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))
# This much is reserved before the application is called. What it states is charged at the end.
application = UsageMiddleware(UsageMeter(shout, store, cost=MOST_LETTERS), store)

if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    key, _ = store.create(name="Demo", total_available=1_000_000)
    print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token")
    print(f"curl -H 'Authorization: Bearer {key}' -d 'Hello, you.' http://127.0.0.1:{port}/", flush=True)
    run_simple("127.0.0.1", port, application, threaded=True)
