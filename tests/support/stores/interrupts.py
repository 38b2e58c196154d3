"""An exception that arrives at any step of a call."""

import sys

# Python 3.10 mixes up its stack if an exception comes before some of the opcodes that end a handler, and crashes later.
_STOPS_AT_OPCODES = sys.version_info >= (3, 11)


class Interrupt(BaseException):
    """What a signal handler raises, or what kills a greenlet. No code catches it by chance."""


def interrupted_at(number, call, then):
    """Call ``call``, and raise an exception before its step of that number: an opcode, or the beginning, a line or the
    end of any function of Python that runs for it, the standard library's too.

    :param then: is called afterwards, while the exception is handled.
    :return: whether the call took so many steps.
    """
    left = number

    def step(frame, event, argument):
        nonlocal left
        frame.f_trace_opcodes = _STOPS_AT_OPCODES
        left -= 1
        if left == 0:
            raise Interrupt  # which ends the tracing
        return step

    before = sys.gettrace()
    sys.settrace(step)
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
    return left <= 0
