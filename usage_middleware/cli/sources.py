"""Where imported tokens come from: a file of text, standard input, or a database."""

from __future__ import annotations

import io
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from .. import stores
from ..errors import DamagedToken, StoreError
from ..stores.storable import check_record
from ..tokens import TokenRecord
from .fields import LINE_LIMIT, BadRow
from .records import UnreadableSource, read_csv, read_json_lines, reason

_Rows = Iterator[tuple[int, TokenRecord | BadRow]]

FORMATS: Final[Mapping[str, Callable[[Iterable[str], float], _Rows]]] = {"csv": read_csv, "jsonl": read_json_lines}
_SUFFIXES: Final = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
_SQLITE_MAGIC: Final = b"SQLite format 3\0"  # sqlite.org/fileformat.html, section 1.3


@dataclass(frozen=True)
class Source:
    """Rows that are read one by one."""

    #: What the number of a row counts.
    unit: str
    #: The number of a row, and its token or why it is none.
    rows: _Rows
    #: How much there is to read, in bytes or in rows; ``None``: nobody knows.
    length: Callable[[], int | None]
    #: How much of it has been read.
    position: Callable[[], int]


class _Database(Protocol):
    """A store that others may take tokens from."""

    def records(self) -> Iterator[TokenRecord | DamagedToken]: ...
    def count(self) -> int: ...
    def close(self) -> None: ...


def format_of(name: str) -> str | None:
    """The format that a file's name tells."""
    return _SUFFIXES.get(Path(name).suffix.lower())


def open_source(text: str, format_name: str | None) -> AbstractContextManager[Source]:
    """Opens what ``text`` names: a file, ``-`` for standard input, or a database by its file or its URL.

    :param format_name: a key of :data:`FORMATS`; left out, the file tells.
    :raises UnreadableSource: it cannot be opened, or nothing tells what it is.
    """
    if text == "-":
        if format_name is None:
            raise UnreadableSource("name the format of standard input with --format csv or --format jsonl")
        return _text_source(sys.stdin.buffer, format_name)
    if text == stores.MEMORY:
        raise UnreadableSource("a store in memory ends with the command that made it")
    if "://" in text:
        return _database_source(_open_database(text))
    try:
        file = open(text, "rb")  # noqa: SIM115 - the source closes it
    except OSError as error:
        raise UnreadableSource(error.strerror or "it cannot be opened") from None
    format_name = format_name or format_of(text)
    if format_name is not None:
        return _text_source(file, format_name)
    with file:
        if file.peek(len(_SQLITE_MAGIC)).startswith(_SQLITE_MAGIC):
            return _database_source(_open_database(text))
    raise UnreadableSource(
        f"nothing tells what it is: known are {', '.join(_SUFFIXES)}, SQLite databases and database URLs; "
        "for another file name --format csv or --format jsonl"
    )


def _open_database(text: str) -> _Database:
    try:
        database: _Database = stores.open_and_ask(text, read_only=True)
        if not hasattr(database, "has_tables") or database.has_tables():
            return database
        database.close()
    except (StoreError, ValueError, ImportError) as error:
        raise UnreadableSource(str(error)) from None
    raise UnreadableSource("this database has no tokens")


@contextmanager
def _database_source(database: _Database) -> Iterator[Source]:
    read = 0

    def rows() -> _Rows:
        nonlocal read
        for record in database.records():
            read += 1
            if isinstance(record, DamagedToken):
                yield record.token_id, BadRow(record.reason)
            else:
                yield record.token.id or read, _checked(record)

    with closing(database):
        yield Source("token", rows(), database.count, lambda: read)


def _checked(record: TokenRecord) -> TokenRecord | BadRow:
    try:
        return check_record(record)
    except (TypeError, ValueError) as error:
        return BadRow(reason(error))


@contextmanager
def _text_source(file: BinaryIO, format_name: str) -> Iterator[Source]:
    # A byte that is no UTF-8 becomes what no text may have, so that only its row is bad. A spreadsheet may have put a
    # BOM in front. The csv module wants the ends of lines as they are; JSON lines end with LF alone.
    newline = "" if format_name == "csv" else "\n"
    with file, io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as text:
        rows = FORMATS[format_name](_lines(text), time.time())
        yield Source("line", rows, lambda: _size(file), file.tell)


def _lines(text: io.TextIOBase) -> Iterator[str]:
    """The lines of a text. Of one that is longer than any that is good, only the beginning."""
    try:
        while line := text.readline(LINE_LIMIT):
            yield line
            while len(line) == LINE_LIMIT and line[-1] not in "\r\n":
                line = text.readline(LINE_LIMIT)
    except OSError as error:
        raise UnreadableSource(error.strerror or "it cannot be read") from None


def _size(file: BinaryIO) -> int | None:
    status = os.fstat(file.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None
