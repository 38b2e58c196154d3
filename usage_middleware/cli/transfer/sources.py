"""Where imported tokens come from: a file of text, standard input, or a database."""

from __future__ import annotations

import io
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from ... import stores
from ...errors import DamagedToken, StoreError
from ...stores.base import QuotaStore
from ...stores.storable import check_record
from ...tokens import TokenRecord
from ..db_option import NO_TOKENS
from .fields import BadRow
from .records import LINE_LIMIT, Row, UnreadableSource, read_csv, read_json_lines, reason, too_long

FORMATS: Final[Mapping[str, Callable[[Iterable[str], float], Iterator[Row]]]] = {
    "csv": read_csv,
    "jsonl": read_json_lines,
}
_SUFFIXES: Final = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
_SQLITE_MAGIC: Final = b"SQLite format 3\0"  # sqlite.org/fileformat.html, section 1.3


@dataclass(frozen=True)
class Source:
    """Rows that are read one by one, and how much of them has been read."""

    #: What the number of a row is: that of a ``line``, or of a ``token``.
    unit: str
    rows: Iterator[Row]
    #: How much there is to read, in bytes or in rows; ``None`` if it is not known.
    length: Callable[[], int | None]
    #: How much of it has been read.
    position: Callable[[], int]


class _Database(Protocol):
    """A store from which tokens can be copied."""

    def records(self) -> Iterator[TokenRecord | DamagedToken]: ...
    def count(self) -> int: ...


def format_of(name: str) -> str | None:
    """Return the format that a file's extension stands for, or ``None``."""
    return _SUFFIXES.get(Path(name).suffix.lower())


def open_source(text: str, format_name: str | None) -> AbstractContextManager[Source]:
    """Open what ``text`` names: a file, ``-`` for standard input, or a database by its file or its URL.

    :param format_name: a key of :data:`FORMATS`; if it is left out, the file's name or its first bytes decide.
    :raises UnreadableSource: it cannot be opened, or its format is not known.
    """
    if text == "-":
        if format_name is None:
            raise UnreadableSource("name the format of standard input with --format csv or --format jsonl")
        return _text_source(sys.stdin.buffer, format_name)
    if text == stores.MEMORY:
        raise UnreadableSource("a store in memory ends with the command that made it")
    if "://" in text:
        return _database_source(text)
    try:
        file = open(text, "rb")  # noqa: SIM115 - the source closes it
    except OSError as error:
        raise UnreadableSource(error.strerror or "it cannot be opened") from None
    format_name = format_name or format_of(text)
    if format_name is not None:
        return _text_source(file, format_name)
    with file:
        is_database = file.peek(len(_SQLITE_MAGIC)).startswith(_SQLITE_MAGIC)
    if is_database:
        return _database_source(text)
    raise UnreadableSource(
        f"its format is not known; name an SQLite database or a file that ends with {', '.join(_SUFFIXES)}, or add "
        "--format csv or --format jsonl"
    )


@contextmanager
def _database_source(text: str) -> Iterator[Source]:
    read = 0

    def rows(database: _Database) -> Iterator[Row]:
        nonlocal read
        for record in database.records():
            read += 1
            if isinstance(record, DamagedToken):
                yield Row(record.token_id, BadRow(record.reason))
            else:
                yield Row(record.token.id or read, _checked(record))

    with ExitStack() as opened:
        try:
            database = opened.enter_context(_database(text))
        except (StoreError, ValueError, ImportError) as error:
            raise UnreadableSource(str(error)) from None
        yield Source("token", rows(database), database.count, lambda: read)


@contextmanager
def _database(text: str) -> Iterator[_Database]:
    """Open the store that ``text`` names, and write nothing to it, even if its tables are of an earlier version."""
    with stores.open_and_ask(text, read_only=True) as database:
        state = database.tables_state() if isinstance(database, QuotaStore) else "current"
        if state == "none":
            raise UnreadableSource(NO_TOKENS)
        if state == "earlier":
            with stores.open_earlier(text, upgrade=False) as earlier:
                yield earlier
        else:
            yield database


def _checked(record: TokenRecord) -> TokenRecord | BadRow:
    try:
        return check_record(record)
    except (TypeError, ValueError) as error:
        return BadRow(reason(error))


@contextmanager
def _text_source(file: BinaryIO, format_name: str) -> Iterator[Source]:
    # A byte that is not UTF-8 becomes a lone surrogate, which no field accepts, so only its row is bad. A spreadsheet
    # may have put a BOM in front. The csv module wants line endings as they are; JSON lines end with LF only.
    newline = "" if format_name == "csv" else "\n"
    with file, io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as text:
        rows = FORMATS[format_name](_lines(text), time.time())
        yield Source("line", rows, lambda: _size(file), file.tell)


def _lines(text: io.TextIOBase) -> Iterator[str]:
    """Yield the lines of a text. Of a line that is too long, yield only its first ``LINE_LIMIT + 1`` characters."""
    most = LINE_LIMIT + 1
    try:
        while line := text.readline(most):
            yield line
            while too_long(line) and line[-1] not in "\r\n":
                line = text.readline(most)
    except OSError as error:
        raise UnreadableSource(error.strerror or "it cannot be read") from None


def _size(file: BinaryIO) -> int | None:
    status = os.fstat(file.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None
