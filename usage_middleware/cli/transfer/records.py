"""Tokens as lines of text: what ``export`` writes and ``import`` reads, as CSV or as JSON lines.

No message shows a value of a bad row: in a file whose columns are in the wrong order, any of them may hold the key.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from ...keys import key_digest, key_hint
from ...stores.storable import check_record
from ...tokens import Token, TokenRecord
from .fields import EXPORTED, FROM_JSON, FROM_TEXT, KEY_MIN_LENGTH, OF_RECORD, TO_JSON, TO_TEXT, BadRow, Parse, loads

#: The most characters that a line, or a CSV row of several lines, may have. A longer one is a bad row: it is refused
#: before it is parsed, so that memory stays bounded.
LINE_LIMIT: Final = 4 * 1024 * 1024

_encode_json: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class UnreadableSource(Exception):
    """A source from which no row can be read. The message contains no value of it either."""


class Row(NamedTuple):
    """One row of a source."""

    #: The line on which it begins, or the id of the token in the database that it comes from.
    number: int
    #: The token, or the reason why the row is not one.
    content: TokenRecord | BadRow
    #: Whether it came with a key that is short enough to be found by trying all of them.
    has_short_key: bool = False


def read_csv(lines: Iterable[str], now: float) -> Iterator[Row]:
    """Yield the tokens of CSV text with a header.

    :param lines: with their line endings.
    :param now: the current Unix time, for an expiry such as ``30d``.
    :raises UnreadableSource: the header is missing or wrong. An unknown column is refused, as a misspelt one would
        silently give every token the field's default.
    """
    # csv's own limit is set for the whole process, 131,072 characters by default. LINE_LIMIT ends a row before it does.
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT + 1))
    bounded = _BoundedRows(lines)
    rows = csv.reader(bounded, strict=True)
    try:
        header = next(rows, [])
    except BadRow as error:
        raise UnreadableSource(f"the first line {error}") from None
    except csv.Error as error:
        raise UnreadableSource(f"the first line is not CSV: {error}") from None
    columns = [(name, FROM_TEXT[name]) for name in _checked_header(header)]
    while True:
        line = bounded.begin_row()
        try:
            row = next(rows)
            if any(row):
                yield _row_of_cells(line, columns, row, now)
        except StopIteration:
            return
        except BadRow as error:
            yield Row(line, error)
        except csv.Error as error:
            yield Row(line, BadRow(f"is not CSV: {error}"))


def read_json_lines(lines: Iterable[str], now: float) -> Iterator[Row]:
    """Yield the tokens of JSON lines (jsonlines.org).

    A row with an unknown field is a bad row, for the same reason as in :func:`read_csv`. There is no header in which it
    could be found in advance.

    :param now: the current Unix time, for an expiry such as ``30d``.
    :raises UnreadableSource: the text is a JSON array.
    """
    for number, line in enumerate(lines, 1):
        if number == 1 and line.startswith("["):
            raise UnreadableSource("it is a JSON array; write one object per line instead, without commas between them")
        if line.isspace():
            continue
        try:
            if too_long(line):
                raise BadRow(_TOO_LONG)
            yield _row_of_object(number, loads("the line", line), now)
        except BadRow as error:
            yield Row(number, error)


def write_csv(records: Iterable[TokenRecord]) -> Iterator[str]:
    """Yield the lines of a CSV file that :func:`read_csv` reads back without loss."""
    # With the line ending of RFC 4180, every version of Python quotes a cell that has a carriage return. With "\n",
    # those before 3.13 do not. The ending itself is then replaced by "\n", which other tools expect.
    writer = csv.writer(_Echo(), lineterminator="\r\n")
    for cells in _cells(records):
        yield writer.writerow(cells)[:-2] + "\n"


def _cells(records: Iterable[TokenRecord]) -> Iterator[Iterable[Any]]:
    yield EXPORTED
    for record in records:
        yield _exported(record, TO_TEXT).values()


def write_json_lines(records: Iterable[TokenRecord]) -> Iterator[str]:
    """Yield JSON lines that :func:`read_json_lines` reads back without loss."""
    for record in records:
        yield _encode_json(_exported(record, TO_JSON)) + "\n"


def too_long(line: str) -> bool:
    """Return whether a line is longer than :data:`LINE_LIMIT`."""
    return len(line) > LINE_LIMIT


def reason(error: Exception) -> str:
    """Return the message of a check of a field, without the value that it quotes."""
    return str(error).partition(", got ")[0].removeprefix("Token.")


_OF_RECORD: Final = frozenset(("digest", *OF_RECORD))
_TOO_LONG: Final = f"is longer than {LINE_LIMIT:,} characters"


def _exported(record: TokenRecord, form: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    fields = {}
    for name in EXPORTED:
        value = getattr(record if name in _OF_RECORD else record.token, name)
        fields[name] = form[name](value) if name in form else value
    return fields


class _Echo:
    """A file for :mod:`csv`, whose ``writerow`` returns what ``write`` does."""

    def write(self, line: str) -> str:
        return line


class _BoundedRows:
    """Lines for :mod:`csv`, at most :data:`LINE_LIMIT` characters of them for one row.

    Otherwise, after a quotation mark too many, the rest of a file would be read into memory as one row.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._number = 0
        self._room = LINE_LIMIT

    def begin_row(self) -> int:
        """Return the number of the line on which the next row begins."""
        self._room = LINE_LIMIT
        return self._number + 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1
        self._room -= len(line)
        if self._room < 0:
            raise BadRow(f"{_TOO_LONG}; a quotation mark may be missing")
        return line


