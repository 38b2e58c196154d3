"""Tokens, their form on the wire, and making and hashing keys."""

import copy
import dataclasses
import enum
import hashlib
import json
import pickle
import re
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from usage_middleware import Token
from usage_middleware.keys import check_key, key_digest, key_hint, make_key, strip_prefix, with_prefix
from usage_middleware.stores import rows
from usage_middleware.tokens import encode_model_limits, wire_form

FULL = {
    "name": "Default Token",
    "total_available": 987655,
    "total_used": 12345,
    "unlimited_quota": True,
    "model_limits": {"gpt-4o": True, "gpt-4o-mini": 500_000},
    "model_limits_enabled": True,
    "expires_at": 1893456000,
    "enabled": False,
    "id": 7,
    "hint": "wxyz",
    "created_at": 1700000000,
}


# A slow machine is not an error.
patiently = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Name(str):
    __slots__ = ()


class Model(str, enum.Enum):
    MINI = "gpt-4o-mini"


class Units(enum.IntEnum):
    MANY = 1000


# --- Token


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        pytest.param(field, value, TypeError, id=f"{field} {value!r}")
        for fields, values in [
            (("total_available", "total_used", "expires_at", "created_at"), (True, 1.0, "1", None, b"1")),
            (("id",), (True, 1.0, "1", b"1")),
            (("unlimited_quota", "model_limits_enabled", "enabled"), (0, 1, None, "true", 1.0)),
            (("name", "hint"), (None, b"name", 5, ["name"])),
            (("model_limits",), (None, ["gpt-4o"], "gpt-4o", {1: 1}, {None: 1}, {b"gpt-4o": 1})),
            (("model_limits",), ({"a": False}, {"a": None}, {"a": 1.0}, {"a": "1"}, {"a": [1]})),
        ]
        for field in fields
        for value in values
    ]
    + [
        pytest.param("name", "\ud800", ValueError, id="name that UTF-8 cannot carry"),
        pytest.param("hint", "\udcff", ValueError, id="hint that UTF-8 cannot carry"),
        pytest.param("model_limits", {"\ud800": 1}, ValueError, id="model that UTF-8 cannot carry"),
        pytest.param("model_limits", {"a": -1}, ValueError, id="model limit below zero"),
        pytest.param("model_limits", {"a": True, "b": -1}, ValueError, id="not the first model limit"),
    ],
)
def test_a_wrong_field_is_named(field, value, error):
    # The token of a store has an id, and is checked in another way.
    for good in ({}, {"id": 7}):
        with pytest.raises(error, match=rf"^Token\.{field}\b"):
            Token(**{**good, field: value})
        # What is made of a good token is checked as well.
        with pytest.raises(error, match=rf"^Token\.{field}\b"):
            dataclasses.replace(Token(**good), **{field: value})


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        pytest.param(("total_available", "total_used"), 1.0, id="totals"),
        pytest.param(("total_available", "total_used", "expires_at"), 1.0, id="totals and a time"),
        pytest.param(("total_available", "total_used", "expires_at", "created_at"), 1.0, id="numbers"),
        pytest.param(("unlimited_quota", "model_limits_enabled"), 1, id="two flags"),
        pytest.param(("unlimited_quota", "model_limits_enabled", "enabled"), 1, id="flags"),
        pytest.param(("name", "hint"), b"text", id="texts"),
    ],
)
def test_fields_that_are_wrong_in_the_same_way_do_not_hide_each_other(fields, value):
    with pytest.raises(TypeError, match=rf"^Token\.{fields[0]}\b"):
        Token(id=7, **dict.fromkeys(fields, value))


@pytest.mark.parametrize(
    ("field", "unit"),
    [
        pytest.param("total_used", "", id="quota units"),
        pytest.param("expires_at", r" of Unix seconds \(0: never\)", id="a time, or never"),
        pytest.param("created_at", " of Unix seconds", id="a time"),
    ],
)
def test_the_unit_of_a_wrong_field_is_told(field, unit):
    with pytest.raises(TypeError, match=f" an int{unit}, got '2030-01-01'$"):
        Token(**{field: "2030-01-01"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("name", Name("a subclass"), id="str subclass"),
        pytest.param("name", "caf\u00e9 \u4ee4\u724c \U0001f511", id="not ASCII"),
        pytest.param("total_available", -5, id="overdrawn"),
        pytest.param("total_available", 10**30, id="more than any column holds"),
        pytest.param("total_used", Units.MANY, id="IntEnum"),
        pytest.param("expires_at", -1, id="never, as new-api writes it"),
        pytest.param("id", Units.MANY, id="IntEnum as id"),
        pytest.param("model_limits", MappingProxyType({"a": 1}), id="a mapping that is not a dict"),
        pytest.param("model_limits", {Name("a"): Units.MANY}, id="subclasses in the limits"),
        pytest.param("model_limits", {"a": 0, "b": True}, id="nothing left, and no limit"),
    ],
)
def test_what_a_field_may_be(field, value):
    assert getattr(Token(**{field: value}), field) == value


