"""What is well with an SQLite database, and what is not."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from ..findings import Finding, ok, problem, warning

_MOST_DAMAGES: Final = 5  # that are told
_LARGE_LOG: Final = 100 * 2**20  # bytes; SQLite means to begin anew at about 4 MiB (1,000 pages)


def findings(path: str) -> Iterator[Finding]:
    """Looks at the database without changing it; its tables are this package's."""
    yield _version(sqlite3.sqlite_version_info)
    yield from _permissions(path)
    with closing(sqlite3.connect(f"{Path(path).as_uri()}?mode=ro", uri=True)) as connection:
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        if mode == "wal":
            yield ok("journal mode is WAL")
        else:
            yield problem(f"journal mode is {mode!r}: readers and writers wait for each other; PRAGMA journal_mode=WAL")
        damage = _damage(connection)
        if damage == "ok":
            yield ok("the file is sound (PRAGMA quick_check)")
        else:
            yield problem(f"the file is damaged: {damage}; restore it from a copy")
    yield _log(path)


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether SQLite may, very rarely, damage a file when a checkpoint and a writer race: sqlite.org/wal.html, section
    "The WAL Reset Bug", which names the releases that mended it."""
    return not ((3, 44, 6) <= version < (3, 45) or (3, 50, 7) <= version < (3, 51) or version >= (3, 51, 3))


def _version(version: tuple[int, ...]) -> Finding:
    text = f"SQLite {'.'.join(map(str, version))}"
    if has_wal_reset_bug(version):
        return warning(
            f"{text} has the WAL reset bug: a checkpoint that races a writer can, very rarely, damage the file; "
            "3.51.3 or newer has not"
        )
    return ok(text)


def _permissions(path: str) -> Iterator[Finding]:
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & stat.S_IWOTH:
        yield problem(f"permissions are {mode:o}: everybody on this machine can change the quotas; chmod o= {path}")
    elif mode & stat.S_IROTH:
        yield warning(f"permissions are {mode:o}: everybody on this machine can read names and quotas; chmod o= {path}")
    else:
        yield ok(f"permissions are {mode:o}")
    folder = os.path.dirname(path)
    for place in (path, f"{path}-wal", f"{path}-shm", folder):
        if os.path.exists(place) and not os.access(place, os.W_OK):
            yield problem(f"this user may not write {place}, which charging needs (SQLite's own files stand beside it)")


def _damage(connection: sqlite3.Connection) -> str:
    try:
        return "; ".join(text for (text,) in connection.execute(f"PRAGMA quick_check({_MOST_DAMAGES})"))
    except sqlite3.DatabaseError as error:
        return str(error)


def _log(path: str) -> Finding:
    size = os.path.getsize(f"{path}-wal") if os.path.exists(f"{path}-wal") else 0
    text = f"the write-ahead log has {size:,} bytes"
    if size > _LARGE_LOG:
        return warning(f"{text}: somebody reads for so long that it cannot begin anew")
    return ok(text)
