"""Commands that are stopped by a signal, and one whose server dies while it commits."""

import os
import re
import shlex
import signal
import subprocess

import pytest
from command import SCRIPT, run, run_json
from sql_faults import DIE, failing

STOPPED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@pytest.fixture
def stopped_at(tmp_path):
    """Run the script, send it a signal at an audit event, and return its standard error."""
    hook = tmp_path / "hook"
    hook.mkdir()

    def run(number, event, argument, *words):
        (hook / "sitecustomize.py").write_text(AT_ONCE.format(event=event, argument=argument, number=int(number)))
        done = subprocess.run(
            [SCRIPT, *map(str, words)],
            input="key\nthe-key-of-a-holder\n",
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, "PYTHONPATH": str(hook)},
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    return run


AT_ONCE = """
import os, sys

def stop(event, arguments):
    global sent
    if event == {event!r} and not sent and {argument!r} in str(arguments):
        sent = True
        os.kill(os.getpid(), {number})

sent = False
sys.addaudithook(stop)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPPED, ids=lambda number: number.name)
def test_a_stopped_charge_prints_a_command_that_makes_sure(db, stopped_at, number):
    run("create", "--quota", 100)
    err = stopped_at(number, "sqlite3.connect", "mode=rw", "charge", 1, 5)
    (repeat,) = re.findall(r"^Error: stopped\. To make sure that it is done, and only once, run: (.*)\n$", err)
    for _ in range(2):
        subprocess.run(repeat, shell=True, check=True, capture_output=True)
        assert run_json("show", 1)["total_used"] == 5


@pytest.mark.parametrize("number", STOPPED, ids=lambda number: number.name)
@pytest.mark.parametrize(("event", "argument"), [("open", ".out.csv."), ("os.rename", "out.csv")])
def test_an_export_that_is_stopped_leaves_a_whole_file_or_none(db, stopped_at, number, event, argument):
    run("create")
    assert "stopped" in stopped_at(number, event, argument, "export", "--output", "out.csv")
    left = list(db.parent.glob("*out.csv*"))
    assert left in ([], [db.parent / "out.csv"])
    assert all(path.read_text().count("\n") == 2 for path in left)


@pytest.mark.parametrize("number", STOPPED, ids=lambda number: number.name)
def test_a_dry_run_that_is_stopped_leaves_no_folder(db, stopped_at, tmp_path, monkeypatch, number):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    err = stopped_at(number, "sqlite3.connect", "mode=rw", "import", "--dry-run", "--format", "csv", "-")
    assert err.endswith("Error: stopped; run the same command again to continue\n")
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("number", STOPPED, ids=lambda number: number.name)
def test_an_import_that_is_stopped_while_it_writes_says_what_is_uncertain(db, stopped_at, number):
    db.with_name("in.csv").write_text("key\nthe-key-of-holder-one\n")
    err = stopped_at(number, "sqlite3.connect", "mode=rw", "import", "in.csv")
    told, stopped = err.splitlines()[-2:]
    assert told == "0 imported, 0 already there, 0 bad."
    assert stopped == "Error: stopped; 1 more may have been imported; run the same command again to continue"


@pytest.mark.servers
def test_after_a_server_dies_in_commit_the_printed_command_charges_once(database, monkeypatch):
    """Only PostgreSQL has triggers that run at the end of a transaction."""
    if database.is_mysql:
        pytest.skip("MySQL has no deferred triggers")
    monkeypatch.setenv("USAGE_MIDDLEWARE_DB", database.url)
    run("create", "--quota", 100)
    token_id = run_json("list")[0]["id"]
    with failing(database, DIE, 1, deferred=True):
        _, err = run("charge", token_id, 5, status=2)
        repeat = shlex.split(re.findall(r"To make sure that it is done, and only once, run: (.*)\n", err)[0])
        assert run_json("show", token_id)["total_used"] == 0
        for _ in range(2):
            run(*repeat[1:])
    assert run_json("show", token_id)["total_used"] == 5
