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

# By device and inode. No other file gets the same inode as long as this one is open. The files stay open: closing any
# descriptor of a file releases every lock that the process has on it, including those of SQLite's connections
# (sqlite.org/howtocorrupt.html, section 2.2).
_descriptors: Final[dict[tuple[int, int], int]] = {}


def is_wal(path: str) -> bool:
    """Return whether a database is in WAL mode, which stays with its file.

    :raises OSError: the file cannot be read.
    """
    return os.pread(_descriptor(path), len(_WAL_HEADER), 18) == _WAL_HEADER


class SharedLock:
    """A lock. While it is held, no program removes the log of a database or the index of the log.

    SQLite's own lock is not enough: SQLite takes it only after it has looked for a log, and creates one if there is
    none. This lock belongs to an open file and not to the process, so it is independent of SQLite's. Systems other than
    Linux do without it: the time in which another program may remove the log is short.

    Enter it twice, like a :class:`~.group_commit.Turn`.

    :raises OSError: the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = _descriptor(path)

    def __enter__(self) -> SharedLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._set("F_UNLCK")

    def take(self) -> bool:
        """Take the lock, and return whether it is held. It is not if a program is about to remove the log."""
        try:
            self._set("F_RDLCK")
        except BlockingIOError:
            return False
        return True

    def _set(self, kind: Literal["F_RDLCK", "F_UNLCK"]) -> None:
        if _HAS_LOCKS:
            lock = struct.pack("hhqqi", getattr(fcntl, kind), os.SEEK_SET, _FIRST, _LENGTH, 0)  # struct flock
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, lock)


def _descriptor(path: str) -> int:
    status = os.stat(path)
    descriptor = _descriptors.get((status.st_dev, status.st_ino))
    if descriptor is None:
        _close_removed()
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        opened = os.fstat(descriptor)
        _descriptors.setdefault((opened.st_dev, opened.st_ino), descriptor)
    return descriptor


def _close_removed() -> None:
    """Close removed files, which would otherwise take space until this process ends."""
    for file, descriptor in list(_descriptors.items()):
        # Only one thread gets the descriptor, and closes it.
        if os.fstat(descriptor).st_nlink == 0 and _descriptors.pop(file, None) is not None:
            os.close(descriptor)
