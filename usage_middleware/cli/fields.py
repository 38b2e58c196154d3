"""One field of a token, from a text of CSV or from a value of JSON.

No reason that is given for a bad one shows its value, which may be a key that stands in the wrong column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from ..checks import MAX_INTEGER
from ..keys import check_key
from . import formats

#: The characters of a line that are read. Longer ones are bad: a CSV row of as many fields as there are, each as large
#: as the csv module takes them (131,072 characters, all of them doubled quotes), is shorter.
LINE_LIMIT: Final = 4 * 1024 * 1024

_INTEGER: Final = re.compile(r"-?[0-9]{1,19}")
_DIGEST: Final = re.compile(r"[0-9A-Fa-f]{64}")
_BOOLEANS: Final = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


class BadRow(ValueError):
    """A row that is no token. The message says why, and holds no value of the row."""


Parse: TypeAlias = Callable[[str, Any, float], Any]
"""The value of a field, from its name, what was read, and Unix time, for an expiry such as ``30d``."""


def _key(name: str, value: Any, now: float) -> str:
    try:
        return check_key(value)
    except (TypeError, ValueError) as error:
        raise BadRow(str(error)) from None


def _digest(name: str, value: Any, now: float) -> bytes:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise BadRow("digest must be the SHA-256 of a key without sk-, as 64 hexadecimal digits")
    return bytes.fromhex(value)


def _text(name: str, value: Any, now: float) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} must be a text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # bytes that were none, or half a surrogate pair of JSON
            raise BadRow(f"{name} is not UTF-8 text") from None
    return value


def _integer_of_text(name: str, text: str, now: float) -> int:
    if not _INTEGER.fullmatch(text):
        raise BadRow(f"{name} must be a whole number, of digits alone")
    return int(text)


def _integer(name: str, value: Any, now: float) -> int:
    if type(value) is not int:
        raise BadRow(f"{name} must be a whole number")
    return value


def _boolean_of_text(name: str, text: str, now: float) -> bool:
    value = _BOOLEANS.get(text.lower())
    if value is None:
        raise BadRow(f"{name} must be true or false")
    return value


def _boolean(name: str, value: Any, now: float) -> bool:
    if type(value) is not bool:
        raise BadRow(f"{name} must be true or false")
    return value


def _time_of_text(name: str, text: str, now: float) -> int:
    # A number as it stands, however small or large it is: an export is read back as it was.
    if _INTEGER.fullmatch(text):
        return int(text)
    try:
        return formats.parse_expiry(text, now)
    except ValueError:
        raise BadRow(f"{name} must be Unix seconds, 2030-01-01, '2030-01-01 18:30' (UTC), 30d, or never") from None


def _time(name: str, value: Any, now: float) -> int:
    return _time_of_text(name, value, now) if isinstance(value, str) else _integer(name, value, now)


def _limits_of_text(name: str, text: str, now: float) -> Mapping[str, int | bool]:
    if text.lstrip().startswith("{"):
        return _limits(name, loads(name, text), now)
    return _limits(name, {model.strip(): True for model in text.split(",")}, now)


def _limits(name: str, value: Any, now: float) -> Mapping[str, int | bool]:
    for limit in _models(name, value).values():
        if limit is not True and (type(limit) is not int or not 0 <= limit <= MAX_INTEGER):
            raise BadRow(f"{name} must have 0 to 2**63 - 1 quota units, or true, for each model")
    return value  # type: ignore[no-any-return]


def _usage_of_text(name: str, text: str, now: float) -> Mapping[str, int]:
    return _usage(name, loads(name, text), now)


def _usage(name: str, value: Any, now: float) -> Mapping[str, int]:
    for used in _models(name, value).values():
        if type(used) is not int or not 0 <= used <= MAX_INTEGER:
            raise BadRow(f"{name} must have 0 to 2**63 - 1 quota units for each model")
    return value  # type: ignore[no-any-return]


def _models(name: str, value: Any) -> Mapping[str, Any]:
    if type(value) is not dict:
        raise BadRow(f"{name} must be a JSON object of models")
    for model in value:
        if not model or "\0" in _text(name, model, 0.0):
            raise BadRow(f"{name} must have models that are names")
    return value


def _ignored(name: str, value: Any, now: float) -> None:
    return None


def loads(what: str, text: str) -> Any:
    """The value of a text of JSON.

    :raises BadRow: it is none; the message begins with ``what``.
    """
    if len(text) >= LINE_LIMIT:
        raise BadRow(f"{what} is too long")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"{what} is no JSON: {error.msg}, at character {error.pos + 1}") from None
    except RecursionError:
        raise BadRow(f"{what} is no JSON of a token: it is nested too deeply") from None
    except ValueError:
        raise BadRow(f"{what} is no JSON of a token: it has a number with too many digits") from None


#: By the names of CSV's columns. An empty cell is not asked for.
FROM_TEXT: Final[Mapping[str, Parse]] = {
    "key": _key,
    "digest": _digest,
    "name": _text,
    "total_available": _integer_of_text,
    "total_used": _integer_of_text,
    "total_granted": _integer_of_text,
    "unlimited_quota": _boolean_of_text,
    "model_limits": _limits_of_text,
    "model_limits_enabled": _boolean_of_text,
    "expires_at": _time_of_text,
    "enabled": _boolean_of_text,
    "created_at": _time_of_text,
    "hint": _text,
    "model_usage": _usage_of_text,
    "id": _ignored,
}
#: By the names of an object's members. ``null`` is not asked for.
FROM_JSON: Final[Mapping[str, Parse]] = {
    **FROM_TEXT,
    "total_available": _integer,
    "total_used": _integer,
    "total_granted": _integer,
    "unlimited_quota": _boolean,
    "model_limits": _limits,
    "model_limits_enabled": _boolean,
    "expires_at": _time,
    "enabled": _boolean,
    "created_at": _time,
    "model_usage": _usage,
}
