"""The command, as an operator types it. Everything a person reads here is what the command prints for real."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from usage_middleware import SQLiteTokenStore, Token
from usage_middleware.cli import commands, main
from usage_middleware.cli.formats import describe, format_time, parse_expiry, parse_time, token_table

SCRIPT = os.path.join(os.path.dirname(sys.executable), "usage-middleware")
KEY = re.compile("sk-[0-9A-Za-z]{48}")
NOW = 1_800_000_000  # 2027-01-15 08:00:00 UTC


@pytest.fixture
def db(tmp_path, monkeypatch):
    """The path of a database that the environment names, with nothing in it yet."""
    path = tmp_path / "tokens.db"
    monkeypatch.setenv("USAGE_MIDDLEWARE_DB", str(path))
    monkeypatch.chdir(tmp_path)
    return path


def run(*args, status=0):
    """Runs the command in this process; returns what it prints on standard output and on standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    assert end.value.code == status, err.getvalue()
    return out.getvalue(), err.getvalue()


def run_json(*args):
    return json.loads(run(*args, "--json")[0])


# --- Making and reading tokens


def test_create_prints_the_key_alone_and_once(db):
    out, err = run("create", "--name", "Alice", "--quota", "1_000_000")
    assert KEY.fullmatch(out.removesuffix("\n"))
    assert "cannot be shown again" in err
    with SQLiteTokenStore(db) as store:
        assert store.get(out.strip().removeprefix("sk-")) == store.find(1)
    key = out.strip().removeprefix("sk-")
    for shown in (run("list"), run("list", "--json"), run("show", 1), run("show", 1, "--json")):
        assert key not in "".join(shown)


def test_everything_that_create_takes(db):
    created = run_json(
        *("create", "--name", "Alice", "--total-available", 1000, "--unlimited-quota"),
        *("--model-limit", "gpt-4o=500", "--model-limit", "a=b=7", "--model-limit", "any"),
        *("--expires", "2030-01-01", "--key", "sk-legacy-key-0001"),
    )
    assert created.pop("key") == "sk-legacy-key-0001"
    assert abs(created.pop("created_at") - time.time()) < 60
    assert created == {
        "id": 1,
        "name": "Alice",
        "hint": "0001",
        "enabled": True,
        "total_granted": 1000,
        "total_used": 0,
        "total_available": 1000,
        "unlimited_quota": True,
        "model_limits": {"gpt-4o": 500, "a=b": 7, "any": True},
        "model_limits_enabled": True,
        "expires_at": 1893456000,
    }
    assert {**run_json("show", 1), "created_at": 0} == {**created, "created_at": 0, "model_usage": {}}


def test_a_key_is_read_from_standard_input(db, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("legacy-key-0001\n"))
    assert run("create", "--key", "-")[0] == "sk-legacy-key-0001\n"


def test_list_is_a_table(db):
    with SQLiteTokenStore(db) as store:
        store.create(name="Alice", total_available=1_000_000)
        store.create(name="\u4ee4\u724c", unlimited_quota=True, expires_at=4_102_444_800)
        store.create(name="Old", total_available=5, expires_at=1)
        store.create(name="Empty")
        store.update(store.create(name="Off\x1b[31m\n")[1].id, enabled=False)
        hints = [token.hint for token in store.tokens()]
    out, _ = run("list")
    assert out.splitlines() == [
        "ID  KEY    STATE      AVAILABLE  USED    GRANTED  EXPIRES               NAME",
        f" 1  …{hints[0]}  active     1,000,000     0  1,000,000  never                 Alice",
        f" 2  …{hints[1]}  active     unlimited     0          0  2100-01-01 00:00 UTC  \u4ee4\u724c",
        f" 3  …{hints[2]}  expired            5     0          5  1970-01-01 00:00 UTC  Old",
        f" 4  …{hints[3]}  exhausted          0     0          0  never                 Empty",
        f" 5  …{hints[4]}  disabled           0     0          0  never                 Off\ufffd[31m\ufffd",
    ]


def test_list_for_programs(db):
    with SQLiteTokenStore(db) as store:
        store.find(1)
        assert run_json("list") == []
        store.create(name="caf\u00e9")
        store.create()
    assert [(token["id"], token["name"]) for token in run_json("list")] == [(1, "caf\u00e9"), (2, "")]


