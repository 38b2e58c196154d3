"""Which requests are free: those to paths with certain prefixes, unless the path may lead out of them again."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# Some services take these for a step to another path or for the end of this one: a backslash, a control character, an
# escape that has been escaped.
_UNSAFE: Final = re.compile(r"[\\%\x00-\x1f\x7f]")
# A segment of only dots. Some services drop parameters after ";" (RFC 3986 section 3.3), or spaces at its end.
_DOTS: Final = re.compile(r"[. ]*(?:;.*)?")


def exemption(exempt: Collection[str] | Callable[[WSGIEnvironment], bool]) -> Callable[[WSGIEnvironment], bool]:
    """Return a function that decides whether a request is free.

    :param exempt: that function, or path prefixes: ``"/static/"`` covers everything below it, ``"/health"`` also the
        path itself.
    :raises TypeError: it is neither a function nor a collection of ``str``.
    :raises ValueError: a prefix does not begin with a slash, or covers every path.
    """
    if callable(exempt):
        return exempt
    if isinstance(exempt, (str, bytes)) or not isinstance(exempt, Collection):
        raise TypeError(f"exempt must be a collection of path prefixes such as ('/static/',), got {exempt!r}")
    # PATH_INFO is compared as it is: the bytes of the path, as Latin-1 (PEP 3333, "Unicode Issues").
    prefixes = tuple(_checked(prefix).encode("utf-8").decode("latin-1") for prefix in exempt)
    if not prefixes:
        return _nothing

    def is_exempt(environ: WSGIEnvironment) -> bool:
        path: str = environ.get("PATH_INFO", "")
        return path.startswith(prefixes) and any(_is_below(path, prefix) for prefix in prefixes)

    return is_exempt


def _nothing(environ: WSGIEnvironment) -> bool:
    return False


def _is_below(path: str, prefix: str) -> bool:
    """Return whether a path is the prefix itself, or is surely below it."""
    if not path.startswith(prefix):
        return False
    rest = path[len(prefix) :]
    if not rest:
        return True
    if not prefix.endswith("/"):
        if not rest.startswith("/"):
            return False
        rest = rest[1:]
    # An empty segment at the end is only a slash there.
    segments = rest.removesuffix("/").split("/") if rest else ()
    return not _UNSAFE.search(rest) and not any(map(_DOTS.fullmatch, segments))


def _checked(prefix: str) -> str:
    if not isinstance(prefix, str):
        raise TypeError(f"exempt must hold str, got {prefix!r}")
    if not prefix.startswith("/") or prefix == "/":
        raise ValueError(f"exempt must hold path prefixes such as '/static/' or '/health', got {prefix!r}")
    return prefix
