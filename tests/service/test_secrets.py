"""No output shows a key that is passed as a key, or its digest, whatever goes wrong.

A key is passed in the ``Authorization`` header, as the argument ``key`` of a store, or to the command. What is
promised: no answer, log line, message, ``repr`` or traceback holds it, and no file. Exempt are the one answer of
``create`` (and ``rotate``), which is there to show it, and the digest in the database, which is there to be found.
Not promised is what a debugger or ``capture_locals`` takes out of a running call: the caller's own frame has the key.
"""

import base64
import contextlib
import gc
import hashlib
import io
import json
import sqlite3
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pytest
from canary import (
    HEADERS,
    KEY,
    OTHER,
    QUOTING,
    SHOWN_HINT,
    STATES,
    Failing,
    Watch,
    assert_error_has_no_trace,
    assert_no_trace,
    digests,
    put,
)
from client import PATH, call, environ, wrapped
from command import SCRIPT
from waiting import until_logged

from usage_middleware import MemoryTokenStore, SQLiteTokenStore, StoreError, UsageMiddleware, bearer_key
from usage_middleware.cli import main


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(f"no row for {KEY}", id="the key"),
        pytest.param(f"no row for sk-{KEY[:8]}...", id="its beginning"),
        pytest.param(KEY.upper(), id="in capitals"),
        pytest.param(KEY.encode().hex(), id="hexadecimal"),
        pytest.param(base64.b64encode(KEY.encode()).decode(), id="base64"),
        pytest.param(hashlib.sha256(KEY.encode()).hexdigest().upper(), id="its digest"),
        pytest.param(repr(digests(KEY)[0]), id="the repr of its digest"),
        pytest.param(digests(KEY)[0], id="the bytes of its digest"),
        pytest.param(digests(KEY)[1], id="the digest with the prefix"),
    ],
)
def test_a_trace_is_found(shown):
    with pytest.raises(AssertionError):
        assert_no_trace("this", shown)
    assert_no_trace("a hint", f"...{SHOWN_HINT}")


@pytest.fixture
def watch(capfd):
    with Watch(capfd) as watch:
        yield watch


# --- Over HTTP


def ask_everything(store, authorization, **options):
    """Yield every answer to a header; the endpoint's own reading of it goes the same way."""
    app = UsageMiddleware(wrapped, store, **options)
    assert_no_trace("the middleware", [repr(app), str(app), app.__dict__])
    for method in ("GET", "HEAD", "OPTIONS", "POST", KEY):
        for path in (PATH, PATH + "/"):
            # The query and other headers are not places for a key, but here they hold it all the same.
            answer = call(
                app,
                environ(
                    method,
                    path,
                    HTTP_AUTHORIZATION=authorization,
                    QUERY_STRING=f"key={KEY}",
                    HTTP_X_API_KEY=KEY,
                    HTTP_COOKIE=f"key={KEY}",
                    HTTP_ORIGIN=f"https://{KEY}.example",
                ),
            )
            assert_no_trace("an answer", [answer.status, answer.reason, answer.headers, answer.body])
            yield answer.status


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    with MemoryTokenStore() if request.param == "memory" else SQLiteTokenStore(tmp_path / "tokens.db") as store:
        yield store


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("authorization", HEADERS)
def test_no_answer_and_no_log_has_it(watch, store, state, authorization):
    put(store, state)
    statuses = set(ask_everything(store, authorization))
    well_formed = bearer_key({"HTTP_AUTHORIZATION": authorization}) is not None
    assert (200 in statuses) == (well_formed and state in ("valid", "expired"))
    assert 503 not in statuses


@pytest.mark.parametrize("make", QUOTING)
@pytest.mark.parametrize("prefix", ["", "sk-"])
def test_what_a_store_raises_is_logged_without_it(watch, make, prefix):
    assert set(ask_everything(Failing(make), f"Bearer {prefix}{KEY}")) == {503, 204, 405}
    assert watch.log.count("usage_middleware Failing failed: ") == 4


