"""Functions that are called in a child process."""

import os


def forked(function):
    """What ``function`` returns in a child process: a text."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
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
