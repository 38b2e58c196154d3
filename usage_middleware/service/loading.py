"""The application that ``--app`` names."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from werkzeug.utils import ImportStringError, import_string

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication


def load_application(name: str) -> WSGIApplication:
    """Import and return the WSGI application that ``module:attribute`` names. The working directory is searched too.

    :raises ValueError: there is no such application. The message says why in one line.
    """
    if not all(name.partition(":")[::2]):
        raise ValueError(f"{name!r} is not of the form module:attribute, such as wsgi:application")
    sys.path.insert(0, os.getcwd())
    try:
        application = import_string(name)
    except ImportStringError as error:
        reason = error.exception
    except Exception as error:
        reason = error
    else:
        if not callable(application):
            raise ValueError(f"{name} is of the type {type(application).__name__}, not a WSGI application")
        return application  # type: ignore[no-any-return]
    text = str(reason).partition("\n")[0]
    raise ValueError(f"cannot import {name}: {type(reason).__name__}: {text}") from None
