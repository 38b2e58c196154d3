"""How one row of a file of tokens is read."""

import io
import json
import re
import sys

import pytest
from transferring import DIGEST, KEY, MOST, NOW

from usage_middleware.cli.transfer.records import read_csv, read_json_lines
from usage_middleware.keys import key_digest

# --- One row


def read_cell(**cells):
    """Return the record of one CSV row, or raise the reason why it is bad."""
    row = ",".join('"' + text.replace('"', '""') + '"' for text in cells.values())
    text = ",".join(cells) + "\n" + row + "\n"
    ((_, record, _),) = read_csv(io.StringIO(text, newline=""), NOW)
    if isinstance(record, Exception):
        raise record
    return record


def read_object(**fields):
    """Return the record of one JSON line, or raise the reason why it is bad."""
    ((_, record, _),) = read_json_lines([json.dumps(fields) + "\n"], NOW)
    if isinstance(record, Exception):
        raise record
    return record


CELLS = [
    ("total_available", "-5", -5),
    ("total_available", str(MOST), MOST),
    ("total_used", "7", 7),
    ("name", 'caf\u00e9, "令牌"\n', 'caf\u00e9, "令牌"\n'),
    ("name", " ", " "),
    ("unlimited_quota", "yes", True),
    ("unlimited_quota", "NO", False),
    ("enabled", "0", False),
    ("enabled", "True", True),
    ("model_limits_enabled", "1", True),
    ("model_limits", "gpt-4o, gpt-4o-mini", {"gpt-4o": True, "gpt-4o-mini": True}),
    ("model_limits", '{"gpt-4o": 5, "any": true}', {"gpt-4o": 5, "any": True}),
    ("expires_at", "1893456000", 1893456000),
    ("expires_at", "5", 5),
    ("expires_at", str(MOST), MOST),
    ("expires_at", "2030-01-01", 1893456000),
    ("expires_at", "30d", NOW + 30 * 86400),
    ("expires_at", "never", 0),
    ("expires_at", "-1", -1),
    ("created_at", "2027-01-15 08:00", NOW),
    ("hint", "wxyz", "wxyz"),
    ("hint", "", "0001"),
]


@pytest.mark.parametrize(("field", "text", "value"), CELLS)
def test_what_a_cell_of_csv_means(field, text, value):
    assert getattr(read_cell(key=KEY, **{field: text}).token, field) == value


OBJECTS = [
    ("total_available", -5, -5),
    ("name", "令牌", "令牌"),
    ("unlimited_quota", True, True),
    ("model_limits", {"gpt-4o": 5, "any": True}, {"gpt-4o": 5, "any": True}),
    ("expires_at", 5, 5),
    ("expires_at", "2030-01-01", 1893456000),
    ("total_used", None, 0),
    ("enabled", None, True),
]


@pytest.mark.parametrize(("field", "given", "value"), OBJECTS)
def test_what_a_field_of_json_means(field, given, value):
    assert getattr(read_object(key=KEY, **{field: given}).token, field) == value


@pytest.mark.parametrize("read", [read_cell, read_object])
def test_a_key_and_its_digest_make_the_same_record(read):
    expected = read(key=KEY)
    assert expected.digest == key_digest(KEY)
    assert expected.token.hint == "0001"
    assert read(key=f"sk-{KEY}") == expected
    assert read(key=KEY, digest=DIGEST.upper()) == expected
    assert read(digest=DIGEST, hint="0001") == expected
    assert read(digest=DIGEST).token.hint == ""
    assert DIGEST not in repr(expected)


def test_limits_are_enabled_if_they_are_given():
    assert read_cell(key=KEY, model_limits="a").token.model_limits_enabled
    assert not read_cell(key=KEY, model_limits="a", model_limits_enabled="no").token.model_limits_enabled
    assert not read_cell(key=KEY, model_limits="").token.model_limits_enabled
    assert read_cell(key=KEY, model_limits="", model_limits_enabled="yes").token.model_limits_enabled


def test_total_granted_gives_total_available_or_must_agree_with_it():
    assert read_cell(key=KEY, total_granted="100", total_used="30").token.total_available == 70
    assert read_cell(key=KEY, total_granted="100", total_used="130").token.total_available == -30
    assert read_object(key=KEY, total_granted=100, total_used=30, total_available=70).token.total_granted == 100
    with pytest.raises(ValueError, match="total_granted is not the sum"):
        read_object(key=KEY, total_granted=100, total_used=30, total_available=100)


def test_the_id_in_another_store_is_ignored():
    assert read_cell(key=KEY, id="what ever").token.id is None
    assert read_object(key=KEY, id=[5]).token.id is None


