"""Which database is one of new-api, and the command over it."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest
from command import URL, get, run
from gateway import KEY
from sqlalchemy import NullPool, create_engine, text

from usage_middleware import (
    SQLAlchemyTokenStore,
    SQLiteTokenStore,
)
from usage_middleware.stores import is_new_api

# --- Which database is one of new-api


def test_a_database_of_new_api_is_known(gateway):
    assert is_new_api(gateway.url)
    if gateway.kind != "sqlite":
        with SQLAlchemyTokenStore(gateway.url) as store:  # a service that has its tables beside them
            store.create()
        assert not is_new_api(gateway.url)


def test_other_databases_are_known_not_to_be(tmp_path, request):
    with SQLiteTokenStore(tmp_path / "ours.db") as store:
        store.create()
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE tokens (id, key)")
    (tmp_path / "text").write_text("no database, but long enough to be read as the header of one" * 20)
    (tmp_path / "empty").touch()
    before = sorted(os.listdir(tmp_path))
    for name in ("ours.db", "other.db", "text", "empty", "missing.db", "."):
        assert not is_new_api(str(tmp_path / name)), name
        assert not is_new_api(f"sqlite:///{tmp_path / name}"), name
    assert not is_new_api("memory:")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_a_server_without_new_api_keeps_its_tables(url):
    assert not is_new_api(url)
    with create_engine(url, poolclass=NullPool).connect() as connection:
        count = "SELECT count(*) FROM information_schema.tables WHERE table_schema IN ('public', database())"
        count = count.replace("database()", "'public'") if url.startswith("postgresql") else count
        assert connection.execute(text(count)).scalar() == 0


# --- The command


def test_serve_answers_from_it(gateway, start, tmp_path):
    process, match, log = start("serve", "--db", gateway.url, "--port", "0", ready=URL)
    status, headers, body = get(match[1], Authorization=f"Bearer sk-{KEY}")
    assert status == 200
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert body == (
        b'{"code":true,"message":"ok","data":{"object":"token_usage","name":"Alice","total_granted":1000000,'
        b'"total_used":12345,"total_available":987655,"unlimited_quota":false,"model_limits":{},'
        b'"model_limits_enabled":false,"expires_at":0}}'
    )
    gateway.execute("UPDATE tokens SET remain_quota = 0, model_limits = 'gpt-4o', model_limits_enabled = '1'")
    data = json.loads(get(match[1], Authorization=f"Bearer {KEY}")[2])["data"]
    assert (data["total_available"], data["model_limits"], data["model_limits_enabled"]) == (0, {"gpt-4o": True}, True)
    gateway.execute("UPDATE tokens SET status = 2")
    assert get(match[1], Authorization=f"Bearer {KEY}")[0] == 401
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert "database of new-api" in log.read_text()
    for secret in ("p%40ss", KEY, "Traceback"):
        assert secret not in log.read_text()


COMMANDS = [
    ["create"],
    ["list"],
    ["show", "1"],
    ["update", "1", "--name", "x"],
    ["rotate", "1"],
    ["delete", "1", "--yes"],
    ["grant", "1", "5"],
    ["charge", "1", "5"],
    ["refund", "x"],
    ["history", "1"],
    ["prune", "--before", "1d"],
    ["check"],
]


def test_other_commands_refuse_it(gateway):
    for command in COMMANDS:
        out, err = run(*command, "--db", gateway.url, status=2)
        assert out == ""
        assert err.count("\n") == 1
        assert "which is only read: 'usage-middleware serve' answers from it" in err
    with create_engine(gateway.url, poolclass=NullPool).connect() as connection:
        assert connection.execute(text("SELECT remain_quota, used_quota, status FROM tokens")).one() == (
            987655,
            12345,
            1,
        )


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_only_create_makes_tables_in_a_server(url):
    for command in [*COMMANDS[1:], ["serve"]]:
        out, err = run(*command, "--db", url, status=2)
        assert (out, err) == ("", "Error: this database has no tokens; 'usage-middleware create' makes the first\n")
    with SQLAlchemyTokenStore(url) as store:
        assert not store.has_tables()
    key = run("create", "--name", "Alice", "--quota", "5", "--db", url)[0]
    assert key.startswith("sk-")
    assert "Alice" in run("list", "--db", url)[0]
    assert json.loads(run("charge", "1", "2", "--json", "--db", url)[0])["total_available"] == 3


@pytest.mark.parametrize(
    ("database", "message"),
    [
        ("memory:", "ends with the command"),
        ("root:canary@tcp(localhost:3306)/oneapi", "has the form mysql://user:password@host/name"),
        ("postgresql://user:canary@127.0.0.1:1/name", "127.0.0.1:1/name failed"),
        ("mysql://user:canary@127.0.0.1:1/name", "127.0.0.1:1/name failed"),
        ("oracle://user:canary@127.0.0.1:1/name", "there is no store for oracle://"),
        ("mysql+cymysql://user:canary@127.0.0.1:1/name", "needs the package cymysql"),
        ("sqlite://", "has the form sqlite:///PATH"),
        ("sqlite:///missing.db", "there is no database missing.db"),
    ],
)
def test_databases_that_cannot_be_used_are_one_line(database, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("list", "serve"):
        out, err = run(command, "--db", database, status=2)
        assert out == ""
        assert err.count("\n") == 1
        assert message in err
        assert "canary" not in err
    assert not list(tmp_path.iterdir())


WITHOUT_SQLALCHEMY = "import sys; sys.modules['sqlalchemy'] = None; from usage_middleware.cli import main; main()"


def test_without_sqlalchemy_one_line_says_what_to_install(sqlite_gateway):
    for database, name in (
        (sqlite_gateway.url, "NewAPITokenStore"),
        ("mysql://user:canary@127.0.0.1/name", "SQLAlchemyTokenStore"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_SQLALCHEMY, "serve", "--db", database], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr == (
            f"Error: {name} needs SQLAlchemy: pip install sqlalchemy 'psycopg[binary]' 'pymysql[rsa]'\n"
        )