def test_a_table_takes_tokens_as_they_come():
    def endless():
        number = 0
        while True:
            number += 1
            yield Token(id=number)

    lines = token_table(endless(), NOW)
    assert [next(lines).split()[0] for _ in range(2000)] == ["ID", *map(str, range(1, 2000))]


def test_show(db):
    with SQLiteTokenStore(db) as store:
        store.create(name="Alice", total_available=1000, model_limits={"gpt-4o": 500_000, "any": True})
    lines = run("show", 1)[0].splitlines()
    assert "Name       Alice" in lines
    assert "Available  1,000" in lines
    assert "Expires    never" in lines
    assert lines[-3:] == [
        "Models     only those below",
        "  gpt-4o  ░░░░░░░░░░░░░░░░░░░░  0 of 500,000 (0 %)",
        "  any     0",
    ]


@pytest.mark.parametrize(
    ("used", "granted", "shown"),
    [
        (0, 1000, "░░░░░░░░░░░░░░░░░░░░  0 of 1,000 (0 %)"),
        (1, 1000, "█░░░░░░░░░░░░░░░░░░░  1 of 1,000 (0 %)"),
        (500, 1000, "██████████░░░░░░░░░░  500 of 1,000 (50 %)"),
        (999, 1000, "███████████████████░  999 of 1,000 (99 %)"),
        (1000, 1000, "████████████████████  1,000 of 1,000 (100 %)"),
        (1500, 1000, "████████████████████  1,500 of 1,000 (150 %)"),
        (0, 0, "████████████████████  0 of 0 (none left)"),
        (2**62, 2**63 - 1, "██████████░░░░░░░░░░  4,611,686,018,427,387,904 of 9,223,372,036,854,775,807 (50 %)"),
    ],
)
def test_a_bar_is_only_empty_or_full_where_that_is_true(used, granted, shown):
    token = Token(id=1, total_used=used, total_available=granted - used)
    assert f"Used       {shown}" in list(describe(token, {}, NOW))


def test_the_models_of_a_token_without_limits_are_shown_too():
    token = Token(id=1, total_used=5, unlimited_quota=True, model_limits={"listed": 10})
    assert list(describe(token, {"listed": 5, "\u6a21\u578b": 7}, NOW))[-3:] == [
        "Models     any; the limits below are not enabled",
        "  listed  ██████████░░░░░░░░░░  5 of 10 (50 %)",
        "  \u6a21\u578b    7",
    ]


# --- Moving quota


def test_grant_tops_up_and_takes_back(db):
    run("create", "--quota", 100)
    assert run_json("grant", 1, 50)["total_granted"] == 150
    assert run_json("grant", 1, "-30")["total_granted"] == 120
    assert "cannot be taken back" in run("grant", 1, -121, status=2)[1]
    assert run_json("show", 1)["total_available"] == 120


def test_charge_by_id_by_key_and_from_standard_input(db, monkeypatch):
    key = run("create", "--quota", 100)[0].strip()
    assert run_json("charge", 1, 5)["total_used"] == 5
    assert run_json("charge", key, 5)["total_used"] == 10
    monkeypatch.setattr(sys, "stdin", io.StringIO(key + "\n"))
    assert run_json("charge", "-", 5)["total_used"] == 15
    _, err = run("charge", "sk-canary", 5, status=2)
    assert "canary" not in err


def test_a_charge_with_an_operation_id_is_made_once(db):
    run("create", "--quota", 100, "--model-limit", "gpt-4o=50")
    for _ in range(2):
        charged = run_json("charge", 1, 50, "--model", "gpt-4o", "--operation-id", "first")
        assert (charged["total_used"], charged["model_usage"]) == (50, {"gpt-4o": 50})
    assert "another amount" in run("charge", 1, 49, "--model", "gpt-4o", "--operation-id", "first", status=2)[1]


def test_refund_gives_back(db):
    run("create", "--quota", 100)
    run("charge", 1, 50, "--operation-id", "first")
    for _ in range(2):
        assert run_json("refund", "first", 20, "--refund-id", "back")["total_used"] == 30
    assert run_json("refund", "first")["total_used"] == 0
    assert "left to refund" in run("refund", "first", 1, status=2)[1]


