"""An exception that arrives at any step of a call."""

import sys


class Interrupt(BaseException):
    """What a signal handler raises, or whatever ends a greenlet: nothing catches it by chance."""


def interrupted_at(number, call, *, error=Interrupt):
    """Calls ``call``, and raises an exception before its step of that number: an opcode, or the beginning, a line or
    the end of any function of Python that runs for it.

    :return: whether the call took so many steps; if not, it has returned.
    """
    steps = 0

    def step(frame, event, argument):
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += 1
        if steps == number:
            sys.settrace(None)
            raise error
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        call()
    except error:
        if steps < number:
            raise
        return True
    finally:
        sys.settrace(before)
    return False
