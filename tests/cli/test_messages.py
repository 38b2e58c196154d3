"""An error message names what was typed, and what to do."""

import ast
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command import run

import usage_middleware
from usage_middleware import SQLiteTokenStore

ROOM = Path(usage_middleware.__file__).parent / "cli"
WITHOUT_SQLALCHEMY = "import sys; sys.modules['sqlalchemy'] = None; from usage_middleware.cli import main; main()"


def without_sqlalchemy(*args):
    return subprocess.run([sys.executable, "-c", WITHOUT_SQLALCHEMY, *args], capture_output=True, text=True).stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://host", "there is no store for redis://; a store is named by the path of a file, sqlite:///, "),
        (
            "postgresql://host/name",
            "SQLAlchemyTokenStore needs SQLAlchemy: pip install sqlalchemy 'psycopg[binary]' 'pymysql[rsa]'\n",
        ),
        (
            "new-api+postgresql://host/name",
            "NewAPITokenStore needs SQLAlchemy: pip install sqlalchemy 'psycopg[binary]' 'pymysql[rsa]'\n",
        ),
    ],
)
def test_without_sqlalchemy_each_url_has_its_own_message(url, message):
    for words in (["list", "--db", url], ["serve", "--db", url]):
        assert without_sqlalchemy(*words).startswith(f"Error: {message}")
    assert message in without_sqlalchemy("import", "--db", "x.db", url)


def test_a_key_with_a_space_is_refused(db):
    assert run("create", "--key", "a b", status=2)[1] == (
        "Error: a key must be 1 to 512 visible ASCII characters without a comma or a space, with or without 'sk-' in "
        "front\n"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("disk-3.db", "disk-3.db"),
        ("task-7", "task-7"),
        ("sk-canary", "sk-…"),
        ("x:sk-canary,y", "x:sk-…"),
        ("'sk-' in front", "'sk-' in front"),
        ("without sk-, in hexadecimal", "without sk-, in hexadecimal"),
        ("sk-sk-canary", "sk-…"),
        ("SK: sk-!!canary", "SK: sk-…"),
        ("_sk-canary 1sk-canary", "_sk-… 1sk-…"),
    ],
)
def test_only_keys_are_taken_out_of_a_message(text, shown):
    from usage_middleware.cli.formats import without_keys

    assert without_keys(text) == shown


def test_update_without_an_option_names_one(db):
    run("create")
    assert run("update", 1, status=2)[1] == (
        "Error: nothing to change; add an option such as --name NEW; 'usage-middleware update --help' lists all of "
        "them\n"
    )


def test_a_port_in_use_is_named_once(db):
    run("create")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _, err = run("serve", "--port", port, status=2)
    assert err == (
        f"Error: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another with --port or --host\n"
    )


def test_an_unknown_host_is_named_without_an_errno(db):
    run("create")
    _, err = run("serve", "--port", 0, "--host", "no.such.host.invalid", status=2)
    assert err.startswith("Error: cannot listen on no.such.host.invalid port 0: ")
    assert "[Errno" not in err


def test_an_imported_token_was_not_created_never(db):
    db.with_name("t.csv").write_text("key\nthe-key-of-a-holder\n")
    run("import", "t.csv")
    assert "never" not in [line.split()[1] for line in run("show", 1)[0].splitlines() if line.startswith("Created")]


def test_a_directory_is_not_a_database(db, tmp_path):
    for words in (["list"], ["create"], ["serve"]):
        assert "is a directory; name a file in it" in run(*words, "--db", tmp_path, status=2)[1]


@pytest.mark.parametrize("length", [1, 15])
def test_a_short_key_is_refused(db, length):
    for key in ("k" * length, "sk-" + "k" * length, "sk-sk-" + "k" * length):
        _, err = run("create", "--key", key, status=2)
        assert "a key must have at least 16 characters beside its prefix: anyone who reads the database can find" in err
    assert not db.exists()
    assert run("create", "--key", "k" * 16)[0] == "sk-" + "k" * 16 + "\n"


def test_an_import_of_short_keys_warns(db):
    db.with_name("t.csv").write_text("key,name\nthe-key-of-a-holder,a\nshort-key,b\nsk-sk-short,c\n")
    for option, verb in ((["--dry-run"], "would be imported"), ([], "imported")):
        assert run("import", *option, "t.csv")[1] == (
            f"3 {verb}, 0 already there, 0 bad.\n"
            "Warning: 2 keys have fewer than 16 characters (the first on line 3). Anyone who reads the database can "
            "find such a key by trying all of them; 'usage-middleware rotate' gives a token a long one.\n"
        )
    db.with_name("t.jsonl").write_text('{"key": "short"}')
    assert "Warning: 1 key has fewer than 16 characters (the first on line 1)." in run("import", "t.jsonl")[1]
    with SQLiteTokenStore(db, read_only=True) as store:
        assert [token.hint for token in store.tokens()] == ["", "", ""]


# --- Every sentence


def sentences():
    """Yield every string of the command's source that has a space in it, and where it is."""
    for path in sorted(ROOM.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield f"{path.relative_to(ROOM)}:{node.lineno}", node.value


STUMBLES = re.compile(
    r"\b(anew|nobody|somebody|for want of|an URL|(?<!here )is no|(?<!here )are no|gives? up|leaves? word)\b",
    re.IGNORECASE,
)


def test_no_sentence_has_a_word_that_a_reader_stumbles_over():
    assert [(place, text) for place, text in sentences() if STUMBLES.search(text)] == []


def test_no_sentence_advises_what_is_not_published():
    assert [(place, text) for place, text in sentences() if "usage-middleware[" in text] == []
