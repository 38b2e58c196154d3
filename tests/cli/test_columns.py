"""No field of a token is left out anywhere: each place is tested with each field of the dataclass."""

import dataclasses
import io
from datetime import date

import pytest
from command import NOW, run, run_json

from usage_middleware import Operation, SQLiteTokenStore, Token
from usage_middleware.cli.formats import as_object, describe, operation_as_object
from usage_middleware.cli.transfer.fields import EXPORTED, FROM_JSON, FROM_TEXT
from usage_middleware.cli.transfer.records import read_csv, read_json_lines, write_csv, write_json_lines
from usage_middleware.tokens import TokenRecord
from usage_middleware.usage import DayUsage

FIELDS = [field.name for field in dataclasses.fields(Token)]
OF_RECORD = [field.name for field in dataclasses.fields(TokenRecord) if field.name not in ("token", "digest")]
# Fields that are not copied to another store, which has ids and reservations of its own.
STAYS = {"id", "held"}

# An ordinary token, and how to make one that differs from it in one field only.
PLAIN = Token(
    id=1,
    name="Alice",
    total_available=900,
    total_used=100,
    hint="0001",
    renewal="daily",
    renewal_quota=1000,
    renews_at=NOW,
)
OTHER = {
    str: lambda name, value: {"renewal": "weekly"}.get(name, f"{value[1:]}x"),
    int: lambda name, value: value + 86400,
    bool: lambda name, value: not value,
    type(None): lambda name, value: 7,
    dict: lambda name, value: {"gpt-4o": 5},
}


def changed(name):
    value = getattr(PLAIN, name)
    return dataclasses.replace(PLAIN, **{name: OTHER[type(value)](name, value)})


@pytest.mark.parametrize("name", FIELDS)
def test_json_has_every_field(name):
    assert as_object(PLAIN)[name] != as_object(changed(name))[name]


@pytest.mark.parametrize("name", FIELDS)
def test_show_shows_every_field(name):
    assert list(describe(PLAIN, NOW)) != list(describe(changed(name), NOW))


@pytest.mark.parametrize(("write", "read"), [(write_csv, read_csv), (write_json_lines, read_json_lines)])
@pytest.mark.parametrize("name", FIELDS)
def test_export_and_import_carry_every_field(name, write, read):
    written = TokenRecord(token=changed(name), digest=bytes(32))
    (row,) = read(io.StringIO("".join(write([written])), newline=""), NOW)
    expected = PLAIN if name in STAYS else written.token
    assert row.content.token == dataclasses.replace(expected, id=None, held=0)


@pytest.mark.parametrize(("write", "read"), [(write_csv, read_csv), (write_json_lines, read_json_lines)])
@pytest.mark.parametrize("name", OF_RECORD)
def test_export_and_import_carry_every_field_of_a_record(name, write, read):
    values = {
        "model_usage": {"gpt-4o": 5},
        "days": (DayUsage(date(2026, 11, 24), "gpt-4o", *range(1, len(DayUsage._fields) - 1)),),
    }
    written = TokenRecord(token=PLAIN, digest=bytes(32), **{name: values[name]})
    (row,) = read(io.StringIO("".join(write([written])), newline=""), NOW)
    assert getattr(row.content, name) == values[name]


def test_every_list_of_fields_is_complete():
    fields = {*FIELDS, *OF_RECORD, "digest"} - {"held"}
    assert set(EXPORTED) == fields
    assert set(FROM_TEXT) == set(FROM_JSON) == fields | {"key", "total_granted"}
    assert set(as_object(PLAIN)) == {*FIELDS, "total_granted"}
    assert set(operation_as_object(Operation(id="x", token_id=1, kind="charge", amount=1))) == {
        field.name for field in dataclasses.fields(Operation)
    }


def test_every_command_that_prints_a_token_prints_all_of_it(db):
    with SQLiteTokenStore(db) as store:
        key, token = store.create(total_available=1000)
        reservation = store.reserve(key, 5)
        store.charge(key, 5)
        charge = next(store.history(token.id))
    expected = {*FIELDS, "total_granted"}
    assert set(run_json("list")[0]) == expected
    assert set(run_json("show", 1)) == {*expected, "model_usage"}
    assert set(run_json("update", 1, "--name", "New")) == {*expected, "model_usage"}
    assert set(run_json("rotate", 1)) == {*expected, "key"} == set(run_json("create"))
    assert set(run_json("settle", reservation.id, 5)) == expected
    for words in (["charge", 1, 5], ["grant", 1, 5], ["refund", charge.id]):
        assert set(run_json(*words)) == {*expected, "idempotency_key"}


def test_import_lists_the_fields_that_it_takes(db):
    shown = run("import", "--help")[0]
    for name in FROM_TEXT:
        assert name in shown
