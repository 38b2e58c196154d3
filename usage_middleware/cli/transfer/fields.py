"""The fields of a token in a file, and how each is read from and written to text and JSON.

They are the fields of :class:`~usage_middleware.tokens.Token` and :class:`~usage_middleware.tokens.TokenRecord`. A new
field is exported and imported according to its type, unless it has an entry of its own below.

No message shows the value of a bad field, which may be a key in the wrong column.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any, Final, TypeAlias, get_type_hints

from ...checks import MAX_INTEGER
from ...keys import check_key
from ...tokens import Token, TokenRecord
from ...usage import DayUsage
from .. import times

#: The fewest characters after ``sk-`` in a key of another system. ``create`` refuses a shorter key, and ``import``
#: warns of it. The database keeps SHA-256 digests, which are safe only if there are too many keys to try them all: a
#: graphics card tries all keys of 8 letters in an hour.
KEY_MIN_LENGTH: Final = 16

_INTEGER: Final = re.compile(r"-?[0-9]{1,19}")
_DIGEST: Final = re.compile(r"[0-9A-Fa-f]{64}")
_BOOLEANS: Final = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


class BadRow(ValueError):
    """A row that is not a token. The message says why, and contains no value of the row."""


Parse: TypeAlias = Callable[[str, Any, float], Any]
"""Return the value of a field from its name, what was read, and the current Unix time (for ``30d``)."""


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
        raise BadRow(f"{name} must be text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # bytes that are not UTF-8, or half of a surrogate pair in JSON
            raise BadRow(f"{name} is not UTF-8 text") from None
    return value


def _integer_of_text(name: str, text: str, now: float) -> int:
    if not _INTEGER.fullmatch(text):
        raise BadRow(f"{name} must be a whole number, written in digits only")
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
    # Return any number as it is, however small or large, so that an export is read back unchanged.
    if _INTEGER.fullmatch(text):
        return int(text)
    try:
        return times.parse_expiry(text, now)
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


def _usage(name: str, value: Any, now: float) -> Mapping[str, int]:
    for used in _models(name, value).values():
        if not _is_figure(used):
            raise BadRow(f"{name} must have 0 to 2**63 - 1 quota units for each model")
    return value  # type: ignore[no-any-return]


def _models(name: str, value: Any, *, or_none: bool = False) -> Mapping[str, Any]:
    if type(value) is not dict:
        raise BadRow(f"{name} must be a JSON object of models")
    for model in value:
        if not (model or or_none) or "\0" in _text(name, model, 0.0):
            raise BadRow(f"{name} must not have a model without a name, or with a NUL in it")
    return value


def _days(name: str, value: Any, now: float) -> Sequence[DayUsage]:
    if type(value) is not dict:
        raise BadRow(f"{name} must be a JSON object of days")
    return tuple(
        DayUsage(day, model, **_figures(name, figures))
        for day, models in ((_day(name, text), models) for text, models in value.items())
        for model, figures in _models(name, models, or_none=True).items()
    )


def _day(name: str, text: str) -> date:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise BadRow(f"{name} must have days such as 2030-01-01") from None
    if day.isoformat() != text:  # Python 3.11 and newer accept 20300101 too, a second name of the same day
        raise BadRow(f"{name} must have days such as 2030-01-01")
    return day


def _figures(name: str, value: Any) -> dict[str, int]:
    if type(value) is not dict or not value.keys() <= set(_FIGURES) or not all(map(_is_figure, value.values())):
        raise BadRow(f"{name} must have, for each model of a day, 0 to 2**63 - 1 of {', '.join(_FIGURES)}")
    return {figure: value.get(figure, 0) for figure in _FIGURES}


def _is_figure(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INTEGER


def _ignored(name: str, value: Any, now: float) -> None:
    return None


def _json_of_text(parse: Parse) -> Parse:
    return lambda name, text, now: parse(name, loads(name, text), now)


def loads(what: str, text: str) -> Any:
    """Decode JSON.

    :raises BadRow: it is not JSON; the message begins with ``what``.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"{what} is not JSON: {error.msg}, at character {error.pos + 1}") from None
    except RecursionError:
        raise BadRow(f"{what} is not the JSON of a token: it is nested too deeply") from None
    except ValueError:
        raise BadRow(f"{what} is not the JSON of a token: it has a number with too many digits") from None


def _object_of_days(days: Sequence[DayUsage]) -> dict[str, dict[str, dict[str, int]]]:
    """Return an object of days, each an object of models. Leave out figures of 0: there may be thousands of them."""
    written: dict[str, dict[str, dict[str, int]]] = {}
    for entry in days:
        figures = {figure: value for figure in _FIGURES if (value := getattr(entry, figure))}
        written.setdefault(entry.day.isoformat(), {})[entry.model] = figures
    return written


def _text_of_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) if value else ""


def _names(kind: Any, *left_out: str) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind) if field.name not in left_out)


_FIGURES: Final = tuple(name for name in DayUsage._fields if name not in ("day", "model"))
# The id of a token, and what its open reservations hold, belong to the store that it comes from.
_OF_TOKEN: Final = _names(Token, "id", "held")
#: The fields of a record besides its token and digest.
OF_RECORD: Final = _names(TokenRecord, "token", "digest")
#: The fields that an export has, in their order.
EXPORTED: Final = ("id", "digest", *_OF_TOKEN, *OF_RECORD)

_HINTS: Final = get_type_hints(Token)


def _of_types(forms: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: forms[_HINTS[name]] for name in _OF_TOKEN if _HINTS[name] in forms}


def _times(form: Any) -> dict[str, Any]:
    return {name: form for name in _OF_TOKEN if name.endswith("_at")}


_FROM_EITHER: Final[Mapping[str, Parse]] = {"key": _key, "digest": _digest}
#: The parsers by CSV column. An empty cell is not parsed.
FROM_TEXT: Final[Mapping[str, Parse]] = {
    **_FROM_EITHER,
    **_of_types({str: _text, int: _integer_of_text, bool: _boolean_of_text}),
    **_times(_time_of_text),
    "model_limits": _limits_of_text,
    "total_granted": _integer_of_text,
    "model_usage": _json_of_text(_usage),
    "days": _json_of_text(_days),
    "id": _ignored,
}
#: The parsers by member of the JSON object. ``null`` is not parsed.
FROM_JSON: Final[Mapping[str, Parse]] = {
    **_FROM_EITHER,
    **_of_types({str: _text, int: _integer, bool: _boolean}),
    **_times(_time),
    "model_limits": _limits,
    "total_granted": _integer,
    "model_usage": _usage,
    "days": _days,
    "id": _ignored,
}
#: How to write a field as JSON, if not as it is.
TO_JSON: Final[Mapping[str, Callable[[Any], Any]]] = {
    "digest": bytes.hex,
    "model_limits": dict,
    "model_usage": dict,
    "days": _object_of_days,
}
#: How to write a field as CSV, if not as it is.
TO_TEXT: Final[Mapping[str, Callable[[Any], Any]]] = {
    **_of_types({bool: lambda value: "true" if value else "false"}),
    "digest": bytes.hex,
    "model_limits": lambda limits: _text_of_json(dict(limits)),
    "model_usage": lambda usage: _text_of_json(dict(usage)),
    "days": lambda days: _text_of_json(_object_of_days(days)),
}
