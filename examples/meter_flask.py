"""A Flask application that is charged a quota unit for each request. Its views do not know about it.

    pip install . flask
    python examples/meter_flask.py [PORT]

Then run the curl commands that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db.
"""

import os
import sys

from flask import Flask

from usage_middleware import SQLiteTokenStore, UsageMeter, UsageMiddleware

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    return "Hello from Flask."


@app.get("/health")
def health() -> str:
    return "well"


store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))
meter = UsageMeter(app.wsgi_app, store, exempt=("/health",))
# Outside the meter, so that requests to the endpoint are free.
app.wsgi_app = UsageMiddleware(meter, store)  # type: ignore[method-assign]

if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    key, _ = store.create(name="Demo", total_available=1_000_000)
    print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token")
    print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/", flush=True)
    app.run(port=port)