BAD_CELLS = [
    *(
        (field, text, "whole number")
        for field in ("total_available", "total_used", "total_granted")
        for text in ("1.0", "1e6", "1,000", "1_000", " 1", "+1", "0x1", "\u0661", "many", "1" * 20, "1" * 5000, "5\0")
    ),
    ("total_available", str(MOST + 1), "2**63"),
    ("total_used", "-1", "negative"),
    ("name", "a\0b", "name"),
    ("name", "\udcff", "name is not UTF-8"),
    ("enabled", "on", "enabled must be true or false"),
    ("unlimited_quota", "2", "unlimited_quota must be true or false"),
    ("model_limits", "a,,b", "model_limits must not have a model without a name"),
    ("model_limits", "{", "model_limits is not JSON"),
    ("model_limits", '{"a": 1.5}', "model_limits must have 0 to"),
    ("model_limits", '{"a": -1}', "model_limits must have 0 to"),
    ("model_limits", '{"a": false}', "model_limits must have 0 to"),
    ("model_limits", '{"a": 9223372036854775808}', "model_limits must have 0 to"),
    ("model_usage", "a", "model_usage is not JSON"),
    ("model_usage", "[]", "model_usage must be a JSON object"),
    ("model_usage", '{"a": true}', "model_usage must have 0 to"),
    ("model_usage", json.dumps({"canary" * 50: 1}), "model_usage must be 1 to 255"),
    ("expires_at", "soon", "expires_at must be Unix seconds"),
    ("expires_at", str(MOST + 1), "expires_at must be"),
    ("created_at", "1.5", "created_at must be Unix seconds"),
    ("hint", "12345", "hint"),
    ("digest", DIGEST[:-1], "digest must be"),
    ("digest", DIGEST[:-1] + "g", "digest must be"),
    ("digest", "0" * 64, "digest is not that of key"),
    ("key", "", "needs a key or a digest"),
    ("key", "canary, key", "key must be"),
    ("key", "canary\0key", "key must be"),
    ("key", "sk-", "key must be"),
]


@pytest.mark.parametrize(("field", "text", "reason"), BAD_CELLS)
def test_a_bad_cell_is_named_and_not_shown(field, text, reason):
    if sys.version_info < (3, 11) and "\0" in text:
        reason = "NUL"  # the message of the csv module
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        read_cell(**{"key": KEY, "enabled": "no", field: text})
    assert "canary" not in str(caught.value)
    assert field in str(caught.value) or "\0" in text
    # The text of a cell may be a key in the wrong column.
    with pytest.raises(ValueError, match=field if sys.version_info >= (3, 11) else "NUL") as caught:
        read_cell(**{"key": "other-key", field: "sk-canary, canary canary canary canary canary\0"})
    assert "canary" not in str(caught.value)


BAD_OBJECTS = [
    *(
        (field, value, "whole number")
        for field in ("total_available", "total_used", "total_granted")
        for value in (1.0, True, "1", [1], {})
    ),
    *(
        (field, value, "true or false")
        for field in ("unlimited_quota", "model_limits_enabled", "enabled")
        for value in (1, 0, "true", [])
    ),
    *((field, 5, "text") for field in ("name", "hint")),
    ("name", "\ud800", "name is not UTF-8"),
    ("model_limits", ["a"], "model_limits must be a JSON object"),
    ("model_limits", "a", "model_limits must be a JSON object"),
    ("model_limits", {"\ud800": 1}, "model_limits is not UTF-8"),
    ("model_usage", {"": 1}, "model_usage must not have a model without a name"),
    ("expires_at", 1.5, "expires_at must be a whole number"),
    ("expires_at", True, "expires_at must be a whole number"),
    ("total_used", -1, "total_used must not be negative"),
    ("total_available", 10**30, "2**63"),
    ("key", 5, "key must be a str"),
    ("digest", 5, "digest must be"),
    ("total_avilable", 5, "unknown field 'total_avilable'"),
]


@pytest.mark.parametrize(("field", "value", "reason"), BAD_OBJECTS)
def test_a_bad_field_of_json_is_named(field, value, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        read_object(**{"key": KEY, field: value})
    assert field in str(caught.value)
    assert "canary" not in str(caught.value)


BAD_LINES = [
    ("{", "not JSON"),
    ("canary", "not JSON"),
    ('{"key": "canary"} x', "not JSON"),
    ("5", "JSON object"),
    ("null", "JSON object"),
    ('["canary"]', "JSON object"),
    ("[" * 200_000, "nested too deeply"),
    ('{"key": "k", "name": ' + "[" * 200_000, "nested too deeply"),
    ('{"key": "k", "total_used": ' + "1" * 5000 + "}", ""),
    ('{"sk-canary": {"total_used": 5}}', "needs a key or a digest"),
    ("{}", "needs a key or a digest"),
    ('{"key": null}', "needs a key or a digest"),
    ('{"key": "k", "name": "\udcff"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), [pytest.param(*case, id=case[0][:30]) for case in BAD_LINES])
def test_a_line_that_is_not_a_token_is_a_bad_row(line, reason):
    rows = list(read_json_lines(['{"key": "one"}\n', line + "\n", "\n", '{"key": "two"}'], NOW))
    assert [number for number, _, _ in rows] == [1, 2, 4]
    assert isinstance(rows[1][1], ValueError)
    assert reason in str(rows[1][1])
    assert "canary" not in str(rows[1][1])
