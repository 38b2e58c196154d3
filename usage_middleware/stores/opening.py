"""The store that a text names."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from .memory import MemoryTokenStore
from .sqlite import SQLiteTokenStore

if TYPE_CHECKING:
    from .base import QuotaStore

_MEMORY: Final = "memory:"
_SQLITE: Final = "sqlite:///"

#: Stores that load SQLAlchemy, and their modules: not before they are named, as a service without them has no need.
NEED_SQLALCHEMY: Final = {"SQLAlchemyTokenStore": ".sqlalchemy"}


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
    scheme, separator, _ = text.partition("://")
    if not separator:
        return SQLiteTokenStore(text)
    if scheme.partition("+")[0] == "sqlite":
        path, question_mark, _ = text.removeprefix(_SQLITE).partition("?")
        if not text.startswith(_SQLITE) or question_mark:
            raise ValueError("the URL of an SQLite database has the form sqlite:///PATH, without options")
        return SQLiteTokenStore(path)
    store: QuotaStore = load("SQLAlchemyTokenStore")(text)
    return store


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
