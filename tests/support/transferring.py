"""Files of tokens, and the databases they come from and go to."""

import hashlib

from usage_middleware import SQLiteTokenStore

NOW = 1_800_000_000  # 2027-01-15 08:00:00 UTC


KEY = "canary-key-of-its-holder-0001"


DIGEST = hashlib.sha256(KEY.encode()).hexdigest()


MOST = 2**63 - 1


def tokens(path):
    with SQLiteTokenStore(path) as store:
        return list(store.tokens())


def lines(count):
    """Yield the lines of a CSV file with that many tokens."""
    yield "key,name,total_available\n"
    for number in range(count):
        yield f"sk-{hashlib.sha256(b'%d' % number).hexdigest()},Token {number},{number}\n"
