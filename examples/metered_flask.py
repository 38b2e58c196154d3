"""A Flask view that charges its caller's key: it reserves before the work, and settles the real cost after it.

    pip install . flask
    python examples/metered_flask.py [PORT]

Then run the curl commands that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db.

A client that sends an Idempotency-Key is never charged twice for it. If the client sends it again, the request is
refused, so the work is not done twice for one payment. An application that can keep its answers returns the first one
again; see idempotent_flask.py.
"""

import os
import sys

from flask import Flask, Response, jsonify, request

from usage_middleware import (
    ModelNotAllowed,
    OperationConflict,
    QuotaError,
    QuotaExceeded,
    SQLiteTokenStore,
    StoreError,
    UsageMiddleware,
    bearer_key,
)

MODEL = "shout-1"
MOST_CHARACTERS = 1000  # what one request may cost at most: a quota unit for each character

store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))

app = Flask(__name__)
app.wsgi_app = UsageMiddleware(app.wsgi_app, store)  # type: ignore[method-assign]


@app.post("/shout")
def shout() -> Response | str:
    key = bearer_key(request.environ)
    if key is None:
        return refusal(401, "send your key in the header Authorization: Bearer")
    name = request.headers.get("Idempotency-Key") or None
    if name is not None and len(name) > 255:
        return refusal(400, "an Idempotency-Key has at most 255 characters")
    operation = store.reserve(key, MOST_CHARACTERS, model=MODEL, idempotency_key=name)
    if operation.replayed:
        return refusal(409, "this Idempotency-Key was used before")

    cost = 0
    try:
        answer = request.get_data(as_text=True)[:MOST_CHARACTERS].upper()  # the work
        cost = len(answer)
    finally:
        store.settle(operation, cost)  # 0 if the work failed: the caller does not pay for that
    return answer


@app.errorhandler(QuotaError)
def refused(error: QuotaError) -> Response:
    if isinstance(error, QuotaExceeded):
        return refusal(402, f"{error.requested} quota units are needed, {error.available} are left")
    if isinstance(error, ModelNotAllowed):
        return refusal(403, f"this key may not use {error.model}")
    if isinstance(error, OperationConflict):
        return refusal(409, "this Idempotency-Key was used for another request")
    return refusal(401, "this key cannot be used")  # unknown, disabled or expired


@app.errorhandler(StoreError)
def store_failed(error: StoreError) -> Response:
    app.logger.error("%s", error)
    response = refusal(503, "the service cannot check keys at the moment")
    response.headers["Retry-After"] = "5"
    return response


def refusal(status: int, message: str) -> Response:
    response = jsonify(error=message)
    response.status_code = status
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    key, _ = store.create(name="Demo", total_available=1_000_000)
    print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token")
    print(f"curl -H 'Authorization: Bearer {key}' -d hello http://127.0.0.1:{port}/shout", flush=True)
    app.run(port=port)
