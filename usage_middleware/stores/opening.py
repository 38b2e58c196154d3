"""The store that a text names."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from .memory import MemoryTokenStore
from .sqlite.reading import columns
from .sqlite.sqlite_store import SQLiteTokenStore

if TYPE_CHECKING:
    from .base import QuotaStore

_MEMORY: Final = "memory:"
_SQLITE: Final = "sqlite:///"

#: Stores that load SQLAlchemy, and their modules: not before they are named, as a service without them has no need.
NEED_SQLALCHEMY: Final = {"SQLAlchemyTokenStore": ".sql.sql_store", "NewAPITokenStore": ".new_api.new_api_store"}

_NEW_API_COLUMNS: Final = {"key", "remain_quota"}


def open_store(text: str) -> QuotaStore:
    """The store that ``text`` names; nothing is opened or connected before its first use.

    ======================================================== =============================
    ``"tokens.db"``, ``"sqlite:///tokens.db"``               :class:`SQLiteTokenStore`
    ``"postgresql://user:password@host/name"``, ``"mysql…"`` :class:`SQLAlchemyTokenStore`
    ``"memory:"``                                            :class:`MemoryTokenStore`
    ======================================================== =============================

    The path behind ``sqlite:///`` is relative, behind a fourth slash absolute, as SQLAlchemy has it.

    :raises TypeError, ValueError: it names no store.
    :raises ImportError: the extra ``sql`` is not installed, and the database needs it.
    """
    if not isinstance(text, str):
        raise TypeError(f"a store is named by a str, got {type(text).__name__}")
    if text == _MEMORY:
        return MemoryTokenStore()
    path = sqlite_path(text)
    if path is not None:
        return SQLiteTokenStore(path)
    store: QuotaStore = load("SQLAlchemyTokenStore")(text)
    return store


def sqlite_path(text: str) -> str | None:
    """The path of the SQLite file that ``text`` names; ``None`` where it is another database's URL.

    :raises ValueError: it is neither.
    """
    scheme, separator, _ = text.partition("://")
    if not separator:
        if "@tcp(" in text or "@unix(" in text:
            # What new-api itself is told. It holds a password, so it is not shown.
            raise ValueError("the URL of a MySQL database has the form mysql://user:password@host/name")
        return text
    if scheme.partition("+")[0] != "sqlite":
        return None
    path, question_mark, _ = text.removeprefix(_SQLITE).partition("?")
    if not text.startswith(_SQLITE) or question_mark:
        raise ValueError("the URL of an SQLite database has the form sqlite:///PATH, without options")
    return path


def is_new_api(text: str) -> bool:
    """Whether the database that ``text`` names is one of new-api, for which :class:`NewAPITokenStore` is.

    Nothing is written, and nothing is made that is not there.

    :raises ValueError: it names no database.
    :raises StoreError: the database cannot be asked.
    :raises ImportError: the extra ``sql`` is not installed, and the database needs it. An SQLite file does not.
    """
    if text == _MEMORY:
        return False
    path = sqlite_path(text)
    if path is None:
        load("NewAPITokenStore")
        from .new_api import new_api_store as new_api

        return new_api.is_new_api(text)
    return os.path.isfile(path) and columns(os.path.abspath(path), "tokens") >= _NEW_API_COLUMNS


def load(name: str) -> Any:
    """A class of :data:`NEED_SQLALCHEMY`.

    :raises ImportError: SQLAlchemy is not installed.
    """
    try:
        return getattr(import_module(NEED_SQLALCHEMY[name], __package__), name)
    except ModuleNotFoundError as error:
        if error.name != "sqlalchemy":
            raise
        raise ImportError(f"{name} needs SQLAlchemy; pip install 'usage-middleware[sql]' brings it") from None