def test_history_is_a_table_newest_first(db):
    with SQLiteTokenStore(db) as store:
        store._now = lambda: NOW
        key = store.create(total_available=10_000)[0].removeprefix("sk-")
        store.charge(key, 5000, model="gpt-4o", operation_id="first")
        store._now = lambda: NOW + 60
        store.reserve(key, 100, operation_id="second\x1b")
        store.refund("first", 1000, refund_id="third")
    assert run("history", 1)[0].splitlines() == [
        "WHEN                  KIND     AMOUNT   HELD  NOTE      MODEL   OPERATION",
        "2027-01-15 08:01 UTC  refund    1,000         of first  gpt-4o  third",
        "2027-01-15 08:01 UTC  reserve     100    100  open              second\ufffd",
        "2027-01-15 08:00 UTC  charge    5,000  4,000            gpt-4o  first",
    ]
    listed = run_json("history", 1)
    assert [operation["id"] for operation in listed] == ["third", "second\x1b", "first"]
    assert listed[-1]["held"] == 4000


def test_history_of_a_token_without_any(db):
    run("create")
    assert run_json("history", 1) == []
    assert len(run("history", 1)[0].splitlines()) == 1


def test_prune_counts_what_it_forgot(db):
    with SQLiteTokenStore(db) as store:
        store._now = lambda: NOW
        key = store.create(total_available=100)[0].removeprefix("sk-")
        store.charge(key, 5)
    assert "Forgot 0 operations" in run("prune", "--before", NOW)[1]
    assert "Forgot 1 operation " in run("prune", "--older-than", NOW + 1)[1]
    assert run_json("show", 1)["total_used"] == 5


# --- Changing tokens


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--name", "New"], {"name": "New"}),
        (["--name", ""], {"name": ""}),
        (["--unlimited"], {"unlimited_quota": True}),
        (["--expires", "2030-01-01"], {"expires_at": 1893456000}),
        (["--expires", "never"], {"expires_at": 0}),
        (["--disable"], {"enabled": False}),
        (["--model-limit", "new"], {"model_limits": {"new": True}, "model_limits_enabled": True}),
        (
            ["--model-limit", "new=3", "--model-limits-disabled"],
            {"model_limits": {"new": 3}, "model_limits_enabled": False},
        ),
        (["--no-model-limits"], {"model_limits": {}, "model_limits_enabled": False}),
        (["--model-limits-disabled"], {"model_limits_enabled": False}),
        (["--name", "New", "--disable"], {"name": "New", "enabled": False}),
    ],
)
def test_update_changes_what_is_named(db, options, changed):
    with SQLiteTokenStore(db) as store:
        store.create(name="Old", total_available=5, model_limits={"old": 1}, expires_at=4_102_444_800)
    before = run_json("show", 1)
    assert run_json("update", 1, *options) == {**before, **changed}
    assert run_json("show", 1) == {**before, **changed}


@pytest.mark.parametrize(
    ("off", "on"),
    [
        (["--disable"], ["--enable"]),
        (["--unlimited"], ["--limited"]),
        (["--model-limits-enabled"], ["--model-limits-disabled"]),
    ],
)
def test_update_back(db, off, on):
    run("create")
    before = run_json("show", 1)
    assert run_json("update", 1, *off) != before
    assert run_json("update", 1, *on) == before


def test_rotate_prints_a_new_key(db):
    old = run("create")[0].strip()
    new = run("rotate", 1)[0].strip()
    assert KEY.fullmatch(new)
    with SQLiteTokenStore(db) as store:
        assert store.get(old.removeprefix("sk-")) is None
        assert store.get(new.removeprefix("sk-")).id == 1


def test_delete(db):
    run("create")
    assert run("delete", 1) == ("", "Deleted token 1.\n")
    assert run_json("list") == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("n\n", 1), ("", 1)])
def test_delete_asks_at_a_terminal(db, monkeypatch, answer, left):
    run("create", "--name", "Alice")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    out, _ = run("delete", 1, status=0 if not left else 2)
    assert "Alice" in out
    assert len(run_json("list")) == left


def test_delete_with_yes_does_not_ask(db, monkeypatch):
    run("create")
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert run("delete", 1, "--yes")[0] == ""


# --- Which database


