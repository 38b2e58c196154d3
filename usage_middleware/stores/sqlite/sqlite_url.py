"""Texts that name an SQLite file."""

from __future__ import annotations

from typing import Final

_SQLITE: Final = "sqlite:///"


def sqlite_path(text: str) -> str | None:
    """Return the path of the SQLite file that ``text`` names; ``None`` if it is the URL of something else.

    As in SQLAlchemy, the path after ``sqlite:///`` is relative, and after a fourth slash it is absolute.

    :raises ValueError: it is neither a path nor a URL of this form.
    """
    scheme, separator, _ = text.partition("://")
    if not separator:
        if "@tcp(" in text or "@unix(" in text:
            # This is the form in new-api's own configuration. It holds a password, so it is not shown.
            raise ValueError("the URL of a MySQL database has the form mysql://user:password@host/name")
        return text
    if scheme.partition("+")[0].lower() != "sqlite":
        return None
    path, question_mark, _ = text.removeprefix(_SQLITE).partition("?")
    if not text.startswith(_SQLITE) or question_mark:
        raise ValueError("the URL of an SQLite database has the form sqlite:///PATH, without options")
    return path
