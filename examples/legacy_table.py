"""A store over a table that an older application already has, with its own column names and with keys as plain text.

    pip install .
    python examples/legacy_table.py [PORT]

Then run the curl command that it prints. The program creates a small legacy database for the demonstration, and
removes it at the end. LegacyTokenStore is the part to copy: a store is any object with a method `get(key)`.
"""

import os
import secrets
import sqlite3
import sys
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

from werkzeug.exceptions import NotFound
from werkzeug.serving import run_simple

from usage_middleware import Token, UsageMiddleware

# Any column except the key may be NULL, and the collation of the key treats "abc" and "ABC" as equal.
LEGACY_TABLE = """
CREATE TABLE api_clients (
    apikey VARCHAR(64) NOT NULL PRIMARY KEY COLLATE NOCASE,
    cust_nm TEXT,
    credits_left INTEGER,
    credits_spent INTEGER,
    valid_until TEXT,  -- the last day, such as 2030-12-31
    is_blocked INTEGER
)
"""
# The first comparison uses the index, and the second is exact. Keys arrive without `sk-`. If the table has them with
# it, compare with 'sk-' || :key.
QUERY = """
SELECT cust_nm, credits_left, credits_spent, valid_until, is_blocked
FROM api_clients WHERE apikey = :key AND apikey = :key COLLATE BINARY
"""


class LegacyTokenStore:
    def __init__(self, path: str) -> None:
        self.uri = Path(path).absolute().as_uri() + "?mode=ro"

    def get(self, key: str, /) -> Token | None:
        # Several threads handle requests, and each connection may be used by one thread only.
        with closing(sqlite3.connect(self.uri, uri=True)) as db:
            row = db.execute(QUERY, {"key": key}).fetchone()
        if row is None:
            return None
        name, left, spent, last_day, blocked = row
        end = end_of(last_day) if last_day else 0
        return Token(
            name=name or "", total_available=left or 0, total_used=spent or 0, expires_at=end, enabled=not blocked
        )


def end_of(day: str) -> int:
    """Return the Unix time at which a day such as 2030-12-31 ends, in UTC."""
    return int((datetime.fromisoformat(day).replace(tzinfo=timezone.utc) + timedelta(days=1)).timestamp())


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    key = secrets.token_hex(16)
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "legacy.db")
        with closing(sqlite3.connect(path)) as db:
            db.execute(LEGACY_TABLE)
            db.execute("INSERT INTO api_clients VALUES (?, 'Demo', 987655, 12345, '2030-12-31', 0)", (key,))
            db.commit()
        application = UsageMiddleware(NotFound(), LegacyTokenStore(path))
        print(f"curl -H 'Authorization: Bearer sk-{key}' http://127.0.0.1:{port}/api/usage/token", flush=True)
        run_simple("127.0.0.1", port, application, threaded=True)