def test_the_database_may_be_named_on_either_side_and_goes_before_the_environment(db, tmp_path):
    run("create", "--name", "environment")
    for args in (["--db", "other.db", "create"], ["create", "--db", "other.db"]):
        run(*args)
    assert len(run_json("--db", "other.db", "list")) == 2
    assert len(run_json("--db", "none.db", "list", "--db", "other.db")) == 2
    assert [token["name"] for token in run_json("list")] == ["environment"]


def test_only_create_makes_a_database(db):
    for args in (
        *(["list"], ["show", 1], ["update", 1, "--disable"], ["rotate", 1], ["delete", 1], ["serve"]),
        *(["grant", 1, 5], ["charge", 1, 5], ["refund", "x"], ["history", 1], ["prune", "--before", "1d"]),
        *(["export"], ["export", "--output", "tokens.csv"]),
    ):
        assert "there is no database" in run(*args, status=2)[1]
    assert not db.exists()


# --- Wrong input

WRONG = [
    ([], "--nonsense", "No such option"),
    ([], "nonsense", "No such command"),
    (["show"], "", "Missing argument 'ID'"),
    (["show"], "x", "an ID is a number"),
    (["show"], "7", "there is no token 7"),
    (["show"], "99999999999999999999", "there is no token 99999999999999999999"),
    (["update"], "7 --disable", "there is no token 7"),
    (["update"], "1", "nothing to change"),
    (["update"], "1 --model-limit a --no-model-limits", "exclude each other"),
    (["rotate"], "7", "there is no token 7"),
    (["delete"], "7", "there is no token 7"),
    (["create"], "--quota -1", "range"),
    (["create"], "--quota 9223372036854775808", "range"),
    (["create"], "--quota many", "not a valid integer"),
    (["create"], "--expires soon", "'soon' is no time; write 30d"),
    (["create"], "--expires 30", "'30' is no time; write 30d"),
    (["create"], "--model-limit a=b", "MODEL=QUOTA"),
    (["create"], "--model-limit a=-1", "must not be negative"),
    (["create"], "--model-limit =1", "must be a name"),
    (["create"], "--key canary,key", "a key must be"),
    (["create"], "--key canary-key-0001", "in use"),
    (["grant"], "7 5", "there is no token 7"),
    (["grant"], "1 many", "not a valid integer"),
    (["grant"], "1 -5", "cannot be taken back"),
    (["charge"], "1 5", "0 quota units left"),
    (["charge"], "1 -5", "No such option"),
    (["charge"], "7 5", "there is no token 7"),
    (["charge"], "canary 5", "no token has this key"),
    (["refund"], "unknown", "there is no operation 'unknown'"),
    (["history"], "7", "there is no token 7"),
    (["prune"], "", "Missing option '--before'"),
    (["prune"], "--before soon", "'soon' is no time"),
    (["list"], "--db .", "is a directory"),
    (["create"], "--db missing/tokens.db", "there is no directory"),
    (["list"], "--db text", "not an SQLite database"),
    (["serve"], "--app wsgi", "module:attribute"),
    (["serve"], "--app no_such_module:application", "No module named 'no_such_module'"),
    (["serve"], "--app json:no_such_attribute", "cannot import json:no_such_attribute"),
    (["serve"], "--app json:__name__", "no WSGI application"),
    (["serve"], "--app broken:application", "cannot import broken:application: ZeroDivisionError"),
    (["serve"], "--path usage", "path must begin with '/'"),
    (["serve"], "--allow-origin app.example", "allow_origins must hold origins"),
    (["serve"], "--allow-origin https://app.example --no-cors", "exclude each other"),
    (["serve"], "--throttle often", "throttle must be one limit such as '20 per 20 minutes'"),
    (
        ["serve"],
        "--throttle 5/hour --throttle-storage http://:canary@host",
        "throttle_storage must be a storage URI",
    ),
    (["serve"], "--throttle-storage memory://", "--throttle-storage needs a --throttle"),
    (["serve"], "--port 65536", "range"),
    (["serve"], "--host 192.0.2.1", "cannot listen on 192.0.2.1 port 8000"),
    (["serve"], "--db text", "not an SQLite database"),
]


@pytest.mark.parametrize(
    ("command", "rest", "message"), [pytest.param(*case, id=" ".join(case[0] + [case[1]])) for case in WRONG]
)
def test_wrong_input_is_one_line_and_status_2(db, tmp_path, command, rest, message):
    (tmp_path / "text").write_text("no database, but long enough to be read as the header of one" * 20)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    run("create", "--key", "canary-key-0001")
    before = run("list", "--json")
    out, err = run(*command, *rest.split(), status=2)
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "canary" not in err
    assert run("list", "--json") == before


