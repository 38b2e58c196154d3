"""A Flask application with the usage endpoint.

    pip install . flask
    python examples/flask_app.py [PORT]

Then run the curl command that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db.
A production server serves the application as it is: gunicorn --chdir examples flask_app:app
"""

import os
import sys

from flask import Flask

from usage_middleware import SQLiteTokenStore, UsageMiddleware

store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))

app = Flask(__name__)
app.wsgi_app = UsageMiddleware(app.wsgi_app, store)  # type: ignore[method-assign]


@app.get("/")
def index() -> str:
    return "Hello from Flask.\n"


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    key, _ = store.create(name="Demo", total_available=1_000_000)
    print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token", flush=True)
    app.run(port=port)