def test_a_token_is_made_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        Token("name")


def test_what_is_left_out():
    assert dataclasses.asdict(Token()) == {
        "name": "",
        "total_available": 0,
        "total_used": 0,
        "unlimited_quota": False,
        "model_limits": {},
        "model_limits_enabled": False,
        "expires_at": 0,
        "enabled": True,
        "id": None,
        "hint": "",
        "created_at": 0,
        "renewal": "",
        "renewal_quota": 0,
        "renews_at": 0,
        "held": 0,
    }


def test_all_that_was_granted_is_the_sum():
    assert Token(total_available=987655, total_used=12345).total_granted == 1000000
    assert Token(total_available=-20, total_used=120).total_granted == 100
    with pytest.raises(TypeError, match="total_granted"):
        Token(total_granted=1)


@pytest.mark.parametrize("field", FULL)
def test_a_token_does_not_change(field):
    token = Token(**FULL)
    with pytest.raises(AttributeError):
        setattr(token, field, getattr(token, field))
    with pytest.raises(AttributeError):
        delattr(token, field)
    assert token == Token(**FULL)


def test_a_token_has_no_room_for_other_attributes():
    assert not hasattr(Token(), "__dict__")


def test_a_token_does_not_change_with_the_mapping_it_was_made_from():
    limits = {"a": 1}
    token = Token(model_limits=limits)
    limits["a"] = 2
    limits["b"] = True
    assert token.model_limits == {"a": 1}


@pytest.mark.parametrize("field", FULL)
def test_tokens_are_equal_by_their_fields(field):
    other = Token(**{name: value for name, value in FULL.items() if name != field})
    assert Token(**FULL) == Token(**FULL)
    assert Token(**FULL) != other
    assert len({Token(**FULL), Token(**FULL), other}) == 2


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, dataclasses.replace, lambda token: Token(**dataclasses.asdict(token))]
    + [
        lambda token, protocol=protocol: pickle.loads(pickle.dumps(token, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ],
)
def test_a_token_can_be_copied_and_sent_to_another_process(duplicate):
    token = Token(**FULL)
    assert duplicate(token) == token
    assert hash(duplicate(token)) == hash(token)


def test_an_exported_token_does_not_share_its_limits():
    token = Token(model_limits={"a": 1})
    dataclasses.asdict(token)["model_limits"]["a"] = 2
    assert token.model_limits == {"a": 1}


# --- The wire form

texts = st.text(st.characters(exclude_categories=["Cs"]))  # all but lone surrogates
integers = st.integers() | st.integers(min_value=10**17, max_value=10**40)
tokens = st.builds(
    Token,
    name=texts,
    total_available=integers,
    total_used=integers,
    unlimited_quota=st.booleans(),
    model_limits=st.dictionaries(texts, st.integers(min_value=0) | st.just(True)),
    model_limits_enabled=st.booleans(),
    expires_at=integers,
)


def as_json(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@patiently
@given(tokens)
def test_the_wire_form_is_what_a_json_encoder_makes(token):
    assert wire_form(token) == as_json(
        {
            "object": "token_usage",
            "name": token.name,
            "total_granted": token.total_used + token.total_available,
            "total_used": token.total_used,
            "total_available": token.total_available,
            "unlimited_quota": token.unlimited_quota,
            "model_limits": token.model_limits,
            "model_limits_enabled": token.model_limits_enabled,
            "expires_at": max(token.expires_at, 0),
        }
    )


def test_subclasses_look_like_what_they_are_on_the_wire():
    limits = {Model.MINI: Units.MANY}
    token = Token(name=Name("x"), total_available=Units.MANY, expires_at=Units.MANY, model_limits=limits)
    data = json.loads(wire_form(token))
    assert (data["name"], data["total_available"], data["expires_at"]) == ("x", 1000, 1000)
    assert data["model_limits"] == {"gpt-4o-mini": 1000}


def test_what_an_operator_reserves_for_itself_is_not_on_the_wire():
    # `enabled` among it: a disabled token is answered as if there were none.
    told = json.loads(wire_form(Token(**FULL)))
    assert told.keys().isdisjoint({"id", "hint", "created_at", "enabled"})


@patiently
@given(st.dictionaries(texts, st.integers(min_value=0) | st.just(True)))
def test_model_limits_come_back_from_a_text_column(limits):
    text = encode_model_limits(limits)
    assert text == as_json(limits)
    assert as_json(json.loads(text)) == text


# --- Keys


def test_a_made_key_is_48_random_letters_and_digits():
    keys = [make_key() for _ in range(1000)]
    assert all(re.fullmatch("[0-9A-Za-z]{48}", key) for key in keys)
    assert len(set(keys)) == 1000
    # Of the 62 characters, a place that is random misses one in 200,000 such samples, and never twelve.
    assert all(len({key[place] for key in keys}) > 50 for place in range(48))


@pytest.mark.parametrize(
    ("key", "stripped"),
    [
        pytest.param("sk-abc", "abc", id="with the prefix"),
        pytest.param("abc", "abc", id="without"),
        pytest.param("sk-sk-abc", "abc", id="twice"),
        pytest.param("SK-abc", "SK-abc", id="the prefix has a case"),
        pytest.param("abc-sk-", "abc-sk-", id="only in front"),
        pytest.param("sk-", "", id="nothing else"),
        pytest.param("", "", id="empty"),
    ],
)
def test_every_prefix_is_stripped(key, stripped):
    assert strip_prefix(key) == stripped


@pytest.mark.parametrize(
    ("key", "written"),
    [
        pytest.param("abc", "sk-abc", id="plain"),
        pytest.param("sk-abc", "sk-abc", id="a key that has it"),
        pytest.param("k" * 509, "sk-" + "k" * 509, id="just not too long"),
        pytest.param("k" * 510, "k" * 510, id="too long with the prefix"),
        pytest.param("k" * 512, "k" * 512, id="as long as a key may be"),
    ],
)
def test_a_key_is_written_with_the_prefix_where_it_has_room(key, written):
    assert with_prefix(key) == written
    assert check_key(written) == strip_prefix(key)


visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters=","), min_size=1)


