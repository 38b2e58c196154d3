"""A Flask view that charges, and that returns the first answer again if a request is repeated.

    pip install . flask
    python examples/idempotent_flask.py [PORT]

Then run the curl commands that it prints. Tokens are kept in the file that USAGE_MIDDLEWARE_DB names, or in tokens.db,
and answers beside them, in answers.db.

Before an operation is settled, its answer is kept under the id of the operation, with a digest of the request. So after
any interruption, the next request with the same Idempotency-Key either finds the answer and settles its cost, or finds
none and gets an error that says so.
"""

import hashlib
import os
import sqlite3
import sys
from contextlib import closing

from flask import Flask, Response, jsonify, request

from usage_middleware import (
    Operation,
    QuotaError,
    QuotaExceeded,
    SQLiteTokenStore,
    StoreError,
    UsageMiddleware,
    bearer_key,
)

MOST_CHARACTERS = 1000  # what one request may cost at most: a quota unit for each character

DATABASE = os.environ.get("USAGE_MIDDLEWARE_DB", "tokens.db")
ANSWERS = os.path.join(os.path.dirname(os.path.abspath(DATABASE)), "answers.db")

store = SQLiteTokenStore(DATABASE)

app = Flask(__name__)
app.wsgi_app = UsageMiddleware(app.wsgi_app, store)  # type: ignore[method-assign]


@app.post("/shout")
def shout() -> Response | str:
    key = bearer_key(request.environ)
    name = request.headers.get("Idempotency-Key", "")
    if key is None:
        return refusal(401, "send your key in the header Authorization: Bearer")
    if not 1 <= len(name) <= 255:
        return refusal(400, "send an Idempotency-Key of 1 to 255 characters")
    body = request.get_data()
    operation = store.reserve(key, MOST_CHARACTERS, idempotency_key=name)
    if operation.replayed:
        return again(key, operation, body)

    cost = 0
    try:
        answer = body.decode("utf-8", "replace")[:MOST_CHARACTERS].upper()  # the work
        keep(operation, body, answer)
        cost = len(answer)
    finally:
        store.settle(operation, cost)  # 0 if the work failed: the caller does not pay for that
    return answer


def again(key: str, operation: Operation, body: bytes) -> Response | str:
    """Return the answer of an earlier request, if this is the same one."""
    token = store.get(key)
    if token is None or not token.enabled:  # disabled since then: the ledger does not refuse a repeated call
        return refusal(401, "this key cannot be used")
    with closing(sqlite3.connect(ANSWERS)) as db:
        db.execute("CREATE TABLE IF NOT EXISTS answers (operation TEXT PRIMARY KEY, request BLOB, answer TEXT)")
        row = db.execute("SELECT request, answer FROM answers WHERE operation = ?", (operation.id,)).fetchone()
    if row is None:
        return refusal(409, "the first request with this Idempotency-Key has no answer, or none yet")
    if row[0] != digest(body):
        return refusal(409, "this Idempotency-Key was used for another request")
    if operation.is_open:  # the process ended between keeping the answer and settling it
        store.settle(operation, len(row[1]))
    return str(row[1])


def keep(operation: Operation, body: bytes, answer: str) -> None:
    with closing(sqlite3.connect(ANSWERS)) as db:
        db.execute("CREATE TABLE IF NOT EXISTS answers (operation TEXT PRIMARY KEY, request BLOB, answer TEXT)")
        db.execute("INSERT INTO answers VALUES (?, ?, ?)", (operation.id, digest(body), answer))
        db.commit()


def digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


@app.errorhandler(QuotaError)
def refused(error: QuotaError) -> Response:
    if isinstance(error, QuotaExceeded):
        return refusal(402, f"{error.requested} quota units are needed, {error.available} are left")
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
    print(
        f"curl -H 'Authorization: Bearer {key}' -H 'Idempotency-Key: 1' -d hello http://127.0.0.1:{port}/shout",
        flush=True,
    )
    app.run(port=port)
