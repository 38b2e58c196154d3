"""Being stopped by a signal: a command ends in order, and leaves nothing behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

# Ctrl-C, a supervisor, and a terminal that is closed.
_SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stop:
    """Whether a signal has asked the process to stop, and what is to be done then."""

    def __init__(self) -> None:
        self.is_requested = False
        self._action: Callable[[], object] | None = None

    def call(self, action: Callable[[], object]) -> None:
        """Call ``action`` when a signal comes, or now if it has come already."""
        self._action = action
        if self.is_requested:
            self._start()

    def _receive(self, *_: object) -> None:
        self.is_requested = True
        if self._action is not None:
            self._start()

    def _start(self) -> None:
        # In another thread: an action may wait for the loop that this one is in. To raise an exception instead would
        # not do, as it is lost if Python is in a finalizer.
        assert self._action is not None
        threading.Thread(target=self._action, daemon=True).start()


@contextmanager
def stop_in_order() -> Iterator[Stop]:
    """Let signals set :attr:`Stop.is_requested` within the context, instead of ending the process.

    To be called by the main thread.
    """
    stop = Stop()
    with _handlers(stop._receive):
        yield stop


@contextmanager
def interrupt_in_order() -> Iterator[None]:
    """Let every such signal do what Ctrl-C does, so that temporary files are removed and what was done is printed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        with _handlers(interrupt):
            yield
    else:
        yield


@contextmanager
def _handlers(handler: Callable[..., Any]) -> Iterator[None]:
    before = {}
    for number in _SIGNALS:
        # nohup has a hangup ignored, which is meant to stay.
        if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            # None stands for a handler that was not installed by Python, and cannot be installed again from here.
            signal.signal(number, signal.SIG_DFL if former is None else former)
