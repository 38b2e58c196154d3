"""What is well with a store's database, and what is not: a line each, for an operator."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One thing that was looked at.

    A ``"warning"`` is for the operator to judge; with a ``"problem"``, the store does not work as it should, or may
    not for long.
    """

    level: Literal["ok", "warning", "problem"]
    text: str


def ok(text: str) -> Finding:
    return Finding("ok", text)


def warning(text: str) -> Finding:
    return Finding("warning", text)


def problem(text: str) -> Finding:
    return Finding("problem", text)
