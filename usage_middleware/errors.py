"""The exceptions. All derive from :class:`UsageMiddlewareError`, so a host can catch one thing.

No message, argument or attribute of any of them holds a key or its digest.
"""

from __future__ import annotations


class UsageMiddlewareError(Exception):
    """The base of every error that this package defines."""


class StoreError(UsageMiddlewareError):
    """The store could not do its work: its database failed, is locked, or is not ours.

    The message says which, and the database's own exception is chained as ``__cause__``.
    On the wire it is a 503. Its text is logged, so a store that raises it keeps keys out of it.
    """


class DamagedToken(StoreError):
    """A row of the database is no token.

    :param token_id: its id in that database.
    :param reason: what is wrong with it.
    """

    def __init__(self, token_id: int, reason: str) -> None:
        super().__init__(token_id, reason)
        self.token_id = token_id
        self.reason = reason

    def __str__(self) -> str:
        return f"token {self.token_id} is damaged in the database: {self.reason}"


class QuotaError(UsageMiddlewareError):
    """The base of every refusal that is about a token, its quota or an operation on it."""


class TokenNotFound(QuotaError):
    """There is no such token: it never existed or was deleted."""


class TokenDisabled(QuotaError):
    """The token exists and its operator has switched it off."""


class TokenExpired(QuotaError):
    """The token's ``expires_at`` has passed."""


class QuotaExceeded(QuotaError):
    """The amount is more than the token, or the model's limit, has left."""


class ModelNotAllowed(QuotaError):
    """The token's model limits are enabled and do not list the model."""


class OperationNotFound(QuotaError):
    """There is no operation of that id, or it was pruned."""


class OperationConflict(QuotaError):
    """The operation id was used before, for something else."""
