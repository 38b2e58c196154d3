"""A legacy HTTP service in any language, whose requests cost what it states in a header of its answers.

    pip install .
    python examples/meter_legacy_service.py [PORT]

Then run the curl commands that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db.
The program starts a small legacy service for the demonstration. For a service of your own, the command does the same
without this file:

    usage-middleware create --db tokens.db --name Demo --quota 1000000
    usage-middleware serve --db tokens.db --upstream http://127.0.0.1:3000 --cost-header X-Usage-Cost --reserve 500
"""

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from werkzeug.serving import run_simple

from usage_middleware import FromHeader, Proxy, SQLiteTokenStore, UsageMeter, UsageMiddleware


class LegacyService(BaseHTTPRequestHandler):
    """Stand in for the legacy service. It counts the words of a request, and each word costs three units."""

    def do_POST(self) -> None:
        words = len(self.rfile.read(int(self.headers.get("Content-Length", 0))).split())
        body = f"{words} words\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Usage-Cost", str(3 * words))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Leave logging to the server in front."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))
    key, _ = store.create(name="Demo", total_available=1_000_000)
    with ThreadingHTTPServer(("127.0.0.1", 0), LegacyService) as legacy:
        Thread(target=legacy.serve_forever, daemon=True).start()
        upstream = Proxy(f"http://127.0.0.1:{legacy.server_port}")
        # The most that a request can cost is reserved before it, and the service does not get the caller's key.
        meter = UsageMeter(upstream, store, cost=FromHeader("X-Usage-Cost", most=500), forward_key=False)
        application = UsageMiddleware(meter, store)
        print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token")
        print(f"curl -H 'Authorization: Bearer {key}' -d 'one two three' http://127.0.0.1:{port}/count", flush=True)
        run_simple("127.0.0.1", port, application, threaded=True)
        legacy.shutdown()
