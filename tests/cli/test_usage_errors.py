"""Which database a command uses, its errors for wrong input, and its help."""

import pytest
from command import run, run_json
from places import ROOT

from usage_middleware.cli import commands

# --- Which database


def test_the_database_may_be_named_on_either_side_and_overrides_the_environment(db, tmp_path):
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
    (["create"], "--expires soon", "'soon' is not a time; write 30d"),
    (["create"], "--expires 30", "'30' is not a time; write 30d"),
    (["create"], "--model-limit a=b", "MODEL=QUOTA"),
    (["create"], "--model-limit a=-1", "must not be negative"),
    (["create"], "--model-limit =1", "must be a name"),
    (["create"], "--key canary,key", "a key must be"),
    (["create"], "--key canary-key-of-its-holder-0001", "in use"),
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
    (["prune"], "--before soon", "'soon' is not a time"),
    (["list"], "--db .", "is a directory"),
    (["create"], "--db missing/tokens.db", "there is no directory"),
    (["list"], "--db text", "not an SQLite database"),
    (["serve"], "--app wsgi", "module:attribute"),
    (["serve"], "--app no_such_module:application", "No module named 'no_such_module'"),
    (["serve"], "--app json:no_such_attribute", "cannot import json:no_such_attribute"),
    (["serve"], "--app json:__name__", "not a WSGI application"),
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
    (tmp_path / "text").write_text("not a database, but long enough to be read as the header of one" * 20)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    run("create", "--key", "canary-key-of-its-holder-0001")
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


def test_without_a_command_the_help_is_printed():
    out, err = run()
    assert "usage-middleware demo" in out
    assert err == ""


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_every_command_and_every_option_has_a_help_text(name):
    command = commands.commands[name]
    assert command.help
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name
    assert run(name, "--help")[0].startswith(f"Usage: usage-middleware {name} ")


def test_the_documentation_that_the_readme_links_has_every_command(readme):
    assert "(docs/command.md)" in readme
    page = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
    for name in commands.commands:
        assert f"## `{name}`\n" in page
