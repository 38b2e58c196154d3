"""SQLite's errors, explained for an operator. The texts hold no keys and no digests."""

from __future__ import annotations

import os
import sqlite3
from typing import Literal

from ...errors import StoreError

Intent = Literal["read", "write", "make"]


def is_busy(error: sqlite3.Error) -> bool:
    """Return whether another connection had a lock, so that a retry may succeed."""
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def locked(path: str, timeout: float) -> StoreError:
    return StoreError(f"{path} is locked: others held it for longer than the timeout of {timeout:g} s")


def explained(path: str, error: Exception, intent: Intent) -> StoreError:
    """Return the error for a store's caller.

    :param intent: what the file was opened for. ``"make"``: to write it, and to make it if it is missing.
    """
    text = str(error)
    if isinstance(error, OSError) or "unable to open" in text:
        return StoreError(f"{path} cannot be opened: {_why_not_openable(path, intent)}")
    if "not a database" in text:
        return StoreError(f"{path} is not an SQLite database")
    if "readonly" in text and intent == "read":
        # A program that was killed has left a journal or a log.
        return StoreError(f"{path} was left in the middle of a transaction; open it once for writing")
    if "readonly" in text:
        return StoreError(f"{path} cannot be written: the file or its folder is read-only")
    return StoreError(f"{path} failed: {text}")


def _why_not_openable(path: str, intent: Intent) -> str:
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        return "it is a directory"
    if not os.path.isdir(folder):
        return f"there is no directory {folder}"
    if intent != "make" and not os.path.exists(path):
        return "there is no such file"
    if intent == "read":
        return "this process may not read it, or the files -wal and -shm beside it"
    return "this process may not read and write the file and its folder"
