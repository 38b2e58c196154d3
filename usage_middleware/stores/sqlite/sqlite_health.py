"""Check an SQLite database."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from typing import Final

from ..findings import Finding, ok, problem, warning
from . import reading, sqlite_errors
from .shared_lock import is_wal

_MOST_DAMAGES: Final = 5  # of a damaged file that are listed
_LARGE_LOG: Final = 100 * 2**20  # bytes; SQLite starts the log again at about 4 MiB (1,000 pages)


def findings(path: str) -> Iterator[Finding]:
    """Check the database and yield one finding per check. Neither it nor its folder changes.

    :raises StoreError: it cannot be read.
    """
    yield _version(sqlite3.sqlite_version_info)
    yield from _permissions(path)
    try:
        mode, damage = reading.look(path, _examine)
    except sqlite3.Error as error:
        raise sqlite_errors.explained(path, error, "read") from error
    # A connection that leaves no log behind cannot read one either.
    if is_wal(path):
        yield ok("journal mode is WAL")
    else:
        yield problem(f"journal mode is {mode!r}: readers and writers wait for each other; PRAGMA journal_mode=WAL")
    if damage == "ok":
        yield ok("the file is sound (PRAGMA quick_check)")
    else:
        yield problem(f"the file is damaged: {damage}; restore it from a copy")
    yield _log(path)


def _examine(connection: sqlite3.Connection) -> tuple[str, str]:
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    return str(mode), _damage(connection)


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Return whether this SQLite may, very rarely, damage a file when a checkpoint and a writer race.

    See sqlite.org/wal.html, section "The WAL Reset Bug", which names the releases that fixed it.
    """
    return not ((3, 44, 6) <= version < (3, 45) or (3, 50, 7) <= version < (3, 51) or version >= (3, 51, 3))


def _version(version: tuple[int, ...]) -> Finding:
    text = f"SQLite {'.'.join(map(str, version))}"
    if has_wal_reset_bug(version):
        return warning(
            f"{text} has the WAL reset bug: a checkpoint that races a writer can, very rarely, damage the file; "
            "3.51.3 or newer does not have it"
        )
    return ok(text)


def _permissions(path: str) -> Iterator[Finding]:
    folder = os.path.dirname(os.path.realpath(path))
    # SQLite's own files hold the newest rows. The first user of the database has made them.
    files = [file for file in (path, f"{path}-wal", f"{path}-shm") if os.path.exists(file)]
    modes = {file: stat.S_IMODE(os.stat(file).st_mode) for file in files}
    folder_mode = os.stat(folder).st_mode
    is_open = any(mode & (stat.S_IROTH | stat.S_IWOTH) for mode in modes.values())
    if not _others_enter(folder):
        place = ", in a folder that other users cannot enter" if is_open else ""
        yield ok(f"permissions are {modes[path]:o}{place}")
    elif folder_mode & stat.S_IWOTH and not folder_mode & stat.S_ISVTX:
        yield problem(
            f"permissions of {folder} let every user of this machine replace the database; chmod o-w {folder}"
        )
    elif not is_open:
        yield ok(f"permissions are {modes[path]:o}")
    else:
        for file, mode in modes.items():
            what = f"permissions {'' if file == path else f'of {file} '}are {mode:o}"
            if mode & stat.S_IWOTH:
                yield problem(f"{what}: every user of this machine can change the quotas; chmod o= {file}")
            elif mode & stat.S_IROTH:
                yield warning(f"{what}: every user of this machine can read names and quotas; chmod o= {file}")
    for place in (*files, folder):
        if not os.access(place, os.W_OK):
            yield problem(f"this user may not write {place}, which charging needs (SQLite's own files stand beside it)")


def _others_enter(folder: str) -> bool:
    """Return whether users who are neither owner nor in the group reach the files of a folder."""
    while True:
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return False
        parent = os.path.dirname(folder)
        if parent == folder:
            return True
        folder = parent


def _damage(connection: sqlite3.Connection) -> str:
    try:
        return "; ".join(text for (text,) in connection.execute(f"PRAGMA quick_check({_MOST_DAMAGES})"))
    except sqlite3.DatabaseError as error:
        return str(error)


def _log(path: str) -> Finding:
    size = os.path.getsize(f"{path}-wal") if os.path.exists(f"{path}-wal") else 0
    text = f"the write-ahead log has {size:,} bytes"
    if size > _LARGE_LOG:
        return warning(f"{text}: a reader stays for so long that it cannot begin again")
    return ok(text)
