"""The result of checking a store's database: one line per finding, for an operator."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """The result of one check.

    The operator judges a ``"warning"``. A ``"problem"`` means that the store does not work as it should, or may soon
    not.
    """

    level: Literal["ok", "warning", "problem"]
    text: str


def ok(text: str) -> Finding:
    return Finding("ok", text)


def warning(text: str) -> Finding:
    return Finding("warning", text)


def problem(text: str) -> Finding:
    return Finding("problem", text)
