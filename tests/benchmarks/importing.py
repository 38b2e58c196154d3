"""What an import of many tokens costs, against reading the same file and inserting its rows by hand."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, redirect_stderr
from itertools import islice
from pathlib import Path
from typing import Any

from comparing import Table, table_of
from tokens_database import key

from usage_middleware import SQLiteTokenStore
from usage_middleware.cli import commands
from usage_middleware.cli.transfer.importing import BATCH

_COLUMNS = ("key", "name", "total_available", "total_used", "unlimited_quota", "expires_at", "created_at")
_INSERT = """
    INSERT INTO tokens (digest, hint, name, total_available, total_used, unlimited_quota,
                        expires_at, created_at, model_limits, model_limits_enabled, enabled)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, '{}', 0, 1)
"""


def import_of_a_file(count: int) -> Iterator[Table]:
    """Compare an import into a new database with the same transactions and the same ``synchronous`` by hand.

    It is measured once, as processor time. It waits for the disk only at the end of a transaction of 10,000 tokens.
    """
    with tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory:
        for name, write, read in (("CSV", _write_csv, _read_csv), ("JSON lines", _write_json_lines, _read_json_lines)):
            path = Path(directory, "tokens.csv" if name == "CSV" else "tokens.jsonl")
            write(path, count)
            yield table_of(
                f"An import of {count:,} tokens from {name}: processor time for each of them",
                [
                    ("by hand: read, hash, executemany", [_timed(directory, _by_hand, path, read) / count], None),
                    ("usage-middleware import", [_timed(directory, _import, path) / count], 2.0),
                ],
            )


def _timed(directory: str, fill: Callable[..., None], *args: Any) -> float:
    """Return the seconds of processor time that it takes to fill a new database."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        database = Path(place, "tokens.db")
        with SQLiteTokenStore(database) as store:
            store.count()  # makes the tables
        begun = time.process_time()
        fill(database, *args)
        return time.process_time() - begun


def _import(database: Path, path: Path) -> None:
    with redirect_stderr(io.StringIO()):
        status = commands.main(["import", "--db", str(database), str(path)], standalone_mode=False)
    if status:
        raise SystemExit(f"the import of {path} ended with {status}: nothing to compare")


def _by_hand(database: Path, path: Path, read: Callable[[Path], Iterator[Sequence[Any]]]) -> None:
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        rows = read(path)
        while batch := list(islice(rows, BATCH)):
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(_INSERT, batch)
            connection.execute("COMMIT")


def _read_csv(path: Path) -> Iterator[Sequence[Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        next(rows)
        for written, name, available, used, unlimited, expires_at, created_at in rows:
            stripped = written.removeprefix("sk-")
            yield (
                hashlib.sha256(stripped.encode()).digest(),
                stripped[-4:],
                name,
                int(available),
                int(used),
                unlimited == "true",
                int(expires_at),
                int(created_at),
            )


def _read_json_lines(path: Path) -> Iterator[Sequence[Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            stripped = row["key"].removeprefix("sk-")
            yield (hashlib.sha256(stripped.encode()).digest(), stripped[-4:], *(row[name] for name in _COLUMNS[1:]))


def _write_csv(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(",".join(_COLUMNS) + "\n")
        for number in range(count):
            file.write(f"sk-{key(number)},Token {number},987655,12345,false,0,1700000000\n")


def _write_json_lines(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            values = (f"sk-{key(number)}", f"Token {number}", 987655, 12345, False, 0, 1_700_000_000)
            file.write(json.dumps(dict(zip(_COLUMNS, values, strict=True))) + "\n")
