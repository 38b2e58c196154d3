"""Tokens as lines of text: what ``export`` writes and ``import`` reads, as CSV or as JSON lines.

No reason that is given for a bad row shows a value of it: in a file whose columns are in disorder, the key may be
anywhere.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from ..operations import MAX_INTEGER
from ..stores.base import check_record
from ..tokens import Token, TokenRecord, check_key, key_digest, key_hint
from . import formats

#: The characters of a line that are read. Longer ones are bad: a CSV row of as many fields as there are, each as large
#: as the csv module takes them (131,072 characters, all of them doubled quotes), is shorter.
LINE_LIMIT: Final = 4 * 1024 * 1024

_INTEGER: Final = re.compile(r"-?[0-9]{1,19}")
_DIGEST: Final = re.compile(r"[0-9A-Fa-f]{64}")
_BOOLEANS: Final = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}

_encode_json: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class BadRow(ValueError):
    """A row that is no token. The message says why, and holds no value of the row."""


class UnreadableSource(Exception):
    """A source of which no row can be read. The message holds no value of it either."""


def read_csv(lines: Iterable[str], now: float) -> Iterator[tuple[int, TokenRecord | BadRow]]:
    """The tokens of CSV text with a header, each with the number of the line on which its row begins.

    :param lines: with their ends.
    :param now: Unix time, for an expiry such as ``30d``.
    :raises UnreadableSource: the header is missing or wrong. An unknown column is refused, as a misspelt one would
        quietly give every token the field's default.
    """
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise UnreadableSource(f"the first line is no CSV: {error}") from None
    columns = [(name, _FROM_TEXT[name]) for name in _checked_header(header)]
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
            if any(row):
                yield line, _record_of_row(columns, row, now)
        except StopIteration:
            return
        except BadRow as error:
            yield line, error
        except csv.Error as error:
            yield line, BadRow(f"is no CSV: {error}")


def read_json_lines(lines: Iterable[str], now: float) -> Iterator[tuple[int, TokenRecord | BadRow]]:
    """The tokens of JSON lines (jsonlines.org), each with its line number.

    An unknown field makes its row a bad one, for the reason that :func:`read_csv` has; there is no header that could
    tell of it in advance.

    :param now: Unix time, for an expiry such as ``30d``.
    :raises UnreadableSource: the text is a JSON array.
    """
    for number, line in enumerate(lines, 1):
        if number == 1 and line.startswith("["):
            raise UnreadableSource("it is a JSON array; write one object a line instead, without commas between them")
        if line.isspace():
            continue
        try:
            yield number, _record_of_object(_loads("the line", line), now)
        except BadRow as error:
            yield number, error


def write_csv(records: Iterable[TokenRecord]) -> Iterator[str]:
    """The lines of a CSV file that :func:`read_csv` takes back without loss."""
    writer = csv.writer(_Echo(), lineterminator="\n")
    yield writer.writerow(_EXPORTED)
    for record in records:
        fields = _as_object(record)
        for name in ("model_limits", "model_usage"):
            fields[name] = _encode_json(fields[name]) if fields[name] else ""
        for name in ("unlimited_quota", "model_limits_enabled", "enabled"):
            fields[name] = "true" if fields[name] else "false"
        yield writer.writerow(fields.values())


def write_json_lines(records: Iterable[TokenRecord]) -> Iterator[str]:
    """JSON lines that :func:`read_json_lines` takes back without loss."""
    for record in records:
        yield _encode_json(_as_object(record)) + "\n"


def reason(error: Exception) -> str:
    """What a check of a field found, without the value that it found."""
    return str(error).partition(", got ")[0].removeprefix("Token.")


_EXPORTED: Final = (
    "id",
    "digest",
    "hint",
    "name",
    "total_available",
    "total_used",
    "unlimited_quota",
    "model_limits",
    "model_limits_enabled",
    "expires_at",
    "enabled",
    "created_at",
    "model_usage",
)


def _as_object(record: TokenRecord) -> dict[str, Any]:
    token = record.token
    fields = {name: getattr(token, name, None) for name in _EXPORTED}
    return {
        **fields,
        "digest": record.digest.hex(),
        "model_limits": dict(token.model_limits),
        "model_usage": dict(record.model_usage),
    }


class _Echo:
    """A file for :mod:`csv`, whose ``writerow`` returns what ``write`` does."""

    def write(self, line: str) -> str:
        return line


def _checked_header(header: list[str]) -> list[str]:
    known = f"known are {', '.join(_FROM_TEXT)}"
    if len(header) == 1 and (separator := next((c for c in ";\t|" if c in header[0]), None)):
        raise UnreadableSource(f"its columns are separated by {separator!r}; separate them by commas")
    # Before a column is named: the first line of a file without a header holds a key.
    if "key" not in header and "digest" not in header:
        raise UnreadableSource(f"its first line must name the columns, with key or digest among them; {known}")
    for name in header:
        if name not in _FROM_TEXT:
            raise UnreadableSource(f"it has an unknown column {name[:40]!r}; {known}")
        if header.count(name) > 1:
            raise UnreadableSource(f"it has the column {name!r} twice")
    return header


def _record_of_row(columns: list[tuple[str, _Parse]], row: list[str], now: float) -> TokenRecord:
    if len(row) != len(columns):
        raise BadRow(f"has {len(row)} fields where the header has {len(columns)}")
    fields = {}
    for (name, parse), text in zip(columns, row):  # noqa: B905 - their lengths are the same
        if text:
            fields[name] = parse(name, text, now)
    return _record(fields)


def _record_of_object(decoded: Any, now: float) -> TokenRecord:
    if type(decoded) is not dict:
        raise BadRow("must be a JSON object")
    # Before a field is named: in an object of objects, the names are the keys.
    if "key" not in decoded and "digest" not in decoded:
        raise BadRow("needs a key or a digest")
    fields = {}
    for name, value in decoded.items():
        parse = _FROM_JSON.get(name)
        if parse is None:
            raise BadRow(f"has an unknown field {name[:40]!r}; known are {', '.join(_FROM_JSON)}")
        if value is not None:
            fields[name] = parse(name, value, now)
    return _record(fields)


def _record(fields: dict[str, Any]) -> TokenRecord:
    """The record of fields that have been read one by one; what is left out has its default."""
    fields.pop("id", None)  # a number of the store that they come from
    key = fields.pop("key", None)
    digest = fields.pop("digest", None)
    if key is not None:
        computed = key_digest(key)
        if digest not in (None, computed):
            raise BadRow("digest is not that of key")
        digest = computed
        fields.setdefault("hint", key_hint(key))
    elif digest is None:
        raise BadRow("needs a key or a digest")
    granted = fields.pop("total_granted", None)
    if granted is not None:
        available = granted - fields.get("total_used", 0)
        if fields.setdefault("total_available", available) != available:
            raise BadRow("total_granted is not the sum of total_used and total_available")
    if fields.get("model_limits"):
        fields.setdefault("model_limits_enabled", True)
    usage = fields.pop("model_usage", {})
    try:
        return check_record(TokenRecord(token=Token(**fields), digest=digest, model_usage=usage))
    except ValueError as error:
        raise BadRow(reason(error)) from None


# --- One field, from a text of CSV or from a value of JSON.

_Parse = Callable[[str, Any, float], Any]


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
        return _limits(name, _loads(name, text), now)
    return _limits(name, {model.strip(): True for model in text.split(",")}, now)


def _limits(name: str, value: Any, now: float) -> Mapping[str, int | bool]:
    for limit in _models(name, value).values():
        if limit is not True and (type(limit) is not int or not 0 <= limit <= MAX_INTEGER):
            raise BadRow(f"{name} must have 0 to 2**63 - 1 quota units, or true, for each model")
    return value  # type: ignore[no-any-return]


def _usage_of_text(name: str, text: str, now: float) -> Mapping[str, int]:
    return _usage(name, _loads(name, text), now)


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


def _loads(what: str, text: str) -> Any:
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


_FROM_TEXT: Final[Mapping[str, _Parse]] = {
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
_FROM_JSON: Final[Mapping[str, _Parse]] = {
    **_FROM_TEXT,
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
