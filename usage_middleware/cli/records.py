"""Tokens as lines of text: what ``export`` writes and ``import`` reads, as CSV or as JSON lines.

No reason that is given for a bad row shows a value of it: in a file whose columns are in disorder, the key may be
anywhere.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

from ..keys import key_digest, key_hint
from ..stores.storable import check_record
from ..tokens import Token, TokenRecord
from .fields import FROM_JSON, FROM_TEXT, BadRow, Parse, loads

_encode_json: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


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
    columns = [(name, FROM_TEXT[name]) for name in _checked_header(header)]
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
            yield number, _record_of_object(loads("the line", line), now)
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
    known = f"known are {', '.join(FROM_TEXT)}"
    if len(header) == 1 and (separator := next((c for c in ";\t|" if c in header[0]), None)):
        raise UnreadableSource(f"its columns are separated by {separator!r}; separate them by commas")
    # Before a column is named: the first line of a file without a header holds a key.
    if "key" not in header and "digest" not in header:
        raise UnreadableSource(f"its first line must name the columns, with key or digest among them; {known}")
    for name in header:
        if name not in FROM_TEXT:
            raise UnreadableSource(f"it has an unknown column {name[:40]!r}; {known}")
        if header.count(name) > 1:
            raise UnreadableSource(f"it has the column {name!r} twice")
    return header


def _record_of_row(columns: list[tuple[str, Parse]], row: list[str], now: float) -> TokenRecord:
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
        parse = FROM_JSON.get(name)
        if parse is None:
            raise BadRow(f"has an unknown field {name[:40]!r}; known are {', '.join(FROM_JSON)}")
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
