"""Connections to an SQLite database that another program keeps: they read it, and leave the file and its folder alone.

``mode=ro`` alone is not enough. Where a database is in WAL mode and nobody has it open, even a reader makes the files
``-wal`` and ``-shm`` beside it, and leaves them there (sqlite.org/wal.html, "Read-Only Databases"). They are the
reader's own then, and a program that runs as another user cannot write its own database any more.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path
from typing import Final

from ...errors import StoreError

_TIMEOUT: Final = 5.0  # seconds in which a writer should be done with its commit

_WAL_HEADER: Final = b"\2\2"  # the two bytes at 18: the versions of the file format (sqlite.org/fileformat.html, 1.3)


class Reader(sqlite3.Connection):
    """A connection that cannot write. Made by :func:`connect`."""

    _path: str
    _process: int
    _frozen: object = None

    def is_true(self) -> bool:
        """Whether what it has read up to now is what was there. If not, somebody else wrote meanwhile: read again."""
        try:
            return self._frozen is None or self._frozen == _frozen_state(self._path)
        except OSError:  # It was taken away.
            return False

    def close(self) -> None:
        super().close()
        _readers.discard(self)


# Those that are open. One that was inherited over a fork stays: an object that is freed closes its connection.
_readers: Final[set[Reader]] = set()


def connect(path: str) -> Reader:
    """Opens the database at ``path`` to read it. Makes no file, whatever is there.

    :raises StoreError: it cannot be opened.
    :raises sqlite3.Error: it cannot be opened, either.
    """
    file = os.path.realpath(path)  # SQLite looks for the log beside the file that a symbolic link leads to
    if any(reader._process != os.getpid() and reader._path == file for reader in list(_readers)):
        # SQLite's record of the locks that a process has lies in the process's memory, and was copied: it would take
        # none of its own here (sqlite.org/howtocorrupt.html, section 2.6).
        raise StoreError(f"{path} was being read when this process was forked; fork while no other thread reads it")
    try:
        frozen = _frozen_state(file)
    except FileNotFoundError:
        raise StoreError(f"there is no file {path}") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}") from None
    # SQLite takes no lock on an immutable file and looks for no files beside it (sqlite.org/uri.html). It is not that;
    # but as long as there is no log, nobody writes, and is_true() tells of one who came after this.
    options = "mode=ro" if frozen is None else "mode=ro&immutable=1"
    reader = sqlite3.connect(
        f"{Path(file).as_uri()}?{options}",
        uri=True,
        timeout=_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
        factory=Reader,
    )
    reader._path, reader._process, reader._frozen = file, os.getpid(), frozen
    _readers.add(reader)
    # A name that is no UTF-8 is that row's matter, not that of all those that are read with it.
    reader.text_factory = _decode
    return reader


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _frozen_state(path: str) -> object:
    """What shows that a database in WAL mode, which nobody has open, was not written; ``None``: it is not like that.

    Who writes one has a log as long as it is open, and the file changes before the log goes.
    """
    status = os.stat(path)
    if os.path.exists(f"{path}-wal") or not _is_wal(path, status):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


# Of each path. They stay open: to close any descriptor of a file gives up every lock that the process has on it, those
# of SQLite's connections too (sqlite.org/howtocorrupt.html, section 2.2).
_descriptors: Final[dict[str, int]] = {}
_descriptors_lock = threading.Lock()


def _is_wal(path: str, status: os.stat_result) -> bool:
    with _descriptors_lock:
        descriptor = _descriptors.get(path)
        if descriptor is None or not os.path.samestat(os.fstat(descriptor), status):
            _descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            # A file that was removed is nobody's any more, and would take its space until this process ends.
            if descriptor is not None and os.fstat(descriptor).st_nlink == 0:
                os.close(descriptor)
        return os.pread(_descriptors[path], len(_WAL_HEADER), 18) == _WAL_HEADER


def _after_fork() -> None:
    # Another thread may have held it.
    global _descriptors_lock
    _descriptors_lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(after_in_child=_after_fork)


def columns(path: str, table: str) -> set[str]:
    """The names of a table's columns; none where there is no such table, or ``path`` is no database.

    :raises StoreError: the file cannot be opened.
    """
    while True:
        try:
            reader = connect(path)
        except sqlite3.Error as error:
            raise StoreError(f"{path} failed: {error}") from error
        try:
            rows = reader.execute("SELECT name FROM pragma_table_info(?)", (table,)).fetchall()
            if reader.is_true():
                return {name for (name,) in rows}
        except sqlite3.Error as error:
            if "not a database" in str(error):
                return set()
            if reader.is_true():
                raise StoreError(f"{path} failed: {error}") from error
        finally:
            reader.close()
