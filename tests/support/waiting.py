"""Waiting for what happens soon."""

from __future__ import annotations

import time

DEADLINE = 30  # seconds, for what happens at once on an idle machine


def until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