def _checked_header(header: list[str]) -> list[str]:
    known = f"the known ones are {', '.join(FROM_TEXT)}"
    if len(header) == 1 and (separator := next((c for c in ";\t|" if c in header[0]), None)):
        raise UnreadableSource(f"its columns are separated by {separator!r}; separate them by commas")
    # This comes before any message that names a column: without a header, the first line holds a key.
    if "key" not in header and "digest" not in header:
        raise UnreadableSource(f"its first line must name the columns, with key or digest among them; {known}")
    for name in header:
        if name not in FROM_TEXT:
            raise UnreadableSource(f"it has an unknown column {name[:40]!r}; {known}")
        if header.count(name) > 1:
            raise UnreadableSource(f"it has the column {name!r} twice")
    return header


def _row_of_cells(number: int, columns: list[tuple[str, Parse]], row: list[str], now: float) -> Row:
    if len(row) != len(columns):
        raise BadRow(f"has {len(row)} fields where the header has {len(columns)}")
    fields = {}
    for (name, parse), text in zip(columns, row):  # noqa: B905 - their lengths are the same
        if text:
            fields[name] = parse(name, text, now)
    return _row(number, fields)


def _row_of_object(number: int, decoded: Any, now: float) -> Row:
    if type(decoded) is not dict:
        raise BadRow("must be a JSON object")
    # This comes before any message that names a field: in an object of objects, the names may be the keys.
    if "key" not in decoded and "digest" not in decoded:
        raise BadRow("needs a key or a digest")
    fields = {}
    for name, value in decoded.items():
        parse = FROM_JSON.get(name)
        if parse is None:
            raise BadRow(f"has an unknown field {name[:40]!r}; the known ones are {', '.join(FROM_JSON)}")
        if value is not None:
            fields[name] = parse(name, value, now)
    return _row(number, fields)


def _row(number: int, fields: dict[str, Any]) -> Row:
    """Return the row that the parsed fields make. A field that is left out has its default."""
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
    more = {name: fields.pop(name) for name in OF_RECORD if name in fields}
    try:
        record = check_record(TokenRecord(token=Token(**fields), digest=digest, **more))
    except ValueError as error:
        raise BadRow(reason(error)) from None
    return Row(number, record, has_short_key=key is not None and len(key) < KEY_MIN_LENGTH)
