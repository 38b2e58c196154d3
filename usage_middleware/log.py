"""The log of a token: its charges and refunds, for its holder, page by page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, Literal, NamedTuple, Protocol, runtime_checkable

from .operations import Operation

LogKind = Literal["charge", "refund"]
LOG_KINDS: Final[tuple[LogKind, ...]] = ("charge", "refund")


class LogEntry(NamedTuple):
    """One charge or refund. Charges minus refunds are the usage."""

    kind: LogKind
    #: Unix time in whole seconds.
    created_at: int
    #: Quota units: what a charge came to before refunds, what an open reservation holds, what a refund returned.
    units: int
    #: The model's name; empty for a charge without a model.
    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    #: The operation's id.
    id: str = ""
    #: How long the request took, in whole seconds; 0 if it is not known.
    seconds: int = 0
    is_stream: bool = False


@runtime_checkable
class KeepsLog(Protocol):
    """A store that keeps a log of each token's charges."""

    def log(
        self, token_id: int, *, kinds: Collection[LogKind], since: int, until: int, offset: int, size: int
    ) -> Sequence[LogEntry]:
        """Return up to ``size`` entries, the newest first, after the ``offset`` newest.

        :param kinds: which kinds of entries to return.
        :param since: leave out what was made earlier than this Unix time.
        :param until: leave out what was made later than this second.
        """


def log_entry(operation: Operation) -> LogEntry:
    """Return a charge, a reservation or a refund as an entry of the log."""
    return LogEntry(
        kind="refund" if operation.kind == "refund" else "charge",
        created_at=int(operation.created_at),
        units=operation.held if operation.final_amount is None else operation.final_amount,
        model=operation.model or "",
        input_tokens=operation.input_tokens,
        output_tokens=operation.output_tokens,
        id=operation.id,
    )