def test_the_repr_of_a_key_is_not_logged_either(watch):
    key = "back\\slash'quote\"cAnArY"
    call(
        UsageMiddleware(wrapped, Failing(lambda key: StoreError(f"no row for {key!r}"))),
        environ(HTTP_AUTHORIZATION=f"Bearer {key}"),
    )
    assert "Failing failed: StoreError" in watch.log
    assert "cAnArY" not in watch.log


class Speechless(StoreError):
    def __str__(self):
        raise KeyError("no text")


def test_a_store_error_without_a_text_is_a_503_like_any_other(watch):
    answer = call(
        UsageMiddleware(wrapped, Failing(lambda key: Speechless())), environ(HTTP_AUTHORIZATION=f"Bearer {KEY}")
    )
    assert answer.status == 503
    assert "Failing failed: Speechless" in watch.log


def lock(path):
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def replace(path):
    path.write_bytes(b"no database" * 1000)


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def damage(path):
    """Overwrite every page but the first."""
    path.with_name(f"{path.name}-wal").unlink(missing_ok=True)
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xa5" * (len(data) - 4096))


def spoil(path):
    """Change the row so that it is not a token."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE tokens SET model_limits = 'no JSON'")


BROKEN = [
    pytest.param(replace, id="no database"),
    pytest.param(damage, id="damaged pages"),
    pytest.param(spoil, id="a row that is not a token"),
    pytest.param(Path.unlink, id="missing"),
    pytest.param(cut, id="cut off"),
    pytest.param(lock, id="locked"),
]


@pytest.mark.parametrize("do_break", BROKEN)
@pytest.mark.parametrize("is_open", [True, False], ids=["while open", "before it is opened"])
def test_an_error_of_a_broken_database_does_not_have_it(watch, tmp_path, do_break, is_open):
    path = tmp_path / "tokens.db"
    with SQLiteTokenStore(path) as store:
        put(store, "valid")
        token_id = store.get(KEY).id
    with SQLiteTokenStore(path, timeout=0.01, read_only=not is_open) as store:
        if is_open:
            # Writing, so that what broke cannot hide behind a cache.
            store.charge(KEY, 1)
        with contextlib.closing(do_break(path) or contextlib.ExitStack()):
            assert set(ask_everything(store, f"Bearer sk-{KEY}")) <= {200, 503, 401, 204, 405}
            errors = [error for use in uses(store, token_id) if (error := error_of(use))]
        assert any(isinstance(error, StoreError) for error in errors)
        for error in errors:
            assert_error_has_no_trace(error)
        for file in tmp_path.iterdir():
            assert_no_trace(file.name, file.read_bytes(), may_hold_digest=True)


def test_an_error_of_a_closed_store_does_not_have_it(watch, store):
    put(store, "valid")
    store.close()
    assert set(ask_everything(store, f"Bearer sk-{KEY}")) == {503, 204, 405}


# --- Stores


def uses(store, token_id):
    """Yield all that takes a key, in every way to be wrong about the rest."""
    yield lambda key: store.get(key)
    yield lambda key: store.create(key=f"sk-{key}")
    yield lambda key: store.create(key=key, name=1)
    yield lambda key: store.create(key=key, total_available=-1)
    yield lambda key: store.create(key=f"{key},")
    yield lambda key: store.create(key=f"{key}\n")
    yield lambda key: store.create(key=f"{key}\ud800")
    yield lambda key: store.create(key=key * 20)
    yield lambda key: store.create(key=key.encode())
    yield lambda key: store.create(key=[key])
    yield lambda key: store.update(token_id, key=key)
    yield lambda key: store.update(token_id, digest=hashlib.sha256(key.encode()).digest())
    for charge in (store.charge, store.reserve):
        yield lambda key, charge=charge: charge(key, 1)
        yield lambda key, charge=charge: charge(key, 1, model="gpt-4o", idempotency_key=charge.__name__)
        yield lambda key, charge=charge: charge(key, 2, idempotency_key=charge.__name__)
        yield lambda key, charge=charge: charge(key, 10**6)
        yield lambda key, charge=charge: charge(key, -1)
        yield lambda key, charge=charge: charge(key, "1")
        yield lambda key, charge=charge: charge(key, 1, model="")
        yield lambda key, charge=charge: charge(key, 1, idempotency_key="x" * 256)
        yield lambda key, charge=charge: charge(f"sk-{key}", 1)
        yield lambda key, charge=charge: charge(f"{key}\ud800", 1)
        yield lambda key, charge=charge: charge(key.encode(), 1)
        yield lambda key, charge=charge: charge([key], 1)
    yield lambda key: store.reserve(key, 1, expires_in=-1)
    yield lambda key: store.settle(store.reserve(key, 1), 2)
    yield lambda key: store.refund("charge")
    yield lambda key: store.grant(token_id, 5)
    yield lambda key: store.rotate(token_id)
    yield lambda key: store.get(f"{key}\ud800")
    yield lambda key: store.get(key.encode())
    yield lambda key: store.get(None)
    yield lambda key: store.delete(token_id)
    yield lambda key: store.prune(time.time() + 10**6)


def error_of(use):
    """Return what a use of a store raises, or ``None`` if it succeeds."""
    try:
        result = use(KEY)
    except Exception as error:
        return error
    # Of what create() returns, the first is the key.
    shown = result[1:] if isinstance(result, tuple) else result
    assert_no_trace("a result", [repr(shown), str(shown)])
    return None


def reachable(root):
    """Yield every str and bytes that can be reached from an object, except through modules and classes."""
    seen, todo = set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(item))
        if isinstance(item, (str, bytes)):
            yield item
        todo.extend(gc.get_referents(item))


@pytest.mark.parametrize("state", STATES)
def test_no_error_and_no_repr_of_a_store_has_it(watch, store, state):
    put(store, state)
    token_id = next((token.id for token in store.tokens()), 1)
    errors = []
    for use in uses(store, token_id):
        errors.append(error_of(use))
        # Before the next use puts something else there.
        for kept in reachable(store):
            assert_no_trace("the store's memory", kept, may_hold_digest=True)
    errors = [error for error in errors if error is not None]
    assert len(errors) > 20
    for error in errors:
        assert_error_has_no_trace(error)
    assert_no_trace("the store", [repr(store), str(store), list(store.tokens()), list(store.history(token_id))])


@pytest.mark.parametrize("state", STATES)
def test_no_file_has_it(tmp_path, state):
    folder = tmp_path / "database"
    folder.mkdir()

    def scan():
        for file in folder.iterdir():
            assert_no_trace(file.name, file.read_bytes(), may_hold_digest=True)
            assert_no_trace("a file's name", file.name)
            yield file.name

    with SQLiteTokenStore(folder / "tokens.db") as store:
        put(store, state)
        token_id = next((token.id for token in store.tokens()), 1)
        for use in uses(store, token_id):
            error_of(use)
        # While it is open, the log of writes has each page as it was after each of them.
        assert set(scan()) == {"tokens.db", "tokens.db-wal", "tokens.db-shm"}
    assert "tokens.db" in set(scan())
    if state != "unknown":
        assert digests(KEY)[0] in (folder / "tokens.db").read_bytes()


# --- The command


def run(*args, stdin="", status=0):
    """Run the command in this process. Return what it prints on standard output and on standard error."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
    finally:
        sys.stdin = before
    assert end.value.code == status, err.getvalue()
    assert_no_trace("standard error", err.getvalue())
    return out.getvalue()


