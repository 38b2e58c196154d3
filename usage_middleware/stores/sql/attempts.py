"""One try of a call, and how far it has come."""

from __future__ import annotations

from enum import Enum, auto


class Stage(Enum):
    """How far a call has got."""

    CONNECTING = auto()
    WORKING = auto()
    COMMITTING = auto()


class Attempt:
    """One try of a call.

    :param until: the time (of :func:`time.monotonic`) at which the call stops waiting for a first answer.
    """

    __slots__ = ("is_lost", "number", "stage", "until")

    def __init__(self, number: int, until: float) -> None:
        self.number = number
        self.until = until
        self.stage = Stage.CONNECTING
        #: Whether its connection was lost.
        self.is_lost = False
