"""HTTP: the middleware, the endpoint, and what they share. Knows no concrete store."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication


def application(options: str | None = None) -> WSGIApplication:
    """Return what ``usage-middleware serve`` serves, for a WSGI server to load.

    .. code-block:: console

        $ gunicorn "usage_middleware.wsgi:application('--db tokens.db --upstream http://127.0.0.1:3000')"

    See :func:`usage_middleware.service.application.application`. It is here for its short name, and loads
    that module when it is called, as nothing else in this package knows how a store is opened.
    """
    made: WSGIApplication = import_module("usage_middleware.service.application").application(options)
    return made
