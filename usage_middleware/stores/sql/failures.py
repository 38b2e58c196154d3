"""What an error of a database means: whether the connection is lost, whether the call may be repeated, and what the
operator needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ...errors import StoreError

# Errors after which the server has rolled the transaction back: serialization_failure and deadlock_detected
# (PostgreSQL's manual, 13.5; MySQL's, 17.7.5.3 "How to Minimize and Handle Deadlocks").
_ROLLED_BACK_STATES: Final = ("40001", "40P01")
_ROLLED_BACK_NUMBERS: Final = (1213,)
_INTEGRITY_CLASS: Final = "23"


class Failures:
    """The errors of one engine: SQLAlchemy's, and those of its driver that SQLAlchemy has not wrapped."""

    def __init__(self, engine: Engine, name: str, timeout: float) -> None:
        self._is_disconnect: Callable[..., bool] = engine.dialect.is_disconnect
        self._name = name
        self._timeout = timeout
        driver = engine.dialect.loaded_dbapi
        self._driver_error: type[Exception] = driver.Error
        self._integrity_error: type[Exception] = driver.IntegrityError
        self._operational_error: type[Exception] = driver.OperationalError
        # Errors whose text comes from the driver and quotes values.
        self._quoting = (driver.DataError, driver.IntegrityError)
        #: What an ``except`` takes.
        self.caught: tuple[type[Exception], ...] = (SQLAlchemyError, driver.Error)

    def is_lost(self, error: Exception, connection: Any) -> bool:
        """Return whether an error means that a driver's connection cannot be used any more."""
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return True
        original = _original(error)
        if not isinstance(original, self._driver_error):
            return False
        return connection is None or self._is_disconnect(original, connection, None) or self._is_unanswered(original)

    def _is_unanswered(self, error: Exception) -> bool:
        """Return whether an error is the driver's own, and not the server's answer.

        psycopg takes a connection for open whose socket has an error that libpq has not seen yet. Then SQLAlchemy
        does, too.
        """
        return isinstance(error, self._operational_error) and hasattr(error, "sqlstate") and error.sqlstate is None

    def is_conflict(self, error: Exception) -> bool:
        """Return whether the server's answer is that another call was in the way, so this one may begin again."""
        # If two calls add the same row, the other call's row is there when this one is retried.
        return has_rolled_back(error) or isinstance(_original(error), self._integrity_error)

    def unknown(self, error: Exception) -> StoreError:
        return StoreError(
            f"{self._name} was lost while a transaction was to be committed, and it is not known whether it was; "
            "a call with an idempotency_key is safe to repeat with the same one"
        )

    def explained(self, error: Exception, *, is_late: bool) -> StoreError:
        """Return what the operator needs to know of an error. Leave out what may quote a value, such as a digest."""
        original = _original(error)
        reason = type(original).__name__
        if isinstance(original, self._driver_error) and not isinstance(original, self._quoting):
            # The driver's text is the last argument. Only its first line is shown: the others are details.
            text = str(original.args[-1]) if original.args else ""
            reason = f"{reason}: {text.partition(chr(10))[0]}"
        if is_late:
            return StoreError(f"{self._name} did not answer within {self._timeout:g} s: {reason}")
        return StoreError(f"{self._name} failed: {reason}")

    def cause(self, error: Exception) -> Exception | None:
        """Return the error in a form whose traceback shows no parameters, to chain as a cause."""
        if isinstance(_original(error), self._quoting):
            return None
        if isinstance(error, DBAPIError):
            error.hide_parameters = True
        return error


def has_rolled_back(error: Exception) -> bool:
    """Return whether the server has rolled the transaction back, so that it can be retried."""
    original = _original(error)
    number = original.args[0] if original.args else None
    return _state(original) in _ROLLED_BACK_STATES or number in _ROLLED_BACK_NUMBERS


def is_refused(error: Exception) -> bool:
    """Return whether PostgreSQL's answer to COMMIT is that a constraint which waits for it does not hold."""
    return (_state(_original(error)) or "").startswith(_INTEGRITY_CLASS)


def _state(error: BaseException) -> str | None:
    # psycopg has sqlstate, psycopg2 has pgcode.
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


def _original(error: Exception) -> BaseException:
    """Return the driver's error, which SQLAlchemy's wraps."""
    return error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
