"""Programs of the machine that tests need."""

from __future__ import annotations

import os
import shutil

import pytest

NOTHING_SKIPPED = "USAGE_MIDDLEWARE_TEST_NOTHING_SKIPPED"


def find_program(name: str, package: str) -> str:
    """Return the path of a program. If it is missing, the test is skipped, or fails if none may be skipped.

    :param package: the Debian package that has it.
    """
    # Debian installs servers outside the PATH of an ordinary user.
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
    if found is None:
        reason = f"needs {name}: install Debian's package {package}"
        if os.environ.get(NOTHING_SKIPPED):
            pytest.fail(reason)
        pytest.skip(reason)
    return found
