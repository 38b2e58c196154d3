"""The progress bar of a long command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from ..printing import say


class Progress:
    """A bar on standard error, if that is a terminal and the length is known.

    :param length: how much there is to do. It is called only if standard error is a terminal.
    """

    def __init__(self, label: str, length: Callable[[], int | None]) -> None:
        known = length() if sys.stderr.isatty() else None
        self._bar = None if known is None else click.progressbar(length=known, label=label, file=sys.stderr)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def move(self, position: Callable[[], int]) -> None:
        """Move the bar to a position between 0 and the length."""
        if self._bar is not None:
            self._bar.update(position() - self._bar.pos)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            say(line)
        else:
            say(f"\r\x1b[K{line}")
            self._bar.render_progress()
