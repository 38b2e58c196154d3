"""Stop a command by a signal so that it cleans up before it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

# Ctrl-C, a supervisor, and a terminal that is closed.
_SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stop:
    """Whether a signal has asked the process to stop, and what to call when it does."""

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
        # Use another thread: an action may wait for the loop that this one runs. Raising an exception instead is not
        # safe: Python discards it if it is raised in a finalizer.
        assert self._action is not None
        threading.Thread(target=self._action, daemon=True).start()


@contextmanager
def stop_in_order() -> Iterator[Stop]:
    """Let signals set :attr:`Stop.is_requested` within the context, instead of ending the process.

    Only the main thread may call this.
    """
    stop = Stop()
    with _handlers(stop._receive):
        yield stop


@contextmanager
def interrupt_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does, so that temporary files are removed and what was done is printed."""

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
        # nohup ignores SIGHUP, and it must stay ignored.
        if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            # None means that the handler was not installed from Python. It cannot be restored from here.
            signal.signal(number, signal.SIG_DFL if former is None else former)