def test_without_a_database_the_error_names_both_ways(monkeypatch):
    monkeypatch.delenv("USAGE_MIDDLEWARE_DB", raising=False)
    _, err = run("list", status=2)
    assert "--db" in err
    assert "USAGE_MIDDLEWARE_DB" in err


# --- Help


def test_help_without_a_command():
    out, err = run()
    assert "usage-middleware demo" in out
    assert err == ""


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_every_command_and_every_option_explains_itself(name):
    command = commands.commands[name]
    assert command.help
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name
    assert run(name, "--help")[0].startswith(f"Usage: usage-middleware {name} ")


def test_the_readme_names_every_command(readme):
    for name in commands.commands:
        assert f"usage-middleware {name}" in readme or f"`{name}`" in readme


# --- Times


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30d", NOW + 30 * 86400),
        ("12h", NOW + 12 * 3600),
        ("45M", NOW + 45 * 60),
        ("90 s", NOW + 90),
        ("2w", NOW + 14 * 86400),
        ("1y", NOW + 365 * 86400),
        ("never", 0),
        ("Never", 0),
        ("0", 0),
        ("-1", 0),
        ("2027-01-01", 1798761600),
        ("2027-01-01 18:30", 1798761600 + 18 * 3600 + 30 * 60),
        ("2027-01-01T18:30:15", 1798761600 + 18 * 3600 + 30 * 60 + 15),
        ("2027-01-01T18:30Z", 1798761600 + 18 * 3600 + 30 * 60),
        ("2027-01-01T18:30+02:00", 1798761600 + 16 * 3600 + 30 * 60),
        (" 2027-01-01 ", 1798761600),
        ("1798761600", 1798761600),
        ("9999-12-31T23:59:59", 253402300799),
        ("1960-01-01", 1),
    ],
)
def test_times_that_are_understood(text, expected):
    assert parse_expiry(text, NOW) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("30d", NOW - 30 * 86400), ("0s", NOW), ("2027-01-01", 1798761600), ("100y", 1)]
)
def test_times_that_have_passed(text, expected):
    assert parse_time(text, NOW, past=True) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "30",
        "30x",
        "d",
        "-5d",
        "1.5d",
        "2027-13-01",
        "2027-02-30",
        "999999999y",
        "9" * 30,
        "9" * 5000,
        "+1e9",
    ],
)
def test_times_that_are_not(text):
    with pytest.raises(ValueError, match="is no time; write 30d"):
        parse_time(text, NOW)


@pytest.mark.parametrize("text", ["never", "0", "-1"])
def test_never_is_no_time_that_has_passed(text):
    with pytest.raises(ValueError, match="is no time"):
        parse_time(text, NOW, past=True)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "never"), (-1, "never"), (NOW, "2027-01-15 08:00 UTC"), (2**63 - 1, str(2**63 - 1))],
)
def test_times_are_shown(seconds, expected):
    assert format_time(seconds) == expected


# --- Serving: the installed script, as a process


