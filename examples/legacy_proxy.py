"""The usage endpoint in front of a legacy HTTP service in any language.

    pip install .
    python examples/legacy_proxy.py [PORT]

Then run the curl command that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db.
The program starts a small legacy service for the demonstration, and forwards all other paths to it. It charges nothing;
for that, see meter_legacy_service.py.

If a web server such as nginx is already in front of the service, let it send /api/usage/token to
`usage-middleware serve`, and everything else to the service.
"""

from __future__ import annotations

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from werkzeug.serving import run_simple

from usage_middleware import Proxy, SQLiteTokenStore, UsageMiddleware


class LegacyService(BaseHTTPRequestHandler):
    """Stand in for the legacy service. It answers with the request that reached it."""

    def do_GET(self) -> None:
        received = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = f"legacy service: {self.requestline}\n{self.headers}".encode("latin-1") + received
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))
    key, _ = store.create(name="Demo", total_available=1_000_000)
    with ThreadingHTTPServer(("127.0.0.1", 0), LegacyService) as legacy:
        Thread(target=legacy.serve_forever, daemon=True).start()
        application = UsageMiddleware(Proxy(f"http://127.0.0.1:{legacy.server_port}"), store)
        print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token", flush=True)
        run_simple("127.0.0.1", port, application, threaded=True)
        legacy.shutdown()
