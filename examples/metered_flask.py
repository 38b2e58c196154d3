"""A Flask view that charges its caller's key: it reserves before the work, and settles what the work came to.

    pip install usage-middleware flask
    python examples/metered_flask.py [PORT]

Then run the curl commands that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or tokens.db.

The client's X-Request-Id names the operation. A client that lost an answer sends the request again with the same id,
gets the answer, and is charged once.
"""

import os
import sys
import uuid

from flask import Flask, request
from werkzeug.exceptions import BadRequest, Conflict, Unauthorized

from usage_middleware import OperationConflict, QuotaError, QuotaExceeded, SQLiteTokenStore, UsageMiddleware, bearer_key

MODEL = "shout-1"
MOST_CHARACTERS = 1000  # what one request may cost at most: a quota unit for each character

store = SQLiteTokenStore(os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db"))

app = Flask(__name__)
app.wsgi_app = UsageMiddleware(app.wsgi_app, store)  # type: ignore[method-assign]


@app.post("/shout")
def shout() -> str:
    key = bearer_key(request.environ)
    token = store.get(key) if key else None
    if key is None or token is None:
        raise Unauthorized
    # Ids are unique in the store, and two callers may choose the same: the token's id keeps them apart.
    request_id = request.headers.get("X-Request-Id") or uuid.uuid4().hex
    if len(request_id) > 200:
        raise BadRequest("X-Request-Id is too long")
    operation_id = store.reserve(key, MOST_CHARACTERS, model=MODEL, idempotency_key=f"{token.id}:{request_id}")

    cost = 0
    try:
        answer = request.get_data(as_text=True)[:MOST_CHARACTERS].upper()  # the work
        cost = len(answer)
    finally:
        store.settle(operation_id, cost)  # nothing, where the work failed
    return answer


@app.errorhandler(QuotaError)
def refused(error: QuotaError) -> tuple[dict[str, str], int]:
    if isinstance(error, QuotaExceeded):
        return {"error": "the quota is used up"}, 402
    if isinstance(error, OperationConflict):
        return {"error": "this X-Request-Id was used for another request"}, Conflict.code
    return {"error": str(error)}, 403  # disabled, expired, or not for this model


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    key, _ = store.create(name="Demo", total_available=1_000_000)
    print(f"curl -H 'Authorization: Bearer {key}' http://127.0.0.1:{port}/api/usage/token")
    print(f"curl -H 'Authorization: Bearer {key}' -d hello http://127.0.0.1:{port}/shout", flush=True)
    app.run(port=port)