@pytest.fixture
def db(tmp_path, monkeypatch):
    monkeypatch.setenv("USAGE_MIDDLEWARE_DB", str(tmp_path / "tokens.db"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tokens.db"


@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["text", "JSON"])
@pytest.mark.parametrize(
    ("given", "stdin"),
    [
        pytest.param(f"sk-{KEY}", "", id="argument"),
        pytest.param(KEY, "", id="argument without the prefix"),
        pytest.param("-", f"sk-{KEY}\n", id="standard input"),
    ],
)
def test_the_command_shows_it_once(watch, db, given, stdin, as_json):
    created = run("create", "--quota", 100, "--key", given, *as_json, stdin=stdin)
    assert created.count(f"sk-{KEY}") == 1
    assert_no_trace("the rest", created.replace(KEY, ""))
    run("create", "--key", given, stdin=stdin, status=2)
    for args in (
        ("charge", given, 5, "--idempotency-key", "first", *as_json),
        ("charge", 1, 5, *as_json),
        ("list", *as_json),
        ("show", 1, *as_json),
        ("history", 1, *as_json),
        ("update", 1, "--name", "Other", "--expires", "1y", *as_json),
        ("grant", 1, 5, *as_json),
        ("usage", 1, *as_json),
        ("check", *as_json),
        ("prune", "--before", int(time.time()), "--yes"),
        ("rotate", 1, *as_json),
        ("delete", 1, "--yes"),
    ):
        assert_no_trace(args[0], run(*args, stdin=stdin))
        if args[0] == "charge":
            charged = json.loads(run("history", 1, "--json"))[0]["id"]
            assert_no_trace("refund", run("refund", charged, *as_json))


@pytest.mark.parametrize(
    ("args", "stdin"),
    [
        pytest.param(("charge", f"sk-{KEY}", "5"), "", id="charge, unknown"),
        pytest.param(("charge", "-", "5"), f"{KEY}\n", id="charge, unknown, from standard input"),
        pytest.param(("charge", f"sk-{KEY}"), "", id="charge without an amount"),
        pytest.param(("charge", f"sk-{KEY}", "-5"), "", id="charge, negative"),
        pytest.param(("charge", f"sk-{KEY}\udc80", "5"), "", id="charge, no text"),
        pytest.param(("create", "--key", f"{KEY},"), "", id="create, a comma"),
        pytest.param(("create", "--key", f"{KEY} {OTHER}"), "", id="create, two keys"),
        pytest.param(("create", "--key", KEY * 20), "", id="create, too long"),
        pytest.param(("create", "--key", f"{KEY}\udc80"), "", id="create, no text"),
        pytest.param(("create", "--key", "-"), f"{KEY} {OTHER}\n", id="create, two keys from standard input"),
        pytest.param(("create", "--key", KEY, "--quota", "-1"), "", id="create, negative"),
        pytest.param(("create", "--key", KEY, "--db", "/"), "", id="create, a directory for a database"),
    ],
)
def test_no_error_of_the_command_has_it(watch, db, args, stdin):
    run("create")
    assert run(*args, stdin=stdin, status=2) == ""


@pytest.mark.parametrize("do_break", [damage, spoil])
def test_no_error_of_a_broken_database_has_it(watch, db, do_break):
    run("create", "--key", KEY)
    do_break(db)
    for args in (("charge", KEY, 1), ("list",), ("show", 1), ("create", "--key", KEY)):
        run(*args, status=2)


def test_a_served_endpoint_logs_no_key(db, tmp_path):
    run("create", "--key", KEY)
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen([SCRIPT, "serve", "--port", "0"], stdout=stderr, stderr=stderr)
    try:
        match = until_logged(r"Serving (http://\S+?:\d+)", log, process)

        def get(key):
            request = urllib.request.Request(f"{match[1]}{PATH}?key={KEY}", headers={"Authorization": f"Bearer {key}"})
            with contextlib.closing(urllib.request.build_opener(urllib.request.ProxyHandler({}))) as opener:
                try:
                    with opener.open(request, timeout=30) as response:
                        answer = response.status, response.headers.as_bytes(), response.read()
                except HTTPError as error:
                    with error:
                        answer = error.code, error.headers.as_bytes(), error.read()
            assert_no_trace("an answer", answer)
            return answer[0]

        assert get(f"sk-{KEY}") == 200
        assert get(OTHER) == 401
        assert get(f"{KEY},{OTHER}") == 401
        spoil(db)
        assert get(KEY) == 503
    finally:
        process.terminate()
        process.wait(30)
    assert "SQLiteTokenStore failed: DamagedToken" in log.read_text()
    assert_no_trace("the log", log.read_bytes())
    for file in tmp_path.iterdir():
        assert_no_trace(file.name, file.read_bytes(), may_hold_digest=True)
