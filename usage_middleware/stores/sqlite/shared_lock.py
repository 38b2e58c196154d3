"""Read the mode of a database from its file, and lock the file so that no program removes its log."""

from __future__ import annotations

import os
import struct
import sys
from contextlib import suppress
from typing import Final, Literal

with suppress(ImportError):  # not on Windows
    import fcntl

_HAS_LOCKS: Final = sys.platform == "linux"

_WAL_HEADER: Final = b"\2\2"  # the two bytes at 18: the versions of the file format (sqlite.org/fileformat.html, 1.3)

# The bytes that a reading connection has locked (in SQLite's sources, os.h: SHARED_FIRST and SHARED_SIZE). The last
# program to close a database locks all of them exclusively before it removes the log.
_FIRST: Final = 0x40000000 + 2
_LENGTH: Final = 510

# Descriptors that no call uses, by the process that has opened them and the device and inode of their file. No other
# file gets the same inode as long as one of them is open. They stay open: closing any descriptor of a file releases
# every lock that the process has on it, including those of SQLite's connections (sqlite.org/howtocorrupt.html, section
# 2.2). A child does not use those of its parent, as a lock of an open file would be the lock of both.
_unused: Final[dict[tuple[int, int, int], list[int]]] = {}


def is_wal(path: str) -> bool:
    """Return whether a database is in WAL mode, which stays with its file.

    :raises OSError: the file cannot be read.
    """
    with SharedLock(path) as lock:
        return os.pread(lock.descriptor(), len(_WAL_HEADER), 18) == _WAL_HEADER


class SharedLock:
    """A lock. While it is held, no program removes the log of a database or the index of the log.

    SQLite's own lock is not enough: SQLite takes it only after it has looked for a log, and creates one if there is
    none. This lock belongs to an open file and not to the process, so it is independent of SQLite's, and of that of
    another thread, which has opened the file for itself. Systems other than Linux do without it: the time in which
    another program may remove the log is short.

    Enter it twice, like a :class:`~.group_commit.Turn`.

    :raises OSError: the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptors: list[int] = []  # one, once it is needed

    def __enter__(self) -> SharedLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptors:
            self._set("F_UNLCK")
            _unused_of(os.fstat(self._descriptors[0])).append(self._descriptors.pop())

    def take(self) -> bool:
        """Take the lock, and return whether it is held. It is not if a program is about to remove the log."""
        try:
            self._set("F_RDLCK")
        except BlockingIOError:
            return False
        return True

    def descriptor(self) -> int:
        """Return a descriptor of the file, which nothing else uses until the end."""
        while not self._descriptors:
            unused = _unused_of(os.stat(self._path))
            try:
                self._descriptors.append(unused.pop())
            except IndexError:
                _close_removed()
                self._descriptors.append(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC))
        return self._descriptors[0]

    def _set(self, kind: Literal["F_RDLCK", "F_UNLCK"]) -> None:
        if _HAS_LOCKS:
            lock = struct.pack("hhqqi", getattr(fcntl, kind), os.SEEK_SET, _FIRST, _LENGTH, 0)  # struct flock
            fcntl.fcntl(self.descriptor(), fcntl.F_OFD_SETLK, lock)


def _unused_of(status: os.stat_result) -> list[int]:
    return _unused.setdefault((os.getpid(), status.st_dev, status.st_ino), [])


def _close_removed() -> None:
    """Close removed files, which would otherwise take space until this process ends."""
    for unused in list(_unused.values()):
        with suppress(IndexError):  # no more of them, perhaps because another thread closes them too
            while os.fstat(unused[-1]).st_nlink == 0:
                os.close(unused.pop())
