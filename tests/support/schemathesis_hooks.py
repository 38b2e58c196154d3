"""Hooks that schemathesis loads for test_openapi.py: the keys to send, and checks that a JSON schema cannot express.

``KEYS`` holds the keys, separated by spaces. A JSON schema accepts 1000.0 as an integer, as JSON has only numbers.
Clients in typed languages do not.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import NoReturn

import schemathesis

_keys = itertools.cycle(os.environ["KEYS"].split())


# Without an interval, each request gets the next key, so all keys are sent.
@schemathesis.auth(refresh_interval=None)
class KnownKeys:
    def get(self, case, context):
        return next(_keys)

    def set(self, case, key, context):
        case.headers["Authorization"] = f"Bearer {key}"


def _refuse(text: str) -> NoReturn:
    raise AssertionError(f"{text} is not an integer")


def _refuse_whole(text: str) -> float:
    assert not float(text).is_integer(), f"{text} is a whole number"
    return float(text)


@schemathesis.check
def bodies_are_compact_and_of_integers(context, response, case):
    if response.content:
        # Amounts of money have a fraction, and one that is whole has none.
        parse_float = _refuse_whole if "/billing/" in case.path else _refuse
        body = json.loads(response.content, parse_float=parse_float, parse_constant=_refuse)
        assert response.content == json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        if "total_granted" in body.get("data", ()):
            data = body["data"]
            assert data["total_granted"] == data["total_used"] + data["total_available"]
