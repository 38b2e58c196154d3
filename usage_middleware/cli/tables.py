"""Tables and bars for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Final

BAR_CELLS: Final = 20
_SAMPLE: Final = 1000  # rows that decide how wide a column is


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()) -> Iterator[str]:
    """Yield the lines of a table, under a line of headings.

    Rows are never all collected in memory: the first ones decide how wide a column is.

    :param right: the headings of columns that are aligned to the right.
    """
    rows = iter(rows)
    sample = list(islice(rows, _SAMPLE))
    widths = [max(map(width, column)) for column in zip(headings, *sample, strict=True)]
    for row in chain([headings], sample, rows):
        cells = (
            pad(text, size, right=heading in right) for heading, text, size in zip(headings, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()


def pad(text: str, size: int, *, right: bool = False) -> str:
    """Pad ``text`` with spaces to a width of ``size`` columns."""
    padding = " " * (size - width(text))
    return padding + text if right else text + padding


def width(text: str) -> int:
    """Return how many columns of a terminal a text takes: East Asian wide characters take two."""
    return len(text) + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def bar(value: int, whole: int) -> str:
    """Return a bar that is empty only if ``value`` is 0, and full only if it is all of ``whole``."""
    part = value * BAR_CELLS // whole if whole > 0 else BAR_CELLS
    cells = max(min(part, BAR_CELLS), 1 if value > 0 else 0)
    return "█" * cells + "░" * (BAR_CELLS - cells)


def printable(text: str) -> str:
    """Replace characters that would control a terminal instead of being shown by it."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
