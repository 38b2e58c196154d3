"""A command prints what it has committed. If it cannot, or if the outcome is unknown, its error says what to do."""

import json
import os
import re
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from command import KEY, SCRIPT, run, run_json

from usage_middleware import SQLiteTokenStore
from usage_middleware.cli import printing

# Two stores over an SQLite file, as another package may provide them. Lossy removes the file "lossy" if there is one,
# and raises an error after it has committed. WriteOnly cannot be read any more once it was written.
STORES = """
from pathlib import Path
from usage_middleware import SQLiteTokenStore, StoreError

class Lossy(SQLiteTokenStore):
    def _transact(self, work):
        result = super()._transact(work)
        if Path("lossy").exists():
            Path("lossy").unlink()
            raise StoreError("the connection was lost during COMMIT, and the outcome is unknown")
        return result

class WriteOnly(SQLiteTokenStore):
    is_written = False

    def _transact(self, work):
        result = super()._transact(work)
        self.is_written = True
        return result

def _until_written(name):
    def method(self, *args):
        if self.is_written:
            raise StoreError("cannot be read any more")
        return getattr(SQLiteTokenStore, name)(self, *args)
    return method

for name in ("_get", "_get_by_id", "_page", "_records", "_model_usage"):
    setattr(WriteOnly, name, _until_written(name))

def lossy(url, *, read_only=False):
    return Lossy(url.partition("://")[2], read_only=read_only)

def write_only(url, *, read_only=False):
    return WriteOnly(url.partition("://")[2], read_only=read_only)
"""


@pytest.fixture
def brought(tmp_path, db, monkeypatch):
    """Install those stores for the processes that a test starts. Return the key of a token."""
    site = tmp_path / "site"
    installed = site / "lossy_stores-1.0.dist-info"
    installed.mkdir(parents=True)
    (site / "lossy_stores.py").write_text(STORES)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: lossy-stores\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[usage_middleware.stores]\nlossy = lossy_stores:lossy\nwriteonly = lossy_stores:write_only\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    with SQLiteTokenStore(db) as store:
        key, _ = store.create(total_available=1000, name="Alice")
        store.charge(key, 100)
        store.reserve(key, 50)
    return key


def script(*args, status=0, **options):
    done = subprocess.run(
        [SCRIPT, *map(str, args)], **{"capture_output": True, "text": True, "check": False, **options}
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in (done.stderr or "")
    return done.stdout, done.stderr


def operations(db, kind):
    with SQLiteTokenStore(db, read_only=True) as store:
        return [operation.id for operation in store.history(1) if operation.kind == kind]


def used(db):
    with SQLiteTokenStore(db, read_only=True) as store:
        return store.get_by_id(1).total_used


# --- The outcome is unknown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["charge", "1", "5"], "charge"),
        (["charge", "1", "5", "--model", "a model", "--input-tokens", "3"], "charge"),
        (["charge", "KEY", "5"], "charge"),
        (["grant", "1", "5"], "grant"),
        (["grant", "1", "-5"], "grant"),
        (["refund", "CHARGE", "5"], "refund"),
        (["refund", "CHARGE"], "refund"),
        (["settle", "RESERVATION", "70"], None),
    ],
    ids=str,
)
def test_the_printed_command_takes_effect_once(db, brought, words, kind):
    names = {
        "KEY": brought,
        "CHARGE": operations(db, "charge")[-1],
        "RESERVATION": operations(db, "reserve")[-1],
    }
    before = len(operations(db, kind))
    Path("lossy").touch()
    out, err = script("--db", f"lossy://{db}", *(names.get(word, word) for word in words), status=2)
    assert out == ""
    assert "the outcome is unknown" in err
    assert brought[3:] not in err
    (repeat,) = re.findall(r"only once, run: (.*)\n", err)
    assert shlex.split(repeat)[0] == SCRIPT
    after = used(db)
    done = subprocess.run(
        repeat.replace("KEY", brought), shell=True, cwd="/", capture_output=True, text=True, check=True
    )
    assert "Alice" in done.stdout
    assert used(db) == after
    assert len(operations(db, kind)) == before + (1 if kind else 0)


def test_the_printed_command_repeats_the_given_idempotency_key(db, brought):
    Path("lossy").touch()
    _, err = script("--db", f"lossy://{db}", "charge", 1, 5, "--idempotency-key", "an order's", status=2)
    assert "--idempotency-key 'an order'\"'\"'s'" in err


@pytest.mark.parametrize(
    ("database", "shown"),
    [
        ("tokens.db", "--db {here}/tokens.db"),
        ("/srv/some tokens.db", "--db '/srv/some tokens.db'"),
        ("shelf://tokens.db", "--db shelf://tokens.db"),
        ("postgresql://user:canary@host/name", "--db DATABASE"),
        ("postgresql://host/name?password=canary", "--db DATABASE"),
    ],
)
def test_the_printed_command_names_the_database_for_any_directory(tmp_path, monkeypatch, database, shown):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("usage_middleware.cli.printing.typed_database", lambda: database)
    assert printing.command("grant", 1, -5) == f"usage-middleware grant 1 -5 {shown.format(here=tmp_path)}"


def test_the_printed_command_leaves_out_a_database_of_the_environment(db, brought, monkeypatch):
    monkeypatch.setenv("USAGE_MIDDLEWARE_DB", f"lossy://{db}")
    Path("lossy").touch()
    _, err = script("charge", 1, 5, status=2)
    assert "--db" not in err


