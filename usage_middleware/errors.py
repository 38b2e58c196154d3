"""The exceptions. All derive from :class:`UsageMiddlewareError`, so a host can catch one thing.

Their messages, arguments and attributes never hold a key or its digest.
"""

from __future__ import annotations


class UsageMiddlewareError(Exception):
    """The base of every error that this package defines."""


class StoreError(UsageMiddlewareError):
    """The store could not do its work: its database failed, is locked, or is not ours.

    The message says which, and the database's own exception is chained as ``__cause__``. The client gets a 503. The
    text is logged, so a store must keep keys out of it.
    """


class DamagedToken(StoreError):
    """A row of the database is not a token.

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


class _AboutToken(QuotaError):
    def __init__(self, message: str = "", *, token_id: int | None = None) -> None:
        super().__init__(message)
        #: The token's id, if the caller named it or the store found it.
        self.token_id = token_id


class TokenNotFound(_AboutToken):
    """There is no such token: it never existed or was deleted."""


class TokenDisabled(_AboutToken):
    """The token exists, but its operator has disabled it."""


class TokenExpired(_AboutToken):
    """The token's ``expires_at`` has passed."""


class QuotaExceeded(QuotaError):
    """The amount is more than the token, the model's limit, or the operation to refund has left.

    :param requested: the quota units that were requested; for a reservation with ``at_least``, the least that would
        have done.
    :param available: the quota units that are left; negative when overdrawn.
    :param held: the quota units that open reservations hold of the same quota. Some of them may be released: a
        retry makes sense only if ``requested <= available + held``.
    :param model: the model whose limit is exceeded; ``None``: it is the token's quota, or the operation's.
    """

    def __init__(
        self, message: str = "", *, requested: int = 0, available: int = 0, held: int = 0, model: str | None = None
    ) -> None:
        super().__init__(message)
        self.requested = requested
        self.available = available
        self.held = held
        self.model = model


class ModelNotAllowed(QuotaError):
    """The token's model limits are enabled and do not list the model.

    :param model: the model that was asked for.
    """

    def __init__(self, message: str = "", *, model: str | None = None) -> None:
        super().__init__(message)
        self.model = model


class _AboutOperation(QuotaError):
    def __init__(self, message: str = "", *, operation_id: str | None = None) -> None:
        super().__init__(message)
        #: The operation's id, if the caller named it or the store found it.
        self.operation_id = operation_id


class OperationNotFound(_AboutOperation):
    """There is no operation of that id, or it was pruned."""


class OperationConflict(_AboutOperation):
    """The operation cannot be changed in this way, or its idempotency key was used for another call."""


class UpstreamError(UsageMiddlewareError):
    """The service could not be reached, broke off, or sent something that is not valid HTTP.

    Until it has passed on part of an answer, :class:`Proxy` answers 502. After that, it raises this, so that the server
    closes the client's connection and the client sees that the answer is incomplete.
    """


class UpstreamTimeout(UpstreamError):
    """The service was silent for too long. Until it has passed on part of an answer, :class:`Proxy` answers 504."""
