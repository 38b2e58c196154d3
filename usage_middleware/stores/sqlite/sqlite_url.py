"""How a text names an SQLite file."""

from __future__ import annotations

from typing import Final

_SQLITE: Final = "sqlite:///"


def sqlite_path(text: str) -> str | None:
    """Return the path of the SQLite file that ``text`` names; ``None`` if it is the URL of something else.

    The path behind ``sqlite:///`` is relative, behind a fourth slash absolute, as SQLAlchemy has it.

    :raises ValueError: it is neither.
    """
    scheme, separator, _ = text.partition("://")
    if not separator:
        if "@tcp(" in text or "@unix(" in text:
            # What new-api itself is configured with. It holds a password, so it is not shown.
            raise ValueError("the URL of a MySQL database has the form mysql://user:password@host/name")
        return text
    if scheme.partition("+")[0].lower() != "sqlite":
        return None
    path, question_mark, _ = text.removeprefix(_SQLITE).partition("?")
    if not text.startswith(_SQLITE) or question_mark:
        raise ValueError("the URL of an SQLite database has the form sqlite:///PATH, without options")
    return path
