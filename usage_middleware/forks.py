"""What must not cross a fork. All packages that need this rule use this module.

A child is a copy of its parent's memory. A connection in it is the parent's: two processes that use it mix up their
messages, and closing it in one may end it for both. SQLite is stricter (sqlite.org/howtocorrupt.html, section 2.6): its
record of the locks that a process has on a file is in the process's memory. A child that inherits the record takes no
locks of its own, so other processes overwrite what it writes. If another thread was inside SQLite during the fork, the
child may even find a mutex of the whole library locked for good.

- :class:`PerProcess` keeps a value for each process. A child does not see its parent's, and never frees it.
- :func:`hold` and :func:`release` count what is open, for cases where even that is not enough. A fork by Python waits
  until nothing is open; :func:`close_before_fork` helps. If the wait is too long, or C code forks, the child finds what
  was open in :func:`inherited`.

Other libraries have the same trouble with mutexes: a thread that connects to a server may be inside OpenSSL, or look up
a name. It counts as open, too.
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
_PAUSE: Final = 0.001  # seconds between two checks


class Closer(Protocol):
    """An object that has connections which are not in use."""

    def close_idle(self) -> None: ...


class PerProcess(Generic[_Value]):
    """A value that each process makes for itself when it first asks for it.

    :param make: returns a new value. If several threads ask at once, all get the value of one of them.
    :param close: closes the value of this process when the object is freed or the interpreter exits.
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
        try:
            return self._values[process]
        except KeyError:
            return self._values.setdefault(process, self._make())

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
    """Never free ``thing``, not even when the interpreter exits: an object that is freed closes what it has."""
    import ctypes  # imported here, as only a child that exits needs it

    # One reference that is never released.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def hold(thing: object) -> None:
    """Count ``thing`` as open in this process until :func:`release` is called or it is freed.

    Call this before opening it. This waits while another thread forks.
    """
    held = _held.setdefault(os.getpid(), set())
    while True:
        # The callback is a C function, so that no exception can arrive between freeing the object and this.
        held.add(weakref.ref(thing, held.discard))
        # In this order: a fork that begins after the line above sees the entry, and a fork that began before is seen
        # here.
        if time.monotonic() >= max(_forking.values(), default=0.0):
            return
        release(thing)
        time.sleep(_PAUSE)


def release(thing: object) -> None:
    """Stop counting ``thing`` as open."""
    held = _held.get(os.getpid())
    if held is not None:
        held.discard(weakref.ref(thing))


def inherited(kind: type[_Value]) -> list[_Value]:
    """Return what was open, in another thread or at a fork by C code, when this process or its parent was forked.

    :param kind: the class of the things that are looked for.
    """
    process = os.getpid()
    references = [reference for owner, held in list(_held.items()) if owner != process for reference in list(held)]
    return [thing for reference in references if isinstance(thing := reference(), kind)]


def close_before_fork(owner: Closer) -> None:
    """Call ``owner.close_idle()`` before each fork, perhaps several times, until the owner is freed."""
    _closers.add(weakref.ref(owner, _closers.discard))


_held: Final[dict[int, set[weakref.ref[Any]]]] = {}  # by process id
_closers: Final[set[weakref.ref[Closer]]] = set()
_per_process: Final[weakref.WeakSet[PerProcess[Any]]] = weakref.WeakSet()
# The threads that fork, and when they stop waiting. An exception may keep a thread from removing its entry.
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
    # Process ids are reused. What an ancestor with the same id had does not belong to this process.
    _hand_over(_held)
    for each in list(_per_process):
        each._disown()


def _hand_over(values: dict[int, Any]) -> None:
    namesake = values.pop(os.getpid(), None)
    if namesake is not None:
        values[-id(namesake)] = namesake  # it is never freed, so no other object has its id


if hasattr(os, "register_at_fork"):  # not on systems without fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
