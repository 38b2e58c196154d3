"""A FastAPI application with the usage endpoint, which is a WSGI application that a2wsgi mounts in an ASGI one.

    pip install . fastapi a2wsgi uvicorn
    python examples/fastapi_app.py [PORT]

Then run the curl command that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db.
Starlette and other ASGI frameworks mount it the same way.
"""

import os
import sys

import uvicorn
from a2wsgi import WSGIMiddleware
from fastapi import FastAPI
from werkzeug.exceptions import NotFound

from usage_middleware import SQLiteTokenStore, UsageMiddleware

store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))

app = FastAPI()
# Mount it one level above the endpoint: the path of a mount itself is redirected to the one with a slash at its end,
# and clients drop their key on a redirect.
app.mount("/api/usage", WSGIMiddleware(UsageMiddleware(NotFound(), store, path="/token")))  # type: ignore[arg-type]


@app.get("/")
def index() -> str:
    return "Hello from FastAPI."


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    key, _ = store.create(name="Demo", total_available=1_000_000)
    print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token", flush=True)
    uvicorn.run(app, host="127.0.0.1", port=port)
