"""An exception that arrives at any step of a call."""

import sys

# Python 3.10 corrupts its stack if an exception arrives before some of the opcodes that end a handler, and crashes
# later.
_STOPS_AT_OPCODES = sys.version_info >= (3, 11)


class Interrupt(BaseException):
    """A stand-in for what a signal handler raises, or what kills a greenlet. No code catches it by accident."""


def interrupted_at(number, call, then):
    """Call ``call``, and raise an exception before the step of that number.

    A step is an opcode, or the beginning, a line or the end of any Python function that is called, including those of
    the standard library.

    :param then: called afterwards, while the exception is handled.
    :return: whether the call had that many steps.
    """
    before = sys.gettrace()
    steps = _Steps(number)
    sys.settrace(steps.count)
    try:
        call()
    except Interrupt:
        sys.settrace(before)
        then()
    else:
        sys.settrace(before)
        then()
    finally:
        sys.settrace(before)
    return steps.left <= 0


def count_steps(call):
    """Return how many steps a call takes, as :func:`interrupted_at` counts them."""
    before = sys.gettrace()
    steps = _Steps(0)
    sys.settrace(steps.count)
    try:
        call()
    finally:
        sys.settrace(before)
    return -steps.left


def interrupt_from_here(number, *functions):
    """Like :func:`interrupted_at`, but in the middle of a call: its steps are counted from the return of this on.

    :param functions: functions that are running now, and are interrupted too.
    :return: a function that ends the counting, and returns whether there were that many steps.
    """
    steps = _Steps(number)
    codes = {function.__code__ for function in functions}
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes:
            frame.f_trace = steps.count
            frame.f_trace_opcodes = _STOPS_AT_OPCODES
        frame = frame.f_back
    sys.settrace(steps.count)

    def end():
        sys.settrace(None)
        return steps.left <= 0

    return end


class _Steps:
    def __init__(self, number):
        self.left = number

    def count(self, frame, event, argument):
        if frame.f_code.co_filename == __file__:
            return None
        frame.f_trace_opcodes = _STOPS_AT_OPCODES
        self.left -= 1
        if self.left == 0:
            raise Interrupt  # which ends the tracing
        return self.count
