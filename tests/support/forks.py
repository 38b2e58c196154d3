"""Fork the test process, and return what happens in the child."""

import os

from processes import end_within


def forked(function):
    """Call a function in a child process. Return the text of what it returned or raised."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            end_within(60)
            try:
                result = str(function())
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
            os.write(sending, result.encode())
        finally:
            os._exit(0)
    os.close(sending)
    with open(receiving) as file:
        result = file.read()
    os.waitpid(child, 0)
    return result