@pytest.fixture
def start(tmp_path):
    """Starts the script; returns the process and the first match of a pattern in what it prints."""
    processes = []

    def start(*args, ready, **environment):
        log = tmp_path / f"log{len(processes)}"
        with log.open("w") as output:
            process = subprocess.Popen(
                [SCRIPT, *args],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                env={
                    **os.environ,
                    "PYTHONWARNINGS": "default::ResourceWarning",
                    "TMPDIR": str(tmp_path),
                    **environment,
                },
            )
        processes.append(process)
        deadline = time.monotonic() + 30
        while not (match := re.search(ready, log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        return process, match, log

    yield start
    for process in processes:
        process.kill()
        process.wait()


def get(url, path="/api/usage/token", method="GET", **headers):
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


URL = r"(http://127\.0\.0\.1:\d+)"


def test_demo_prints_a_curl_line_that_works_and_cleans_up(start, tmp_path):
    process, match, log = start(
        "demo", "--port", "0", ready=rf"curl -H '(Authorization): (Bearer sk-\w+)' {URL}/api/usage/token\n"
    )
    header, value, url = match.groups()
    status, headers, body = get(url, **{header: value})
    assert status == 200
    assert json.loads(body)["data"]["name"] == "Demo Token"
    assert headers["Content-Length"] == str(len(body))
    # The charge that it prints moves the totals, while it is serving.
    charge = re.search(r"usage-middleware (charge --db \S+ 1 1000)", log.read_text())[1].split()
    subprocess.run([SCRIPT, *charge], check=True, capture_output=True)
    after = json.loads(get(url, **{header: value})[2])["data"]
    assert after["total_used"] == json.loads(body)["data"]["total_used"] + 1000
    assert after["total_granted"] == json.loads(body)["data"]["total_granted"]
    assert get(url, **{header: value + "x"})[0] == 401
    assert get(url, path="/")[0] == 404
    listing = re.search(r"usage-middleware (list --db \S+)", log.read_text())[1].split()
    assert "Demo Token" in subprocess.run([SCRIPT, *listing], check=True, capture_output=True, text=True).stdout
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert not list(tmp_path.glob("usage-middleware-*"))
    assert "Traceback" not in log.read_text()
    assert "ResourceWarning" not in log.read_text()


def test_serve_stands_in_front_of_an_application(start, db, tmp_path):
    (tmp_path / "legacy.py").write_text(
        "def application(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Type', 'text/plain')])\n"
        "    return [b'legacy ' + environ['PATH_INFO'].encode('latin-1')]\n"
    )
    key = run("create", "--name", "Alice")[0].strip()
    process, match, log = start(
        *("serve", "--app", "legacy:application", "--port", "0", "--path", "/quota"),
        *("--allow-origin", "https://app.example"),
        ready=URL + "/quota",
    )
    url = match[1]
    assert get(url, "/other")[2] == b"legacy /other"
    assert get(url)[2] == b"legacy /api/usage/token"
    status, headers, body = get(url, "/quota", Authorization=f"Bearer {key}", Origin="https://app.example")
    assert status == 200
    assert headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert json.loads(body)["data"]["name"] == "Alice"
    # The operator changes a token while it is served.
    run("update", 1, "--disable")
    assert get(url, "/quota", Authorization=f"Bearer {key}")[0] == 401
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert "Traceback" not in log.read_text()


def test_serve_alone_serves_only_the_endpoint_and_logs_no_key(start, db):
    run("create")
    process, match, log = start("serve", "--port", "0", "--no-cors", ready=URL)
    status, headers, _ = get(match[1], "/api/usage/token?key=sk-canary", Authorization="Bearer sk-canary")
    assert status == 401
    assert not [name for name in headers if name.startswith("Access-Control")]
    assert get(match[1], "/other?key=sk-canary")[0] == 404
    with socket.create_connection(match[1].removeprefix("http://").split(":")) as connection:
        connection.sendall(b"Authorization: Bearer sk-canary\r\n\r\n")
        while connection.recv(1000):
            pass
    process.terminate()
    assert process.wait(10) == 0
    assert '127.0.0.1 "GET /api/usage/token" 401' in log.read_text()
    assert '127.0.0.1 "GET /other" 404' in log.read_text()
    assert "canary" not in log.read_text()


def test_serve_throttles_whoever_guesses_keys(start, db):
    key = run("create")[0].strip()
    _, match, log = start("serve", "--port", "0", "--throttle", "3 per 30 days", ready=URL)
    guesses = [get(match[1], Authorization="Bearer sk-canary") for _ in range(5)]
    assert [status for status, _, _ in guesses] == [401, 401, 401, 429, 429]
    assert 0 < int(guesses[-1][1]["Retry-After"]) <= 30 * 24 * 3600
    assert get(match[1], Authorization=f"Bearer {key}")[0] == 200
    assert "canary" not in log.read_text()


def test_serve_names_the_extra_that_a_limit_needs(db, monkeypatch):
    run("create")
    monkeypatch.setitem(sys.modules, "limits", None)
    _, err = run("serve", "--throttle", "3 per minute", status=2)
    assert err == "Error: throttle needs the package limits: pip install 'usage-middleware[throttle]'\n"


def test_a_port_that_is_taken(db):
    run("create")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        _, err = run("serve", "--port", taken.getsockname()[1], status=2)
    assert err.startswith("Error: cannot listen on 127.0.0.1 port")
    assert err.count("\n") == 1