def test_a_password_is_not_printed(db, brought):
    _, err = script("--db", "postgresql://user:canary@127.0.0.1:1/name", "grant", 1, 5, status=2)
    assert "canary" not in err


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["create"], "If 'usage-middleware list' shows the token anyway, delete it: its key is lost"),
        (["rotate", "1"], "run the same command again: only the newest works"),
        (["update", "1", "--name", "New"], "run the same command again"),
        (["delete", "1", "--yes"], "Run the same command again, until it says that there is no token 1"),
    ],
)
def test_a_call_without_an_idempotency_key_says_how_to_make_sure(db, brought, words, advice):
    Path("lossy").touch()
    out, err = script("--db", f"lossy://{db}", *words, status=2)
    assert out == ""
    assert "the outcome is unknown" in err
    assert advice in err


# --- Nothing can be read any more


@pytest.mark.slow
def test_results_are_printed_without_reading_the_database_again(db, brought):
    database = f"writeonly://{db}"
    assert KEY.fullmatch(script("create", "--db", database)[0].strip())
    assert json.loads(script("grant", "--db", database, 1, 5, "--json")[0])["total_granted"] == 1005
    assert json.loads(script("charge", "--db", database, 1, 5, "--json")[0])["total_used"] == 155
    assert json.loads(script("refund", "--db", database, operations(db, "charge")[-1], "--json")[0])["total_used"] == 55
    settled = script("settle", "--db", database, operations(db, "reserve")[-1], 0, "--json")[0]
    assert json.loads(settled)["total_used"] == 5
    assert json.loads(script("update", "--db", database, 1, "--name", "New", "--json")[0])["name"] == "New"
    new = json.loads(script("rotate", "--db", database, 1, "--json")[0])
    assert (new["id"], new["name"], new["hint"]) == (1, "New", new["key"][-4:])
    with SQLiteTokenStore(db, read_only=True) as store:
        assert store.get(new["key"]).hint == new["hint"]


# --- Standard output cannot be written

WITHOUT_OUTPUT = [
    (["list"], ""),
    (["list", "--json"], ""),
    (["show", "1"], ""),
    (["history", "1"], ""),
    (["usage", "1"], ""),
    (["check"], ""),
    (["export"], ""),
    (["--help"], ""),
    (["charge", "--help"], ""),
    (["--version"], ""),
    (["create"], "token 2 was created; 'usage-middleware rotate 2' gives it a new key"),
    (["create", "--json"], "token 2 was created"),
    (["rotate", "1"], "token 1 has a new key, which is lost; run the same command again for another"),
    (["update", "1", "--name", "New"], "token 1 was changed"),
    (["grant", "1", "7"], "7 quota units were granted to token 1, with the idempotency key "),
    (["charge", "1", "7", "--json"], "7 quota units were charged to token 1, with the idempotency key "),
    (["refund", "CHARGE", "7"], "operation CHARGE was refunded: 7 quota units, with the idempotency key "),
    (["settle", "RESERVATION", "7"], "operation RESERVATION was settled with 7 quota units"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "says"), WITHOUT_OUTPUT, ids=[" ".join(words) for words, _ in WITHOUT_OUTPUT])
def test_a_full_disk_is_one_line_that_says_what_was_committed(db, brought, words, says):
    names = {"CHARGE": operations(db, "charge")[-1], "RESERVATION": operations(db, "reserve")[-1]}
    for name, identifier in names.items():
        says = says.replace(name, identifier)
    with open("/dev/full", "w") as full:
        _, err = script(
            *(names.get(word, word) for word in words),
            status=2,
            stdout=full,
            capture_output=False,
            stderr=subprocess.PIPE,
        )
    assert err.count("\n") == 1
    assert "cannot write" in err
    assert "No space left on device" in err
    assert says in err
    assert not KEY.search(err)


def test_the_idempotency_key_in_the_error_repeats_the_charge(db, brought):
    with open("/dev/full", "w") as full:
        _, err = script("charge", "1", "7", status=2, stdout=full, capture_output=False, stderr=subprocess.PIPE)
    before = used(db)
    run("charge", 1, 7, "--idempotency-key", re.search("command-[0-9a-f]{32}", err)[0])
    assert used(db) == before


def test_standard_error_may_be_full_too(db, brought):
    with open("/dev/full", "w") as full:
        for args in (["create"], ["list"], ["show", "7"]):
            done = subprocess.run([SCRIPT, *args], stdout=full, stderr=full, timeout=30)
            assert done.returncode == 2


@pytest.mark.parametrize("words", [["list"], ["--help"], ["history", "1", "--json"], ["export"]])
def test_a_closed_pipe_ends_a_command_quietly(db, brought, words):
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = subprocess.run([SCRIPT, *words], stdout=theirs, stderr=subprocess.PIPE, text=True)
    finally:
        with suppress(OSError):
            os.close(theirs)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_closed_pipe_is_an_error_if_a_new_key_is_lost(db, brought):
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = subprocess.run([SCRIPT, "rotate", "1"], stdout=theirs, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(theirs)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: cannot write to standard output: Broken pipe; but token 1 has a new key")


# --- What is not text


def test_a_key_on_standard_input_that_is_not_text_is_one_line(db, brought):
    for words in (["create", "--key", "-"], ["charge", "-", "5"]):
        done = subprocess.run(
            [SCRIPT, *words],
            input=b"\xff\xfe\n",
            capture_output=True,
            env={**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"},
        )
        assert done.returncode == 2
        assert done.stderr == b"Error: standard input must be a key, but it is not text\n"


def test_large_numbers_are_exact_in_json(db):
    run("create", "--quota", 2**63 - 1)
    assert run_json("list")[0]["total_available"] == 2**63 - 1


def test_a_key_that_cannot_be_printed_as_standard_output_is_closed(db):
    command = f"{shlex.quote(SCRIPT)} create --db {shlex.quote(str(db))} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "cannot write to standard output" in done.stderr
    assert "token 1" in done.stderr  # it was made, and can be deleted
    assert "Traceback" not in done.stderr