@patiently
@given(visible.filter(strip_prefix))
def test_a_key_that_a_client_can_send_is_taken(key):
    assert check_key("sk-" + key) == strip_prefix(key)


@pytest.mark.parametrize(
    ("key", "error"),
    [
        pytest.param("", ValueError, id="empty"),
        pytest.param("sk-", ValueError, id="the prefix alone"),
        pytest.param("canary key", ValueError, id="space"),
        pytest.param(" canary", ValueError, id="space in front"),
        pytest.param("canary\n", ValueError, id="line feed at the end"),
        pytest.param("canary,", ValueError, id="comma"),
        pytest.param("canary\0", ValueError, id="NUL"),
        pytest.param("canary\x7f", ValueError, id="DEL"),
        pytest.param("canary\u00e9", ValueError, id="not ASCII"),
        pytest.param("canary\ud800", ValueError, id="no text"),
        pytest.param("canary" + "k" * 507, ValueError, id="513 characters"),
        pytest.param("sk-canary" + "k" * 504, ValueError, id="513 characters with the prefix"),
        pytest.param(b"canary", TypeError, id="bytes"),
        pytest.param(None, TypeError, id="None"),
        pytest.param(5, TypeError, id="int"),
    ],
)
def test_another_is_refused_without_being_shown(key, error):
    with pytest.raises(error, match="key" if isinstance(key, str) else f"key .* {type(key).__name__}$") as caught:
        check_key(key)
    assert "canary" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@patiently
@given(texts | visible)
@example("\ud800")  # no text at all, which a key that is asked for may be
def test_any_text_has_a_digest_of_its_own(key):
    digest = key_digest(key)
    assert digest == hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    assert digest != key_digest(key + "\0")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        pytest.param("0123456789abcdefghijwxyz", "wxyz", id="the last four"),
        pytest.param("sk-0123456789abcdefghijwxyz", "wxyz", id="with the prefix"),
        pytest.param("sk-0123456789abcdefghijxyz", "", id="short, as the prefix does not count"),
        pytest.param("", "", id="empty"),
    ],
)
def test_a_hint_leaves_20_unknown_characters_of_a_key(key, hint):
    assert key_hint(key) == hint


def test_a_row_has_a_column_for_every_field():
    fields = {field.name for field in dataclasses.fields(Token)}
    assert {"id", *rows.TOKEN_COLUMNS} == fields
    assert set(rows.token_values(Token())) == fields - {"id"}
