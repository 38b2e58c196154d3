"""A key that must not be shown anywhere, its traces, and what might show it.

:func:`assert_no_trace` asserts that nothing which a process prints, logs, answers or raises has a trace of the key.
"""

from __future__ import annotations

import base64
import faulthandler
import hashlib
import io
import logging
import sqlite3
import sys
import traceback
import warnings

import pytest

from usage_middleware import StoreError

# No slice of it occurs anywhere by chance. Its last four characters are shown by design.
KEY = "cAnArYzQ7xW2vK9pLm4Rt8Yb3Nc6Hd1Jf5Gs0TqEuXoVaPiZ"
OTHER = "".join(reversed(KEY))
SLICE = 8
SHOWN_HINT = KEY[-4:]


def digests(key):
    return [hashlib.sha256((prefix + key).encode()).digest() for prefix in ("", "sk-")]


def encodings(data):
    yield data.hex().encode()
    yield base64.b64encode(data).rstrip(b"=")
    yield base64.urlsafe_b64encode(data).rstrip(b"=")
    yield repr(data)[2:-1].encode()


def traces(key, *, may_hold_digest=False):
    """Yield what would reveal a key: each part of it that is longer than a hint, its encodings, and its digests."""
    yield from (key[n : n + SLICE].encode() for n in range(len(key) - SLICE + 1))
    yield from encodings(key.encode())
    for digest in digests(key):
        yield from encodings(digest)
        if not may_hold_digest:
            yield digest


# In lower case, because a digest in capitals reveals as much.
TRACES = {
    may_hold_digest: {trace.lower() for key in (KEY, OTHER) for trace in traces(key, may_hold_digest=may_hold_digest)}
    for may_hold_digest in (False, True)
}


def assert_no_trace(what, shown, *, may_hold_digest=False):
    data = shown if isinstance(shown, bytes) else str(shown).encode("utf-8", "surrogatepass")
    data = data.lower()
    for trace in TRACES[may_hold_digest]:
        assert trace not in data, f"{what} shows {trace!r} of the key"


class Watch:
    """Check all that a process outputs besides its answers: logs of every level, warnings, standard output, errors."""

    def __init__(self, capfd):
        self._capfd = capfd
        self._log = io.StringIO()

    def __enter__(self):
        self._handler = logging.StreamHandler(self._log)
        self._handler.setFormatter(logging.Formatter("%(name)s %(message)s %(args)r"))
        self._root = logging.getLogger()
        self._level = self._root.level
        self._root.addHandler(self._handler)
        self._root.setLevel(logging.DEBUG)
        self._catching = warnings.catch_warnings(record=True)
        self._warnings = self._catching.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *_):
        self._root.removeHandler(self._handler)
        self._root.setLevel(self._level)
        self._catching.__exit__(None, None, None)
        assert_no_trace("a warning", [str(warning) for warning in self._warnings])
        assert_no_trace("the log", self.log)
        out, err = self._capfd.readouterr()
        assert_no_trace("standard output", out)
        assert_no_trace("standard error", err)

    @property
    def log(self):
        return self._log.getvalue()


def assert_error_has_no_trace(error):
    """Check that an exception, all that it carries, and its traceback as a server prints it do not show the key."""
    assert_no_trace("a traceback", "".join(traceback.format_exception(error)))
    while error is not None:
        assert_no_trace("an exception", [repr(error), str(error), error.args, vars(error)])
        error = error.__cause__ or error.__context__


HEADERS = [
    pytest.param(f"Bearer {KEY}", id="without the prefix"),
    pytest.param(f"Bearer sk-{KEY}", id="with the prefix"),
    pytest.param(f"bearer   sk-{KEY} ", id="oddly spaced"),
    pytest.param(KEY, id="no scheme"),
    pytest.param(f"sk-{KEY}", id="no scheme but the prefix"),
    pytest.param(f"Basic {KEY}", id="another scheme"),
    pytest.param(f"Basic {base64.b64encode(f'user:{KEY}'.encode()).decode()}", id="basic"),
    pytest.param(f"Bearer {KEY},", id="a comma"),
    pytest.param(f"Bearer sk-{KEY}, Bearer sk-{OTHER}", id="two headers"),
    pytest.param(f"Bearer {KEY} {OTHER}", id="two keys"),
    pytest.param(f"Bearer {KEY}\0", id="NUL"),
    pytest.param(f"Bearer {KEY}\r\nX-Evil: {KEY}", id="a line feed"),
    pytest.param(f"Bearer {KEY}\xe9", id="Latin-1"),
    pytest.param(f"Bearer {KEY}\ud800", id="no text"),
    pytest.param(f"Bearer {KEY * 20}", id="too long"),
]


def put(store, state):
    """Bring the key into a state. The store does not know it yet."""
    if state == "unknown":
        return
    token = store.create(key=f"sk-{KEY}", name="Canary", total_available=100)[1]
    if state == "disabled":
        store.update(token.id, enabled=False)
    if state == "expired":
        store.update(token.id, expires_at=1)
    if state == "rotated":
        store.rotate(token.id)
    if state == "deleted":
        store.delete(token.id)


STATES = ["valid", "unknown", "disabled", "expired", "rotated", "deleted"]


class Failing:
    """A store that fails with its own message."""

    def __init__(self, make):
        self._make = make

    def get(self, key):
        faulthandler.dump_traceback(sys.stderr.fileno())
        try:
            raise LookupError(f"no row for {key}")
        except LookupError as error:
            found = self._make(key)
            if isinstance(found, BaseException):
                found.key = key
                if hasattr(found, "add_note"):
                    found.add_note(f"asked for {key}")
                raise found from error
            return found


class Verbose(StoreError):
    def __init__(self, key):
        super().__init__(key, hashlib.sha256(key.encode()).hexdigest())

    def __str__(self):
        return f"no row for {self.args[0]}"


QUOTING = [
    pytest.param(lambda key: StoreError(f"no row for {key}"), id="StoreError"),
    pytest.param(lambda key: StoreError(f"no row for {key!r}"), id="StoreError with the repr"),
    pytest.param(lambda key: StoreError(f"no row for sk-{key}"), id="StoreError with the prefix"),
    pytest.param(lambda key: StoreError("no row for", key), id="StoreError with an argument"),
    pytest.param(lambda key: StoreError("no row"), id="StoreError with a cause that quotes"),
    pytest.param(Verbose, id="a StoreError of its own"),
    pytest.param(KeyError, id="KeyError"),
    pytest.param(lambda key: RuntimeError(f"no row for {key[::-1]}"), id="an encoding of the key"),
    pytest.param(lambda key: sqlite3.OperationalError(f"near '{key}': syntax error"), id="a database's"),
    pytest.param(lambda key: UnicodeDecodeError("utf-8", key.encode(), 0, 1, "x"), id="an object with the key"),
    pytest.param(lambda key: {"key": key}, id="a dict, and no token"),
    pytest.param(lambda key: key, id="the key itself, and no token"),
    pytest.param(lambda key: type(key, (), {})(), id="an object of a class of that name"),
]
