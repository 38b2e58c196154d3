"""What a request is finally charged, and the retries of settlements that failed."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from ...errors import QuotaError, StoreError
from ...forks import PerProcess
from ...operations import Operation
from ...stores.base import QuotaStore
from .costs import CostReader, Usage

logger = logging.getLogger("usage_middleware")

#: How a request has ended: with an answer of status 1xx to 3xx; with a 4xx; with a 5xx, an exception, or an answer
#: that broke off or reported a failure; with a client that left before the end.
Outcome = Literal["completed", "rejected", "failed", "abandoned"]
#: The origin of the units: the service has stated them; each request costs the same; they were measured; they are
#: unknown, so the reserved amount is charged; the request is free.
Basis = Literal["stated", "fixed", "measured", "reserved", "free"]
Abandoned = Literal["reserved", "measured", "free"]

# The most reservations that wait in each process, and how many of them one request settles.
_MOST_WAITING: Final = 1000
_MOST_AT_ONCE: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """How one metered request ended, and what it was charged."""

    operation_id: str
    token_id: int
    model: str | None
    #: The quota units that were reserved.
    reserved: int
    #: The quota units that were finally charged.
    units: int
    input_tokens: int
    output_tokens: int
    #: Where the units come from: ``"stated"`` by the service, ``"fixed"`` for each request, ``"measured"``,
    #: ``"reserved"`` (the cost is unknown), or ``"free"``.
    basis: Basis
    #: ``"completed"``: the status is 1xx to 3xx. ``"rejected"``: it is 4xx. ``"failed"``: it is 5xx, there was an
    #: exception, or the answer broke off or reported a failure. ``"abandoned"``: the client left before the end.
    outcome: Outcome
    #: The status of the answer; ``None``: the answer had not begun.
    status: int | None
    #: How many seconds the request took until it was settled.
    seconds: float
    #: Whether the store has accepted it. If not, it is retried with later requests.
    settled: bool
    #: How many seconds the meter itself took, including reading the request's body if it had to be read.
    added: float = 0.0


@dataclass(slots=True)
class Head:
    """What is known of an answer from its status and headers."""

    status: int
    has_body: bool
    reader: CostReader
    #: What the answer costs if it is complete; ``None``: the reader must see the body.
    usage: Usage | None
    #: Whether the service has stated that. Then it also applies to an answer that fails.
    is_stated: bool


def charge(
    outcome: Outcome,
    head: Head | None,
    stated: Usage | None,
    *,
    reserved: int,
    abandoned: Abandoned,
    ended: bool,
) -> tuple[Usage, Basis]:
    """Return what a request is charged. If the service fails, the request is free. If the caller leaves, it is not.

    :param head: ``None``: the answer has not begun.
    :param stated: what the application stated through ``environ``.
    :param reserved: the units that the reservation holds.
    :param ended: whether the reader saw all of the answer.
    """
    if head is None:
        if outcome != "abandoned":
            return _FREE
        if stated is not None:
            return stated, "stated"
        return _FREE if abandoned == "free" else (Usage(reserved), "reserved")
    if stated is not None:
        return stated, "stated"
    if head.usage is not None and head.is_stated:
        return head.usage, "stated"
    if head.status >= 400:
        return _FREE
    if outcome == "failed":
        usage = head.reader.result(ended=False)
        return _FREE if usage is None else (usage, "measured")
    if not head.has_body:
        return _FREE if head.usage is None else (head.usage, "fixed")
    if outcome == "completed":
        usage = head.reader.result(ended=True)
        if usage is None:
            return Usage(reserved), "reserved"
        return usage, "measured" if head.usage is None else "fixed"
    if ended or head.reader.complete or getattr(head.reader, "final", False):
        usage = head.reader.result(ended=ended)
        if usage is not None:
            return usage, "measured"
    if abandoned == "free":
        return _FREE
    usage = head.reader.result(ended=False) if abandoned == "measured" else None
    return (Usage(reserved), "reserved") if usage is None else (usage, "measured")


_FREE: Final[tuple[Usage, Basis]] = (Usage(0), "free")


class Reservation(NamedTuple):
    """The reservation of one request.

    :param begun: when the request began, by :func:`time.perf_counter`.
    :param admitted: when it was admitted.
    """

    settler: Settler
    operation: Operation
    begun: float
    admitted: float

    def settle(self, usage: Usage, basis: Basis, outcome: Outcome, status: int | None) -> None:
        """Settle it now."""
        self.settler.settle(_Charge(self.operation, self.begun, self.admitted, usage, basis, outcome, status))

    def settle_later(self, usage: Usage, basis: Basis, outcome: Outcome, status: int | None) -> None:
        """Let a later request settle it. This takes no lock, so it can be called at any moment."""
        self.settler.settle_later(_Charge(self.operation, self.begun, self.admitted, usage, basis, outcome, status))


class _Charge(NamedTuple):
    operation: Operation
    begun: float
    admitted: float
    usage: Usage
    basis: Basis
    outcome: Outcome
    status: int | None


class Settler:
    """Settle reservations. One that the store fails to settle is kept, and retried after later ones have succeeded.

    :param on_settled: called with each :class:`Settlement`. What it raises is logged.
    """

    def __init__(self, store: QuotaStore, on_settled: Callable[[Settlement], None] | None) -> None:
        self._store = store
        self._on_settled = on_settled
        # A child does not settle what its parent keeps, and does not inherit a lock that another thread held.
        self._queues: PerProcess[_Queue] = PerProcess(_Queue)

    def settle(self, charge: _Charge) -> None:
        """Settle a reservation. If the store accepts it, settle waiting ones too."""
        if self._settle(charge):
            self.settle_waiting()

    def settle_waiting(self) -> bool:
        """Settle some of the waiting reservations, in order, and return whether any was settled."""
        queue = self._queues.peek()
        if queue is None or not queue.retrying.acquire(blocking=False):
            return False
        settled = 0
        try:
            while settled < _MOST_AT_ONCE:
                if queue.untried:
                    settled += self._settle(queue.untried.popleft())
                elif not self._retry(queue):
                    break
                else:
                    settled += 1
        finally:
            queue.retrying.release()
        return settled > 0

    def settle_later(self, charge: _Charge) -> None:
        """Let a later request settle a reservation."""
        self._queues.get().untried.append(charge)

    def _settle(self, charge: _Charge) -> bool:
        asked_at = time.perf_counter()
        error = self._failure(charge)
        if error is not None:
            if _is_final(error):
                _report(charge, f"{_described(error)}. It is not tried again")
            else:
                _report(charge, f"{_described(error)}. It is tried again with later requests")
                self._queues.get().add(charge)
        if self._on_settled is not None:
            self._tell(self._on_settled, charge, asked_at, settled=error is None)
        return error is None

    def _retry(self, queue: _Queue) -> bool:
        """Settle the oldest waiting reservation, and return whether there may be more to do."""
        if not queue.failed:
            return False
        charge = queue.failed.popleft()
        error = self._failure(charge)
        if error is None:
            logger.info("operation %s is settled now", charge.operation.id)
        elif _is_final(error):
            logger.error("operation %s cannot be settled: %s", charge.operation.id, _described(error))
        else:
            queue.failed.appendleft(charge)
            return False
        return True

    def _failure(self, charge: _Charge) -> Exception | None:
        usage = charge.usage
        try:
            self._store.settle(
                charge.operation, usage.units, input_tokens=usage.input_tokens, output_tokens=usage.output_tokens
            )
        except Exception as error:
            return error
        except BaseException:
            # It is unknown whether the store has settled it.
            _report(charge, "the worker is being stopped")
            raise
        return None

    @staticmethod
    def _tell(on_settled: Callable[[Settlement], None], charge: _Charge, asked_at: float, *, settled: bool) -> None:
        operation, begun, admitted, usage, basis, outcome, status = charge
        now = time.perf_counter()
        settlement = Settlement(
            operation_id=operation.id,
            token_id=operation.token_id,
            model=operation.model,
            reserved=operation.held,
            units=usage.units,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            basis=basis,
            outcome=outcome,
            status=status,
            seconds=now - begun,
            settled=settled,
            added=admitted - begun + now - asked_at,
        )
        try:
            on_settled(settlement)
        except Exception:
            logger.exception("on_settled failed for operation %s", operation.id)


class _Queue:
    """The reservations that wait to be settled in one process, the oldest first."""

    def __init__(self) -> None:
        #: Reservations that the store failed to settle, and those that it was not asked to settle yet.
        self.failed: deque[_Charge] = deque()
        self.untried: deque[_Charge] = deque(maxlen=_MOST_WAITING)
        #: One thread at a time retries.
        self.retrying = threading.Lock()

    def add(self, charge: _Charge) -> None:
        """Keep one more reservation. If there are too many, drop the oldest, which the log says how to settle."""
        if len(self.failed) >= _MOST_WAITING:
            self.failed.popleft()
        self.failed.append(charge)


def _report(charge: _Charge, reason: str) -> None:
    logger.error(
        "a reservation could not be settled: %s. By hand: usage-middleware settle %s %d",
        reason,
        charge.operation.id,
        charge.usage.units,
    )


def _is_final(error: Exception) -> bool:
    """Return whether the same call would fail again: the operation is gone, was settled by hand, or is too large."""
    return isinstance(error, (QuotaError, ValueError, TypeError))


def _described(error: Exception) -> str:
    """Return what a log may show of an error. Only this package's own texts are known to hold no secrets."""
    name = type(error).__qualname__
    return f"{name}: {error}" if isinstance(error, (QuotaError, StoreError)) else name
