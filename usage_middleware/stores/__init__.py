"""The kinds of stores, and which of them a text names. No other module knows what exists.

=============================================================== ================================================
``tokens.db``, ``sqlite:///tokens.db``                          :class:`~usage_middleware.SQLiteTokenStore`
``postgresql://user:password@host/name``, ``mysql://``,         :class:`~usage_middleware.SQLAlchemyTokenStore`
``mariadb://``, each also with a driver: ``mysql+mysqldb://``
``memory:``                                                     :class:`~usage_middleware.MemoryTokenStore`
``new-api+postgresql://…``, ``new-api+sqlite:///one-api.db``,   :class:`~usage_middleware.NewAPITokenStore`
and the path of an SQLite file that has new-api's tokens
another scheme                                                  what a package has registered for it
=============================================================== ================================================

A package adds a kind by an entry point of the group ``usage_middleware.stores``, named by the scheme of its URLs
(in ``pyproject.toml``: ``[project.entry-points."usage_middleware.stores"]``, ``acme = "acme.stores:open_store"``). It
is a callable that takes the whole URL and the keyword ``read_only``, and returns a :class:`QuotaStore`.

Nothing in the packages below imports from here, and this imports a store when it is named. A service that uses
one kind does not load the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final

from ..errors import StoreError
from ..extras import how_to_install
from .sqlite.sqlite_url import sqlite_path

if TYPE_CHECKING:
    from .base import QuotaStore

#: The group of entry points in which packages register their stores.
ENTRY_POINTS: Final = "usage_middleware.stores"

MEMORY: Final = "memory:"
NEW_API: Final = "new-api+"

_SERVERS: Final = ("postgresql", "postgres", "cockroachdb", "mysql", "mariadb")
_SHOWN: Final = ("the path of a file", "sqlite:///", "postgresql://", "mysql://", "mariadb://", MEMORY)
_URL: Final = re.compile(r"([a-z][a-z0-9+._-]*)://", re.IGNORECASE)  # RFC 3986, 3.1, and names of drivers
# The URL of a server without its "//". As the path of a file it would be shown, with its password.
_SLIP: Final = re.compile(rf"(?:{re.escape(NEW_API)})?(?:{'|'.join(_SERVERS)})(?:\+\w+)?:", re.IGNORECASE)
_NEW_API_COLUMNS: Final = {"key", "remain_quota"}

#: Classes that load SQLAlchemy, and their modules. They are imported when they are named.
NEED_SQLALCHEMY: Final = {"SQLAlchemyTokenStore": ".sql.sql_store", "NewAPITokenStore": ".new_api.new_api_store"}

_Opener = Callable[[str, bool], Any]


def open_store(text: str, *, read_only: bool = False) -> QuotaStore | Any:
    """Return the store that ``text`` names. Nothing is connected before its first use.

    :param text: the path of an SQLite file, the URL of a database, or ``memory:``. If the file is a database of
        new-api, the store is a :class:`NewAPITokenStore`, which is not a :class:`QuotaStore` and only reads. A server
        is not asked, so the URL of a new-api database on a server needs ``new-api+`` in front.
    :param read_only: the store never writes, creates no tables, and needs no permission to write.
    :raises TypeError, ValueError: it does not name a store; the message lists what does.
    :raises ImportError: a package that the store needs is not installed; the message says how to install it.
    :raises StoreError: what a package has registered is not a store.
    """
    return _opener(text)(text, read_only)


def open_and_ask(text: str, *, read_only: bool = False) -> QuotaStore | Any:
    """Like :func:`open_store`, but ask a server at once whether its database is one of new-api.

    A command uses the store at once anyway, so its user need not write ``new-api+`` in front.

    :raises StoreError: the server cannot be asked.
    """
    opener = _opener(text)
    if opener is _open_server and is_new_api(text):
        opener = _open_new_api
    return opener(text, read_only)


def file_path(text: str) -> str | None:
    """Return the path of the SQLite file that ``text`` names, of whichever program; ``None`` if it names none.

    :raises TypeError, ValueError: it does not name a store.
    """
    opener = _opener(text)
    if opener not in (_open_file, _open_new_api):
        return None
    return sqlite_path(_unmarked(text))


@contextmanager
def open_earlier(text: str, *, upgrade: bool) -> Iterator[QuotaStore | Any]:
    """Yield a store to read what has tables of an earlier version (:meth:`QuotaStore.tables_state`).

    An SQLite file stays as it is: a temporary copy of it is upgraded, and read.

    :param upgrade: upgrade what cannot be copied, as the next process that writes would.
    :raises StoreError: it cannot be copied, and is not to be upgraded.
    """
    path = file_path(text)
    if path is not None:
        from .sqlite.copying import temporary_copy
        from .sqlite.sqlite_store import SQLiteTokenStore

        with temporary_copy(os.path.abspath(path)) as copy, SQLiteTokenStore(copy, synchronous="OFF") as store:
            yield store
    elif upgrade:
        with open_store(text) as store:
            yield store
    else:
        raise StoreError(
            "the tables of this database are those of an earlier version; any service or command that writes upgrades "
            "them"
        )


def is_new_api(text: str) -> bool:
    """Return whether the database that ``text`` names is one of new-api and has no tables of ours.

    It writes nothing, and makes nothing that is not there.

    :raises ValueError: it does not name a database.
    :raises StoreError: the database cannot be asked.
    :raises ImportError: a package that the database needs is not installed.
    """
    opener = _opener(text)
    if opener is _open_file:
        return _is_new_api_file(_path(text))
    if opener is _open_server:
        load("SQLAlchemyTokenStore")  # if it is missing, the message names what the caller named
        from .new_api import new_api_store

        return new_api_store.is_new_api(_lowered(text))
    return opener is _open_new_api


def load(name: str) -> Any:
    """Return a class of :data:`NEED_SQLALCHEMY`.

    :raises ImportError: SQLAlchemy is not installed.
    """
    try:
        return getattr(import_module(NEED_SQLALCHEMY[name], __package__), name)
    except ModuleNotFoundError as error:
        if error.name != "sqlalchemy":
            raise
        raise ImportError(f"{name} needs SQLAlchemy: {how_to_install('sql')}") from None


def _opener(text: object) -> _Opener:
    """Return what opens the kind of store that a text names, without a look at the file or the server."""
    if not isinstance(text, str):
        raise TypeError(f"a store is named by a str, got {type(text).__name__}")
    if text == MEMORY:
        return _open_memory
    if "://" not in text and not _SLIP.match(text):
        return _open_file
    match = _URL.match(text)
    if match is None:
        # Without the text, here and below: it may hold a password.
        raise ValueError("the URL of a database has the form postgresql://user:password@host/name")
    scheme = match[1].lower()
    if _is_marked(text):
        return _open_new_api
    family = scheme.partition("+")[0]
    if family == "sqlite":
        return _open_file
    if family in _SERVERS:
        return _open_server
    return _registered(scheme) or _registered(family) or _unknown(scheme)


def _open_memory(text: str, read_only: bool) -> Any:
    from .memory import MemoryTokenStore

    return MemoryTokenStore()


def _open_file(text: str, read_only: bool) -> Any:
    path = _path(text)
    try:
        is_foreign = _is_new_api_file(path)
    except StoreError:
        is_foreign = False  # The first use says what is wrong with the file; it does not keep a host from starting.
    if is_foreign:
        return _open_new_api(text, read_only)
    from .sqlite.sqlite_store import SQLiteTokenStore

    return SQLiteTokenStore(path, read_only=read_only)


def _open_server(text: str, read_only: bool) -> Any:
    return load("SQLAlchemyTokenStore")(_lowered(text), read_only=read_only)


def _lowered(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    return scheme.lower() + separator + rest


def _open_new_api(text: str, read_only: bool) -> Any:
    return load("NewAPITokenStore")(_unmarked(text))


def _is_marked(text: str) -> bool:
    return text[: len(NEW_API)].lower() == NEW_API


def _unmarked(text: str) -> str:
    return text[len(NEW_API) :] if _is_marked(text) else text


def _registered(scheme: str) -> _Opener | None:
    """Return what opens the stores that a package has registered for a scheme."""
    found = {point.value: point for point in _entry_points() if point.name.lower() == scheme}
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"several packages have a store for {scheme}://: {', '.join(sorted(found))}; uninstall all but one"
        )
    (point,) = found.values()
    return lambda text, read_only: _checked(point, _loaded(point)(text, read_only=read_only))


def _loaded(point: EntryPoint) -> Callable[..., Any]:
    try:
        loaded = point.load()
    except Exception as error:
        raise ImportError(
            f"the store for {point.name}:// ({point.value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not callable(loaded):
        raise StoreError(f"the entry point for {point.name}:// ({point.value}) is not a callable")
    return loaded  # type: ignore[no-any-return]


def _checked(point: EntryPoint, store: object) -> object:
    from .base import QuotaStore

    if not isinstance(store, QuotaStore):
        raise StoreError(f"{point.value} must return a QuotaStore for {point.name}://, got {type(store).__name__}")
    return store


def _unknown(scheme: str) -> _Opener:
    installed = sorted({f"{point.name}://" for point in _entry_points()})
    raise ValueError(f"there is no store for {scheme}://; a store is named by {', '.join([*_SHOWN, *installed])}")


def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINTS))


def _path(text: str) -> str:
    path = sqlite_path(text)
    assert path is not None
    return path


def _is_new_api_file(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    from .sqlite.reading import columns

    return columns(os.path.abspath(path), "tokens") >= _NEW_API_COLUMNS
