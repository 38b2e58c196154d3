"""What must not cross a fork: the one place that holds this rule, for every room that needs it.

A child is a copy of its parent's memory. A connection in it is the parent's: two processes that use one mix up their
words, and to close it may end it for both. SQLite is stricter (sqlite.org/howtocorrupt.html, section 2.6): its record
of the locks that a process has on a file lies in the process's memory, and a child that inherits it takes no locks of
its own, so that others undo what it writes. A child that was forked while another thread was inside of SQLite may
even find a mutex of the whole library locked for good.

- :class:`PerProcess` keeps a value for each process. A child does not see its parent's, and never frees it.
- :func:`hold` and :func:`release` count what is open where even that is not enough. A fork by Python waits until
  nothing is, with :func:`close_before_fork` to help. If it cannot wait for so long, or the fork came from C code, the
  child finds it in :func:`inherited`.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, Generic, Protocol, TypeVar

_Value = TypeVar("_Value")

_PATIENCE: Final = 5.0  # seconds that a fork waits for what other threads hold
_PAUSE: Final = 0.001  # seconds between two looks


class Closer(Protocol):
    """Something that has connections which are not in use."""

    def close_idle(self) -> None: ...


class PerProcess(Generic[_Value]):
    """A value that each process makes for itself when it first asks for it.

    :param make: returns a new value. If several threads ask at once, one of theirs is the value of all.
    :param close: closes the value of this process when the object is not used any more, or the interpreter exits.
    """

    def __init__(self, make: Callable[[], _Value], close: Callable[[_Value], object] = lambda value: None) -> None:
        self._make = make
        self._close = close
        self._values: dict[int, _Value] = {}  # by process id
        _per_process.add(self)
        weakref.finalize(self, _close_own, self._values, close)

    def get(self) -> _Value:
        """Return the value of this process."""
        process = os.getpid()
        value = self._values.get(process)
        return self._values.setdefault(process, self._make()) if value is None else value

    def peek(self) -> _Value | None:
        """Return the value of this process if it has one."""
        return self._values.get(os.getpid())

    def close(self) -> None:
        """Close the value of this process, if it has one, and forget it."""
        _close_own(self._values, self._close)

    def _disown(self) -> None:
        _hand_over(self._values)


def _close_own(values: dict[int, Any], close: Callable[[Any], object]) -> None:
    own = values.pop(os.getpid(), None)
    for inherited in values.values():
        keep(inherited)
    if own is not None:
        close(own)


def keep(thing: object) -> None:
    """Never free ``thing``, not even at the end of the interpreter: an object that is freed closes what it has."""
    import ctypes  # only a child that ends needs it

    # One reference that is never given back.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def hold(thing: object) -> None:
    """Count ``thing`` as open in this process, from before it is opened until :func:`release`, or until it is freed.

    It waits while another thread forks.
    """
    held = _held.setdefault(os.getpid(), set())
    while True:
        # The callback is a C function, so that no exception can come between the end of the object and this.
        held.add(weakref.ref(thing, held.discard))
        # In this order: a fork that begins after the line above sees it, one that has begun before is seen here.
        if time.monotonic() >= max(_forking.values(), default=0.0):
            return
        release(thing)
        time.sleep(_PAUSE)


def release(thing: object) -> None:
    """Count ``thing`` as open no longer."""
    held = _held.get(os.getpid())
    if held is not None:
        held.discard(weakref.ref(thing))


def inherited() -> list[Any]:
    """Return what was open in another thread, or behind Python's back, when this process or its parent was forked."""
    process = os.getpid()
    references = [reference for owner, held in list(_held.items()) if owner != process for reference in list(held)]
    return [thing for reference in references if (thing := reference()) is not None]


def close_before_fork(owner: Closer) -> None:
    """Call ``owner.close_idle()`` before each fork, perhaps several times, as long as there is the owner."""
    _closers.add(weakref.ref(owner, _closers.discard))


_held: Final[dict[int, set[weakref.ref[Any]]]] = {}  # by process id
_closers: Final[set[weakref.ref[Closer]]] = set()
_per_process: Final[weakref.WeakSet[PerProcess[Any]]] = weakref.WeakSet()
# The threads that fork, and when they stop waiting. Something may keep a thread from taking its entry away.
_forking: Final[dict[int, float]] = {}


def _before_fork() -> None:
    deadline = _forking[threading.get_ident()] = time.monotonic() + _PATIENCE
    while True:
        for owner in [reference() for reference in list(_closers)]:
            if owner is not None:
                owner.close_idle()
        if not _held.get(os.getpid()) or time.monotonic() >= deadline:
            return
        time.sleep(_PAUSE)


def _after_fork_in_parent() -> None:
    _forking.pop(threading.get_ident(), None)


def _after_fork_in_child() -> None:
    _forking.clear()
    # A process id is given again. What an ancestor of that id had is not this process's.
    _hand_over(_held)
    for each in list(_per_process):
        each._disown()


def _hand_over(values: dict[int, Any]) -> None:
    namesake = values.pop(os.getpid(), None)
    if namesake is not None:
        values[-id(namesake)] = namesake  # which is in no other place, as it is never freed


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
