"""An answer on its way to the client. Each chunk is read before it is passed on, and the request is settled before the
last chunk is."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from werkzeug.exceptions import ClientDisconnected

from .costs import Cost, CostReader, FixedReader, Headers, Usage
from .request_body import RequestBody
from .settlement import Abandoned, Basis, Head, Outcome, Reservation, charge

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse

logger = logging.getLogger("usage_middleware")

# How much of a JSON answer is read after its client has left, to learn what it cost: bytes and seconds.
_MOST_DRAINED: Final = 2**20
_DRAIN_TIME: Final = 10.0

_Write = Callable[[bytes], object]


class MeteredAnswer:
    """The iterable that the server gets, and the ``start_response`` that the application gets.

    :param reservation: settled once, before the last byte is passed on. ``None``: nothing was reserved.
    :param is_head: whether the request's method is ``HEAD``.
    """

    # What most requests never change, for all of them.
    _is_closed = False
    _stated: Usage | None = None
    _head: Head | None = None
    _is_json = False
    _feed: Callable[[bytes], None] | None = None
    # The extra methods of a reader that changes the answer.
    _change: Callable[[bytes], bytes] | None = None
    _rest: Callable[[], bytes] | None = None
    _left: int | None = None  # bytes of Content-Length that are still to come
    _server_write: _Write | None = None
    _request_body: RequestBody | None = None
    _iterable: Iterable[bytes] = ()
    _next: Callable[[], bytes] | None = None  # made when the server begins to iterate

    def __init__(
        self,
        start_response: StartResponse,
        cost: Cost,
        reservation: Reservation | None,
        *,
        abandoned: Abandoned,
        is_head: bool,
    ) -> None:
        self._start_response = start_response
        self._cost = cost
        self._reservation = reservation
        self._abandoned: Abandoned = abandoned
        self._is_head = is_head
        self._is_settled = reservation is None

    # --- Called by the application.

    def charge(self, units: int, *, input_tokens: int = 0, output_tokens: int = 0) -> None:
        """State what the request costs: ``environ["usage_middleware.charge"](units)``. The last call counts.

        :raises TypeError, ValueError: an argument is not a number from 0 to 2**63 - 1.
        """
        usage = Usage(units, input_tokens, output_tokens)
        if self._is_settled and self._reservation is not None:
            logger.error("usage_middleware.charge was called with %d after its request was settled", units)
        self._stated = usage

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None) -> Any:
        """Take the place of the server's ``start_response``."""
        code = int(status[:3]) if status[:3].isdecimal() else 500
        reader = self._reader(code, headers)
        handed_on = getattr(reader, "answer_headers", headers)
        if exc_info is None:
            write = self._start_response(status, handed_on)
        else:
            # The server raises it again if the head has been sent. Then nothing below is changed.
            try:
                write = self._start_response(status, handed_on, exc_info)
            finally:
                exc_info = None  # a reference cycle otherwise (PEP 3333)
        self._take_head(code, headers, reader)
        # Some servers lack what PEP 3333 requires. An application that needs it fails just as it would without the
        # meter.
        if write is None:
            return None
        self._server_write = write
        return self._write

    def _write(self, data: bytes) -> None:
        assert self._server_write is not None
        data = self._pass(data)
        if data:
            try:
                self._server_write(data)
            except Exception:
                # The server cannot send, because the client has left. The application may raise something else now.
                self._settle_as("abandoned")
                raise

    # --- Called by the server.

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while True:
            try:
                data = (self._next or self._begin())()
            except StopIteration:
                rest = self._end()
                if rest:
                    return rest
                raise
            except BaseException as error:
                self.fail(error)
                raise
            handed_on = self._pass(data)
            # Never pass on an empty chunk that the application did not send: some servers end a body with it.
            if handed_on or not data:
                return handed_on

    def close(self) -> None:
        """Close the application's iterable and, if its end was not reached, settle."""
        if self._is_closed:
            return
        self._is_closed = True
        # A server closes its iterable when its worker is stopped (SystemExit, GreenletExit) as well as when the client
        # has left.
        error = sys.exc_info()[1]
        is_stopped = error is not None and not isinstance(error, (Exception, GeneratorExit))
        ended = False
        try:
            if not self._is_settled and not is_stopped:
                ended = self._drain()
        finally:
            try:
                close = getattr(self._iterable, "close", None)
                if close is not None:
                    close()
            finally:
                self._settle_as("failed" if is_stopped else "abandoned", ended=ended)
                if self._request_body is not None:
                    self._request_body.close()

    def __del__(self) -> None:
        # granian drops an answer without closing it if the client has left before it is asked for. Python may call this
        # at any moment, even while this thread holds a lock of the store. So a later request settles it.
        if not self._is_settled and self._reservation is not None:
            self._is_settled = True
            usage, basis = self._charge(self._reservation, "abandoned", ended=False)
            self._reservation.settle_later(usage, basis, "abandoned", None if self._head is None else self._head.status)

    # --- Called by the meter.

    def wrap(self, iterable: Iterable[bytes], request_body: RequestBody | None) -> Iterable[bytes]:
        """Return what the server gets in place of ``iterable``. It is ``iterable`` itself if nothing more must be read.

        :param request_body: what the application may read until its iterable is closed.
        """
        self._iterable = iterable
        self._request_body = request_body
        # Servers derive a Content-Length from a list.
        if isinstance(iterable, (list, tuple)) and self._change is None:
            if self._feed is not None:
                for data in iterable:
                    self._pass(data)
            elif self._left is not None:
                self._left -= sum(map(len, iterable))
            self._end()
            if request_body is not None:
                request_body.close()
            return iterable
        return self

    def settle_early(self) -> bool:
        """Settle if that is possible without reading the body, and return whether it was."""
        if self._head is None or self._feed is not None or self._change is not None:
            return False
        self._finish()
        return True

    def fail(self, error: BaseException | None = None) -> None:
        """Settle an answer that the application broke off.

        :param error: what it raised. ``ClientDisconnected`` says that the client broke off its request.
        """
        is_left = isinstance(error, ClientDisconnected) and self._head is not None
        self._settle_as("abandoned" if is_left else "failed")

    # --- The rest.

    def _begin(self) -> Callable[[], bytes]:
        self._next = iter(self._iterable).__next__
        return self._next

    def _reader(self, status: int, headers: Headers) -> CostReader:
        try:
            return self._cost.reader(status, headers)
        except Exception:
            logger.exception("%s.reader() failed: the cost is unknown", type(self._cost).__name__)
            return FixedReader(None)

    def _take_head(self, status: int, headers: Headers, reader: CostReader) -> None:
        has_body = not self._is_head and status not in (204, 304)
        is_stated = reader.complete
        is_known = is_stated or isinstance(reader, FixedReader)
        self._head = Head(status, has_body, reader, reader.result(ended=True) if is_known else None, is_stated)
        self._feed = None if is_known or status >= 400 or not has_body else reader.feed
        self._left = _content_length(headers) if has_body else None
        self._is_json = self._feed is not None and _is_json(headers)
        self._change = None if is_known else getattr(reader, "pass_on", None)
        self._rest = None if self._change is None else getattr(reader, "rest", None)

    def _pass(self, data: bytes) -> bytes:
        """Read a chunk, settle if it is the last one, and return what is passed on."""
        if not data:
            return data
        handed_on = data
        if self._change is not None:
            handed_on = self._change(data)
        elif self._is_settled:
            return data
        elif self._feed is not None:
            try:
                self._feed(data)
            except Exception:
                logger.exception("a reader of %s failed: the cost is unknown", type(self._cost).__name__)
                assert self._head is not None
                self._head.reader = FixedReader(None)
                self._feed = None
        left = self._left
        if left is not None:
            left = self._left = left - len(data)
        head = self._head
        if head is not None and not self._is_settled and (head.reader.complete or (left is not None and left <= 0)):
            self._finish()
        return handed_on

    def _end(self) -> bytes:
        """Settle at the end of the iterable, and return what is still to be passed on."""
        rest = b""
        if self._rest is not None:
            rest = self._rest()
        if self._is_settled:
            return rest
        if self._head is None or (self._left is not None and self._left > 0):
            # The client expects more, so the server breaks the connection.
            self.fail()
        else:
            self._finish()
        return rest

    def _finish(self) -> None:
        """Settle an answer that is complete."""
        head = self._head
        assert head is not None
        if head.status >= 500 or getattr(head.reader, "failed", False):
            self._settle_as("failed")
        else:
            self._settle_as("rejected" if head.status >= 400 else "completed")

    def _settle_as(self, outcome: Outcome, *, ended: bool = False) -> None:
        if self._is_settled or self._reservation is None:
            return
        self._is_settled = True
        self._feed = None
        usage, basis = self._charge(self._reservation, outcome, ended)
        self._reservation.settle(usage, basis, outcome, None if self._head is None else self._head.status)

    def _charge(self, reservation: Reservation, outcome: Outcome, ended: bool) -> tuple[Usage, Basis]:
        reserved = reservation.operation.held
        try:
            return charge(outcome, self._head, self._stated, reserved=reserved, abandoned=self._abandoned, ended=ended)
        except Exception:
            logger.exception("a reader of %s failed: the cost is unknown", type(self._cost).__name__)
            return Usage(reserved), "reserved"

    def _drain(self) -> bool:
        """Read the rest of a JSON answer whose client has left, and return whether it came to its end."""
        if not self._is_json or self._feed is None or self._stated is not None:
            return False
        if self._left is not None and self._left > _MOST_DRAINED:
            return False
        drained = 0
        deadline = time.monotonic() + _DRAIN_TIME
        try:
            while drained <= _MOST_DRAINED and time.monotonic() < deadline:
                data = (self._next or self._begin())()
                drained += len(data)
                self._feed(data)
                if self._left is not None:
                    self._left -= len(data)
        except StopIteration:
            return self._left is None or self._left <= 0
        except Exception as error:
            logger.info("an answer whose client had left failed: %s", type(error).__qualname__)
        return False


def _content_length(headers: Headers) -> int | None:
    for name, value in headers:
        # Lengths are compared first, because they are faster to compare.
        if len(name) == 14 and name.lower() == "content-length" and value.isdecimal():
            return int(value)
    return None


def _is_json(headers: Headers) -> bool:
    for name, value in headers:
        if name.lower() == "content-type":
            return value.partition(";")[0].rstrip(" \t").lower().endswith("json")
    return False
