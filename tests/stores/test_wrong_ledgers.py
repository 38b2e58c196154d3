"""The contract finds what each store of wrong_ledgers.py gets wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import wrong_ledgers
from processes import environment

WRONG = sorted(name for name in vars(wrong_ledgers) if name.startswith("Test"))


@pytest.fixture(scope="module")
def failures():
    """The names of the tests that each of them fails."""
    options = ["-q", "-rf", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", "-o", "addopts="]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, wrong_ledgers.__file__],
        cwd=Path(__file__).parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    failed = {}
    for name, test in re.findall(r"^FAILED \S+?::(\w+)::(\S+)", done.stdout, re.MULTILINE):
        failed.setdefault(name, []).append(test)
    return failed


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_ledger_is_found(failures, name):
    print(*failures.get(name, ()))
    assert failures.get(name)
