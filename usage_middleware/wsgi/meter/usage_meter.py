"""The meter: a middleware in front of a service that must not be changed. It charges callers what their requests cost.

.. code-block:: python

    application = UsageMeter(application, SQLiteTokenStore("tokens.db"), cost=FromHeader("X-Usage-Cost", most=500))

It checks the caller's key, reserves the most that the request can cost, lets the answer stream through, and settles
the real cost. It is not a rate limiter or a billing system, and it does not translate between providers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, TypeVar, get_args

from werkzeug.exceptions import HTTPException

from ...checks import check_seconds, check_text
from ...errors import ModelNotAllowed, QuotaExceeded, TokenDisabled, TokenExpired, TokenNotFound
from ...operations import Operation
from ...stores.base import QuotaStore
from ..authentication import Authentication, bearer_key, remove_key
from ..refusals import UNAVAILABLE, UNKNOWN, Refused
from ..responses import ResponsesByOrigin
from ..throttle import Throttle
from .costs import Cost, PerRequest, check_bounds
from .exempt import exemption
from .meter_refusals import EXHAUSTED, EXPIRED, HELD, MODEL_NOT_ALLOWED, error_body, problems, refused_body
from .metered_answer import MeteredAnswer
from .request_body import close_request_body, read_body
from .settlement import Abandoned, Reservation, Settlement, Settler
from .streams import narrowed_encoding

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger("usage_middleware")

_Answer = TypeVar("_Answer")

_EXHAUSTED_STATUSES: Final = (402, 403, 429)


class UsageMeter:
    """Charge each request to a WSGI application to the quota of its caller's key.

    :param app: the application, which need not know about the meter.
    :param store: where tokens and their quota are kept.
    :param cost: what a request costs: a fixed number of quota units, :class:`FromHeader`, :class:`LLMUsage`, or an
        object of your own with the methods of :class:`Cost`.
    :param exempt: what is free: prefixes of paths, compared with ``PATH_INFO`` (``"/static/"`` is everything below it,
        ``"/health"`` also the path itself), or a function of ``environ``. Everything else is metered. A path that may
        lead elsewhere (a segment ``..``, an empty one, a backslash) is metered in any case.
    :param model: the model that a request is for, whose limit and usage it counts against: a name, or a function of
        ``environ`` such as :func:`requested_model`.
    :param key: a function of ``environ`` that returns the key: :func:`bearer_key`, :func:`llm_key`, or your own.
    :param abandoned: what a client is charged if it leaves before the cost is known: the amount ``"reserved"``, what
        was ``"measured"`` so far (the amount reserved if that is nothing), or nothing (``"free"``).
    :param expires_in: seconds after which a reservation lapses if it was never settled, because its process was killed.
        Choose more than the longest request takes.
    :param exhausted_status: the status of the answer to a key whose quota is used up.
    :param forward_key: whether the application gets the header with the key.
    :param fail_open: let requests through without charging them while the store fails. By default they get a 503.
    :param allow_origins, throttle, throttle_storage: as :class:`UsageMiddleware` takes them. They apply to refusals
        only.
    :param on_settled: called with a :class:`Settlement` after each metered request.
    :param on_refused: called with the reason of each refusal: ``no_key``, ``malformed``, ``unknown``, ``expired``,
        ``throttled``, ``model_not_allowed``, ``exhausted``, ``held``, ``unavailable`` or ``invalid_request``.
    :raises TypeError, ValueError: an argument cannot be used.
    :raises ImportError: ``throttle`` is given and ``limits`` is not installed.

    The application finds ``usage_middleware.token`` (as it was before the request), ``usage_middleware.operation_id``
    and ``usage_middleware.charge`` in ``environ``. If it calls the last with a number of quota units, that is the
    cost of the request, whatever ``cost`` finds.

    ``OPTIONS`` passes unmetered, as browsers send it without a key. Answers pass through as they come, chunk by chunk.
    ``Accept-Encoding`` is narrowed to gzip, or to identity for a client that does not accept gzip, because the meter
    cannot decompress anything else to see what an answer costs.
    """

    def __init__(
        self,
        app: WSGIApplication,
        store: QuotaStore,
        *,
        cost: int | Cost = 1,
        exempt: Collection[str] | Callable[[WSGIEnvironment], bool] = (),
        model: str | Callable[[WSGIEnvironment], str | None] | None = None,
        key: Callable[[WSGIEnvironment], str | None] = bearer_key,
        abandoned: Abandoned = "reserved",
        expires_in: float = 3600,
        exhausted_status: Literal[402, 403, 429] = 402,
        forward_key: bool = True,
        fail_open: bool = False,
        allow_origins: str | Collection[str] = "*",
        throttle: str | None = None,
        throttle_storage: str = "memory://",
        on_settled: Callable[[Settlement], None] | None = None,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        if not callable(app):
            raise TypeError(f"app must be a WSGI application, got {type(app).__name__}")
        if not isinstance(store, QuotaStore):
            raise TypeError(f"store must be a QuotaStore, which can reserve and settle, got {type(store).__name__}")
        if not callable(key):
            raise TypeError(f"key must be a function of environ such as llm_key, got {type(key).__name__}")
        if abandoned not in get_args(Abandoned):
            raise ValueError(f"abandoned must be 'reserved', 'measured' or 'free', got {abandoned!r}")
        if exhausted_status not in _EXHAUSTED_STATUSES:
            raise ValueError(f"exhausted_status must be 402, 403 or 429, got {exhausted_status!r}")
        if on_settled is not None and not callable(on_settled):
            raise TypeError(f"on_settled must be a function of a Settlement, got {type(on_settled).__name__}")
        if on_refused is not None and not callable(on_refused):
            raise TypeError(f"on_refused must be a function of a reason, got {type(on_refused).__name__}")
        check_seconds("expires_in", expires_in)
        self.app = app
        self.store = store
        self._cost = _checked_cost(cost)
        self._is_exempt = exemption(exempt)
        self._model = _checked_model(model)
        self._key = key
        self._abandoned: Abandoned = abandoned
        self._expires_in = expires_in
        self._forward_key = forward_key
        self._fail_open = fail_open
        self._responses = ResponsesByOrigin(allow_origins, problems=problems(exhausted_status), error_body=error_body)
        self._authentication = Authentication(
            store, key=key, throttle=None if throttle is None else Throttle(throttle, throttle_storage)
        )
        self._settler = Settler(store, on_settled)
        self._on_refused = on_refused

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        if method == "OPTIONS" or self._is_exempt(environ):
            if not self._forward_key:
                remove_key(environ, self._key(environ))
            return self.app(environ, start_response)

        begun = time.perf_counter()
        try:
            cost, operation = self._admit(environ)
        except Refused as refused:
            close_request_body(environ)
            return self._refuse(refused, environ, start_response)
        except HTTPException as error:
            close_request_body(environ)
            refusal = refused_body(error)
            return error(environ, start_response) if refusal is None else self._refuse(refusal, environ, start_response)
        except BaseException:
            close_request_body(environ)
            raise
        answer = MeteredAnswer(
            start_response,
            cost,
            None if operation is None else Reservation(self._settler, operation, begun, time.perf_counter()),
            abandoned=self._abandoned,
            is_head=method == "HEAD",
        )
        environ["usage_middleware.charge"] = answer.charge
        try:
            iterable = self.app(environ, answer.start)
            if _is_file(iterable, environ) and answer.settle_early():
                close_request_body(environ)
                return iterable
            return answer.wrap(iterable, read_body(environ))
        except BaseException as error:
            answer.fail(error)
            close_request_body(environ)
            raise

    def _admit(self, environ: WSGIEnvironment) -> tuple[Cost, Operation | None]:
        """Return the cost of a request and its reservation, which is ``None`` if the store failed and ``fail_open`` is
        set.

        :raises Refused: the request is refused.
        :raises HTTPException: the request has a body that is not accepted.
        """
        key = self._authentication.key(environ)
        token = self._asked(environ, key, self._authentication.token)
        environ["HTTP_ACCEPT_ENCODING"] = narrowed_encoding(environ.get("HTTP_ACCEPT_ENCODING", ""))
        prepare = getattr(self._cost, "prepare", None)
        cost: Cost = self._cost if prepare is None else prepare(environ)
        model = _checked_name(self._model(environ) if callable(self._model) else self._model)
        most, least = cost.most(environ), cost.least(environ)
        if type(most) is not int or type(least) is not int or not 0 <= least <= most:
            check_bounds(most, least)
        operation = None
        if token is not None:
            environ["usage_middleware.token"] = token
            operation = self._asked(environ, key, partial(self._reserve, most, least, model))
        if operation is not None:
            environ["usage_middleware.operation_id"] = operation.id
        if not self._forward_key:
            remove_key(environ, key)
        return cost, operation

    def _asked(self, environ: WSGIEnvironment, key: str, question: Callable[[str], _Answer]) -> _Answer | None:
        """Return what the store answers, or ``None`` if it failed and ``fail_open`` is set."""
        try:
            return self._authentication.ask(environ, question, key)
        except Refused as refused:
            if refused.kind == UNAVAILABLE and self._fail_open:
                return None
            raise

    def _reserve(self, most: int, least: int, model: str | None, key: str) -> Operation:
        def reserve() -> Operation:
            return self.store.reserve(
                key, most, at_least=None if least == most else least, model=model, expires_in=self._expires_in
            )

        try:
            try:
                return reserve()
            except QuotaExceeded as error:
                # A reservation that could not be settled holds more than it will be charged.
                if error.held and self._settler.settle_waiting():
                    return reserve()
                raise
        except (TokenNotFound, TokenDisabled):
            raise Refused(UNKNOWN) from None
        except TokenExpired:
            raise Refused(EXPIRED) from None
        except ModelNotAllowed:
            raise Refused(MODEL_NOT_ALLOWED) from None
        except QuotaExceeded as error:
            if error.requested <= error.available + error.held:
                raise Refused(HELD, retry_after=1) from None
            raise Refused(EXHAUSTED) from None

    def _refuse(self, refused: Refused, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if self._on_refused is not None:
            try:
                self._on_refused("invalid_request" if refused.kind.isdecimal() else refused.kind.replace(" ", "_"))
            except Exception:
                logger.exception("on_refused failed")
        status, headers, body = self._responses.of(environ).refusal(refused)
        start_response(status, list(headers))
        return [body] if environ["REQUEST_METHOD"] != "HEAD" else []


def _is_file(iterable: Iterable[bytes], environ: WSGIEnvironment) -> bool:
    """Return whether the server can send the answer by itself, without iterating over it (PEP 3333)."""
    file_wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(file_wrapper, type) and isinstance(iterable, file_wrapper)


def _checked_cost(cost: int | Cost) -> Cost:
    if isinstance(cost, int):
        return PerRequest(cost)
    for method in ("most", "least", "reader"):
        if isinstance(cost, type) or not callable(getattr(cost, method, None)):
            raise TypeError(f"cost must be an int of quota units or have the methods of Cost, got {cost!r}")
    return cost


def _checked_model(
    model: str | Callable[[WSGIEnvironment], str | None] | None,
) -> str | Callable[[WSGIEnvironment], str | None] | None:
    if model is not None and not callable(model):
        check_text("model", model)
    return model


def _checked_name(model: str | None) -> str | None:
    """Return the name of a model, if it is possible as a name.

    :raises Refused: it is not.
    """
    if model is not None:
        try:
            check_text("The model", model)
        except ValueError as error:
            raise Refused("400", message=f"{error}.") from None
    return model
